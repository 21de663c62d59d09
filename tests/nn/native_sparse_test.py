"""`NativeSparseAttention` against its op on rows compressed by a loop, and its causality."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.nn.native_sparse import NativeSparseAttention
from qkv_jax.ops import masks
from qkv_jax.ops.native_sparse import Pattern, native_sparse_attention
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, D, N, K, H = 2, 19, 10, 6, 3, 4
PATTERN = Pattern(
    compressed_size=6, stride=3, block_size=9, num_selected=1, window=3, num_initial=0, num_local=1
)
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
X = np.random.RandomState(0).randn(B, T, D).astype("f")


def attention(**kwargs):
    settings = {"pattern": PATTERN, "num_kv_heads": K, "head_dim": H, "hidden": 7} | kwargs
    return randomised(NativeSparseAttention(D, N, rngs=nnx.Rngs(0), **settings))


def run(module, x=X, **kwargs):
    graphdef, params = nn.split(module)
    return compiled(lambda params, x: nn.merge(graphdef, params)(x, **kwargs))(params, x)


def compressed(layer, x):
    """Rows 0-5, 3-8, 6-11, 9-14, 12-17, one vector at a time: an MLP with the exact GELU."""
    rows = np.zeros((B, 5, K, H))
    W, b = (np.asarray(p[...], float) for p in (layer.up.kernel, layer.up.bias))
    V, c = (np.asarray(p[...], float) for p in (layer.down.kernel, layer.down.bias))
    for i, m, j in np.ndindex(B, 5, K):
        z = np.concatenate([x[i, t, j] for t in range(3 * m, 3 * m + 6)]) @ W + b
        z *= [0.5 * (1 + math.erf(a / 2**0.5)) for a in z]
        rows[i, m, j] = z @ V + c
    return rows


def test_it_is_the_op_on_compressed_keys_and_values_with_sigmoid_gates():
    module = attention(use_bias=True)
    q, k, v = (np.asarray(x) for x in module.project(X))
    gates = X @ module.gate.kernel[...] + module.gate.bias[...]
    attend = functools.partial(native_sparse_attention, pattern=PATTERN, mask=masks.Causal())
    arrays = {
        "q": q, "k": k, "v": v, "compressed_k": compressed(module.compress_key, k),
        "compressed_v": compressed(module.compress_value, v),
        "gates": 1 / (1 + np.exp(-gates.reshape(B, T, N, 3))),
    }  # fmt: skip
    out = compiled(lambda arrays: attend(**arrays))(arrays)
    expected = module.out(out.reshape(B, T, -1))
    assert_close(run(module, mask=masks.Causal()), expected, scale=10)


def test_causality_by_gradient():
    graphdef, params = nn.split(attention(rotary_base=100.0, qk_norm=True))

    def row(x, t):
        return nn.merge(graphdef, params)(x, mask=masks.Causal())[:, t]

    jacobian = compiled(jax.vmap(lambda t: jax.grad(lambda x: (row(x, t) ** 2).sum())(X)))
    used = np.abs(jacobian(np.arange(T))).max((1, 3)) > 0
    assert not np.triu(used, 1).any() and np.diagonal(used).all()
    assert used[-1, :18].all()  # all that is in a whole row


def test_gradients_reach_every_parameter():
    graphdef, params = nn.split(attention(use_bias=True))
    loss = compiled(jax.grad(lambda p: (nn.merge(graphdef, p)(X, mask=masks.Causal()) ** 2).sum()))
    for x in jax.tree.leaves(loss(params)):
        assert np.isfinite(x).all() and np.abs(x).max() > 0


def test_padding_changes_nothing():
    module, lengths = attention(), np.array([12, T])
    real = np.arange(T) < lengths[:, None]
    padded = np.where(real[..., None], X, 99.0)
    out = run(module, padded, mask=masks.Causal() & masks.Lengths(lengths))
    assert_close(out[real], run(module, mask=masks.Causal())[real], scale=5)


def test_a_sequence_shorter_than_a_row_runs():
    module = attention()
    assert_close(
        run(module, X[:, :4], mask=masks.Causal()),
        run(module, mask=masks.Causal())[:, :4], scale=5,
    )  # fmt: skip


def test_parameters_are_those_of_attention_two_mlps_and_the_gates():
    plain = nn.MultiHeadAttention(D, N, num_kv_heads=K, head_dim=H, rngs=nnx.Rngs(0))
    added = 2 * ((6 * H + 1) * 7 + (7 + 1) * H) + (D + 1) * 3 * N
    assert nn.count(nn.split(attention())[1]) == nn.count(nn.split(plain)[1]) + added
    assert attention(hidden=None).compress_key.up.out_features == 4 * H
    a, b = (nn.split(attention())[0] for _ in "ab")
    assert a == b and hash(a) == hash(b)


def test_bfloat16_computes_in_bfloat16():
    out = run(attention(dtype="bfloat16"), mask=masks.Causal())
    assert out.dtype == "bfloat16"
    assert jnp.isfinite(out).all()


def test_state_size_is_keys_and_values_and_the_compressed_ones():
    module = attention()
    assert module.state_size(4) == 4 * 2 * K * H
    assert module.state_size(19) == (19 + 5) * 2 * K * H


def test_a_decoder_s_mask_is_needed():
    with pytest.raises(NotImplementedError, match="mask: native sparse attention is causal"):
        attention()(X)
