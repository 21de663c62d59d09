"""Attention by JAX's own kernel for TPUs, splash attention: what it honours, and how it is told.

`Causal` and windows are formulas there, and lengths and segments, which differ between the rows of
a batch, the ids that it compares. Any other mask that is known while tracing, and the same for all
rows, becomes an array [T, S] on the host, of which the kernel makes its plan. The rest is refused.

A query without a key would divide by zero there (its docstring calls the softmax invalid). It gets
a key to attend to, and 0 in its place afterwards. There is no scale in the kernel: q is multiplied
by it first, and rounded to bfloat16 where it is no power of two.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.arguments import Arguments
from qkv_jax.ops.kernels import Kernel, allowed_pairs, in_order
from qkv_jax.ops.manual import varying_axes
from qkv_jax.ops.mask_algebra import conjuncts
from qkv_jax.ops.masks import Causal, Lengths, Segments, SlidingWindow
from qkv_jax.ops.operands import is_array
from qkv_jax.ops.scores import Softcap

Array = jax.Array | np.ndarray
LANES = 128  # what the lengths of q and k are multiples of
WIDTH = 64  # what their widths are multiples of
LARGEST = 2**28  # pairs of an array on the host


@dataclasses.dataclass(frozen=True)
class Terms:
    """A mask in the kernel's terms: a window, and ids that queries and keys have in common."""

    left: int | None = None  # how far back a query sees, and how far ahead; None: all the way
    right: int | None = None
    ids: Lengths | Segments | None = None


def terms_of(args: Arguments) -> Terms | None:
    """The mask of a call as formulas and ids; None where that does not say it."""
    left, right, ids = [], [], []
    for part in conjuncts(args.mask):
        if isinstance(part, Causal):
            right.append(0)
        elif isinstance(part, SlidingWindow) and not is_array(part.left) | is_array(part.right):
            left.append(part.left)
            right.append(part.right)
        elif isinstance(part, Lengths | Segments):
            ids.append(part)
        else:
            return None
    terms = Terms(_least(left), _least(right), *ids[:1])
    ordered = terms.left is not None or terms.right is not None
    if len(ids) > 1 or (ordered and args.q.shape[1] != args.k.shape[1]):
        return None
    mask = args.mask
    strange = mask is not None and (
        (mask.uses_q_positions and not in_order(args.q_pos))
        or (mask.uses_kv_positions and not in_order(args.kv_pos))
    )
    return None if strange else terms


def known(args: Arguments) -> np.ndarray | None:
    """What the mask allows, bool [1 or N, T, S]; None where tracing, or one array, cannot tell."""
    T, S = args.q.shape[1], args.k.shape[1]
    where = args.q_pos, args.kv_pos, args.head
    leaves = [*jax.tree.leaves(args.mask), *where]
    if not all(isinstance(x, np.ndarray) for x in leaves) or args.q.shape[2] * T * S > LARGEST:
        return None
    with jax.ensure_compile_time_eval():  # a user's own function may be JAX's
        allowed = args.mask.mask(*where)
    if isinstance(allowed, jax.core.Tracer) or allowed.shape[0] != 1:
        return None
    return np.broadcast_to(np.asarray(allowed)[0], (allowed.shape[1], T, S))


def refusal(args: Arguments) -> str | None:
    """Why splash cannot honour a call, naming the argument; None if it can."""
    return next(_reasons(args), None)


def _reasons(args: Arguments) -> Iterator[str]:
    (_, T, _, H), S, h = args.q.shape, args.k.shape[1], args.v.shape[3]
    dtypes = [x.dtype for x in (args.q, args.k, args.v)]
    if any(dtype != jnp.bfloat16 for dtype in dtypes):
        found = ", ".join(map(str, dtypes))
        yield f"q, k, v: a TPU multiplies in bfloat16, wanted all three so, got {found}"
    if args.is_empty:
        yield "q, k, v: splash takes no empty axis"
    for name, length in (("q", T), ("k", S)):
        if length % LANES:
            yield f"{name}: splash takes multiples of {LANES} tokens, got {length}"
    for name, width in (("q", H), ("v", h)):
        if width % WIDTH:
            yield f"{name}: splash takes widths in multiples of {WIDTH}, got {width}"
    if varying_axes([args.q, args.k, args.v]):
        yield "q, k, v: splash has no types for arrays inside jax.shard_map"
    if args.sinks is not None and args.sinks.dtype != args.q.dtype:
        yield f"sinks: splash sums their gradient in {args.q.dtype}, got {args.sinks.dtype}"
    if args.dropout_rate:
        yield "dropout_rate: splash has none"
    if len(args.score) > 1 or any(
        not isinstance(score, Softcap) or is_array(score.cap) for score in args.score
    ):
        yield "score: splash takes one Softcap, of a Python number, and no other score"
    if terms_of(args) is None and known(args) is None:
        yield (
            "mask: splash takes Causal(), SlidingWindow(...) of Python numbers and one of "
            "Lengths(...) and Segments(...), joined by &, at positions 0, 1, 2 ...; or one that is "
            f"known while tracing, the same for all rows, of at most {LARGEST:,} pairs in all "
            f"heads; got {args.mask!r}"
        )


def attend(args: Arguments, interpret: bool = False) -> jax.Array:
    """The output of a call that `refusal` does not refuse.

    Args:
      args: checked arguments.
      interpret: whether to compute what the kernel does in JAX's own operations, on any device.
    """
    heads, ids, empty = translated(args)
    cap = args.score[0].cap if args.score else None
    kernel = _kernel(heads, cap, interpret)
    q = (args.q.astype(args.dtype) * args.scale).astype(args.q.dtype)
    by_rows = jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0, None))
    out = by_rows(*(jnp.swapaxes(x, 1, 2) for x in (q, args.k, args.v)), ids, args.sinks)
    out = jnp.swapaxes(out, 1, 2)
    return out if empty is None else jnp.where(empty, 0, out)


def translated(args: Arguments) -> tuple[tuple[Any, ...], Any, Array | None]:
    """The mask as splash takes it.

    Returns:
      A mask of splash per head; `SegmentIds` of [B, T] and [B, S], or None; and which queries may
      attend to nothing, broadcastable to [B, T, N, h], or None where each has a key. In the masks
      and ids, each has one.
    """
    # Where it is asked for alone: it is experimental.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N, S = *args.q.shape[1:3], args.k.shape[1]
    terms = terms_of(args)
    if terms is None:
        allowed = known(args)
        empty = ~allowed.any(-1, keepdims=True)
        allowed = allowed | (empty & (np.arange(S) == 0))
        heads = [splash.NumpyMask(of_head) for of_head in allowed]
        return tuple(heads * (N // len(heads))), None, np.swapaxes(empty, 0, 1)[None]
    if terms.left is None and terms.right is None:
        mask = splash.FullMask((T, S))
    else:  # T == S, and a query sees at least itself
        mask = splash.LocalMask((T, S), (terms.left, terms.right), 0)
    if terms.ids is None:
        return (mask,) * N, None, None
    ids, empty = _ids(args, terms.ids)
    return (mask,) * N, splash.SegmentIds(*ids), empty


def _ids(args: Arguments, mask: Lengths | Segments) -> tuple[list[jax.Array], jax.Array]:
    """Ids of queries and keys, int32 [B, T] and [B, S], and which queries have no key."""
    (B, T, _, _), S = args.q.shape, args.k.shape[1]
    if isinstance(mask, Segments):
        q_ids, kv_ids = mask.q_ids[:, 0, :, 0], mask.kv_ids[:, 0, 0]
    else:  # keys beyond the end have another id
        q_ids = jnp.zeros((1, T))
        kv_ids = (args.kv_pos >= mask.kv_lengths)[:, 0, 0]
    q_ids, kv_ids = (
        jnp.broadcast_to(x, (B, n)).astype(jnp.int32) for x, n in ((q_ids, T), (kv_ids, S))
    )
    # XLA sums up as it goes, and keeps no array [T, S].
    allowed = allowed_pairs(args)
    empty = ~jnp.broadcast_to(allowed, (B, 1, T, S)).any(-1)[:, 0]
    # Itself, whom a window always lets a query see; without one, any will do.
    some = kv_ids if T == S else kv_ids[:, :1]
    return [jnp.where(empty, some, q_ids), kv_ids], empty[:, :, None, None]


@functools.lru_cache(maxsize=256)
def _kernel(heads: tuple[Any, ...], cap: float | None, interpret: bool) -> Any:
    """The kernel for these masks: made once, for they are compared block by block."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, S = heads[0].shape
    block_q, block_kv = (next(n for n in (512, 256, LANES) if m % n == 0) for m in (T, S))
    sizes = splash.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv,
        block_q_dq=block_q, block_kv_dq=block_kv,
    )  # fmt: skip
    with jax.ensure_compile_time_eval():  # its arrays outlive the trace that first asks
        return splash.make_splash_mha_single_device(
            splash.MultiHeadMask(heads),
            block_sizes=sizes,
            attn_logits_soft_cap=cap,
            interpret=interpret,
        )


def _least(limits: list[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


SPLASH = Kernel("splash", "tpu", refusal, attend)
