"""The decoder: its sizes, its causality, and what each of its fields changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.models import Decoder, DecoderConfig, attention_maps, interpolate_positions
from qkv_jax.ops import masks, scores
from qkv_jax.ops.positions import alibi_slopes
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, V = 2, 5, 7
TOKENS = np.random.RandomState(0).randint(0, V, (B, T))
SMALL = DecoderConfig(vocab_size=V, context=11, num_layers=2, width=12, num_heads=2)
LLAMA = dataclasses.replace(
    SMALL, num_heads=6, num_kv_heads=3, mlp_width=13, activation="swiglu", norm="rms",
    position="rotary", use_bias=False, tie_embeddings=False,
)  # fmt: skip
RECIPE = dataclasses.replace(
    LLAMA, num_kv_heads=None, activation="relu_squared", qk_norm=True, logit_softcap=15.0
)


def decoder(config=SMALL, **changes):
    return Decoder(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))


def count(config, **changes):
    """How many parameters, without making them."""
    params = jax.eval_shape(lambda: nn.split(decoder(config, **changes))[1])
    return sum(x.size for x in jax.tree.leaves(params))


# Sizes


@pytest.mark.parametrize("config", [SMALL, LLAMA, RECIPE], ids=["gpt2", "llama", "recipe"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"use_bias": True},
        {"use_bias": False},
        {"head_dim": 4},
        {"num_kv_heads": 1},
        {"share_kv": True},
        {"qk_norm": True},
        {"norm": "layer"},
        {"norm": "zero_centered_rms"},
        {"norm_position": "post"},
        {"norm_position": "both"},
        {"position": "learned"},
        {"position": "sinusoidal"},
    ],
    ids=repr,
)
def test_the_parameters_are_counted_by_the_formula(config, changes):
    c = dataclasses.replace(config, **changes)
    D, F, N, K, H = c.width, c.hidden, c.num_heads, c.kv_heads, c.attention_dim
    bias = int(c.use_bias)
    attention = (D + bias) * N * H + (1 if c.share_kv else 2) * (D + bias) * K * H
    attention += (N * H + bias) * D + (2 * H if c.qk_norm else 0)
    feed_forward = (2 if c.activation == "swiglu" else 1) * (D + bias) * F + (F + bias) * D
    norm = D * (2 if c.use_bias and c.norm == "layer" else 1)
    norms = 4 if c.norm_position == "both" else 2
    expected = V * D + c.num_layers * (attention + feed_forward + norms * norm)
    expected += 0 if c.norm_position == "post" else norm
    expected += c.context * D if c.position == "learned" else 0
    expected += 0 if c.tie_embeddings else D * V
    assert count(config, **changes) == expected


def test_the_counts_are_those_that_others_publish():
    """nanoGPT prints 0.80M for its CPU setting; GPT-2 small is 124,439,808, positions included."""
    nanogpt = DecoderConfig(
        vocab_size=65, context=64, num_layers=4, width=128, num_heads=4, use_bias=False
    )
    assert count(nanogpt) == 804_096
    gpt2 = DecoderConfig(
        vocab_size=50_257, context=1024, num_layers=12, width=768, num_heads=12,
        activation="gelu_tanh",
    )  # fmt: skip
    assert count(gpt2) == 124_439_808
    llama_7b = DecoderConfig(
        vocab_size=32_000, context=4096, num_layers=32, width=4096, num_heads=32,
        mlp_width=11_008, activation="swiglu", norm="rms", position="rotary", use_bias=False,
        tie_embeddings=False,
    )  # fmt: skip
    assert count(llama_7b) == 6_738_415_616


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_parameters_are_float32_and_initial_sizes_those_of_gpt2_or_the_config(std):
    _, params = nn.split(decoder(width=96, num_heads=4, vocab_size=53, init_std=std))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    block = params["blocks"][0]
    for kernel, deviation in (
        (params["embedding"]["embedding"], std),
        (params["positions"]["table"], std),
        (block["mixer"]["query"]["kernel"], std),
        (block["feed_forward"]["up"]["kernel"], std),
        (block["mixer"]["out"]["kernel"], std / 2),  # 1 / sqrt(2 L), two layers
        (block["feed_forward"]["down"]["kernel"], std / 2),
    ):
        assert abs(np.std(kernel) / deviation - 1) < 0.1


# What a logit depends on


@functools.cache
def model(position="learned", norm_position="pre", config=SMALL):
    return randomised(decoder(config, position=position, norm_position=norm_position))


@pytest.mark.parametrize(
    ("position", "norm_position"),
    [
        ("learned", "pre"),
        ("learned", "post"),
        ("sinusoidal", "pre"),
        ("rotary", "pre"),
        ("none", "pre"),
    ],
)
def test_no_logit_depends_on_a_later_token(position, norm_position):
    """By a gradient: the logits at t have derivative 0 in the embedding of every later token."""
    m = model(position, norm_position)

    def logits_by_token(x):
        for block in m.blocks:
            x = block(x, mask=masks.Causal())
        return (m.logits(x) ** 2).sum((0, 2))  # [T]

    jacobian = jax.jit(jax.jacrev(logits_by_token))(m.embed(TOKENS))  # [T, B, T, D]
    by_pair = np.abs(jacobian).sum((1, 3))
    assert (np.triu(by_pair, 1) == 0).all()
    assert (np.tril(by_pair)[np.tril_indices(T)] > 0).all()


@pytest.mark.parametrize("config", [SMALL, LLAMA, RECIPE], ids=["gpt2", "llama", "recipe"])
def test_later_tokens_change_no_logit_and_each_token_changes_its_own(config):
    m = jax.jit(randomised(decoder(config)))
    logits = np.asarray(m(TOKENS))
    assert logits.shape == (B, T, V) and logits.dtype == np.float32
    changed = TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % V
    after = np.asarray(m(changed))
    assert_close(after[:, :3], logits[:, :3])
    assert (np.abs(after[:, 3:] - logits[:, 3:]).max((0, 2)) > 1e-3).all()
    longer = np.concatenate([TOKENS, TOKENS[:, :2]], axis=1)
    assert_close(m(longer)[:, :T], logits, scale=10)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "alibi", "relative"])
def test_positions_say_where_the_tokens_stand(position):
    m = model(position)
    # Tokens in another order, told where they stand, have the logits of the right order.
    order = np.array([3, 0, 4, 1, 2])
    assert_close(m(TOKENS[:, order], positions=order), m(TOKENS)[:, order], scale=50)
    shifted = np.abs(m(TOKENS, positions=np.arange(T) + 3) - m(TOKENS)).max()
    if position in ("learned", "sinusoidal"):
        assert shifted > 1e-2
    else:  # distances alone
        assert shifted < 1e-3


@pytest.mark.parametrize("position", ["alibi", "relative"])
def test_positions_that_are_a_score_reach_the_logits_of_every_layer(position):
    m = model(position)
    if position == "alibi":
        score = scores.Alibi(alibi_slopes(SMALL.num_heads))
    else:
        score = scores.RelativeBias(m.bias[...], bidirectional=False, max_distance=128)
        assert m.bias.shape == (32, SMALL.num_heads)
    x = m.embed(TOKENS)
    for block in m.blocks:
        x = block(x, mask=masks.Causal(), score=score)
    assert_close(m(TOKENS), m.logits(x))
    assert np.abs(m(TOKENS) - m(TOKENS, positions=np.arange(T) * 3)).max() > 1e-3


def test_positions_that_are_a_score_need_attention():
    with pytest.raises(ValueError, match=r"model\.position: alibi .* model\.mixer = 'lstm'"):
        decoder(mixer="lstm", position="alibi")
    decoder(mixer="lstm,attention", position="alibi")


def test_a_cap_of_the_logits_reaches_attention_and_needs_it():
    m = model(config=dataclasses.replace(SMALL, attention_softcap=0.5))
    x = m.embed(TOKENS)
    for block in m.blocks:
        x = block(x, mask=masks.Causal(), score=scores.Softcap(0.5))
    assert_close(m(TOKENS), m.logits(x))
    assert np.abs(m(TOKENS) - model()(TOKENS)).max() > 1e-2
    with pytest.raises(ValueError, match=r"model\.attention_softcap: .* model\.mixer = 'lstm'"):
        decoder(mixer="lstm", attention_softcap=0.5)


def test_embeddings_and_logits_are_scaled_where_asked_for():
    plain, root = model(), SMALL.width**0.5
    scaled = model(config=dataclasses.replace(SMALL, scale_embeddings=True, scale_logits=True))
    token = plain.embedding(TOKENS)
    assert_close(scaled.embed(TOKENS) - plain.embed(TOKENS), (root - 1) * token, scale=4)
    x = plain.embed(TOKENS)
    assert_close(scaled.logits(x) * root, plain.logits(x), scale=4)


def test_local_layers_may_have_a_rotation_of_their_own():
    config = dataclasses.replace(
        SMALL, position="rotary", mixer="sliding_window,attention", window=2, rotary_base=1e6,
        rotary_scaling=(8.0,), local_rotary_base=100.0,
    )  # fmt: skip
    local, far = (block.mixer for block in decoder(config).blocks)
    assert (local.rotary_base, local.rotary_scaling) == (100.0, None)
    assert (far.rotary_base, far.rotary_scaling) == (1e6, (8.0,))
    # A factor alone divides the positions.
    stretched = model(
        "rotary", config=dataclasses.replace(SMALL, position="rotary", rotary_scaling=(3.0,))
    )
    assert_close(stretched(TOKENS, positions=3 * np.arange(T)), model("rotary")(TOKENS), scale=10)


def test_interpolated_positions_are_those_of_a_text_stretched_by_the_factor():
    m = model("rotary")
    stretched = np.arange(T) * 4
    assert_close(interpolate_positions(m, 4.0)(TOKENS, positions=stretched), m(TOKENS), scale=10)
    assert_close(m(TOKENS), model("rotary")(TOKENS))  # as it was
    with pytest.raises(ValueError, match="rotary positions, got 'learned'"):
        interpolate_positions(model("learned"), 2.0)
    with pytest.raises(ValueError, match=r"factor: wanted a positive number, got 0"):
        interpolate_positions(m, 0)


def test_the_scale_of_the_logits_is_what_the_config_says():
    H = SMALL.attention_dim
    plain = randomised(decoder())
    maps = {
        s: attention_maps(randomised(decoder(attention_scale=s)), TOKENS)[0] for s in (1.0, 2.0)
    }
    assert_close(attention_maps(randomised(decoder(attention_scale=H**-0.5)), TOKENS),
                 attention_maps(plain, TOKENS))  # fmt: skip
    # Of the first layer, whose input no scale has changed: softmax of twice the logits.
    squares = np.asarray(maps[1.0]) ** 2
    assert_close(maps[2.0], squares / squares.sum(-1, keepdims=True), scale=10)


def test_without_a_feed_forward_network_a_block_only_mixes():
    m = randomised(decoder(mlp_width=0))
    x = m.embed(TOKENS)
    for block in m.blocks:
        assert block.feed_forward is None and block.feed_forward_norm is None
        x = x + block.mixer(block.mixer_norm(x), mask=masks.Causal())
    assert_close(m(TOKENS), m.logits(x))
    assert nn.count(nn.split(m)[1]) < nn.count(nn.split(model())[1])


def test_without_positions_the_past_is_a_bag_of_tokens():
    m = model("none")
    order = np.array([2, 0, 3, 1, 4])
    # The last token of one block; two blocks see order through the causal mask.
    one = nn.merge(*nn.split(m))
    one.blocks = nnx.List(one.blocks[:1])
    one.config = dataclasses.replace(SMALL, num_layers=1, position="none")
    assert_close(one(TOKENS[:, order])[:, -1], one(TOKENS)[:, -1], scale=50)


def test_segments_isolate_packed_documents():
    m = model("rotary")
    apply = jax.jit(m)
    packed = m(TOKENS, mask=masks.Segments(np.array([0, 0, 1, 1, 1])))
    assert_close(packed[:, :2], apply(TOKENS[:, :2]), scale=50)
    assert_close(packed[:, 2:], apply(TOKENS[:, 2:]), scale=50)  # rotary: shifts do not matter
    assert np.abs(packed - m(TOKENS)).max() > 1e-2


def test_a_learned_position_past_the_table_gives_nan_and_not_its_last_row():
    m = model()
    assert np.isfinite(m(TOKENS, positions=np.arange(T) + 6)).all()
    assert np.isnan(m(TOKENS, positions=np.arange(T) + 7)[:, -1]).all()


# What the fields do


def test_the_softcap_bounds_the_logits_and_keeps_their_order():
    logits = model()(TOKENS)
    capped = randomised(decoder(logit_softcap=0.7))(TOKENS)
    assert np.abs(logits).max() > 0.7 > np.abs(capped).max()
    assert_close(capped, 0.7 * np.tanh(np.asarray(logits) / 0.7))


@pytest.mark.parametrize("tied", [True, False])
def test_zero_init_outputs_start_from_the_embedding_or_from_nothing(tied):
    m = decoder(RECIPE, zero_init_outputs=True, tie_embeddings=tied)
    if tied:  # each block starts as the identity
        assert_close(m(TOKENS), m.logits(m.embed(TOKENS)))
    else:
        np.testing.assert_array_equal(m(TOKENS), 0)  # uniform: the loss is log V


def test_tied_and_untied_heads():
    m = model()
    x = jnp.asarray(np.random.RandomState(0).randn(B, T, 12), jnp.float32)
    assert_close(m.logits(x), m.final_norm(x) @ m.embedding.embedding[...].T, scale=5)
    untied = randomised(decoder(tie_embeddings=False))
    assert_close(untied.logits(x), untied.final_norm(x) @ untied.head.kernel[...], scale=5)


def test_remat_changes_neither_loss_nor_gradients():
    def value_and_gradients(remat):
        m = randomised(decoder(LLAMA, num_layers=1, remat=remat, dropout_rate=0.3))
        graphdef, params = nn.split(m)

        def loss(params):
            logits = nn.merge(graphdef, params)(TOKENS, rng=jax.random.key(0))
            return (logits**2).mean()

        jaxpr = str(jax.make_jaxpr(jax.grad(loss))(params))
        return jax.jit(jax.value_and_grad(loss))(params), "remat" in jaxpr or "checkpoint" in jaxpr

    plain, was_remat = value_and_gradients(False)
    rematerialised, is_remat = value_and_gradients(True)
    assert is_remat and not was_remat
    for a, b in zip(jax.tree.leaves(rematerialised), jax.tree.leaves(plain), strict=True):
        assert_close(a, b, scale=10)


def test_bfloat16_computes_in_bfloat16_between_float32_parameters_and_logits():
    m = randomised(decoder(RECIPE, dtype="bfloat16"), scale=0.1)
    assert m.embed(TOKENS).dtype == "bfloat16"
    assert m(TOKENS).dtype == "float32"
    assert {x.dtype.name for x in jax.tree.leaves(nn.split(m)[1])} == {"float32"}
    assert_close(m(TOKENS), randomised(decoder(RECIPE), scale=0.1)(TOKENS), dtype="bfloat16")


def test_dropout_changes_with_the_key_and_happens_only_with_one():
    plain = model()(TOKENS)
    m = randomised(decoder(dropout_rate=0.2))
    np.testing.assert_array_equal(m(TOKENS), plain)
    first = m(TOKENS, rng=jax.random.key(0))
    np.testing.assert_array_equal(first, m(TOKENS, rng=jax.random.key(0)))
    assert np.abs(first - plain).max() > 1e-2
    assert np.abs(first - m(TOKENS, rng=jax.random.key(1))).max() > 1e-2
    np.testing.assert_array_equal(model()(TOKENS, rng=jax.random.key(0)), plain)


def test_sinusoidal_positions_join_embeddings_of_their_own_size():
    m = model("sinusoidal")
    embedding = np.asarray(m.embedding.embedding[...])[TOKENS]
    sines = nn.SinusoidalPositions(12)(np.arange(T))
    assert_close(m.embed(TOKENS), embedding * 12**0.5 + sines, scale=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, r"model\.vocab_size: wanted a positive integer, got 0"),
        ({"context": -1}, r"model\.context: wanted a positive integer"),
        ({"num_layers": 0}, r"model\.num_layers: wanted a positive integer"),
        ({"width": 0}, r"model\.width: wanted a positive integer"),
        ({"mlp_width": -1}, r"model\.mlp_width: wanted an integer >= 0, got -1"),
        ({"num_heads": 5}, r"model\.num_heads: wanted a divisor of model\.width = 12 .* got 5"),
        ({"num_kv_heads": 3}, r"model\.num_kv_heads: wanted a divisor of model\.num_heads = 2"),
        ({"share_qk": True, "num_kv_heads": 1}, r"model\.share_qk: "),
        ({"mixer": "mamba"}, r"model\.mixer: wanted one of .* got 'mamba'"),
        ({"activation": "tanh"}, r"model\.activation: wanted one of .* got 'tanh'"),
        ({"norm": "batch"}, r"model\.norm: wanted one of .* got 'batch'"),
        ({"norm_position": "mid"}, r"model\.norm_position: .* got 'mid'"),
        ({"position": "rope"}, r"model\.position: .* got 'rope'"),
        ({"dtype": "float16"}, r"model\.dtype: .* got 'float16'"),
        ({"position": "rotary", "head_dim": 3}, r"model\.position: rotary .* got .* = 3"),
        ({"position": "sinusoidal", "width": 13, "head_dim": 2}, r"model\.width: sinusoidal"),
        ({"dropout_rate": 1.0}, r"model\.dropout_rate: wanted \[0, 1\), got 1\.0"),
        ({"dropout_rate": float("nan")}, r"model\.dropout_rate: .* got nan"),
        ({"logit_softcap": -1.0}, r"model\.logit_softcap: wanted >= 0, got -1\.0"),
        ({"logit_softcap": float("inf")}, r"model\.logit_softcap: .* got inf"),
        ({"attention_scale": 0.0}, r"model\.attention_scale: wanted a number > 0, got 0\.0"),
        ({"attention_scale": float("inf")}, r"model\.attention_scale: .* got inf"),
        ({"init_std": -0.1}, r"model\.init_std: wanted a number > 0, got -0\.1"),
        ({"rotary_base": 1.0}, r"model\.rotary_base: wanted > 1, got 1\.0"),
        ({"norm_epsilon": 0.0}, r"model\.norm_epsilon: wanted a number > 0, got 0\.0"),
        ({"position": "rotary", "rotary_scaling": (8.0, 1.0)}, "wanted a factor, or four numbers"),
        ({"local_rotary_base": 100.0}, r"local_rotary_base: .* 'learned' has no frequencies"),
        (
            {"position": "rotary", "local_rotary_base": 100.0},
            r"model\.local_rotary_base: .* these do: sliding_window",
        ),
        (
            {"position": "rotary", "local_rotary_base": 1.0, "mixer": "sliding_window"},
            r"model\.local_rotary_base: wanted > 1, got 1.0",
        ),
        ({"attention_softcap": -1.0}, r"model\.attention_softcap: wanted >= 0, got -1.0"),
        ({"position": "none", "rotary_scaling": (8.0, 1.0, 4.0, 64)}, "'none' has no frequencies"),
        (
            {"position": "rotary", "rotary_scaling": (8.0, 1.0, 4.0, 64), "mixer": "retention"},
            r"model\.rotary_scaling: .* no layer of model\.mixer = 'retention' reads it",
        ),
    ],
    ids=repr,
)  # fmt: skip
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
