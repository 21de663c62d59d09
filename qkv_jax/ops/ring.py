"""A ring of devices: every device keeps its queries, and the keys travel past all of them.

The keys of a sequence lie in shards, one on each device along an axis of the mesh. In each round a
device works on the shard that it has and passes it on; after as many rounds as there are devices it
has seen all keys, and held those of two devices at most (Liu et al. 2023, ring attention,
arxiv.org/abs/2310.01889). How an array lies over the plane (see `block_sum`) says what it does:

    an axis `S` or `s`        travels with the keys; a result that does has come home at the end
    an axis `r` in front      has an entry for every shard of the keys, and stays
    neither                   belongs to the queries, or to all, and stays
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Self

import jax
import numpy as np

from qkv_jax.ops.manual import varying_like


@dataclasses.dataclass(frozen=True)
class Ring:
    """The mesh axis along which the keys travel, and how many devices it has."""

    axis: str | tuple[str, ...]
    size: int

    @classmethod
    def along(cls, name: str, axis: str | tuple[str, ...]) -> Self:
        """The ring along a mesh axis.

        Args:
          name: the argument that `axis` came as, for the message.
          axis: of the mesh.

        Raises:
          ValueError: where this code does not run once for each device along that axis.
        """
        try:
            return cls(axis, jax.lax.axis_size(axis))
        except NameError:
            raise ValueError(
                f"{name}: wanted an axis along which jax.shard_map cuts the arrays, got {axis!r}; "
                "call this inside jax.shard_map"
            ) from None

    def varying(self, x: jax.Array | np.ndarray) -> jax.Array:
        """An array that may be another one on every device of the ring."""
        return varying_like([jax.lax.axis_index(self.axis)], [x])[0]

    def gathered(self, x: jax.Array | np.ndarray, axis: int) -> jax.Array:
        """The shards of all devices, side by side."""
        return jax.lax.all_gather(self.varying(x), self.axis, axis=axis, tiled=True)


def for_each_shard(
    ring: Ring,
    compute: Callable[[list[jax.Array], list[jax.Array]], list[jax.Array]],
    arrays: Sequence[jax.Array],
    in_axes: Sequence[str],
    results: Sequence[jax.Array],
    out_axes: Sequence[str],
) -> list[jax.Array]:
    """Calls `results = compute(arrays, results)` for every shard of the keys.

    Args:
      ring: the ring.
      compute: takes and returns what belongs to the queries of this device and to one shard of
        keys: without axes `r`.
      arrays: what it reads.
      in_axes: how they lie.
      results: what it changes, before the first shard.
      out_axes: how they lie.

    Returns:
      The results after all shards.
    """
    here = jax.lax.axis_index(ring.axis)
    following = [(i, (i + 1) % ring.size) for i in range(ring.size)]
    arrays = varying_like([here, *arrays], arrays)
    results = varying_like([here, *arrays], results)

    def passed_on(xs: list[jax.Array], axes: Sequence[str]) -> list[jax.Array]:
        return [
            jax.lax.ppermute(x, ring.axis, following) if travels(a) else x
            for x, a in zip(xs, axes, strict=True)
        ]

    def one_round(i: jax.Array, state: tuple[list, list]) -> tuple[list, list]:
        arrays, results = state
        source = (here - i) % ring.size
        # Sent before it is used: the next shard is on its way while this one is computed. That of
        # the last round brings the keys home for nothing, beside work that takes longer.
        coming = passed_on(arrays, in_axes)
        new = compute(_of_shard(arrays, in_axes, source), _of_shard(results, out_axes, source))
        results = [
            jax.lax.dynamic_update_index_in_dim(old, x, source, 0) if by_shard(a) else x
            for old, x, a in zip(results, new, out_axes, strict=True)
        ]
        return coming, passed_on(results, out_axes)

    _, results = jax.lax.fori_loop(0, ring.size, one_round, (arrays, results))
    return results


def by_shard(axes: str) -> bool:
    """Whether an array has an entry for every shard of the keys."""
    return axes.startswith("r")


def travels(axes: str) -> bool:
    """Whether an array travels with the keys."""
    return not by_shard(axes) and not {"S", "s"}.isdisjoint(axes)


def _of_shard(xs: Sequence[jax.Array], axes: Sequence[str], source: jax.Array) -> list[jax.Array]:
    return [
        jax.lax.dynamic_index_in_dim(x, source, 0, keepdims=False) if by_shard(a) else x
        for x, a in zip(xs, axes, strict=True)
    ]
