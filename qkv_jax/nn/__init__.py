"""Flax NNX modules: they own parameters, and call the functions of `qkv_jax.ops`."""

from qkv_jax.nn.attention import MultiHeadAttention
from qkv_jax.nn.block import NORMS, TransformerBlock, dropout, make_norm
from qkv_jax.nn.cosine import CosineAttention
from qkv_jax.nn.embedding import LearnedPositions, SinusoidalPositions
from qkv_jax.nn.feed_forward import ACTIVATIONS, FeedForward
from qkv_jax.nn.functional import Params, count, merge, split
from qkv_jax.nn.heads import DifferentialAttention, TalkingHeadsAttention
from qkv_jax.nn.linear import Linear, project
from qkv_jax.nn.value_residual import ValueResidualAttention

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "CosineAttention",
    "DifferentialAttention",
    "FeedForward",
    "LearnedPositions",
    "Linear",
    "MultiHeadAttention",
    "Params",
    "SinusoidalPositions",
    "TalkingHeadsAttention",
    "TransformerBlock",
    "ValueResidualAttention",
    "count",
    "dropout",
    "make_norm",
    "merge",
    "project",
    "split",
]
