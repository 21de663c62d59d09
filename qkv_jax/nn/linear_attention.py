"""Mixers whose memory is a matrix per head: retention, SSD, gated linear attention, delta rules."""

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer

from qkv_jax import ops
from qkv_jax.nn.linear import Linear, compute_dtype, project
from qkv_jax.ops import masks
from qkv_jax.ops.arguments import check_positive
from qkv_jax.ops.convolution import causal_convolution, last_inputs
from qkv_jax.ops.delta import delta_rule
from qkv_jax.ops.linear import linear_attention
from qkv_jax.ops.masks import Mask

_default_init = nnx.initializers.lecun_normal()


class LinearRecurrence(nnx.Module, abc.ABC):
    """What these mixers share: projections, a short convolution, the recurrence, a gated norm.

        q, k, v = silu(conv(x W_q, x W_k, x W_v))          where the mechanism has a convolution
        out = (norm(heads of recurrence(q, k, v, gates of x)) * silu(x W_gate)) W_out

    A subclass says what its gates are and which recurrence takes them. O(T); causal.

    Args:
      width: D, of the input and the output.
      num_heads: N.
      head_dim: H = h, by default width / num_heads.
      conv_width: tokens that the short convolution sees, where there is one.
      chunk_size: tokens that are computed at once: a matter of speed alone.
      rotary_base: base of a rotary position embedding on queries and keys; None: none.
      use_bias: whether the projections have biases.
      kernel_init, out_init: initialisers of the projections in and of the projection out.
      dtype: of the projections; the recurrence computes in float32 or better.
      param_dtype: of the parameters.
      rngs: where the initial parameters come from.

    Raises:
      ValueError: for sizes that do not fit.
    """

    has_convolution = True

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        conv_width: int = 4,
        chunk_size: int = 64,
        rotary_base: float | None = None,
        use_bias: bool = False,
        kernel_init: Initializer = _default_init,
        out_init: Initializer = _default_init,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_heads < 1 or (head_dim is None and width % num_heads):
            raise ValueError(
                f"num_heads: wanted a divisor of width = {width} (or a head_dim), got {num_heads}"
            )
        check_positive(conv_width=conv_width, chunk_size=chunk_size)
        self.num_heads = num_heads
        self.head_dim = width // num_heads if head_dim is None else head_dim
        self.chunk_size = chunk_size
        self.rotary_base = rotary_base
        inner = num_heads * self.head_dim

        def linear(inputs: int, outputs: int, init: Initializer) -> Linear:
            return Linear(
                inputs, outputs, use_bias=use_bias, kernel_init=init, dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        self.query, self.key, self.value, self.gate = (
            linear(width, inner, kernel_init) for _ in range(4)
        )
        draw, shape = nnx.initializers.normal(conv_width**-0.5), (conv_width, 3 * inner)
        self.kernel = (
            nnx.Param(draw(rngs.params(), shape, param_dtype)) if self.has_convolution else None
        )
        self.norm = nnx.RMSNorm(self.head_dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.out = linear(inner, width, out_init)

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: Mask | None = None,
        positions: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Mixes each token with those before it.

        Args:
          x: [B, T, D].
          mask: `Causal()`, alone or with `Lengths(...)`.
          positions: of the rotation, integers [T] or [B, T]; the recurrence takes tokens in the
            order of the array.
          rng: unused: there is no dropout inside.

        Returns:
          [B, T, D].

        Raises:
          NotImplementedError: for a mask that is not causal, or that says more.
        """
        del rng
        lengths = masks.causal_lengths(mask, type(self).__name__)
        out, _ = self._mixed(x, lengths, positions, None)
        return out

    def init_cache(self, batch: int, length: int, **_: Any) -> tuple[jax.Array | None, jax.Array]:
        """What `extend` begins with: the last inputs of the convolution, and the matrices."""
        del length
        tail = None
        if self.kernel is not None:
            W, C = self.kernel.shape
            tail = jnp.zeros((batch, W - 1, C), compute_dtype(self.query))
        return tail, jnp.zeros((batch, self.num_heads, self.head_dim, self.head_dim))

    def extend(
        self,
        x: jax.Array,
        cache: tuple[jax.Array | None, jax.Array],
        *,
        positions: jax.Array,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array]]:
        """As `MultiHeadAttention.extend`; the cache does not grow."""
        return self._mixed(x, lengths, positions, cache)

    def _mixed(
        self,
        x: jax.Array,
        lengths: jax.Array | None,
        positions: jax.Array | None,
        cache: tuple[jax.Array | None, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array]]:
        """The mixed tokens [B, T, D] after what the cache holds, and the cache after them."""
        tail, state = (None, None) if cache is None else cache
        *qkv, gate = project(x, [self.query, self.key, self.value, self.gate])
        if self.kernel is not None:
            qkv = jnp.concatenate(qkv, axis=-1)
            kernel = self.kernel[...].astype(qkv.dtype)
            before, tail = tail, last_inputs(qkv, len(kernel), state=tail, lengths=lengths)
            qkv = jax.nn.silu(causal_convolution(qkv, kernel, state=before))
            qkv = jnp.split(qkv, 3, axis=-1)
        q, k, v, gate = (y.reshape(*y.shape[:2], self.num_heads, -1) for y in (*qkv, gate))
        if self.rotary_base is not None:
            positions = jnp.arange(x.shape[1]) if positions is None else positions
            q, k = (ops.positions.rotary(y, positions, base=self.rotary_base) for y in (q, k))
        out, state = self.recurrence(x, q, k, v, lengths=lengths, state=state)
        out = self.norm(out) * jax.nn.silu(gate)
        return self.out(out.reshape(*out.shape[:2], -1)), (tail, state)

    @abc.abstractmethod
    def recurrence(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **carried: Any
    ) -> tuple[jax.Array, jax.Array]:
        """The recurrence over queries, keys and values [B, T, N, H], with gates made from `x`.

        `carried` is `lengths` and `state`, as `ops.linear` has them; the new state is returned too.
        """

    def state_size(self, length: int) -> int:
        """The matrices, and the inputs that the convolution still sees, whatever the `length`."""
        del length
        tail = 0 if self.kernel is None else (self.kernel.shape[0] - 1) * self.kernel.shape[1]
        return self.num_heads * self.head_dim**2 + tail


class Retention(LinearRecurrence):
    """RetNet's multi-scale retention: a decay per head that never changes.

        decay of head n = 1 - 2^(-5 - n)

    Sun et al. 2023, arxiv.org/abs/2307.08621; `rotary_base` gives its rotation. Without a short
    convolution, as in the paper.
    """

    has_convolution = False

    def recurrence(self, x, q, k, v, **carried):
        decay = np.log1p(-(2.0 ** (-5 - np.arange(self.num_heads))))
        log_decay = jnp.broadcast_to(jnp.asarray(decay, jnp.float32), q.shape[:3])
        return linear_attention(q, k, v, log_decay=log_decay, chunk_size=self.chunk_size, **carried)


class GatedLinearAttention(LinearRecurrence):
    """Gated linear attention: every channel of the keys decays as the token says.

        log_decay = log sigmoid(x W_1 W_2 + b) / 16

    Yang et al. 2023, arxiv.org/abs/2312.06635. Without a short convolution, as in the paper.

    The arguments that are not listed are those of `LinearRecurrence`.

    Args:
      width, num_heads: as in `LinearRecurrence`.
      gate_rank: width between W_1 and W_2.
    """

    has_convolution = False

    def __init__(self, width: int, num_heads: int, *, gate_rank: int = 16, **kwargs):
        super().__init__(width, num_heads, **kwargs)
        self.decay = LowRank(width, num_heads * self.head_dim, gate_rank, **_shared(kwargs))

    def recurrence(self, x, q, k, v, **carried):
        log_decay = jax.nn.log_sigmoid(self.decay(x).reshape(q.shape)) / 16
        return linear_attention(q, k, v, log_decay=log_decay, chunk_size=self.chunk_size, **carried)


class StateSpaceDuality(LinearRecurrence):
    """Mamba-2's state space model, as attention: the step that a token takes decays and writes.

        dt = softplus(x W_dt + b),   log_decay = -exp(a) dt,   v = dt * v,   out = out + d v

    Dao and Gu 2024, arxiv.org/abs/2405.21060: q, k and v are C, B and X there. B and C differ
    between heads here; in the paper, groups of heads share them.
    """

    def __init__(self, width: int, num_heads: int, **kwargs):
        super().__init__(width, num_heads, **kwargs)
        self.decay = StepDecay(width, num_heads, num_heads, **_shared(kwargs))
        self.skip = nnx.Param(jnp.ones(num_heads, kwargs.get("param_dtype", jnp.float32)))

    def recurrence(self, x, q, k, v, **carried):
        dt, log_decay = self.decay(x)
        out, state = linear_attention(
            q, k, v * dt[..., None].astype(v.dtype), log_decay=log_decay,
            chunk_size=self.chunk_size, **carried,
        )  # fmt: skip
        return out + self.skip[...].astype(v.dtype)[:, None] * v, state


class DeltaNet(LinearRecurrence):
    """DeltaNet: a write replaces what its key held before (arxiv.org/abs/2406.06484).

    q, k of length 1,   beta = sigmoid(x W_beta)
    """

    def __init__(self, width: int, num_heads: int, **kwargs):
        super().__init__(width, num_heads, **kwargs)
        self.beta = Linear(width, num_heads, use_bias=False, **_shared(kwargs))

    def recurrence(self, x, q, k, v, **carried):
        beta = jax.nn.sigmoid(_wide(self.beta(x)))
        return delta_rule(
            _unit(q), _unit(k), v, beta, log_decay=self.log_decay(x, q),
            chunk_size=self.chunk_size, **carried,
        )  # fmt: skip

    def log_decay(self, x: jax.Array, q: jax.Array) -> jax.Array | None:
        """At most 0, [B, T, N] or [B, T, N, H]; None: the state never decays."""
        del x, q
        return None


class GatedDeltaNet(DeltaNet):
    """DeltaNet with a decay per head, as in Mamba-2 (arxiv.org/abs/2412.06464).

    log_decay = -exp(a) softplus(x W_dt + b)
    """

    def __init__(self, width: int, num_heads: int, **kwargs):
        super().__init__(width, num_heads, **kwargs)
        self.decay = StepDecay(width, num_heads, num_heads, **_shared(kwargs))

    def log_decay(self, x, q):
        return self.decay(x)[1]


class KimiDeltaAttention(DeltaNet):
    """DeltaNet with a decay per channel of the keys (Kimi Team 2025, arxiv.org/abs/2510.26692).

    log_decay = -exp(a) softplus(x W_1 W_2 + b),        a per head
    """

    def __init__(self, width: int, num_heads: int, **kwargs):
        super().__init__(width, num_heads, **kwargs)
        channels = num_heads * self.head_dim
        self.decay = StepDecay(width, num_heads, channels, rank=self.head_dim, **_shared(kwargs))

    def log_decay(self, x, q):
        return self.decay(x)[1].reshape(q.shape)


class LowRank(nnx.Module):
    """`x W_1 W_2 + b`, in float32 or better."""

    def __init__(self, width: int, outputs: int, rank: int, **shared):
        self.down = Linear(width, rank, use_bias=False, **shared)
        self.up = Linear(rank, outputs, **shared)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., outputs]."""
        return _wide(self.up(self.down(x)))


class StepDecay(nnx.Module):
    """Mamba-2's step and decay: `dt = softplus(x W + b)`, `log_decay = -exp(a) dt`, a per head.

    At first exp(a) is spaced from 1 to 16 over the heads, and dt, for x = 0, geometrically from
    0.001 to 0.1 over the outputs of a head or over the heads.

    Args:
      width: D.
      num_heads: N.
      outputs: how many steps a token takes, a multiple of N.
      rank: of W; None: full.
    """

    def __init__(
        self, width: int, num_heads: int, outputs: int, *, rank: int | None = None, **shared
    ):
        dtype = shared.get("param_dtype", jnp.float32)
        if rank is None:
            self.step = Linear(width, outputs, **shared)
            bias = self.step.bias
        else:
            self.step = LowRank(width, outputs, rank, **shared)
            bias = self.step.up.bias
        dt = np.geomspace(1e-3, 1e-1, outputs).reshape(-1, num_heads).T.reshape(-1)
        bias[...] = jnp.asarray(np.log(np.expm1(dt)), dtype)  # softplus(bias) = dt
        self.rate = nnx.Param(jnp.asarray(np.log(np.linspace(1, 16, num_heads)), dtype))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """dt and log_decay, each [B, T, outputs], in float32 or better."""
        dt = jax.nn.softplus(_wide(self.step(x)))
        rate = jnp.exp(_wide(self.rate[...]))
        return dt, -jnp.repeat(rate, dt.shape[-1] // rate.size) * dt


def _shared(kwargs: dict) -> dict:
    """Of a mixer's arguments, those of all its layers."""
    names = ("kernel_init", "dtype", "param_dtype", "rngs")
    return {name: kwargs[name] for name in names if name in kwargs}


def _unit(x: jax.Array) -> jax.Array:
    """Each vector [..., H] with length 1."""
    x = _wide(x)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
