"""The mean loss and accuracy over batches, against NumPy."""

import numpy as np
from flax import nnx

from qkv_jax import nn, training
from qkv_jax.models import Decoder, DecoderConfig
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, V = 2, 5, 7
CONFIG = DecoderConfig(
    vocab_size=V, context=T, num_layers=1, width=12, num_heads=2, dropout_rate=0.5
)
MODEL = randomised(Decoder(CONFIG, rngs=nnx.Rngs(0)))


def batches():
    random = np.random.RandomState(0)
    for i in range(3):
        tokens = random.randint(0, V, (B, T + 1))
        weights = np.ones((B, T), np.float32) if i < 2 else np.zeros((B, T), np.float32)
        if i == 2:
            weights[0, :3] = 1  # a text's last window is not full
        yield {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def numpy_losses(batch):
    logits = np.asarray(MODEL(batch["inputs"]), np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, batch["targets"][..., None], -1)[..., 0]


def numpy_hits(batch):
    return np.asarray(MODEL(batch["inputs"])).argmax(-1) == batch["targets"]


def test_every_token_counts_once_and_there_is_no_dropout():
    graphdef, params = nn.split(MODEL)
    means = training.mean_metrics(training.make_eval_step(graphdef), params, batches())
    assert all(isinstance(mean, float) for mean in means.values())
    for name, of in (("loss", numpy_losses), ("accuracy", numpy_hits)):
        total = sum((of(batch) * batch["weights"]).sum() for batch in batches())
        assert total > 0
        assert_close(means[name], total / (2 * B * T + 3), dtype="float32")


def test_batches_need_no_weights():
    graphdef, params = nn.split(MODEL)
    batch = next(batches())
    del batch["weights"]
    sums = training.make_eval_step(graphdef)(params, batch)
    assert_close(sums["loss"], numpy_losses(batch).sum())
    assert sums["accuracy"] == numpy_hits(batch).sum() and sums["count"] == B * T


def test_a_task_may_call_its_model_in_another_way():
    graphdef, params = nn.split(MODEL)
    batch = next(batches())
    first = {"tokens": batch["inputs"], "targets": batch["targets"][:, 0]}  # one class a text

    def predict(model, batch, rng):
        return model(batch["tokens"], rng=rng)[:, 0]

    sums = training.make_eval_step(graphdef, predict)(params, first)
    assert_close(sums["loss"], numpy_losses(batch)[:, 0].sum())
    assert sums["count"] == B
    loss = training.cross_entropy_loss(graphdef, predict)(params, first, None)
    assert_close(loss, numpy_losses(batch)[:, 0].mean())
