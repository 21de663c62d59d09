"""Linformer and Nystromformer: the equations as loops, exact attention, and `transformers`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import masks, scores
from qkv_jax.ops.lowrank import Nystrom, linformer_attention, nystrom_attention, pseudo_inverse
from tests.tolerances import assert_close

B, T, S, N, K, H, h, R = 3, 5, 7, 6, 2, 4, 3, 2
LENGTHS = np.array([5, 7, 2])
nystrom = functools.partial(
    jax.jit, static_argnames=("num_landmarks", "iterations", "scale", "dropout_rate")
)(nystrom_attention)
linformer = functools.partial(jax.jit, static_argnames=("scale", "dropout_rate"))(
    linformer_attention
)


def normal(*shape, seed=0):
    return np.random.RandomState(seed).randn(*shape)


def inputs(T=T, S=S, K=K):
    return normal(B, T, N, H), normal(B, S, K, H, seed=1), normal(B, S, K, h, seed=2)


def smooth_inputs(T):
    """Queries, keys and values that change slowly from token to token, as hidden states do."""
    curves = np.cos(np.pi * np.arange(T)[:, None] * np.arange(4) / T) / 2
    return tuple(
        np.einsum("TC,CBNH->BTNH", curves, normal(4, B, N, H, seed=seed)) for seed in range(3)
    )


def softmax(x):
    exps = np.exp(x - x.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def linformer_by_loops(q, k, v, E, F, lengths):
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        head = n // (q.shape[2] // k.shape[2])
        E_n, F_n = (M if M.ndim == 2 else M[head] for M in (E, F))
        keys, values = (
            M[:, : lengths[b]] @ x[b, : lengths[b], head] for M, x in ((E_n, k), (F_n, v))
        )
        out[b, :, n] = softmax(q[b, :, n] @ keys.T / np.sqrt(q.shape[-1])) @ values
    return out


def nystrom_by_loops(q, k, v, num_landmarks, lengths, scale=H**-0.5):
    """With NumPy's pseudo-inverse; 0 for padded queries."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        length, head = lengths[b], n // (q.shape[2] // k.shape[2])
        queries, keys, values = (x[b, :length, i] for x, i in ((q, n), (k, head), (v, head)))
        m = min(num_landmarks, length)
        segment = np.array([token * m // length for token in range(length)])
        q_mean, k_mean = (
            np.stack([x[segment == i].mean(0) for i in range(m)]) for x in (queries, keys)
        )
        first, crossing, last = (
            softmax(scale * x @ y.T)
            for x, y in ((queries, k_mean), (q_mean, k_mean), (q_mean, keys))
        )
        out[b, :length, n] = first @ np.linalg.pinv(crossing) @ (last @ values)
    return out


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
def test_linformer_is_the_equation_head_by_head(lengths, per_head):
    shape = (K, R, S) if per_head else (R, S)
    E, F = normal(*shape, seed=3), normal(*shape, seed=4)
    mask = None if lengths is None else masks.Lengths(lengths)
    expected = linformer_by_loops(*inputs(), E, F, [S] * B if lengths is None else lengths)
    with jax.enable_x64(True):
        out = linformer(*inputs(), key_projection=E, value_projection=F, mask=mask)
        assert_close(out, expected)


def test_linformer_with_identity_projections_is_exact_with_its_gradients():
    with jax.enable_x64(True):
        one, weights = np.eye(S), normal(B, T, N, h, seed=5)

        def gradients(f):
            return jax.jit(
                jax.value_and_grad(lambda *x: (f(*x) * weights).sum(), argnums=(0, 1, 2))
            )(*inputs())

        actual = gradients(
            functools.partial(linformer_attention, key_projection=one, value_projection=one)
        )
        jax.tree.map(assert_close, actual, gradients(ops.attention))


def test_the_scale_and_the_dropout_are_those_of_attention_over_the_mixtures():
    E, F = normal(R, S, seed=3), normal(R, S, seed=4)
    kwargs = {"scale": 0.7, "dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
    q, k, v = (x.astype("f") for x in inputs())
    mixtures = (np.einsum("RS,BSKH->BRKH", M, x).astype("f") for M, x in ((E, k), (F, v)))
    expected = jax.jit(lambda *x: ops.attention(*x, **kwargs))(q, *mixtures)
    out = linformer(q, k, v, key_projection=E, value_projection=F, **kwargs)
    assert_close(out, expected, scale=5)
    assert np.abs(out - linformer(q, k, v, key_projection=E, value_projection=F)).max() > 0.1


@pytest.mark.parametrize("num_landmarks", [2, 5, 11])
@pytest.mark.parametrize("lengths", [[7] * B, LENGTHS], ids=["whole", "padded"])
def test_nystrom_is_the_equation_with_numpy_s_pseudo_inverse(num_landmarks, lengths):
    q, k, v = inputs(T=7)
    mask = masks.Lengths(np.array(lengths))
    with jax.enable_x64(True):
        kwargs = {"num_landmarks": num_landmarks, "iterations": 30, "scale": 0.7}
        out = nystrom(q, k, v, mask=mask, **kwargs)
        if list(lengths) == [7] * B:
            assert_close(nystrom(q, k, v, **kwargs), out)
        real = (np.arange(7) < np.array(lengths)[:, None])[..., None, None]
        # The crossing matrices are as ill-conditioned as 10^4, and so is the pseudo-inverse.
        assert_close(
            np.where(real, out, 0), nystrom_by_loops(q, k, v, num_landmarks, lengths, scale=0.7),
            dtype="float64", scale=1e5,
        )  # fmt: skip


def test_nystrom_with_every_token_a_landmark_is_exact_attention_with_its_gradients():
    q = normal(B, T, N, H)
    k, v = 2 * q[:, :, ::3] + 0.1 * normal(B, T, K, H), normal(B, T, K, h)
    weights = normal(B, T, N, h, seed=5)
    lengths = [5, 2, 0]
    with jax.enable_x64(True):

        def gradients_and_output(f, **kwargs):
            def loss(q, k, v):
                out = f(q, k, v, mask=masks.Lengths(np.array(lengths)), **kwargs)
                return (out * weights).sum(), out

            return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

        of_inputs, out = gradients_and_output(nystrom_attention, num_landmarks=T, iterations=40)
        expected_of_inputs, expected = gradients_and_output(ops.attention)
        # The inverse is of matrices whose condition is up to 10^4. (A padded query is no landmark:
        # its output is an approximation.)
        for b, length in enumerate(lengths):
            assert_close(out[b, :length], expected[b, :length], scale=1e5)
        for actual, wanted in zip(of_inputs, expected_of_inputs, strict=True):
            assert_close(actual[0], wanted[0], scale=1e5)
            assert np.isfinite(actual).all() and (actual[2] == 0).all()
        assert (out[2] == 0).all()


def test_the_error_of_nystrom_falls_as_landmarks_are_added():
    q, k, v = (x.astype("f") for x in smooth_inputs(31))
    exact = jax.jit(ops.attention)(q, k, v)
    errors = [
        np.linalg.norm(nystrom(q, k, v, num_landmarks=m) - exact) / np.linalg.norm(exact)
        for m in (1, 3, 5, 11)
    ]
    assert all(b < a for a, b in itertools.pairwise(errors)) and errors[-1] < 0.01, errors


@pytest.mark.parametrize("op", ["linformer", "nystrom"])
def test_padding_changes_no_real_token_s_value_or_gradient(op):
    q, k, v = inputs(T=S)
    E, F = normal(R, S, seed=3), normal(R, S, seed=4)
    weights = normal(B, S, N, h, seed=5)
    with jax.enable_x64(True):

        def value_and_gradients(length, mask):
            def loss(q, k, v):
                if op == "nystrom":
                    out = nystrom_attention(q, k, v, num_landmarks=6, mask=mask)
                else:
                    projections = {
                        "key_projection": E[:, : k.shape[1]],
                        "value_projection": F[:, : k.shape[1]],
                    }
                    out = linformer_attention(q, k, v, mask=mask, **projections)
                return (out * weights[:, : q.shape[1]])[:, :5].sum(), out[:, :5]

            x = [a[:, :length] for a in (q, k, v)]
            gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*x)
            return out, [g[:, :5] for g in gradients]

        padded = value_and_gradients(S, masks.Lengths(5))
        alone = value_and_gradients(5, None)
        jax.tree.map(functools.partial(assert_close, scale=100), padded, alone)


@pytest.mark.parametrize("iterations", [6, 12])
def test_the_pseudo_inverse_is_numpy_s(iterations):
    with jax.enable_x64(True):
        # Singular values within a factor of 7 are within the reach of 6 steps.
        left, right = (np.linalg.qr(normal(2, 5, 5, seed=seed))[0] for seed in (0, 1))
        a = left * np.linspace(1, 7, 5) @ right
        a = np.pad(a, ((0, 1), (0, 1), (0, 1)))  # an empty row and column, and a matrix of zeros
        error = np.abs(pseudo_inverse(a, iterations) - np.linalg.pinv(a)).max()
        assert error < {6: 0.05, 12: 1e-12}[iterations]


def test_the_first_steps_multiply_small_singular_values_by_13_quarters():
    z = jnp.asarray([pseudo_inverse(np.diag([1.0, 1e-3]), n)[1, 1] for n in range(1, 5)])
    assert_close(z[1:] / z[:-1], [3.25] * 3, scale=100)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_output_has_the_dtype_of_v_and_intermediates_are_float32(dtype):
    q, k, v = (jnp.asarray(x, dtype) for x in inputs(T=S))
    E, F = normal(R, S, seed=3).astype("f"), normal(R, S, seed=4).astype("f")
    exact = [np.asarray(x, np.float64) for x in (q, k, v)]
    out = linformer(q, k, v, key_projection=E, value_projection=F)
    assert out.dtype == dtype
    assert_close(out, linformer_by_loops(*exact, E, F, [S] * B))
    out = nystrom(q, k, v, num_landmarks=3, iterations=12)
    assert out.dtype == dtype
    # An inverse of condition 100 rounds in float32; bfloat16 hides it.
    expected = nystrom_by_loops(*exact, 3, [S] * B)
    assert_close(out, expected, scale=100 if dtype == "float32" else 1)


def test_nystrom_as_an_op_has_its_settings_as_fields():
    op = Nystrom(num_landmarks=3, iterations=4)
    assert op == Nystrom(3, 4) != Nystrom(3) and hash(op) == hash(Nystrom(3, 4))
    q, k, v = (x.astype("f") for x in inputs(T=S))
    mask = masks.Lengths(LENGTHS)
    kwargs = {"scale": 0.3, "dropout_rate": 0.5, "dropout_rng": jax.random.key(0), "mask": mask}
    positions = {"q_positions": np.arange(S), "kv_positions": np.arange(S)}
    out = jax.jit(lambda q, k, v: op(q, k, v, **kwargs, **positions))(q, k, v)
    assert_close(out, nystrom(q, k, v, num_landmarks=3, iterations=4, **kwargs))
    del kwargs["dropout_rate"]
    assert np.abs(out - nystrom(q, k, v, num_landmarks=3, iterations=4, **kwargs)).max() > 0.1


def test_what_cannot_be_honoured_raises():
    q, k, v = (x.astype("f") for x in inputs(T=S))
    E = np.ones((R, S), "f")
    projected = functools.partial(linformer_attention, key_projection=E, value_projection=E)
    for op, who in ((projected, "Linformer"), (Nystrom(3), "Nystrom attention")):
        with pytest.raises(NotImplementedError, match=f"mask: {who} mixes all.*causal"):
            op(q, k, v, mask=masks.Causal() & masks.Lengths(3))
        with pytest.raises(NotImplementedError, match=f"mask: {who}.*SlidingWindow"):
            op(q, k, v, mask=masks.SlidingWindow(3))
        with pytest.raises(NotImplementedError, match=f"score: {who} has no logit"):
            op(q, k, v, score=scores.Softcap(3.0))
        with pytest.raises(ValueError, match="dropout_rng: wanted a key"):
            op(q, k, v, dropout_rate=0.5)
    wanted = r"wanted floating \[r, S\] = \[r, 7\] or \[K, r, S\] = \[2, r, 7\], got float32\[2,6\]"
    for name in ("key_projection", "value_projection"):
        with pytest.raises(ValueError, match=f"{name}: {wanted}"):
            projected(q, k, v, **{name: E[:, :6]})
    with pytest.raises(ValueError, match="key_projection: wanted floating"):
        projected(q, k, v, key_projection=np.ones((N, R, S), "f"))
    with pytest.raises(ValueError, match="self-attention, got 5 queries and 7 keys"):
        Nystrom(3)(q[:, :5], k, v)
    with pytest.raises(ValueError, match="num_landmarks, iterations: wanted positive"):
        Nystrom(0)(q, k, v)


@pytest.mark.oracle
def test_nystrom_is_that_of_transformers_with_its_gradients():
    import torch
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    T, m = 12, 4
    config = NystromformerConfig(
        hidden_size=N * H, num_attention_heads=N, num_landmarks=m, segment_means_seq_len=T,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = NystromformerSelfAttention(config)
    layer.conv_kernel_size = None  # no convolution beside the attention
    layer.init_option = "exact"  # the pseudo-inverse starts from each matrix's own norm
    one = torch.eye(N * H)
    for part in (layer.query, layer.key, layer.value):
        part.weight.data, part.bias.data = one, torch.zeros(N * H)

    x = normal(B, T, N * H).astype("f")
    theirs = torch.tensor(x, requires_grad=True)
    expected = layer(theirs)[0]
    (expected**2).sum().backward()

    def loss(x):
        heads = x.reshape(B, T, N, H)
        out = nystrom_attention(heads, heads, heads, num_landmarks=m).reshape(B, T, -1)
        return (out**2).sum(), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(x)
    assert_close(out, expected.detach(), scale=10)
    assert_close(gradient, theirs.grad, scale=100)
