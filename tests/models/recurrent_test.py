"""Recurrent sequence to sequence: its equations as loops, padding, order, sizes, and a task."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.models import RecurrentSeq2Seq, RecurrentSeq2SeqConfig
from tests.models.seq2seq import dependence, exact_match, reversal, train
from tests.parameters import randomised
from tests.tolerances import assert_close

B, S, T, V, D = 2, 7, 5, 11, 6
RANDOM = np.random.RandomState(0)
SOURCE, TARGET = RANDOM.randint(0, V, (B, S)), RANDOM.randint(0, V, (B, T))
LENGTHS = np.array([4, 7])
SMALL = RecurrentSeq2SeqConfig(vocab_size=V, width=D)
VARIANTS = {
    "none": {"attention": "none", "bidirectional": False, "num_layers": 2},
    "bahdanau": {"cell": "gru", "source_vocab_size": V + 2},
    "deep bahdanau": {"num_layers": 2},
    "luong general": {"attention": "luong", "cell": "gru", "bidirectional": False},
    "luong dot": {"attention": "luong", "score": "dot", "input_feeding": True},
    "luong concat": {"attention": "luong", "score": "concat", "cell": "gru"},
}
variants = pytest.mark.parametrize("name", VARIANTS)


def model(name="bahdanau", **changes):
    """The model's structure; `randomised` gives it numbers."""
    config = dataclasses.replace(SMALL, **(VARIANTS[name] | changes))
    return nnx.eval_shape(lambda: RecurrentSeq2Seq(config, rngs=nnx.Rngs(0)))


@functools.cache
def apply_to(name="bahdanau", **changes):
    """The model with random parameters, as a jitted function that returns logits and weights."""
    m = randomised(model(name, **changes))
    graphdef, params = nn.split(m)

    @jax.jit
    def apply(source, target, source_lengths, rng=None):
        m, lengths = nn.merge(graphdef, params), {"source_lengths": source_lengths}
        weights = None if m.attention is None else m.alignment(source, target, **lengths)
        return m(source, target, rng=rng, **lengths), weights

    return apply


# The equations, of one row


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def step(p, state, x):
    """One step of an LSTM or a GRU."""
    if "ii" in p:
        gate = lambda g: x @ p[f"i{g}"]["kernel"] + state[1] @ p[f"h{g[0]}"]["kernel"] + p[  # noqa: E731
            f"h{g[0]}"
        ]["bias"]  # fmt: skip
        c = sigmoid(gate("f_")) * state[0] + sigmoid(gate("i")) * np.tanh(gate("g"))
        h = sigmoid(gate("o")) * np.tanh(c)
        return np.stack([c, h])
    W, b, U = p["dense_i"]["kernel"], p["dense_i"]["bias"], p["dense_h"]["kernel"]
    (xr, xz, xn), (hr, hz, hn) = np.split(x @ W + b, 3), np.split(state[-1] @ U, 3)
    r, z = sigmoid(xr + hr), sigmoid(xz + hz)
    return ((1 - z) * np.tanh(xn + r * hn) + z * state[-1])[None]


def expected(m, source, target):
    """Logits [T, V] and weights [T, S] of one row without padding, in float64."""
    config, (_, p) = m.config, nn.split(m)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
    parts = 2 if config.cell == "lstm" else 1  # of a state: (c, h) or h

    x = p.get("source_embedding", p["embedding"])["embedding"][source]
    states = []
    for layer in range(config.num_layers):
        outputs, last = [], []
        for direction, cell in p["encoder"][layer].items():
            state, out = np.zeros((parts, D // len(p["encoder"][layer]))), np.zeros((len(x), 0))
            tokens = range(len(x))[::-1] if direction == 1 else range(len(x))
            found = {}
            for t in tokens:
                state = step(cell, state, x[t])
                found[t] = state[-1]
            out = np.stack([found[t] for t in range(len(x))])
            outputs.append(out)
            last.append(state)
        x = np.concatenate(outputs, axis=-1)
        states.append(np.concatenate(last, axis=-1))

    def attend(query):
        a, kernel = p["attention"], lambda name: p["attention"][name]["kernel"]
        if config.attention == "bahdanau" or config.score == "concat":
            hidden = np.tanh(query @ kernel("query") + x @ kernel("key"))
            logits, values = hidden @ a["energy"][0], x @ kernel("value")
        else:
            query = query @ kernel("query") if config.score == "general" else query
            logits, values = x @ query, x
        weights = softmax(logits)
        return weights @ values @ kernel("out"), weights

    logits, alignment, readout = [], [], np.zeros(D)
    for token in target:
        y, weights = p["embedding"]["embedding"][token], None
        if config.attention == "bahdanau":
            context, weights = attend(states[-1][-1])
            y = np.concatenate([y, context])
        if config.input_feeding:
            y = np.concatenate([y, readout])
        for layer in range(config.num_layers):
            states[layer] = step(p["decoder"][layer], states[layer], y)
            y = states[layer][-1]
        readout = y
        if config.attention == "luong":
            context, weights = attend(y)
            readout = np.tanh(context + y @ p["combine"]["kernel"])
        logits.append(readout @ p["head"]["kernel"])
        alignment.append(weights)
    return np.stack(logits), alignment


@variants
def test_it_is_its_equations_row_by_row_whatever_the_padding(name):
    m, (logits, weights) = randomised(model(name)), apply_to(name)(SOURCE, TARGET, LENGTHS)
    assert logits.shape == (B, T, V) and logits.dtype == "float32"
    for row, length in enumerate(LENGTHS):
        wanted, alignment = expected(m, SOURCE[row, :length], TARGET[row])
        assert_close(logits[row], wanted, scale=10)
        if m.attention is not None:
            assert weights.shape == (B, T, S) and weights.dtype == "float32"
            assert_close(weights[row, :, :length], np.stack(alignment), scale=10)
            assert (weights[row, :, length:] == 0).all()


@pytest.mark.parametrize("name", ["none", "bahdanau", "luong dot"])
def test_a_logit_depends_on_no_later_target_and_on_all_of_the_source(name):
    m = randomised(model(name, source_vocab_size=V + 2))
    target, source = np.arange(T)[None], np.arange(S)[None] + 1
    by_target, by_source = dependence(m, source, target, source_lengths=jnp.array([5]))
    assert (np.triu(by_target, 1) == 0).all()
    assert (by_target[np.tril_indices(T)] > 0).all()
    assert (by_source[:, :5] > 0).all() and (by_source[:, 5:] == 0).all()


def test_padding_changes_nothing():
    apply = apply_to()
    padded = np.where(np.arange(S) < LENGTHS[:, None], SOURCE, (SOURCE + 1) % V)
    jax.tree.map(
        np.testing.assert_array_equal,
        apply(padded, TARGET, LENGTHS),
        apply(SOURCE, TARGET, LENGTHS),
    )
    later = np.where(np.arange(T) < 3, TARGET, (TARGET + 1) % V)
    logits, _ = apply(SOURCE, later, LENGTHS)
    assert_close(logits[:, :3], apply(SOURCE, TARGET, LENGTHS)[0][:, :3])
    assert np.isfinite(apply(SOURCE, TARGET, np.array([0, 7]))[0]).all()


@variants
def test_the_parameters_are_counted_by_the_formula(name):
    c = dataclasses.replace(SMALL, **VARIANTS[name])
    gates = {"lstm": 4, "gru": 3}[c.cell]
    cell = lambda inputs, hidden: gates * (inputs + hidden + 1) * hidden  # noqa: E731
    directions = 2 if c.bidirectional else 1
    count = (V + (c.source_vocab_size or 0)) * D + D * V
    count += c.num_layers * (directions * cell(D, D // directions) + cell(D, D))
    if c.attention == "bahdanau" or c.input_feeding:
        count += gates * D * D  # of the first cell's longer input
    if c.attention != "none":
        additive = c.attention == "bahdanau" or c.score == "concat"
        count += D * D + (3 * D * D + D if additive else D * D * (c.score == "general"))
    if c.attention == "luong":
        count += D * D
    assert nn.count(nn.split(model(name))[1]) == count


@pytest.mark.parametrize("name", ["none", "bahdanau", "luong dot"])
def test_the_source_is_projected_once_and_not_at_every_step(name):
    """The program without the steps' own has as many products however long the target is."""
    m = randomised(model(name))
    memory = jax.eval_shape(m.encode, SOURCE)
    lowered = [
        jax.make_jaxpr(m.decode)(np.zeros((B, t), int), jax.tree.map(jnp.zeros_like, memory))
        for t in (3, 5)
    ]
    assert str(lowered[0]).count("dot_general") == str(lowered[1]).count("dot_general")
    (step,) = (str(e.params["jaxpr"]) for e in lowered[0].eqns if e.primitive.name == "scan")
    assert "dot_general" in step
    assert f"[{B},{S},{D}] = dot_general" not in step and f"[{B * S},{D}] = dot_general" not in step


def test_dropout_changes_with_the_key_and_happens_only_with_one():
    plain, apply = apply_to()(SOURCE, TARGET, LENGTHS)[0], apply_to(dropout_rate=0.2)
    assert_close(apply(SOURCE, TARGET, LENGTHS)[0], plain)
    keyed = [apply(SOURCE, TARGET, LENGTHS, jax.random.key(key))[0] for key in (0, 0, 1)]
    np.testing.assert_array_equal(keyed[0], keyed[1])
    assert np.abs(keyed[0] - plain).max() > 1e-2
    assert np.abs(keyed[0] - keyed[2]).max() > 1e-2


@pytest.mark.parametrize("name", ["bahdanau", "luong dot"])
def test_bfloat16_computes_in_bfloat16_between_float32_parameters_and_logits(name):
    m = randomised(model(name, dtype="bfloat16"))
    assert {x.dtype.name for x in jax.tree.leaves(nn.split(m)[1])} == {"float32"}
    outputs, states = jax.eval_shape(m.encode, SOURCE)
    assert outputs.dtype == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(states)} == {"float32"}
    logits, _ = apply_to(name, dtype="bfloat16")(SOURCE, TARGET, LENGTHS)
    assert logits.dtype == "float32"
    assert_close(logits, apply_to(name)(SOURCE, TARGET, LENGTHS)[0], dtype="bfloat16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, r"model\.vocab_size: wanted a positive integer, got 0"),
        ({"source_vocab_size": 0}, r"model\.source_vocab_size: wanted a positive integer"),
        ({"num_layers": 0}, r"model\.num_layers: wanted a positive integer"),
        ({"width": 7}, r"model\.width: two directions need an even one, .* 7"),
        ({"cell": "rnn"}, r"model\.cell: wanted one of \['gru', 'lstm'\], got 'rnn'"),
        ({"attention": "dot"}, r"model\.attention: wanted one of .* got 'dot'"),
        ({"attention": "luong", "score": "cosine"}, r"model\.score: .* got 'cosine'"),
        ({"score": "dot"}, r"model\.score: 'dot' was set, but only model\.attention = 'luong'"),
        ({"input_feeding": True}, r"model\.input_feeding: True was set, but only"),
        ({"dropout_rate": 1.0}, r"model\.dropout_rate: wanted \[0, 1\), got 1\.0"),
        ({"dtype": "float16"}, r"model\.dtype: .* got 'float16'"),
    ],
    ids=repr,
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_without_attention_there_is_no_alignment():
    with pytest.raises(ValueError, match="alignment: wanted a model with attention"):
        model("none").alignment(SOURCE, TARGET)


# The task


@functools.cache
def trained(attention):
    config = RecurrentSeq2SeqConfig(vocab_size=8, width=32, cell="gru", attention=attention)
    return train(RecurrentSeq2Seq(config, rngs=nnx.Rngs(0)), steps=200, learning_rate=1e-2)


@pytest.mark.slow
def test_with_attention_it_learns_to_reverse_and_without_it_learns_less():
    """Bahdanau et al.'s claim: one vector is too narrow for a sentence."""
    m, losses = trained("bahdanau")
    _, without = trained("none")
    assert losses[-10:].mean() < 0.1 < 0.3 < without[-10:].mean()
    assert exact_match(m) > 0.9


def test_the_alignment_of_a_reversal_runs_from_the_last_token_to_the_first():
    m, _ = trained("bahdanau")
    batch = reversal(20_000, 50)
    lengths = batch["lengths"]
    graphdef, params = nn.split(m)
    align = jax.jit(
        lambda p: nn.merge(graphdef, p).alignment(
            batch["source"], batch["target_in"], source_lengths=lengths
        )
    )
    weights = np.asarray(align(params))
    real = batch["weights"] > 0
    assert_close(weights.sum(-1)[real], np.ones(real.sum()))
    mirrored = lengths[:, None] - 1 - np.arange(8)
    found = np.abs(weights.argmax(-1) - mirrored)[real]
    assert (found <= 1).mean() > 0.9 and (found == 0).mean() > 0.6
