"""Generation: one compiled loop with caches against a plain loop over the whole model."""

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
from qkv_jax.ops.cache import QuantizedCache
from qkv_jax.ops.paged import Pages
from tests.parameters import randomised

V, CONTEXT = 23, 10
CONFIG = DecoderConfig(
    vocab_size=V, context=64, num_layers=2, width=12, num_heads=2, position="rotary",
    tie_embeddings=False,
)  # fmt: skip
PROMPT = np.array([[1, 2, 3], [4, 0, 6]])


@functools.cache
def model():
    return nn.split(randomised(Decoder(CONFIG, rngs=nnx.Rngs(0)), scale=1.0))


@functools.cache
def next_logits():
    graphdef, params = model()
    return jax.jit(lambda tokens: nn.merge(graphdef, params)(tokens[None])[0, -1])


def plain(prompt, row, num_tokens, context, seed=0):
    """The text of a row: a window that has grown to `context` goes on from its last half."""
    window, out = list(prompt)[-context:], []
    rng = jax.random.fold_in(jax.random.key(seed), row)
    for i in range(num_tokens):
        logits = next_logits()(np.array(window))
        out.append(int(jax.random.categorical(jax.random.fold_in(rng, i), logits)))
        if len(window) == context:
            window = window[-(context // 2) :]
        window.append(out[-1])
    return out


def generate(prompt=PROMPT, seed=0, **kwargs):
    kwargs = {"num_tokens": 8, "context": CONTEXT} | kwargs
    return np.asarray(inference.generate(*model(), prompt, rng=jax.random.key(seed), **kwargs))


@pytest.mark.parametrize(
    ("length", "num_tokens", "context"),
    [(3, 5, 64), (3, 30, 10), (10, 7, 10), (13, 9, 10), (3, 2, 5), (1, 11, 2), (4, 9, 7)],
    ids=str,
)
def test_the_text_is_that_of_a_plain_loop(length, num_tokens, context):
    prompt = np.random.RandomState(length).randint(0, V, (2, length))
    kwargs = {"num_tokens": num_tokens, "context": context}
    out = generate(prompt, **kwargs)
    assert out.dtype == np.int32
    wanted = [plain(tokens, row, **kwargs) for row, tokens in enumerate(prompt)]
    np.testing.assert_array_equal(out, wanted)
    rng = jax.random.key(0)
    streamed = list(inference.stream(*model(), prompt, rng=rng, **kwargs))
    np.testing.assert_array_equal(np.concatenate(streamed, axis=1), out)


def test_rows_of_different_lengths_are_continued_as_if_each_were_alone():
    lengths = np.array([3, 7, 1])
    prompt = np.random.RandomState(0).randint(0, V, (3, 7))
    for context in (64, 8):
        kwargs = {"num_tokens": 12, "context": context}
        out = generate(prompt, lengths=lengths, **kwargs)
        if context == 64:  # a short row is cut to a half when the longest is
            wanted = [plain(prompt[row, :n], row, **kwargs) for row, n in enumerate(lengths)]
            np.testing.assert_array_equal(out, wanted)
        noise = np.where(np.arange(7) < lengths[:, None], prompt, (prompt + 1) % V)
        np.testing.assert_array_equal(generate(noise, lengths=lengths, **kwargs), out)


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    first = generate(num_tokens=40)
    np.testing.assert_array_equal(generate(num_tokens=40), first)
    assert (generate(num_tokens=40, seed=1) != first).any()
    assert ((first >= 0) & (first < V)).all()


def test_a_row_depends_on_its_number_and_prompt_and_on_no_other_row():
    together = generate(np.concatenate([PROMPT, PROMPT]), num_tokens=20)
    np.testing.assert_array_equal(generate(num_tokens=20), together[:2])
    assert (together[:2] != together[2:]).any(axis=1).all()


def test_samples_of_a_prompt_lie_side_by_side_and_differ():
    out = generate(num_samples=3, num_tokens=20)
    assert out.shape == (6, 20) and len(np.unique(out, axis=0)) == 6
    repeated = generate(np.repeat(PROMPT, 3, axis=0), num_tokens=20)
    np.testing.assert_array_equal(out, repeated)


def test_a_row_ends_with_its_first_stop_token():
    free = generate(num_tokens=40, seed=3)
    stop = (int(free[0, 7]), int(free[1, 20]))
    out = generate(num_tokens=40, seed=3, stop=stop)
    for row, wanted in zip(out, free, strict=True):
        end = next(i for i, token in enumerate(wanted) if token in stop)
        np.testing.assert_array_equal(row[: end + 1], wanted[: end + 1])
        assert (row[end:] == wanted[end]).all()
    rng = jax.random.key(3)
    parts = list(
        inference.stream(
            *model(), PROMPT, rng=rng, num_tokens=400, context=CONTEXT, stop=tuple(range(V))
        )
    )
    assert sum(part.shape[1] for part in parts) <= generation.STREAMED  # it ends early


def test_what_has_been_said_is_made_less_likely():
    logits = jnp.array([[2.0, -2.0, 1.0]])
    seen = jnp.array([[True, True, False]])
    np.testing.assert_allclose(inference.penalised(logits, seen, 4.0), [[0.5, -8.0, 1.0]])
    # A penalty that rules everything out: the prompt and all that was written come once.
    out = generate(num_tokens=12, context=64, top_k=1, repetition_penalty=1e9)
    for row, prompt in zip(out, PROMPT, strict=True):
        assert len({*row, *prompt}) == len(row) + len(prompt)


def test_a_cache_of_int8_writes_nearly_the_same_text():
    kwargs = {"num_tokens": 30, "context": 64, "top_k": 1}
    assert (generate(kind=QuantizedCache, **kwargs) == generate(**kwargs)).mean() > 0.5


def test_rows_on_pages_have_the_text_that_they_have_without():
    """Samples, which cannot share pages, and a text that outgrows the context."""
    kwargs = {"num_samples": 2, "lengths": np.array([3, 1]), "num_tokens": 9, "context": 8}
    np.testing.assert_array_equal(generate(kind=Pages(12, 3), **kwargs), generate(**kwargs))
    kwargs = {"num_tokens": 5, "context": 8}  # one row, whose cache the loop packs
    alone = generate(PROMPT[:1], kind=Pages(3, 3), **kwargs)
    np.testing.assert_array_equal(alone, generate(PROMPT[:1], **kwargs))


def test_another_seed_or_model_compiles_nothing_new():
    chex.clear_trace_counter()
    before = generation._generate._cache_size()
    graphdef, params = model()
    kwargs = {"num_tokens": 3, "context": CONTEXT}
    for seed, values in ((0, params), (5, jax.tree.map(jnp.zeros_like, params))):
        inference.generate(graphdef, values, PROMPT, rng=jax.random.key(seed), **kwargs)
    assert generation._generate._cache_size() == before + 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": np.zeros(3, int)}, r"prompt: wanted integers \[B, P\] .* got .* \[3\]"),
        ({"prompt": np.zeros((2, 0), int)}, r"prompt: .* got int64 \[2, 0\]"),
        ({"prompt": np.zeros((2, 3))}, r"prompt: wanted integers .* got float64 \[2, 3\]"),
        ({"num_tokens": 0}, r"num_tokens: wanted at least 1, got 0"),
        ({"context": 1}, r"context: wanted at least 2, got 1"),
        ({"num_samples": 0}, r"num_samples: wanted at least 1, got 0"),
        ({"prompt": [[1, V]]}, r"prompt: wanted tokens in \[0, V = 23\), got 23"),
        ({"prompt": jnp.array([[-1, 2]])}, r"prompt: wanted tokens in \[0, V = 23\), got -1"),
        ({"sources": [[1, 2]]}, r"sources: wanted one for each of 2 prompts, got 1"),
        ({"sources": PROMPT, "context": 7}, r"context: wanted at least 10, .* got 7"),
        ({"source_lengths": [1, 2]}, r"source_lengths: were given, but no sources"),
        ({"kind": Pages(5, 4)}, r"kind: wanted Pages of at least 6 pages of 4 tokens, .* got 5"),
        ({"lengths": [1, 4]}, r"lengths: wanted \[B\] = \[2\] integers from 1 to 3, got"),
        ({"lengths": [3]}, r"lengths: wanted \[B\] = \[2\]"),
        ({"temperature": 0.0}, r"temperature: wanted"),
        ({"temperature": float("nan")}, r"temperature: wanted"),
        ({"top_k": 0}, r"top_k: wanted"),
        ({"top_p": 2.0}, r"top_p: wanted"),
        ({"top_p": 0.0}, r"top_p: wanted"),
        ({"min_p": 0.0}, r"min_p: wanted"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty: wanted a finite number > 0, got 0"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_wrong_argument_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        generate(**wrong)


def test_a_stream_refuses_a_wrong_argument_before_its_first_token_is_asked_for():
    with pytest.raises(ValueError, match="prompt: wanted tokens"):
        inference.stream(*model(), [[V]], num_tokens=3, context=8, rng=jax.random.key(0))
