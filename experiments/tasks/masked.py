"""A model that fills in hidden tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from experiments.tasks.task import Example
from experiments.tasks.text import TextTask
from experiments.text import TOKEN_DOCUMENTS, TOKEN_FILES
from qkv_jax import data, nn
from qkv_jax.data.batches import Batch
from qkv_jax.models import EncoderConfig, MaskedLanguageModel

if TYPE_CHECKING:
    from experiments.setup import Settings

BLANK = "□"
MASK = "[MASK]"  # in a text that a person asks about


class MaskedLM(TextTask):
    """Hidden tokens, from those on both sides. The mask's id follows the tokenizer's ids."""

    config, model, own_ids = EncoderConfig, MaskedLanguageModel, 1
    reads = (*TextTask.reads, "mask_rate")
    continues_text = False
    floor_names = ("uniform", "unigram")
    kind = "An encoder"
    unit = "masked token"
    about_loss = (
        "It is the mean over the masked tokens alone, the same ones in every evaluation (of these "
        "80 % are hidden, 10 % replaced and 10 % kept), and each may be guessed from both sides: "
        "it is neither a decoder's loss nor the probability of a text."
    )

    def __init__(self, settings: Settings, tokenizer: data.Tokenizer | None = None):
        super().__init__(settings, tokenizer)
        if settings.data.corpus == TOKEN_DOCUMENTS:
            raise ValueError(
                f"config.data.corpus: {TOKEN_DOCUMENTS!r} is for config.task = 'causal_lm'; "
                f"wanted {TOKEN_FILES!r}"
            )

    def train_batches(self, step: int) -> Batch:
        windows = self.text.train_windows(
            step=step, num_steps=self.settings.train.steps_per_dispatch, **self.settings.windows
        )
        return data.mask_windows(
            windows["inputs"], seed=self.settings.seed, step=step, **self._masking
        )

    def eval_batches(self) -> Iterator[Batch]:
        for step in range(self.settings.train.eval_batches):
            windows = self.text.random_windows(step=step, **self.settings.windows)
            batch = data.mask_windows(
                windows["inputs"][None], seed=self.settings.seed, step=step,
                stream=data.EVALUATION, **self._masking,
            )  # fmt: skip
            yield {name: array[0] for name, array in batch.items()}

    def all_batches(self) -> Iterator[Batch]:
        batches = data.sequential_masked_windows(
            self.text.validation,
            batch_size=self.settings.train.batch_size,
            context=self.settings.data.context,
            **self._masking,
        )
        return self.text.checked(batches)

    def sample(self, graphdef: nnx.GraphDef, params: nn.Params) -> tuple[str, str]:
        """The validation text's beginning with blanks, and filled in."""
        masking, context = self._masking, self.settings.data.context
        tokens = self.text.validation[: self.settings.train.sample_tokens]
        if len(tokens) > context:
            tokens = tokens[: len(tokens) // context * context]  # whole windows
        (batch,) = data.sequential_masked_windows(
            tokens, batch_size=max(1, len(tokens) // context), context=context, **masking
        )
        blank = batch["weights"] == 1
        apply = jax.jit(lambda tokens: nn.merge(graphdef, params)(tokens))
        logits = apply(np.where(blank, self.mask_id, batch["targets"]))
        answers = np.asarray(logits[..., : self.mask_id].argmax(-1))[blank]
        targets = batch["targets"][blank]
        filled = batch["targets"].copy()
        filled[blank] = answers

        decode, labels = self.tokenizer.decode, self.tokenizer.labels
        wrong = [
            f"{labels([answer])[0]!r} for {labels([target])[0]!r}"
            for answer, target in zip(answers, targets, strict=True)
            if answer != target
        ]
        right = f"{len(answers) - len(wrong)} of {len(answers)} are right"
        lines = [_with_blanks(self.tokenizer, tokens, blank.ravel())]
        lines += [f"--- filled in by the model: {right} ---", decode(filled.ravel())]
        if wrong:
            lines += ["--- wrong ---", ", ".join(wrong)]
        about = (
            f"The beginning of the validation text with blanks ({BLANK}), one for each hidden "
            "token, and with the model's likeliest tokens in their places."
        )
        return "\n".join(lines), about

    def read(self, text: str) -> Example:
        """A text as the model reads it: "[MASK]" hides a token."""
        tokens, labels = [], []
        for i, part in enumerate(text.split(MASK)):
            if i:
                tokens.append([self.mask_id])
                labels.append(MASK)
            read = super().read(part)
            tokens.append(read.tokens)
            labels += read.labels
        return Example(np.concatenate(tokens).astype(np.int32), labels)

    def stack(self, model: nnx.Module) -> nnx.Module:
        return model.encoder

    @property
    def mask_id(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def _masking(self) -> dict[str, Any]:
        return {"mask_id": self.mask_id, "mask_rate": self.settings.data.mask_rate}


def _with_blanks(tokenizer: data.Tokenizer, tokens: np.ndarray, blank: np.ndarray) -> str:
    edges = np.flatnonzero(np.diff(blank)) + 1
    return "".join(
        BLANK * len(run) if hidden[0] else tokenizer.decode(run)
        for run, hidden in zip(np.split(tokens, edges), np.split(blank, edges), strict=True)
    )
