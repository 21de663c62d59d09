"""Checkpoints that are complete and verified, or not there at all.

    with Checkpointer("runs/char_lm/checkpoints") as checkpointer:
        restored = checkpointer.restore(like=state)  # None: nothing saved yet
        checkpointer.save(step, state)  # returns once the arrays are copied to the host

Orbax writes the arrays and makes a step's directory appear in one rename. On top of that stands
what Orbax leaves to its caller: a checksum per array (Orbax restores flipped bits silently), names,
shapes and dtypes that must agree (it casts silently), a step before the newest to fall back to, and
errors that surface at the next call.

A step's directory holds two Orbax items: `arrays`, the bytes of all leaves in one array, and
`manifest`, their names, dtypes, shapes and checksums (see `packing.py`). One array rather than one
per leaf halves the time of small models, and where it is damaged no other read is left unfinished.
Processes that train as one (see `processes.py`) write a step together, into a directory that they
share: each what its devices hold, as files of its own in `part_<index>` (Orbax would have all write
one array in step). Once all parts are there, the first process renames the step's directory to what
it is called. It is read by any number of processes, each of which keeps of it what its devices are
to hold.

One program at a time writes to a directory; any number read.
"""

import contextlib
import errno
import json
import logging
import operator
import os
import re
import shutil
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qkv_jax.training import processes
from qkv_jax.training.packing import (
    Assembled,
    Box,
    DamagedError,
    Piece,
    assemble,
    box,
    leaf_names,
    make_manifest,
    pack,
    unpack,
)

log = logging.getLogger(__name__)

_STEP = re.compile(r"0|[1-9][0-9]*", re.ASCII)
_LEFTOVER = re.compile(r"[0-9]+\.(orbax-checkpoint-tmp.*|deleted|parts)", re.ASCII)
PATIENCE = 600.0  # seconds that the first process waits for the parts of the others


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read, or fitted to the model: one sentence for the user."""


class Checkpointer:
    """Saves and restores the steps of one training run.

    Args:
      directory: where the steps go, one subdirectory each; created if absent.
      keep: newest steps that stay on disk; two or more leave one to fall back to.
      keep_every: steps whose multiples stay too, whatever comes after them; 0: none.

    Raises:
      ValueError: `keep` is not positive, or `keep_every` negative.
      CheckpointError: the directory cannot be created.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, keep_every: int = 0):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        if keep_every < 0:
            raise ValueError(f"keep_every must not be negative, got {keep_every}")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self.keep_every = keep_every
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future] | None = None
        self._current: int | None = None  # the step last saved or restored
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot create the checkpoint directory {self.directory}: {_reason(error)}"
            raise CheckpointError(message) from error
        if processes.count() > 1:
            if processes.is_first():
                self._remove_leftovers()
            processes.gather("ready")  # nobody writes before that

    def save(self, step: int, tree: Any) -> None:
        """Copies `tree` to the host and writes it in the background, after the save before it.

        All processes save the same step.

        The arrays may be donated or overwritten as soon as this returns. Saving the step that was
        saved or restored last does nothing: it is there already.

        Args:
          step: the step's number, not negative.
          tree: any pytree of JAX or NumPy arrays.

        Raises:
          ValueError: a leaf is not a plain array.
          CheckpointError: an earlier save failed, or the directory holds this step already.
        """
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        self.wait()
        if step in self.steps():
            if step == self._current:
                return
            message = f"{self.directory} has a checkpoint {step} already; move it away to save anew"
            raise CheckpointError(message)
        buffer, layout = pack(tree)
        self._current = step
        self._pending = step, self._writer.submit(self._write, step, buffer, layout)

    def check(self) -> None:
        """Raises CheckpointError if the save in the background has failed; costs nothing."""
        if self._pending and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is on disk; raises CheckpointError, once, if it has failed."""
        if self._pending is None:
            return
        step, future = self._pending
        error = future.exception()
        self._pending = None
        if error is not None:
            where = self.directory / str(step)
            raise CheckpointError(f"cannot save checkpoint {where}: {_reason(error)}") from error

    def close(self) -> None:
        """Waits for the last save and ends the background thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error_type is None:
                raise
            log.error("%s", failure)  # the first error is the one to raise

    def steps(self) -> list[int]:
        """The complete steps on disk, ascending."""
        return list_steps(self.directory)

    def restore(self, like: Any, *, step: int | None = None) -> tuple[int, Any] | None:
        """Reads the newest good step; broken newer ones become `<step>.broken` with a warning.

        Args:
          like: a pytree of arrays or `jax.ShapeDtypeStruct`: the structure, shapes and dtypes
            wanted. Where it holds NumPy arrays the result does too; elsewhere JAX arrays, sharded
            as `like` if that spans several devices, else on the default device.
          step: read this one only, and rename nothing.

        A step is good if all processes can read what they need of it.

        Returns:
          `(step, tree)`, bit for bit as saved, or None if nothing was saved.

        Raises:
          CheckpointError: names, shapes or dtypes differ (each is named), or nothing there can be
            read; either way everything stays in place.
        """
        self.wait()
        if step is None and not self.steps():
            return None
        found, leaves, broken = _read_newest(self.directory, step, like)
        tree = _fit(leaves, like, self.directory / str(found))
        for newer, reason in broken.items() if processes.is_first() else ():
            aside = _set_aside(self.directory / str(newer))
            log.warning("checkpoint %d is broken (%s): set aside as %s", newer, reason, aside)
        if broken:
            log.warning("restored checkpoint %d instead", found)
        self._current = found
        return found, tree

    def _write(self, step: int, buffer: np.ndarray, layout: list[dict[str, Any]]) -> None:
        """Writes one step, then removes the oldest; runs in the background, Orbax's import too."""
        if processes.count() == 1:
            self._remove_leftovers()
            try:
                with _orbax() as (orbax, args):
                    items = {
                        "arrays": args.StandardSave({"bytes": buffer}),
                        "manifest": args.JsonSave(make_manifest(buffer, layout, step)),
                    }
                    orbax.save(self.directory / str(step), args=args.Composite(**items))
            except BaseException:
                self._remove_leftovers()  # a full disk needs the space
                raise
        else:
            parts = self.directory / f"{step}.parts"
            parts.mkdir(exist_ok=True)
            part = parts / f"part_{processes.index()}"
            _write_part(part, buffer, make_manifest(buffer, layout, step))
            if not processes.is_first():
                return
            _wait_for_parts(parts)
            parts.rename(self.directory / str(step))
        for old in self.steps()[: -self.keep]:
            if self.keep_every and old % self.keep_every == 0:
                continue
            doomed = self.directory / f"{old}.deleted"  # a listed step is never half deleted
            (self.directory / str(old)).rename(doomed)
            shutil.rmtree(doomed)

    def _remove_leftovers(self) -> None:
        """Removes what a killed process was writing or deleting."""
        for path in self.directory.iterdir():
            if _LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


def list_steps(directory: str | Path) -> list[int]:
    """The steps in a checkpoint directory, ascending; links and other names are not steps."""
    try:
        entries = list(Path(directory).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read {directory}: {_reason(error)}") from error
    named = (path for path in entries if _STEP.fullmatch(path.name))
    return sorted(int(path.name) for path in named if path.is_dir() and not path.is_symlink())


def load_checkpoint(
    directory: str | Path, like: Any = None, *, step: int | None = None
) -> tuple[int, Any]:
    """Reads the newest good step, or `step`, and changes nothing on disk: for trained models.

    Args:
      directory: what a `Checkpointer` has written to.
      like: as for `Checkpointer.restore`; None returns a flat dict from names to NumPy arrays.
      step: read this one only.

    Returns:
      `(step, tree)`.

    Raises:
      CheckpointError: there is none, none can be read, or it does not fit `like`.
    """
    directory = Path(directory).absolute()
    found, leaves, broken = _read_newest(directory, step, {} if like is None else like)
    for newer, reason in broken.items():
        log.warning("checkpoint %d is broken (%s): using %d", newer, reason, found)
    if like is not None:
        return found, _fit(leaves, like, directory / str(found))
    return found, {name: _only(leaf) for name, leaf in leaves.items()}


def _write_part(path: Path, buffer: np.ndarray, manifest: dict[str, Any]) -> None:
    """Writes a buffer and its manifest as a directory, which appears once it is complete."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.mkdir()
    np.save(temporary / "arrays.npy", buffer)
    (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for file in temporary.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    temporary.rename(path)


def _read_part(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The buffer, of which only what is looked at is read, and its manifest."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    return np.load(path / "arrays.npy", mmap_mode="r"), manifest


def _wait_for_parts(parts: Path) -> None:
    """Returns once every process has written its part."""
    names = [f"part_{i}" for i in range(processes.count())]
    deadline = time.monotonic() + PATIENCE
    while missing := [name for name in names if not (parts / name).is_dir()]:
        if time.monotonic() > deadline:
            raise OSError(f"{', '.join(missing)} did not come within {PATIENCE:.0f} s")
        time.sleep(0.05)


@contextlib.contextmanager
def _orbax() -> Iterator[tuple[Any, Any]]:
    """Yields (an Orbax checkpointer, Orbax's argument classes), imported only when needed."""
    import orbax.checkpoint as ocp

    # Orbax logs each error with several tracebacks and raises it too; the one raised is enough.
    absl = logging.getLogger("absl")
    absl.addFilter(_is_not_from_orbax)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            yield checkpointer, ocp.args
    finally:
        absl.removeFilter(_is_not_from_orbax)


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _read_newest(
    directory: Path, step: int | None, like: Any
) -> tuple[int, dict[str, Assembled], dict[int, str]]:
    """Returns (step, leaves, reasons of the newer steps that are broken), and all processes so."""
    available, *others = processes.gather(list_steps(directory))
    if any(steps != available for steps in others):
        raise CheckpointError(
            f"the processes find different checkpoints in {directory}: it has to be a directory "
            "that all of them share"
        )
    if not available:
        raise CheckpointError(f"there is no checkpoint in {directory}")
    if step is not None and step not in available:
        raise CheckpointError(f"there is no checkpoint {step} in {directory}, only {available}")
    boxes, broken = _boxes(like), {}
    for candidate in reversed(available) if step is None else [step]:
        leaves, reason = {}, ""
        try:
            leaves = assemble(_read(directory / str(candidate)), boxes)
        except Exception as error:  # for damaged files Orbax raises even bare Exceptions
            reason = _reason(error)
        reason = next(filter(None, processes.gather(reason)), "")
        if not reason:
            return candidate, leaves, broken
        broken[candidate] = reason
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in broken.items())
    raise CheckpointError(f"no checkpoint in {directory} can be read, all are kept ({reasons})")


def _boxes(like: Any) -> dict[str, set[Box]]:
    """What this process is to hold of each array that is cut over devices."""
    found = {}
    for name, leaf in zip(leaf_names(like), jax.tree.leaves(like), strict=True):
        if _is_cut(leaf):
            indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
            found[name] = {box(index, leaf.shape) for index in indices}
    return found


def _is_cut(leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    return sharding is not None and len(sharding.device_set) > 1


def _read(path: Path) -> Iterator[Piece]:
    """Reads one step part by part, and verifies each against its manifest."""
    if any(inside.is_symlink() for inside in path.rglob("*")):
        raise DamagedError("it contains a symbolic link")
    step = int(path.name)
    for part in sorted(path.glob("part_*")):
        yield from unpack(*_read_part(part), step)
    if not (path / "part_0").exists():
        with _orbax() as (orbax, args):
            items = {"arrays": args.StandardRestore(), "manifest": args.JsonRestore()}
            restored = orbax.restore(path, args=args.Composite(**items))
        buffer = np.asarray(restored.arrays["bytes"], np.uint8)
        yield from unpack(buffer, restored.manifest, step)


def _fit(leaves: dict[str, Assembled], like: Any, path: Path) -> Any:
    """Returns the leaves in the structure of `like`, or raises naming those that do not fit."""
    names = leaf_names(like)
    wanted = dict(zip(names, jax.tree.leaves(like), strict=True))
    problems = [f"{name} is missing" for name in names if name not in leaves]
    problems += [f"{name} is not wanted" for name in leaves if name not in wanted]
    for name in names:
        if name in leaves and _type(leaves[name]) != _type(wanted[name]):
            problems.append(f"{name} is {_type(leaves[name])}, not {_type(wanted[name])}")
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise CheckpointError(f"checkpoint {path} is of another model: {shown}")
    placed = [_place(leaves[name], wanted[name], name) for name in names]
    return jax.tree.unflatten(jax.tree.structure(like), placed)


def _place(leaf: Assembled, like: Any, name: str) -> np.ndarray | jax.Array:
    if isinstance(like, np.ndarray | np.generic):
        return _only(leaf)
    if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        raise CheckpointError(f"leaf {name} is {leaf.dtype}: set jax_enable_x64 to restore it")
    if not _is_cut(like):
        return jax.device_put(_only(leaf))
    return jax.make_array_from_callback(
        leaf.shape, like.sharding, lambda index: leaf.boxes[box(index, leaf.shape)]
    )


def _only(leaf: Assembled) -> np.ndarray:
    """An array of which everything was asked for."""
    (array,) = leaf.boxes.values()
    return array


def _type(array: Any) -> str:
    """Such as `float32[3, 5]`, whatever the order of the bytes."""
    return f"{np.dtype(array.dtype).name}{list(array.shape)}"


def _set_aside(path: Path) -> str:
    name, n = f"{path.name}.broken", 1
    while (path.parent / name).exists():
        n += 1
        name = f"{path.name}.broken-{n}"
    try:
        path.rename(path.parent / name)
    except OSError as error:
        message = f"cannot set the broken checkpoint {path} aside: {_reason(error)}"
        raise CheckpointError(message) from error
    return name


def _reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    full = {errno.ENOSPC, errno.EDQUOT}
    text = str(error).strip()
    if getattr(error, "errno", None) in full or "No space left on device" in text:
        return "no space left on the disk"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if from_system := re.search(r"([^:\[\]]+) \[os_error_code=", text):
        return from_system[1].strip()
    if isinstance(error, DamagedError):
        return text
    return textwrap.shorten(f"{type(error).__name__} {text}", width=120, placeholder=" ...")
