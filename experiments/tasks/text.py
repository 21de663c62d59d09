"""Language models of a text: what all share, and the causal one."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Self

import jax
import numpy as np
from flax import nnx

from experiments.tasks.task import Example, Task
from experiments.text import TOKEN_DOCUMENTS, Text, keep_text, load_text
from qkv_jax import data, inference, nn, training
from qkv_jax.data.batches import Batch
from qkv_jax.models import Decoder, DecoderConfig, interpolate_positions
from qkv_jax.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from experiments.setup import Settings

EXAMPLE_LENGTH = 32  # tokens of the line whose attention is drawn


class TextTask(Task):
    """Windows of a corpus in tokens.

    Args:
      settings: of the run.
      tokenizer: of a run that has been trained; None: built from the corpus.
    """

    reads = (
        "corpus", "path", "tokenizer", "vocab_size", "tokenizer_path", "validation_fraction",
    )  # fmt: skip
    own_ids: ClassVar[int] = 0  # ids that the model knows beside the tokenizer's
    continues_text: ClassVar[bool]  # whether it can write on, and tells the probability of a text
    floor_names: ClassVar[tuple[str, ...]]  # the predictors that it can be compared to
    about_loss: ClassVar[str]

    def __init__(self, settings: Settings, tokenizer: data.Tokenizer | None = None):
        super().__init__(settings)
        self.tokenizer = self.text.tokenizer if tokenizer is None else tokenizer
        self.vocab_size = self.tokenizer.vocab_size + self.own_ids
        self._validated = "the validation part of"

    @classmethod
    def of_run(cls, settings: Settings, run: RunDirectory) -> Self:
        return cls(settings, data.Tokenizer.load(run.tokenizer))

    @functools.cached_property
    def text(self) -> Text:
        """Read where it is asked for: a trained model needs its tokenizer alone."""
        return load_text(self.settings.data, getattr(self, "tokenizer", None))

    def validate_on(self, path: str) -> None:
        """Takes all of another text for the validation text.

        Raises:
          ValueError: it cannot be read, or is too short.
        """
        other = data.text_file(path)
        tokens = data.pack_tokens(self.tokenizer.encode(other.text), self.tokenizer.vocab_size)
        if len(tokens) < 2:
            raise ValueError(f"text: {path} has {len(tokens)} token; wanted at least 2")
        self.text = self.text.with_validation(other, tokens)
        self._validated = "all of"

    @property
    def source(self) -> str:
        corpus = self.text.corpus
        return f"text: {corpus.source}, {corpus.characters:,} characters"

    @property
    def validation(self) -> str:
        corpus, number = self.text.corpus, len(self.text.validation)
        return f"{self._validated} {corpus.source}: {number:,} tokens"

    def keep(self, run: RunDirectory) -> None:
        keep_text(run, self.text)

    @abc.abstractmethod
    def all_batches(self) -> Iterator[Batch]:
        """Batches that go through the validation text once."""

    def measure(self, graphdef: nnx.GraphDef, params: nn.Params) -> dict[str, float]:
        """The loss over the full validation text, and bits per character where losses add up."""
        eval_step = training.make_eval_step(graphdef, self.predict)
        scores = training.mean_metrics(eval_step, params, self.all_batches())
        if self.continues_text:
            scores["bits_per_character"] = self._bits(scores["loss"])
        return scores

    def floors(self) -> dict[str, float]:
        return {name: self.text.floors[name] for name in self.floor_names}

    def describe(self, scores: dict[str, float]) -> list[str]:
        return [
            "## Loss over the full validation text",
            "",
            self.table(scores),
            "",
            f"{self.about_loss} {self.text.about_floors}; "
            f"the model's likeliest token is right {scores['accuracy']:.1%} of the time.",
            *_longer_lines(scores),
        ]

    def table(self, scores: dict[str, float]) -> str:
        """The model's loss and the floors', in several units, as Markdown."""
        columns = {f"nats per {self.unit}": lambda loss: f"{loss:.4f}"}
        if self.continues_text:
            columns["bits per character"] = lambda loss: f"{self._bits(loss):.4f}"
        columns[f"perplexity per {self.unit}"] = lambda loss: f"{math.exp(loss):.3f}"
        lines = [f"| predictor | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
        for name, loss in ({"model": scores["loss"]} | self.floors()).items():
            lines.append(f"| {name} | {' | '.join(show(loss) for show in columns.values())} |")
        return "\n".join(lines)

    def _bits(self, loss: float) -> float:
        text = self.text
        return data.bits_per_character(loss, text.validation_targets, text.validation_characters)

    def read(self, text: str) -> Example:
        """A text as the model reads it.

        Raises:
          ValueError: the tokenizer does not know it.
        """
        tokens = self.tokenizer.encode(text).astype(np.int32)
        return Example(tokens, self.tokenizer.labels(tokens))

    def example(self) -> Example:
        length = min(EXAMPLE_LENGTH, self.settings.data.context)
        tokens = np.asarray(self.text.validation[:length], np.int32)
        return Example(tokens, self.tokenizer.labels(tokens))

    def about_data(self) -> list[str]:
        text = self.text
        return [
            f"- text: {text.corpus.source}; {text.corpus.characters:,} characters, sha256 "
            f"`{text.corpus.sha256}`",
            f"- tokens: {self.tokenizer.name}, vocabulary {self.tokenizer.vocab_size}; "
            f"{len(text.train):,} to train on, {len(text.validation):,} to validate",
        ]


def _longer_lines(scores: dict[str, float]) -> list[str]:
    """What was measured on longer windows, as Markdown."""
    found = {
        name.replace("_", ", windows of "): loss
        for name, loss in scores.items()
        if name.endswith("x")
    }
    if not found:
        return []
    head = ["", "| longer texts | nats per token |", "|---|---:|"]
    return head + [f"| {name} the length | {loss:.4f} |" for name, loss in found.items()]


class CausalLM(TextTask):
    """The next token, from those before it."""

    config, model = DecoderConfig, Decoder
    continues_text = True
    floor_names = ("uniform", "unigram", "bigram")
    reads = (*TextTask.reads, "longer")
    kind = "A decoder"
    unit = "token"
    about_loss = "Every token but the first is predicted once, from those before it in its window."

    def __init__(self, settings: Settings, tokenizer: data.Tokenizer | None = None):
        super().__init__(settings, tokenizer)
        if settings.data.corpus == TOKEN_DOCUMENTS:
            self.predict = training.predict_documents
            self.about_loss = (
                "Every token but each document's first is predicted once, from those of its "
                "document before it in its window."
            )

    def train_rows(self, step: int, rows: slice) -> Batch:
        settings = self.settings
        return self.text.train_windows(
            step=step,
            num_steps=settings.train.steps_per_dispatch,
            rows=rows,
            **settings.windows,
        )

    def train_batches(self, step: int) -> Batch:
        return self.train_rows(step, data.EVERY_ROW)

    def eval_batches(self) -> Iterator[Batch]:
        for step in range(self.settings.train.eval_batches):
            yield self.text.random_windows(step=step, **self.settings.windows)

    def all_batches(self) -> Iterator[Batch]:
        return self.text.all_windows(
            batch_size=self.settings.train.batch_size, context=self.settings.data.context
        )

    def measure(self, graphdef: nnx.GraphDef, params: nn.Params) -> dict[str, float]:
        """Also `loss_4x` of windows four times longer, and so on for the factors in `data.longer`.

        Rotary positions are evaluated twice, as they are and interpolated: `interpolated_4x`. A
        table of learned positions ends where the training's windows did.
        """
        scores = super().measure(graphdef, params)
        position = self.settings.model["position"]
        for factor in self.settings.data.longer if position != "learned" else ():
            scores[f"loss_{factor}x"] = self._longer(nn.merge(graphdef, params), factor)
            if position == "rotary":
                model = interpolate_positions(nn.merge(graphdef, params), factor)
                scores[f"interpolated_{factor}x"] = self._longer(model, factor)
        return scores

    def _longer(self, model: nnx.Module, factor: int) -> float:
        graphdef, params = nn.split(model)
        batches = self.text.all_windows(
            batch_size=-(-self.settings.train.batch_size // factor),
            context=self.settings.data.context * factor,
        )
        eval_step = training.make_eval_step(graphdef, self.predict)
        return training.mean_metrics(eval_step, params, batches)["loss"]

    def sample(self, graphdef: nnx.GraphDef, params: nn.Params) -> tuple[str, str]:
        """Text that the model writes after the validation text's first words."""
        settings = self.settings
        start = self.text.validation[: settings.data.context // 4 or 1]
        prompt = np.asarray(start, np.int32)[None]
        tokens = inference.generate(
            graphdef,
            params,
            prompt,
            num_tokens=settings.train.sample_tokens,
            context=settings.data.context,
            rng=jax.random.key(settings.seed),
            temperature=0.8,
        )
        sample = self.tokenizer.decode(np.concatenate([prompt[0], np.asarray(tokens[0])]))
        return sample, "The first words are the validation text's; temperature 0.8."
