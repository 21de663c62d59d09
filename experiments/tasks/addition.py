"""Sums modulo p: some are shown, the others must be understood."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx

from experiments.tasks.generated import GeneratedTask
from experiments.tasks.task import Example
from qkv_jax import data, nn, training

if TYPE_CHECKING:
    from experiments.setup import Settings

FEW = 5  # frequencies


class ModularAddition(GeneratedTask):
    """a + b modulo p: `qkv_jax.data.modular_addition`."""

    rows = staticmethod(data.modular_addition)
    reads = ("vocab_size", "validation_fraction")
    unit = "sum"
    rule = "Each row is a + b =, at which the sum modulo p is wanted; the held-out are not shown."

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self._batch(0, data.TRAINING)  # raises where it is larger than all that is to be learnt

    @property
    def sizes(self) -> str:
        modulus, held_out = self.vocab_size - 1, self.settings.data.validation_fraction
        return f"the sums of two numbers modulo {modulus}, {held_out:.0%} of them held out"

    @property
    def watched(self) -> str:
        drawn = sum(int(batch["weights"].sum()) for batch in self.eval_batches())
        return f"{drawn:,} sums that were held out"

    @property
    def validation(self) -> str:
        return f"{self.watched}; {self.source}"

    def make_probe(self, graphdef: nnx.GraphDef) -> Callable[[nn.Params], dict[str, float]]:
        """`train_accuracy` and `train_loss`, over a batch that was trained on, and `frequencies`.

        The last is the share of the numbers' embedding, in their Fourier transform, that lies in
        its five strongest frequencies: near 1 where it is a few circles, on which angles are added.
        """
        eval_step = training.make_eval_step(graphdef, self.predict)
        batch = self._batch(0, data.TRAINING)

        def probe(params: nn.Params) -> dict[str, float]:
            trained = training.mean_metrics(eval_step, params, [batch])
            power = power_spectrum(params["embedding"]["embedding"][: self.vocab_size - 1])
            share = np.sort(power)[-FEW:].sum() / power.sum()
            return {f"train_{name}": x for name, x in trained.items()} | {"frequencies": share}

        return probe

    def measure(self, graphdef: nnx.GraphDef, params: nn.Params) -> dict[str, float]:
        return super().measure(graphdef, params) | self.make_probe(graphdef)(params)

    def label(self, token: int) -> str:
        return "=" if token == self.vocab_size - 1 else str(token)

    def example(self) -> Example:
        tokens = self._batch(0, data.TEST)["inputs"][0]
        return Example(tokens, [self.label(token) for token in tokens])


def power_spectrum(embedding: jax.Array) -> np.ndarray:
    """The power of the frequencies 1 ... p/2 in numbers' embeddings, [p, D] -> float64 [p // 2]."""
    waves = np.fft.rfft(np.asarray(embedding, np.float64), axis=0)[1:]
    return (np.abs(waves) ** 2).sum(-1)
