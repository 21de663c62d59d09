"""Reading in parts: the decoders with caches against one call of the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.models import Decoder, DecoderConfig, EncoderDecoder, EncoderDecoderConfig
from qkv_jax.ops.cache import Cache, QuantizedCache, check_room
from qkv_jax.ops.paged import Pages
from tests.parameters import randomised
from tests.tolerances import assert_close

B, S, T, V = 3, 7, 13, 11
RANDOM = np.random.RandomState(0)
TOKENS, SOURCE = RANDOM.randint(0, V, (B, T)), RANDOM.randint(0, V, (B, S))
ROWS = np.arange(B)[:, None]
CONFIGS = {
    "learned": {},
    "sinusoidal": {"position": "sinusoidal", "norm_position": "post"},
    "rotary": {
        "position": "rotary", "norm": "rms", "norm_position": "both", "qk_norm": True,
        "num_heads": 6, "num_kv_heads": 3, "activation": "swiglu", "tie_embeddings": False,
        "logit_softcap": 5.0,
    },
    "relative": {"position": "relative", "relative_buckets": 6, "relative_distance": 5},
    "alibi": {"position": "alibi", "attention_softcap": 2.0, "attention_scale": 0.7},
    "shared": {"share_kv": True, "num_kv_heads": 1},
    "value_residual": {"mixer": "value_residual", "position": "rotary"},
    "latent": {"mixer": "latent"},
    "hybrid": {
        "mixer": "sliding_window,latent,gated_delta,lstm", "num_layers": 4, "window": 3,
        "position": "rotary",
    },
}  # fmt: skip
every_config = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def decoder(name, dtype="float32"):
    """A decoder with random parameters; jitted, the logits of a text, and `extend` with logits."""
    settings = {"num_layers": 2, "num_heads": 2, "dtype": dtype} | CONFIGS[name]
    config = DecoderConfig(vocab_size=V, context=16, width=12, **settings)
    structure = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    model = randomised(structure, scale=0.3)
    graphdef, params = nn.split(model)

    @jax.jit
    def extend(tokens, cache, positions, lengths=None):
        model = nn.merge(graphdef, params)
        x, cache = model.extend(tokens, cache, positions=positions, lengths=lengths)
        return model.logits(x), cache

    return model, jax.jit(lambda tokens: nn.merge(graphdef, params)(tokens)), extend


def in_parts(extend, cache, tokens=TOKENS):
    """The logits of a text that is read by 5 tokens and by 1."""
    parts = []
    for start, end in ((0, 5), (5, 6), (6, 11), (11, 12), (12, 13)):
        logits, cache = extend(tokens[:, start:end], cache, jnp.arange(start, end))
        parts.append(logits)
    return np.concatenate(parts, axis=1)


@every_config
def test_read_in_parts_a_text_has_the_logits_of_the_whole(name):
    model, apply, extend = decoder(name)
    assert_close(in_parts(extend, model.init_cache(B, 16)), apply(TOKENS))


@every_config
def test_rows_of_different_lengths_have_the_logits_that_they_have_alone(name):
    model, apply, extend = decoder(name)
    whole = np.asarray(apply(TOKENS))
    lengths = np.array([5, 2, 3])
    logits, cache = extend(TOKENS[:, :5], model.init_cache(B, 16), jnp.arange(5), lengths)
    real = np.arange(5) < lengths[:, None]
    assert_close(logits[real], whole[:, :5][real])
    for step in range(8):
        at = (lengths + step)[:, None]
        logits, cache = extend(TOKENS[ROWS, at], cache, at)
        assert_close(logits, whole[ROWS, at])


def test_a_row_alone_has_the_logits_that_it_has_among_others():
    model, _, extend = decoder("rotary")
    alone = in_parts(extend, model.init_cache(1, 16), TOKENS[1:2])
    assert_close(alone, in_parts(extend, model.init_cache(B, 16))[1:2])


def test_in_bfloat16_it_reads_near_the_whole():
    model, apply, extend = decoder("rotary", "bfloat16")
    cache = model.init_cache(B, 16)
    assert {x.dtype.name for x in cache[0].stored} == {"bfloat16"}
    assert_close(in_parts(extend, cache), apply(TOKENS), dtype="bfloat16", scale=2)


@every_config
def test_int8_changes_the_loss_by_less_than_a_thousandth(name):
    model, apply, extend = decoder(name)
    exact = apply(TOKENS)
    rounded = in_parts(extend, model.init_cache(B, 16, kind=QuantizedCache))
    assert_close(rounded, exact, dtype="bfloat16")
    assert np.abs(rounded - exact).max() > 1e-4
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    losses = [cross_entropy(y[:, :-1], TOKENS[:, 1:]).mean() for y in (exact, rounded)]
    assert abs(losses[1] - losses[0]) < 1e-3


def test_more_tokens_than_a_learned_table_has_are_refused():
    model, *_ = decoder("learned")
    with pytest.raises(ValueError, match=r"length: wanted at most model\.context = 16, got 17"):
        model.init_cache(B, 17)
    decoder("rotary")[0].init_cache(B, 17)


@pytest.mark.parametrize("kind", [Cache, Pages(num_pages=9, page_size=4)], ids=str)
def test_more_tokens_than_a_cache_has_room_for_are_refused_where_positions_are_known(kind):
    model, *_ = decoder("rotary")
    cache = model.init_cache(B, 8, kind=kind)
    for tokens, positions in ((TOKENS, np.arange(T)), (TOKENS[:, :1], np.full((B, 1), 8))):
        with pytest.raises(ValueError, match=r"positions: wanted less than 8, .* got (12|8)"):
            model.extend(tokens, cache, positions=positions)
    # Padding needs no room, and neither does what a window has forgotten.
    check_room(cache, np.arange(T), np.array([8, 1, 3]))
    check_room(Cache.empty(B, 8, (3,), rolling=True), np.arange(T))


# Two stacks

PAIRS = {
    "vanilla": {"position": "sinusoidal", "norm_position": "post"},
    "t5": {
        "position": "relative", "norm": "rms", "use_bias": False, "relative_buckets": 6,
        "relative_distance": 5, "num_heads": 3, "head_dim": 4,
    },
    "rotary": {"position": "rotary", "num_kv_heads": 1, "qk_norm": True, "norm": "rms"},
}  # fmt: skip


@functools.cache
def encoder_decoder(name):
    settings = {"num_heads": 2} | PAIRS[name]
    config = EncoderDecoderConfig(vocab_size=V, context=16, num_layers=2, width=12, **settings)
    structure = nnx.eval_shape(lambda: EncoderDecoder(config, rngs=nnx.Rngs(0)))
    return randomised(structure, scale=0.3)


@pytest.mark.parametrize("name", PAIRS)
def test_a_target_read_in_parts_has_the_logits_of_the_whole(name):
    model = encoder_decoder(name)
    graphdef, params = nn.split(model)
    source_lengths = np.array([7, 3, 5])

    @jax.jit
    def apply(lengths):
        model = nn.merge(graphdef, params)
        logits = model(SOURCE, TOKENS, source_lengths=lengths)
        return logits, model.encode(SOURCE, source_lengths=lengths)

    @jax.jit
    def extend(tokens, cache, positions):
        model = nn.merge(graphdef, params)
        lengths = {"source_lengths": source_lengths}
        x, cache = model.extend(tokens, cache, positions=positions, **lengths)
        return model.logits(x), cache

    whole, memory = apply(source_lengths)
    assert_close(in_parts(extend, model.init_cache(memory, 16)), whole)
    rounded = in_parts(extend, model.init_cache(memory, 16, kind=QuantizedCache))
    assert_close(rounded, whole, dtype="bfloat16")
    assert np.abs(rounded - whole).max() > 1e-4


def test_a_target_beyond_the_decoders_learned_table_is_refused():
    config = EncoderDecoderConfig(
        vocab_size=V, context=16, num_layers=1, width=12, num_heads=2, position="learned"
    )
    model = EncoderDecoder(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"length: wanted at most model\.context = 16, got 17"):
        model.init_cache(jnp.zeros((B, S, 12)), 17)
