"""A Transformer block: something that mixes tokens, something that does not, and two norms."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.nn.sharding import all_tokens, by_tokens

NORM_POSITIONS = ("pre", "post", "both")


def dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Drops elements with probability `rate` and scales the rest; without `rng`, `x` as it is."""
    if rng is None or rate == 0:
        return x
    keep = jax.random.bernoulli(rng, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def add_branch(
    x: jax.Array,
    branch: Callable[[jax.Array], jax.Array],
    norm: Callable[[jax.Array], jax.Array],
    out_norm: Callable[[jax.Array], jax.Array] | None,
    norm_position: str,
) -> jax.Array:
    """`x` and what a branch adds to it, normed where `TransformerBlock` says; [B, T, D]."""
    x = by_tokens(x)
    if norm_position == "post":
        return norm(x + by_tokens(branch(all_tokens(x))))
    change = by_tokens(branch(all_tokens(norm(x))))
    return x + (change if out_norm is None else out_norm(change))


def extending(
    mixer: nnx.Module, cache: Any, **kwargs: Any
) -> tuple[Callable[[jax.Array], jax.Array], list[Any]]:
    """A mixer's `extend` as a branch, and a list in which its call leaves the cache after it."""
    kept: list[Any] = []

    def mix(x: jax.Array) -> jax.Array:
        out, after = mixer.extend(x, cache, **kwargs)
        kept.append(after)
        return out

    return mix, kept


class TransformerBlock(nnx.Module):
    """Two residual branches, each normed: first "pre", or in the end "post", or "both".

        pre:   x + branch(norm(x))              Xiong et al. 2020, arxiv.org/abs/2002.04745
        post:  norm(x + branch(x))              Vaswani et al. 2017, arxiv.org/abs/1706.03762
        both:  x + out_norm(branch(norm(x)))    Gemma 2, 2024, arxiv.org/abs/2408.00118

    Args:
      mixer: a module that mixes tokens, such as `MultiHeadAttention`; it is called as
        `mixer(x, rng=rng, **kwargs)`.
      feed_forward: a module [B, T, D] -> [B, T, D]; None: there is one branch alone.
      norm: makes a norm; called once for each branch, twice with "both".
      norm_position: "pre", "post" or "both".
      dropout_rate: of each branch, where a call passes `rng`.
    """

    def __init__(
        self,
        mixer: nnx.Module,
        feed_forward: nnx.Module | None,
        *,
        norm: Callable[[], Callable[[jax.Array], jax.Array]],
        norm_position: str = "pre",
        dropout_rate: float = 0.0,
    ):
        if norm_position not in NORM_POSITIONS:
            raise ValueError(
                f"norm_position: wanted one of {list(NORM_POSITIONS)}, got {norm_position!r}"
            )
        both = norm_position == "both"
        self.mixer = mixer
        self.feed_forward = feed_forward
        self.mixer_norm = norm()
        self.mixer_out_norm = norm() if both else None
        self.feed_forward_norm = None if feed_forward is None else norm()
        self.feed_forward_out_norm = norm() if both and feed_forward is not None else None
        self.norm_position = norm_position
        self.dropout_rate = dropout_rate

    def __call__(self, x: jax.Array, *, rng: jax.Array | None = None, **kwargs: Any) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]; `kwargs` (mask, positions, ...) go to the mixer."""
        mix_rng, drop_rng, last_rng = (None,) * 3 if rng is None else jax.random.split(rng, 3)

        def mix(x: jax.Array) -> jax.Array:
            return dropout(self.mixer(x, rng=mix_rng, **kwargs), self.dropout_rate, drop_rng)

        def feed_forward(x: jax.Array) -> jax.Array:
            return dropout(self.feed_forward(x), self.dropout_rate, last_rng)

        return self.added(x, mix, feed_forward)

    def extend(self, x: jax.Array, cache: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        """Maps new tokens [B, T, D] to [B, T, D], after those in the mixer's cache; and that cache.

        `kwargs` (positions, lengths, ...) go to the mixer's `extend`.
        """
        mix, kept = extending(self.mixer, cache, **kwargs)
        return self.added(x, mix, self.feed_forward), kept.pop()

    def added(
        self,
        x: jax.Array,
        mix: Callable[[jax.Array], jax.Array],
        feed_forward: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """`x` with both branches."""
        x = add_branch(x, mix, self.mixer_norm, self.mixer_out_norm, self.norm_position)
        if self.feed_forward is None:
            return x
        norms = self.feed_forward_norm, self.feed_forward_out_norm
        return add_branch(x, feed_forward, *norms, self.norm_position)
