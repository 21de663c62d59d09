"""Language models, made from the modules of `qkv_jax.nn`."""

from qkv_jax.models import measures
from qkv_jax.models.convolutional import ConvSeq2Seq, ConvSeq2SeqConfig
from qkv_jax.models.decoder import Decoder, DecoderConfig, interpolate_positions, state_size
from qkv_jax.models.encoder import (
    Classifier,
    Encoder,
    EncoderConfig,
    MaskedLanguageModel,
    SpanClassifier,
)
from qkv_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from qkv_jax.models.gates import (
    closed_heads,
    gated,
    open_gates,
    probability_open,
    sampled_gates,
    settled_gates,
)
from qkv_jax.models.grouping import group_heads
from qkv_jax.models.lens import logit_lens
from qkv_jax.models.maps import (
    alignment_maps,
    attention_gradients,
    attention_inputs,
    attention_maps,
    encoder_decoder_maps,
    head_importance,
    watched_inputs,
)
from qkv_jax.models.mixers import MIXERS, Mixer
from qkv_jax.models.pruning import (
    PRUNABLE,
    least_important,
    prune_heads,
    scale_heads,
    silence_heads,
)
from qkv_jax.models.recurrent import RecurrentSeq2Seq, RecurrentSeq2SeqConfig

__all__ = [
    "MIXERS",
    "PRUNABLE",
    "Classifier",
    "ConvSeq2Seq",
    "ConvSeq2SeqConfig",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "MaskedLanguageModel",
    "Mixer",
    "RecurrentSeq2Seq",
    "RecurrentSeq2SeqConfig",
    "SpanClassifier",
    "alignment_maps",
    "attention_gradients",
    "attention_inputs",
    "attention_maps",
    "closed_heads",
    "encoder_decoder_maps",
    "gated",
    "group_heads",
    "head_importance",
    "interpolate_positions",
    "least_important",
    "logit_lens",
    "measures",
    "open_gates",
    "probability_open",
    "prune_heads",
    "sampled_gates",
    "scale_heads",
    "settled_gates",
    "silence_heads",
    "state_size",
    "watched_inputs",
]
