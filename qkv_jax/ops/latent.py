"""Multi-head latent attention: keys and values of all heads, expanded from one small vector.

DeepSeek-V2 (2024, arxiv.org/abs/2405.04434). Beside the letters of `qkv_jax.ops`: `C` is the width
of the latent, `R` that of the rotary part.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.attention import attention
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.scores import Score

Array = jax.Array | np.ndarray


def latent_attention(
    q: Array,
    latent: Array,
    k_rotary: Array,
    key_up: Array,
    value_up: Array,
    *,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Attention to keys and values that are expanded from latents: the plain form, for training.

        k[s, n] = [k_rotary[s], latent[s] key_up[n]]        v[s, n] = latent[s] value_up[n]
        out = attention(q, k, v)

    Exact: O(T S) time, linear memory. What is kept per token to decode the next is `latent` and
    `k_rotary`, C + R numbers for all heads together; `absorbed_latent_attention` reads them as they
    are. The rotary part is decoupled because a rotation between query and `key_up` would keep the
    two from being joined. DeepSeek-V2 (2024, arxiv.org/abs/2405.04434), section 2.1.

    Args:
      q: queries, floating [B, T, N, R + H]; the first R coordinates meet `k_rotary`, the others the
        expanded keys.
      latent: floating [B, S, C].
      k_rotary: the key that all heads share, rotated already (as the first R coordinates of `q`
        are), floating [B, S, R]; R may be 0.
      key_up: floating [C, N, H].
      value_up: floating [C, N, h].
      mask, score, dropout_rate, dropout_rng, q_positions, kv_positions: as in `attention`.
      scale: factor of q . k; by default 1 / sqrt(R + H).

    Returns:
      [B, T, N, h], in the dtype of `latent`.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    B, S, C, N, R = (_checked(q, latent, k_rotary, key_up, value_up)[axis] for axis in "BSCNR")
    # Keys and values are one product over all tokens: two large matrices.
    up = jnp.concatenate([key_up.reshape(C, -1), value_up.reshape(C, -1)], axis=1)
    keys, values = jnp.split(
        jnp.reshape(latent, (-1, C)) @ up.astype(latent.dtype), [key_up.size // C], axis=1
    )
    shared = jnp.broadcast_to(k_rotary[:, :, None], (B, S, N, R)).astype(latent.dtype)
    k = jnp.concatenate([shared, keys.reshape(B, S, N, -1)], axis=-1)
    return attention(
        q, k, values.reshape(B, S, N, -1), mask=mask, score=score, scale=scale,
        dropout_rate=dropout_rate, dropout_rng=dropout_rng, q_positions=q_positions,
        kv_positions=kv_positions,
    )  # fmt: skip


def absorbed_latent_attention(
    q: Array,
    latent: Array,
    k_rotary: Array,
    key_up: Array,
    value_up: Array,
    *,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """`latent_attention` without expanding the latents: the absorbed form, for decoding.

        q . (latent key_up) = (q key_up^T) . latent
        out[t] = (sum over s of weight[t, s] latent[s]) value_up

    `key_up` is absorbed in the query and `value_up` in the output, so that all heads attend to one
    shared key, [k_rotary, latent], whose value is the latent: multi-query attention, C + R wide.
    A step of decoding reads S (C + R) numbers instead of computing 2 S N H. For many queries at
    once the plain form is faster: its keys are narrower. Arguments, result and errors are those of
    `latent_attention`.
    """
    R = _checked(q, latent, k_rotary, key_up, value_up)["R"]
    if scale is None:
        scale = q.shape[-1] ** -0.5  # of the plain form; the keys here are wider
    key_up, value_up = key_up.astype(q.dtype), value_up.astype(latent.dtype)
    absorbed = jnp.einsum("BTNH,CNH->BTNC", q[..., R:], key_up)
    k = jnp.concatenate([k_rotary.astype(latent.dtype), latent], axis=-1)[:, :, None]
    out = attention(
        jnp.concatenate([q[..., :R], absorbed], axis=-1), k, jnp.asarray(latent)[:, :, None],
        mask=mask, score=score, scale=scale, dropout_rate=dropout_rate, dropout_rng=dropout_rng,
        q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    return jnp.einsum("BTNC,CNh->BTNh", out, value_up)


def _checked(
    q: Array, latent: Array, k_rotary: Array, key_up: Array, value_up: Array
) -> dict[str, int]:
    """The size of each axis, by its letter, or an error that names the argument."""
    sizes: dict[str, int] = {}
    for name, x, axes in (
        ("q", q, ("B", "T", "N", "R + H")),
        ("key_up", key_up, ("C", "N", "H")),
        ("value_up", value_up, ("C", "N", "h")),
        ("k_rotary", k_rotary, ("B", "S", "R")),
        ("latent", latent, ("B", "S", "C")),
    ):
        if np.ndim(x) != len(axes) or not jnp.issubdtype(x.dtype, jnp.floating):
            found = f"{x.dtype} {list(x.shape)}" if hasattr(x, "dtype") else repr(x)
            raise ValueError(f"{name}: wanted floating [{', '.join(axes)}], got {found}")
        if name == "k_rotary":
            sizes["R"] = max(0, sizes["R + H"] - sizes["H"])
        wanted = [sizes.setdefault(axis, n) for axis, n in zip(axes, x.shape, strict=True)]
        if wanted != list(x.shape):
            raise ValueError(
                f"{name}: wanted [{', '.join(axes)}] = {wanted} beside the other arguments, "
                f"got {list(x.shape)}"
            )
    return sizes
