"""The encoder-decoder: what each logit depends on, its parameters, T5 as an oracle, a task."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.models import EncoderDecoder, EncoderDecoderConfig
from tests.models.seq2seq import dependence, exact_match, train
from tests.parameters import randomised
from tests.tolerances import assert_close

B, S, T, V = 2, 7, 5, 11
RANDOM = np.random.RandomState(0)
SOURCE, TARGET = RANDOM.randint(0, V, (B, S)), RANDOM.randint(0, V, (B, T))
LENGTHS = np.array([4, 7])
VANILLA = EncoderDecoderConfig(
    vocab_size=V, context=13, num_layers=1, width=12, num_heads=2, position="sinusoidal",
    norm_position="post",
)  # fmt: skip
T5 = EncoderDecoderConfig(
    vocab_size=V, context=13, num_layers=1, width=12, num_heads=3, head_dim=4, mlp_width=17,
    norm="rms", position="relative", use_bias=False, relative_buckets=6, relative_distance=5,
)  # fmt: skip
both = pytest.mark.parametrize("config", [VANILLA, T5], ids=["vanilla", "t5"])


def model(config=VANILLA, **changes):
    """The model's structure; `randomised` gives it numbers."""
    config = dataclasses.replace(config, **changes)
    return nnx.eval_shape(lambda: EncoderDecoder(config, rngs=nnx.Rngs(0)))


@functools.cache
def apply_to(config=VANILLA, scale=0.5, **changes):
    """The model with random parameters, as a jitted function."""
    graphdef, params = nn.split(randomised(model(config, **changes), scale))

    @jax.jit
    def apply(source, target, source_lengths=None, target_lengths=None, rng=None):
        lengths = {"source_lengths": source_lengths, "target_lengths": target_lengths}
        return nn.merge(graphdef, params)(source, target, rng=rng, **lengths)

    return apply


# Sizes


@both
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 3},
        {"source_vocab_size": 17},
        {"tie_embeddings": False},
        {"norm_position": "pre"},
        {"position": "learned"},
        {"use_bias": True},
        {"num_kv_heads": 1},
        {"share_kv": True},
        {"activation": "swiglu"},
    ],
    ids=repr,
)
def test_the_parameters_are_counted_by_the_formula(config, changes):
    c = dataclasses.replace(config, **changes)
    D, F, N, K, H = c.width, c.hidden, c.num_heads, c.kv_heads, c.attention_dim
    bias = int(c.use_bias)
    attention = (D + bias) * N * H + (1 if c.share_kv else 2) * (D + bias) * K * H
    attention += (N * H + bias) * D
    feed_forward = (2 if c.activation == "swiglu" else 1) * (D + bias) * F + (F + bias) * D
    norm = D * (2 if c.use_bias and c.norm == "layer" else 1)
    expected = V * D + (c.source_vocab_size or 0) * D
    expected += c.num_layers * (3 * attention + 2 * feed_forward + 5 * norm)
    expected += 2 * norm if c.norm_position == "pre" else 0
    expected += 2 * c.context * D if c.position == "learned" else 0
    expected += 2 * c.relative_buckets * N if c.position == "relative" else 0
    expected += 0 if c.tie_embeddings else D * V
    assert nn.count(nn.split(model(config, **changes))[1]) == expected


def test_t5_small_has_as_many_parameters_as_published():
    """60,506,624, of google-t5/t5-small; its vocabulary and its feed-forward have no biases."""
    config = EncoderDecoderConfig(
        vocab_size=32_128, context=512, num_layers=6, width=512, num_heads=8, mlp_width=2048,
        norm="rms", position="relative", use_bias=False,
    )  # fmt: skip
    assert nn.count(nn.split(model(config))[1]) == 60_506_624


def test_the_state_holds_the_keys_and_values_of_both_attentions():
    assert model(T5).state_size(5, 7) == (5 + 7) * 2 * 12
    narrow = model(T5, num_kv_heads=1, mixer="sliding_window", window=3)
    assert narrow.state_size(5, 7) == (3 + 7) * 2 * 4


# What a logit depends on


@both
def test_a_logit_depends_on_no_later_target_and_on_all_of_the_source(config):
    m = randomised(model(config, source_vocab_size=V + 2, tie_embeddings=False))
    target, source = np.arange(T)[None], np.arange(S)[None] + 1
    by_target, by_source = dependence(m, source, target, source_lengths=jnp.array([5]))
    assert (np.triu(by_target, 1) == 0).all()
    assert (by_target[np.tril_indices(T)] > 0).all()
    assert (by_source[:, :5] > 0).all() and (by_source[:, 5:] == 0).all()


@both
def test_padding_changes_nothing(config):
    apply, target_lengths = apply_to(config), np.array([5, 3])
    logits = apply(SOURCE, TARGET, LENGTHS, target_lengths)
    assert logits.shape == (B, T, V) and logits.dtype == "float32"
    real = np.arange(T) < target_lengths[:, None]
    other_source = np.where(np.arange(S) < LENGTHS[:, None], SOURCE, (SOURCE + 1) % V)
    other_target = np.where(real, TARGET, (TARGET + 1) % V)
    other = apply(other_source, other_target, LENGTHS, target_lengths)
    assert_close(other[real], logits[real])
    assert_close(apply(SOURCE[:1, :4], TARGET[:1, :3])[0], logits[0, :3], scale=10)
    whole = apply(SOURCE, TARGET, np.array([7, 7]), target_lengths)
    assert np.abs(whole[0] - logits[0]).max() > 1e-2
    assert_close(whole[1], logits[1])
    assert np.isfinite(apply(SOURCE, TARGET, np.array([0, 7]), target_lengths)).all()


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "relative"])
def test_the_order_of_the_source_matters_where_positions_say_it(position):
    apply = apply_to(T5, position=position)
    order = np.array([3, 0, 6, 4, 1, 2, 5])
    assert np.abs(apply(SOURCE[:, order], TARGET) - apply(SOURCE, TARGET)).max() > 1e-2


def test_without_positions_the_source_is_a_set():
    apply = apply_to(T5, position="none")
    order = np.array([3, 0, 6, 4, 1, 2, 5])
    assert_close(apply(SOURCE[:, order], TARGET), apply(SOURCE, TARGET), scale=20)


# What the fields do


def test_shared_embeddings_get_the_gradients_of_source_target_and_output():
    """A shared table's gradient is the sum of those that three separate ones would get."""

    def gradients(m):
        graphdef, params = nn.split(m)
        loss = lambda p: (nn.merge(graphdef, p)(SOURCE, TARGET) ** 2).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    shared = randomised(model(T5))
    apart = model(T5, source_vocab_size=V, tie_embeddings=False)
    graphdef, params = nn.split(apart)
    same = nn.split(shared)[1]
    table = same["decoder"]["embedding"]["embedding"]
    same["embedding"] = {"embedding": table}
    same["decoder"]["head"] = {"kernel": table.T}
    assert jax.tree.structure(same) == jax.tree.structure(params)
    apart = gradients(nn.merge(graphdef, same))
    expected = apart["embedding"]["embedding"] + apart["decoder"]["embedding"]["embedding"]
    expected += apart["decoder"]["head"]["kernel"].T
    assert_close(gradients(shared)["decoder"]["embedding"]["embedding"], expected, scale=100)


@pytest.mark.parametrize(
    ("mixer", "encoder_mixer"),
    [
        ("attention,sliding_window", "value_residual"),
        ("lstm,attention", "linformer"),
    ],
)
def test_each_stack_has_the_mixers_that_its_field_names(mixer, encoder_mixer):
    settings = (
        {"window": 3} if "sliding" in mixer else {"rank": 3} if "linf" in encoder_mixer else {}
    )
    changes = {"mixer": mixer, "encoder_mixer": encoder_mixer, "num_layers": 2} | settings
    apply = apply_to(T5, head_dim=None, position="learned", **changes)
    logits = apply(SOURCE, TARGET, LENGTHS)
    other = np.where(np.arange(S) < LENGTHS[:, None], SOURCE, (SOURCE + 1) % V)
    assert_close(apply(other, TARGET, LENGTHS), logits)
    later = apply(SOURCE, np.where(np.arange(T) < 3, TARGET, (TARGET + 1) % V), LENGTHS)
    assert_close(later[:, :3], logits[:, :3])
    changed = np.where(np.arange(S) == 3, (SOURCE + 1) % V, SOURCE)
    assert (np.abs(apply(changed, TARGET, LENGTHS) - logits).max(-1) > 0).all()


def test_the_scale_of_the_logits_reaches_every_attention():
    m = model(T5, attention_scale=0.3, encoder_mixer="attention")
    mixers = [b.mixer for b in (*m.blocks, *m.decoder.blocks)]
    crossing = [b.cross.mixer for b in m.decoder.blocks]
    assert [mixer.scale for mixer in mixers + crossing] == [0.3] * 3


def test_relative_positions_reach_the_attention_beside_other_mixers():
    mixers = {"mixer": "lstm,attention", "encoder_mixer": "attention,gated_conv"}
    m = model(T5, num_layers=2, **mixers)
    graphdef, params = nn.split(randomised(m))
    loss = lambda p: (nn.merge(graphdef, p)(SOURCE, TARGET) ** 2).mean()  # noqa: E731
    gradients = jax.jit(jax.grad(loss))(params)
    assert np.abs(gradients["bias"]).max() > 0 and np.abs(gradients["decoder"]["bias"]).max() > 0


def test_dropout_changes_with_the_key_and_happens_only_with_one():
    plain, apply = apply_to()(SOURCE, TARGET, LENGTHS), apply_to(dropout_rate=0.2)
    assert_close(apply(SOURCE, TARGET, LENGTHS), plain)
    keyed = [apply(SOURCE, TARGET, LENGTHS, rng=jax.random.key(key)) for key in (0, 0, 1)]
    np.testing.assert_array_equal(keyed[0], keyed[1])
    assert np.abs(keyed[0] - plain).max() > 1e-2
    assert np.abs(keyed[0] - keyed[2]).max() > 1e-2


def test_remat_changes_neither_loss_nor_gradients():
    def value_and_gradients(remat):
        graphdef, params = nn.split(randomised(model(T5, remat=remat)))
        loss = lambda p: (nn.merge(graphdef, p)(SOURCE, TARGET) ** 2).mean()  # noqa: E731
        gradients = jax.jit(jax.value_and_grad(loss))
        assert ("remat" in str(jax.make_jaxpr(loss)(params))) == remat
        return gradients(params)

    jax.tree.map(
        functools.partial(assert_close, scale=100),
        value_and_gradients(True),
        value_and_gradients(False),
    )


def test_bfloat16_computes_in_bfloat16_between_float32_parameters_and_logits():
    m = randomised(model(T5, dtype="bfloat16"))
    assert {x.dtype.name for x in jax.tree.leaves(nn.split(m)[1])} == {"float32"}
    assert jax.eval_shape(m.encode, SOURCE).dtype == "bfloat16"
    logits = apply_to(T5, 0.1, dtype="bfloat16")(SOURCE, TARGET, LENGTHS)
    assert logits.dtype == "float32"
    expected = apply_to(T5, 0.1)(SOURCE, TARGET, LENGTHS)
    assert_close(logits, expected, dtype="bfloat16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, r"model\.width: wanted a positive integer, got 0"),
        ({"source_vocab_size": 0}, r"model\.source_vocab_size: wanted a positive .* got 0"),
        ({"position": "rope"}, r"model\.position: wanted one of .*relative.* got 'rope'"),
        ({"relative_buckets": 5}, r"model\.relative_buckets: wanted an even number >= 4, got 5"),
        ({"relative_buckets": 2}, r"model\.relative_buckets: .* got 2"),
        ({"relative_distance": 16}, r"model\.relative_distance: wanted more than .* 16, got 16"),
        ({"mixer": "mamba"}, r"model\.mixer: wanted one of .* got 'mamba'"),
        ({"mixer": "linformer"}, r"model\.mixer: 'linformer' sees later tokens too"),
        ({"encoder_mixer": "mamba"}, r"model\.encoder_mixer: wanted one of .* got 'mamba'"),
        ({"encoder_mixer": "lstm"}, r"model\.encoder_mixer: 'lstm' sees earlier tokens only"),
        ({"encoder_mixer": "linformer,attention"}, r"model\.encoder_mixer: wanted at most"),
        ({"window": 7}, r"model\.window: 7 was set, but no layer .* reads it"),
    ],
    ids=repr,
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(VANILLA, **changes)


def test_a_field_may_be_read_by_the_encoder_the_decoder_or_the_cross_attention():
    dataclasses.replace(VANILLA, encoder_mixer="sliding_window", window=7)
    dataclasses.replace(VANILLA, mixer="sliding_window", window=7)
    dataclasses.replace(VANILLA, mixer="lstm", encoder_mixer="gated_conv", num_kv_heads=1)


@pytest.mark.parametrize("changes", [{"mixer": "lstm"}, {"encoder_mixer": "gated_conv"}], ids=repr)
def test_relative_positions_need_attention(changes):
    [field] = changes
    with pytest.raises(ValueError, match=rf"model\.position: .* model\.{field} = "):
        model(T5, **changes)


# The oracle


def t5_of_transformers(config, **kwargs):
    torch = pytest.importorskip("torch", reason="`make test-all` installs PyTorch")
    transformers = pytest.importorskip("transformers", reason="`make test-all` installs it")
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V, d_model=config.width, d_kv=config.attention_dim, d_ff=config.hidden,
            num_layers=config.num_layers, num_heads=config.num_heads, dropout_rate=0.0,
            relative_attention_num_buckets=config.relative_buckets,
            relative_attention_max_distance=config.relative_distance, pad_token_id=0,
            decoder_start_token_id=0, initializer_factor=1.0, **kwargs,
        )
    ).eval()  # fmt: skip
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=random) * 0.5)
    return torch, theirs


def from_t5(theirs, config):
    """Our parameters, of their values: T5 does not scale logits of attention, but outputs."""
    array = lambda p: p.detach().numpy()  # noqa: E731
    kernel = lambda layer: {"kernel": array(layer.weight).T}  # noqa: E731

    def attention(layer):
        query = {"kernel": array(layer.q.weight).T * config.attention_dim**0.5}
        rest = {"key": layer.k, "value": layer.v, "out": layer.o}
        return {"query": query} | {name: kernel(part) for name, part in rest.items()}

    def feed_forward(layer):
        parts = {"up": "wi_1", "gate": "wi_0"} if hasattr(layer, "wi_0") else {"up": "wi"}
        names = parts | {"down": "wo"}
        return {name: kernel(getattr(layer, part)) for name, part in names.items()}

    def block(layers):
        first, *cross, last = layers
        rest = {
            "feed_forward": feed_forward(last.DenseReluDense),
            "feed_forward_norm": {"scale": array(last.layer_norm.weight)},
        }
        for layer in cross:
            norm = {"scale": array(layer.layer_norm.weight)}
            mixer = attention(layer.EncDecAttention)
            rest = {"cross": rest | {"mixer": mixer, "mixer_norm": norm}}
        norm = {"scale": array(first.layer_norm.weight)}
        return rest | {"mixer": attention(first.SelfAttention), "mixer_norm": norm}

    def stack(theirs, scale=1.0):
        table = theirs.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        norm = {"scale": array(theirs.final_layer_norm.weight) * scale}
        blocks = {i: block(b.layer) for i, b in enumerate(theirs.block)}
        return {"blocks": blocks, "final_norm": norm}, array(table)

    encoder, bias = stack(theirs.encoder)
    decoder, decoder_bias = stack(theirs.decoder, config.width**-0.5)
    decoder["embedding"] = {"embedding": array(theirs.shared.weight)}
    return encoder | {"decoder": decoder | {"bias": decoder_bias}, "bias": bias}


@pytest.mark.oracle
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_it_is_the_t5_of_transformers(activation):
    config = dataclasses.replace(T5, num_layers=2, activation=activation)
    projection = {"gelu": "gelu", "swiglu": "gated-silu"}[activation]
    torch, theirs = t5_of_transformers(config, feed_forward_proj=projection)
    graphdef, params = nn.split(model(config))
    ours = from_t5(theirs, config)
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)  # noqa: E731
    assert shapes(ours) == shapes(params)
    logits = jax.jit(
        lambda p: nn.merge(graphdef, p)(SOURCE, TARGET, source_lengths=LENGTHS)
    )(ours)  # fmt: skip
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(SOURCE), decoder_input_ids=torch.tensor(TARGET),
            attention_mask=torch.tensor(np.arange(S) < LENGTHS[:, None]).long(),
        ).logits  # fmt: skip
    assert np.abs(expected.numpy()).max() > 0.5
    assert_close(logits, expected.numpy(), scale=10)


# The task


@pytest.mark.slow
def test_it_learns_to_reverse():
    config = EncoderDecoderConfig(vocab_size=8, context=8, num_layers=1, width=32, num_heads=4)
    trained, losses = train(EncoderDecoder(config, rngs=nnx.Rngs(0)), steps=600, learning_rate=5e-3)
    assert losses[-10:].mean() < 0.1
    assert exact_match(trained) > 0.85
