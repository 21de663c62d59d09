"""Checkpoints of other libraries, in and out: Hugging Face's folders of safetensors."""

from qkv_jax.interop.architecture import Architecture
from qkv_jax.interop.architectures import TABLE as ARCHITECTURES
from qkv_jax.interop.checkpoint import Checkpoint, load, of_model, save
from qkv_jax.interop.hub import folder_of

__all__ = ["ARCHITECTURES", "Architecture", "Checkpoint", "folder_of", "load", "of_model", "save"]
