"""Flax NNX modules: they own parameters, and call the functions of `qkv_jax.ops`."""

from qkv_jax.nn.additive import AdditiveAttention, LuongAttention
from qkv_jax.nn.attention import MultiHeadAttention
from qkv_jax.nn.block import NORM_POSITIONS, TransformerBlock, dropout
from qkv_jax.nn.convolution import GatedConvolution, LongConvolution
from qkv_jax.nn.cope import ContextualPositionAttention
from qkv_jax.nn.cosine import CosineAttention
from qkv_jax.nn.embedding import LearnedPositions, SinusoidalPositions
from qkv_jax.nn.feed_forward import ACTIVATIONS, FeedForward
from qkv_jax.nn.forgetting import ForgettingAttention
from qkv_jax.nn.functional import Params, count, merge, split
from qkv_jax.nn.gated_attention import GatedAttention
from qkv_jax.nn.heads import DifferentialAttention, TalkingHeadsAttention
from qkv_jax.nn.latent import LatentAttention
from qkv_jax.nn.linear import Linear, project
from qkv_jax.nn.linear_attention import (
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    KimiDeltaAttention,
    LinearRecurrence,
    Retention,
    StateSpaceDuality,
)
from qkv_jax.nn.lowrank import LinformerAttention, SequenceProjections
from qkv_jax.nn.memory import MemoryAttention
from qkv_jax.nn.native_sparse import NativeSparseAttention
from qkv_jax.nn.norms import NORMS, ZeroCenteredRMSNorm, make_norm
from qkv_jax.nn.recurrent import GRU, LSTM, Recurrent, initial_state, run
from qkv_jax.nn.sinks import SinkAttention
from qkv_jax.nn.value_residual import ValueResidualAttention

__all__ = [
    "ACTIVATIONS",
    "GRU",
    "LSTM",
    "NORMS",
    "NORM_POSITIONS",
    "AdditiveAttention",
    "ContextualPositionAttention",
    "CosineAttention",
    "DeltaNet",
    "DifferentialAttention",
    "FeedForward",
    "ForgettingAttention",
    "GatedAttention",
    "GatedConvolution",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "KimiDeltaAttention",
    "LatentAttention",
    "LearnedPositions",
    "Linear",
    "LinearRecurrence",
    "LinformerAttention",
    "LongConvolution",
    "LuongAttention",
    "MemoryAttention",
    "MultiHeadAttention",
    "NativeSparseAttention",
    "Params",
    "Recurrent",
    "Retention",
    "SequenceProjections",
    "SinkAttention",
    "SinusoidalPositions",
    "StateSpaceDuality",
    "TalkingHeadsAttention",
    "TransformerBlock",
    "ValueResidualAttention",
    "ZeroCenteredRMSNorm",
    "count",
    "dropout",
    "initial_state",
    "make_norm",
    "merge",
    "project",
    "run",
    "split",
]
