"""Questions whose answer is a span of a generated passage."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.tasks.generated import GeneratedTask
from qkv_jax import data, nn
from qkv_jax.data.batches import Batch
from qkv_jax.data.grammar import WORDS
from qkv_jax.models import EncoderConfig, SpanClassifier

SHOWN = 4  # passages of the sample


def predict_spans(model: nnx.Module, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """The logits of where the answer starts and where it ends, [B, 2, T]."""
    starts_and_ends = model(
        batch["inputs"], segments=batch["segments"], lengths=batch["lengths"], rng=rng
    )
    return jnp.stack(starts_and_ends, axis=1)


class Spans(GeneratedTask):
    """Questions about `qkv_jax.data.passages`."""

    config, model = EncoderConfig, SpanClassifier
    predict = staticmethod(predict_spans)
    rows = staticmethod(data.passages)
    reads = ()
    kind = "An encoder"
    unit = "start or end"
    rule = (
        "Each row asks where somebody is or who is somewhere, and then says it, of several people; "
        "the answer is a span of the row."
    )

    def count_ids(self) -> int:
        return len(WORDS)

    @property
    def sizes(self) -> str:
        return f"questions and passages of at most {self.settings.data.context} words"

    def floors(self) -> dict[str, float]:
        return {"uniform": float(np.log(self.settings.data.context))}

    def measure(self, graphdef: nnx.GraphDef, params: nn.Params) -> dict[str, float]:
        """Also `exact_match`: the share of questions with both start and end right."""
        scores = super().measure(graphdef, params)
        answers = jax.jit(functools.partial(self._answers, graphdef))
        right = [
            (answers(params, batch) == batch["targets"]).all(-1) for batch in self.test_batches()
        ]
        return scores | {"exact_match": float(np.mean(right))}

    def _answers(self, graphdef: nnx.GraphDef, params: nn.Params, batch: Batch) -> jax.Array:
        """The likeliest starts and ends, [B, 2]."""
        return self.predict(nn.merge(graphdef, params), batch, None).argmax(-1)

    def describe(self, scores: dict[str, float]) -> list[str]:
        return [
            "## Answers",
            "",
            f"{scores['exact_match']:.1%} of the answers are exactly right, "
            f"{scores['accuracy']:.1%} of their starts and ends, {scores['loss']:.4f} nats per "
            f"start or end, over {self.validation}. {self.rule}",
        ]

    def sample(self, graphdef: nnx.GraphDef, params: nn.Params) -> tuple[str, str]:
        """Questions, passages and the model's answers."""
        batch = {name: array[:SHOWN] for name, array in self._batch(0, data.TEST).items()}
        lines = []
        for tokens, length, (start, end), (first, last) in zip(
            batch["inputs"], batch["lengths"], np.asarray(self._answers(graphdef, params, batch)),
            batch["targets"], strict=True,
        ):  # fmt: skip
            words = [WORDS[token] for token in tokens[:length]]
            said, right = words[start : end + 1], words[first : last + 1]
            answer = f"[{' '.join(said)}]"
            if (start, end) != (first, last):
                answer = f"[{' '.join(said)}, not {' '.join(right)}]"
            lines.append(f"{' '.join(words)} {answer}")
        return "\n".join(lines), "New questions and passages, with the model's answers in brackets."

    def example(self) -> None:
        """Nothing: an example has no segments."""
