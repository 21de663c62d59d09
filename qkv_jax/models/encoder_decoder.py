"""An encoder-decoder of Transformer blocks: Vaswani's, T5, and what lies between, by config."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from qkv_jax import nn
from qkv_jax.models.blocks import (
    add_positions,
    apply_blocks,
    dropout_rngs,
    extend_blocks,
    kernel_init,
    logit_scores,
    make_bias,
    make_blocks,
    make_final_norm,
    make_positions,
)
from qkv_jax.models.config import TransformerConfig
from qkv_jax.models.decoder import Decoder, DecoderConfig
from qkv_jax.models.mixers import HEADS, MIXERS, SETTINGS, check_mixers
from qkv_jax.ops.cache import Cache, CacheKind
from qkv_jax.ops.masks import Causal, Lengths


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig(TransformerConfig):
    """Everything that determines an encoder-decoder: two stacks of `num_layers` blocks.

    The fields of `TransformerConfig` hold for both stacks, except `mixer`, which is the decoder's.
    Position "relative" is T5's bias of the logits, one table for a stack.

    Raises:
      ValueError: naming the field, what came and what was wanted.
    """

    source_vocab_size: int | None = None  # None: source and target share vocabulary and embeddings
    encoder_mixer: str = "attention"

    causal = True

    def __post_init__(self) -> None:
        _ = self.decoder  # checks what all Transformers have
        if self.source_vocab_size is not None and self.source_vocab_size < 1:
            raise ValueError(
                "model.source_vocab_size: wanted a positive integer or None, "
                f"got {self.source_vocab_size}"
            )
        self._check_mixers()

    def _check_mixers(self) -> None:
        sizes = {"vocab_size": 1, "context": 1, "num_layers": self.num_layers}
        try:
            encoder = _Source(**sizes, mixer=self.encoder_mixer)
            check_mixers(encoder)
        except ValueError as error:
            raise ValueError(str(error).replace("model.mixer", "model.encoder_mixer")) from None
        # What the encoder or the cross-attention reads, no mixer of the decoder needs to read.
        read = {
            *HEADS,
            "attention_scale",
            *(field for name in encoder.pattern for field in MIXERS[name].reads),
        }
        rest = {field: getattr(self, field) for field in SETTINGS if field not in read}
        DecoderConfig(**sizes, mixer=self.mixer, **rest)

    @property
    def encoder(self) -> TransformerConfig:
        """The config of the encoder's stack."""
        return _Source(**self._stack(), mixer=self.encoder_mixer)

    @property
    def decoder(self) -> DecoderConfig:
        """The config of the decoder."""
        return _Target(**self._stack(), mixer=self.mixer)

    def _stack(self) -> dict:
        names = [field.name for field in dataclasses.fields(TransformerConfig)]
        return {name: getattr(self, name) for name in names if name != "mixer"}


class _Source(TransformerConfig):
    causal = False


class _Target(DecoderConfig):
    causal = True
    cross_attention = True

    def __post_init__(self) -> None:
        TransformerConfig.__post_init__(self)  # the mixers are checked with those of the encoder


class EncoderDecoder(nnx.Module):
    """Source and target ids in, logits of the next target tokens out.

        memory = encoder(source)                          every token sees all of the source
        logits = decoder(target_in, memory)               and here itself, what came before, memory

    A block of the encoder is `nn.TransformerBlock`, one of the decoder `CrossBlock`. Vaswani et al.
    2017, arxiv.org/abs/1706.03762: position "sinusoidal", norm_position "post". T5, Raffel et al.
    2020, arxiv.org/abs/1910.10683: position "relative", norm "rms", no biases; it leaves out the
    scale 1 / sqrt(H), which its initial query weights contain.

    Args:
      config: the sizes and the choices.
      rngs: where the initial parameters come from, as in `Decoder`.

    Raises:
      ValueError: for positions that are a score in a stack without attention.
    """

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.decoder = Decoder(config.decoder, rngs=rngs)
        self.embedding = self.decoder.embedding
        if config.source_vocab_size is not None:
            self.embedding = nnx.Embed(
                config.source_vocab_size, config.width, embedding_init=kernel_init(config),
                dtype=config.dtype, rngs=rngs,
            )  # fmt: skip
        self.positions = make_positions(config.encoder, rngs)
        self.blocks = make_blocks(config.encoder, rngs)
        self.final_norm = make_final_norm(config, rngs)
        self.bias = make_bias(config.encoder, self.blocks, rngs, field="encoder_mixer")

    def __call__(
        self,
        source: jax.Array,
        target_in: jax.Array,
        *,
        source_lengths: int | jax.Array | None = None,
        target_lengths: int | jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """The logits of the next target token, at every place.

        Args:
          source: integers [B, S].
          target_in: integers [B, T]: the target, moved on by one.
          source_lengths, target_lengths: of the rows, integers [B]; None: no row is padded.
          rng: a key; without it there is no dropout.

        Returns:
          float32 [B, T, V].
        """
        encoder_rng, decoder_rng = (None, None) if rng is None else jax.random.split(rng)
        memory = self.encode(source, source_lengths=source_lengths, rng=encoder_rng)
        return self.decode(
            target_in, memory, source_lengths=source_lengths, target_lengths=target_lengths,
            rng=decoder_rng,
        )  # fmt: skip

    def encode(
        self,
        source: jax.Array,
        *,
        source_lengths: int | jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """The memory, [B, S, D], that `decode` reads."""
        config = self.config.encoder
        *rngs, first = dropout_rngs(config, rng, config.num_layers + 1)
        x = add_positions(config, self.positions, self.embedding(source), None)
        x = apply_blocks(
            config, self.blocks, nn.dropout(x, config.dropout_rate, first),
            mask=None if source_lengths is None else Lengths(source_lengths),
            positions=None, rngs=rngs, score=logit_scores(config, self.bias),
        )  # fmt: skip
        return x if self.final_norm is None else self.final_norm(x)

    def decode(
        self,
        target_in: jax.Array,
        memory: jax.Array,
        *,
        source_lengths: int | jax.Array | None = None,
        target_lengths: int | jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """The logits, float32 [B, T, V], from what `encode` returned; the rest as in a call."""
        config = self.decoder.config
        *rngs, first = dropout_rngs(config, rng, config.num_layers + 1)
        x = nn.dropout(self.decoder.embed(target_in), config.dropout_rate, first)
        x = apply_blocks(
            config, self.decoder.blocks, x,
            mask=Causal() if target_lengths is None else Causal() & Lengths(target_lengths),
            positions=None, rngs=rngs, score=logit_scores(config, self.decoder.bias),
            context=memory,
            context_mask=None if source_lengths is None else Lengths(source_lengths),
        )  # fmt: skip
        return self.decoder.logits(x)

    def init_cache(
        self, memory: jax.Array, length: int, *, kind: CacheKind = Cache
    ) -> tuple[list[Any], list[Any]]:
        """What `extend` begins with: each layer's own cache, and its keys and values of the memory.

        Args:
          memory: [B, S, D], what `encode` returned.
          length: the most target tokens that a row may have.
          kind: of the caches that grow.
        """
        crosses = [block.cross.mixer.context_cache(memory) for block in self.decoder.blocks]
        return self.decoder.init_cache(memory.shape[0], length, kind=kind), crosses

    def extend(
        self,
        target_in: jax.Array,
        cache: tuple[list[Any], list[Any]],
        *,
        positions: jax.Array,
        lengths: jax.Array | None = None,
        source_lengths: int | jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[list[Any], list[Any]]]:
        """Reads new target tokens, as `Decoder.extend` does; logits by `self.logits`."""
        own, crosses = cache
        mask = None if source_lengths is None else Lengths(source_lengths)
        decoder = self.decoder
        x, own = extend_blocks(
            decoder.config, decoder.blocks, decoder.embed(target_in, positions), own,
            positions=positions, lengths=lengths, context_mask=mask,
            score=logit_scores(decoder.config, decoder.bias),
            own=[{"context_cache": cross} for cross in crosses],
        )  # fmt: skip
        return x, (own, crosses)

    def logits(self, x: jax.Array) -> jax.Array:
        """The logits, float32 [B, T, V], of the last residual stream [B, T, D]."""
        return self.decoder.logits(x)

    def state_size(self, length: int, source_length: int) -> int:
        """How many numbers decoding one more token needs per sequence: the mixers', the memory's.

        Args:
          length: how many target tokens came before.
          source_length: how many tokens the cross-attention reads.
        """
        crosses = [block.cross.mixer for block in self.decoder.blocks]
        return self.decoder.state_size(length) + sum(
            cross.state_size(source_length) for cross in crosses
        )
