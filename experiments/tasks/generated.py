"""Sequences that a rule generates, some places of which have an answer: for decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np
from flax import nnx

from experiments.tasks.drawn import DrawnTask
from experiments.tasks.task import Example
from qkv_jax import data, nn, training
from qkv_jax.data.batches import Batch
from qkv_jax.models import Decoder, DecoderConfig

if TYPE_CHECKING:
    from experiments.setup import Settings


class GeneratedTask(DrawnTask):
    """Batches are generated, new ones each step; a decoder is asked at places of weight 1."""

    config, model = DecoderConfig, Decoder
    kind = "A decoder"
    unit = "answer"
    reads = ("vocab_size",)
    rows: ClassVar[Callable[..., Batch]]  # generates them; it takes the fields in `reads`

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.vocab_size = self.count_ids()
        self.source = f"data: {self.sizes}, of {self.vocab_size:,} ids"
        self.generate(0, 1, data.TRAINING)  # raises where the sizes do not fit

    def count_ids(self) -> int:
        """How many ids the model knows."""
        return self.settings.data.vocab_size

    @property
    def sizes(self) -> str:
        """Of a row, in words."""
        return f"{self.settings.data.context} tokens"

    def generate(self, step: int, batch_size: int, stream: int) -> Batch:
        """`inputs` and `targets`, int32 [B, T], and `weights`, float32 [B, T]: 1 at answers.

        With `distances`, int32 [B, T], how far back an answer stands, it is also measured by that.
        """
        return self.rows(
            seed=self.settings.seed, step=step, batch_size=batch_size, stream=stream,
            **self.arguments(stream),
        )  # fmt: skip

    def arguments(self, stream: int) -> dict[str, Any]:
        """What `rows` is called with beside: the context and the fields in `reads`."""
        return {name: getattr(self.settings.data, name) for name in ("context", *self.reads)}

    def measure(self, graphdef: nnx.GraphDef, params: nn.Params) -> dict[str, float]:
        """Loss and accuracy over as many sequences as while training, but other ones.

        Where answers have distances, also `accuracy_16`, of those at 9 to 16, and so on by powers
        of two.
        """
        scores = super().measure(graphdef, params)
        batches = self.test_batches()
        if "distances" not in batches[0]:
            return scores
        eval_step = training.make_eval_step(graphdef, self.predict)
        farthest = max(batch["distances"].max() for batch in batches)
        low, high = 0, 8
        while low < farthest:
            near = [_only(batch, low, high) for batch in batches]
            if any(batch["weights"].any() for batch in near):
                found = training.mean_metrics(eval_step, params, near)
                scores[f"accuracy_{high}"] = found["accuracy"]
            low, high = high, 2 * high
        return scores

    def floors(self) -> dict[str, float]:
        return {"uniform": float(np.log(self.vocab_size))}

    def describe(self, scores: dict[str, float]) -> list[str]:
        rows = [
            f"| at most {name.removeprefix('accuracy_')} tokens back | {value:.4f} |"
            for name, value in scores.items()
            if name.startswith("accuracy_")
        ]
        return [
            "## Answers",
            "",
            "| answers | accuracy |",
            "|---|---:|",
            f"| all | {scores['accuracy']:.4f} |",
            *rows,
            "",
            f"{scores['loss']:.4f} nats per answer, over {self.validation}. {self.rule}",
        ]

    def sample(self, graphdef: nnx.GraphDef, params: nn.Params) -> tuple[str, str]:
        """One sequence, with the answer that the model gives wherever one is wanted."""
        batch = self._batch(0, data.TEST)
        apply = jax.jit(lambda tokens: nn.merge(graphdef, params)(tokens))
        answers = np.asarray(apply(batch["inputs"][:1]).argmax(-1))[0]
        words = []
        for token, target, answer, wanted in zip(
            batch["inputs"][0], batch["targets"][0], answers, batch["weights"][0], strict=True
        ):
            words.append(self.label(token))
            if wanted:
                right = answer == target
                said = self.label(answer)
                words.append(f"[{said}]" if right else f"[{said}, not {self.label(target)}]")
        return " ".join(words), "A sequence, with the model's answers in brackets."

    def label(self, token: int) -> str:
        """A token, for a person to read."""
        return str(token)

    def example(self) -> Example | None:
        tokens = self._batch(0, data.TEST)["inputs"][0]
        if len(tokens) > 64:  # too small to see
            return None
        return Example(tokens, [self.label(token) for token in tokens])


class Recall(GeneratedTask):
    """Multi-query associative recall: `qkv_jax.data.recall`."""

    rows = staticmethod(data.recall)
    reads = ("vocab_size", "num_pairs", "min_pairs", "ramp_steps")
    rule = "Each row shows keys with their values; asked by a key again, answer with its value."

    def arguments(self, stream: int) -> dict[str, Any]:
        """Rows may have fewer pairs while training; what is measured has all."""
        fewest = {} if stream == data.TRAINING else {"min_pairs": None, "ramp_steps": 0}
        return super().arguments(stream) | fewest

    @property
    def sizes(self) -> str:
        number = self.settings.data.num_pairs
        return f"{number} pairs of a key and a value in {self.settings.data.context} tokens"

    def label(self, token: int) -> str:
        half = self.vocab_size // 2
        return "." if token == 0 else f"k{token}" if token < half else f"v{token - half}"


class Cue(GeneratedTask):
    """One symbol in noise: `qkv_jax.data.cue`."""

    rows = staticmethod(data.cue)
    rule = "One token of a row is no noise; at the end, answer with it."

    def label(self, token: int) -> str:
        half = self.vocab_size // 2
        return "?" if token == 0 else f"c{token}" if token < half else "."


class Copying(GeneratedTask):
    """A row of symbols, and the same again: `qkv_jax.data.copying`."""

    rows = staticmethod(data.copying)
    rule = "After the mark, repeat all symbols before it."

    def label(self, token: int) -> str:
        return "|" if token == 0 else str(token)


def where(batch: Batch, wanted: np.ndarray) -> Batch:
    """The batch with those answers alone that are wanted: bool [B, T]."""
    return batch | {"weights": batch["weights"] * wanted}


def _only(batch: Batch, low: int, high: int) -> Batch:
    """The batch with the answers alone that stand more than `low` and at most `high` back."""
    return where(batch, (batch["distances"] > low) & (batch["distances"] <= high))
