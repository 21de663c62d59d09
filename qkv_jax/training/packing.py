"""A pytree of arrays as buffers of bytes, and manifests to verify and to put them together by.

    buffer, layout = pack(tree)
    manifest = make_manifest(buffer, layout, step)
    pieces = unpack(buffer, manifest, step)
    leaves = assemble(pieces, {})  # {"params/layers/0/kernel": {everything: array}, ...}

A buffer holds pieces of arrays: each array in one, or, where an array is cut over the devices of
several processes, in each process's buffer what lies there. The manifest is plain data, ready for
JSON: of each piece the array's name, dtype and shape, where in the array it begins, its own shape,
its offset in the buffer and its SHA-256; and a SHA-256 of all that.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class DamagedError(ValueError):
    """A buffer or its manifest is not as it was made."""


def leaf_names(tree: Any) -> list[str]:
    """Each leaf's path, such as `params/layers/0/kernel`, in the order of `jax.tree.leaves`."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") or "value" for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two leaves of the tree have the same name: {', '.join(sorted(twice))}")
    return names


@dataclass(frozen=True)
class Piece:
    """A part of an array, as it stands in a buffer."""

    name: str
    dtype: str
    whole: tuple[int, ...]  # the array's shape
    start: tuple[int, ...]  # where in the array the piece begins
    data: np.ndarray


Box = tuple[tuple[int, int], ...]  # (start, stop) along each axis of an array


@dataclass
class Assembled:
    """Some boxes of an array, filled with what pieces have of them."""

    dtype: np.dtype
    shape: tuple[int, ...]
    boxes: dict[Box, np.ndarray]
    missing: dict[Box, int] = field(default_factory=dict)  # numbers


def pack(tree: Any) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Copies every leaf into one buffer in host memory: what this process has of it.

    Of an array that is cut over several processes, that is the pieces on its devices, without
    those of which another device has the first copy.

    Args:
      tree: a pytree of JAX or NumPy arrays.

    Returns:
      The buffer, and for each piece in it the name, dtype, whole shape, start, shape and offset.

    Raises:
      ValueError: a leaf is not an array of numbers, or there are none.
    """
    leaves = dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic) or _is_opaque(leaf.dtype):
            raise ValueError(f"leaf {name} must be an array of numbers, got {leaf!r}")
    if not sum(leaf.nbytes for leaf in leaves.values()):
        raise ValueError("the tree to save holds no numbers")
    here = {name: leaf for name, leaf in leaves.items() if _is_whole(leaf)}
    here = jax.device_get(here)
    pieces = [
        (name, leaf, start, data)
        for name, leaf in leaves.items()
        for start, data in ([((0,) * leaf.ndim, here[name])] if name in here else _shards(leaf))
    ]
    # A process may have none of the first copies; Orbax does not write nothing.
    buffer = np.zeros(max(1, sum(data.nbytes for *_, data in pieces)), np.uint8)
    layout, offset = [], 0
    for name, leaf, start, data in pieces:
        native = np.asarray(data, data.dtype.newbyteorder("="), order="C")
        buffer[offset : offset + native.nbytes] = native.reshape(-1).view(np.uint8)
        layout.append({
            "name": name, "dtype": native.dtype.name, "whole": leaf.shape, "start": start,
            "shape": native.shape, "offset": offset,
        })  # fmt: skip
        offset += native.nbytes
    return buffer, layout


def _is_whole(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def _shards(leaf: jax.Array) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Where what this process has of an array begins, and what it is; each only once."""
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield tuple(start for start, _ in box(shard.index, leaf.shape)), np.asarray(shard.data)


def box(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """The box that slices cut from an array, as JAX's shardings give them."""
    return tuple(cut.indices(n)[:2] for cut, n in zip(index, shape, strict=True))


def make_manifest(buffer: np.ndarray, layout: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """What is in the buffer, with a checksum for each piece and one for all of this."""
    pieces = [
        piece | {"sha256": _sha256(buffer[piece["offset"] :][: _num_bytes(piece)])}
        for piece in layout
    ]
    manifest = {"format": 2, "step": step, "pieces": pieces}
    return manifest | {"sha256": _sha256(_canonical(manifest))}


def unpack(buffer: np.ndarray, manifest: dict[str, Any], step: int) -> Iterator[Piece]:
    """The pieces of a buffer, each with its own memory.

    Raises:
      DamagedError: the buffer or the manifest is not what `pack` and `make_manifest` returned.
    """
    manifest = dict(manifest)
    claimed = manifest.pop("sha256")
    if _sha256(_canonical(manifest)) != claimed or manifest["step"] != step:
        raise DamagedError("its manifest is damaged")  # or a name might pass for another's
    for piece in manifest["pieces"] if manifest["format"] == 2 else _whole_leaves(manifest):
        data = buffer[piece["offset"] :][: _num_bytes(piece)]
        if _sha256(data) != piece["sha256"]:
            raise DamagedError(f"the checksum of leaf {piece['name']} does not match")
        data = data.copy().view(jnp.dtype(piece["dtype"]))  # of an offset that may not be aligned
        yield Piece(
            piece["name"], piece["dtype"], tuple(piece["whole"]), tuple(piece["start"]),
            data.reshape(piece["shape"]),
        )  # fmt: skip


def _whole_leaves(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pieces of the format before: every array in one."""
    for name, leaf in manifest["leaves"].items():
        start = [0] * len(leaf["shape"])
        yield leaf | {"name": name, "whole": leaf["shape"], "start": start}


def assemble(pieces: Iterable[Piece], wanted: Mapping[str, Iterable[Box]]) -> dict[str, Assembled]:
    """Arrays by name, put together from the pieces of all buffers, in any order.

    Args:
      pieces: of one checkpoint.
      wanted: the boxes to fill of each array; of those that it does not name, or that are of
        another rank, everything.

    Raises:
      DamagedError: the pieces leave a part of a box out, or one is there twice.
    """
    leaves: dict[str, Assembled] = {}
    found = set()
    for piece in pieces:
        if (piece.name, piece.start) in found:
            raise DamagedError(f"a part of leaf {piece.name} is there twice")
        found.add((piece.name, piece.start))
        if piece.name not in leaves:
            leaves[piece.name] = _empty(piece, wanted.get(piece.name))
        leaf = leaves[piece.name]
        for box, array in leaf.boxes.items():
            leaf.missing[box] -= _fill(array, box, piece)
    for name, leaf in leaves.items():
        if any(leaf.missing.values()):
            raise DamagedError(f"a part of leaf {name} is missing")
    return leaves


def _empty(piece: Piece, boxes: Iterable[Box] | None) -> Assembled:
    everything = tuple((0, n) for n in piece.whole)
    itself = tuple((a, a + n) for a, n in zip(piece.start, piece.data.shape, strict=True))
    boxes = list(boxes or [everything])
    if not all(_lies_in(box, piece.whole) for box in boxes):
        boxes = [everything]
    dtype = jnp.dtype(piece.dtype)
    arrays = {
        box: piece.data if box == itself else np.empty([b - a for a, b in box], dtype)
        for box in boxes
    }
    missing = {box: array.size for box, array in arrays.items()}
    return Assembled(dtype, piece.whole, arrays, missing)


def _lies_in(box: Box, shape: Sequence[int]) -> bool:
    return len(box) == len(shape) and all(b <= n for (_, b), n in zip(box, shape, strict=True))


def _fill(array: np.ndarray, box: Box, piece: Piece) -> int:
    """Copies what a piece has of a box into it; returns how many numbers."""
    to, of = [], []
    for (start, stop), first, length in zip(box, piece.start, piece.data.shape, strict=True):
        low, high = max(start, first), min(stop, first + length)
        if low >= high:
            return 0
        to.append(slice(low - start, high - start))
        of.append(slice(low - first, high - first))
    if array is not piece.data:
        array[tuple(to)] = piece.data[tuple(of)]
    return piece.data[tuple(of)].size


def _num_bytes(leaf: dict[str, Any]) -> int:
    return math.prod(leaf["shape"]) * jnp.dtype(leaf["dtype"]).itemsize


def _canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True).encode()


def _sha256(data: np.ndarray | bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_opaque(dtype: Any) -> bool:
    """Whether arrays of the dtype are not numbers: typed PRNG keys, objects, text, records."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return True
    return dtype.kind in "OSUMm" or dtype.fields is not None
