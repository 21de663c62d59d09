"""What the tests of all sequence-to-sequence models share: dependence by gradients, and a task."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qkv_jax import nn, training

PAD, BEGIN, V = 0, 1, 8


def dependence(model, source, target_in, *, source_lengths=None):
    """How the logits at t move with each token's embedding: [T, T] and [T, S].

    The ids of a row are distinct, and the embeddings are neither shared nor tied, so that a row of
    a table is a token.
    """
    graphdef, params = nn.split(model)
    target = params.get("decoder", {}).get("embedding") or params["embedding"]
    source_table = params.get("source_embedding") or params["embedding"]
    assert source_table is not target

    def energies(tables):
        source_table["embedding"], target["embedding"] = tables
        logits = nn.merge(graphdef, params)(source, target_in, source_lengths=source_lengths)
        return (logits**2).sum((0, 2))  # [T]

    tables = source_table["embedding"], target["embedding"]
    by_source, by_target = jax.jit(jax.jacrev(energies))(tables)
    by_source, by_target = np.abs(by_source).sum(-1), np.abs(by_target).sum(-1)
    return by_target[:, target_in[0]], by_source[:, source[0]]


def reversal(seed, batch, length=8):
    """Sources of various lengths, and as targets the same tokens from the last to the first."""
    random = np.random.RandomState(seed)
    lengths = random.randint(length // 2, length + 1, batch)
    real = np.arange(length) < lengths[:, None]
    source = np.where(real, random.randint(2, V, (batch, length)), PAD)
    target = np.zeros_like(source)
    for row, tokens, n in zip(target, source, lengths, strict=True):
        row[:n] = tokens[:n][::-1]
    begin = np.full((batch, 1), BEGIN)
    target_in = np.concatenate([begin, target[:, :-1]], axis=1)
    arrays = {"source": source, "target_in": target_in, "target": target, "lengths": lengths}
    return arrays | {"weights": real.astype(np.float32)}


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, batch):
    model = nn.merge(graphdef, params)
    return model(batch["source"], batch["target_in"], source_lengths=batch["lengths"])


def train(model, *, steps, learning_rate):
    """Learns to reverse; returns the trained model and the losses.

    The learning rate falls to 0: at a constant one the last losses depend on rounding.
    """
    graphdef, params = nn.split(model)

    def loss(params, batch, rng):
        logits = _logits(graphdef, params, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"])
        return (losses * batch["weights"]).sum() / batch["weights"].sum()

    schedule = optax.linear_schedule(learning_rate, 0.0, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    batches = [reversal(seed, 32) for seed in range(steps)]
    batches = jax.tree.map(lambda *arrays: jnp.stack(arrays), *batches)
    run = training.make_train_steps(training.make_train_step(loss, optimizer, seed=0))
    state, metrics = run(training.TrainState.create(params, optimizer), batches, steps)
    return nn.merge(graphdef, state.params), np.asarray(metrics["loss"])


def exact_match(model):
    """How many of 200 new sources come out reversed without a mistake, each token as the best."""
    batch = reversal(10_000, 200)
    graphdef, params = nn.split(model)

    @jax.jit
    def generate(params):
        model, source, lengths = nn.merge(graphdef, params), batch["source"], batch["lengths"]
        memory = model.encode(source, source_lengths=lengths)

        def step(t, carry):
            tokens, answers = carry
            logits = model.decode(tokens, memory, source_lengths=lengths)
            answer = jnp.argmax(jnp.take(logits, t, axis=1), axis=-1)
            return tokens.at[:, t + 1].set(answer, mode="drop"), answers.at[:, t].set(answer)

        empty = jnp.zeros_like(source)
        first = empty.at[:, 0].set(BEGIN), empty
        return jax.lax.fori_loop(0, source.shape[1], step, first)[1]

    right = (generate(params) == batch["target"]) | (batch["weights"] == 0)
    return np.asarray(right).all(1).mean()
