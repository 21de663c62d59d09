"""Key/value heads that are alike can be grouped at no cost; of others the mean stands for all."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.models import PRUNABLE, Decoder, DecoderConfig, group_heads, prune_heads
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, V, L, N, H, D = 2, 13, 11, 3, 12, 4, 10
TOKENS = np.random.RandomState(0).randint(0, V, (B, T))
CONFIG = DecoderConfig(
    vocab_size=V, context=T, num_layers=L, width=D, num_heads=N, head_dim=H, mlp_width=7,
    position="rotary", qk_norm=True,
)  # fmt: skip


def decoder(**changes):
    return randomised(Decoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)))


def with_alike_heads(model, num_kv_heads):
    """The model where all key/value heads of a group are its first."""
    graphdef, params = nn.split(model)
    K = model.config.kv_heads
    first = np.arange(K) // (K // num_kv_heads) * (K // num_kv_heads)
    for block in params["blocks"].values():
        for name in {"key", "value"} & block["mixer"].keys():
            for field, x in block["mixer"][name].items():
                heads = x.reshape(*x.shape[:-1], K, H)[..., first, :]
                block["mixer"][name][field] = heads.reshape(x.shape)
    return nn.merge(graphdef, params)


@pytest.mark.parametrize("changes, num_kv_heads", [
    ({}, 3), ({}, 1), ({"num_kv_heads": 6}, 2), ({"share_kv": True}, 4),
    ({"mixer": "linear,attention"}, 3), ({"mixer": "attention,lstm"}, 3),
    ({"position": "alibi"}, 3),
])  # fmt: skip
def test_heads_that_are_alike_are_grouped_at_no_cost(changes, num_kv_heads):
    model = with_alike_heads(decoder(**changes), num_kv_heads)
    grouped = group_heads(model, num_kv_heads)
    assert grouped.config == dataclasses.replace(model.config, num_kv_heads=num_kv_heads)
    assert_close(grouped(TOKENS), model(TOKENS), scale=10)
    assert grouped.state_size(T) < model.state_size(T)
    fresh = Decoder(grouped.config, rngs=nnx.Rngs(0))
    assert nn.split(fresh)[0] == nn.split(grouped)[0]


def test_a_groups_keys_and_values_are_the_mean_of_its_heads():
    model = decoder()
    grouped = group_heads(model, 4)
    x = jnp.asarray(np.random.RandomState(1).randn(B, T, D), jnp.float32)
    q, k, v = model.blocks[1].mixer.project(x)
    grouped_q, grouped_k, grouped_v = grouped.blocks[1].mixer.project(x)
    assert_close(grouped_q, q)
    for new, old in ((grouped_k, k), (grouped_v, v)):
        for group in range(4):
            assert_close(
                new[:, :, group], np.mean(old[:, :, 3 * group : 3 * group + 3], 2), scale=10
            )


@pytest.mark.parametrize("changes, number, words", [
    ({}, 5, ["num_kv_heads: wanted a divisor", "12", "got 5"]),
    ({}, 0, ["num_kv_heads: wanted a divisor", "12", "got 0"]),
    ({"num_kv_heads": 3}, 6, ["num_kv_heads: wanted a divisor", "3", "got 6"]),
    ({"mixer": "attention,talking_heads"}, 3, ["layer 1 is 'talking_heads'", PRUNABLE[0]]),
    ({"share_qk": True}, 3, ["model.share_qk"]),
])  # fmt: skip
def test_heads_that_cannot_be_grouped_are_named(changes, number, words):
    with pytest.raises(ValueError, match=".*".join(words)):
        group_heads(decoder(**changes), number)


def test_layers_of_a_pruned_model_are_not_grouped():
    with pytest.raises(ValueError, match="equally many heads"):
        group_heads(prune_heads(decoder(), {0: [1]}), 2)
