"""Using trained models."""

from qkv_jax.inference.beam import Hypotheses, beam_search
from qkv_jax.inference.generation import generate, stream
from qkv_jax.inference.quantization import QuantizedLinear, quantize
from qkv_jax.inference.sampling import Sampling, check_sampling, filter_logits, penalised, sample
from qkv_jax.inference.scoring import log_probabilities
from qkv_jax.inference.speculative import Speculation, speculate, verified
from qkv_jax.inference.translation import translate

__all__ = [
    "Hypotheses", "QuantizedLinear", "Sampling", "Speculation", "beam_search", "check_sampling",
    "filter_logits", "generate", "log_probabilities", "penalised", "quantize", "sample",
    "speculate", "stream", "translate", "verified",
]  # fmt: skip
