"""A decoder-only language model: GPT-2 style, Llama style and what lies between, by config."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.models.blocks import (
    add_positions,
    block_states,
    dropout_rngs,
    extend_blocks,
    init_caches,
    kernel_init,
    last,
    logit_scores,
    make_bias,
    make_blocks,
    make_final_norm,
    make_head,
    make_positions,
    vocabulary_logits,
)
from qkv_jax.models.config import TransformerConfig
from qkv_jax.models.mixers import MIXERS, check_mixers
from qkv_jax.ops.cache import Cache, CacheKind
from qkv_jax.ops.masks import Mask


@dataclasses.dataclass(frozen=True)
class DecoderConfig(TransformerConfig):
    """Everything that determines a decoder.

    Raises:
      ValueError: naming the field, what came and what was wanted.
    """

    # (N, K) of each layer, of a pruned model; None: num_heads and num_kv_heads in all of them
    heads_per_layer: tuple[tuple[int, int], ...] | None = None

    causal = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mixers(self)
        if self.heads_per_layer is not None:
            self._check_heads_per_layer(self.heads_per_layer)

    def of_layer(self, layer: int) -> "DecoderConfig":
        sizes = (self.num_heads, self.kv_heads)
        own = sizes if self.heads_per_layer is None else self.heads_per_layer[layer]
        if own == sizes:
            return self
        N, K = own
        return dataclasses.replace(self, num_heads=N, num_kv_heads=K, heads_per_layer=None)

    def _check_heads_per_layer(self, heads: Any) -> None:
        def check(right: bool, wanted: str) -> None:
            if not right:
                raise ValueError(f"model.heads_per_layer: wanted {wanted}, got {heads!r}")

        pairs = isinstance(heads, tuple) and all(
            isinstance(pair, tuple) and len(pair) == 2 and all(type(n) is int for n in pair)
            for pair in heads
        )
        check(
            pairs and len(heads) == self.num_layers,
            f"a pair of integers, (heads, key/value heads), for each of {self.num_layers} layers",
        )
        check(
            all(K >= 1 and N >= K and N % K == 0 for N, K in heads),
            "key/value heads that divide the heads of their layer",
        )
        check(self.head_dim is not None, "model.head_dim to be set beside it")
        check(
            self.position not in ("alibi", "relative"),
            f"positions that know no heads, not model.position = {self.position!r}",
        )
        for layer, (name, pair) in enumerate(zip(self.mixers, heads, strict=True)):
            own = pair == (self.num_heads, self.kv_heads) or "num_kv_heads" in MIXERS[name].reads
            check(
                own,
                f"{(self.num_heads, self.kv_heads)} in layer {layer}, as mixer {name!r} "
                "has no key/value heads",
            )


class Decoder(nnx.Module):
    """Token ids in, next-token logits out; a token sees itself and what came before.

    Args:
      config: the sizes and the choices.
      rngs: where the initial parameters come from: N(0, 0.02), the residual outputs scaled by
        1 / sqrt(2 L) as in GPT-2, or zero.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Embed(
            config.vocab_size, config.width, embedding_init=kernel_init(config), dtype=config.dtype,
            rngs=rngs,
        )  # fmt: skip
        self.positions = make_positions(config, rngs)
        self.blocks = make_blocks(config, rngs)
        self.bias = make_bias(config, self.blocks, rngs)
        self.final_norm = make_final_norm(config, rngs)
        self.head = make_head(config, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        mask: Mask | None = None,
        positions: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """The logits of the next token, at every place.

        Args:
          tokens: integers [B, T] in [0, V).
          mask: joined with `Causal()` by `&`, for instance `masks.Segments(ids)`.
          positions: integers [T] or [B, T], by default 0 ... T-1.
          rng: a key; without it there is no dropout.

        Returns:
          float32 [B, T, V].
        """
        states = self.hidden_states(tokens, mask=mask, positions=positions, rng=rng)
        return self.logits(last(states))

    def hidden_states(
        self,
        tokens: jax.Array,
        *,
        mask: Mask | None = None,
        positions: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> Iterator[jax.Array]:
        """The residual stream, [B, T, D], before the first block and after each of the L.

        Arguments are as for a call, whose logits are `logits` of the last.
        """
        config = self.config
        mask = ops.masks.Causal() if mask is None else ops.masks.Causal() & mask
        *rngs, first = dropout_rngs(config, rng, config.num_layers + 1)
        x = nn.dropout(self.embed(tokens, positions), config.dropout_rate, first)
        states = block_states(
            config, self.blocks, x, mask=mask, positions=positions, rngs=rngs,
            score=logit_scores(config, self.bias),
        )  # fmt: skip
        return itertools.chain([x], states)

    def embed(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """The first residual stream, [B, T, D]."""
        return add_positions(self.config, self.positions, self.embedding(tokens), positions)

    def init_cache(self, batch: int, length: int, *, kind: CacheKind = Cache) -> list[Any]:
        """What `extend` begins with: a cache for each layer.

        Args:
          batch: B.
          length: the most tokens that a row may have.
          kind: of the caches of keys and values: `ops.cache.Cache` or `QuantizedCache`, or
            `ops.paged.Pages`.

        Raises:
          ValueError: for more tokens than a learned table of positions has.
        """
        if self.config.position == "learned" and length > self.config.context:
            raise ValueError(
                f"length: wanted at most model.context = {self.config.context}, got {length}"
            )
        return init_caches(self.blocks, batch, length, kind=kind)

    def extend(
        self,
        tokens: jax.Array,
        cache: list[Any],
        *,
        positions: jax.Array,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, list[Any]]:
        """Reads new tokens, after those that the cache has seen.

            x, cache = model.extend(tokens, cache, positions=positions)
            logits = model.logits(x)

        In whatever parts a text is read, the logits are those of the whole, one call of the model.

        Args:
          tokens: integers [B, T].
          cache: what `init_cache` or the last call returned.
          positions: of the new tokens, integers that follow one another, [T], or [B, T].
          lengths: how many of the T are no padding, integers [B]; None: all of them.

        Returns:
          The last residual stream [B, T, D], and the cache after these tokens.

        Raises:
          ValueError: for positions beyond the cache, where they are known. In a compiled function
            that takes them as an argument they are not, and such tokens are lost.
        """
        x = self.embed(tokens, positions)
        return extend_blocks(
            self.config, self.blocks, x, cache, positions=positions, lengths=lengths,
            score=logit_scores(self.config, self.bias),
        )  # fmt: skip

    def state_size(self, length: int) -> int:
        """How many numbers decoding one more token needs per sequence, after `length` of them."""
        return sum(block.mixer.state_size(length) for block in self.blocks)

    def logits(self, x: jax.Array) -> jax.Array:
        """The logits, float32 [B, T, V], of the last residual stream [B, T, D]."""
        if self.final_norm is not None:
            x = self.final_norm(x)
        return vocabulary_logits(self.config, x, self.embedding, self.head)


def interpolate_positions(model: Decoder, factor: float) -> Decoder:
    """A decoder for texts `factor` times longer: its rotary positions are divided by the factor.

    Chen et al. 2023, arxiv.org/abs/2306.15595: linear interpolation. The parameters are those of
    `model`, which stays as it is.

    Raises:
      ValueError: the positions are not rotary, or the factor is not positive.
    """
    if model.config.position != "rotary":
        raise ValueError(f"model: wanted one with rotary positions, got {model.config.position!r}")
    if not factor > 0:
        raise ValueError(f"factor: wanted a positive number, got {factor!r}")
    model = nnx.merge(*nnx.split(model))
    for block in model.blocks:
        block.mixer.rotary_factor = float(factor)
    return model


def state_size(config: DecoderConfig, length: int | None = None) -> int:
    """How many numbers a decoder of this config keeps per sequence to decode one more token.

    Args:
      config: of the decoder, none of which is computed.
      length: how many tokens came before; by default `config.context`.
    """
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return model.state_size(config.context if length is None else length)
