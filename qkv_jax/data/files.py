"""Reading text that may not be text, and writing files that are never half written."""

import contextlib
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
    nul = data.find(b"\0")
    if nul >= 0:
        raise ValueError(f"{what} {str(path)!r} is binary: byte {nul} is NUL; wanted UTF-8 text")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} {str(path)!r} is not UTF-8: byte {error.start} is "
            f"0x{data[error.start]:02x} ({error.reason})"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


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
