"""The loss over a text that was not trained on."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qkv_jax import nn
from qkv_jax.training.step import Batch


def make_eval_step(graphdef: nnx.GraphDef):
    """A jitted `eval_step(params, batch)`: the sum of the losses in nats, and their number.

    A batch holds `inputs` and `targets`, int32 [B, T], and optionally `weights` [B, T].
    """

    @jax.jit
    def eval_step(params: nn.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = nn.merge(graphdef, params)(batch["inputs"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        weights = batch.get("weights", jnp.ones_like(losses))
        return (losses * weights).sum(), weights.sum()

    return eval_step


def mean_loss(eval_step, params: nn.Params, batches: Iterable[Batch]) -> float:
    """The mean loss in nats per token over all batches; one host synchronisation at the end."""
    sums = [eval_step(params, batch) for batch in batches]
    total, count = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
    return float(total / count)
