"""Greedy translation: the likeliest token after the likeliest tokens, up to the end."""

import jax
import numpy as np
import pytest
from flax import nnx

from qkv_jax import inference, nn
from qkv_jax.models import (
    ConvSeq2Seq,
    ConvSeq2SeqConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    RecurrentSeq2Seq,
    RecurrentSeq2SeqConfig,
)
from tests.parameters import randomised

B, S, T, V = 3, 5, 7, 11
BEGIN, END = 9, 10
SOURCES = np.random.RandomState(0).randint(0, BEGIN, (B, S)).astype(np.int32)
LENGTHS = np.array([5, 2, 3])
SIZES = {"vocab_size": V, "num_layers": 2, "width": 12}


def transformer():
    config = EncoderDecoderConfig(**SIZES, context=S + T, num_heads=2, use_bias=False)
    return EncoderDecoder(config, rngs=nnx.Rngs(0))


def recurrent():
    return RecurrentSeq2Seq(RecurrentSeq2SeqConfig(**SIZES), rngs=nnx.Rngs(0))


def convolutional():
    return ConvSeq2Seq(ConvSeq2SeqConfig(**SIZES, context=S + T), rngs=nnx.Rngs(0))


def translated(model, sources=SOURCES, lengths=LENGTHS, num_tokens=T):
    graphdef, params = nn.split(model)
    found = inference.translate(
        graphdef, params, sources, lengths, begin=BEGIN, end=END, num_tokens=num_tokens
    )
    return np.asarray(found)


@pytest.mark.parametrize("make", [transformer, recurrent, convolutional])
def test_each_token_is_the_likeliest_after_those_before_it(make):
    model = randomised(make())
    found = translated(model)
    assert found.shape == (B, T) and found.dtype == np.int32
    assert len(np.unique(found)) > 2
    target_in = np.concatenate([np.full((B, 1), BEGIN), found[:, :-1]], axis=1)
    graphdef, params = nn.split(model)
    apply = jax.jit(
        lambda *arrays: nn.merge(graphdef, params)(*arrays[:2], source_lengths=arrays[2])
    )
    likeliest = np.asarray(apply(SOURCES, target_in, LENGTHS).argmax(-1))
    written = np.cumsum(found == END, axis=1) - (found == END) == 0  # up to the end
    assert written.sum() > T
    np.testing.assert_array_equal(found[written], likeliest[written])


def test_after_its_end_a_row_is_ends_alone_whatever_the_others_do():
    class Model(nnx.Module):
        def encode(self, sources, *, source_lengths):
            return source_lengths

        def decode(self, target_in, memory, *, source_lengths):
            place = np.arange(target_in.shape[1])
            ends = place == memory[:, None] - 1  # the end comes at the source's length, once
            return jax.nn.one_hot(np.where(False, 0, 1) + 9 * ends, V)

    found = translated(Model())
    assert found.tolist() == [[1] * 4 + [END] * 3, [1] + [END] * 6, [1] * 2 + [END] * 5]
    assert translated(Model(), num_tokens=3)[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sources": SOURCES[0]}, r"sources: wanted integers \[B, S\], got int32 \[5\]"),
        ({"sources": SOURCES * 1.0}, "sources: .* got float32"),
        ({"lengths": LENGTHS[:2]}, r"source_lengths: wanted shape \[3\].* got \[2\]"),
        ({"num_tokens": 0}, "num_tokens: wanted at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        translated(recurrent(), **changes)
