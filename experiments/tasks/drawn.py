"""Tasks whose batches a rule draws: new ones each step, a function of the seed and the step."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from flax import nnx

from experiments.tasks.task import Task
from qkv_jax import data, nn, training
from qkv_jax.data.batches import Batch


class DrawnTask(Task):
    """Batches are drawn, new ones each step; rows are what the loss is the mean over, or more."""

    rule: ClassVar[str]  # what is asked and answered, in a sentence

    @abc.abstractmethod
    def generate(self, step: int, batch_size: int, stream: int) -> Batch:
        """What the model reads, and `targets`; optionally `weights`."""

    @property
    def validation(self) -> str:
        number = self.settings.train.eval_batches * self.settings.windows["batch_size"]
        return f"{number:,} new sequences; {self.source}"

    def train_batches(self, step: int) -> Batch:
        number = self.settings.train.steps_per_dispatch
        steps = [self._batch(step + i, data.TRAINING) for i in range(number)]
        return {name: np.stack([batch[name] for batch in steps]) for name in steps[0]}

    def eval_batches(self) -> Iterator[Batch]:
        for step in range(self.settings.train.eval_batches):
            yield self._batch(step, data.EVALUATION)

    def test_batches(self) -> list[Batch]:
        """As many batches as while training, but other ones."""
        return [self._batch(step, data.TEST) for step in range(self.settings.train.eval_batches)]

    def _batch(self, step: int, stream: int) -> Batch:
        return self.generate(step, self.settings.windows["batch_size"], stream)

    def measure(self, graphdef: nnx.GraphDef, params: nn.Params) -> dict[str, float]:
        """Loss and accuracy over `test_batches`."""
        eval_step = training.make_eval_step(graphdef, self.predict)
        return training.mean_metrics(eval_step, params, self.test_batches())

    def about_data(self) -> list[str]:
        return [f"- {self.source}; {self.rule}"]
