"""What `jax.shard_map` asks of a primitive: on which mesh axes its values differ.

Inside `shard_map` an array's type says along which axes of the mesh it varies, and the operands of
a loop must agree. Outside, all of this does nothing. It lives here because it moves between
versions of JAX.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.sharding import NamedSharding, PartitionSpec


def varying_axes(arrays: Sequence[jax.Array]) -> frozenset[str]:
    """The mesh axes along which any of the arrays varies."""
    return frozenset().union(*(_varying(jax.typeof(x)) for x in arrays))


def varying_like(like: Sequence[jax.Array], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays, varying along all the mesh axes along which any of `like` does."""
    axes = varying_axes(like)
    if not axes:
        return list(arrays)
    promoted = []
    for x in map(jnp.asarray, arrays):
        missing = tuple(sorted(axes - _varying(jax.typeof(x))))
        promoted.append(jax.lax.pcast(x, missing, to="varying") if missing else x)
    return promoted


def abstract_array(
    shape: Sequence[int], dtype: jnp.dtype, like: Sequence[ShapedArray]
) -> ShapedArray:
    """The abstract value of an array that varies along the same mesh axes as all of `like`."""
    shape, dtype = tuple(shape), jnp.dtype(dtype)
    if not _varying(like[0]):
        return ShapedArray(shape, dtype)
    unsharded = NamedSharding(like[0].sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return like[0].update(shape=shape, dtype=dtype, weak_type=False, sharding=unsharded)


def _varying(aval: ShapedArray) -> frozenset[str]:
    manual = getattr(aval, "manual_axis_type", None)
    axes = getattr(aval, "vma", None) if manual is None else manual.varying
    return frozenset(axes or ())
