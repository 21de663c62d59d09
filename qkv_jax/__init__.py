"""Attention as pure functions in JAX: `from qkv_jax import ops`."""

__version__ = "0.1.0"
