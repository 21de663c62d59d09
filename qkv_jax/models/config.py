"""What the configs of all Transformers here have in common: the fields and the checks."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any, ClassVar

from qkv_jax import nn

POSITIONS = ("learned", "sinusoidal", "rotary", "alibi", "relative", "none")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Everything that determines a stack of blocks. `configs/char_lm.py` explains the fields.

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
    attention_scale: float | None = None  # of the logits; None: 1 / sqrt(H)
    attention_softcap: float = 0.0  # of the logits of a stack's attention to itself; 0: none
    mixer: str = "attention"  # names of `mixers.MIXERS`, separated by commas, repeated over layers
    window: int = 64
    block_size: int = 16
    num_blocks: int = 4
    num_global: int = 1
    num_random: int = 1
    window_blocks: int = 3
    top_k: int = 32
    num_features: int = 128
    rank: int = 32
    conv_width: int = 4
    chunk_size: int = 64
    mlp_width: int | None = None  # F; 0: blocks without a feed-forward network
    activation: str = "gelu"
    norm: str = "layer"
    norm_epsilon: float | None = None  # None: 1e-5 for "layer", 1e-6 for "rms"
    norm_position: str = "pre"
    position: str = "learned"
    rotary_base: float = 10_000.0
    rotary_scaling: tuple[float, ...] | None = None  # as in `nn.MultiHeadAttention`
    local_rotary_base: float | None = None  # of "sliding_window" layers, which are not scaled
    relative_buckets: int = 32
    relative_distance: int = 128  # from here on, all keys share the last bucket
    qk_norm: bool = False
    use_bias: bool = True
    qkv_bias: bool | None = None  # of the projections to queries, keys and values; None: use_bias
    share_kv: bool = False
    share_qk: bool = False
    tie_embeddings: bool = True
    zero_init_outputs: bool = False
    scale_embeddings: bool = False  # token embeddings times sqrt(D); "sinusoidal" does so anyway
    scale_logits: bool = False  # the last residual stream divided by sqrt(D), before the head
    init_std: float = 0.02  # of embeddings and matrices
    logit_softcap: float = 0.0
    dropout_rate: float = 0.0
    dtype: str = "float32"  # of the computation; parameters are float32
    remat: bool = False

    causal: ClassVar[bool]  # whether a token sees itself and earlier ones only
    cross_attention: ClassVar[bool] = False  # whether blocks also attend to a context

    def __post_init__(self) -> None:
        check_sizes(
            self, "vocab_size", "context", "num_layers", "width", "num_heads", "num_kv_heads",
            "head_dim", "window", "block_size", "num_blocks", "window_blocks", "top_k",
            "num_features", "rank", "conv_width", "chunk_size",
        )  # fmt: skip
        for name in ("num_global", "num_random"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}: wanted an integer >= 0, got {getattr(self, name)}")
        if self.window_blocks % 2 == 0:
            raise ValueError(f"model.window_blocks: wanted an odd number, got {self.window_blocks}")
        if self.hidden < 0:
            raise ValueError(f"model.mlp_width: wanted an integer >= 0, got {self.mlp_width}")
        one_of("activation", self.activation, nn.ACTIVATIONS)
        one_of("norm", self.norm, nn.NORMS)
        one_of("norm_position", self.norm_position, nn.NORM_POSITIONS)
        one_of("position", self.position, POSITIONS)
        check_dropout_and_dtype(self)
        if len(self.pattern) > self.num_layers:
            raise ValueError(
                f"model.mixer: wanted at most model.num_layers = {self.num_layers} names, got "
                f"{len(self.pattern)}: {self.mixer!r}"
            )
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
        if self.rotary_scaling is not None and len(self.rotary_scaling) not in (1, 4):
            raise ValueError(
                "model.rotary_scaling: wanted a factor, or four numbers (factor, low turns, high "
                f"turns, original length), got {self.rotary_scaling}"
            )
        for name in ("rotary_scaling", "local_rotary_base"):
            if getattr(self, name) is not None and self.position != "rotary":
                raise ValueError(
                    f"model.{name}: {getattr(self, name)} was set, but model.position = "
                    f"{self.position!r} has no frequencies"
                )
        if self.position == "sinusoidal" and self.width % 2:
            raise ValueError(
                f"model.width: sinusoidal positions need an even one, got {self.width}"
            )
        if self.relative_buckets < 4 or self.relative_buckets % 2:
            raise ValueError(
                f"model.relative_buckets: wanted an even number >= 4, got {self.relative_buckets}"
            )
        if self.relative_distance <= self.relative_buckets // 2:
            raise ValueError(
                "model.relative_distance: wanted more than model.relative_buckets / 2 = "
                f"{self.relative_buckets // 2}, got {self.relative_distance}"
            )
        for name in ("attention_scale", "init_std", "norm_epsilon"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"model.{name}: wanted a number > 0, got {value}")
        for name in ("logit_softcap", "attention_softcap"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"model.{name}: wanted >= 0, got {value}")
        for name in ("rotary_base", "local_rotary_base"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 1):
                raise ValueError(f"model.{name}: wanted > 1, got {value}")

    @property
    def pattern(self) -> tuple[str, ...]:
        """The names in `mixer`."""
        return tuple(name.strip() for name in self.mixer.split(","))

    @property
    def mixers(self) -> tuple[str, ...]:
        """The name of each layer's mixer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    def of_layer(self, layer: int) -> "TransformerConfig":
        """What the mixer of a layer, from 0, is made by: this config, if all layers are alike."""
        del layer
        return self

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


def check_sizes(config: Any, *names: str) -> None:
    """Raises a ValueError that names the first of the fields that is neither None nor positive."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"model.{name}: wanted a positive integer, got {value}")


def check_dropout_and_dtype(config: Any) -> None:
    """Checks the fields that every model has.

    Raises:
      ValueError: naming the field, what came and what was wanted.
    """
    one_of("dtype", config.dtype, ("float32", "bfloat16"))
    if not 0 <= config.dropout_rate < 1:
        raise ValueError(f"model.dropout_rate: wanted [0, 1), got {config.dropout_rate}")


def one_of(name: str, value: str, known: Collection[str]) -> None:
    """Raises a ValueError that names the field, unless `value` is known."""
    if value not in known:
        raise ValueError(f"model.{name}: wanted one of {sorted(known)}, got {value!r}")
