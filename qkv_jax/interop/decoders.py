"""The language models that we read: GPT-2, Llama and those of its kind."""

import dataclasses

from qkv_jax.interop.architecture import Architecture, Json, linear, norm, table
from qkv_jax.models import Decoder, DecoderConfig

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
    defaults={
        "vocab_size": 50_257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
    },
    required={
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False, "tie_word_embeddings": True,
    },
    tensors=(
        *table("transformer.wte", "embedding.embedding"),
        *table("transformer.wpe", "positions.table"),
        *norm(f"{_H}.ln_1", f"{_B}.mixer_norm"),
        *linear(
            f"{_H}.attn.c_attn",
            *(f"{_B}.mixer.{name}" for name in ("query", "key", "value")), transposed=False,
        ),
        *linear(f"{_H}.attn.c_proj", f"{_B}.mixer.out", transposed=False),
        *norm(f"{_H}.ln_2", f"{_B}.feed_forward_norm"),
        *linear(f"{_H}.mlp.c_fc", f"{_B}.feed_forward.up", transposed=False),
        *linear(f"{_H}.mlp.c_proj", f"{_B}.feed_forward.down", transposed=False),
        *norm("transformer.ln_f", "final_norm"),
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
    *table("model.embed_tokens", "embedding.embedding"),
    *norm(f"{_H}.input_layernorm", f"{_B}.mixer_norm"),
    *linear(f"{_H}.self_attn.q_proj", f"{_B}.mixer.query"),
    *linear(f"{_H}.self_attn.k_proj", f"{_B}.mixer.key"),
    *linear(f"{_H}.self_attn.v_proj", f"{_B}.mixer.value"),
    *linear(f"{_H}.self_attn.o_proj", f"{_B}.mixer.out"),
    *norm(f"{_H}.self_attn.q_norm", f"{_B}.mixer.query_norm"),
    *norm(f"{_H}.self_attn.k_norm", f"{_B}.mixer.key_norm"),
    *norm(f"{_H}.post_attention_layernorm", f"{_B}.feed_forward_norm"),
    *linear(f"{_H}.mlp.gate_proj", f"{_B}.feed_forward.gate"),
    *linear(f"{_H}.mlp.up_proj", f"{_B}.feed_forward.up"),
    *linear(f"{_H}.mlp.down_proj", f"{_B}.feed_forward.down"),
    *norm("model.norm", "final_norm"),
    *linear("lm_head", "head"),
)
_LLAMA_DEFAULTS = {
    "vocab_size": 32_000, "max_position_embeddings": 2048, "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11_008,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN_DEFAULTS = _LLAMA_DEFAULTS | {
    "vocab_size": 151_936, "max_position_embeddings": 32_768, "num_key_value_heads": 32,
    "intermediate_size": 22_016,
}  # fmt: skip
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rotation(said: Json, base: float) -> tuple[float, tuple[float, ...] | None]:
    """The base and our `rotary_scaling` of what their `rope_parameters` say, or `rope_scaling`."""
    kind = said.get("rope_type", said.get("type", "default"))
    known = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}
    if kind not in known:
        raise ValueError(f"rope_type: wanted one of {sorted(known)}, got {kind!r}")
    return said.get("rope_theta", base), tuple(said[name] for name in known[kind]) or None


def _rope_parameters(base: float, scaling: tuple[float, ...] | None) -> Json:
    """The inverse of `_rotation`."""
    kind, names = {0: ("default", ()), 1: ("linear", ("factor",)), 4: ("llama3", _LLAMA3)}[
        len(scaling or ())
    ]
    return {"rope_theta": base, "rope_type": kind, **dict(zip(names, scaling or (), strict=True))}


def _read_rotation(config: Json) -> Json:
    """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`, as the latter two."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base, scaling = _rotation(said, config.get("rope_theta", 10_000.0))
    return config | {"rope_theta": base, "rope_scaling": scaling}


def _write_rotation(config: Json) -> Json:
    config = dict(config)
    rotation = _rope_parameters(config.pop("rope_theta"), config.pop("rope_scaling"))
    return config | {"rope_parameters": rotation}


LLAMA = Architecture(
    "llama",
    "LlamaForCausalLM",
    DecoderConfig,
    Decoder,
    fields=_LLAMA_FIELDS,
    fixed=_LLAMA_FIXED,
    defaults=_LLAMA_DEFAULTS,
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
    defaults=_QWEN_DEFAULTS,
    required={"hidden_act": "silu", "use_sliding_window": False},
)
QWEN3 = dataclasses.replace(
    LLAMA,
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    fixed=_LLAMA_FIXED | {"qk_norm": True},
    defaults=_QWEN_DEFAULTS | {"head_dim": 128},
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
    defaults=_LLAMA_DEFAULTS | {
        "max_position_embeddings": 131_072, "num_key_value_heads": 8, "intermediate_size": 14_336,
        "sliding_window": 4096,
    },
    required={"hidden_act": "silu"},
    read=_read_mistral,
    write=_write_mistral,
)  # fmt: skip

# --- Gemma ----------------------------------------------------------------------------------------

_KINDS = {"sliding_attention": "sliding_window", "full_attention": "attention"}


def _read_gemma(config: Json) -> Json:
    """Its layers, by `layer_types` or every how many of them one sees everything; its scale."""
    if config.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention: wanted false, got true")
    L, period = config["num_hidden_layers"], config["sliding_window_pattern"]
    kinds = config.get("layer_types") or [
        "sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(L)
    ]
    if len(kinds) != L or not _KINDS.keys() >= set(kinds):
        raise ValueError(f"layer_types: wanted {L} names of {sorted(_KINDS)}, got {kinds}")
    mixers = [_KINDS[kind] for kind in kinds]
    shortest = next(n for n in range(1, L + 1) if (mixers[:n] * L)[:L] == mixers)
    local = "sliding_window" in mixers
    return config | {
        "mixer": ",".join(mixers[:shortest]),
        "window": config["sliding_window"] - 1 if local else None,  # theirs counts the token itself
        "query_pre_attn_scalar": config["query_pre_attn_scalar"] ** -0.5,
    }


def _write_gemma(config: Json) -> Json:
    config = dict(config)
    L, mixers, window = (config.pop(name) for name in ("num_hidden_layers", "mixer", "window"))
    names = {ours: theirs for theirs, ours in _KINDS.items()}
    pattern = [name.strip() for name in mixers.split(",")]
    if unknown := set(pattern) - names.keys():
        raise ValueError(f"model.mixer: Gemma has {sorted(names)}, got {sorted(unknown)}")
    return config | {
        "num_hidden_layers": L,
        "layer_types": [names[pattern[layer % len(pattern)]] for layer in range(L)],
        "sliding_window": window + 1,
        "query_pre_attn_scalar": round(config["query_pre_attn_scalar"] ** -2),
        "attn_logit_softcapping": config.get("attn_logit_softcapping") or None,
        "final_logit_softcapping": config["final_logit_softcapping"] or None,
    }


GEMMA2 = dataclasses.replace(
    LLAMA,
    model_type="gemma2",
    class_name="Gemma2ForCausalLM",
    fields=_LLAMA_FIELDS | {
        "mixer": "mixer", "window": "window", "query_pre_attn_scalar": "attention_scale",
        "attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logit_softcap",
    },
    fixed=_LLAMA_FIXED | {
        "norm": "zero_centered_rms", "norm_position": "both", "activation": "geglu",
        "scale_embeddings": True,
    },
    defaults={
        "vocab_size": 256_000, "max_position_embeddings": 8192, "hidden_size": 2304,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "intermediate_size": 9216, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    required={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    tensors=(
        *(row for row in _LLAMA_TENSORS if "post_attention" not in row.theirs),
        *norm(f"{_H}.post_attention_layernorm", f"{_B}.mixer_out_norm"),
        *norm(f"{_H}.pre_feedforward_layernorm", f"{_B}.feed_forward_norm"),
        *norm(f"{_H}.post_feedforward_layernorm", f"{_B}.feed_forward_out_norm"),
    ),
    read=lambda config: _read_gemma(_read_rotation(config)),
    write=lambda config: _write_gemma(_write_rotation(config)),
)  # fmt: skip


def _read_gemma3(config: Json) -> Json:
    """Two rotations: `rope_parameters` of each kind of layer, or of old `rope_local_base_freq`."""
    config = _read_gemma(config)
    kinds = config.get("rope_parameters") or {}
    said = kinds.get("full_attention") or config.get("rope_scaling") or {}
    base, scaling = _rotation(said, config.get("rope_theta", 1e6))
    said = kinds.get("sliding_attention") or {}
    local, none = _rotation(said, config.get("rope_local_base_freq", 1e4))
    if none is not None:
        raise ValueError(f"rope_parameters: wanted no scaling of sliding_attention, got {said}")
    local = None if config["window"] is None else local
    return config | {"rope_theta": base, "rope_scaling": scaling, "rope_local_base_freq": local}


def _write_gemma3(config: Json) -> Json:
    config = _write_gemma(config)
    base, scaling, local = (
        config.pop(name) for name in ("rope_theta", "rope_scaling", "rope_local_base_freq")
    )
    rotations = {"full_attention": _rope_parameters(base, scaling)}
    if local is not None:
        rotations["sliding_attention"] = _rope_parameters(local, None)
    return config | {"rope_parameters": rotations}


_GEMMA3_FIELDS = {**GEMMA2.fields, "rope_local_base_freq": "local_rotary_base"}
del _GEMMA3_FIELDS["attn_logit_softcapping"]  # transformers reads it and does nothing with it
GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    class_name="Gemma3ForCausalLM",
    fields=_GEMMA3_FIELDS,
    fixed={**GEMMA2.fixed, "qk_norm": True},
    defaults={
        **GEMMA2.defaults, "vocab_size": 262_208, "max_position_embeddings": 131_072,
        "sliding_window_pattern": 6, "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    required={**GEMMA2.required, "attn_logit_softcapping": None},
    read=_read_gemma3,
    write=_write_gemma3,
)  # fmt: skip
