"""The ops of context parallelism: for modules inside `jax.shard_map`, and from whole arrays."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.sharding import Mesh as DeviceMesh

from qkv_jax.ops import arguments
from qkv_jax.ops.context import Axis, all_gather_attention, ring_attention, ulysses_attention
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.mesh import operand_cut
from qkv_jax.ops.operands import is_array
from qkv_jax.ops.scores import Score

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """What the ops below are told: the names of mesh axes, as `ring_attention` takes them."""

    axis_name: Axis
    batch_axis: Axis | None = None
    head_axis: Axis | None = None


class RingAttention(OnMesh):
    """`ring_attention` as the op of a module."""

    def __call__(self, q: Array, k: Array, v: Array, **kwargs: Any) -> jax.Array:
        return ring_attention(q, k, v, **dataclasses.asdict(self), **kwargs)


class UlyssesAttention(OnMesh):
    """`ulysses_attention` as the op of a module."""

    def __call__(self, q: Array, k: Array, v: Array, **kwargs: Any) -> jax.Array:
        return ulysses_attention(q, k, v, **dataclasses.asdict(self), **kwargs)


class AllGatherAttention(OnMesh):
    """`all_gather_attention` as the op of a module."""

    def __call__(self, q: Array, k: Array, v: Array, **kwargs: Any) -> jax.Array:
        return all_gather_attention(q, k, v, **dataclasses.asdict(self), **kwargs)


@dataclasses.dataclass(frozen=True)
class Sharded:
    """One of these ops as `attention` of whole arrays: it cuts them over a mesh, and calls the op.

    An op of a module whose other computation `jit` shards by itself, and the simplest call. The
    arguments and errors are those of `attention` (`ring_attention` says what `implementation` may
    be). Arrays that lie as they are needed stay where they are: q, k and v cut along T and S by
    `axis_name`, along B and N or K by the other axes of the op.

    Args:
      op: a `RingAttention`, `UlyssesAttention` or `AllGatherAttention`.
      mesh: has the axes that `op` names.

    Raises:
      ValueError: for an axis that the mesh has not.
    """

    op: OnMesh
    mesh: DeviceMesh | AbstractMesh

    def __post_init__(self):
        for name, axis in dataclasses.asdict(self.op).items():
            missing = set(_names(axis)) - set(self.mesh.axis_names)
            if missing:
                raise ValueError(
                    f"{name}: the mesh has no axis {sorted(missing)}, "
                    f"it has {list(self.mesh.axis_names)}"
                )

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        mask: Mask | None = None,
        score: Score | tuple[Score, ...] | None = None,
        scale: float | None = None,
        sinks: Array | None = None,
        dropout_rate: float = 0.0,
        dropout_rng: Array | None = None,
        q_positions: Array | None = None,
        kv_positions: Array | None = None,
        implementation: Any = None,
    ) -> jax.Array:
        args = arguments.check(
            q, k, v, mask=mask, score=score, scale=scale, sinks=sinks, dropout_rate=dropout_rate,
            dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
        )  # fmt: skip
        self._check_division(args)
        arrays = {
            "q": q, "k": k, "v": v, "mask": args.mask, "score": args.score, "sinks": sinks,
            "dropout_rng": dropout_rng, "q_positions": q_positions, "kv_positions": kv_positions,
        }  # fmt: skip
        numbers = {"dropout_rate": dropout_rate, "implementation": implementation}
        (arrays if is_array(scale) else numbers)["scale"] = scale
        arrays = {name: jax.tree.map(jnp.asarray, x) for name, x in arrays.items() if x is not None}
        return _call(arrays, self, tuple(numbers.items()))

    def specs(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """How the arguments of a call, by name, are cut; mask and score are aligned."""
        op = self.op
        specs = {name: PartitionSpec(op.batch_axis, op.axis_name, op.head_axis) for name in "qkv"}
        specs |= {"sinks": PartitionSpec(op.head_axis)}
        specs |= {"dropout_rng": PartitionSpec(), "scale": PartitionSpec()}
        axes = op.batch_axis, op.head_axis, op.axis_name, op.axis_name
        for name in ("mask", "score"):
            specs[name] = jax.tree.map(lambda x: operand_cut(x, axes), arrays.get(name))
        for name in ("q_positions", "kv_positions"):
            *rows, _ = arrays[name].shape if name in arrays else (0,)
            of_rows = [op.batch_axis if n > 1 else None for n in rows]
            specs[name] = PartitionSpec(*of_rows, op.axis_name)
        return {name: specs[name] for name in arrays}

    def _check_division(self, args: arguments.Arguments) -> None:
        """That every axis is as long as its mesh axis, or a multiple."""
        op, (B, T, N, _), (S, K) = self.op, args.q.shape, args.k.shape[1:3]
        for name, axis, sizes in (
            ("axis_name", op.axis_name, {"T": T, "S": S}),
            ("batch_axis", op.batch_axis, {"B": B}),
            ("head_axis", op.head_axis, {"N": N, "K": K}),
        ):
            devices = int(np.prod([self.mesh.shape[a] for a in _names(axis)]))
            for letter, size in sizes.items():
                if size % devices:
                    raise ValueError(
                        f"{name}: the {devices} devices along {axis!r} do not divide "
                        f"{letter} = {size}"
                    )


def _names(axis: Axis | None) -> tuple[str, ...]:
    """The mesh axes that an argument names."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _call(arrays: dict[str, Any], sharded: Sharded, numbers: tuple) -> jax.Array:
    """Compiled even where nobody else does: `jax.shard_map` is slow outside of `jit`."""
    mesh, specs = sharded.mesh, sharded.specs(arrays)
    if AxisType.Explicit in mesh.axis_types:  # shard_map then takes no array that lies otherwise
        arrays = jax.reshard(arrays, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    return jax.shard_map(
        lambda arrays: sharded.op(**arrays, **dict(numbers)),
        mesh=mesh, in_specs=(specs,), out_specs=specs["q"],
    )(arrays)  # fmt: skip
