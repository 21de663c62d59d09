"""The block of a decoder that also attends to an encoder's output."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from qkv_jax.nn.block import TransformerBlock, add_branch, dropout, extending
from qkv_jax.ops.masks import Mask


class CrossBlock(nnx.Module):
    """Three residual branches: a mixer of its own tokens, attention to a context, a feed-forward.

        x = x + mix(norm(x))                              or as `norm_position` says
        x = TransformerBlock(cross, feed_forward)(x)      whose mixer reads the context

    The decoder's block of Vaswani et al. 2017, arxiv.org/abs/1706.03762.

    Args:
      mixer: a module that mixes tokens, called as `mixer(x, rng=rng, **kwargs)`.
      cross: a module that reads a context, such as `MultiHeadAttention`, called as
        `cross(x, context=context, mask=context_mask, rng=rng)`.
      feed_forward: a module [B, T, D] -> [B, T, D], or None.
      norm: makes a norm; called once for each branch, twice with "both".
      norm_position: "pre", "post" or "both", as in `TransformerBlock`.
      dropout_rate: of each branch's output, where a call passes `rng`.
    """

    def __init__(
        self,
        mixer: nnx.Module,
        cross: nnx.Module,
        feed_forward: nnx.Module | None,
        *,
        norm: Callable[[], nnx.Module],
        norm_position: str = "pre",
        dropout_rate: float = 0.0,
    ):
        self.mixer = mixer
        self.mixer_norm = norm()
        self.mixer_out_norm = norm() if norm_position == "both" else None
        self.cross = TransformerBlock(
            cross, feed_forward, norm=norm, norm_position=norm_position, dropout_rate=dropout_rate
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        context: jax.Array,
        context_mask: Mask | None = None,
        rng: jax.Array | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """Maps [B, T, D] to [B, T, D].

        Args:
          x: [B, T, D].
          context: [B, S, ...], what `cross` reads.
          context_mask: which of it.
          rng: a key; without it there is no dropout.
          **kwargs: of the mixer: mask, positions, ...
        """
        mix_rng, drop_rng, cross_rng = (None,) * 3 if rng is None else jax.random.split(rng, 3)

        def mix(x: jax.Array) -> jax.Array:
            return dropout(self.mixer(x, rng=mix_rng, **kwargs), self.cross.dropout_rate, drop_rng)

        position = self.cross.norm_position
        x = add_branch(x, mix, self.mixer_norm, self.mixer_out_norm, position)
        return self.cross(x, context=context, mask=context_mask, rng=cross_rng)

    def extend(
        self,
        x: jax.Array,
        cache: Any,
        *,
        context_cache: Any,
        context_mask: Mask | None = None,
        **kwargs: Any,
    ) -> tuple[jax.Array, Any]:
        """Maps new tokens [B, T, D] to [B, T, D], after those in the mixer's cache; and that cache.

        Args:
          x: [B, T, D].
          cache: of the mixer.
          context_cache: what the `context_cache` of `cross` has made of the context.
          context_mask: which of it.
          **kwargs: of the mixer's `extend`: positions, lengths, ...
        """
        mix, kept = extending(self.mixer, cache, **kwargs)

        def read(x: jax.Array) -> jax.Array:
            return self.cross.mixer.attend_context(x, context_cache, mask=context_mask)

        position = self.cross.norm_position
        x = add_branch(x, mix, self.mixer_norm, self.mixer_out_norm, position)
        return self.cross.added(x, read, self.cross.feed_forward), kept.pop()
