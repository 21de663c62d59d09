"""Generation: one compiled loop against a plain loop over the model."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import inference, nn
from qkv_jax.inference import generation
from qkv_jax.models import Decoder, DecoderConfig
from tests.parameters import randomised

V, CONTEXT = 7, 5
CONFIG = DecoderConfig(
    vocab_size=V, context=CONTEXT, num_layers=1, width=12, num_heads=2, position="rotary"
)
PROMPT = np.array([[1, 2, 3], [4, 0, 6]])


@functools.cache
def model():
    return nn.split(randomised(Decoder(CONFIG, rngs=nnx.Rngs(0)), scale=1.0))


class Successor(nnx.Module):
    """A model by hand: the next token is the last plus what stood `lag` before it, modulo V."""

    def __init__(self, lag):
        self.lag = lag

    def __call__(self, tokens):
        before = jnp.pad(tokens, ((0, 0), (self.lag, 0)))[:, : tokens.shape[1]]
        return 100 * jax.nn.one_hot((tokens + before) % V, V)


def generate(graphdef, params, prompt=PROMPT, seed=0, **kwargs):
    kwargs = {"num_tokens": 8, "context": CONTEXT} | kwargs
    return np.asarray(
        inference.generate(graphdef, params, prompt, rng=jax.random.key(seed), **kwargs)
    )


def test_a_pattern_is_continued():
    """Fibonacci modulo V, past the end of the window."""
    graphdef, params = nn.split(Successor(lag=1))
    out = generate(graphdef, params, np.array([[1, 1], [2, 5]]), num_tokens=12)
    expected = [[1, 1], [2, 5]]
    for row in expected:
        for _ in range(12):
            row.append((row[-1] + row[-2]) % V)
    np.testing.assert_array_equal(out, np.array(expected)[:, 2:])
    assert out.dtype == np.int32


@pytest.mark.parametrize("context", [2, 3, 4])
def test_the_model_sees_the_last_tokens_of_the_window_alone(context):
    """What stood 3 before the last token counts only where the window reaches so far back."""
    graphdef, params = nn.split(Successor(lag=3))
    text = [1, 2, 3, 4]
    out = generate(graphdef, params, np.array([text]), num_tokens=6, context=context)
    for _ in range(6):
        window = text[-context:]
        text.append((window[-1] + (window[-4] if len(window) > 3 else 0)) % V)
    np.testing.assert_array_equal(out[0], text[4:])


def test_the_most_likely_text_is_that_of_a_plain_loop():
    graphdef, params = model()
    decoder = nn.merge(graphdef, params)
    text = PROMPT.copy()
    apply = jax.jit(lambda tokens: decoder(tokens)[:, -1])
    for _ in range(8):
        text = np.concatenate([text, apply(text[:, -CONTEXT:]).argmax(-1)[:, None]], axis=1)
    np.testing.assert_array_equal(generate(graphdef, params, top_k=1), text[:, 3:])


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    first = generate(*model(), num_tokens=40)
    np.testing.assert_array_equal(generate(*model(), num_tokens=40), first)
    assert (generate(*model(), num_tokens=40, seed=1) != first).any()
    assert ((first >= 0) & (first < V)).all()


def test_a_row_depends_on_no_other_row():
    together = generate(*model(), top_k=1)
    other = np.concatenate([PROMPT[:1], PROMPT[:1]])
    np.testing.assert_array_equal(generate(*model(), other, top_k=1), together[[0, 0]])


def test_a_prompt_longer_than_the_window_is_cut_to_its_end():
    long = np.concatenate([np.array([[5, 5, 5, 5], [6, 6, 6, 6]]), PROMPT], axis=1)
    np.testing.assert_array_equal(
        generate(*model(), long, top_k=1), generate(*model(), long[:, -CONTEXT:], top_k=1)
    )


def test_another_seed_or_model_compiles_nothing_new():
    chex.clear_trace_counter()
    before = generation._generate._cache_size()
    graphdef, params = model()
    generate(graphdef, params, num_tokens=3)
    generate(graphdef, jax.tree.map(jnp.zeros_like, params), num_tokens=3, seed=5)
    assert generation._generate._cache_size() == before + 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": np.zeros(3, int)}, r"prompt: wanted integers \[B, P\] .* got .* \[3\]"),
        ({"prompt": np.zeros((2, 0), int)}, r"prompt: .* got int32 \[2, 0\]"),
        ({"prompt": np.zeros((2, 3))}, r"prompt: wanted integers .* got float32 \[2, 3\]"),
        ({"num_tokens": 0}, r"num_tokens, context: wanted at least 1 each, got 0 and 5"),
        ({"context": 0}, r"num_tokens, context: wanted at least 1 each, got 8 and 0"),
        ({"temperature": 0.0}, r"temperature: wanted"),
        ({"top_k": 0}, r"top_k: wanted"),
        ({"top_p": 2.0}, r"top_p: wanted"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_wrong_argument_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        generate(*nn.split(Successor(1)), **wrong)
