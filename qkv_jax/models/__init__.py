"""Language models, made from the modules of `qkv_jax.nn`."""

from qkv_jax.models.decoder import MIXERS, Decoder, DecoderConfig
from qkv_jax.models.maps import attention_maps

__all__ = ["MIXERS", "Decoder", "DecoderConfig", "attention_maps"]
