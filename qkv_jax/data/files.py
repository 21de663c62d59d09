"""Reading text that may not be text, and writing files that are never half written."""

import contextlib
import glob
import os
import secrets
from pathlib import Path


def read_text(path: str | os.PathLike, *, what: str = "the file") -> str:
    """The text of a UTF-8 file, without a byte-order mark, with `\\r\\n` read as `\\n`.

    Args:
        path: the file.
        what: how an error calls it.

    Raises:
        ValueError: the file cannot be read, holds a NUL byte, or is not UTF-8 (the byte is named).
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{what} {str(path)!r} cannot be read: {error.strerror}") from error
    return decode_text(data, f"{what} {str(path)!r}")


def decode_text(data: bytes, name: str, first: int = 0) -> str:
    """The text of a file's bytes from number `first` on: as `read_text`, which has all of them."""
    nul = data.find(b"\0")
    if nul >= 0:
        raise ValueError(f"{name} is binary: byte {first + nul} is NUL; wanted UTF-8 text")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8: byte {first + error.start} is "
            f"0x{data[error.start]:02x} ({error.reason})"
        ) from error
    text = text if first else text.removeprefix("\ufeff")
    return text.replace("\r\n", "\n")


def matching_files(name: str, path: str | os.PathLike) -> list[Path]:
    """The file at `path`, those in a folder but for hidden ones, or those a glob matches; sorted.

    Raises:
        ValueError: there is none, or they cannot be listed; `name` is what asks.
    """
    try:
        return _matching_files(name, path)
    except (OSError, RuntimeError) as error:  # no permission, or no such user's home
        raise ValueError(f"{name}: {str(path)!r} cannot be read: {error}") from error


def _matching_files(name: str, path: str | os.PathLike) -> list[Path]:
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        what, found = f"is in directory {str(path)!r}", root.rglob("*")
        found = (f for f in found if not any(p.startswith(".") for p in f.relative_to(root).parts))
    elif glob.has_magic(str(root)):
        what, found = f"matches {str(path)!r}", map(Path, glob.glob(str(root), recursive=True))
    else:
        raise ValueError(f"{name}: {str(path)!r} does not exist; wanted a file, directory or glob")
    files = sorted({file for file in found if file.is_file()})
    if not files:
        raise ValueError(f"{name}: no file {what}; wanted at least one text file")
    return files


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to `path`: whoever reads it finds the old content or the new, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
