"""Log-probabilities of given texts: of all texts of a length they make a distribution."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from qkv_jax import inference, nn
from qkv_jax.models import Decoder, DecoderConfig
from tests.parameters import randomised
from tests.tolerances import assert_close

V = 3
CONFIG = DecoderConfig(vocab_size=V, context=8, num_layers=1, width=12, num_heads=2)


def test_the_probabilities_of_all_continuations_sum_to_1():
    graphdef, params = nn.split(randomised(Decoder(CONFIG, rngs=nnx.Rngs(0))))
    texts = np.array([(1, *rest) for rest in itertools.product(range(V), repeat=3)])
    found = np.asarray(inference.log_probabilities(graphdef, params, texts))
    assert found.shape == (V**3, 3) and (found < 0).all()
    assert_close(np.exp(found.sum(1)).sum(), np.ones(()))
    logits = nn.merge(graphdef, params)(texts)[5, 1]
    assert_close(found[5, 1], jax.nn.log_softmax(logits)[texts[5, 2]])


@pytest.mark.parametrize("wrong", [np.zeros((2, 1), int), np.zeros(3, int), np.zeros((2, 3))])
def test_wrong_tokens_are_named(wrong):
    with pytest.raises(ValueError, match=r"tokens: wanted integers \[B, T\] with T >= 2, got"):
        inference.log_probabilities(*nn.split(Decoder(CONFIG, rngs=nnx.Rngs(0))), wrong)
