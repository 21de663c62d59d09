"""Convolutional sequence to sequence: gated convolutions, and attention in every decoder layer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.models.blocks import dropout_rngs
from qkv_jax.models.config import check_dropout_and_dtype, check_sizes
from qkv_jax.models.seq2seq import Seq2Seq
from qkv_jax.ops.masks import Causal, Lengths

# What the encoder hands on: keys and values, [B, S, D] both.
Memory = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class ConvSeq2SeqConfig:
    """Everything that determines a convolutional encoder-decoder.

    Raises:
      ValueError: naming the field, what came and what was wanted.
    """

    vocab_size: int  # V
    context: int  # the longest sequence that the position tables hold
    source_vocab_size: int | None = None  # None: source and target share vocabulary and embeddings
    num_layers: int = 4  # of the encoder and of the decoder
    width: int = 128  # D
    conv_width: int = 3  # W, the places that a convolution reads
    dropout_rate: float = 0.0
    dtype: str = "float32"  # of the computation; parameters are float32

    def __post_init__(self) -> None:
        check_sizes(
            self, "vocab_size", "context", "source_vocab_size", "num_layers", "width", "conv_width"
        )
        check_dropout_and_dtype(self)


class ConvSeq2Seq(Seq2Seq):
    """Source and target ids in, logits of the next target tokens out, by convolution.

        a (+) b = (a + b) sqrt(1/2)                      the sum keeps the variance of its parts

        encoder:  e = embedding + position
                  z = e;  in each layer  z = glu(window around z) (+) z
        decoder:  g = embedding + position
                  x = g;  in each layer  h = glu(window up to x)
                                         c = sqrt(S) softmax((W h + b) (+) g . z) (z (+) e)
                                         x = (h (+) c) (+) x
        logits:   W_out x

    Gehring et al. 2017, arxiv.org/abs/1705.03122, in one width; without its weight normalisation.
    A decoder layer attends with its own states, so that later layers know what earlier ones found.
    sqrt(S), of the row's own length, undoes what averaging over the source does to the variance.
    O(S T) time, and no step waits for another: a token sees (W - 1) L places back.

    Args:
      config: the sizes and the choices.
      rngs: where the initial parameters come from: the paper's section 3.5.
    """

    def __init__(self, config: ConvSeq2SeqConfig, *, rngs: nnx.Rngs):
        D, L, shared = config.width, config.num_layers, {"dtype": config.dtype, "rngs": rngs}
        self.config = config
        self.op = ops.attention  # of every decoder layer

        def embedding(size: int) -> nnx.Embed:
            return nnx.Embed(size, D, embedding_init=nnx.initializers.normal(0.1), **shared)

        def positions() -> nn.LearnedPositions:
            init = nnx.initializers.normal(0.1)
            return nn.LearnedPositions(config.context, D, embedding_init=init, rngs=rngs)

        def convolutions() -> nnx.List:
            init = nnx.initializers.variance_scaling(4.0, "fan_in", "normal")  # a gate halves
            return nnx.List(
                nn.GatedConvolution(
                    D, conv_width=config.conv_width, use_bias=True, kernel_init=init,
                    out_init=init, **shared,
                )
                for _ in range(L)
            )  # fmt: skip

        self.embedding = embedding(config.vocab_size)
        self.source_embedding = self.embedding
        if config.source_vocab_size is not None:
            self.source_embedding = embedding(config.source_vocab_size)
        self.positions, self.source_positions = positions(), positions()
        self.encoder, self.decoder = convolutions(), convolutions()
        self.queries = nnx.List(nn.Linear(D, D, **shared) for _ in range(L))
        self.head = nn.Linear(D, config.vocab_size, **shared)

    def encode(
        self,
        source: jax.Array,
        *,
        source_lengths: int | jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> Memory:
        """The keys z and the values z (+) e that `decode` reads, [B, S, D] both."""
        rate = self.config.dropout_rate
        first, *rngs = dropout_rngs(self.config, rng, self.config.num_layers + 1)
        embedded = nn.dropout(
            _embed(self.source_embedding, self.source_positions, source), rate, first
        )
        mask = None if source_lengths is None else Lengths(source_lengths)
        z = embedded
        for convolve, key in zip(self.encoder, rngs, strict=True):
            z = _sum(convolve(nn.dropout(z, rate, key), mask=mask), z)
        return z, _sum(z, embedded)

    def decode(
        self,
        target_in: jax.Array,
        memory: Memory,
        *,
        source_lengths: int | jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """The logits, float32 [B, T, V], from what `encode` returned; the rest as in a call."""
        rate = self.config.dropout_rate
        first, *rngs, last = dropout_rngs(self.config, rng, self.config.num_layers + 2)
        embedded = nn.dropout(_embed(self.embedding, self.positions, target_in), rate, first)
        x = embedded
        for convolve, query, key in zip(self.decoder, self.queries, rngs, strict=True):
            h = convolve(nn.dropout(x, rate, key), mask=Causal())
            found = self._attend(_sum(query(h), embedded), memory, source_lengths)
            x = _sum(_sum(h, found), x)
        return self.head(nn.dropout(x, rate, last)).astype(jnp.float32)

    def _attend(
        self, query: jax.Array, memory: Memory, source_lengths: int | jax.Array | None
    ) -> jax.Array:
        """What [B, T, D] queries find in the memory, times the root of its length."""
        keys, values = memory
        mask = None if source_lengths is None else Lengths(source_lengths)
        length = keys.shape[1] if source_lengths is None else source_lengths
        found = self.op(
            query[:, :, None], keys[:, :, None], values[:, :, None], mask=mask, scale=1.0
        )
        return found[:, :, 0] * jnp.sqrt(jnp.reshape(length, (-1, 1, 1))).astype(query.dtype)


def _sum(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a + b) * math.sqrt(0.5)


def _embed(embedding: nnx.Embed, positions: nn.LearnedPositions, tokens: jax.Array) -> jax.Array:
    x = embedding(tokens)
    return x + positions(jnp.arange(tokens.shape[1])).astype(x.dtype)
