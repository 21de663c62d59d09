"""A training step of a config, from its shapes alone: no corpus is read, nothing is computed."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from experiments import setup
from experiments.text import TOKEN_DOCUMENTS, TOKEN_FILES
from qkv_jax import data, training
from qkv_jax.ops.mesh import ROWS
from qkv_jax.training import sharding


def vocab_size_of(config: setup.DataConfig, given: int | None) -> int:
    """How many ids a model of this text knows.

    Raises:
      ValueError: only the corpus would tell.
    """
    if given is not None:
        return given
    if config.corpus in (TOKEN_FILES, TOKEN_DOCUMENTS):
        if config.path and Path(config.path).exists():
            return data.TokenFiles.open(config.path).tokenizer.vocab_size
    elif config.tokenizer == "byte":
        return data.ByteTokenizer.vocab_size
    elif config.tokenizer != "char" and config.tokenizer_path is None:
        return config.vocab_size
    raise ValueError(
        f"vocab_size: config.data.corpus = {config.corpus!r} and config.data.tokenizer = "
        f"{config.tokenizer!r} do not say how many ids there are; give --vocab_size, such as "
        "--vocab_size=50257 for GPT-2's"
    )


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A training step of a config, in shapes alone."""

    vocab_size: int
    loss: training.Loss
    optimizer: optax.GradientTransformation
    state: training.TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    accumulate: int

    @classmethod
    def of(cls, settings: setup.Settings, vocab_size: int) -> "AbstractStep":
        """Of a causal language model.

        Raises:
          ValueError: for other tasks, whose batches their data decide.
        """
        setup.check("task", settings.task.__name__, settings.task is setup.TASKS["causal_lm"],
                    "causal_lm, the task whose batches are known without its data")  # fmt: skip
        graphdef, state = setup.abstract_state(settings, vocab_size)
        windows = settings.windows
        names, predict = ["inputs", "targets"], training.predict_tokens
        if settings.data.corpus == TOKEN_DOCUMENTS:
            names, predict = [*names, "segments", "positions"], training.predict_documents
        shape = windows["batch_size"], windows["context"]
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
        return cls(
            vocab_size=vocab_size,
            loss=training.cross_entropy_loss(graphdef, predict),
            optimizer=training.make_optimizer(settings.optimizer, settings.train.num_steps),
            state=state,
            batch=batch,
            accumulate=settings.optimizer.accumulate,
        )

    def estimate(
        self, mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh, **order
    ) -> training.Estimate:
        """What it takes."""
        return training.estimate(
            self.loss, self.optimizer, self.state.params, self.batch, mesh,
            accumulate=self.accumulate, **order,
        )  # fmt: skip

    def train_step(self) -> Callable[..., tuple[training.TrainState, dict[str, jax.Array]]]:
        """`train_step(state, batch)`, not compiled."""
        return training.make_train_step(
            self.loss, self.optimizer, seed=0, accumulate=self.accumulate
        )

    def compiled(self, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
        """The step for a mesh of devices, for a state that it may write over."""
        by_row = NamedSharding(mesh, PartitionSpec(ROWS))
        state, batch = (
            jax.tree.map(
                lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                tree,
                places,
            )
            for tree, places in (
                (self.state, sharding.shardings(self.state, mesh)),
                (self.batch, dict.fromkeys(self.batch, by_row)),
            )
        )
        # A CPU's own scheduler prefers concurrency to memory.
        options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        with jax.set_mesh(mesh):
            lowered = jax.jit(self.train_step(), donate_argnums=0).lower(state, batch)
            return lowered.compile(compiler_options=options)
