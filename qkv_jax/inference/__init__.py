"""Using trained models."""

from qkv_jax.inference.generation import generate
from qkv_jax.inference.quantization import QuantizedLinear, quantize
from qkv_jax.inference.sampling import check_sampling, filter_logits, sample
from qkv_jax.inference.translation import translate

__all__ = [
    "QuantizedLinear",
    "check_sampling",
    "filter_logits",
    "generate",
    "quantize",
    "sample",
    "translate",
]
