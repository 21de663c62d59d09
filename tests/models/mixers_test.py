"""Every mixer by its name: one harness for causality, padding, order, state, dtype and training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qkv_jax import nn, ops, training
from qkv_jax.models import MIXERS, Decoder, DecoderConfig, state_size
from qkv_jax.models.config import TransformerConfig
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, V = 2, 23, 11
# Sizes at which every mechanism has several blocks, chunks and selections.
SIZES = {
    "window": 5, "block_size": 4, "num_blocks": 2, "num_global": 1, "num_random": 1,
    "window_blocks": 3, "top_k": 3, "num_features": 16, "rank": 8, "conv_width": 3, "chunk_size": 4,
}  # fmt: skip
CAUSAL = [name for name, mixer in MIXERS.items() if mixer.causal]
BIDIRECTIONAL = [name for name, mixer in MIXERS.items() if mixer.bidirectional]


def config_for(name, **changes):
    sizes = {field: size for field, size in SIZES.items() if field in MIXERS[name].reads}
    return DecoderConfig(
        vocab_size=V, context=T, num_layers=1, width=16, num_heads=2, mixer=name, norm="rms",
        position="none", use_bias=False, **(sizes | changes),
    )  # fmt: skip


@functools.cache
def mixer_for(name, dtype=None):
    """The module of one layer, every parameter random, and `apply(params, x, mask)`, jitted."""
    sizes = {field: size for field, size in SIZES.items() if field in MIXERS[name].reads}
    config = TransformerConfig(vocab_size=V, context=T, width=16, num_heads=2, **sizes)
    config = dataclasses.replace(config, position="none", use_bias=False)
    init = nnx.initializers.normal(0.3)
    made = MIXERS[name].make(
        config, 0, kernel_init=init, out_init=init, dtype=dtype, rngs=nnx.Rngs(0)
    )
    module = randomised(made, scale=0.3)
    if name == "long_conv":  # fast sines of sines make 1e-4 of the rounding that programs differ in
        module.filter = made.filter
        module.filter.frequency = 1.0
    graphdef, params = nn.split(module)
    apply = jax.jit(lambda params, x, mask: nn.merge(graphdef, params)(x, mask=mask))
    return module, functools.partial(apply, params)


def tokens(length=T, seed=0):
    return jnp.asarray(np.random.RandomState(seed).randn(B, length, 16), jnp.float32)


@pytest.mark.parametrize("name", CAUSAL)
def test_no_output_depends_on_a_later_token_and_each_on_its_own(name):
    _, apply = mixer_for(name)
    # Of one place's output in every place's input, compiled once for all places.
    gradient = jax.jit(jax.grad(lambda x, t: (apply(x, ops.masks.Causal())[:, t] ** 2).sum()))
    for t in (0, 9, T - 2):
        by_place = np.abs(gradient(tokens(), t)).sum((0, 2))
        rounding = 1e-6 * by_place.max() if name == "long_conv" else 0  # of the FFT
        assert (by_place[t + 1 :] <= rounding).all() and by_place[t] > 0, t
        assert np.isfinite(by_place).all()


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_changes_no_causal_output(name):
    _, apply = mixer_for(name)
    x = tokens()
    lengths = jnp.array([17, 11])
    real = np.arange(T) < np.asarray(lengths)[:, None]
    noise = jnp.where(real[..., None], x, 7 * tokens(seed=1))
    mask = ops.masks.Causal() & ops.masks.Lengths(lengths)
    padded, other = apply(x, mask), apply(noise, mask)
    assert np.isfinite(padded).all()
    assert_close(padded[real], other[real])
    assert_close(padded[real], apply(x, ops.masks.Causal())[real], scale=10)


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_padding_changes_no_bidirectional_output(name):
    _, apply = mixer_for(name)
    x = tokens()
    lengths = jnp.array([17, 11])
    real = np.arange(T) < np.asarray(lengths)[:, None]
    noise = jnp.where(real[..., None], x, 7 * tokens(seed=1))
    mask = ops.masks.Lengths(lengths)
    padded = apply(x, mask)
    assert np.isfinite(padded).all()
    assert_close(padded[real], apply(noise, mask)[real])
    changed = apply(x.at[:, 9].add(1.0), mask)
    assert np.abs(changed - padded)[:, :9].max() > 1e-6  # it looks ahead
    assert np.isfinite(apply(x, None)).all()


# Without positions these see their keys as a set.
SETS = (
    "attention", "topk", "sigmoid", "entmax", "sparsemax", "off_by_one", "talking_heads", "linear",
    "differential", "cosine", "performer", "latent", "bahdanau", "luong", "value_residual",
    "clipped_softmax", "gated_attention",
)  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_permuted_tokens_give_permuted_outputs(name):
    _, apply = mixer_for(name)
    order = np.random.RandomState(0).permutation(T)
    assert_close(apply(tokens()[:, order], None), apply(tokens(), None)[:, order], scale=20)


QUICK = ("streaming", "latent", "linear", "gru")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CAUSAL]
)
def test_a_mixer_goes_by_positions_unless_it_takes_tokens_in_order(name):
    module, apply = mixer_for(name)
    order = np.random.RandomState(0).permutation(T)
    wanted = apply(tokens(), ops.masks.Causal())[:, order]
    try:
        found = module(tokens()[:, order], mask=ops.masks.Causal(), positions=order)
    except NotImplementedError as error:
        assert MIXERS[name].in_order and "in array order" in str(error)
        return
    if MIXERS[name].in_order:
        assert np.abs(found - wanted).max() > 1e-2
    else:
        assert_close(found, wanted, scale=20)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_state_is_constant_or_grows_by_the_token(name):
    module, _ = mixer_for(name)
    sizes = [module.state_size(length) for length in (64, 128, 256)]
    assert all(isinstance(size, int) and size > 0 for size in sizes)
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0]) or sizes[1] == sizes[2]
    assert state_size(config_for(name), 64) == sizes[0]


@pytest.mark.parametrize("name", CAUSAL)
def test_read_in_parts_a_sequence_gives_what_it_gives_as_a_whole(name):
    """Rows that go in step, by 7 and by 1; then a padded start, and from there one by one."""
    module, apply = mixer_for(name)
    whole = np.asarray(apply(tokens(), ops.masks.Causal()))
    graphdef, params = nn.split(module)
    extend = jax.jit(lambda x, cache, **kw: nn.merge(graphdef, params).extend(x, cache, **kw))
    rows = np.arange(B)[:, None]

    def part(cache, starts, lengths=None):
        """The cache after 7 tokens with padding, or after 1 at each row's own position."""
        at = np.arange(7) + starts[0] if lengths is not None else np.array(starts)[:, None]
        y, cache = extend(tokens()[rows, at], cache, positions=at, lengths=lengths)
        real = np.arange(y.shape[1]) < np.reshape(1 if lengths is None else lengths, (-1, 1))
        real = np.broadcast_to(real, y.shape[:2])
        assert_close(np.asarray(y)[real], whole[rows, at][real])
        return cache

    cache = module.init_cache(B, T + 6)
    for start in (0, 7, 8, 15, 16):
        cache = part(cache, [start] * B, np.array([7, 7]) if start % 8 == 0 else None)

    cache = part(module.init_cache(B, T + 6), [0, 0], np.array([7, 4]))
    for step in range(9):
        cache = part(cache, [7 + step, 4 + step])


@pytest.mark.parametrize("name", CAUSAL)
def test_the_cache_grows_where_the_state_does(name):
    module, _ = mixer_for(name)
    caches = [jax.eval_shape(lambda n=n: module.init_cache(1, n)) for n in (64, 256)]
    first, last = (sum(x.size for x in jax.tree.leaves(cache)) for cache in caches)
    grows = module.state_size(256) > module.state_size(128)
    assert 3.5 * first < last <= 4 * first if grows else first == last


def test_what_the_state_sizes_are():
    D, H = 16, 8  # two heads
    for name, size in {
        "attention": 64 * 2 * D,
        "sliding_window": 5 * 2 * D,
        "lstm": 2 * D,
        "gru": D,
        "linear": 2 * H * (H + 1),
        "latent": 64 * 8,
    }.items():
        assert state_size(config_for(name), 64) == size, name


@pytest.mark.parametrize("name", CAUSAL)
def test_ten_steps_lower_the_loss(name):
    """A text that repeats: from log V towards 0."""
    graphdef, params = nn.split(Decoder(config_for(name), rngs=nnx.Rngs(0)))
    optimizer = optax.adam(2e-2)
    loss = training.cross_entropy_loss(graphdef)
    step = jax.jit(training.make_train_step(loss, optimizer, seed=0))
    text = np.tile(np.random.RandomState(0).permutation(V), 9)
    windows = np.stack([text[i : i + T + 1] for i in range(4)])
    batch = {"inputs": windows[:, :-1], "targets": windows[:, 1:]}
    state, losses = training.TrainState.create(params, optimizer), []
    for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0], losses


SELECTING = ("topk", "moba", "nsa", "memory")


@pytest.mark.parametrize("name", CAUSAL)
def test_in_bfloat16_it_computes_near_float32(name):
    x, mask = 0.3 * tokens(), ops.masks.Causal()
    half = mixer_for(name, "bfloat16")[1](x.astype(jnp.bfloat16), mask)
    assert half.dtype == "bfloat16" and np.isfinite(np.asarray(half, np.float32)).all()
    full = mixer_for(name)[1](x, mask)
    if name in SELECTING:  # where two keys are nearly equal, rounding may choose the other
        half = jnp.where(jnp.abs(half - full).max(-1, keepdims=True) < 0.1, half, full)
        assert (half == full).all(-1).mean() < 0.2
    assert_close(half, full, dtype="bfloat16", scale=5)


# The table


def test_a_pattern_repeats_over_the_layers():
    config = dataclasses.replace(config_for("attention"), num_layers=5, mixer="lstm, attention")
    assert config.mixers == ("lstm", "attention", "lstm", "attention", "lstm")
    blocks = Decoder(config, rngs=nnx.Rngs(0)).blocks
    kinds = [type(block.mixer).__name__ for block in blocks]
    assert kinds == ["LSTM", "MultiHeadAttention", "LSTM", "MultiHeadAttention", "LSTM"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "lstm,attention"}, r"model\.mixer: wanted at most model\.num_layers = 1 names"),
        ({"mixer": ""}, r"model\.mixer: wanted one of .* got ''"),
        ({"mixer": "linformer"}, r"model\.mixer: 'linformer' sees later tokens too, so no decoder"),
        ({"mixer": "nystrom"}, r"model\.mixer: 'nystrom' sees later tokens too"),
        (
            {"mixer": "bigbird", "num_random": -1},
            r"model\.num_random: wanted an integer >= 0, got -1",
        ),
        (
            {"mixer": "bigbird", "window_blocks": 2},
            r"model\.window_blocks: wanted an odd number, got 2",
        ),
        ({"window": 7}, r"model\.window: 7 was set, but no layer .* 'attention' .*sliding_window"),
        (
            {"mixer": "topk", "attention_scale": 1.0},
            r"model\.attention_scale: 1\.0 was set, but no layer .*; these do: attention",
        ),
        ({"mixer": "lstm", "share_kv": True}, r"model\.share_kv: True was set, but no layer"),
        ({"mixer": "sliding_window", "window": 0}, r"model\.window: wanted a positive integer"),
    ],
    ids=repr,
)
def test_a_wrong_mixer_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config_for("attention"), **changes)


@pytest.mark.parametrize("name", ["gated_delta", "lstm", "long_conv", "linear"])
def test_what_takes_tokens_in_order_refuses_other_masks(name):
    _, apply = mixer_for(name)
    with pytest.raises(NotImplementedError, match=r"mask: .* takes tokens in order"):
        apply(tokens(), ops.masks.Causal() & ops.masks.SlidingWindow(3))
