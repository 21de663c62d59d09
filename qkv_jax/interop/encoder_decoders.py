"""The encoder-decoders that we read: T5, and Flan-T5, which is T5 1.1."""

from qkv_jax.interop.architecture import Architecture, Json, Tensor, linear, norm, table
from qkv_jax.models import EncoderDecoder, EncoderDecoderConfig


def _attention(theirs: str, ours: str) -> tuple[Tensor, ...]:
    names = {"q": "query", "k": "key", "v": "value", "o": "out"}
    return tuple(
        row
        for short, name in names.items()
        for row in linear(f"{theirs}.{short}", f"{ours}.{name}")
    )


def _stack(theirs: str, ours: str) -> tuple[Tensor, ...]:
    """The encoder's tensors, or the decoder's with its attention to the encoder's output."""
    layer, block, last = f"{theirs}.block.{{i}}.layer", f"{ours}blocks.{{i}}", 1
    second: tuple[Tensor, ...] = ()
    if theirs == "decoder":
        last, cross = 2, f"{block}.cross"
        second = (
            *_attention(f"{layer}.1.EncDecAttention", f"{cross}.mixer"),
            *norm(f"{layer}.1.layer_norm", f"{cross}.mixer_norm"),
        )
    rest = block if theirs == "encoder" else f"{block}.cross"
    dense, network = f"{layer}.{last}.DenseReluDense", f"{rest}.feed_forward"
    gate, up = f"{network}.gate.kernel", f"{network}.up.kernel"
    return (
        *_attention(f"{layer}.0.SelfAttention", f"{block}.mixer"),
        *table(f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{ours}bias"),
        *norm(f"{layer}.0.layer_norm", f"{block}.mixer_norm"),
        *second,
        Tensor(f"{dense}.wi_0.weight", (gate,), transposed=True),
        Tensor(f"{dense}.wi_1.weight", (up,), transposed=True, beside=gate),
        Tensor(f"{dense}.wi.weight", (up,), transposed=True),
        *linear(f"{dense}.wo", f"{network}.down"),
        *norm(f"{layer}.{last}.layer_norm", f"{rest}.feed_forward_norm"),
        *norm(f"{theirs}.final_layer_norm", f"{ours}final_norm"),
    )


def _read(config: Json) -> Json:
    """`tie_word_embeddings: false` says that logits are not scaled; whether tied, the tensors."""
    layers, decoders = config["num_layers"], config.get("num_decoder_layers")
    if decoders not in (None, layers):
        raise ValueError(f"num_decoder_layers: wanted num_layers = {layers}, got {decoders}")
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    return config | {"scale_decoder_outputs": scaled, "tie_word_embeddings": True}


def _write(config: Json) -> Json:
    return config | {
        "num_decoder_layers": config["num_layers"],
        "tie_word_embeddings": config["scale_decoder_outputs"],
    }


T5 = Architecture(
    "t5",
    "T5ForConditionalGeneration",
    EncoderDecoderConfig,
    EncoderDecoder,
    fields={
        "vocab_size": "vocab_size", "n_positions": "context", "d_model": "width",
        "d_kv": "head_dim", "d_ff": "mlp_width", "num_layers": "num_layers",
        "num_heads": "num_heads", "relative_attention_num_buckets": "relative_buckets",
        "relative_attention_max_distance": "relative_distance",
        "layer_norm_epsilon": "norm_epsilon", "feed_forward_proj": "activation",
        "scale_decoder_outputs": "scale_logits", "tie_word_embeddings": "tie_embeddings",
    },
    fixed={"norm": "rms", "position": "relative", "use_bias": False, "attention_scale": 1.0},
    # Nothing in it depends on n_positions, which is the length that it was trained on.
    defaults={
        "vocab_size": 32_128, "n_positions": 512, "d_model": 512, "d_kv": 64, "d_ff": 2048,
        "num_layers": 6, "num_heads": 8, "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
    },
    required={"is_encoder_decoder": True},
    tensors=(
        *table("shared", "decoder.embedding.embedding"),
        *_stack("encoder", ""),
        *_stack("decoder", "decoder."),
        *linear("lm_head", "decoder.head"),
    ),
    prefix="",
    unused=("embed_tokens.weight", ".EncDecAttention.relative_attention_bias.weight"),
    read=_read,
    write=_write,
)  # fmt: skip
