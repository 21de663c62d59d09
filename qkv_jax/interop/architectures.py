"""What each architecture of Hugging Face is here: its config in ours, its tensors in ours.

A row of `TABLE` is all that an architecture needs: no model code. Names with {i} stand for a layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from qkv_jax.models import Decoder, DecoderConfig, EncoderConfig, MaskedLanguageModel

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of theirs and the parameters of ours that it holds.

    Args:
      theirs: its name.
      ours: dotted paths of parameters; several lie side by side along its last axis.
      transposed: theirs is [out, in], ours [in, out].
      skip: rows at the beginning of theirs that ours has not, which are written as zeros.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    skip: int = 0


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of transformers.

    Args:
      model_type: in config.json.
      class_name: transformers' class, for `architectures` in a config.json that we write.
      config, model: ours.
      fields: name in config.json -> our field of the same meaning.
      fixed: our fields that it decides.
      required: name in config.json -> the only value that we have; absent means that value.
      tensors: see `Tensor`. A parameter that a config has not, such as a bias, is passed over.
      prefix: of the tensors in a model with a head, which a model without one lacks.
      unused: endings of names whose tensors hold nothing that we need.
      read: changes a config.json before `fields` read it; write: the inverse.
    """

    model_type: str
    class_name: str
    config: type
    model: type[nnx.Module]
    fields: Mapping[str, str]
    fixed: Mapping[str, Any]
    required: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    prefix: str
    unused: tuple[str, ...] = ()
    read: Callable[[Json], Json] = dict
    write: Callable[[Json], Json] = dict


# Their activations -> ours; a gate's is that of "swiglu".
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip


def _linear(theirs: str, *ours: str, transposed: bool = True) -> tuple[Tensor, Tensor]:
    return (
        Tensor(f"{theirs}.weight", tuple(f"{path}.kernel" for path in ours), transposed),
        Tensor(f"{theirs}.bias", tuple(f"{path}.bias" for path in ours)),
    )


def _norm(theirs: str, ours: str) -> tuple[Tensor, Tensor]:
    return (
        Tensor(f"{theirs}.weight", (f"{ours}.scale",)),
        Tensor(f"{theirs}.bias", (f"{ours}.bias",)),
    )


def _table(theirs: str, ours: str, skip: int = 0) -> tuple[Tensor]:
    return (Tensor(f"{theirs}.weight", (ours,), skip=skip),)


# --- GPT-2 ----------------------------------------------------------------------------------------

_H, _B = "transformer.h.{i}", "blocks.{i}"
GPT2 = Architecture(
    "gpt2",
    "GPT2LMHeadModel",
    DecoderConfig,
    Decoder,
    fields={
        "vocab_size": "vocab_size", "n_positions": "context", "n_embd": "width",
        "n_layer": "num_layers", "n_head": "num_heads", "n_inner": "mlp_width",
        "layer_norm_epsilon": "norm_epsilon", "activation_function": "activation",
    },
    fixed={"norm": "layer", "position": "learned", "use_bias": True, "tie_embeddings": True},
    required={
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False, "tie_word_embeddings": True,
    },
    tensors=(
        *_table("transformer.wte", "embedding.embedding"),
        *_table("transformer.wpe", "positions.table"),
        *_norm(f"{_H}.ln_1", f"{_B}.mixer_norm"),
        *_linear(
            f"{_H}.attn.c_attn",
            *(f"{_B}.mixer.{name}" for name in ("query", "key", "value")), transposed=False,
        ),
        *_linear(f"{_H}.attn.c_proj", f"{_B}.mixer.out", transposed=False),
        *_norm(f"{_H}.ln_2", f"{_B}.feed_forward_norm"),
        *_linear(f"{_H}.mlp.c_fc", f"{_B}.feed_forward.up", transposed=False),
        *_linear(f"{_H}.mlp.c_proj", f"{_B}.feed_forward.down", transposed=False),
        *_norm("transformer.ln_f", "final_norm"),
    ),
    prefix="transformer.",
    unused=(".attn.bias", ".attn.masked_bias"),
)  # fmt: skip

# --- Llama and those of its kind ------------------------------------------------------------------

_H = "model.layers.{i}"
_LLAMA_FIELDS = {
    "vocab_size": "vocab_size", "max_position_embeddings": "context", "hidden_size": "width",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim",
    "intermediate_size": "mlp_width", "rms_norm_eps": "norm_epsilon", "rope_theta": "rotary_base",
    "rope_scaling": "rotary_scaling", "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
_LLAMA_FIXED = {
    "norm": "rms", "position": "rotary", "activation": "swiglu", "use_bias": False,
}  # fmt: skip
_LLAMA_TENSORS = (
    *_table("model.embed_tokens", "embedding.embedding"),
    *_norm(f"{_H}.input_layernorm", f"{_B}.mixer_norm"),
    *_linear(f"{_H}.self_attn.q_proj", f"{_B}.mixer.query"),
    *_linear(f"{_H}.self_attn.k_proj", f"{_B}.mixer.key"),
    *_linear(f"{_H}.self_attn.v_proj", f"{_B}.mixer.value"),
    *_linear(f"{_H}.self_attn.o_proj", f"{_B}.mixer.out"),
    *_norm(f"{_H}.self_attn.q_norm", f"{_B}.mixer.query_norm"),
    *_norm(f"{_H}.self_attn.k_norm", f"{_B}.mixer.key_norm"),
    *_norm(f"{_H}.post_attention_layernorm", f"{_B}.feed_forward_norm"),
    *_linear(f"{_H}.mlp.gate_proj", f"{_B}.feed_forward.gate"),
    *_linear(f"{_H}.mlp.up_proj", f"{_B}.feed_forward.up"),
    *_linear(f"{_H}.mlp.down_proj", f"{_B}.feed_forward.down"),
    *_norm("model.norm", "final_norm"),
    *_linear("lm_head", "head"),
)
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _read_rotation(config: Json) -> Json:
    """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`, as the latter two."""
    config = dict(config)
    scaling = dict(config.pop("rope_parameters", None) or config.get("rope_scaling") or {})
    config["rope_theta"] = scaling.pop("rope_theta", config.get("rope_theta", 10_000.0))
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    if kind == "default":
        config["rope_scaling"] = None
    elif kind == "llama3":
        config["rope_scaling"] = tuple(scaling[name] for name in _LLAMA3)
    else:
        raise ValueError(f"rope_type: wanted 'default' or 'llama3', got {kind!r}")
    return config


def _write_rotation(config: Json) -> Json:
    config = dict(config)
    scaling = config.pop("rope_scaling", None)
    rotation: Json = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    if scaling is not None:
        rotation |= {"rope_type": "llama3", **dict(zip(_LLAMA3, scaling, strict=True))}
    return config | {"rope_parameters": rotation}


LLAMA = Architecture(
    "llama",
    "LlamaForCausalLM",
    DecoderConfig,
    Decoder,
    fields=_LLAMA_FIELDS,
    fixed=_LLAMA_FIXED,
    required={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    tensors=_LLAMA_TENSORS,
    prefix="model.",
    unused=(".rotary_emb.inv_freq",),
    read=_read_rotation,
    write=_write_rotation,
)
QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    fixed=_LLAMA_FIXED | {"qkv_bias": True},
    required={"hidden_act": "silu", "use_sliding_window": False},
)
QWEN3 = dataclasses.replace(
    LLAMA,
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    fixed=_LLAMA_FIXED | {"qk_norm": True},
    required={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
)


def _read_mistral(config: Json) -> Json:
    """Their window counts the token itself, ours those before it."""
    config = _read_rotation(config)
    window = config.get("sliding_window")
    config["mixer"] = "attention" if window is None else "sliding_window"
    if window is not None:
        config["window"] = window - 1
    return config


def _write_mistral(config: Json) -> Json:
    config = _write_rotation(config)
    window = config.pop("window", None)
    local = config.pop("mixer") == "sliding_window"
    return config | {"sliding_window": window + 1 if local else None}


MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    class_name="MistralForCausalLM",
    fields=_LLAMA_FIELDS | {"mixer": "mixer", "window": "window"},
    required={"hidden_act": "silu"},
    read=_read_mistral,
    write=_write_mistral,
)

# --- BERT and RoBERTa -----------------------------------------------------------------------------

_BERT_FIELDS = {
    "vocab_size": "vocab_size", "max_position_embeddings": "context", "hidden_size": "width",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_width", "layer_norm_eps": "norm_epsilon",
    "hidden_act": "activation", "type_vocab_size": "num_segments",
}  # fmt: skip
_BERT_FIXED = {
    "norm": "layer", "norm_position": "post", "position": "learned", "use_bias": True,
    "tie_embeddings": True,
}  # fmt: skip


def _bert_tensors(name: str, skip: int) -> tuple[Tensor, ...]:
    theirs, embeddings = f"{name}.encoder.layer.{{i}}", f"{name}.embeddings"
    ours = "encoder.blocks.{i}"
    return (
        *_table(f"{embeddings}.word_embeddings", "encoder.embedding.embedding"),
        *_table(f"{embeddings}.position_embeddings", "encoder.positions.table", skip),
        *_table(f"{embeddings}.token_type_embeddings", "encoder.segments.embedding"),
        *_norm(f"{embeddings}.LayerNorm", "encoder.embedding_norm"),
        *_linear(f"{theirs}.attention.self.query", f"{ours}.mixer.query"),
        *_linear(f"{theirs}.attention.self.key", f"{ours}.mixer.key"),
        *_linear(f"{theirs}.attention.self.value", f"{ours}.mixer.value"),
        *_linear(f"{theirs}.attention.output.dense", f"{ours}.mixer.out"),
        *_norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.mixer_norm"),
        *_linear(f"{theirs}.intermediate.dense", f"{ours}.feed_forward.up"),
        *_linear(f"{theirs}.output.dense", f"{ours}.feed_forward.down"),
        *_norm(f"{theirs}.output.LayerNorm", f"{ours}.feed_forward_norm"),
    )


BERT = Architecture(
    "bert",
    "BertForMaskedLM",
    EncoderConfig,
    MaskedLanguageModel,
    fields=_BERT_FIELDS,
    fixed=_BERT_FIXED,
    required={"is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True},
    tensors=(
        *_bert_tensors("bert", 0),
        *_linear("cls.predictions.transform.dense", "dense"),
        *_norm("cls.predictions.transform.LayerNorm", "norm"),
        Tensor("cls.predictions.bias", ("bias",)),
    ),
    prefix="bert.",
    unused=(
        "embeddings.position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias",
        "pooler.dense.weight", "pooler.dense.bias", "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    ),
)  # fmt: skip

_OFFSET = 2  # RoBERTa counts positions from padding_idx + 1


def _read_roberta(config: Json) -> Json:
    if config.get("pad_token_id", 1) != _OFFSET - 1:
        raise ValueError(f"pad_token_id: wanted {_OFFSET - 1}, got {config['pad_token_id']}")
    return config | {"max_position_embeddings": config["max_position_embeddings"] - _OFFSET}


def _write_roberta(config: Json) -> Json:
    return config | {
        "max_position_embeddings": config["max_position_embeddings"] + _OFFSET,
        "pad_token_id": _OFFSET - 1,
    }


ROBERTA = dataclasses.replace(
    BERT,
    model_type="roberta",
    class_name="RobertaForMaskedLM",
    tensors=(
        *_bert_tensors("roberta", _OFFSET),
        *_linear("lm_head.dense", "dense"),
        *_norm("lm_head.layer_norm", "norm"),
        Tensor("lm_head.bias", ("bias",)),
    ),
    prefix="roberta.",
    unused=("embeddings.position_ids", "lm_head.decoder.weight", "lm_head.decoder.bias",
            "pooler.dense.weight", "pooler.dense.bias"),
    read=_read_roberta,
    write=_write_roberta,
)  # fmt: skip

TABLE = {row.model_type: row for row in (GPT2, LLAMA, QWEN2, QWEN3, MISTRAL, BERT, ROBERTA)}
