"""A decoder-only language model: GPT-2 style, Llama style and what lies between, by config."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer

from qkv_jax import nn, ops
from qkv_jax.ops.masks import Mask

POSITIONS = ("learned", "sinusoidal", "rotary", "none")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that determines a decoder. `configs/char_lm.py` explains the fields.

    Raises:
      ValueError: naming the field, what came and what was wanted.
    """

    vocab_size: int  # V
    context: int  # the longest sequence that a learned position table holds
    num_layers: int = 4
    width: int = 128  # D
    num_heads: int = 4  # N
    num_kv_heads: int | None = None  # K
    head_dim: int | None = None  # H
    mixer: str = "attention"
    mlp_width: int | None = None  # F
    activation: str = "gelu"
    norm: str = "layer"
    norm_position: str = "pre"
    position: str = "learned"
    rotary_base: float = 10_000.0
    qk_norm: bool = False
    use_bias: bool = True
    share_kv: bool = False
    share_qk: bool = False
    tie_embeddings: bool = True
    zero_init_outputs: bool = False
    logit_softcap: float = 0.0
    dropout_rate: float = 0.0
    dtype: str = "float32"  # of the computation; parameters are float32
    remat: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "num_layers", "width", "num_heads",
                     "num_kv_heads", "head_dim", "mlp_width"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name}: wanted a positive integer, got {value}")
        _one_of("mixer", self.mixer, MIXERS)
        _one_of("activation", self.activation, nn.ACTIVATIONS)
        _one_of("norm", self.norm, nn.NORMS)
        _one_of("norm_position", self.norm_position, ("pre", "post"))
        _one_of("position", self.position, POSITIONS)
        _one_of("dtype", self.dtype, ("float32", "bfloat16"))
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(
                f"model.num_heads: wanted a divisor of model.width = {self.width} (or a "
                f"model.head_dim), got {self.num_heads}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_kv_heads: wanted a divisor of model.num_heads = {self.num_heads}, "
                f"got {self.num_kv_heads}"
            )
        if self.share_qk and self.kv_heads != self.num_heads:
            raise ValueError(
                "model.share_qk: wanted model.num_kv_heads = model.num_heads = "
                f"{self.num_heads}, got {self.num_kv_heads}"
            )
        if self.position == "rotary" and self.attention_dim % 2:
            raise ValueError(
                "model.position: rotary needs an even model.head_dim, "
                f"got model.head_dim = {self.attention_dim}"
            )
        if self.position == "sinusoidal" and self.width % 2:
            raise ValueError(
                f"model.width: sinusoidal positions need an even one, got {self.width}"
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"model.dropout_rate: wanted [0, 1), got {self.dropout_rate}")
        if not (math.isfinite(self.logit_softcap) and self.logit_softcap >= 0):
            raise ValueError(f"model.logit_softcap: wanted >= 0, got {self.logit_softcap}")
        if not (math.isfinite(self.rotary_base) and self.rotary_base > 1):
            raise ValueError(f"model.rotary_base: wanted > 1, got {self.rotary_base}")

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def attention_dim(self) -> int:
        """H."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def hidden(self) -> int:
        """F."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width


def _one_of(name: str, value: str, known) -> None:
    if value not in known:
        raise ValueError(f"model.{name}: wanted one of {sorted(known)}, got {value!r}")


def _attention(config: DecoderConfig, out_init: Initializer, rngs: nnx.Rngs) -> nnx.Module:
    return nn.MultiHeadAttention(
        config.width,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        use_bias=config.use_bias,
        qk_norm=config.qk_norm,
        rotary_base=config.rotary_base if config.position == "rotary" else None,
        share_kv=config.share_kv,
        share_qk=config.share_qk,
        dropout_rate=config.dropout_rate,
        kernel_init=nnx.initializers.normal(0.02),
        out_init=out_init,
        dtype=config.dtype,
        rngs=rngs,
    )


def _positions(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Module | None:
    if config.position == "learned":
        return nn.LearnedPositions(config.context, config.width, rngs=rngs)
    if config.position == "sinusoidal":
        return nn.SinusoidalPositions(config.width)
    return None  # rotary positions are the mixer's


def _head(config: DecoderConfig, init: Initializer, rngs: nnx.Rngs) -> nn.Linear | None:
    if config.tie_embeddings:
        return None
    return nn.Linear(
        config.width,
        config.vocab_size,
        use_bias=False,
        kernel_init=nnx.initializers.zeros if config.zero_init_outputs else init,
        dtype=config.dtype,
        rngs=rngs,
    )


# What may mix tokens, by the name that `config.model.mixer` gives it.
MIXERS: dict[str, Callable[..., nnx.Module]] = {"attention": _attention}


class Decoder(nnx.Module):
    """Token ids in, next-token logits out; a token sees itself and what came before.

    Args:
      config: the sizes and the choices.
      rngs: where the initial parameters come from: N(0, 0.02), the residual outputs scaled by
        1 / sqrt(2 L) as in GPT-2, or zero.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(0.02)
        if config.zero_init_outputs:
            out_init = nnx.initializers.zeros
        else:
            out_init = nnx.initializers.normal(0.02 / math.sqrt(2 * config.num_layers))
        norm = functools.partial(
            nn.make_norm, config.norm, config.width, use_bias=config.use_bias,
            dtype=config.dtype, rngs=rngs,
        )  # fmt: skip
        self.embedding = nnx.Embed(
            config.vocab_size, config.width, embedding_init=normal, dtype=config.dtype, rngs=rngs
        )
        self.positions = _positions(config, rngs)
        self.blocks = nnx.List(
            nn.TransformerBlock(
                MIXERS[config.mixer](config, out_init, rngs),
                nn.FeedForward(
                    config.width,
                    config.hidden,
                    activation=config.activation,
                    use_bias=config.use_bias,
                    kernel_init=normal,
                    out_init=out_init,
                    dtype=config.dtype,
                    rngs=rngs,
                ),
                norm=norm,
                norm_position=config.norm_position,
                dropout_rate=config.dropout_rate,
            )
            for _ in range(config.num_layers)
        )
        self.final_norm = norm() if config.norm_position == "pre" else None
        self.head = _head(config, normal, rngs)

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
        config = self.config
        mask = ops.masks.Causal() if mask is None else ops.masks.Causal() & mask
        rngs = [None] * (config.num_layers + 1)
        if rng is not None and config.dropout_rate > 0:
            rngs = list(jax.random.split(rng, config.num_layers + 1))

        x = self.embed(tokens, positions)
        x = nn.dropout(x, config.dropout_rate, rngs.pop())
        for block, block_rng in zip(self.blocks, rngs, strict=True):
            apply = functools.partial(block, mask=mask, positions=positions)
            if config.remat:
                apply = jax.checkpoint(apply)
            x = apply(x, rng=block_rng)
        return self.logits(x)

    def embed(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """The first residual stream, [B, T, D]."""
        x = self.embedding(tokens)
        if self.positions is None:
            return x
        if positions is None:
            positions = jnp.arange(tokens.shape[1])
        if self.config.position == "sinusoidal":
            x = x * math.sqrt(self.config.width)  # as Vaswani et al. do: sines are of size 1
        return x + self.positions(positions).astype(x.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """The logits, float32 [B, T, V], of the last residual stream [B, T, D]."""
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.head is None:
            kernel = self.embedding.embedding[...].astype(x.dtype).T
            logits = nn.linear.flat_dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        else:
            logits = self.head(x)
        logits = logits.astype(jnp.float32)
        if cap := self.config.logit_softcap:
            logits = cap * jnp.tanh(logits / cap)
        return logits
