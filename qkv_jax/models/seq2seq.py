"""What the sequence-to-sequence models without Transformer blocks have in common."""

import jax
from flax import nnx


class Seq2Seq(nnx.Module):
    """Source and target ids in, logits of the next target tokens out.

    A subclass has `encode(source, ...)`, and `decode(target_in, memory, ...)` that reads what it
    returns.
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
