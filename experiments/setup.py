"""From a config to the things that a script works with; the same for every script."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from configs import char_lm
from experiments.tasks import TASKS, Task
from qkv_jax import nn
from qkv_jax.models import MIXERS, DecoderConfig
from qkv_jax.training import (
    OptimizerConfig,
    TrainState,
    load_checkpoint,
    make_optimizer,
    sharding,
)
from qkv_jax.training.run_directory import (
    RunDirectory,
    config_from_json,
    config_to_json,
    flat_fields,
    read_config,
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is learnt from, in what tokens. `configs/char_lm.py` explains the fields."""

    corpus: str
    path: str | None
    tokenizer: str
    vocab_size: int
    tokenizer_path: str | None
    validation_fraction: float
    context: int
    longer: tuple[int, ...]
    mask_rate: float
    num_pairs: int
    min_pairs: int | None
    ramp_steps: int
    min_length: int
    max_depth: int
    max_args: int
    num_documents: int
    pairs: str
    num_examples: int
    target_path: str | None
    test_path: str | None
    test_target_path: str | None
    bleu_tokenizer: str

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "num_pairs", "min_length", "max_depth", "max_args",
                     "num_documents", "num_examples"):  # fmt: skip
            check(f"data.{name}", getattr(self, name), getattr(self, name) >= 1, "an integer >= 1")
        longer = all(isinstance(factor, int) and factor > 1 for factor in self.longer)
        check("data.longer", self.longer, longer, "integers > 1")
        fraction = self.validation_fraction
        check("data.validation_fraction", fraction, 0 < fraction < 1, "a number in (0, 1)")
        tokenizers = ("13a", "intl", "char", "zh", "none")
        check("data.bleu_tokenizer", self.bleu_tokenizer, self.bleu_tokenizer in tokenizers,
              f"one of {list(tokenizers)}")  # fmt: skip
        check("data.mask_rate", self.mask_rate, 0 < self.mask_rate < 1, "a number in (0, 1)")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, and how often what. `configs/char_lm.py` explains the fields."""

    num_steps: int
    stop_accuracy: float | None
    batch_size: int
    eval_every: int
    eval_batches: int
    save_every: int
    save_minutes: float
    keep: int
    keep_every: int
    spike_factor: float
    log_every: int
    steps_per_dispatch: int
    cpu_devices: int
    compute_dtype: str
    remat: bool
    sample_tokens: int
    figures: bool
    wandb: bool

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "eval_every", "eval_batches", "keep", "log_every",
                     "steps_per_dispatch", "cpu_devices", "sample_tokens"):  # fmt: skip
            check(f"train.{name}", getattr(self, name), getattr(self, name) >= 1, "an integer >= 1")
        for name in ("save_every", "keep_every"):
            check(f"train.{name}", getattr(self, name), getattr(self, name) >= 0, "an integer >= 0")
        minutes, factor = self.save_minutes, self.spike_factor
        check("train.save_minutes", minutes, minutes >= 0, "a number >= 0")
        check("train.spike_factor", factor, factor == 0 or factor > 1, "a number > 1, or 0")
        stop = self.stop_accuracy
        check("train.stop_accuracy", stop, stop is None or 0 < stop <= 1, "a number in (0, 1]")
        dtypes = ("float32", "bfloat16")
        check("train.compute_dtype", self.compute_dtype, self.compute_dtype in dtypes,
              f"one of {list(dtypes)}")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """A config after the checks that need no text: frozen, typed, complete."""

    name: str
    seed: int
    task: type[Task]
    data: DataConfig
    model: dict[str, Any]
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: sharding.MeshConfig

    @property
    def windows(self) -> dict[str, int]:
        """What every random batch is drawn with."""
        return {
            "seed": self.seed,
            "batch_size": self.train.batch_size * self.optimizer.accumulate,
            "context": self.data.context,
        }

    def model_config(self, vocab_size: int) -> Any:
        """The model's config for so many ids: of all fields, those that this model has."""
        config, _ = self.model_classes
        values = self.model | {
            "vocab_size": vocab_size,
            "context": self.data.context,
            "dtype": self.train.compute_dtype,
            "remat": self.train.remat,
            **self.task.sizes_of_model(self.data),
        }
        return config(**{name: values[name] for name in _fields(config) if name in values})

    @property
    def model_classes(self) -> tuple[type, type[nnx.Module]]:
        """The model's config, and the model."""
        return self.task.models()[self.model["kind"]]


def check(name: str, value: Any, right: bool, wanted: str) -> None:
    """Raises a ValueError that names the config's field, unless `right`."""
    if not right:
        raise ValueError(f"config.{name}: wanted {wanted}, got {value!r}")


def resolve(config: ConfigDict) -> Settings:
    """Checks a config before anything is read, made or compiled.

    Raises:
      ValueError: naming the field, what came and what was wanted.
    """
    # A config file may have added a field by misspelling one: the base knows those that exist.
    values = config_from_json(config_to_json(config), char_lm.get_config()).to_dict()
    for name, value in flat_fields(values):
        if isinstance(value, float):
            check(name, value, abs(value) <= float(np.finfo(np.float32).max), "a float32 number")
    name = values["name"]
    is_plain = name == Path(name).name and name not in ("", "..")
    check("name", name, is_plain, "a name for a folder in runs")
    check("seed", values["seed"], 0 <= values["seed"] < 2**31, "an integer in [0, 2**31)")
    task = values["task"]
    check("task", task, task in TASKS, f"one of {sorted(TASKS)}")
    _check_read(task, values["data"])
    settings = Settings(
        name=values["name"],
        seed=values["seed"],
        task=TASKS[task],
        data=DataConfig(**values["data"]),
        model=values["model"],
        optimizer=OptimizerConfig(**values["optimizer"]),
        train=TrainConfig(**values["train"]),
        mesh=sharding.MeshConfig(**values["mesh"]),
    )
    _check_model(settings)
    settings.model_config(vocab_size=1)  # its checks do not depend on the vocabulary
    return settings


def _check_read(task: str, values: dict[str, Any]) -> None:
    """Checks that no field of config.data was set which only other tasks read."""
    defaults = char_lm.get_config().data
    for name in sorted({name for other in TASKS.values() for name in other.reads}):
        readers = sorted(other for other in TASKS if name in TASKS[other].reads)
        if task not in readers and values[name] != defaults[name]:
            raise ValueError(
                f"config.data.{name}: {values[name]!r} was set, but config.task = {task!r} does "
                f"not read it; these do: {', '.join(readers)}"
            )


def _check_model(settings: Settings) -> None:
    """Checks the kind of model, and that no field was set which only other models read."""
    known, kind = settings.task.models(), settings.model["kind"]
    check("model.kind", kind, kind in known, f"one of {sorted(known)}")
    read = _fields(settings.model_classes[0])
    defaults = char_lm.get_config().model
    for name, value in settings.model.items():
        if name != "kind" and name not in read and value != defaults[name]:
            raise ValueError(
                f"config.model.{name}: {value!r} was set, but config.model.kind = {kind!r} of this "
                "task does not read it"
            )
    if settings.train.remat and "remat" not in read:
        raise ValueError(
            f"config.train.remat: True was set, but config.model.kind = {kind!r} does not read it"
        )


def _fields(config: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


def make_mesh(settings: Settings) -> jax.sharding.Mesh:
    """The mesh of the devices there are.

    Raises:
      ValueError: it does not divide the devices, the batch, the heads or the windows.
    """
    mesh = sharding.make_mesh(settings.mesh, batch_size=settings.train.batch_size)
    check_mesh(settings, mesh)
    return mesh


def check_mesh(settings: Settings, mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh) -> None:
    """Checks that a mesh divides the heads and the windows: a ValueError as of `make_mesh`."""
    cut = {"context": ("data.context", settings.data.context)}
    if "num_heads" in _fields(settings.model_classes[0]):
        cut["tensor"] = "model.num_heads", settings.model["num_heads"]
    for axis, (name, length) in cut.items():
        size = mesh.shape[axis]
        check(name, length, length % size == 0, f"a multiple of config.mesh.{axis} = {size}")
    if settings.mesh.zigzag:
        _check_zigzag(settings, pieces=2 * mesh.shape["context"])


def _check_zigzag(settings: Settings, pieces: int) -> None:
    """Checks that the tokens of a window may come in another order, in pieces of one length."""
    model, length = settings.model_config(vocab_size=1), settings.data.context
    decodes, name = isinstance(model, DecoderConfig), settings.model_classes[1].__name__
    check("mesh.zigzag", True, decodes, f"False, as {name} is no decoder")
    by_position = not any(MIXERS[name].in_order for name in model.pattern)
    wanted = "mixers that know tokens by their positions, beside config.mesh.zigzag"
    check("model.mixer", model.mixer, by_position, wanted)
    wanted = f"a multiple of 2 x config.mesh.context = {pieces}, beside config.mesh.zigzag"
    check("data.context", length, length % pieces == 0, wanted)


def make_model(settings: Settings, vocab_size: int) -> tuple[nnx.GraphDef, nn.Params]:
    """The structure and the initial parameters, a function of the seed, of the task's model."""
    config = settings.model_config(vocab_size)
    _, model = settings.model_classes
    return nn.split(model(config, rngs=nnx.Rngs(settings.seed)))


def abstract_state(settings: Settings, vocab_size: int) -> tuple[nnx.GraphDef, TrainState]:
    """The model's structure, and the shapes and dtypes of its training state, computing nothing."""
    graphdef = None

    def create() -> TrainState:
        nonlocal graphdef
        graphdef, params = make_model(settings, vocab_size)
        optimizer = make_optimizer(settings.optimizer, settings.train.num_steps)
        return TrainState.create(params, optimizer)

    state = jax.eval_shape(create)
    return graphdef, state


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run directory, read back."""

    run: RunDirectory
    settings: Settings
    task: Task
    graphdef: nnx.GraphDef
    params: nn.Params
    step: int


def load_run(workdir: str) -> TrainedRun:
    """Restores the newest good checkpoint of a run; changes nothing on disk.

    Raises:
      ValueError: there is no run there.
      CheckpointError: it has no checkpoint that can be read.
    """
    run = RunDirectory(Path(workdir).absolute())
    if not run.config.exists():
        raise ValueError(f"workdir: {workdir} holds no run (no config.json); train one there first")
    settings = resolve(read_config(run, char_lm.get_config()))
    task = settings.task.of_run(settings, run)
    graphdef, state = abstract_state(settings, task.vocab_size)
    step, state = load_checkpoint(run.checkpoints, state)
    return TrainedRun(run, settings, task, graphdef, state.params, step)
