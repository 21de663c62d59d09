"""The arguments of one attention call, checked and brought into one form."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import scores
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.operands import check_aligned
from qkv_jax.ops.scores import Score

Array = jax.Array | np.ndarray


class First(NamedTuple):
    """Where the arrays of a call begin, if they are parts of larger ones, as shards are."""

    batch: int | Array = 0
    head: int | Array = 0
    query: int | Array = 0
    key: int | Array = 0


WHOLE = First()


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What `attention` was asked, after the checks.

    Mask and score are aligned (see `operands`), positions are int32 and have rank 4, numbers are
    filled in. `v` is None where only the weights are wanted.
    """

    q: Array  # [B, T, N, H]
    k: Array  # [B, S, K, H]
    v: Array | None  # [B, S, K, h]
    mask: Mask | None
    score: Score | tuple[Score, ...] | None
    scale: float | Array
    sinks: Array | None  # [N]
    dropout_rate: float
    dropout_rng: Array | None
    q_pos: Array  # [B or 1, 1, T, 1]
    kv_pos: Array  # [B or 1, 1, 1, S]
    first: First = WHOLE

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of logits, softmax and sums: float64 if any input has it, else float32."""
        inputs = [x for x in (self.q, self.k, self.v) if x is not None]
        return jnp.promote_types(jnp.result_type(*inputs), jnp.float32)

    @property
    def is_empty(self) -> bool:
        """Whether an axis of q, k or v has no item."""
        return any(0 in x.shape for x in (self.q, self.k, self.v) if x is not None)

    @property
    def head(self) -> Array:
        """The heads' indices, int32 [1, N, 1, 1]."""
        return self.index("head")

    def index(self, name: str, length: int | None = None) -> Array:
        """The indices along one axis of [B, N, T, S], int32 of rank 4.

        Args:
          name: batch, head, query or key.
          length: how many; by default as many as there are.
        """
        axis = First._fields.index(name)
        B, T, N, _ = self.q.shape
        sizes = B, N, T, self.k.shape[1]
        shape = [-1 if a == axis else 1 for a in range(4)]
        indices = np.arange(sizes[axis] if length is None else length, dtype=np.int32)
        return indices.reshape(shape) + self.first[axis]


def check(
    q: Array,
    k: Array,
    v: Array | None,
    *,
    mask: Mask | None,
    score: Score | tuple[Score, ...] | None,
    scale: float | None,
    sinks: Array | None,
    dropout_rate: float,
    dropout_rng: Array | None,
    q_positions: Array | None,
    kv_positions: Array | None,
    shards: int = 1,
) -> Arguments:
    """Checks the arguments of an attention call, before anything is computed.

    The arguments that are not listed are those of `attention`.

    Args:
      shards: of how many such shards the keys are one: an operand may have the S axis of all.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    B, T, S, N = _check_shapes(q, k, v)
    _check_mask_and_score(mask, score)
    needs_positions = (mask is not None and mask.uses_q_positions) or scores.uses_positions(score)
    if T != S and needs_positions and q_positions is None:
        raise ValueError(
            f"q_positions: {T} queries, {S} keys and a mask or score that compares positions, so "
            "say where the queries stand: q_positions [T] or [B, T], and kv_positions unless the "
            "keys are 0 ... S-1. (Decoding one token after S-1 others: q_positions=[S-1].)"
        )
    mask = None if mask is None else mask.aligned()
    score = scores.aligned(score)
    check_aligned(mask, "mask", B=B, N=N, T=T, S=S, shards=shards)
    check_aligned(score, "score", B=B, N=N, T=T, S=S, shards=shards)
    if sinks is not None and (np.shape(sinks) != (N,) or not _is_floating(sinks)):
        raise ValueError(f"sinks: wanted floating [N] = [{N}], got {_described(sinks)}")
    if scale is not None and np.shape(scale) != ():
        raise ValueError(f"scale: wanted a number, got {_described(scale)}")
    _check_dropout(dropout_rate, dropout_rng)
    # NumPy's float64 becomes what JAX has: float32 unless jax_enable_x64 is set.
    q, k, v, sinks = (jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in (q, k, v, sinks))
    return Arguments(
        q, k, v, mask, score,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        sinks=sinks,
        dropout_rate=float(dropout_rate),
        dropout_rng=dropout_rng,
        q_pos=_positions(q_positions, "q_positions", B, "T", T)[:, None, :, None],
        kv_pos=_positions(kv_positions, "kv_positions", B, "S", S)[:, None, None, :],
    )  # fmt: skip


def check_positive(**sizes: int) -> None:
    """Raises a ValueError that names the first of the sizes that is less than 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: wanted a positive integer, got {size}")


def _check_shapes(q: Array, k: Array, v: Array | None) -> tuple[int, int, int, int]:
    for name, x, wanted in (("q", q, "BTNH"), ("k", k, "BSKH"), ("v", v, "BSKh")):
        if x is None and name == "v":
            continue
        if np.ndim(x) != 4 or not _is_floating(x):
            raise ValueError(f"{name}: wanted floating [{', '.join(wanted)}], got {_described(x)}")
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    if k.shape != (B, S, K, H):
        raise ValueError(
            f"k: wanted [B, S, K, H] = [{B}, S, K, {H}] beside q {list(q.shape)}, "
            f"got {list(k.shape)}"
        )
    if v is not None and v.shape[:3] != (B, S, K):
        raise ValueError(
            f"v: wanted [B, S, K, h] = [{B}, {S}, {K}, h] beside k {list(k.shape)}, "
            f"got {list(v.shape)}"
        )
    if K == 0 or N % K:
        raise ValueError(f"k: {K} key/value heads do not divide q's {N} heads (N % K == 0)")
    return B, T, S, N


def _check_mask_and_score(mask: Any, score: Any) -> None:
    if mask is not None and not isinstance(mask, Mask):
        raise ValueError(
            f"mask: wanted a Mask such as masks.Causal() or None, got {_described(mask)}"
            + ("; wrap a boolean array in masks.Dense" if hasattr(mask, "shape") else "")
        )
    for part in score if isinstance(score, tuple) else (score,):
        if part is not None and not isinstance(part, Score):
            raise ValueError(
                "score: wanted a Score such as scores.Softcap(30.0), a tuple of them or None, "
                f"got {_described(part)}"
                + ("; wrap an array in scores.Bias" if hasattr(part, "shape") else "")
            )


def _check_dropout(rate: Any, rng: Any) -> None:
    if not isinstance(rate, int | float) or not 0 <= rate < 1:  # a NaN fails this too
        raise ValueError(f"dropout_rate: wanted a Python number in [0, 1), got {rate!r}")
    if rate and rng is None:
        raise ValueError(f"dropout_rng: wanted a key for dropout_rate = {rate}, got None")


def _positions(positions: Array | None, name: str, B: int, letter: str, length: int) -> Array:
    """Positions as int32 [B or 1, length]; 0 ... length-1 where none were given."""
    if positions is None:
        return np.arange(length, dtype=np.int32)[None]
    if not isinstance(positions, jax.Array):
        positions = np.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer) or positions.shape not in (
        (length,),
        (B, length),
        (1, length),
    ):
        raise ValueError(
            f"{name}: wanted integers [{letter}] = [{length}] or [B, {letter}] = [{B}, {length}], "
            f"got {_described(positions)}"
        )
    positions = positions.astype(np.int32)
    return positions[None] if positions.ndim == 1 else positions


def _is_floating(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _described(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype} {list(x.shape)}"
    return repr(x) if not isinstance(x, type) else x.__name__
