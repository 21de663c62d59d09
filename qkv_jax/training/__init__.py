"""Training: functions over one `TrainState`, and what keeps a run safe."""

from qkv_jax.training.checkpoint import Checkpointer, CheckpointError, load_checkpoint
from qkv_jax.training.chips import CHIPS, Chip, chip_of
from qkv_jax.training.distillation import (
    DistillationConfig,
    Student,
    distillation_loss,
    hidden_loss,
    relation_loss,
    soft_target_loss,
)
from qkv_jax.training.estimates import Estimate, estimate, model_flops, peak_steps
from qkv_jax.training.evaluation import make_eval_step, mean_metrics
from qkv_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from qkv_jax.training.preemption import StopSignal
from qkv_jax.training.profiling import Profile, profiled_steps
from qkv_jax.training.progress import Progress
from qkv_jax.training.save_times import SaveTimes
from qkv_jax.training.spikes import LossSpikeError, LossSpikes
from qkv_jax.training.state import TrainState
from qkv_jax.training.step import (
    Loss,
    Predict,
    cross_entropy_loss,
    in_zigzag,
    make_train_step,
    make_train_steps,
    predict_documents,
    predict_padded_tokens,
    predict_tokens,
)
from qkv_jax.training.throughput import Throughput

__all__ = [
    "CHIPS",
    "CheckpointError",
    "Checkpointer",
    "Chip",
    "DistillationConfig",
    "Estimate",
    "Loss",
    "LossSpikeError",
    "LossSpikes",
    "OptimizerConfig",
    "Predict",
    "Profile",
    "Progress",
    "SaveTimes",
    "StopSignal",
    "Student",
    "Throughput",
    "TrainState",
    "chip_of",
    "cross_entropy_loss",
    "distillation_loss",
    "estimate",
    "hidden_loss",
    "in_zigzag",
    "load_checkpoint",
    "make_eval_step",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "make_train_steps",
    "mean_metrics",
    "model_flops",
    "peak_steps",
    "predict_documents",
    "predict_padded_tokens",
    "predict_tokens",
    "profiled_steps",
    "relation_loss",
    "soft_target_loss",
]
