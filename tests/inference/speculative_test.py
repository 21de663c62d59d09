"""Speculative decoding: the target's own text and distribution, whatever the draft model says."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from qkv_jax import inference, nn
from qkv_jax.inference import speculative
from qkv_jax.models import MIXERS, Decoder, DecoderConfig
from qkv_jax.ops.cache import QuantizedCache
from tests.parameters import randomised

V, LONGEST = 11, 29
PROMPT = np.random.RandomState(0).randint(0, V, (3, 4))
SIZES = {
    "window": 5, "block_size": 4, "num_blocks": 2, "num_global": 1, "num_random": 1,
    "window_blocks": 3, "top_k": 3, "num_features": 16, "rank": 8, "conv_width": 3, "chunk_size": 4,
}  # fmt: skip


@functools.cache
def decoder(mixer, vocab_size=V, **changes):
    """A random decoder, with a layer for each of the mixers."""
    names = mixer.split(",")
    read = {field for name in names for field in MIXERS[name].reads}
    settings = {field: size for field, size in SIZES.items() if field in read}
    settings |= {"position": "none", "num_layers": len(names), "width": 12, "num_heads": 2}
    settings |= {"norm": "rms", "use_bias": False, "context": 48, "mlp_width": 0}
    config = DecoderConfig(vocab_size=vocab_size, mixer=mixer, **(settings | changes))
    return nn.split(randomised(Decoder(config, rngs=nnx.Rngs(0)), scale=0.4))


@functools.cache
def near(mixer, noise=0.1, **changes):
    """The same decoder, whose parameters are a little off: a draft that is often right."""
    graphdef, params = decoder(mixer, **changes)
    random = np.random.RandomState(1)
    off = jax.tree.map(lambda x: np.float32(noise * random.randn(*np.shape(x))), params)
    return graphdef, jax.tree.map(jnp.add, params, off)


def speculate(target, draft, prompt=PROMPT, seed=0, **kwargs):
    kwargs = {"num_tokens": 15, "num_drafted": 3, "context": 48} | kwargs
    made = inference.speculate(*target, *draft, prompt, rng=jax.random.key(seed), **kwargs)
    return inference.Speculation(*map(np.asarray, made))


def greedy(model):
    """The likeliest token after a text, by one call of the whole."""
    apply = jax.jit(lambda tokens: nn.merge(*model)(tokens))

    def following(tokens):
        padded = np.zeros((1, LONGEST), int)
        padded[0, : len(tokens)] = tokens
        return int(apply(padded)[0, len(tokens) - 1].argmax())

    return following


def plain(target, draft, prompt, num_tokens, num_drafted, context):
    """The tokens of one row, and passes, drafted and accepted, step by step and without caches."""
    window, out, counts = list(prompt), [], np.zeros(3, int)
    while len(out) < num_tokens:
        if len(window) > context:
            window = window[-(context // 2) - 1 :]
        drafted = list(window)
        for _ in range(num_drafted):
            drafted.append(draft(drafted))
        drafted = drafted[len(window) :]
        wanted = min(num_tokens - len(out), context + 1 - len(window))
        own = []  # what the target says as long as it agrees, and the first where it does not
        while len(own) < wanted and own == drafted[: len(own)] and len(own) <= num_drafted:
            own.append(target(window + own))
        agreed = len(own) if own == drafted[: len(own)] else len(own) - 1
        counts += (1, min(num_drafted, wanted), agreed)
        window, out = window + own, out + own
    return out, counts


# Caches whose slots are overwritten; and a window and a state, from before what was not accepted.
PAIRS = {
    "attention": {},
    "forgetting,latent": {},
    "sliding_window": {"position": "rotary"},
    "gated_delta": {},
}


@pytest.mark.parametrize("mixer", PAIRS)
def test_greedily_it_writes_the_targets_text_in_as_few_passes_as_the_drafts_allow(mixer):
    pair = decoder(mixer, **PAIRS[mixer]), near(mixer, **PAIRS[mixer])
    kwargs = {"num_tokens": 17, "num_drafted": 3, "context": 9}
    out = speculate(*pair, top_k=1, **kwargs)
    wanted = [plain(*map(greedy, pair), row, **kwargs) for row in PROMPT]
    np.testing.assert_array_equal(out.tokens, [tokens for tokens, _ in wanted])
    np.testing.assert_array_equal(np.stack(out[2:], axis=1), [counts for _, counts in wanted])
    assert len(set(out.accepted)) > 1 and 0.1 < out.accepted.sum() / out.drafted.sum() < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [name for name, mixer in MIXERS.items() if mixer.causal])
def test_no_mixer_remembers_what_was_not_accepted(mixer):
    pair, kwargs = (decoder(mixer), near(mixer)), {"num_tokens": 15, "top_k": 1}
    wanted = inference.generate(*pair[0], PROMPT, context=48, rng=jax.random.key(0), **kwargs)
    out = speculate(*pair, **kwargs)
    np.testing.assert_array_equal(out.tokens, wanted)
    assert 0 < out.accepted.sum() < out.drafted.sum()


def test_a_row_alone_has_the_text_that_it_has_among_others():
    pair = decoder("attention"), decoder("gated_delta")
    together = speculate(*pair, PROMPT, num_tokens=7)
    alone = speculate(*pair, PROMPT[:1], num_tokens=7)
    for ours, wanted in zip(alone, together, strict=True):
        np.testing.assert_array_equal(ours, wanted[:1])
    assert (speculate(*pair, PROMPT, num_tokens=7, seed=1).tokens != together.tokens).any()


@pytest.mark.parametrize("mixer", ["attention", "gated_delta"])
def test_the_target_accepts_all_of_its_own_drafts(mixer):
    model = decoder(mixer)
    out = speculate(model, model, PROMPT[:, :1], num_tokens=14)
    np.testing.assert_array_equal(out.accepted, out.drafted)
    np.testing.assert_array_equal(out.passes, [4] * 3)  # of 4 tokens, the last of 2
    np.testing.assert_array_equal(out.drafted, [11] * 3)
    assert len({tuple(row) for row in out.tokens}) == 3


def test_a_row_ends_with_its_first_stop_token_and_penalties_count_the_drafts():
    pair = decoder("attention"), near("attention")
    kwargs = {"num_tokens": 15, "top_k": 1, "repetition_penalty": 1.3, "kind": QuantizedCache}

    def generate(**more):
        key = jax.random.key(0)
        return inference.generate(*pair[0], PROMPT, context=48, rng=key, **kwargs, **more)

    free = np.asarray(generate())
    np.testing.assert_array_equal(speculate(*pair, **kwargs).tokens, free)
    stop = (int(free[0, 5]), int(free[2, 9]))
    out = speculate(*pair, stop=stop, **kwargs)
    np.testing.assert_array_equal(out.tokens, generate(stop=stop))
    ends = [next(i for i, token in enumerate(row) if token in stop) for row in free]
    np.testing.assert_array_equal(out.lengths, np.array(ends) + 1)
    assert len(set(ends)) > 1 and (out.passes <= out.lengths).all()


# The distribution

FEW, ROWS = 5, 10_000
SAMPLING = {"temperature": 0.8, "top_p": 0.9, "min_p": 0.02}


def p_value(tokens, model, prompt):
    """Of texts [rows, n] that a model is said to have drawn: Pearson's chi-square test."""
    texts = np.array(list(itertools.product(range(FEW), repeat=tokens.shape[1])))
    whole = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1)
    logits = jax.jit(lambda x: nn.merge(*model)(x))(whole)[:, len(prompt) - 1 : -1]
    chances = jax.nn.softmax(inference.filter_logits(logits, **SAMPLING))
    expected = np.asarray(jnp.take_along_axis(chances, texts[..., None], axis=-1), np.float64)
    expected = len(tokens) * expected.prod((1, 2))
    places = tokens @ FEW ** np.arange(tokens.shape[1])[::-1]
    observed = np.bincount(places, minlength=len(texts))
    if observed[expected == 0].any():
        return 0.0
    cell = np.where(expected < 5, 0, 1 + np.arange(len(texts)))  # the rare ones are one
    observed, expected = (np.bincount(cell, x) for x in (observed, expected))
    some = expected > 0
    assert some.sum() > 20
    return scipy.stats.chisquare(observed[some], expected[some], sum_check=False).pvalue


def drawn():
    target, draft = (decoder(mixer, FEW) for mixer in ("attention", "gated_conv"))
    prompt = np.array([1, 4, 2])
    rows = np.tile(prompt, (ROWS, 1))
    out = speculate(target, draft, rows, num_tokens=3, num_drafted=2, **SAMPLING)
    return p_value(out.tokens, target, prompt), out


def test_texts_have_the_distribution_of_the_target_whatever_the_draft():
    p, out = drawn()
    assert p > 0.01
    assert 0.2 < out.accepted.sum() / out.drafted.sum() < 0.8 and len(set(out.passes)) == 3


def draws_the_rest_from_the_target(target, draft, drafted, rng):
    number, _ = inference.verified(target, draft, drafted, rng)
    return number, jax.random.categorical(jax.random.fold_in(rng, 7), jnp.log(target[number]))


def test_a_rule_that_is_nearly_right_gives_another_distribution(monkeypatch):
    monkeypatch.setattr(speculative, "verified", draws_the_rest_from_the_target)
    speculative._speculate.clear_cache()
    try:
        assert drawn()[0] < 1e-6
    finally:
        speculative._speculate.clear_cache()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_drafted": 0}, r"num_drafted: wanted at least 1, got 0"),
        ({"num_tokens": 0}, r"num_tokens: wanted at least 1, got 0"),
        ({"context": 1}, r"context: wanted at least 2, got 1"),
        ({"prompt": PROMPT[0]}, r"prompt: wanted integers \[B, P\] .* got .* \[4\]"),
        ({"temperature": 0.0}, r"temperature: wanted"),
        (
            {"draft": decoder("attention", FEW)},
            r"draft_graphdef: wanted the target's vocabulary of 11 tokens, got one of 5",
        ),
        (
            {"draft": decoder("attention", context=18)},
            r"draft_graphdef: wanted a model whose context is at least the 19 tokens .* of 18",
        ),
        (
            {"target": decoder("attention", position="learned", context=21)},
            r"context: 19 tokens and num_drafted = 3 .* as many learned positions, got 21",
        ),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(wrong, message):
    given = {"target": decoder("attention"), "draft": decoder("attention")} | wrong
    with pytest.raises(ValueError, match=message):
        speculate(**given)
