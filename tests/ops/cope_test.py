"""Contextual positions against NumPy loops over the paper's pseudo-code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import masks, scores
from qkv_jax.ops.cope import cope_attention
from tests.tolerances import assert_close

B, T, S, N, K, H, h, P = 2, 5, 7, 6, 3, 4, 11, 3
LENGTHS = np.array([0, 6])


def inputs(dtype="float64", P=P, T=T):
    random = np.random.RandomState(0)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, h), (P, H))
    return [random.randn(*shape).astype(dtype) for shape in shapes]


def numpy_cope(q, k, v, embeddings, allowed):
    """The appendix's `CoPE.forward` and `SelfAttn.forward`, for one query of one head."""
    P = len(embeddings)
    out = np.zeros((B, T, N, h))
    for b, t, n in np.ndindex(B, T, N):
        if not allowed[b, t].any():
            continue
        query = q[b, t, n]
        attn_logits = np.where(allowed[b, t], k[b, :, n // 2] @ query / np.sqrt(H), -np.inf)
        gates = 1 / (1 + np.exp(-attn_logits))
        pos = np.flip(np.cumsum(np.flip(gates))).clip(max=P - 1)
        pos_ceil, pos_floor = np.ceil(pos).astype(int), np.floor(pos).astype(int)
        logits_int = embeddings @ query
        w = pos - pos_floor
        attn_logits = attn_logits + logits_int[pos_ceil] * w + logits_int[pos_floor] * (1 - w)
        attn = np.exp(attn_logits - attn_logits.max())
        out[b, t, n] = attn / attn.sum() @ v[b, :, n // 2]
    return out


Q_POSITIONS = np.arange(2, 7)
CASES = {
    "everything": (None, np.ones((B, T, S), bool)),
    "causal": (masks.Causal(), np.broadcast_to(np.arange(S) <= Q_POSITIONS[:, None], (B, T, S))),
    "holes": (
        masks.Lengths(LENGTHS) & ~masks.Dilated(2),
        (np.arange(S) < LENGTHS[:, None, None])
        & ((Q_POSITIONS[:, None] - np.arange(S)) % 2 == 1),
    ),
}  # fmt: skip


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr("qkv_jax.ops.rows.LOGITS", 2 * B * N * S)


@pytest.mark.parametrize("P", [1, 2, 3, 19])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_paper_s_pseudo_code(case, P):
    mask, allowed = CASES[case]
    with jax.enable_x64(True):
        q, k, v, embeddings = inputs(P=P)
        out = jax.jit(
            lambda *x: cope_attention(
                *x, embeddings=embeddings, mask=mask, q_positions=Q_POSITIONS
            )
        )(q, k, v)  # fmt: skip
        assert_close(out, numpy_cope(q, k, v, embeddings, allowed), scale=10)


def test_gradients_are_those_of_differences(blocks):
    mask = CASES["holes"][0]

    def loss(inputs):
        q, k, v, embeddings = inputs
        out = cope_attention(q, k, v, embeddings=embeddings, mask=mask, q_positions=Q_POSITIONS)
        return jnp.sum(out**3)

    with jax.enable_x64(True):
        x = inputs()
        gradient = jax.jit(jax.grad(loss))(x)
        value = jax.jit(loss)
        random = np.random.RandomState(1)
        for i, part in enumerate(gradient):
            assert np.isfinite(part).all() and np.abs(part).max() > 1e-3
            step = 1e-6 * random.randn(*part.shape)
            ends = [value([*x[:i], x[i] + way * step, *x[i + 1 :]]) for way in (1, -1)]
            np.testing.assert_allclose((ends[0] - ends[1]) / 2, np.vdot(part, step), rtol=1e-6)
        np.testing.assert_array_equal(gradient[0][0], 0)


def test_open_gates_count_tokens():
    # Large logits open every gate; embeddings of large slope then order keys by their distance.
    q = np.zeros((1, S, 1, H), "f")
    q[..., 0], q[..., 1] = 1, 1
    k = np.zeros((1, S, 1, H), "f")
    k[..., 0] = 60
    embeddings = np.zeros((S + 1, H), "f")
    embeddings[:, 1] = np.random.RandomState(0).randn(S + 1)
    v = np.eye(S, dtype="f")[None, :, None]
    weights = cope_attention(q, k, v, embeddings=embeddings, mask=masks.Causal(), scale=1.0)
    distance = np.arange(S)[:, None] - np.arange(S)
    bias = scores.Bias(embeddings[np.maximum(distance + 1, 0), 1])
    expected = ops.attention(q, k, v, mask=masks.Causal(), score=bias, scale=1.0)
    assert_close(weights, expected, scale=10)


def test_embeddings_of_zero_leave_attention_as_it_is():
    q, k, v, embeddings = inputs("float32", T=S)
    kwargs = {
        "mask": masks.Causal(), "score": scores.Softcap(1.0), "dropout_rate": 0.3,
        "dropout_rng": jax.random.key(2),
    }  # fmt: skip
    out = jax.jit(lambda *x: cope_attention(*x, embeddings=0 * embeddings, **kwargs))(q, k, v)
    assert_close(out, jax.jit(lambda *x: ops.attention(*x, **kwargs))(q, k, v), scale=5)


def test_no_query_depends_on_a_later_key():
    q, k, v, embeddings = inputs("float32", T=S)
    rows = lambda k: cope_attention(  # noqa: E731
        q, k, v, embeddings=embeddings, mask=masks.Causal()
    )[0].sum((-1, -2))
    size = np.abs(jax.jit(jax.jacrev(rows))(k)[:, 0]).max((-1, -2))
    np.testing.assert_array_equal(size[np.triu_indices(S, 1)], 0)
    assert (size[np.tril_indices(S)][1:] > 0).all()


def test_low_precision_positions_are_computed_in_single_precision():
    x = [jnp.asarray(part, "bfloat16") for part in inputs("float32")]
    call = jax.jit(lambda q, k, v, e: cope_attention(q, k, v, embeddings=e))
    out = call(*x)
    assert out.dtype == "bfloat16"
    assert_close(out, call(*(part.astype("float32") for part in x)), "bfloat16")


def test_embeddings_that_do_not_fit_are_named():
    q, k, v, embeddings = inputs("float32")
    for wrong in (embeddings[0], embeddings[:, :3], embeddings[:0], embeddings.astype(int), None):
        with pytest.raises(ValueError, match=r"embeddings: wanted floating \[P, H\] = \[P, 4\], g"):
            cope_attention(q, k, v, embeddings=wrong)
