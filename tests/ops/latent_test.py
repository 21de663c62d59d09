"""Latent attention against NumPy loops over its equations, and its two forms against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import masks, scores
from qkv_jax.ops.latent import absorbed_latent_attention, latent_attention
from tests.tolerances import assert_close

B, T, S, N, C, R, H, h = 2, 5, 7, 3, 11, 2, 4, 13
FORMS = [latent_attention, absorbed_latent_attention]
every_form = pytest.mark.parametrize("form", FORMS, ids=["plain", "absorbed"])


def inputs(R=R, S=S, dtype="float64"):
    random = np.random.RandomState(0)
    shapes = ((B, T, N, R + H), (B, S, C), (B, S, R), (C, N, H), (C, N, h))
    return [random.randn(*shape).astype(dtype) for shape in shapes]


def numpy_latent_attention(q, latent, k_rotary, key_up, value_up, allowed, scale):
    """Row by row, as in section 2.1.3 of the paper."""
    B, T, N, _ = q.shape
    R = k_rotary.shape[-1]
    out = np.zeros((B, T, N, value_up.shape[-1]))
    for b, t, n in np.ndindex(B, T, N):
        keys = [s for s in range(latent.shape[1]) if allowed[b, t, s]]
        if not keys:
            continue
        logits = [
            q[b, t, n, R:] @ (key_up[:, n].T @ latent[b, s]) + q[b, t, n, :R] @ k_rotary[b, s]
            for s in keys
        ]
        exps = np.exp(scale * np.array(logits))
        values = [value_up[:, n].T @ latent[b, s] for s in keys]
        out[b, t, n] = exps / exps.sum() @ np.array(values)
    return out


LENGTHS = np.array([0, 6])
POSITIONS = np.array([[9, 2, 6, 4, 5], [6, 3, 2, 0, 1]])
CASES = {
    "everything": ({}, np.ones((B, T, S), bool)),
    "lengths": (
        {"mask": masks.Lengths(LENGTHS)},
        np.broadcast_to(np.arange(S) < LENGTHS[:, None, None], (B, T, S)),
    ),
    "causal, the last queries": (
        {"mask": masks.Causal(), "q_positions": np.arange(2, 7)},
        np.broadcast_to(np.arange(S) <= np.arange(2, 7)[:, None], (B, T, S)),
    ),
    "causal, positions per row": (
        {"mask": masks.Causal(), "q_positions": POSITIONS, "kv_positions": np.arange(S) + 2},
        np.arange(S) + 2 <= POSITIONS[:, :, None],
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


@every_form
@every_case
def test_it_is_the_equations_row_by_row(form, case):
    kwargs, allowed = CASES[case]
    with jax.enable_x64(True):
        out = jax.jit(lambda *x: form(*x, **kwargs))(*inputs())
    assert_close(out, numpy_latent_attention(*inputs(), allowed, (R + H) ** -0.5), scale=10)


@every_case
def test_both_forms_have_the_same_gradients(case):
    kwargs, _ = CASES[case]
    kwargs = kwargs | {"score": scores.Softcap(2.0)}

    def gradients(form):
        loss = lambda *x: jnp.sum(form(*x, **kwargs) ** 3)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=range(5)))(*inputs())

    with jax.enable_x64(True):
        for plain, absorbed in zip(*map(gradients, FORMS), strict=True):
            assert np.abs(plain).max() > 1e-3
            assert_close(absorbed, plain, scale=1000)


@every_form
def test_the_rotary_part_may_be_empty(form):
    with jax.enable_x64(True):
        out = form(*inputs(R=0), scale=0.3)
    expected = numpy_latent_attention(*inputs(R=0), CASES["everything"][1], 0.3)
    assert_close(out, expected, scale=10)


@every_form
def test_output_has_the_latent_s_dtype_and_empty_rows_no_gradient(form):
    mask = masks.Lengths(LENGTHS)

    @jax.jit
    def gradients(*x):
        out, pullback = jax.vjp(lambda *x: form(*x, mask=mask), *x)
        return out, pullback(jnp.ones_like(out))

    x = inputs(dtype="float32")
    out, (q, latent, *_) = gradients(*x)
    for empty in (out[0], q[0], latent[0]):
        np.testing.assert_array_equal(empty, 0)
    low = [part.astype("bfloat16") for part in x]
    exact = gradients(*(part.astype("float32") for part in low))[0]
    low = gradients(*low)[0]
    assert (out.dtype, low.dtype) == ("float32", "bfloat16")
    assert_close(low, exact, "bfloat16", scale=5)


def test_both_forms_drop_the_same_weights():
    plain, absorbed = (
        form(*inputs(dtype="float32"), dropout_rate=0.4, dropout_rng=jax.random.key(3))
        for form in FORMS
    )
    assert_close(absorbed, plain, scale=10)
    assert np.abs(plain - latent_attention(*inputs(dtype="float32"))).max() > 0.1


@every_form
@pytest.mark.parametrize(
    ("argument", "shape", "message"),
    [
        (0, (B, T, H), r"q: wanted floating \[B, T, N, R \+ H\], got float32 \[2, 5, 4\]"),
        (0, (B, T, N, H), r"k_rotary: wanted \[B, S, R\] = \[2, 7, 0\] .* got \[2, 7, 2\]"),
        (1, (B, S, N, C), r"latent: wanted floating \[B, S, C\], got float32 \[2, 7, 3, 11\]"),
        (1, (B, T, C), r"latent: wanted \[B, S, C\] = \[2, 7, 11\] .* got \[2, 5, 11\]"),
        (2, (1, S, R), r"k_rotary: wanted \[B, S, R\] = \[2, 7, 2\] .* got \[1, 7, 2\]"),
        (3, (C, 1, H), r"key_up: wanted \[C, N, H\] = \[11, 3, 4\] .* got \[11, 1, 4\]"),
        (4, (C, 1, h), r"value_up: wanted \[C, N, h\] = \[11, 3, 13\] .* got \[11, 1, 13\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(form, argument, shape, message):
    x = inputs(dtype="float32")
    x[argument] = np.zeros(shape, "float32")
    with pytest.raises(ValueError, match=message):
        form(*x)


@every_form
def test_integers_and_nothing_are_no_keys(form):
    q, latent, k_rotary, *matrices = inputs(dtype="float32")
    for wrong in (k_rotary.astype(int), None):
        with pytest.raises(ValueError, match=r"k_rotary: wanted floating \[B, S, R\], got"):
            form(q, latent, wrong, *matrices)
