"""A pytree of arrays as one buffer of bytes, and a manifest by which it is verified and unpacked.

    buffer, layout = pack(tree)
    manifest = make_manifest(buffer, layout, step)
    leaves = unpack(buffer, manifest, step)  # {"params/layers/0/kernel": array, ...}

The manifest is plain data, ready for JSON: the name, dtype, shape, offset and SHA-256 of each leaf,
and a SHA-256 of all that.
"""

import hashlib
import json
import math
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


def pack(tree: Any) -> tuple[np.ndarray, dict[str, dict]]:
    """Copies every leaf into one buffer in host memory.

    Args:
      tree: a pytree of JAX or NumPy arrays.

    Returns:
      The buffer, and the dtype, shape and offset of each leaf by name.

    Raises:
      ValueError: a leaf is not an array of numbers, or there are none.
    """
    leaves = dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic) or _is_opaque(leaf.dtype):
            raise ValueError(f"leaf {name} must be an array of numbers, got {leaf!r}")
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(f"leaf {name} spans several processes; gather it before saving")
    buffer = np.empty(sum(leaf.nbytes for leaf in leaves.values()), np.uint8)
    if not buffer.size:
        raise ValueError("the tree to save holds no numbers")
    layout, offset = {}, 0
    for name, leaf in jax.device_get(leaves).items():
        native = np.asarray(leaf, leaf.dtype.newbyteorder("="), order="C")
        buffer[offset : offset + native.nbytes] = native.reshape(-1).view(np.uint8)
        layout[name] = {"dtype": native.dtype.name, "shape": native.shape, "offset": offset}
        offset += native.nbytes
    return buffer, layout


def make_manifest(buffer: np.ndarray, layout: dict[str, dict], step: int) -> dict[str, Any]:
    """What is in the buffer, with a checksum for each leaf and one for all of this."""
    leaves = {
        name: leaf | {"sha256": _sha256(buffer[leaf["offset"] :][: _num_bytes(leaf)])}
        for name, leaf in layout.items()
    }
    manifest = {"format": 1, "step": step, "leaves": leaves}
    return manifest | {"sha256": _sha256(_canonical(manifest))}


def unpack(buffer: np.ndarray, manifest: dict[str, Any], step: int) -> dict[str, np.ndarray]:
    """The leaves by name, each with its own memory.

    Raises:
      DamagedError: the buffer or the manifest is not what `pack` and `make_manifest` returned.
    """
    manifest = dict(manifest)
    claimed = manifest.pop("sha256")
    if _sha256(_canonical(manifest)) != claimed or manifest["step"] != step:
        raise DamagedError("its manifest is damaged")  # or a name might pass for another's
    leaves = {}
    for name, leaf in manifest["leaves"].items():
        data = buffer[leaf["offset"] :][: _num_bytes(leaf)].copy()
        if _sha256(data) != leaf["sha256"]:
            raise DamagedError(f"the checksum of leaf {name} does not match")
        leaves[name] = data.view(jnp.dtype(leaf["dtype"])).reshape(leaf["shape"])
    return leaves


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
