"""BERT: an encoder whose tokens all see one another, and three heads for it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax import nn
from qkv_jax.models.blocks import (
    add_positions,
    apply_blocks,
    block_states,
    dropout_rngs,
    kernel_init,
    logit_scores,
    make_bias,
    make_blocks,
    make_final_norm,
    make_head,
    make_norm,
    make_positions,
    vocabulary_logits,
)
from qkv_jax.models.config import TransformerConfig, check_sizes
from qkv_jax.models.mixers import check_mixers
from qkv_jax.ops.masks import Lengths


@dataclasses.dataclass(frozen=True)
class EncoderConfig(TransformerConfig):
    """Everything that determines an encoder and its heads; the defaults are BERT's choices.

    Raises:
      ValueError: naming the field, what came and what was wanted.
    """

    norm_position: str = "post"
    num_segments: int = 2  # kinds of token that have an embedding: sentence A, sentence B
    num_classes: int = 2  # of `Classifier`

    causal = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "num_segments", "num_classes")
        check_mixers(self)


class Encoder(nnx.Module):
    """Token ids in, one vector for each token out, which knows all of the others.

        x = norm(token + segment + position);  x = block(x), L times

    Devlin et al. 2018, arxiv.org/abs/1810.04805. With norm_position "pre", the blocks' last sum is
    normed too. A bidirectional mixer takes the place of attention by `config.mixer`.

    Args:
      config: the sizes and the choices. BERT's norms have an epsilon of 1e-12, these of 1e-5.
      rngs: where the initial parameters come from, as in `Decoder`.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config

        def embed(number: int) -> nnx.Embed:
            return nnx.Embed(
                number,
                config.width,
                embedding_init=kernel_init(config),
                dtype=config.dtype,
                rngs=rngs,
            )

        self.embedding = embed(config.vocab_size)
        self.segments = embed(config.num_segments)
        self.positions = make_positions(config, rngs)
        self.embedding_norm = make_norm(config, rngs)()
        self.blocks = make_blocks(config, rngs)
        self.bias = make_bias(config, self.blocks, rngs)
        self.final_norm = make_final_norm(config, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segments: jax.Array | None = None,
        lengths: int | jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """The hidden states.

        Args:
          tokens: integers [B, T] in [0, V).
          segments: integers [B, T] in [0, num_segments); None: all 0.
          lengths: tokens of each row that are no padding, integers [B]; None: all of them.
          rng: a key; without it there is no dropout.

        Returns:
          [B, T, D]; what stands at padded places means nothing.
        """
        config = self.config
        *rngs, first = dropout_rngs(config, rng, config.num_layers + 1)
        x = nn.dropout(self.embed(tokens, segments), config.dropout_rate, first)
        x = apply_blocks(config, self.blocks, x, rngs=rngs, **self._shared(lengths))
        return x if self.final_norm is None else self.final_norm(x)

    def states(
        self,
        tokens: jax.Array,
        *,
        segments: jax.Array | None = None,
        lengths: int | jax.Array | None = None,
    ) -> jax.Array:
        """The residual stream before the first block, and after each: [L + 1, B, T, D].

        Arguments as in a call, without dropout. The last is what a call norms, if it does.
        """
        x, rngs = self.embed(tokens, segments), [None] * self.config.num_layers
        after = block_states(self.config, self.blocks, x, rngs=rngs, **self._shared(lengths))
        return jnp.stack([x, *after])

    def _shared(self, lengths: int | jax.Array | None) -> dict[str, Any]:
        """What every block is called with."""
        return {
            "mask": None if lengths is None else Lengths(lengths),
            "positions": None,
            "score": logit_scores(self.config, self.bias),
        }

    def embed(self, tokens: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """The first residual stream, [B, T, D]."""
        segments = jnp.zeros_like(tokens) if segments is None else segments
        x = add_positions(self.config, self.positions, self.embedding(tokens), None)
        return self.embedding_norm(x + self.segments(segments))


class MaskedLanguageModel(nnx.Module):
    """The logits of the tokens behind the masks: `norm(act(x W + b)) E^T + c`, E the embedding.

    Args:
      config, rngs: those of the encoder. The head's activation is the config's ("swiglu": silu);
        without `tie_embeddings` it has an output matrix of its own.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.dense = _linear(config, config.width, rngs)
        self.norm = make_norm(config, rngs)()
        self.head = make_head(config, rngs)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size)) if config.use_bias else None

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segments: jax.Array | None = None,
        lengths: int | jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """The logits of the token at every place, float32 [B, T, V]; arguments as in `Encoder`."""
        x = self.encoder(tokens, segments=segments, lengths=lengths, rng=rng)
        x = self.norm(nn.ACTIVATIONS[self.config.activation](self.dense(x)))
        return vocabulary_logits(self.config, x, self.encoder.embedding, self.head, self.bias)


class Classifier(nnx.Module):
    """The class of a whole text: `tanh(x[0] W + b) U + c`, from the first token's vector.

    Args:
      config, rngs: those of the encoder, whose place a pretrained one may take: `.encoder = ...`.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.pooler = _linear(config, config.width, rngs)
        self.head = _linear(config, config.num_classes, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segments: jax.Array | None = None,
        lengths: int | jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """The classes' logits, float32 [B, num_classes]; arguments as in `Encoder`."""
        encoder_rng, last = (None, None) if rng is None else jax.random.split(rng)
        x = self.encoder(tokens, segments=segments, lengths=lengths, rng=encoder_rng)
        pooled = nn.dropout(jnp.tanh(self.pooler(x[:, 0])), self.config.dropout_rate, last)
        return self.head(pooled).astype(jnp.float32)


class SpanClassifier(nnx.Module):
    """Where a span of the text begins and where it ends, such as the answer to a question.

    Args:
      config, rngs: those of the encoder, whose place a pretrained one may take: `.encoder = ...`.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.head = _linear(config, 2, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segments: jax.Array | None = None,
        lengths: int | jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The logits of starts and of ends, each float32 [B, T]; arguments as in `Encoder`.

        They are -inf at padded places, so that softmax gives these nothing.
        """
        x = self.encoder(tokens, segments=segments, lengths=lengths, rng=rng)
        logits = self.head(x).astype(jnp.float32)
        if lengths is not None:
            real = jnp.arange(tokens.shape[1]) < jnp.reshape(jnp.asarray(lengths), (-1, 1))
            logits = jnp.where(real[..., None], logits, -jnp.inf)
        return logits[..., 0], logits[..., 1]


def _linear(config: EncoderConfig, outputs: int, rngs: nnx.Rngs) -> nn.Linear:
    return nn.Linear(
        config.width, outputs, use_bias=config.use_bias, kernel_init=kernel_init(config),
        dtype=config.dtype, rngs=rngs,
    )  # fmt: skip
