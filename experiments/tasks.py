"""What a model learns to predict: it decides the model, its batches, and what is shown of it.

Another task is another class here, with a name in `TASKS`, which `config.task` uses.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np
from flax import nnx

from qkv_jax import data, inference, nn
from qkv_jax.data.batches import Batch
from qkv_jax.models import Decoder, DecoderConfig, EncoderConfig, MaskedLanguageModel
from qkv_jax.models.config import TransformerConfig

if TYPE_CHECKING:
    from experiments.setup import Settings, Text

BLANK = "□"


class Task(abc.ABC):
    """All that differs between runs that predict different things."""

    config: ClassVar[type[TransformerConfig]]
    model: ClassVar[type[nnx.Module]]  # (config, rngs=...), called as model(tokens, rng=...)
    own_ids: ClassVar[int]  # ids that the model knows beside the tokenizer's
    reads: ClassVar[tuple[str, ...]] = ()  # the fields of config.data that not every task reads
    continues_text: ClassVar[bool]  # whether it can write on, and tells the probability of a text
    floors: ClassVar[tuple[str, ...]]  # the predictors of `Text.floors` that it can be compared to
    # In words:
    kind: ClassVar[str]  # of model
    unit: ClassVar[str]  # what a loss is the mean over
    about_loss: ClassVar[str]
    about_sample: ClassVar[str]

    @abc.abstractmethod
    def train_batches(self, settings: Settings, text: Text, step: int) -> Batch:
        """The batches of one dispatch, from `step` on: [steps, B, T]."""

    @abc.abstractmethod
    def eval_batches(self, settings: Settings, text: Text) -> Iterator[Batch]:
        """Random batches of the validation text, the same each time: for looking while training."""

    @abc.abstractmethod
    def all_batches(self, settings: Settings, text: Text) -> Iterator[Batch]:
        """Batches that go through the validation text once."""

    @abc.abstractmethod
    def sample(
        self, settings: Settings, text: Text, graphdef: nnx.GraphDef, params: nn.Params
    ) -> str:
        """What the model makes of the validation text's beginning, for a person to read."""

    def stack(self, model: nnx.Module) -> nnx.Module:
        """The part of the model that `attention_maps` looks at."""
        return model


class CausalLM(Task):
    """The next token, from those before it."""

    config, model, own_ids = DecoderConfig, Decoder, 0
    continues_text = True
    floors = ("uniform", "unigram", "bigram")
    kind = "A decoder"
    unit = "token"
    about_loss = "Every token but the first is predicted once, from those before it in its window."
    about_sample = "The first words are the validation text's; temperature 0.8."

    def train_batches(self, settings: Settings, text: Text, step: int) -> Batch:
        return data.stacked_windows(
            text.train, step=step, num_steps=settings.train.steps_per_dispatch, **settings.windows
        )

    def eval_batches(self, settings: Settings, text: Text) -> Iterator[Batch]:
        for step in range(settings.train.eval_batches):
            yield data.random_windows(
                text.validation, step=step, stream=data.EVALUATION, **settings.windows
            )

    def all_batches(self, settings: Settings, text: Text) -> Iterator[Batch]:
        return data.sequential_windows(
            text.validation, batch_size=settings.train.batch_size, context=settings.data.context
        )

    def sample(
        self, settings: Settings, text: Text, graphdef: nnx.GraphDef, params: nn.Params
    ) -> str:
        """Text that the model writes after the validation text's first words."""
        prompt = text.validation[: settings.data.context // 4 or 1].astype(np.int32)[None]
        tokens = inference.generate(
            graphdef,
            params,
            prompt,
            num_tokens=settings.train.sample_tokens,
            context=settings.data.context,
            rng=jax.random.key(settings.seed),
            temperature=0.8,
        )
        return text.tokenizer.decode(np.concatenate([prompt[0], np.asarray(tokens[0])]))


class MaskedLM(Task):
    """Hidden tokens, from those on both sides. The mask's id follows the tokenizer's ids."""

    config, model, own_ids = EncoderConfig, MaskedLanguageModel, 1
    reads = ("mask_rate",)
    continues_text = False
    floors = ("uniform", "unigram")
    kind = "An encoder"
    unit = "masked token"
    about_loss = (
        "It is the mean over the masked tokens alone, the same ones in every evaluation (of these "
        "80 % are hidden, 10 % replaced and 10 % kept), and each may be guessed from both sides: "
        "it is neither a decoder's loss nor the probability of a text."
    )
    about_sample = (
        f"The beginning of the validation text with blanks ({BLANK}), one for each hidden token, "
        "and with the model's likeliest tokens in their places."
    )

    def train_batches(self, settings: Settings, text: Text, step: int) -> Batch:
        return data.stacked_masked_windows(
            text.train,
            step=step,
            num_steps=settings.train.steps_per_dispatch,
            **settings.windows,
            **self._masking(settings, text),
        )

    def eval_batches(self, settings: Settings, text: Text) -> Iterator[Batch]:
        for step in range(settings.train.eval_batches):
            yield data.masked_windows(
                text.validation,
                step=step,
                stream=data.EVALUATION,
                **settings.windows,
                **self._masking(settings, text),
            )

    def all_batches(self, settings: Settings, text: Text) -> Iterator[Batch]:
        return data.sequential_masked_windows(
            text.validation,
            batch_size=settings.train.batch_size,
            context=settings.data.context,
            **self._masking(settings, text),
        )

    def sample(
        self, settings: Settings, text: Text, graphdef: nnx.GraphDef, params: nn.Params
    ) -> str:
        """The validation text's beginning with blanks, and filled in."""
        masking = self._masking(settings, text)
        tokens, context = text.validation[: settings.train.sample_tokens], settings.data.context
        if len(tokens) > context:
            tokens = tokens[: len(tokens) // context * context]  # whole windows
        (batch,) = data.sequential_masked_windows(
            tokens, batch_size=max(1, len(tokens) // context), context=context, **masking
        )
        blank = batch["weights"] == 1
        apply = jax.jit(lambda tokens: nn.merge(graphdef, params)(tokens))
        logits = apply(np.where(blank, masking["mask_id"], batch["targets"]))
        answers = np.asarray(logits[..., : masking["mask_id"]].argmax(-1))[blank]
        targets = batch["targets"][blank]
        filled = batch["targets"].copy()
        filled[blank] = answers

        decode = text.tokenizer.decode
        wrong = [
            f"{decode([answer])!r} for {decode([target])!r}"
            for answer, target in zip(answers, targets, strict=True)
            if answer != target
        ]
        right = f"{len(answers) - len(wrong)} of {len(answers)} are right"
        lines = [_with_blanks(text, tokens, blank.ravel())]
        lines += [f"--- filled in by the model: {right} ---", decode(filled.ravel())]
        if wrong:
            lines += ["--- wrong ---", ", ".join(wrong)]
        return "\n".join(lines)

    def stack(self, model: nnx.Module) -> nnx.Module:
        return model.encoder

    def _masking(self, settings: Settings, text: Text) -> dict[str, Any]:
        return {"mask_id": text.tokenizer.vocab_size, "mask_rate": settings.data.mask_rate}


def _with_blanks(text: Text, tokens: np.ndarray, blank: np.ndarray) -> str:
    edges = np.flatnonzero(np.diff(blank)) + 1
    return "".join(
        BLANK * len(run) if hidden[0] else text.tokenizer.decode(run)
        for run, hidden in zip(np.split(tokens, edges), np.split(blank, edges), strict=True)
    )


TASKS: dict[str, Task] = {"causal_lm": CausalLM(), "masked_lm": MaskedLM()}
