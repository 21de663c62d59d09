"""Attention by cuDNN's fused kernel, on NVIDIA's GPUs, through `jax.nn.dot_product_attention`.

What a call is translated to is the argument of the same meaning there, except where cuDNN, or the
way to it, gives something else than was asked for:

    a query without a key       gets a key to attend to, so that nothing in the kernel is infinite,
                                and 0 in its place afterwards
    a window that looks back    is always joined with `is_causal`: without it, what comes after the
                                query is not masked (jax-ml/jax#39576)
    lengths that are no         are said to be padded, of full length, or the last block's gradients
    multiples of a block        may be NaN (NVIDIA/cudnn-frontend#160, #1072)
    biases and dense masks      are refused at such lengths: their gradients may be NaN too
                                (pytorch/pytorch#196678)
    odd lengths                 are refused: JAX differentiates none

Logits and softmax are float32 there; weights are rounded to the dtype of the values before they are
summed. cuDNN may add a gradient's parts in any order: two runs can differ in the last bits, unless
XLA is told otherwise (`--xla_gpu_deterministic_ops`).
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.arguments import Arguments
from qkv_jax.ops.kernels import Kernel, allowed_pairs, in_order, platform
from qkv_jax.ops.mask_algebra import Mask, conjuncts
from qkv_jax.ops.masks import Causal, Dense, Lengths, SlidingWindow
from qkv_jax.ops.operands import is_array
from qkv_jax.ops.scores import Bias

Array = jax.Array | np.ndarray
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Terms:
    """A mask in the terms that cuDNN has."""

    causal: bool = False
    left: int | None = None  # how far back a query sees; None: all the way
    lengths: tuple[int | Array, ...] = ()  # each an integer or aligned integers; all of them hold
    dense: bool = False  # whether an array of all pairs is needed


def terms_of(mask: Mask | None) -> Terms | None:
    """What cuDNN is told of a mask; None where it has no words for it."""
    causal, windows, lengths, dense = False, [], [], False
    for part in conjuncts(mask):
        if isinstance(part, Causal):
            causal = True
        elif isinstance(part, SlidingWindow) and not is_array(part.left):
            windows.append(part)
        elif isinstance(part, Lengths):
            lengths.append(part.kv_lengths)
        elif isinstance(part, Dense):
            dense = True
        else:
            return None
    causal = causal or any(_is_zero(window.right) for window in windows)
    if any(is_array(window.right) for window in windows) or (windows and not causal):
        return None
    limits = [window.left for window in windows if window.left is not None]
    return Terms(causal, min(limits, default=None), tuple(lengths), dense)


def refusal(args: Arguments) -> str | None:
    """Why cuDNN cannot honour a call, naming the argument; None if it can."""
    return next(_reasons(args), None)


def _reasons(args: Arguments) -> Iterator[str]:
    (_, T, _, H), S, h = args.q.shape, args.k.shape[1], args.v.shape[3]
    if args.is_empty:
        yield "q, k, v: cuDNN takes no empty axis"
    dtypes = [x.dtype for x in (args.q, args.k, args.v)]
    if dtypes[0] not in (jnp.bfloat16, jnp.float16) or len(set(dtypes)) > 1:
        found = ", ".join(map(str, dtypes))
        yield f"q, k, v: cuDNN takes float16 or bfloat16, the same for all three, got {found}"
    if h != H:
        yield f"v: cuDNN takes values as wide as keys, got h = {h} beside H = {H}"
    yield from _device_reasons(H)
    if args.sinks is not None:
        yield "sinks: cuDNN has none here"
    if args.dropout_rate:
        yield "dropout_rate: cuDNN's bits depend on the kernel, not on the four indices alone"
    if is_array(args.scale):
        yield "scale: cuDNN takes a Python number, got an array"
    yield from _score_reasons(args)
    yield from _mask_reasons(args)
    if (args.score or _is_dense(args.mask)) and (T % BLOCK or S % BLOCK):
        name = "score" if args.score else "mask"
        yield f"{name}: for an array of pairs cuDNN takes multiples of {BLOCK}, got {T} x {S}"
    for name, length in (("q", T), ("k", S)):
        if length % 2:
            yield f"{name}: cuDNN takes an even number of tokens, got {length}"


def _device_reasons(H: int) -> Iterator[str]:
    """About the head width, and about the GPU if there is one here."""
    capability = _capability()
    if capability is not None and capability < (8, 0):
        found = ".".join(map(str, capability))
        yield f"implementation: cuDNN's attention needs compute capability 8.0, got {found}"
    hopper = capability is not None and capability[0] == 9
    widest = 256 if hopper else 128
    if H % 8 or widest < H:
        yield (
            f"q: cuDNN takes heads in multiples of 8, at most {widest} wide "
            f"(256 on Hopper), got {H}"
        )


def _score_reasons(args: Arguments) -> Iterator[str]:
    if len(args.score) > 1 or not all(isinstance(score, Bias) for score in args.score):
        yield "score: cuDNN takes one Bias and no other score"
    elif args.score and args.score[0].array.dtype != args.q.dtype:
        found = args.score[0].array.dtype
        yield f"score: cuDNN takes a Bias of {args.q.dtype}, as q is, and would round {found}"


def _mask_reasons(args: Arguments) -> Iterator[str]:
    T, S = args.q.shape[1], args.k.shape[1]
    terms = terms_of(args.mask)
    if terms is None:
        yield (
            "mask: cuDNN takes Causal(), with SlidingWindow(left) of a Python number, Lengths(...) "
            f"and Dense(...), joined by &, got {args.mask!r}"
        )
        return
    if terms.dense and args.q.dtype == jnp.float16:
        yield "mask: in float16 cuDNN forbids by adding -32768, which is not enough"
    if terms.left is not None and args.score and not terms.dense:
        yield "score: cuDNN takes no Bias beside a window"
    if terms.left is not None and terms.lengths and not terms.dense:
        yield "mask: beside a window, Lengths leaves queries without keys that cuDNN cannot name"
    if terms.causal and not (T == S and in_order(args.q_pos)):
        yield f"q_positions: cuDNN's causal order is that of 0 ... {T - 1} beside as many keys"
    if (terms.causal or terms.lengths) and not in_order(args.kv_pos):
        yield f"kv_positions: cuDNN counts keys from 0 to {S - 1}"


def attend(args: Arguments, implementation: str = "cudnn") -> jax.Array:
    """The output of a call that `refusal` does not refuse.

    Args:
      args: checked arguments.
      implementation: the one of `jax.nn.dot_product_attention`; "xla" computes the same anywhere.
    """
    given, empty = translated(args)
    out = jax.nn.dot_product_attention(
        args.q, args.k, args.v, scale=float(args.scale), implementation=implementation, **given
    )
    return out if empty is None else jnp.where(empty, 0, out)


def translated(args: Arguments) -> tuple[dict[str, object], jax.Array | None]:
    """Mask and score as arguments of `jax.nn.dot_product_attention`.

    Returns:
      The arguments; and which queries may attend to nothing, broadcastable to [B, T, N, h], or
      None where each has a key. In the arguments, each has one.
    """
    (B, T, _, _), S = args.q.shape, args.k.shape[1]
    terms = terms_of(args.mask)
    given, empty = {"is_causal": terms.causal}, None
    for score in args.score:
        given["bias"] = _over_pairs(score.array, T, S)
    lengths = S if not terms.causal and (T % BLOCK or S % BLOCK) else None
    if terms.dense:  # all that the mask says
        allowed = allowed_pairs(args)
        given["mask"] = _over_pairs(allowed, T, S)
        empty = jnp.swapaxes(~given["mask"].any(-1, keepdims=True), 1, 2)
    elif terms.left is not None:
        given["local_window_size"] = (terms.left, 0)
    elif terms.lengths:
        shortest = jnp.asarray(S)
        for some in terms.lengths:
            shortest = jnp.minimum(shortest, some)
        empty = (shortest <= 0).reshape(-1, 1, 1, 1)
        lengths = jnp.maximum(shortest, 1).reshape(-1)
    if lengths is not None:
        given["key_value_seq_lengths"] = jnp.broadcast_to(lengths, B).astype(jnp.int32)
    return given, empty


def _over_pairs(x: Array, T: int, S: int) -> jax.Array:
    """[B or 1, N or 1, T, S]: along T and S cuDNN broadcasts nothing."""
    return jnp.broadcast_to(x, (*x.shape[:2], T, S))


def _is_dense(mask: Mask | None) -> bool:
    terms = terms_of(mask)
    return terms is not None and terms.dense


def _is_zero(right: int | Array | None) -> bool:
    return isinstance(right, int) and right == 0


def _capability() -> tuple[int, ...] | None:
    """The least compute capability of the GPUs here, such as (9, 0); None where there are none."""
    if platform() != "gpu":
        return None
    found = (device.compute_capability for device in jax.local_devices())
    return min(tuple(int(part) for part in capability.split(".")) for capability in found)


CUDNN = Kernel("cudnn", "gpu", refusal, attend)
