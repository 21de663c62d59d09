"""Attention against PyTorch: scaled_dot_product_attention in float64 with all gradients, and
FlexAttention forward, which has no backward pass on a CPU.
"""

import warnings

import jax
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import masks, scores
from tests.tolerances import assert_close

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-all` installs it")
pytestmark = pytest.mark.oracle

B, T, S, N, K, H, h = 2, 5, 7, 6, 3, 11, 13
RANDOM = np.random.RandomState(0)
Q, KEYS, V = RANDOM.randn(B, T, N, H), RANDOM.randn(B, S, N, H), RANDOM.randn(B, S, N, h)
GROUPED_KEYS, GROUPED_V = KEYS[:, :, :K], V[:, :, :K]
current = None  # the implementation under test
COTANGENT = RANDOM.randn(B, T, N, h)
ALLOWED = RANDOM.rand(B, N, T, S) < 0.5
ALLOWED[0, :, 2] = False  # rows without a key
BIAS = RANDOM.randn(1, N, T, S)


def sdpa(q, k, v, bias=None, mask=None, **kwargs):
    """PyTorch's output and the gradients of q, k, v and the bias."""
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v, bias) if x is not None]
    attn_mask = leaves[3] if bias is not None else None if mask is None else torch.tensor(mask)
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in leaves[:3]), attn_mask=attn_mask, **kwargs
    ).transpose(1, 2)
    out.backward(torch.tensor(COTANGENT))
    return out.detach().numpy(), [leaf.grad.numpy() for leaf in leaves]


def ours(q, k, v, bias=None, **kwargs):
    def call(q, k, v, *bias):
        score = scores.Bias(bias[0]) if bias else None
        return ops.attention(q, k, v, score=score, implementation=current, **kwargs)

    out, pullback = jax.vjp(call, *(x for x in (q, k, v, bias) if x is not None))
    return out, pullback(COTANGENT)


def assert_equal(actual, expected):
    assert_close(actual[0], expected[0])
    for gradient, wanted in zip(actual[1], expected[1], strict=True):
        assert_close(gradient, wanted, scale=10)


@pytest.fixture(autouse=True, params=["reference", ops.Blockwise(2, 3)], ids=repr)
def implementation(request):
    global current
    current = request.param
    with jax.enable_x64(True):
        yield current


def test_full():
    assert_equal(ours(Q, KEYS, V), sdpa(Q, KEYS, V))


def test_scale():
    assert_equal(ours(Q, KEYS, V, scale=0.7), sdpa(Q, KEYS, V, scale=0.7))


def test_causal():
    k, v = KEYS[:, :T], V[:, :T]
    assert_equal(ours(Q, k, v, mask=masks.Causal()), sdpa(Q, k, v, is_causal=True))


def test_grouped_queries():
    assert_equal(
        ours(Q, GROUPED_KEYS, GROUPED_V), sdpa(Q, GROUPED_KEYS, GROUPED_V, enable_gqa=True)
    )


def test_boolean_mask_with_empty_rows():
    actual = ours(Q, KEYS, V, mask=masks.Dense(ALLOWED))
    assert (np.asarray(actual[0])[0, 2] == 0).all()
    assert_equal(actual, sdpa(Q, KEYS, V, mask=ALLOWED))


def test_bias_and_its_gradient():
    assert_equal(ours(Q, KEYS, V, BIAS), sdpa(Q, KEYS, V, BIAS))


def test_float32_errs_no_more_than_pytorch_does():
    """Both against float64: at most twice PyTorch's own error."""
    q, k, v = (x.astype(np.float32) for x in (Q, KEYS, V))
    exact = np.asarray(ours(*(x.astype(np.float64) for x in (q, k, v)))[0])
    error = np.abs(np.asarray(ops.attention(q, k, v, implementation=current)) - exact).max()
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(x).transpose(1, 2) for x in (q, k, v))
    )
    assert error <= 2 * np.abs(theirs.transpose(1, 2).numpy() - exact).max()


def test_flex_attention_documents_window_alibi_and_softcap():
    """Its mask and score functions beside our masks and scores, grouped queries too."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    length = 150  # longer than one of its blocks of 128
    random = np.random.RandomState(1)
    q, k, v = (random.randn(B, length, n, 16) for n in (N, K, K))
    ids = np.sort(random.randint(0, 4, (B, length)), axis=1)
    slopes = random.rand(N)
    ids_t, slopes_t = torch.tensor(ids), torch.tensor(slopes)

    def mask_mod(b, head, q_idx, kv_idx):
        near = (q_idx >= kv_idx) & (q_idx - kv_idx <= 40)
        return near & (ids_t[b, q_idx] == ids_t[b, kv_idx])

    def score_mod(logit, b, head, q_idx, kv_idx):
        return 5 * torch.tanh((logit - slopes_t[head] * (q_idx - kv_idx).abs()) / 5)

    block_mask = flex.create_block_mask(mask_mod, B, None, length, length, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow without torch.compile
        expected = flex.flex_attention(
            *(torch.tensor(x).transpose(1, 2) for x in (q, k, v)),
            score_mod=score_mod, block_mask=block_mask, enable_gqa=True,
        ).transpose(1, 2)  # fmt: skip
    implementation = current if current == "reference" else ops.Blockwise(32, 16)
    actual = ops.attention(
        q, k, v, mask=masks.Causal() & masks.SlidingWindow(40) & masks.Segments(ids),
        score=(scores.Alibi(slopes), scores.Softcap(5.0)), implementation=implementation,
    )  # fmt: skip
    assert_close(actual, expected.numpy())
