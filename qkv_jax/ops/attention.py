"""Attention: one call for every mask, score and backend. Check, choose, call."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import arguments, kernels
from qkv_jax.ops.arguments import Arguments
from qkv_jax.ops.blockwise import Blockwise
from qkv_jax.ops.cudnn import CUDNN
from qkv_jax.ops.kernels import Kernel, Preferred
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.mesh import on_devices
from qkv_jax.ops.reference import reference, reference_weights
from qkv_jax.ops.scores import Score
from qkv_jax.ops.splash import SPLASH
from qkv_jax.ops.stats import Stats

Array = jax.Array | np.ndarray
Implementation = Callable[..., tuple[jax.Array, Stats | None]]

KERNELS = {kernel.platform: kernel for kernel in (CUDNN, SPLASH)}
IMPLEMENTATIONS: dict[str, Implementation] = {"reference": reference, "blockwise": Blockwise()}
IMPLEMENTATIONS |= {kernel.name: kernel for kernel in KERNELS.values()}


def attention(
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
    implementation: str | Blockwise | None = None,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, arxiv.org/abs/1706.03762).

        logits[b, n, t, s] = scale * q[b, t, n] . k[b, s, n // G]
        weights = softmax over s of score(logits) where mask allows
        out[b, t, n] = sum over s of weights[b, n, t, s] * v[b, s, n // G]

    Logits, softmax and sums are float32 (float64 for float64 input). A query that may attend to
    nothing gets 0, with zero gradients. Differentiable any number of times, in forward and reverse
    mode, in q, k, v, sinks and every array inside `score`.

    Args:
      q: queries, floating [B, T, N, H].
      k: keys, floating [B, S, K, H]; K divides N, so K = 1 is multi-query attention.
      v: values, floating [B, S, K, h].
      mask: who may attend to whom, for instance `masks.Causal() & masks.SlidingWindow(256)`.
      score: what happens to a logit before the softmax, for instance `scores.Softcap(30.0)`; a
        tuple applies in order.
      scale: factor of q . k; by default 1 / sqrt(H).
      sinks: floating [N], a logit per head that takes weight and gives no value.
      dropout_rate: probability in [0, 1) that a weight is dropped; the rest grow by 1 / (1 - rate).
      dropout_rng: the key of the dropout; a bit depends on it and on its four indices alone.
      q_positions: integers [T] or [B, T]; by default 0 ... T-1. Where T != S, masks and scores that
        compare positions need them.
      kv_positions: integers [S] or [B, S]; by default 0 ... S-1.
      implementation: "reference" (all T x S weights at once), "blockwise" (memory linear in T and
        S; `ops.Blockwise` sets its block sizes), "cudnn" (cuDNN's, on NVIDIA's GPUs), "splash"
        (JAX's, on TPUs), or None: the kernel of the platform if it honours every argument, else the
        other two's one measured to be faster at this size. `ops.explain` says which, and why. The
        answers are the same; those kernels leave no statistics.

    Returns:
      [B, T, N, h], in the dtype of `v`.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
      NotImplementedError: the implementation cannot honour an argument; it names it.
    """
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=scale, sinks=sinks, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    out, _ = choose(args, implementation, stats=False)(args, entropy=False)
    return out


def attention_with_stats(
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
    implementation: str | Blockwise | None = None,
) -> tuple[jax.Array, Stats]:
    """`attention`, and per row the log-sum-exp, the largest logit and the entropy of the weights.

    The arguments and errors are those of `attention`.

    Returns:
      [B, T, N, h] in the dtype of `v`, and Stats of [B, N, T] in float32 (float64 for float64
      input). The statistics are those of the softmax, before dropout.
    """
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=scale, sinks=sinks, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    return choose(args, implementation)(args, entropy=True)


def attention_weights(
    q: Array,
    k: Array,
    *,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    sinks: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """The weights of `attention`, materialised: for looking, not for training.

    The arguments and errors are those of `attention`.

    Returns:
      [B, N, T, S], float32 (float64 for float64 input). A row sums to 1; to less with a sink, to 0
      where nothing may be attended to.
    """
    args = arguments.check(
        q, k, None, mask=mask, score=score, scale=scale, sinks=sinks, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    weights, _ = reference_weights(args)
    return weights


def weighted_sum(args: Arguments, log_weight: Score) -> jax.Array:
    """The values' sum by weights that need not sum to 1: the numerators of attention.

        out = sum over s of exp(log_weight(logits)) * v[s]

    Args:
      args: checked arguments, without sinks.
      log_weight: of a logit, the logarithm of its weight.

    Returns:
      [B, T, N, h], in the dtype of `v`. A query that may attend to nothing gets 0.
    """
    dtype = args.v.dtype
    # Rounded once, after the product.
    wide = dataclasses.replace(args, v=args.v.astype(args.dtype), score=(*args.score, log_weight))
    out, stats = choose(wide, None)(wide, entropy=False)
    sums = jnp.swapaxes(jnp.exp(stats.lse), 1, 2)[..., None]
    return (out * sums).astype(dtype)


def choose(
    args: Arguments, implementation: str | Blockwise | None, *, stats: bool = True
) -> Implementation:
    """The implementation that was asked for, or the one that pays; on all devices of a mesh.

    Args:
      args: checked arguments.
      implementation: as `attention` takes it.
      stats: whether the statistics are wanted beside the output; not every one has them.
    """
    return on_devices(of_one_device(args, implementation, stats=stats))


def of_one_device(
    args: Arguments,
    implementation: str | Blockwise | None,
    *,
    stats: bool = True,
    platform: str | None = None,
) -> Implementation:
    """The implementation that was asked for, or the one that pays on a platform, by default here.

    A kernel that is preferred decides when it is called: what is known of a whole batch may not be
    known of the part that a device of a mesh has.
    """
    if isinstance(implementation, Blockwise | Kernel):
        return implementation
    platform = kernels.platform() if platform is None else platform
    if implementation is None:
        pays = blockwise_pays(args.q.shape[1], args.k.shape[1], platform)
        general = IMPLEMENTATIONS["blockwise" if pays else "reference"]
        kernel = KERNELS.get(platform)
        return general if kernel is None or stats else Preferred(kernel, general)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: wanted one of {sorted(IMPLEMENTATIONS)}, a Blockwise or None, "
            f"got {implementation!r}"
        )
    chosen = IMPLEMENTATIONS[implementation]
    if isinstance(chosen, Kernel):
        chosen.check_place(platform, stats)
    return chosen


def blockwise_pays(T: int, S: int, platform: str | None = None) -> bool:
    """Whether blocks are faster than all T x S weights at once, or at least no slower.

    Measured on a CPU and on an H100, where a plane of less than one block gains nothing.
    """
    length = 256 if (platform or jax.default_backend()) == "cpu" else 1024
    return length * length <= T * S
