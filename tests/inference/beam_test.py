"""Beam search against all texts that there are, and against the likeliest token each time."""

import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from qkv_jax import inference, nn
from qkv_jax.inference.beam import Beams
from qkv_jax.models import Decoder, DecoderConfig, EncoderDecoder, EncoderDecoderConfig
from qkv_jax.ops.cache import QuantizedCache
from qkv_jax.ops.paged import Pages
from tests.inference import generation_test
from tests.parameters import randomised
from tests.tolerances import assert_close

V, T, STOP = 3, 4, 2
SIZES = {"vocab_size": V, "context": 16, "num_layers": 2, "width": 12, "num_heads": 2}
PROMPT = np.array([[0, 1, 0, 1, 1], [1, 1, 0, 0, 1]])
SOURCES, SOURCE_LENGTHS = np.array([[0, 1, 2, 1, 0, 1, 2], [2, 2, 1, 0, 1, 1, 1]]), np.array([7, 3])


@functools.cache
def decoder():
    config = DecoderConfig(**SIZES, position="rotary", tie_embeddings=False)
    return nn.split(randomised(Decoder(config, rngs=nnx.Rngs(0)), scale=0.7))


@functools.cache
def encoder_decoder():
    config = EncoderDecoderConfig(**SIZES, position="sinusoidal")
    return nn.split(randomised(EncoderDecoder(config, rngs=nnx.Rngs(0)), scale=0.7))


def search(*, model=decoder, prompt=PROMPT, **kwargs):
    kwargs = {"num_tokens": T, "context": 16, "stop": (STOP,)} | kwargs
    found = inference.beam_search(*model(), prompt, **kwargs)
    return np.asarray(found.tokens), np.asarray(found.scores)


def all_texts(stop=STOP):
    """Every text of up to T tokens: [n, T], filled up with the stop token, and their lengths."""
    texts = np.array(list(itertools.product(range(V), repeat=T)))
    lengths = np.where((texts == stop).any(1), (texts == stop).argmax(1) + 1, T)
    texts = np.where(np.arange(T) < lengths[:, None], texts, stop)
    texts, first = np.unique(texts, axis=0, return_index=True)
    return texts, lengths[first]


def log_probabilities(model, row, texts, lengths, sourced):
    """The sum of the log probabilities of each text after a row's prompt, and its source."""
    prompt = PROMPT[row]
    read = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1)[:, :-1]
    sources = np.tile(SOURCES[row, : SOURCE_LENGTHS[row]], (len(texts), 1)) if sourced else None
    graphdef, params = model()
    logits = jax.jit(lambda *read: nn.merge(graphdef, params)(*read))(
        *([sources, read] if sourced else [read])
    )
    logs = np.asarray(jax.nn.log_softmax(logits[:, len(prompt) - 1 :]))
    each = np.take_along_axis(logs, texts[..., None], axis=-1)[..., 0]
    return np.where(np.arange(T) < lengths[:, None], each, 0).sum(1)


@pytest.mark.parametrize("model", [decoder, encoder_decoder])
def test_as_many_beams_as_there_are_texts_find_the_best_of_all_texts(model):
    sourced = {"sources": SOURCES, "source_lengths": SOURCE_LENGTHS}
    sourced = sourced if model is encoder_decoder else {}
    texts, lengths = all_texts()
    logs = [log_probabilities(model, row, texts, lengths, sourced) for row in range(2)]
    for length_penalty in (-1.0, 0.0, 1.0, 3.0):
        found, scores = search(
            model=model, beams=V**T, num_results=7, length_penalty=length_penalty, **sourced
        )
        for row in range(2):
            wanted = logs[row] / lengths.astype(float) ** length_penalty
            best = np.argsort(-wanted)[:7]
            np.testing.assert_array_equal(found[row], texts[best])
            assert_close(scores[row], wanted[best].astype(np.float32), scale=3)


def test_a_search_ends_where_nothing_better_can_come_and_not_before():
    """Logits at random, whatever came before: going on after the end changes no result."""
    B, K, V, T, n = 2, 5, 7, 11, 3

    @jax.jit
    def run(beams, rng):
        def step(beams, rng):
            after, *_ = beams.choose(4 * jax.random.normal(rng, (B * K, V)))
            found = jax.tree.map(lambda x: x[:, :n], after.found)
            return after, (after.ended, found)

        return jax.lax.scan(step, beams, jax.random.split(rng, T))[1]

    early = 0
    for seed, length_penalty in itertools.product(range(5), (-1.0, 0.0, 0.7, 2.0)):
        none = Beams.none(B, K, T, length_penalty=length_penalty, num_results=n, stop=(0, 3))
        ended, (tokens, scores) = jax.tree.map(np.asarray, run(none, jax.random.key(seed)))
        assert ended[-1] and not ended[0]
        end = int(ended.argmax())
        early += end < T - 1
        assert (np.isfinite(scores[end])).all() and (np.diff(scores[-1], axis=1) <= 0).all()
        np.testing.assert_array_equal(scores[end], scores[-1])
        np.testing.assert_array_equal(tokens[end], tokens[-1])
    assert 5 < early < 20


def test_one_beam_is_the_likeliest_token_each_time():
    prompt = np.random.RandomState(0).randint(0, generation_test.V, (7, 3))
    shared = {"num_tokens": 13, "context": 10}  # longer than the context
    greedy = generation_test.generate(prompt, top_k=1, **shared)
    found, _ = search(model=generation_test.model, prompt=prompt, beams=1, stop=(), **shared)
    np.testing.assert_array_equal(found[:, 0], greedy)
    assert len(np.unique(greedy)) > 2


def test_rows_of_different_lengths_and_int8_find_what_a_row_alone_finds():
    lengths = np.array([5, 3])
    shared = {"beams": 3, "num_results": 3}
    found, scores = search(lengths=lengths, **shared)
    alone, own = search(prompt=PROMPT[1:, :3], **shared)
    np.testing.assert_array_equal(found[1:], alone)
    assert_close(scores[1:], own)
    _, near = search(kind=QuantizedCache, lengths=lengths, **shared)
    assert_close(near, scores, dtype="bfloat16")
    assert (near != scores).any()


def test_where_there_are_fewer_texts_than_results_their_scores_say_so():
    found, scores = search(beams=5, num_results=5, num_tokens=1)
    assert np.isfinite(scores[:, :V]).all() and (scores[:, V:] == -np.inf).all()
    assert (np.sort(found[:, :V, 0]) == np.arange(V)).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beams": 0}, "beams: wanted at least 1, got 0"),
        ({"num_results": 4}, "num_results: wanted at most beams = 3, got 4"),
        ({"length_penalty": float("nan")}, "length_penalty: wanted a finite number, got nan"),
        ({"kind": Pages(99)}, "kind: wanted a cache whose rows can be copied, got Pages"),
        ({"prompt": [[0, V]]}, r"prompt: wanted tokens in \[0, V = 3\), got 3"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_wrong_argument_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        search(**{"beams": 3} | wrong)
