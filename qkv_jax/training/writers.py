"""Where a run's numbers go: `metrics.jsonl`, TensorBoard and, if asked for, Weights & Biases.

    with MetricWriter(run, resume_step=None) as writer:
        writer.write(10, {"train/loss": 2.31, "train/learning_rate": 3e-3})

`metrics.jsonl` has one JSON object a line, `{"step": 10, "train/loss": 2.31, ...}`, and is the
record that reports and figures are made from. JSON has no NaN: numbers that are not finite stand
there as the strings "nan", "inf" and "-inf", which `read_metrics` turns back.
"""

import hashlib
import importlib
import itertools
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkv_jax.training.run_directory import RunDirectory, write_text_atomic

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricWriter:
    """Writes metrics by step, and on resuming forgets the steps that will be taken again.

    Args:
      run: the run's directory.
      wandb: also log to Weights & Biases.
      resume_step: the step that training continues from; later ones are dropped. None: from the
        start, everything is dropped.

    Raises:
      ValueError: Weights & Biases is asked for and not installed, or `metrics.jsonl` is damaged.
      OSError: the directory cannot be written.
    """

    def __init__(self, run: RunDirectory, *, wandb: bool = False, resume_step: int | None):
        _drop_after(run.metrics, -1 if resume_step is None else resume_step)
        self._path = run.path
        self._wandb = _start_wandb(run, resume_step) if wandb else None
        self._file = open(run.metrics, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
        self._events = _EventFile(run.tensorboard, 0 if resume_step is None else resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line, which is in the file when this returns.

        Args:
          step: the number of steps taken.
          metrics: names to numbers, or to arrays of one number.

        Raises:
          ValueError: a value is not one number, or a name is `step`.
          OSError: the disk is full.
        """
        if "step" in metrics:
            raise ValueError("a metric cannot be named step")
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        try:
            self._file.write(_line({"step": int(step), **numbers}))
            self._file.flush()
            self._events.write(int(step), numbers)
        except OSError as error:  # it does not say where
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if self._wandb is not None:
            self._wandb.log(numbers, step=int(step))

    def close(self) -> None:
        """Finishes all files."""
        try:
            self._file.close()
        finally:
            self._events.close()
            if self._wandb is not None:
                self._wandb.finish()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *error) -> None:
        self.close()


class NoWriter:
    """What stands for a `MetricWriter` where another process writes."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Does nothing."""

    def __enter__(self) -> "NoWriter":
        return self

    def __exit__(self, *error) -> None:
        pass


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` as dicts; a last line that a crash cut short is left out.

    Raises:
      ValueError: another line is not a JSON object with a step.
      OSError: the file cannot be read.
    """
    *lines, _ = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = {name: _finite_or_not(value) for name, value in json.loads(line).items()}
            record["step"] = int(record["step"])
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object with a step") from error
        records.append(record)
    return records


class _EventFile:
    """Scalars for TensorBoard, written by this thread.

    tensorboardX's own SummaryWriter hands events to a thread; when that dies of a full disk, the
    next call waits for it forever. Its file format is used here without the thread.
    """

    _count = itertools.count()

    def __init__(self, directory: Path, purge_step: int):
        self._directory = directory
        self._purge_step = purge_step
        self._writer = None
        self._next_flush = 0.0

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        writer = self._writer or self._open()
        for name, number in numbers.items():
            summary = scalar(name, number)
            writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() > self._next_flush:  # a flush reaches the disk, which takes a while
            writer.flush()
            self._next_flush = time.monotonic() + 10

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> Any:
        """Opens a new file on the first write, so that no import delays the first step."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._directory.mkdir(parents=True, exist_ok=True)
        # The name holds the second it was made in; two files of one second must not be one.
        suffix = f".{os.getpid()}.{next(self._count)}"
        self._writer = EventsWriter(str(self._directory / "events"), suffix)
        # TensorBoard then hides this and later steps of the files before.
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=self._purge_step, session_log=start))
        return self._writer


def _line(record: Mapping[str, int | float]) -> str:
    written = {name: x if math.isfinite(x) else str(float(x)) for name, x in record.items()}
    return json.dumps(written, allow_nan=False) + "\n"


def _finite_or_not(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, bool | int | float):
        return value + 0  # True counts as 1; NumPy's float64 is a float
    if getattr(value, "size", None) != 1:
        raise ValueError(f"metric {name} must be one number, got {value!r}")
    return _number(name, value.item())


def _drop_after(path: Path, step: int) -> None:
    """Keeps the whole lines up to `step`."""
    if path.exists():
        kept = [_line(record) for record in read_metrics(path) if record["step"] <= step]
        write_text_atomic(path, "".join(kept))


def _start_wandb(run: RunDirectory, resume_step: int | None) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        message = "config.train.wandb needs Weights & Biases: pip install wandb, or set it to False"
        raise ValueError(message) from error
    name = run.path.name
    return wandb.init(
        project="qkv_jax",
        name=name,
        id=f"{name}-{hashlib.sha256(str(run.path).encode()).hexdigest()[:8]}",
        resume=None if resume_step is None else "allow",
        dir=str(run.path),
        config=json.loads(run.config.read_text(encoding="utf-8")),
    )
