"""Named arrays in safetensors files: read with every check, written as others read them."""

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qkv_jax.data.files import write_atomically

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("float64", "float32", "float16", "bfloat16")


class Tensors:
    """The tensors of a checkpoint's folder, one file or several, each read where it is asked for.

    Args:
      folder: with model.safetensors, or with model.safetensors.index.json and what it names.

    Raises:
      ValueError: there is neither, or a file is damaged, cut off or missing: it is named.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        files = _files(folder)
        self._file_of: dict[str, Path] = {}
        for path in files:
            for name in _open(path).keys():  # noqa: SIM118  it is no mapping
                self._file_of[name] = path

    def __iter__(self):
        return iter(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str) -> np.ndarray:
        """A tensor of floating-point numbers.

        Raises:
          ValueError: it holds something else.
        """
        array = _open(self._file_of[name]).get_tensor(name)
        if array.dtype.name not in FLOATS:
            raise ValueError(
                f"{self._file_of[name]}: tensor {name!r} holds {array.dtype.name}; wanted one of "
                f"{', '.join(FLOATS)}"
            )
        return array


def _files(folder: Path) -> list[Path]:
    if (folder / WHOLE).exists():
        return [folder / WHOLE]
    index = folder / INDEX
    if not index.exists():
        pickled = " (pytorch_model.bin is a pickle, which is never read)"
        known = pickled if list(folder.glob("pytorch_model*.bin")) else ""
        raise ValueError(f"{folder}: wanted {WHOLE} or {INDEX}, found neither{known}")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no index of safetensors: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: wanted names of files beside it, got {name!r}")
        if not (folder / name).exists():
            raise ValueError(f"{index} names {name!r}, which is not there")
    return [folder / name for name in sorted(names)]


def _open(path: Path):
    try:
        return safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from error


def write(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes model.safetensors, whole or not at all.

    safetensors 0.8 writes the memory of an array that is no row-major one as it lies there, without
    a warning: hence the copies.

    Args:
      folder: exists.
      tensors: of float32 or bfloat16.
    """
    plain = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    write_atomically(folder / WHOLE, save(plain, metadata={"format": "pt"}))


def dtype_of(name: str) -> np.dtype:
    """NumPy's dtype "float32" or "bfloat16"."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
