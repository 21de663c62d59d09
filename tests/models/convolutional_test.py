"""Convolutional sequence to sequence: its equations as loops, padding, order, sizes, and a task."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.models import ConvSeq2Seq, ConvSeq2SeqConfig
from tests.models.seq2seq import dependence, exact_match, train
from tests.parameters import randomised
from tests.tolerances import assert_close

B, S, T, V, D = 2, 7, 5, 11, 6
RANDOM = np.random.RandomState(0)
SOURCE, TARGET = RANDOM.randint(0, V, (B, S)), RANDOM.randint(0, V, (B, T))
LENGTHS = np.array([4, 7])
SMALL = ConvSeq2SeqConfig(vocab_size=V, context=13, num_layers=2, width=D)


def model(**changes):
    """The model's structure; `randomised` gives it numbers."""
    config = dataclasses.replace(SMALL, **changes)
    return nnx.eval_shape(lambda: ConvSeq2Seq(config, rngs=nnx.Rngs(0)))


@functools.cache
def apply_to(scale=0.5, **changes):
    """The model with random parameters, as a jitted function."""
    graphdef, params = nn.split(randomised(model(**changes), scale))
    return jax.jit(
        lambda source, target, lengths, rng=None: nn.merge(graphdef, params)(
            source, target, source_lengths=lengths, rng=rng
        )
    )


def expected(m, source, target):
    """Logits [T, V] of one row without padding, in float64."""
    config, (_, p) = m.config, nn.split(m)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
    W, half = config.conv_width, np.sqrt(0.5)

    def glu(layer, x, before):
        """Of the W tokens that begin `before` places before each one; the last one comes first."""
        out = np.zeros_like(x)
        for t in range(len(x)):
            window = [
                x[s] if 0 <= s < len(x) else 0 * x[0] for s in range(t - before, t - before + W)
            ]
            window = np.concatenate(window[::-1])
            value = window @ layer["value"]["kernel"] + layer["value"]["bias"]
            gate = window @ layer["gate"]["kernel"] + layer["gate"]["bias"]
            out[t] = value / (1 + np.exp(-gate))
        return out

    table = p.get("source_embedding", p["embedding"])["embedding"]
    e = table[source] + p["source_positions"]["table"][: len(source)]
    z = e
    for layer in range(config.num_layers):
        z = (glu(p["encoder"][layer], z, W // 2) + z) * half
    values = (z + e) * half

    g = p["embedding"]["embedding"][target] + p["positions"]["table"][: len(target)]
    x = g
    for layer in range(config.num_layers):
        h = glu(p["decoder"][layer], x, W - 1)
        query = p["queries"][layer]
        found = np.zeros_like(h)
        for t in range(len(h)):
            d = (h[t] @ query["kernel"] + query["bias"] + g[t]) * half
            weights = np.exp(z @ d)
            found[t] = weights @ values / weights.sum() * np.sqrt(len(source))
        x = ((h + found) * half + x) * half
    return x @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.mark.parametrize("changes", [{}, {"source_vocab_size": V + 2, "conv_width": 5}], ids=repr)
def test_it_is_its_equations_row_by_row_whatever_the_padding(changes):
    m, logits = randomised(model(**changes)), apply_to(**changes)(SOURCE, TARGET, LENGTHS)
    assert logits.shape == (B, T, V) and logits.dtype == "float32"
    for row, length in enumerate(LENGTHS):
        wanted = expected(m, SOURCE[row, :length], TARGET[row])
        assert_close(logits[row], wanted, scale=20)
    padded = np.where(np.arange(S) < LENGTHS[:, None], SOURCE, (SOURCE + 1) % V)
    assert_close(apply_to(**changes)(padded, TARGET, LENGTHS), logits)


def test_without_lengths_all_of_the_source_counts():
    whole = jax.jit(randomised(model()))(SOURCE, TARGET)
    assert_close(whole, apply_to()(SOURCE, TARGET, np.array([S, S])))


def test_padding_of_the_target_and_rows_without_source():
    logits = apply_to()(SOURCE, TARGET, LENGTHS)
    later = np.where(np.arange(T) < 3, TARGET, (TARGET + 1) % V)
    assert_close(apply_to()(SOURCE, later, LENGTHS)[:, :3], logits[:, :3])
    assert np.isfinite(apply_to()(SOURCE, TARGET, np.array([0, 7]))).all()


@pytest.mark.parametrize("conv_width", [1, 3])
def test_a_logit_depends_on_no_later_target_and_on_all_of_the_source(conv_width):
    m = randomised(model(source_vocab_size=V + 2, conv_width=conv_width))
    target, source = np.arange(T)[None], np.arange(S)[None] + 1
    by_target, by_source = dependence(m, source, target, source_lengths=jnp.array([5]))
    reach = 2 * (conv_width - 1)  # (W - 1) L places back
    distance = np.arange(T)[:, None] - np.arange(T)
    seen = (distance >= 0) & (distance <= reach)
    assert (by_target[seen] > 0).all() and (by_target[~seen] == 0).all()
    assert (by_source[:, :5] > 0).all() and (by_source[:, 5:] == 0).all()


@pytest.mark.parametrize("changes", [{}, {"source_vocab_size": 17}, {"conv_width": 5}], ids=repr)
def test_the_parameters_are_counted_by_the_formula(changes):
    c = dataclasses.replace(SMALL, **changes)
    convolution = 2 * (c.conv_width * D + 1) * D
    count = (V + (c.source_vocab_size or 0)) * D + 2 * c.context * D + (D + 1) * V
    count += c.num_layers * (2 * convolution + (D + 1) * D)
    assert nn.count(nn.split(model(**changes))[1]) == count


def test_layers_neither_grow_nor_shrink_what_they_pass_on():
    """The initial sizes of the paper's section 3.5: ten layers, and the variance is about kept."""
    config = dataclasses.replace(SMALL, width=32, num_layers=10, context=64)
    m = ConvSeq2Seq(config, rngs=nnx.Rngs(0))
    tokens = np.random.RandomState(0).randint(0, V, (B, 53))
    z, _ = jax.jit(m.encode)(tokens)
    size = float(jnp.std(z)) / float(jnp.std(m.source_embedding(tokens)) * 2**0.5)
    assert 0.5 < size < 2


def test_dropout_changes_with_the_key_and_happens_only_with_one():
    plain, apply = apply_to()(SOURCE, TARGET, LENGTHS), apply_to(dropout_rate=0.2)
    assert_close(apply(SOURCE, TARGET, LENGTHS), plain)
    keyed = [apply(SOURCE, TARGET, LENGTHS, jax.random.key(key)) for key in (0, 0, 1)]
    np.testing.assert_array_equal(keyed[0], keyed[1])
    assert np.abs(keyed[0] - plain).max() > 1e-2
    assert np.abs(keyed[0] - keyed[2]).max() > 1e-2


def test_bfloat16_computes_in_bfloat16_between_float32_parameters_and_logits():
    m = randomised(model(dtype="bfloat16"))
    assert {x.dtype.name for x in jax.tree.leaves(nn.split(m)[1])} == {"float32"}
    assert {x.dtype.name for x in jax.eval_shape(m.encode, SOURCE)} == {"bfloat16"}
    logits = apply_to(0.2, dtype="bfloat16")(SOURCE, TARGET, LENGTHS)
    assert logits.dtype == "float32"
    assert_close(logits, apply_to(0.2)(SOURCE, TARGET, LENGTHS), dtype="bfloat16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, r"model\.vocab_size: wanted a positive integer, got 0"),
        ({"context": 0}, r"model\.context: wanted a positive integer"),
        ({"source_vocab_size": -1}, r"model\.source_vocab_size: wanted a positive integer"),
        ({"conv_width": 0}, r"model\.conv_width: wanted a positive integer"),
        ({"dropout_rate": -0.1}, r"model\.dropout_rate: wanted \[0, 1\), got -0\.1"),
        ({"dtype": "float64"}, r"model\.dtype: .* got 'float64'"),
    ],
    ids=repr,
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_it_learns_to_reverse():
    config = ConvSeq2SeqConfig(vocab_size=8, context=8, num_layers=2, width=32)
    trained, losses = train(ConvSeq2Seq(config, rngs=nnx.Rngs(0)), steps=200, learning_rate=5e-3)
    assert losses[-10:].mean() < 0.1
    assert exact_match(trained) > 0.9
