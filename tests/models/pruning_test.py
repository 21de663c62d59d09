"""A pruned decoder computes what the whole one does without the heads that went."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.models import (
    MIXERS,
    PRUNABLE,
    Decoder,
    DecoderConfig,
    attention_inputs,
    attention_maps,
    head_importance,
    least_important,
    prune_heads,
    silence_heads,
)
from qkv_jax.ops.masks import Causal
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, V, L, N, H, D = 2, 13, 11, 3, 6, 4, 10
TOKENS = np.random.RandomState(0).randint(0, V, (B, T))
CONFIG = DecoderConfig(
    vocab_size=V, context=T, num_layers=L, width=D, num_heads=N, head_dim=H, mlp_width=7,
    position="rotary", qk_norm=True,
)  # fmt: skip
SIZES = {"window": 5, "block_size": 4, "num_blocks": 2, "top_k": 3, "num_features": 16}


def decoder(**changes):
    return randomised(Decoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)))


def logits(model):
    graphdef, params = nn.split(model)
    return jax.jit(lambda params: nn.merge(graphdef, params)(TOKENS))(params)


def without_heads(model, heads):
    """The logits where each layer's op has zeros in the place of these heads' outputs."""
    _, params = nn.split(model)
    model = nn.merge(nn.split(model)[0], params)
    for layer, gone in heads.items():
        mixer = model.blocks[layer].mixer
        kept = np.isin(np.arange(mixer.num_heads), list(gone), invert=True)

        def op(q, k, v, own=mixer.op, kept=kept, **kwargs):
            return own(q, k, v, **kwargs) * kept[:, None]

        mixer.op = op
    return logits(model)


GROUPED = {"num_kv_heads": 3}
CASES = [
    ({}, {0: [1, 4], 2: [0, 1, 2, 3, 5]}),
    ({"use_bias": False, "norm": "rms", "activation": "relu_squared"}, {1: [5]}),
    ({"share_kv": True}, {0: [0]}),
    ({"share_qk": True}, {0: [0], 1: [3, 4]}),
    (GROUPED, {0: [0, 1], 2: [2, 3, 4, 5]}),  # whole groups
    (GROUPED, {1: [1, 2, 5]}),  # one of each group
    (GROUPED, {1: [0, 1, 2, 5]}),  # a group, and one of each that is left
    ({"num_kv_heads": 1}, {0: [2, 4]}),
]  # fmt: skip


@pytest.mark.parametrize("changes, heads", CASES, ids=str)
def test_a_pruned_decoder_computes_what_the_whole_one_does_without_those_heads(changes, heads):
    model = decoder(**changes)
    before = nn.split(model)
    pruned = prune_heads(model, heads)
    assert_close(logits(pruned), without_heads(model, heads), scale=10)
    assert_close(logits(silence_heads(model, heads)), without_heads(model, heads), scale=10)
    assert np.abs(logits(pruned) - logits(model)).max() > 0.01
    jax.tree.map(np.testing.assert_array_equal, nn.split(model)[1], before[1])


@pytest.mark.parametrize("mixer", PRUNABLE)
def test_the_heads_of_every_prunable_mixer_may_go(mixer):
    sizes = {field: size for field, size in SIZES.items() if field in MIXERS[mixer].reads}
    model = decoder(mixer=mixer, num_layers=1, **sizes)
    heads = {0: [0, 2, 3]}
    assert_close(logits(prune_heads(model, heads)), without_heads(model, heads), scale=100)


def test_the_matrices_are_smaller_and_the_config_makes_a_model_of_this_size():
    pruned = prune_heads(decoder(num_kv_heads=3), {0: [0, 1], 2: [0, 2, 4]})
    assert pruned.config.heads_per_layer == ((4, 2), (6, 3), (3, 3)) and pruned.config.head_dim == H
    graphdef, params = nn.split(pruned)
    shapes = [
        {name: params["blocks"][layer]["mixer"][name]["kernel"].shape for name in ("query", "key")}
        for layer in range(L)
    ]
    assert shapes == [
        {"query": (D, 4 * H), "key": (D, 2 * H)},
        {"query": (D, 6 * H), "key": (D, 3 * H)},
        {"query": (D, 3 * H), "key": (D, 3 * H)},
    ]
    fresh = nn.split(Decoder(pruned.config, rngs=nnx.Rngs(0)))
    assert fresh[0] == graphdef
    assert jax.tree.map(np.shape, fresh[1]) == jax.tree.map(np.shape, params)
    assert pruned.state_size(T) == 2 * T * H * (2 + 3 + 3)


def test_what_is_pruned_twice_is_what_is_pruned_once():
    model = decoder()
    twice = prune_heads(prune_heads(model, {0: [1], 1: [0]}), {0: [3, 4]})  # once 4 and 5
    once = prune_heads(model, {0: [1, 4, 5], 1: [0]})
    assert twice.config == once.config
    assert_close(logits(twice), logits(once))


def test_a_pruned_decoder_decodes_what_it_computes_at_once():
    pruned = prune_heads(decoder(num_kv_heads=3), {0: [0, 1], 2: [0, 2, 4]})
    graphdef, params = nn.split(pruned)

    @jax.jit
    def step(params, tokens, cache, position):
        model = nn.merge(graphdef, params)
        x, cache = model.extend(tokens, cache, positions=position[None])
        return model.logits(x), cache

    cache, steps = pruned.init_cache(B, T), []
    for t in range(T):
        found, cache = step(params, TOKENS[:, t : t + 1], cache, np.array(t))
        steps.append(found)
    assert_close(np.concatenate(steps, 1), logits(pruned), scale=10)


def test_layers_of_other_mixers_stay_as_they_are():
    model = decoder(mixer="attention,lstm")
    pruned = prune_heads(model, {0: [1, 2], 2: [5]})
    assert pruned.config.heads_per_layer == ((4, 4), (6, 6), (5, 5))
    assert_close(logits(pruned), without_heads(model, {0: [1, 2], 2: [5]}), scale=10)


@pytest.mark.parametrize("changes, heads, words", [
    ({}, {3: [0]}, ["layers from 0 to 2", "got 3"]),
    ({}, {1: [6]}, ["heads from 0 to 5 of layer 1", "got 6"]),
    ({}, {1: range(6)}, ["one of layer 1 to stay", "all of its 6"]),
    (GROUPED, {0: [1]}, ["layer 0", "3 key/value heads", "equally many", r"got \[1\]"]),
    ({"mixer": "talking_heads"}, {0: [1]}, ["layer 0 is 'talking_heads'", "sliding_window"]),
    ({"position": "alibi"}, {0: [1]}, ["positions that know no heads", "'alibi'"]),
    ({"position": "relative"}, {0: [1]}, ["positions that know no heads", "'relative'"]),
])  # fmt: skip
def test_heads_that_cannot_go_are_named(changes, heads, words):
    with pytest.raises(ValueError, match=".*".join(words)):
        prune_heads(decoder(**changes), heads)


@pytest.mark.parametrize("heads, changes, words", [
    (((6, 6), (6, 6)), {}, ["3 layers", "got"]),
    (((6, 6), (6, 6), (6, 4)), {}, ["divide"]),
    (((6, 6), (6, 6), (0, 0)), {}, ["divide"]),
    (((6, 6), (6, 6), 6), {}, ["a pair"]),
    (((5, 5),) * 3, {"head_dim": None, "width": 12}, ["head_dim"]),
    (((6, 6), (5, 5), (6, 6)), {"mixer": "attention,lstm"}, [r"\(6, 6\) in layer 1", "'lstm'"]),
    (((6, 6), (6, 6), (6, 3)), {"share_qk": True}, ["num_kv_heads"]),
])  # fmt: skip
def test_wrong_heads_of_a_config_are_named(heads, changes, words):
    with pytest.raises(ValueError, match=".*".join(words)):
        Decoder(dataclasses.replace(CONFIG, heads_per_layer=heads, **changes), rngs=nnx.Rngs(0))


def test_maps_of_layers_with_different_heads_are_refused_and_of_equal_ones_shown():
    model = decoder()
    ragged, equal = prune_heads(model, {0: [1]}), prune_heads(model, {i: [1] for i in range(L)})
    for look in (attention_maps, attention_inputs):
        with pytest.raises(NotImplementedError, match="layers with 5, 6, 6 heads"):
            look(ragged, TOKENS)
    with pytest.raises(NotImplementedError, match="layers with 5, 6, 6 heads"):
        head_importance(ragged, TOKENS, lambda logits: logits.sum())
    assert attention_maps(equal, TOKENS).shape == (L, B, 5, T, T)
    assert head_importance(equal, TOKENS, lambda logits: logits.sum()).shape == (L, 5)


IMPORTANCE = np.array([[3.0, 0.0, 4.0, 0.0], [0.1, 0.2, 0.2, 0.4], [6.0, 2.0, 3.0, 0.0]])


def test_the_least_important_heads_go_in_the_order_of_their_layers_share():
    # The layers' norms are 5, 0.5 and 7, so that the shares are
    # 0.6 0 0.8 0 | 0.2 0.4 0.4 0.8 | 0.86 0.29 0.43 0
    assert least_important(IMPORTANCE, 0) == {}
    assert least_important(IMPORTANCE, 4) == {0: [1, 3], 1: [0], 2: [3]}
    assert least_important(IMPORTANCE, 6) == {0: [1, 3], 1: [0, 1], 2: [1, 3]}


def test_the_last_head_of_a_layer_stays_whatever_its_importance():
    importance = np.array([[1.0, 1.0, 1.0, 1.0], [5.0, 5.0, 5.0, 0.1]])  # 0.5 ... | 0.58 ... 0.01
    assert least_important(importance, 4) == {0: [0, 1, 2], 1: [3]}
    assert least_important(importance, 5) == {0: [0, 1, 2], 1: [0, 3]}


def test_groups_of_queries_go_together():
    # Sums of pairs, by the layer's norm: 0.6 0.8 | 0.6 1.2 | 1.14 0.43
    assert least_important(IMPORTANCE, 4, num_kv_heads=2) == {0: [0, 1], 2: [2, 3]}


def test_heads_that_went_before_stay_away_and_are_counted():
    gone = {0: [2], 2: [0]}
    assert least_important(IMPORTANCE, 3, gone=gone) == {0: [1, 2], 2: [0]}


@pytest.mark.parametrize("number, kv_heads", [(10, None), (-1, None), (3, 2)])
def test_a_number_of_heads_that_cannot_go_is_named(number, kv_heads):
    with pytest.raises(ValueError, match=f"number: wanted a multiple of .*, got {number}"):
        least_important(IMPORTANCE, number, num_kv_heads=kv_heads)


def test_silent_heads_leave_the_program_as_it_is():
    model = decoder()
    silent = silence_heads(model, {0: range(N)})
    assert nn.split(silent)[0] == nn.split(model)[0]
    x = model.embed(TOKENS)
    out = silent.blocks[0].mixer(x, mask=Causal())
    assert_close(out, np.broadcast_to(model.blocks[0].mixer.out.bias[...], out.shape))
