"""What may mix tokens, by the names that `config.model.mixer` uses.

A row of the table says which module a name stands for and which of the config's fields it reads.
A new mechanism is one row: for attention with another op, `_attention(op=Op(...))`; for a module
of its own, `_attention(nn.X, ...)` where it extends `nn.MultiHeadAttention`, else `_module(nn.X)`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from qkv_jax import nn
from qkv_jax.models.config import TransformerConfig, one_of
from qkv_jax.ops import clipped, features, lowrank, moba, normalizers, sparse, streaming, top_k
from qkv_jax.ops.native_sparse import Pattern

HEADS = ("num_kv_heads", "head_dim", "share_kv", "share_qk")
# The fields that only some mixers read. Positions and norms of q and k are not among them: a model
# may mix layers that want them with layers that know order by themselves.
SETTINGS = (
    *HEADS, "attention_scale", "rotary_scaling", "local_rotary_base", "window", "block_size",
    "num_blocks", "num_global", "num_random", "window_blocks", "top_k", "num_features", "rank",
    "conv_width", "chunk_size",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mixer:
    """A row of the table.

    Args:
      make: makes the module, called as `make(config, layer, **shared)` with the layer's number,
        from 0, and kernel_init, out_init, dtype and rngs.
      reads: which of `SETTINGS`.
      causal: whether a decoder may use it.
      bidirectional: whether an encoder may.
      in_order: whether it takes tokens in the order of the array, whatever their positions say.
    """

    make: Callable[..., nnx.Module]
    reads: tuple[str, ...] = ()
    causal: bool = True
    bidirectional: bool = True
    in_order: bool = False


class Op:
    """An op with settings, such as `Op(ops.sparse.Local, window="window")`: as for `_attention`."""

    def __init__(self, op: Callable[..., Any], **fields: Any):
        self.op = op
        self.fields = fields


def _attention(
    module: type[nnx.Module] = nn.MultiHeadAttention,
    *,
    op: Op | Callable[..., jax.Array] | None = None,
    heads: Sequence[str] = HEADS,
    reads: Sequence[str] = (),
    causal: bool = True,
    bidirectional: bool = True,
    in_order: bool = False,
    **fields: Any,
) -> Mixer:
    """A row for `nn.MultiHeadAttention` or what extends it, as the config's fields say.

    `heads` are the fields of `HEADS` that the module takes. `fields` give its own arguments: each
    the name of a field of the config, a function of the config and the layer's number, which reads
    the fields in `reads`, or the value itself.
    """

    def make(config: TransformerConfig, layer: int, **shared: Any) -> nnx.Module:
        own = _values(fields, config, layer)
        if isinstance(op, Op):
            own["op"] = op.op(**_values(op.fields, config, layer))
        elif op is not None:
            own["op"] = op
        return module(
            config.width,
            config.num_heads,
            **{name: getattr(config, name) for name in heads},
            use_bias=config.use_bias,
            qkv_bias=config.qkv_bias,
            qk_norm=config.qk_norm,
            qk_norm_kind=qk_norm_kind(config),
            norm_epsilon=config.norm_epsilon,
            rotary_base=_rotary_base(config, layer),
            rotary_scaling=None if _is_local(config, layer) else config.rotary_scaling,
            dropout_rate=config.dropout_rate,
            **own,
            **shared,
        )

    settings = _fields(fields) + (_fields(op.fields) if isinstance(op, Op) else ())
    if not (isinstance(op, Op) and "rotary_base" in op.fields):  # that rotates by itself
        settings += ("rotary_scaling",)
    return Mixer(make, (*heads, *reads, *settings), causal, bidirectional, in_order)


def _module(
    module: Callable[..., nnx.Module],
    *,
    heads: bool = True,
    causal: bool = True,
    bidirectional: bool = True,
    in_order: bool = True,
    **fields: Any,
) -> Mixer:
    """A row for any other module, called with width (and heads), `fields` and what all share."""

    def make(config: TransformerConfig, layer: int, **shared: Any) -> nnx.Module:
        sizes = (config.width, config.num_heads) if heads else (config.width,)
        return module(*sizes, **_values(fields, config, layer), **shared)

    return Mixer(make, _fields(fields), causal, bidirectional, in_order)


def _recurrence(module: type[nnx.Module], **fields: Any) -> Mixer:
    """A row for what extends `nn.LinearRecurrence`."""
    shared = {name: name for name in ("head_dim", "chunk_size", "use_bias")}
    return _module(module, bidirectional=False, **shared, **fields)


def qk_norm_kind(config: TransformerConfig) -> str:
    """Of the norms of queries and keys, if there are any."""
    return config.norm if config.norm == "zero_centered_rms" else "rms"


def _rotary_base(config: TransformerConfig, layer: int) -> float | None:
    if config.position != "rotary":
        return None
    return config.local_rotary_base if _is_local(config, layer) else config.rotary_base


def _is_local(config: TransformerConfig, layer: int) -> bool:
    """Whether a layer has the rotation of local ones."""
    return config.local_rotary_base is not None and config.mixers[layer] == "sliding_window"


def _nsa_pattern(config: TransformerConfig, layer: int) -> Pattern:
    """The paper's proportions: rows overlap by half; the first block and the last two are given."""
    del layer
    size, selected = config.block_size, config.num_blocks
    num_initial = min(1, selected - 1)
    return Pattern(
        compressed_size=size, stride=max(1, size // 2), block_size=size, num_selected=selected,
        window=config.window, num_initial=num_initial, num_local=min(2, selected - num_initial),
    )  # fmt: skip


def _values(fields: dict[str, Any], config: TransformerConfig, layer: int) -> dict[str, Any]:
    def value(field: Any) -> Any:
        if callable(field):
            return field(config, layer)
        known = isinstance(field, str) and hasattr(config, field)
        return getattr(config, field) if known else field

    return {name: value(field) for name, field in fields.items()}


def _fields(fields: dict[str, Any]) -> tuple[str, ...]:
    return tuple(field for field in fields.values() if field in SETTINGS)


MIXERS: dict[str, Mixer] = {
    "attention": _attention(scale="attention_scale"),
    # Exact attention over part of the keys
    "sliding_window": _attention(
        op=Op(sparse.Local, window="window"), scale="attention_scale", reads=("local_rotary_base",)
    ),
    "chunked": _attention(op=Op(sparse.ChunkedLocal, size="window")),
    "longformer": _attention(op=Op(sparse.Longformer, window="window", num_global="num_global")),
    "streaming": _attention(
        op=Op(
            streaming.Streaming,
            window="window",
            num_sinks="num_global",
            rotary_base=_rotary_base,
        ),
        bidirectional=False,
    ),
    "bigbird": _attention(
        op=Op(
            sparse.BigBird,
            block_size="block_size",
            window_blocks="window_blocks",
            num_global_blocks="num_global",
            num_random_blocks="num_random",
        )
    ),
    "strided": _attention(op=Op(sparse.Strided, stride="block_size")),
    "fixed": _attention(op=Op(sparse.Fixed, stride="block_size")),
    "topk": _attention(op=Op(top_k.TopK, num_keys="top_k")),
    "moba": _attention(
        op=Op(moba.MoBA, block_size="block_size", num_blocks="num_blocks"), in_order=True
    ),
    "nsa": _attention(
        nn.NativeSparseAttention,
        reads=("window", "block_size", "num_blocks"),
        pattern=_nsa_pattern,
        bidirectional=False,
        in_order=True,
    ),
    "memory": _attention(nn.MemoryAttention, window="window", num_keys="top_k"),
    # Exact attention with other weights
    "sigmoid": _attention(op=Op(normalizers.Sigmoid)),
    "entmax": _attention(op=Op(normalizers.Entmax, alpha=1.5)),
    "sparsemax": _attention(op=Op(normalizers.Entmax, alpha=2.0)),
    "off_by_one": _attention(op=normalizers.off_by_one_attention),
    "sink": _attention(nn.SinkAttention),
    # With the stretch of Bondarenko et al. 2023 for their BERT, alpha = 4.
    "clipped_softmax": _attention(
        op=Op(clipped.ClippedSoftmax, gamma=lambda config, _: -4 / config.context)
    ),
    "gated_attention": _attention(nn.GatedAttention),
    "cosine": _attention(nn.CosineAttention),
    "talking_heads": _attention(nn.TalkingHeadsAttention),
    "differential": _attention(
        nn.DifferentialAttention, lambda_init=lambda _, layer: 0.8 - 0.6 * math.exp(-0.3 * layer)
    ),
    "value_residual": _attention(nn.ValueResidualAttention),
    "forgetting": _attention(nn.ForgettingAttention, bidirectional=False, in_order=True),
    "cope": _attention(nn.ContextualPositionAttention, max_positions="window", in_order=True),
    "bahdanau": _attention(nn.AdditiveAttention),
    "luong": _attention(nn.LuongAttention, heads=("share_kv",), kind="general"),
    "latent": _module(
        nn.LatentAttention,
        head_dim="head_dim",
        latent_dim="rank",
        rotary_base=_rotary_base,
        use_bias="use_bias",
        dropout_rate="dropout_rate",
        in_order=False,
    ),
    # Linear attention and the delta rule
    "linear": _attention(op=Op(features.LinearAttention, chunk_size="chunk_size"), in_order=True),
    "performer": _attention(
        op=Op(features.Performer, num_features="num_features", chunk_size="chunk_size"),
        in_order=True,
    ),
    "retention": _recurrence(nn.Retention, rotary_base=_rotary_base),
    "gated_linear": _recurrence(nn.GatedLinearAttention),
    "ssd": _recurrence(nn.StateSpaceDuality, conv_width="conv_width"),
    "delta": _recurrence(nn.DeltaNet, conv_width="conv_width"),
    "gated_delta": _recurrence(nn.GatedDeltaNet, conv_width="conv_width"),
    "kimi_delta": _recurrence(nn.KimiDeltaAttention, conv_width="conv_width"),
    # Low rank
    "linformer": _attention(nn.LinformerAttention, length="context", rank="rank", causal=False),
    "nystrom": _attention(op=Op(lowrank.Nystrom, num_landmarks="rank"), causal=False),
    # Recurrences and convolutions
    "lstm": _module(nn.LSTM, heads=False, bidirectional=False),
    "gru": _module(nn.GRU, heads=False, bidirectional=False),
    "gated_conv": _module(
        nn.GatedConvolution, heads=False, conv_width="conv_width", use_bias="use_bias"
    ),
    "long_conv": _module(
        nn.LongConvolution,
        heads=False,
        bidirectional=False,
        length="context",
        short_width="conv_width",
        use_bias="use_bias",
    ),
}


def check_mixers(config: TransformerConfig) -> None:
    """Checks that the config's mixers exist, suit the model, and read what the config sets.

    Raises:
      ValueError: naming the field, what came and what was wanted.
    """
    for name in config.pattern:
        one_of("mixer", name, MIXERS)
    suits = {name: m.causal if config.causal else m.bidirectional for name, m in MIXERS.items()}
    for name in config.pattern:
        if not suits[name]:
            known = sorted(name for name, fits in suits.items() if fits)
            why = (
                "sees later tokens too, so no decoder can use it"
                if config.causal
                else "sees earlier tokens only, so no encoder can use it"
            )
            raise ValueError(f"model.mixer: {name!r} {why}; wanted one of {known}")
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    read = {field for name in config.pattern for field in MIXERS[name].reads}
    for name in SETTINGS:
        value = getattr(config, name)
        if value != defaults[name] and name not in read:
            readers = ", ".join(sorted(n for n, m in MIXERS.items() if name in m.reads))
            raise ValueError(
                f"model.{name}: {value!r} was set, but no layer of model.mixer = {config.mixer!r} "
                f"reads it; these do: {readers}"
            )
