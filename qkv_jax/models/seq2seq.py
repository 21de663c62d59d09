"""What the sequence-to-sequence models without Transformer blocks have in common."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.ops.cache import Cache, CacheKind, among_all, of_these


class Seq2Seq(nnx.Module):
    """Source and target ids in, logits of the next target tokens out.

    A subclass has `encode(source, ...)`, and `decode(target_in, memory, ...)` that reads what it
    returns. It decodes without a cache: a new token costs a pass over all of the target.
    """

    def __call__(
        self,
        source: jax.Array,
        target_in: jax.Array,
        *,
        source_lengths: int | jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """The logits of the next target token, at every place.

        Args:
          source: integers [B, S].
          target_in: integers [B, T]: the target, moved on by one.
          source_lengths: of the rows, integers [B]; None: no row is padded. Target rows need none:
            nothing in the decoder reads what comes later.
          rng: a key; without it there is no dropout.

        Returns:
          float32 [B, T, V].
        """
        encoder_rng, decoder_rng = (None, None) if rng is None else jax.random.split(rng)
        memory = self.encode(source, source_lengths=source_lengths, rng=encoder_rng)
        return self.decode(target_in, memory, source_lengths=source_lengths, rng=decoder_rng)

    def init_cache(
        self, memory: Any, length: int, *, kind: CacheKind = Cache
    ) -> tuple[jax.Array, Any]:
        """What `extend` begins with: a target of nothing, int32 [B, length], and the memory.

        Args:
          memory: what `encode` returned.
          length: the most target tokens that a row may have.
          kind: `Cache`: there are no keys and values to keep in another.

        Raises:
          ValueError: for another kind.
        """
        if kind is not Cache:
            raise ValueError(f"kind: {type(self).__name__} keeps no keys and values, got {kind}")
        return jnp.zeros((len(jax.tree.leaves(memory)[0]), length), jnp.int32), memory

    def extend(
        self,
        target_in: jax.Array,
        cache: tuple[jax.Array, Any],
        *,
        positions: jax.Array,
        lengths: jax.Array | None = None,
        source_lengths: int | jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        """Reads new target tokens, as `EncoderDecoder.extend` does; logits by `self.logits`."""
        del lengths  # nothing sees the padding after a token before other tokens stand there
        target, memory = cache
        new = among_all(jnp.ones_like(target_in), positions, target.shape[1])
        target = jnp.where(new, among_all(target_in, positions, target.shape[1]), target)
        logits = self.decode(target, memory, source_lengths=source_lengths)
        return of_these(logits, positions), (target, memory)

    def logits(self, x: jax.Array) -> jax.Array:
        """The logits of what `extend` returned, which are those."""
        return x
