"""`LinformerAttention` against exact attention and the op, and the sharing of its projections."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.nn.lowrank import LinformerAttention, SequenceProjections
from qkv_jax.ops import masks
from qkv_jax.ops.lowrank import Nystrom
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, D, N, K, R, LENGTH = 3, 7, 12, 6, 2, 5, 11
X = np.random.RandomState(0).randn(B, T, D).astype("f")
LENGTHS = np.array([5, 7, 1])


def make(**kwargs):
    kwargs = {"length": LENGTH, "rank": R, "num_kv_heads": K, "rngs": nnx.Rngs(0), **kwargs}
    return LinformerAttention(D, N, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def _apply(graphdef, params, x, mask, rng):
    return nn.merge(graphdef, params)(x, mask=mask, rng=rng)


def apply(module, x=X, *, mask=None, rng=None):
    return _apply(*nn.split(module), x, mask, rng)


@pytest.mark.parametrize("share_heads", [True, False])
@pytest.mark.parametrize("share_kv_projection", [True, False])
def test_the_projections_have_the_shapes_that_sharing_leaves(share_heads, share_kv_projection):
    module = make(share_heads=share_heads, share_kv_projection=share_kv_projection)
    _, params = nn.split(module)
    shape = (R, LENGTH) if share_heads else (K, R, LENGTH)
    shapes = {name: p.shape for name, p in params["projections"].items()}
    assert shapes == {"key": shape} | ({} if share_kv_projection else {"value": shape})


def test_identity_projections_leave_exact_attention():
    kwargs = {"num_kv_heads": K, "rotary_base": 100.0, "qk_norm": True, "head_dim": 4}
    module = randomised(make(rank=T, **kwargs))
    graphdef, params = nn.split(module)
    params["projections"] = {name: jnp.eye(T, LENGTH) for name in ("key", "value")}
    exact, _ = nn.split(nn.MultiHeadAttention(D, N, rngs=nnx.Rngs(0), **kwargs))
    exact = nn.merge(exact, {name: p for name, p in params.items() if name != "projections"})
    assert_close(apply(nn.merge(graphdef, params)), apply(exact), scale=10)


@pytest.mark.parametrize("share_kv_projection", [True, False])
def test_a_short_input_takes_the_first_columns_of_each_projection(share_kv_projection):
    module = randomised(make(share_heads=False, share_kv_projection=share_kv_projection))
    key, value = module.projections(T)
    E = module.projections.key[...]
    F = E if share_kv_projection else module.projections.value[...]
    assert_close(key, E[..., :T])
    assert_close(value, F[..., :T])
    q, k, v = module.project(X)
    out = module.op(q, k, v, key_projection=E[..., :T], value_projection=F[..., :T])
    assert_close(apply(module), module.out(out.reshape(B, T, -1)), scale=5)


@pytest.mark.parametrize("op", [None, Nystrom(3)], ids=["linformer", "nystrom"])
def test_padding_changes_no_real_token(op):
    module = make() if op is None else nn.MultiHeadAttention(D, N, op=op, rngs=nnx.Rngs(0))
    module = randomised(module, scale=0.3)
    padded = apply(module, mask=masks.Lengths(LENGTHS))
    for b, length in enumerate(LENGTHS):
        alone = apply(module, X[b : b + 1, :length])
        assert_close(padded[b, :length], alone[0], scale=50)


def test_layers_share_projections_that_are_passed_on():
    class Two(nnx.Module):
        def __init__(self, share):
            self.first = make()
            self.second = make(projections=self.first.projections if share else None)

    (shared, params), (_, apart) = (nn.split(Two(share)) for share in (True, False))
    assert nn.count(apart) - nn.count(params) == 2 * R * LENGTH
    both = nn.merge(shared, jax.tree.map(lambda p: p + 1, params))
    assert both.first.projections is both.second.projections

    def loss(params):
        two = nn.merge(shared, params)
        return (two.second(two.first(X)) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(params)
    assert np.abs(gradient["first"]["projections"]["key"]).max() > 0
    assert "projections" not in gradient["second"]


def test_the_dropout_is_the_attention_s():
    module = make(dropout_rate=0.5)
    out = apply(module)
    assert np.abs(apply(module, rng=jax.random.key(0)) - out).max() > 1e-3
    assert_close(apply(make()), out)


def test_mixtures_start_as_large_as_the_keys():
    projections = SequenceProjections(97, 53, rngs=nnx.Rngs(0))
    mixtures = projections.key[...] @ np.random.RandomState(0).randn(97, 31)
    assert 0.9 < np.std(mixtures) < 1.1


def test_the_state_is_the_mixtures():
    assert make().state_size(3) == make().state_size(1000) == 2 * R * K * (D // N)


def test_equal_modules_have_equal_structures():
    (a, _), (b, _) = (nn.split(make(rngs=nnx.Rngs(i))) for i in range(2))
    assert a == b and hash(a) == hash(b)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="length: the projections have 11 columns, got 12 tokens"):
        make()(np.zeros((B, LENGTH + 1, D), "f"))
    with pytest.raises(NotImplementedError, match=r"mask: Linformer mixes all.*causal"):
        make()(X, mask=masks.Causal())
    with pytest.raises(ValueError, match="rank: wanted a positive integer, got 0"):
        make(rank=0)
    with pytest.raises(ValueError, match=r"projections: wanted .* \(5, 13\) and False"):
        make(length=13, projections=make().projections)
    with pytest.raises(ValueError, match=r"projections: wanted .* \(5, 11\) and True"):
        make(share_kv_projection=True, projections=make().projections)
    with pytest.raises(TypeError, match="op"):
        make(op=Nystrom(3))
