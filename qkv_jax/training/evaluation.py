"""How well a model does on what it was not trained on."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qkv_jax import nn
from qkv_jax.training.step import Batch, Predict, predict_tokens

EvalStep = Callable[[nn.Params, Batch], dict[str, jax.Array]]


def make_eval_step(graphdef: nnx.GraphDef, predict: Predict = predict_tokens) -> EvalStep:
    """A jitted `eval_step(params, batch)`: sums over the targets of a batch.

    A batch is as for `cross_entropy_loss`. The sums are `loss`, in nats, `accuracy`, how often the
    likeliest class is the target, and `count`, the targets' number or weight: float32 [].
    """

    @jax.jit
    def eval_step(params: nn.Params, batch: Batch) -> dict[str, jax.Array]:
        logits, targets = predict(nn.merge(graphdef, params), batch, None), batch["targets"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        weights = batch.get("weights", jnp.ones_like(losses))
        return {
            "loss": (losses * weights).sum(),
            "accuracy": ((logits.argmax(-1) == targets) * weights).sum(),
            "count": weights.sum(),
        }

    return eval_step


def mean_metrics(
    eval_step: EvalStep, params: nn.Params, batches: Iterable[Batch]
) -> dict[str, float]:
    """`loss`, nats per target, and `accuracy` over all batches; one host synchronisation."""
    sums = jax.device_get([eval_step(params, batch) for batch in batches])
    totals = {name: np.sum([s[name] for s in sums], dtype=np.float64) for name in sums[0]}
    count = totals.pop("count")
    return {name: float(total / count) for name, total in totals.items()}
