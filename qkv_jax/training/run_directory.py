"""What a run leaves behind, and where: `runs/<name>`.

    run = open_run("runs/char_lm", config)  # creates it, or checks that it is this config's run
    write_text_atomic(run.sample, text)

A run directory holds one run. Its config is kept as JSON, which is data: nothing found in a run
directory is ever executed, and no YAML or pickle is read.
"""

import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qkv_jax import __version__

log = logging.getLogger(__name__)

# What a run may be resumed with other values of: none of them changes the steps already taken.
RESUMABLE = frozenset(
    {
        "mesh.context",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "mesh.zigzag",
        "train.cpu_devices",
        "train.num_steps",
        "train.eval_every",
        "train.save_every",
        "train.save_minutes",
        "train.spike_factor",
        "train.log_every",
        "train.keep",
        "train.keep_every",
        "train.figures",
        "train.sample_tokens",
        "train.steps_per_dispatch",
        "train.wandb",
    }
)
# And until it is finished: how to go on after the loss has jumped. Each change is told.
ADJUSTABLE = frozenset({"optimizer.learning_rate", "optimizer.muon_learning_rate"})


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run.

    Args:
      path: the run's directory; the attributes below are paths in it, whether or not they exist.
    """

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def versions(self) -> Path:
        return self.path / "versions.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def heartbeat(self) -> Path:
        return self.path / "heartbeat.json"

    def heartbeat_of(self, process: int) -> Path:
        """Where one of several processes says that it is alive; the first: in `heartbeat`."""
        return self.heartbeat if process == 0 else self.path / f"heartbeat_{process}.json"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def sample(self) -> Path:
        return self.path / "sample.txt"

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"


def open_run(
    workdir: str | Path, config: ConfigDict, base: ConfigDict | None = None
) -> RunDirectory:
    """Creates the run's directory, or checks that the one there belongs to `config`.

    Args:
      workdir: the directory; created if absent.
      config: the resolved config; written to `config.json`, beside `versions.json`.
      base: as for `config_from_json`: the fields that an older run lacks. None: such a run
        is another config's.

    Raises:
      ValueError: the directory holds another config's run (every differing field is named with both
        values) or something else than a run, or it cannot be written.
    """
    run = RunDirectory(Path(workdir).absolute())
    text = config_to_json(config)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        others = [entry.name for entry in run.path.iterdir() if entry.suffix != ".tmp"]
        if run.config.name in others:
            _check_same_run(run, text, base)
        elif others:
            raise ValueError(
                f"workdir {run.path} is not a run's directory: it holds {min(others)} and no"
                " config.json; choose another --workdir"
            )
        write_text_atomic(run.config, text)
        _write_versions(run)
        run.figures.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"workdir {run.path} is a file; choose another --workdir") from error
    except OSError as error:
        raise ValueError(f"workdir {run.path} cannot be written: {error.strerror}") from error
    return run


def flat_fields(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) for every field."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def config_to_json(config: ConfigDict) -> str:
    """The config as indented JSON; tuples become lists, unset placeholders null.

    Raises:
      ValueError: a value is NaN, infinite, or not a number, text, flag or tuple of those.
    """
    for name, value in flat_fields(config.to_dict()):
        for part in _scalars(value):
            if not isinstance(part, bool | int | float | str | None):
                raise ValueError(f"config.{name} must be plain data, got {type(part).__name__}")
            if isinstance(part, float) and not math.isfinite(part):
                raise ValueError(f"config.{name} must be finite, got {part}")
    return json.dumps(config.to_dict(), indent=2, allow_nan=False) + "\n"


def config_from_json(text: str, base: ConfigDict) -> ConfigDict:
    """The config that `config_to_json` wrote, rebuilt over `base`, which gives the fields' types.

    Args:
      text: what `config_to_json` returned.
      base: a config with the same fields, such as that of `configs/char_lm.py`; unchanged. A field
        that the text lacks has its value: the text is of a run from before there was the field, and
        a new field's value in the base is what was done without it.

    Returns:
      A locked config.

    Raises:
      ValueError: the text is not such JSON, or a field is unknown, of another type, or the name
        is missing.
    """
    config, values = base.copy_and_resolve_references(), _parse(text)
    if "name" not in values:
        raise ValueError("the field config.name is missing, which every run has")
    _apply(config, values, base, prefix="config")
    return config.lock()


def read_config(run: RunDirectory, base: ConfigDict) -> ConfigDict:
    """The config of an existing run; as `config_from_json`, and ValueError where there is none."""
    return config_from_json(_read_text(run.config), base)


def write_text_atomic(path: Path, text: str) -> None:
    """Replaces the file's content in one step: a reader, or a crash, sees the old text or the new.

    Raises:
      OSError: the disk is full or the directory not writable; the old file is intact.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def versions() -> dict[str, str]:
    """What computed a run: Python, the libraries, the device, the commit. Never fails."""
    import jax

    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "qkv_jax": __version__,
    }
    for name in ("jax", "jaxlib", "flax", "optax", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    try:
        found["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    except RuntimeError as error:
        found["device"] = f"none: {error}"
    return found | {"commit": _commit()}


def _commit() -> str:
    """The commit of the checkout that this file is in, with `-dirty` if it was changed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: the repository around it, if any, is another
        return "unknown"
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _write_versions(run: RunDirectory) -> None:
    """Writes `versions.json`; on resuming says what is no longer the same."""
    now = versions()
    try:
        before = json.loads(run.versions.read_text(encoding="utf-8"))
        changed = [f"{k} {before[k]} -> {v}" for k, v in now.items() if before.get(k, v) != v]
    except (OSError, ValueError, AttributeError):
        changed = []  # a new run, or a file somebody edited: it is informative only
    if changed:
        log.warning("resuming with other versions: %s", ", ".join(changed))
    write_text_atomic(run.versions, json.dumps(now, indent=2) + "\n")


def _check_same_run(run: RunDirectory, text: str, base: ConfigDict | None) -> None:
    try:
        values = _parse(_read_text(run.config))
        before = dict(flat_fields(base.to_dict() if base else {})) | dict(flat_fields(values))
    except ValueError as error:
        raise ValueError(f"{run.config}: {error}") from error
    now = dict(flat_fields(json.loads(text)))
    found = differing_fields(
        *({f"config.{k}": v for k, v in x.items() if k not in RESUMABLE} for x in (before, now)),
        "there", "now",
    )  # fmt: skip
    may_differ = {f"config.{name}" for name in ADJUSTABLE if not run.report.exists()}
    adjusted = [said for said in found if said.partition(":")[0] in may_differ]
    differing = [said for said in found if said not in adjusted]
    if differing:
        raise ValueError(
            f"workdir {run.path} holds a run of another config ({'; '.join(differing)});"
            " choose another --workdir"
        )
    if adjusted:
        log.warning("resuming with another learning rate: %s", "; ".join(adjusted))


def differing_fields(
    ours: dict[str, Any], theirs: dict[str, Any], our_place: str, their_place: str
) -> list[str]:
    """What two flat configs, or the like, have differently, such as "seed: 1 there, 2 now"."""
    absent = object()
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        values = ours.get(name, absent), theirs.get(name, absent)
        if repr(values[0]) != repr(values[1]):  # by text: 1, 1.0 and True are equal otherwise
            a, b = ("absent" if value is absent else json.dumps(value) for value in values)
            found.append(f"{name}: {a} {our_place}, {b} {their_place}")
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text") from error


def _parse(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the config is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"the config must be a JSON object, got {type(parsed).__name__}")
    return parsed


def _apply(config: ConfigDict, values: dict[str, Any], base: ConfigDict, prefix: str) -> None:
    """Sets every field of `config` to the value of the same name, as the type it has in `base`."""
    if unknown := sorted(values.keys() - set(base.keys())):
        raise ValueError(f"there is no field {prefix}.{unknown[0]}")
    for name in base.keys() & values.keys():
        value, where = values[name], f"{prefix}.{name}"
        if isinstance(base[name], ConfigDict):
            if not isinstance(value, dict):
                raise ValueError(f"{where} must be a group of fields, got {value!r}")
            _apply(config[name], value, base[name], where)
        else:  # the base still knows the type of a placeholder
            config[name] = _typed(value, base.get_type(name), base[name], where)


def _typed(value: Any, kind: type, default: Any, where: str) -> Any:
    """The JSON value as the field's type: lists become tuples, integers floats where one is due."""
    if kind is tuple and isinstance(value, list):
        value = _to_tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value}")
    if type(value) is not kind and not (value is None and default is None):
        raise ValueError(f"{where} must be {kind.__name__}, got {value!r}")
    return value


def _to_tuple(value: Any) -> Any:
    return tuple(map(_to_tuple, value)) if isinstance(value, list) else value


def _scalars(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for part in value:
            yield from _scalars(part)
    else:
        yield value
