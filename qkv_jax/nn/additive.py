"""Additive attention, and the variants of Luong et al.: the parameters around `ops.additive`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from qkv_jax import ops
from qkv_jax.nn.attention import MultiHeadAttention
from qkv_jax.nn.linear import Linear
from qkv_jax.ops.additive import additive_attention, local_attention
from qkv_jax.ops.masks import Mask, SlidingWindow, order_of

_default_init = nnx.initializers.lecun_normal()

KINDS = ("dot", "general", "concat")
LOCALITIES = ("global", "monotonic", "predictive")


class AdditiveAttention(MultiHeadAttention):
    """Multi-head attention whose scores are additive (Bahdanau et al. 2014).

        q, k, v = x W_q, c W_k, c W_v        c is the context: x itself in self-attention
        logits = energy . tanh(q + k)         energy [H] for each head
        out = concat(heads of softmax(logits) v) W_out

    arxiv.org/abs/1409.0473, which has one head. There `x` is the decoder's previous state and `c`
    the encoder's states, and W_v and W_out are left to what follows.

    The arguments that are not listed are those of `MultiHeadAttention`, without `op`.

    Args:
      width, num_heads: as in `MultiHeadAttention`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(
            width, num_heads, op=additive_attention, param_dtype=param_dtype, rngs=rngs, **kwargs
        )
        self.energy = nnx.Param(_energy(num_heads, self.head_dim, param_dtype, rngs))

    def attend(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any
    ) -> jax.Array:
        return self.op(q, k, v, energy=self.energy[...], **kwargs)


class LuongAttention(MultiHeadAttention):
    """Multi-head attention in the forms of Luong et al. 2015, arxiv.org/abs/1508.04025.

        dot         logits = x . c                         no scale: as in the paper
        general     logits = x W_q . c
        concat      logits = energy . tanh(x W_q + c W_k)

        global      to all keys
        monotonic   to keys within `window` of the query (local-m)
        predictive  to keys within `window` of p = S sigmoid(tanh(x W_p) v_p), with Gaussian weights
                    around it (local-p)

    Keys of "dot" and "general" are the context c itself, cut into heads. The paper has one head and
    the context as values: `num_heads=1`, `share_kv=True`.

    S is the length of the row, as `Lengths` in the mask gives it. Under a causal mask it is the
    number of tokens so far, the query's own position plus 1, so that no later token has a say.

    The arguments that are not listed are those of `MultiHeadAttention`, without `op`. With "dot"
    and "general" as many key heads as query heads, `head_dim` is what is left of the context's
    width, and `share_qk` does not apply.

    Args:
      width, num_heads: as in `MultiHeadAttention`.
      kind: "dot", "general" or "concat".
      locality: "global", "monotonic" or "predictive", which knows the masks Causal() and Lengths.
      window: D, keys on each side of the query or of the centre; for the local ones.

    Raises:
      ValueError: for names that are none of these and sizes that do not fit.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        kind: str = "general",
        locality: str = "global",
        window: int | None = None,
        context_width: int | None = None,
        kernel_init: Initializer = _default_init,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        context_width = width if context_width is None else context_width
        _check_luong(width, num_heads, kind, locality, window, context_width, kwargs)
        if kind != "concat":
            kwargs["head_dim"] = context_width // num_heads
        if locality == "predictive":
            op = local_attention
        else:
            op = additive_attention if kind == "concat" else ops.attention
        shared = {"kernel_init": kernel_init, "dtype": dtype, "param_dtype": param_dtype}
        super().__init__(
            width, num_heads, context_width=context_width, op=op, rngs=rngs, **shared, **kwargs
        )
        self.kind, self.locality, self.window = kind, locality, window
        if kind == "concat":
            self.energy = nnx.Param(_energy(num_heads, self.head_dim, param_dtype, rngs))
        else:
            self.key = None
        if kind == "dot":
            self.query = None
        if locality == "predictive":
            self.center_hidden = Linear(width, width, use_bias=False, rngs=rngs, **shared)
            self.center = Linear(width, num_heads, use_bias=False, rngs=rngs, **shared)

    def project(
        self, x: jax.Array, context: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        if self.kind == "concat":
            return super().project(x, context)
        k = x if context is None else context
        q = x if self.query is None else self.query(x)
        v = k if self.value is None else self.value(k)
        return tuple(y.reshape(*y.shape[:2], self.num_heads, self.head_dim) for y in (q, k, v))

    def attend(
        self,
        x: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        mask: Mask | None,
        q_positions: jax.Array | None,
        kv_positions: jax.Array | None,
        **kwargs: Any,
    ) -> jax.Array:
        if self.kind == "concat":
            kwargs["energy"] = self.energy[...]
        if self.locality == "monotonic":
            near = SlidingWindow(self.window, self.window)
            mask = near if mask is None else mask & near
        if self.locality == "predictive":
            lengths = _lengths(mask, q, k, q_positions, kv_positions)
            kwargs["centers"] = self._centers(x, lengths)
            kwargs["window"] = self.window
        return self.op(
            q, k, v, mask=mask, scale=1.0, q_positions=q_positions, kv_positions=kv_positions,
            **kwargs,
        )  # fmt: skip

    def _centers(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """Where each head of each query looks, [B, N, T], from 0 to lengths, [B or 1, T or 1]."""
        centers = self.center(jnp.tanh(self.center_hidden(x)))
        centers = centers.astype(jnp.promote_types(centers.dtype, jnp.float32))
        return jnp.moveaxis(lengths[..., None] * jax.nn.sigmoid(centers), 2, 1)


def _lengths(
    mask: Mask | None,
    q: jax.Array,
    k: jax.Array,
    q_positions: jax.Array | None,
    kv_positions: jax.Array | None,
) -> jax.Array:
    """How many keys there are for a query, [B or 1, T or 1]."""
    causal, lengths = order_of(mask, "predictive local attention")
    if lengths is None:
        last = k.shape[1] - 1 if kv_positions is None else jnp.max(kv_positions, axis=-1)
        lengths = last + 1
    lengths = jnp.reshape(jnp.asarray(lengths), (-1, 1))
    if causal:
        positions = jnp.arange(q.shape[1]) if q_positions is None else q_positions
        lengths = jnp.minimum(lengths, jnp.atleast_2d(positions) + 1)
    return lengths


def _energy(num_heads: int, head_dim: int, dtype: Dtype, rngs: nnx.Rngs) -> jax.Array:
    """Energies [N, H] under which the logits of H independent units have unit size."""
    return nnx.initializers.normal(head_dim**-0.5)(rngs.params(), (num_heads, head_dim), dtype)


def _check_luong(width, num_heads, kind, locality, window, context_width, kwargs) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: wanted one of {list(KINDS)}, got {kind!r}")
    if locality not in LOCALITIES:
        raise ValueError(f"locality: wanted one of {list(LOCALITIES)}, got {locality!r}")
    if (locality == "global") != (window is None) or (window is not None and window < 1):
        wanted = "None, as all keys are attended to" if locality == "global" else "1 or more"
        raise ValueError(f"window: wanted {wanted} with locality = {locality!r}, got {window!r}")
    if kind == "concat":
        return
    if kind == "dot" and context_width != width:
        raise ValueError(f"context_width: wanted width = {width} with 'dot', got {context_width}")
    if num_heads < 1 or context_width % num_heads:
        raise ValueError(
            f"num_heads: wanted a divisor of the context's width, {context_width}, got {num_heads}"
        )
    for name, only in (
        ("num_kv_heads", num_heads),
        ("head_dim", context_width // num_heads),
        ("share_qk", False),
    ):
        if kwargs.get(name) not in (None, only):
            raise ValueError(f"{name}: wanted {only} with kind = {kind!r}, got {kwargs[name]!r}")
