"""What all tasks have in common: see `TASKS` in this package."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from flax import nnx

from qkv_jax import nn, training, viz
from qkv_jax.data.batches import Batch
from qkv_jax.models import attention_maps
from qkv_jax.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.setup import DataConfig, Settings


@dataclasses.dataclass(frozen=True)
class Example:
    """Something that a trained model reads while its attention is drawn."""

    tokens: np.ndarray  # int32 [T]
    labels: Sequence[str]  # of the tokens


class Task(abc.ABC):
    """All that differs between runs that learn different things.

    A task decides the model, its batches, what is measured at the end, and what a person is shown.

    Args:
      settings: of the run.

    Raises:
      ValueError: what the settings name cannot be learnt from.
    """

    config: ClassVar[type]  # of the model
    model: ClassVar[type[nnx.Module]]  # (config, rngs=...)
    # What config.model.kind may name beside "transformer", which is the two above.
    other_models: ClassVar[Mapping[str, tuple[type, type[nnx.Module]]]] = {}
    reads: ClassVar[tuple[str, ...]]  # the fields of config.data that it reads, beside `context`
    unit: ClassVar[str]  # what a loss is the mean over
    kind: ClassVar[str]  # of model, in words
    predict: ClassVar[training.Predict] = staticmethod(training.predict_tokens)

    vocab_size: int  # ids that the model knows
    source: str  # what is learnt from, in a line
    validation: str  # what `measure` looks at, in words

    def __init__(self, settings: Settings):
        self.settings = settings

    @classmethod
    def models(cls) -> dict[str, tuple[type, type[nnx.Module]]]:
        """config.model.kind -> the model's config and the model."""
        return {"transformer": (cls.config, cls.model), **cls.other_models}

    @classmethod
    def of_run(cls, settings: Settings, run: RunDirectory) -> Self:
        """The task of a run that has been trained."""
        del run
        return cls(settings)

    def keep(self, run: RunDirectory) -> None:  # noqa: B027  a rule needs no more than the config
        """Writes what identifies the data into a run, or checks that it is what stands there.

        Raises:
          ValueError: the run was trained on other data.
        """

    @classmethod
    def sizes_of_model(cls, config: DataConfig) -> dict[str, int]:
        """The fields of the model's config that the data decide, beside ids and context."""
        del config
        return {}

    def trained_on(self, steps: int) -> str:
        """How much that many steps see, in words."""
        number, context = self.settings.windows["batch_size"], self.settings.data.context
        return (
            f"{steps:,} steps of {number} windows of {context} tokens "
            f"({steps * number * context:,} tokens)"
        )

    # --- While training ---

    @abc.abstractmethod
    def train_batches(self, step: int) -> Batch:
        """The batches of one dispatch, from `step` on: [steps, B, ...]."""

    def train_rows(self, step: int, rows: slice) -> Batch:
        """Some rows of each of these batches: what one of several processes reads."""
        return {name: array[:, rows] for name, array in self.train_batches(step).items()}

    @abc.abstractmethod
    def eval_batches(self) -> Iterator[Batch]:
        """Batches that were not trained on, the same each time: for looking while training."""

    @property
    def watched(self) -> str:
        """What `eval_batches` holds, in words."""
        number = self.settings.train.eval_batches * self.settings.windows["batch_size"]
        return f"{number} random windows"

    def make_probe(self, graphdef: nnx.GraphDef) -> Callable[[nn.Params], dict[str, float]] | None:
        """What is followed while training beside loss and accuracy: a function of the parameters.

        It is called at each evaluation; what it returns stands in the metrics by its own names.
        """
        del graphdef
        return None

    # --- At the end ---

    @abc.abstractmethod
    def measure(self, graphdef: nnx.GraphDef, params: nn.Params) -> dict[str, float]:
        """How well the model does, by name: `loss` in nats per `unit`, and more."""

    @abc.abstractmethod
    def describe(self, scores: dict[str, float]) -> list[str]:
        """The lines of Markdown that say what `measure` returned."""

    def floors(self) -> dict[str, float]:
        """The losses of predictors without a network."""
        return {}

    def sample(self, graphdef: nnx.GraphDef, params: nn.Params) -> tuple[str, str]:
        """What the model does, for a person to read, and a sentence about it."""
        return "", ""

    def example(self) -> Example | None:
        """What the attention is drawn for; None: nothing."""
        return None

    def stack(self, model: nnx.Module) -> nnx.Module:
        """The part of the model that `attention_maps` looks at."""
        return model

    def attention_figures(self, model: nnx.Module) -> dict[str, Figure]:
        """Pictures of the attention, by their titles: by default, of each layer's to the example.

        Raises:
          NotImplementedError: the model has no attention weights.
        """
        example = self.example()
        if example is None:
            return {}
        maps = np.asarray(attention_maps(self.stack(model), example.tokens[None])[:, 0])
        titles = [f"Attention of layer {layer}" for layer in range(1, len(maps) + 1)]
        return {
            title: viz.heads_figure(weights, example.labels, title=title)
            for title, weights in zip(titles, maps, strict=True)
        }

    def state_size(self, model: nnx.Module) -> int:
        """The numbers that the model keeps of a full context to decode one more token.

        Raises:
          NotImplementedError: the model does not say, or cannot decode.
        """
        if not hasattr(model, "state_size"):
            raise NotImplementedError(f"{type(model).__name__} does not say its state's size")
        return model.state_size(self.settings.data.context)

    @abc.abstractmethod
    def about_data(self) -> list[str]:
        """Lines that say what was trained on."""
