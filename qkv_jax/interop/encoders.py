"""The encoders that we read: BERT and RoBERTa."""

import dataclasses

from qkv_jax.interop.architecture import Architecture, Json, Tensor, linear, norm, table
from qkv_jax.models import Encoder, EncoderConfig, MaskedLanguageModel

_BERT_FIELDS = {
    "vocab_size": "vocab_size", "max_position_embeddings": "context", "hidden_size": "width",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_width", "layer_norm_eps": "norm_epsilon",
    "hidden_act": "activation", "type_vocab_size": "num_segments",
}  # fmt: skip
_BERT_DEFAULTS = {
    "vocab_size": 30_522, "max_position_embeddings": 512, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "hidden_act": "gelu", "type_vocab_size": 2,
}  # fmt: skip
_BERT_FIXED = {
    "norm": "layer", "norm_position": "post", "position": "learned", "use_bias": True,
    "tie_embeddings": True,
}  # fmt: skip


def _bert_tensors(name: str, skip: int) -> tuple[Tensor, ...]:
    theirs, embeddings = f"{name}.encoder.layer.{{i}}", f"{name}.embeddings"
    ours = "encoder.blocks.{i}"
    return (
        *table(f"{embeddings}.word_embeddings", "encoder.embedding.embedding"),
        *table(f"{embeddings}.position_embeddings", "encoder.positions.table", skip),
        *table(f"{embeddings}.token_type_embeddings", "encoder.segments.embedding"),
        *norm(f"{embeddings}.LayerNorm", "encoder.embedding_norm"),
        *linear(f"{theirs}.attention.self.query", f"{ours}.mixer.query"),
        *linear(f"{theirs}.attention.self.key", f"{ours}.mixer.key"),
        *linear(f"{theirs}.attention.self.value", f"{ours}.mixer.value"),
        *linear(f"{theirs}.attention.output.dense", f"{ours}.mixer.out"),
        *norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.mixer_norm"),
        *linear(f"{theirs}.intermediate.dense", f"{ours}.feed_forward.up"),
        *linear(f"{theirs}.output.dense", f"{ours}.feed_forward.down"),
        *norm(f"{theirs}.output.LayerNorm", f"{ours}.feed_forward_norm"),
    )


def _with_bare(row: Architecture, class_name: str, head: str) -> Architecture:
    """The row with its encoder alone beside it."""
    tensors = tuple(
        dataclasses.replace(
            tensor, ours=tuple(path.removeprefix("encoder.") for path in tensor.ours)
        )
        for tensor in row.tensors
        if not tensor.theirs.startswith(head)
    )
    bare = dataclasses.replace(row, class_name=class_name, model=Encoder, tensors=tensors)
    return dataclasses.replace(row, bare=bare, head=head)


BERT = Architecture(
    "bert",
    "BertForMaskedLM",
    EncoderConfig,
    MaskedLanguageModel,
    fields=_BERT_FIELDS,
    fixed=_BERT_FIXED,
    defaults=_BERT_DEFAULTS,
    required={"is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True},
    tensors=(
        *_bert_tensors("bert", 0),
        *linear("cls.predictions.transform.dense", "dense"),
        *norm("cls.predictions.transform.LayerNorm", "norm"),
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
    defaults=_BERT_DEFAULTS | {"vocab_size": 50_265},
    tensors=(
        *_bert_tensors("roberta", _OFFSET),
        *linear("lm_head.dense", "dense"),
        *norm("lm_head.layer_norm", "norm"),
        Tensor("lm_head.bias", ("bias",)),
    ),
    prefix="roberta.",
    unused=("embeddings.position_ids", "lm_head.decoder.weight", "lm_head.decoder.bias",
            "pooler.dense.weight", "pooler.dense.bias"),
    read=_read_roberta,
    write=_write_roberta,
)  # fmt: skip

BERT = _with_bare(BERT, "BertModel", "cls.")
ROBERTA = _with_bare(ROBERTA, "RobertaModel", "lm_head.")
