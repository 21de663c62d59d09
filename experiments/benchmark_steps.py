"""Training steps of a config, timed on random tokens: tokens a second, MFU and memory.

    python -m experiments.benchmark train --config=configs/gpt2_124m_modern.py --vocab_size=50304
    python -m experiments.benchmark train --config=configs/gpt2_124m.py --vocab_size=50257 \
        --config.train.batch_size=32 --config.optimizer.accumulate=1 --steps=50
    python -m experiments.benchmark train --config=configs/char_lm.py --vocab_size=96 --without_mesh

No corpus is read; everything else is as in `experiments.train`, `config.mesh` too. MFU counts as
`qkv_jax.training.estimates` says, and stands where the chip is known. `--without_mesh` times, in
turn with that, a step that knows of no mesh, on one device.
"""

import dataclasses
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from experiments import cli, setup
from experiments.abstract_step import AbstractStep, vocab_size_of
from experiments.benchmark_table import figure, line, processor, write_both
from experiments.memory import peak_memory
from qkv_jax import training
from qkv_jax.ops.mesh import ROWS
from qkv_jax.training import sharding
from qkv_jax.training.run_directory import versions

STEPS = flags.DEFINE_integer("steps", 20, "train: dispatches of a config that are timed", 1)
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", None, "train: ids of a config's tokenizer", 1)
WITHOUT_MESH = flags.DEFINE_bool("without_mesh", False, "train: time it without a mesh as well")
WARM_UP = 2  # dispatches: the first compiles


@dataclasses.dataclass(frozen=True)
class Timed:
    """What a side's steps took.

    Args:
      side: "mesh", or "no mesh".
      seconds: of each step, the mean over a dispatch.
      tokens: of a step.
      peak_steps: a second, at the peak of the chips; None: not known.
      peak_bytes: that a device held at most, or the process on a CPU.
    """

    side: str
    seconds: list[float]
    tokens: int
    peak_steps: float | None
    peak_bytes: int

    def row(self) -> list[str]:
        """Medians, as cells of a table."""
        step = statistics.median(self.seconds)
        mfu = "chip not known" if self.peak_steps is None else f"{1 / step / self.peak_steps:.1%}"
        return [self.side, figure(step * 1e3), f"{self.tokens / step:,.0f}", mfu,
                figure(self.peak_bytes / 1e9)]  # fmt: skip


def benchmark_steps(config: Any, out: Path) -> None:
    """Times a config's steps, prints the table, and writes it beside what it was made with."""
    with cli.one_sentence():
        settings = setup.resolve(config)
        cli.use_cpu_devices(settings.train.cpu_devices)
        mesh = setup.make_mesh(settings)
        step = AbstractStep.of(settings, vocab_size_of(settings.data, VOCAB_SIZE.value))
        if WITHOUT_MESH.value:
            setup.check("mesh", mesh.size, mesh.size == 1, "one device, for --without_mesh")
    runs = {"mesh": prepared(settings, step, mesh)}
    if WITHOUT_MESH.value:
        runs["no mesh"] = prepared(settings, step, None)
    for _ in range(WARM_UP):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {side: [] for side in runs}
    for i in range(STEPS.value):
        for side, run in list(runs.items())[:: 1 if i % 2 else -1]:  # neither is always first
            started = time.perf_counter()
            run()
            took = time.perf_counter() - started
            seconds[side].append(took / settings.train.steps_per_dispatch)
    peak = training.peak_steps(step.loss, step.state.params, lambda: step.batch, mesh)
    tokens = int(np.prod(step.batch["inputs"].shape))
    timed = [Timed(side, s, tokens, peak, peak_memory()) for side, s in seconds.items()]
    write(settings, mesh, timed, out)


def prepared(
    settings: setup.Settings, step: AbstractStep, mesh: jax.sharding.Mesh | None
) -> Callable[[], None]:
    """Makes the next steps of one dispatch each time it is called, and waits for them."""
    dispatch = settings.train.steps_per_dispatch
    shape = dispatch, *step.batch["inputs"].shape
    tokens = np.random.default_rng(0).integers(0, step.vocab_size, shape, np.int32)
    batches: Any = dict.fromkeys(step.batch, tokens)
    _, params = setup.make_model(settings, step.vocab_size)
    if mesh is None:
        state = training.TrainState.create(params, step.optimizer)
    else:
        state = sharding.placed(params, step.optimizer, mesh)
        batches = jax.device_put(batches, NamedSharding(mesh, PartitionSpec(None, ROWS)))
    train_steps = training.make_train_steps(step.train_step())

    def run() -> None:
        nonlocal state
        state, metrics = train_steps(state, batches, dispatch)
        jax.block_until_ready(metrics)

    def on_mesh() -> None:
        with jax.set_mesh(mesh):
            run()

    return run if mesh is None else on_mesh


def write(settings: setup.Settings, mesh: jax.sharding.Mesh, timed: list[Timed], out: Path) -> None:
    """The table, to the terminal and to `out`, .md and .json."""
    made = versions() | {"processor": processor()}
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    heads = ["side", "ms a step", "tokens/s", "MFU", "peak memory, GB"]
    table = [line(heads), "|---|" + "---:|" * (len(heads) - 1), *(line(t.row()) for t in timed)]
    if len(timed) == 2:
        both = zip(*(t.seconds for t in timed), strict=True)
        ratio = statistics.median(a / b for a, b in both)
        table += ["", f"mesh / no mesh, median over pairs of dispatches: {ratio:.3f}"]
    lines = [
        f"# Training steps of {settings.name}, on random tokens",
        "",
        f"`python -m experiments.benchmark {shlex.join(sys.argv[1:])}`",
        "",
        f"{timed[0].tokens:,} tokens a step, {settings.train.compute_dtype}, mesh: {sizes}. "
        f"Medians of {STEPS.value} dispatches.",
        "",
        *table,
        "",
        *(f"- {name}: {value}" for name, value in made.items()),
        "",
    ]
    print("\n".join(lines[4 : -len(made) - 2]))
    record = {"steps": [dataclasses.asdict(t) for t in timed], "made_with": made}
    write_both(out.with_suffix(""), "\n".join(lines), record)
