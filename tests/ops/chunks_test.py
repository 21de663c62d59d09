"""The recurrences in all their forms, against loops in NumPy written from the equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops.delta import delta_rule, delta_rule_parallel, delta_rule_step
from qkv_jax.ops.linear import linear_attention, linear_attention_parallel, linear_attention_step
from tests.tolerances import assert_close

B, T, N, K, H, h = 2, 11, 6, 3, 5, 7
FORMS = {
    "linear": (linear_attention, linear_attention_parallel, linear_attention_step),
    "delta": (delta_rule, delta_rule_parallel, delta_rule_step),
}
RULES = sorted(FORMS)
DECAYS = ("none", "head", "channel")
# One recurrence of each rule and each way to decay, where compiling all six would take long.
SOME = [("linear", "head"), ("delta", "channel")]


def tokens(rule, decay, *, T=T, K=K, strength=0.3, dtype=np.float64, seed=0):
    """The arrays of a call by name, and a state; keys have length 1."""
    random = np.random.RandomState(seed)
    q, k, v = random.randn(B, T, N, H), random.randn(B, T, K, H), random.randn(B, T, K, h)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = {"q": q, "k": k, "v": v}
    if decay != "none":
        shape = (B, T, K) if decay == "head" else (B, T, K, H)
        arrays["log_decay"] = -strength * np.abs(random.randn(*shape))
    if rule == "delta":
        arrays["beta"] = random.uniform(0.1, 1.5, (B, T, K))
    arrays["state"] = random.randn(B, K, H, h)
    return {name: x.astype(dtype) for name, x in arrays.items()}


def loop(q, k, v, state, log_decay=None, beta=None):
    """S = exp(log_decay) S;  S = S + k u^T;  out = S^T q: one row, head and token after another."""
    out, state = np.zeros((*q.shape[:3], v.shape[-1])), np.array(state, np.float64)
    for b, t, n in np.ndindex(*k.shape[:3]):
        S, key, u = state[b, n], k[b, t, n], v[b, t, n]
        if log_decay is not None:
            S *= np.exp(np.reshape(log_decay[b, t, n], (-1, 1)))
        if beta is not None:
            u = beta[b, t, n] * (u - S.T @ key)
        S += np.outer(key, u)
        for g in range(q.shape[2] // k.shape[2]):
            head = n * (q.shape[2] // k.shape[2]) + g
            out[b, t, head] = S.T @ q[b, t, head] / np.sqrt(q.shape[-1])
    return out, state


def stepped(step, *, state, **arrays):
    """The one-step form, scanned over the sequence."""

    def body(state, token):
        out, state = step(**token, state=state)
        return state, out

    state, out = jax.lax.scan(
        body, state, jax.tree.map(lambda x: jnp.moveaxis(jnp.asarray(x), 1, 0), arrays)
    )
    return jnp.moveaxis(out, 0, 1), state


def all_forms(rule, **kwargs):
    chunked, parallel, step = FORMS[rule]
    return {
        "chunked": functools.partial(chunked, **kwargs),
        "parallel": parallel,
        "stepped": functools.partial(stepped, step),
    }


def gradients_of(f):
    """From arrays to gradients of a weighted sum of out and state by all of them, and those two."""

    def loss(arrays):
        out, state = f(**arrays)
        random = np.random.RandomState(1)
        total = (out * random.randn(*out.shape)).sum() + (state * random.randn(*state.shape)).sum()
        return total, (out, state)

    return jax.jit(jax.grad(loss, has_aux=True))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_all_forms_are_the_loop_in_values_states_and_gradients(rule, decay):
    with jax.enable_x64(True):
        arrays = tokens(rule, decay)
        out, state = loop(**arrays)
        found = {n: gradients_of(f)(arrays) for n, f in all_forms(rule, chunk_size=4).items()}
        expected, _ = found["stepped"]
        for gradients, (found_out, found_state) in found.values():
            assert found_out.dtype == found_state.dtype == np.float64
            assert_close(found_out, out)
            assert_close(found_state, state)
            for name, gradient in expected.items():
                assert_close(gradients[name], gradient, scale=10)


@pytest.mark.parametrize(("rule", "decay"), SOME)
def test_strong_decays_overflow_nowhere_and_weak_ones_keep_their_digits(rule, decay):
    # -5 at each of 16 tokens; and 16 tokens that decay little beside some that wipe the state out,
    # where differences of running sums would round weights by 1e-4. In float32.
    strong = tokens(rule, decay, T=19)
    strong["log_decay"] = np.full_like(strong["log_decay"], -5.0)
    mixed = tokens(rule, decay, T=19, strength=0.01)
    mixed["log_decay"][:, 5::8] = -900.0
    f = gradients_of(functools.partial(FORMS[rule][0], chunk_size=16))
    with jax.enable_x64(True):
        exact_form = gradients_of(functools.partial(stepped, FORMS[rule][2]))
        exact_gradients = [exact_form(exact)[0] for exact in (strong, mixed)]
    for exact, expected in zip((strong, mixed), exact_gradients, strict=True):
        out, state = loop(**exact)
        gradients, (found, found_state) = f(jax.tree.map(np.float32, exact))
        assert found.dtype == found_state.dtype == np.float32
        assert_close(found, out)
        assert_close(found_state, state)
        for name, gradient in expected.items():
            assert_close(gradients[name], gradient, scale=3)


@pytest.mark.parametrize(("rule", "decay"), SOME)
def test_minus_infinity_forgets_all_without_nan(rule, decay):
    arrays = tokens(rule, decay, dtype=np.float32)
    arrays["log_decay"][:, 6] = -np.inf
    alone = {name: x[:, 6:] for name, x in arrays.items() if name != "state"}
    alone["state"] = np.zeros_like(arrays["state"])
    expected, expected_state = loop(**alone)
    gradients, (out, state) = gradients_of(functools.partial(FORMS[rule][0], chunk_size=4))(arrays)
    assert_close(out[:, 6:], expected)
    assert_close(state, expected_state)
    assert all(np.isfinite(x).all() for x in gradients.values())
    np.testing.assert_array_equal(gradients["log_decay"][:, 6], 0)
    for f in all_forms(rule).values():
        assert_close(jax.jit(f)(**arrays)[1], expected_state)


@pytest.mark.parametrize("rule", RULES)
def test_narrow_inputs_have_a_float32_state_and_an_output_of_the_values_dtype(rule):
    arrays = jax.tree.map(lambda x: jnp.asarray(x, "bfloat16"), tokens(rule, "channel"))
    out, state = loop(**jax.tree.map(lambda x: np.asarray(x, np.float64), arrays))
    for f in all_forms(rule, chunk_size=4).values():
        found, found_state = jax.jit(f)(**arrays | {"state": arrays["state"].astype("float32")})
        assert found.dtype == "bfloat16" and found_state.dtype == "float32"
        assert_close(found, out)
        assert_close(found_state, state)


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 64])
@pytest.mark.parametrize(("rule", "decay"), SOME)
def test_the_chunk_size_does_not_change_the_result(rule, decay, chunk_size):
    arrays = tokens(rule, decay, dtype=np.float32)
    out, state = loop(**arrays)
    found, found_state = jax.jit(functools.partial(FORMS[rule][0], chunk_size=chunk_size))(**arrays)
    assert_close(found, out)
    assert_close(found_state, state)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "decay"), SOME)
def test_a_state_carries_across_any_split_and_so_do_gradients(rule, decay):
    chunked = functools.partial(FORMS[rule][0], chunk_size=4)
    arrays = tokens(rule, decay)

    def split(cut, *, state, **arrays):
        first, state = chunked(**{name: x[:, :cut] for name, x in arrays.items()}, state=state)
        second, state = chunked(**{name: x[:, cut:] for name, x in arrays.items()}, state=state)
        return jnp.concatenate([first, second], axis=1), state

    with jax.enable_x64(True):
        whole = gradients_of(chunked)(arrays)
        parts = gradients_of(functools.partial(split, 3))(arrays)
        for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
            assert_close(a, b, scale=10)
        for cut in (1, 8):
            out, state = jax.jit(functools.partial(split, cut))(**arrays)
            assert_close(out, whole[1][0])
            assert_close(state, whole[1][1])


@pytest.mark.parametrize(("rule", "decay"), SOME)
def test_padding_writes_nothing_and_does_not_decay(rule, decay):
    lengths = np.array([7, 0])
    arrays = tokens(rule, decay, dtype=np.float32)
    for name, x in arrays.items():
        if name not in ("q", "state"):
            x[0, 7:], x[1] = np.nan, np.nan
    real = {n: x[:1] if n == "state" else x[:1, :7] for n, x in arrays.items()}
    expected, expected_state = loop(**real)

    def padded(lengths, form, **arrays):
        out, state = form(**arrays, lengths=lengths)
        return out[0, :7], state

    chunked = functools.partial(padded, lengths, functools.partial(FORMS[rule][0], chunk_size=4))
    gradients, found = gradients_of(chunked)(arrays)
    for out, state in (found, padded(lengths, FORMS[rule][1], **arrays)):
        assert_close(out, expected[0])
        assert_close(state[0], expected_state[0])
        np.testing.assert_array_equal(state[1], arrays["state"][1])
    for name in gradients.keys() - {"state"}:
        np.testing.assert_array_equal(gradients[name][0, 7:], 0)
        np.testing.assert_array_equal(gradients[name][1], 0)
        assert np.isfinite(gradients[name]).all()
    assert_close(padded(7, FORMS[rule][0], **arrays)[0], expected[0])


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_any_number_of_states_that_divides_the_query_heads(heads):
    for rule, decay in SOME:
        arrays = tokens(rule, decay, K=heads, dtype=np.float32)
        expected, expected_state = loop(**arrays)
        out, state = jax.jit(functools.partial(FORMS[rule][0], chunk_size=4))(**arrays)
        assert_close(out, expected)
        assert_close(state, expected_state)


@pytest.mark.parametrize(("rule", "decay"), SOME)
def test_no_token_reads_a_later_one(rule, decay):
    arrays = tokens(rule, decay, dtype=np.float32)
    f = functools.partial(FORMS[rule][0], chunk_size=4)
    gradients = jax.jit(jax.grad(lambda arrays: f(**arrays)[0][:, 5].sum()))(arrays)
    for name in gradients.keys() - {"state"}:
        np.testing.assert_array_equal(gradients[name][:, 6:], 0)
        assert np.abs(gradients[name][:, 5]).max() > 1e-3
        assert name == "q" or np.abs(gradients[name][:, 0]).max() > 1e-6


@pytest.mark.slow
def test_forward_mode_and_second_derivatives_are_those_of_the_parallel_form():
    arrays, tangents = (tokens("delta", "channel", T=5, seed=seed) for seed in (0, 2))

    def product(f):
        def loss(arrays):
            out, state = f(**arrays)
            return jnp.sin(out).sum() + (state**2).sum()

        return jax.jvp(jax.grad(loss), (arrays,), (tangents,))

    with jax.enable_x64(True):
        chunked = functools.partial(delta_rule, chunk_size=4)
        found, expected = (
            jax.jit(functools.partial(product, f))() for f in (chunked, delta_rule_parallel)
        )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, scale=50)


def test_vmap_adds_an_axis():
    arrays = tokens("delta", "channel", dtype=np.float32)
    stacked = jax.tree.map(lambda x: np.stack([x, x[::-1]]), arrays)
    out, state = jax.jit(jax.vmap(lambda arrays: delta_rule(**arrays, chunk_size=4)))(stacked)
    expected, expected_state = loop(**arrays)
    assert_close(out[0], expected)
    assert_close(state[1], expected_state[::-1])


@pytest.mark.slow
def test_the_gradient_takes_memory_linear_in_the_length():
    def memory(T):
        arrays = {name: jax.ShapeDtypeStruct((1, T, 2, 8), "float32") for name in "qkv"}
        arrays["log_decay"] = arrays["beta"] = jax.ShapeDtypeStruct((1, T, 2), "float32")
        f = jax.jit(jax.grad(lambda arrays: delta_rule(**arrays)[0].sum()))
        return f.lower(arrays).compile().memory_analysis().temp_size_in_bytes

    assert memory(8 * 1024) < 8.5 * memory(1024)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((B, T, H), "f")}, r"q: wanted floating \[B, T, N, H\]"),
        ({"q": np.zeros((B, T, N, H), int)}, r"q: wanted floating .* got int64"),
        ({"q": np.zeros((B, T, 4, H), "f")}, r"k: 3 key/value heads do not divide q's 4 heads"),
        ({"k": np.zeros((B, T + 1, K, H), "f")}, r"k: wanted .* got float32\[2,12,3,5\]"),
        ({"k": np.zeros((B, T, K, H + 1), "f")}, r"k: wanted .* \[2, 11, K, 5\]"),
        ({"v": np.zeros((B, T, K + 1, h), "f")}, r"v: wanted .* \[2, 11, 3, h\]"),
        ({"log_decay": np.zeros((B, T, N), "f")}, r"log_decay: wanted .* \[2, 11, 3\], got"),
        ({"log_decay": np.zeros((B, T, K, 2), "f")}, r"log_decay: wanted .* \[2, 11, 3, 5\], got"),
        ({"beta": np.zeros((B, T, N), "f")}, r"beta: wanted .* \[2, 11, 3\], got"),
        ({"state": np.zeros((B, N, H, h), "f")}, r"state: wanted .* \[2, 3, 5, 7\], got"),
        ({"lengths": np.zeros(3, int)}, r"lengths: wanted integers \[B\] = \[2\], got int64\[3\]"),
        ({"lengths": np.zeros(2)}, r"lengths: wanted integers \[B\] = \[2\], got float64\[2\]"),
        ({"chunk_size": 0}, r"chunk_size: wanted a positive integer, got 0"),
        ({"chunk_size": 2.0}, r"chunk_size: wanted a positive integer, got 2.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        delta_rule(**tokens("delta", "head", dtype=np.float32) | change)


@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "log_decay", "state"])
def test_a_step_names_what_does_not_fit(name):
    arrays = {n: x if n == "state" else x[:, 0] for n, x in tokens("delta", "head").items()}
    with pytest.raises(ValueError, match=rf"{name}: wanted floating"):
        delta_rule_step(**arrays | {name: arrays[name][..., None]})
