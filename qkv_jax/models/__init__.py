"""Language models, made from the modules of `qkv_jax.nn`."""

from qkv_jax.models.decoder import Decoder, DecoderConfig, state_size
from qkv_jax.models.maps import attention_maps
from qkv_jax.models.mixers import MIXERS, Mixer

__all__ = ["MIXERS", "Decoder", "DecoderConfig", "Mixer", "attention_maps", "state_size"]
