"""Additive and predictive local attention against NumPy loops over the papers' equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import additive, masks, scores
from qkv_jax.ops.additive import additive_attention, local_attention
from tests.tolerances import assert_close

B, T, S, N, K, H, h = 2, 5, 7, 6, 3, 4, 13
LENGTHS = np.array([0, 6])


def inputs(dtype="float64", T=T):
    random = np.random.RandomState(0)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, h), (N, H), (B, N, T))
    q, k, v, energy, centers = (random.randn(*shape).astype(dtype) for shape in shapes)
    return q, k, v, energy, (centers + 1) * 3  # some of them before the first key


def numpy_weights(q, k, energy, allowed, scale, cap):
    """Bahdanau's weights [B, N, T, S], a pair at a time, the logits scaled and capped."""
    weights = np.zeros((B, N, q.shape[1], S))
    for b, n, t in np.ndindex(*weights.shape[:3]):
        for s in range(S):
            if allowed[b, n, t, s]:
                logit = scale * energy[n] @ np.tanh(q[b, t, n] + k[b, s, n // 2])
                weights[b, n, t, s] = np.exp(cap * np.tanh(logit / cap))
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)


def weighted(weights, v):
    return np.einsum("bnts,bsnh->btnh", weights, np.repeat(v, N // K, 2))


ALLOWED = {
    "everything": (None, np.ones((B, 1, T, S), bool)),
    "lengths": (masks.Lengths(LENGTHS), np.arange(S) < LENGTHS[:, None, None, None]),
    "causal": (masks.Causal(), np.arange(S) <= np.arange(2, 7)[:, None]),
}
BLOCKS = {"one block": (2**21, 2**20), "many blocks": (2 * B * N * S, 3 * B * N * 2 * H)}


@pytest.fixture(params=BLOCKS)
def blocks(request, monkeypatch):
    """Rows two at a time, and keys three at a time; or everything at once."""
    logits, terms = BLOCKS[request.param]
    monkeypatch.setattr("qkv_jax.ops.rows.LOGITS", logits)
    monkeypatch.setattr(additive, "TERMS", terms)


@pytest.mark.parametrize("case", ALLOWED)
def test_additive_attention_is_the_equation_pair_by_pair(case, blocks):
    mask, allowed = ALLOWED[case]
    kwargs = {"mask": mask, "score": scores.Softcap(0.7), "q_positions": np.arange(2, 7)}
    with jax.enable_x64(True):
        q, k, v, energy, _ = inputs()
        for scale in (1.0, 0.3):
            given = kwargs | ({} if scale == 1 else {"scale": scale})
            out = jax.jit(lambda *x, given=given: additive_attention(*x, energy=energy, **given))(
                q, k, v
            )
            allowed = np.broadcast_to(allowed, (B, N, T, S))
            weights = numpy_weights(q, k, energy, allowed, scale, cap=0.7)
            assert_close(out, weighted(weights, v), scale=10)


def dense_local(q, k, v, energy, centers, mask, window):
    """The definition, all at once."""
    k, v = jnp.repeat(k, N // K, 2), jnp.repeat(v, N // K, 2)
    if energy is None:
        logits = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
    else:
        logits = jnp.moveaxis((jnp.tanh(q[:, :, None] + k[:, None]) * energy).sum(-1), 3, 1)
    distance = jnp.arange(S) - centers[..., None]
    allowed = mask & (abs(distance) <= window)
    exps = jnp.where(allowed, jnp.exp(logits), 0)
    total = exps.sum(-1, keepdims=True)
    weights = exps / jnp.where(total == 0, 1, total)
    weights *= jnp.exp(-(distance**2) / (2 * (window / 2) ** 2))
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


@pytest.mark.parametrize("with_energy", [False, True], ids=["dot", "additive"])
def test_local_attention_and_its_gradients_are_those_of_the_dense_definition(with_energy, blocks):
    mask, allowed = ALLOWED["lengths"]

    def blocked(q, k, v, energy, centers):
        return local_attention(
            q, k, v, energy=energy if with_energy else None, centers=centers, window=2, mask=mask
        )

    def dense(q, k, v, energy, centers):
        return dense_local(q, k, v, energy if with_energy else None, centers, allowed, 2)

    def value_and_gradients(f):
        def loss(*x):
            out = f(*x)
            return jnp.sum(out**3), out

        return jax.jit(jax.value_and_grad(loss, argnums=range(5), has_aux=True))(*inputs())

    with jax.enable_x64(True):
        (_, out), gradients = value_and_gradients(blocked)
        (_, expected), expected_gradients = value_and_gradients(dense)
        np.testing.assert_array_equal(out[0], 0)
        assert_close(out, expected, scale=10)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            assert_close(ours, theirs, scale=100)
        assert np.abs(gradients[4][1]).max() > 1e-2


def test_gradients_of_additive_attention_are_those_of_the_dense_definition(blocks):
    mask, allowed = ALLOWED["lengths"]
    wide = 1e6  # a window so wide that it is none

    def gradients(f):
        return jax.jit(jax.grad(lambda *x: jnp.sum(f(*x) ** 3), argnums=range(4)))(*inputs()[:4])

    with jax.enable_x64(True):
        centers = np.zeros((B, N, T))
        ours = gradients(lambda q, k, v, e: additive_attention(q, k, v, energy=e, mask=mask))
        dense = gradients(lambda q, k, v, e: dense_local(q, k, v, e, centers, allowed, wide))
        for a, b in zip(ours, dense, strict=True):
            assert np.isfinite(a).all() and np.abs(b).max() > 1e-3
            np.testing.assert_array_equal(a[0] if a.ndim == 4 else 0, 0)
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)  # the window's Gaussian


def test_a_center_for_all_heads_and_one_query_without_a_position():
    q, k, v, _, centers = inputs("float32", T=1)
    shared = local_attention(q, k, v, centers=centers[:, 0], window=3, mask=masks.Lengths(LENGTHS))
    each = np.broadcast_to(centers[:, :1], centers.shape)
    out = local_attention(q, k, v, centers=each, window=3, mask=masks.Lengths(LENGTHS))
    np.testing.assert_array_equal(shared, out)


def test_dropout_drops_the_same_weights_in_every_cut(monkeypatch):
    q, k, v, energy, _ = inputs("float32")

    def dropped(rate):
        kwargs = {"energy": energy, "dropout_rate": rate, "dropout_rng": jax.random.key(5)}
        return jax.jit(lambda *x: additive_attention(*x, **kwargs))(q, k, v)

    whole = dropped(0.4)
    assert np.abs(whole - dropped(0.0)).max() > 0.1
    monkeypatch.setattr("qkv_jax.ops.rows.LOGITS", 2 * B * N * S)
    assert_close(dropped(0.4), whole, scale=5)


def test_memory_grows_with_t_plus_s():
    def bytes_of(T):
        x = [jax.ShapeDtypeStruct((1, T, 2, 32), "float32")] * 3
        energy = jax.ShapeDtypeStruct((2, 32), "float32")
        loss = lambda q, k, v, e: additive_attention(q, k, v, energy=e).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=range(4))).lower(*x, energy).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of(4096) < 4 * bytes_of(1024) < 4096 * 4096 * 32


def test_low_precision_logits_are_computed_in_single_precision():
    q, k, v, energy, centers = (jnp.asarray(x, "bfloat16") for x in inputs("float32"))
    wide = [x.astype("float32") for x in (q, k, v, energy, centers)]
    for op in (
        lambda q, k, v, e, c: additive_attention(q, k, v, energy=e),
        lambda q, k, v, e, c: local_attention(q, k, v, centers=c, window=3),
    ):
        out = jax.jit(op)(q, k, v, energy, centers)
        assert out.dtype == "bfloat16"
        assert_close(out, jax.jit(op)(*wide), "bfloat16")


def test_what_does_not_fit_is_named():
    q, k, v, energy, centers = inputs("float32")
    with pytest.raises(ValueError, match=r"energy: wanted floating \[N, H\] = \[6, 4\], got float"):
        additive_attention(q, k, v, energy=energy.T)
    with pytest.raises(ValueError, match=r"energy: wanted floating .* got int64"):
        local_attention(q, k, v, energy=energy.astype(int), centers=centers, window=1)
    with pytest.raises(ValueError, match=r"centers: wanted floating \[B, T\] = \[2, 5\] or \[B, N"):
        local_attention(q, k, v, centers=centers[:, :2], window=1)
    with pytest.raises(ValueError, match=r"centers: wanted floating .* got None"):
        local_attention(q, k, v, centers=None, window=1)
    with pytest.raises(ValueError, match=r"centers: wanted floating .* got int64"):
        local_attention(q, k, v, centers=centers.astype(int), window=1)
    for window in (0, 2.5):
        with pytest.raises(ValueError, match=f"window: wanted a positive integer, got {window}"):
            local_attention(q, k, v, centers=centers, window=window)
    with pytest.raises(ValueError, match="q_positions"):
        additive_attention(q, k, v, energy=energy, mask=masks.Causal())
