"""`AdditiveAttention` and `LuongAttention` against the papers' equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.nn.additive import KINDS, LOCALITIES, AdditiveAttention, LuongAttention
from qkv_jax.ops import masks
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, S, D, C, N = 2, 5, 7, 12, 18, 3
RANDOM = np.random.RandomState(0)
X, CONTEXT = RANDOM.randn(B, T, D).astype("f"), RANDOM.randn(B, S, C).astype("f")
LENGTHS = np.array([6, 4])


def luong(**kwargs):
    if kwargs.get("locality", "global") != "global":
        kwargs.setdefault("window", 2)
    return randomised(LuongAttention(D, N, rngs=nnx.Rngs(0), **kwargs))


def additive(**kwargs):
    return randomised(AdditiveAttention(D, N, rngs=nnx.Rngs(0), **kwargs))


def call(module, *inputs, **kwargs):
    """The module's output, compiled as a whole: op by op takes longer."""
    return jax.jit(lambda *inputs: module(*inputs, **kwargs))(*inputs)


def matrices(module):
    """Its parameters: matrices by the names of their layers, and `energy`."""
    _, params = nn.split(module)
    return {
        name: np.asarray(p["kernel"] if isinstance(p, dict) else p) for name, p in params.items()
    }


def heads(x, width):
    return x.reshape(*x.shape[:2], N, width)


def equations(p, kind, x, context, lengths, centers=None, window=None, span=None):
    """Luong et al., equations 7 to 10, and Bahdanau et al. as "concat", a query at a time."""
    query = x @ p["query"] if "query" in p else x
    key = context @ p["key"] if "key" in p else context
    value = context @ p["value"] if "value" in p else context
    width = query.shape[-1] // N
    out = np.zeros((*x.shape[:2], N, width))
    for b, t, n in np.ndindex(*out.shape[:3]):
        q, k, v = (heads(y, width)[b, :, n] for y in (query, key, value))
        keep = [s for s in range(lengths[b]) if span is None or span(t, s)]
        if centers is not None:
            keep = [s for s in keep if abs(s - centers[b, t, n]) <= window]
        if not keep:
            continue
        terms = np.tanh(q[t] + k) @ p["energy"][n] if kind == "concat" else k @ q[t]
        align = np.exp(terms[keep]) / np.exp(terms[keep]).sum()
        if centers is not None:
            align = align * np.exp(-((keep - centers[b, t, n]) ** 2) / (2 * (window / 2) ** 2))
        out[b, t, n] = align @ v[keep]
    return out.reshape(*x.shape[:2], -1) @ p["out"]


@pytest.mark.parametrize("kind", KINDS)
def test_global_attention_to_a_padded_context_is_the_equations(kind):
    width = D if kind == "dot" else C
    context = CONTEXT[..., :width]
    module = luong(kind=kind, context_width=width)
    out = call(module, X, context, mask=masks.Lengths(LENGTHS))
    assert_close(out, equations(matrices(module), kind, X, context, LENGTHS), scale=20)


def test_the_context_may_be_the_values_as_in_the_paper():
    module = luong(kind="general", context_width=C, share_kv=True)
    assert sorted(matrices(module)) == ["out", "query"]
    out = call(module, X, CONTEXT)
    assert_close(out, equations(matrices(module), "general", X, CONTEXT, [S, S]), scale=20)


def test_additive_attention_to_a_padded_context_is_the_equations():
    module = additive(context_width=C)
    out = call(module, X, CONTEXT, mask=masks.Lengths(LENGTHS))
    assert_close(out, equations(matrices(module), "concat", X, CONTEXT, LENGTHS), scale=20)


def test_concat_is_additive_attention():
    assert_close(call(luong(kind="concat"), X), call(additive(), X))


@pytest.mark.parametrize("kind", KINDS)
def test_monotonic_attention_sees_a_window_around_the_query(kind):
    module = luong(kind=kind, locality="monotonic", window=1)
    out = call(module, X, mask=masks.Lengths(np.array([5, 4])))
    expected = equations(matrices(module), kind, X, X, [5, 4], span=lambda t, s: abs(t - s) <= 1)
    assert_close(out, expected, scale=20)


@pytest.mark.parametrize("kind", KINDS)
def test_predictive_attention_is_the_equations_over_the_row_s_own_length(kind):
    width = D if kind == "dot" else C
    context = CONTEXT[..., :width]
    module = luong(kind=kind, locality="predictive", context_width=width, window=3)
    p = matrices(module)
    hidden = np.tanh(X @ p["center_hidden"]) @ p["center"]
    for lengths, mask in ((LENGTHS, masks.Lengths(LENGTHS)), ([S, S], None)):
        centers = np.reshape(lengths, (B, 1, 1)) / (1 + np.exp(-hidden))
        expected = equations(p, kind, X, context, lengths, centers, window=3)
        out = call(module, X, context, mask=mask)
        assert_close(out, expected, scale=20)


def test_one_query_at_a_time_is_all_at_once():
    # As a recurrent decoder calls it, without positions.
    mask = masks.Lengths(LENGTHS)
    for module in (additive(context_width=C), luong(locality="predictive", context_width=C)):
        whole = call(module, X, CONTEXT, mask=mask)
        step = jax.jit(lambda x, module=module: module(x, CONTEXT, mask=mask))
        for t in range(T):
            assert_close(step(X[:, t : t + 1]), whole[:, t : t + 1], scale=5)


MODULES = {"additive": additive} | {
    f"{kind} {locality}": lambda kind=kind, locality=locality: luong(kind=kind, locality=locality)
    for kind, locality in [
        ("dot", "global"), ("general", "monotonic"), ("concat", "predictive"),
        ("general", "predictive"),
    ]
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_under_a_causal_mask_no_later_token_has_a_say(name):
    module = MODULES[name]()

    def rows(x):
        out = module(x, mask=masks.Causal())
        return out[0].sum(-1), out

    jacobian, out = jax.jit(jax.jacrev(rows, has_aux=True))(X)
    size = np.abs(jacobian[:, 0]).max(-1)
    np.testing.assert_array_equal(size[np.triu_indices(T, 1)], 0)
    assert (np.diagonal(size) > 0).all()
    # Nor has the number of the later tokens.
    assert_close(call(module, X[:, :3], mask=masks.Causal()), out[:, :3], scale=5)


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_learns(name):
    graphdef, params = nn.split(MODULES[name]())
    loss = lambda p: jnp.sum(nn.merge(graphdef, p)(X) ** 2)  # noqa: E731
    for path, gradient in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert (np.abs(gradient) > 0).any(), path


def test_decoding_one_token_with_positions_is_the_last_row():
    for name in ("general monotonic", "general predictive"):
        module = MODULES[name]()
        last = call(
            module, X[:, -1:], X, mask=masks.Causal(), positions=np.array([T - 1]),
            context_positions=np.arange(T),
        )  # fmt: skip
        assert_close(last, call(module, X, mask=masks.Causal())[:, -1:], scale=10)


def test_sizes():
    def count(module):
        return nn.count(nn.split(module)[1])

    energy = N * 4
    assert count(additive()) == 4 * D * D + energy
    assert count(luong(kind="dot")) == 2 * D * D
    assert count(luong(kind="general", context_width=C)) == D * C + C * C + C * D
    assert count(luong(kind="concat", share_kv=True)) == 3 * D * D + energy
    assert count(luong(kind="dot", locality="predictive")) == 3 * D * D + D * N
    assert additive().state_size(5) == luong().state_size(5) == 5 * 2 * D
    assert nn.split(luong())[0] == nn.split(luong())[0]


def test_energies_start_at_unit_logits_and_dtypes_are_those_asked_for():
    module = AdditiveAttention(D, N, head_dim=400, dtype="bfloat16", rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.std(module.energy[...]), 400**-0.5, rtol=0.1)
    assert module.energy.dtype == "float32" and call(module, X).dtype == "bfloat16"
    low, exact = (
        call(luong(kind="general", locality="predictive", dtype=dtype), X)
        for dtype in ("bfloat16", "float32")
    )
    assert low.dtype == "bfloat16"
    assert_close(low, exact, "bfloat16", scale=4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "cosine"}, r"kind: wanted one of \['dot', 'general', 'concat'\], got 'cosine'"),
        ({"locality": "far"}, r"locality: wanted one of \['global', .* got 'far'"),
        ({"window": 3}, r"window: wanted None, .* with locality = 'global', got 3"),
        ({"locality": "monotonic"}, r"window: wanted 1 or more .* got None"),
        ({"locality": "predictive", "window": 0}, r"window: wanted 1 or more .* got 0"),
        ({"kind": "dot", "context_width": 9}, r"context_width: wanted width = 12 .* got 9"),
        ({"context_width": 13}, r"num_heads: wanted a divisor of the context's .* 13, got 3"),
        ({"num_kv_heads": 1}, r"num_kv_heads: wanted 3 with kind = 'general', got 1"),
        ({"head_dim": 5}, r"head_dim: wanted 4 with kind = 'general', got 5"),
        ({"kind": "dot", "share_qk": True}, r"share_qk: wanted False with kind = 'dot', got True"),
    ],
    ids=repr,
)
def test_choices_that_do_not_fit_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LuongAttention(D, N, rngs=nnx.Rngs(0), **kwargs)


def test_an_op_of_one_s_own_and_masks_without_a_length_are_refused():
    for module in (AdditiveAttention, LuongAttention):
        with pytest.raises(TypeError, match="op"):
            module(D, N, op=ops.attention, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="mask: predictive local attention"):
        luong(locality="predictive")(X, mask=masks.SlidingWindow(3))
    assert len(LOCALITIES) == 3
