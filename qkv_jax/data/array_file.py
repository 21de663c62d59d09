"""An array in a file of NumPy's format, of which what is asked for is read, and nothing kept.

As an array that is mapped into memory, with two differences: where the file is truncated meanwhile,
a map ends the process by a signal, while a read says so; and pages of a map count as the process's
memory, until they are given back.
"""

import functools
import os
import weakref
from pathlib import Path
from typing import Any, Literal

import numpy as np

MARK_EVERY = 4096  # items of a sorted array, of which one is kept for `searchsorted`


class ArrayFile:
    """The items of a file, or some in a row: `a[5:9]` is of these and reads nothing.

    `np.asarray(a)` reads all of its items, and `a[i]` those of an integer or of an array of
    integers, all from the first to the last of them at once. Read-only, POSIX alone.

    Attributes:
        path: of the file.
        dtype: of an item.
        shape: `(length,)`.
    """

    ndim = 1

    def __init__(self, file: "_OpenFile", dtype: np.dtype, offset: int, length: int):
        self._file = file
        self._offset = offset  # in the file, of the first item
        self.path = file.path
        self.dtype = dtype
        self.shape = (length,)

    @classmethod
    def open(cls, path: str | os.PathLike) -> "ArrayFile":
        """All items of a file; its header alone is read.

        Raises:
            ValueError: it is no such file, is shorter than its header says, or has not one axis.
            OSError: it cannot be read.
        """
        path = Path(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap) or array.ndim != 1:
            raise ValueError(f"{path} has no array of one axis")
        return cls(_OpenFile(path), array.dtype, array.offset, len(array))

    @property
    def size(self) -> int:
        return self.shape[0]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            begin, end, step = key.indices(len(self))
            if step != 1:
                raise ValueError(f"wanted a slice of adjacent items, got a step of {step}")
            offset = self._offset + begin * self.dtype.itemsize
            return ArrayFile(self._file, self.dtype, offset, max(end - begin, 0))
        places = np.asarray(key)
        if not places.size:
            return np.empty(places.shape, self.dtype)
        places = np.where(places < 0, places + len(self), places)
        first, last = int(places.min()), int(places.max())
        if first < 0 or last >= len(self):
            raise IndexError(f"{self.path} has {len(self)} items here; got an index out of range")
        return np.asarray(self[first : last + 1])[places - first]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(f"{self.path} is not in memory: wanted copy=None or True")
        found = np.frombuffer(
            self._file.read(self._offset, len(self) * self.dtype.itemsize), self.dtype
        )
        return found if dtype is None else found.astype(dtype, copy=False)

    def max(self) -> Any:
        """The largest item, of a million at a time."""
        parts = range(0, len(self), 2**20)
        return max(np.asarray(self[begin : begin + 2**20]).max() for begin in parts)

    def searchsorted(
        self, values: Any, side: Literal["left", "right"] = "left", sorter: None = None
    ) -> np.ndarray:
        """As NumPy's, which calls it: each value costs one read of `MARK_EVERY` items.

        Args:
            values: any number of them.
            side: "left" or "right" of items that are equal.
            sorter: None: the items rise.
        """
        if sorter is not None:
            raise ValueError("sorter: wanted None, for items that rise")
        values = np.asarray(values)
        begins = MARK_EVERY * np.maximum(self._marks.searchsorted(values, side) - 1, 0)
        places = np.empty(values.shape, np.int64)
        for i, (value, begin) in enumerate(zip(values.flat, begins.flat, strict=True)):
            block = np.asarray(self[begin : begin + MARK_EVERY])
            places.flat[i] = begin + block.searchsorted(value, side)
        return places

    @functools.cached_property
    def _marks(self) -> np.ndarray:
        """Every `MARK_EVERY`-th item."""
        items = [np.asarray(self[i : i + 1]) for i in range(0, len(self), MARK_EVERY)]
        return np.concatenate([np.empty(0, self.dtype), *items])


class _OpenFile:
    """A file that is open for reading as long as something has hold of this."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, begin: int, number: int) -> bytes:
        """So many bytes from `begin` on. ValueError if there are fewer; OSError names the file."""
        parts, missing = [], number
        while missing:
            try:
                part = os.pread(self._descriptor, missing, begin + number - missing)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            if not part:
                end = begin + number - missing
                raise ValueError(
                    f"{self.path} ends at byte {end}; wanted {missing} more: it was truncated "
                    "since it was opened"
                )
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)
