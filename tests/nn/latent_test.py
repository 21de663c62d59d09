"""`LatentAttention`: its two forms, its positions, its sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.nn.latent import LatentAttention
from qkv_jax.ops import masks
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, D, N, H, C, R = 2, 5, 12, 3, 8, 7, 2
X = np.random.RandomState(0).randn(B, T, D).astype("f")
KINDS = {
    "rotary": {},
    "query latent": {"query_latent_dim": 11, "use_bias": True},
    "no rotary": {"rotary_base": None},
    "empty rotary": {"rotary_dim": 0},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def latent_attention(**kwargs):
    kwargs = {"head_dim": H, "latent_dim": C, **kwargs}
    if kwargs.get("rotary_base", 1) is not None:
        kwargs = {"rotary_dim": R, "rotary_base": 100.0} | kwargs
    return randomised(LatentAttention(D, N, **kwargs, rngs=nnx.Rngs(0)))


def call(module, *inputs, **kwargs):
    """The module's output, compiled as a whole: op by op takes longer."""
    return jax.jit(lambda *inputs: module(*inputs, **kwargs))(*inputs)


@every_kind
def test_decoding_from_compressed_tokens_is_the_plain_form(kind):
    module = latent_attention(**KINDS[kind])
    plain = call(module, X, mask=masks.Causal())
    absorbed = jax.jit(
        lambda x: module.attend_absorbed(x, *module.compress(x), mask=masks.Causal())
    )(X)
    assert_close(absorbed, plain, scale=20)

    # One token at a time, each compressed once.
    @jax.jit
    def step(x, state, t):
        new = module.compress(x, positions=t[None])
        state = [jax.lax.dynamic_update_slice(a, b, (0, t, 0)) for a, b in zip(state, new)]  # noqa: B905
        return module.attend_absorbed(x, *state, mask=masks.Causal(), positions=t[None]), state

    state = [jnp.zeros((B, T, module.latent_dim)), jnp.zeros((B, T, module.rotary_dim))]
    for t in range(T):
        out, state = step(X[:, t : t + 1], state, jnp.array(t))
        assert_close(out, plain[:, t : t + 1], scale=20)
    assert sum(x[0].size for x in state) == module.state_size(T)


@every_kind
def test_a_token_s_output_depends_on_no_later_token(kind):
    module = latent_attention(**KINDS[kind])
    jacobian = jax.jit(jax.jacrev(lambda x: module(x, mask=masks.Causal())[0].sum(-1)))(X)[:, 0]
    size = np.abs(jacobian).max(-1)
    assert (size[np.tril_indices(T)] > 0).all()
    np.testing.assert_array_equal(size[np.triu_indices(T, 1)], 0)


@every_kind
def test_only_differences_of_positions_matter_and_only_to_the_rotary_part(kind):
    module = latent_attention(**KINDS[kind])
    at = jax.jit(lambda p: module(X, mask=masks.Causal(), positions=p))
    positions = np.array([[0, 1, 2, 3, 4], [4, 5, 7, 8, 9]])
    assert_close(at(positions + 50), at(positions), scale=50)
    stretched = np.abs(at(positions * 2) - at(positions)).max()
    assert (stretched > 1e-2) == (module.rotary_dim > 0)
    assert_close(at(np.arange(T)), call(module, X, mask=masks.Causal()))


def test_without_positions_tokens_are_a_set():
    module = latent_attention(rotary_base=None)
    order = np.array([3, 0, 4, 1, 2])
    assert_close(call(module, X[:, order]), call(module, X)[:, order], scale=10)


def test_padding_changes_nothing():
    module = latent_attention()
    lengths = np.array([3, 5])
    mask = masks.Causal() & masks.Lengths(lengths)
    real = np.arange(T)[:, None] < lengths[:, None, None]
    out, other = (call(module, x, mask=mask) for x in (X, np.where(real, X, 7)))
    assert_close(np.where(real, other, 0), np.where(real, out, 0))


def test_dropout_happens_only_with_a_key():
    module = latent_attention(dropout_rate=0.5)
    whole = call(module, X)
    np.testing.assert_array_equal(whole, call(latent_attention(), X))
    rng = jax.random.key(0)
    dropped = call(module, X, rng=rng)
    assert np.abs(dropped - whole).max() > 0.1
    absorbed = jax.jit(lambda x: module.attend_absorbed(x, *module.compress(x), rng=rng))(X)
    assert_close(absorbed, dropped, scale=20)


def test_parameters_are_those_of_the_paper():
    module = latent_attention(query_latent_dim=11)
    down, up = D * (11 + C + R) + 11 + C, 11 * N * (R + H) + 2 * C * N * H
    assert nn.count(nn.split(module)[1]) == down + up + N * H * D
    module = LatentAttention(D, N, head_dim=H, rngs=nnx.Rngs(0))
    assert (module.latent_dim, module.rotary_dim) == (4 * H, H // 2)
    assert LatentAttention(D, N, rotary_base=None, rngs=nnx.Rngs(0)).rotary_dim == 0
    assert nn.split(module)[0] == nn.split(LatentAttention(D, N, head_dim=H, rngs=nnx.Rngs(1)))[0]


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    module = latent_attention(dtype="bfloat16", query_latent_dim=11)
    out = call(module, X, mask=masks.Causal())
    assert out.dtype == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(nn.split(module)[1])} == {"float32"}
    exact = call(latent_attention(query_latent_dim=11), X, mask=masks.Causal())
    assert_close(out, exact, scale=4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 5}, r"num_heads: wanted a divisor of width = 12 .* got 5"),
        ({"num_heads": 0}, r"num_heads.* got 0"),
        ({"rotary_dim": 3}, r"rotary_dim: wanted an even number >= 0, got 3"),
        ({"rotary_dim": 2, "rotary_base": None}, r"rotary_dim: wanted 0 without a .* got 2"),
    ],
    ids=repr,
)
def test_sizes_that_do_not_fit_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LatentAttention(**({"width": D, "num_heads": N} | kwargs), rngs=nnx.Rngs(0))
