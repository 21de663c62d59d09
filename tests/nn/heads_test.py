"""Talking heads and differential attention as modules; the latter against DiffLlama's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.nn.heads import DifferentialAttention, TalkingHeadsAttention
from qkv_jax.ops import masks
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, D, N, K = 2, 5, 24, 8, 4
H = D // N
X = np.random.RandomState(0).randn(B, T, D).astype("f")
MODULES = [TalkingHeadsAttention, DifferentialAttention]
every_module = pytest.mark.parametrize("cls", MODULES)


@pytest.mark.oracle
@pytest.mark.parametrize("num_kv_heads", [N, K])
def test_differential_attention_is_diffllama_s(num_kv_heads):
    torch = pytest.importorskip("torch")
    diffllama = pytest.importorskip("transformers.models.diffllama.modeling_diffllama")
    config = diffllama.DiffLlamaConfig(
        hidden_size=D, num_attention_heads=N, num_key_value_heads=num_kv_heads, head_dim=H
    )
    config._attn_implementation = "eager"
    layer = 3
    theirs = diffllama.DiffLlamaAttention(config, layer_idx=layer).eval()
    module = DifferentialAttention(
        D, N, num_kv_heads=num_kv_heads, lambda_init=0.8 - 0.6 * np.exp(-0.3 * layer),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    assert module.lambda_init == pytest.approx(theirs.lambda_init)
    theirs.groupnorm.eps = 1e-5
    _, params = nn.split(module)
    state = {
        f"{theirs_name}.weight": params[name]["kernel"].T
        for name, theirs_name in (
            ("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj"),
        )
    }  # fmt: skip
    state |= {name: params[name] for name in params if name.startswith("lambda")}
    theirs.load_state_dict({name: torch.tensor(np.asarray(x)) for name, x in state.items()})
    unrotated = torch.ones(B, T, H), torch.zeros(B, T, H)
    causal = torch.full((T, T), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        out, _ = theirs(torch.tensor(X), unrotated, causal)
    assert_close(jax.jit(lambda x: module(x, mask=masks.Causal()))(X), out.numpy(), scale=10)


def test_talking_heads_start_as_plain_attention():
    module = TalkingHeadsAttention(D, N, num_kv_heads=K, rngs=nnx.Rngs(0))
    plain = nn.MultiHeadAttention(D, N, num_kv_heads=K, rngs=nnx.Rngs(0))
    assert_close(module(X, mask=masks.Causal()), plain(X, mask=masks.Causal()))


@every_module
def test_it_is_causal_and_trains_every_parameter(cls):
    module = randomised(cls(D, N, num_kv_heads=K, use_bias=True, qk_norm=True, rngs=nnx.Rngs(0)))
    graphdef, params = nn.split(module)
    loss = lambda p, x: (nn.merge(graphdef, p)(x, mask=masks.Causal())[:, 2] ** 2).sum()  # noqa: E731
    of_params, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, X)
    np.testing.assert_array_equal(of_x[:, 3:], 0)
    assert (np.abs(of_x[:, :3]).max(-1) > 0).all()
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(of_params))


@every_module
def test_a_row_that_may_attend_to_nothing_gives_0_and_no_nan(cls):
    graphdef, params = nn.split(cls(D, N, rngs=nnx.Rngs(0)))
    mask = masks.Lengths(np.array([0, 3]))
    with jax.debug_nans(True):
        loss = lambda p, x: (nn.merge(graphdef, p)(x, mask=mask) ** 2).sum()  # noqa: E731
        _, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, X)
    np.testing.assert_array_equal(nn.merge(graphdef, params)(X, mask=mask)[0], 0)
    np.testing.assert_array_equal(of_x[0], 0)


@every_module
def test_parameters_and_state(cls):
    own = {TalkingHeadsAttention: 2 * N * N, DifferentialAttention: 4 * H + 2 * H}[cls]
    module = cls(D, N, num_kv_heads=K, rngs=nnx.Rngs(0))
    plain = nn.MultiHeadAttention(D, N, num_kv_heads=K, rngs=nnx.Rngs(0))
    assert nn.count(nn.split(module)[1]) == nn.count(nn.split(plain)[1]) + own
    assert module.state_size(10) == plain.state_size(10)
    again = cls(D, N, num_kv_heads=K, rngs=nnx.Rngs(1))
    assert nn.split(again)[0] == nn.split(module)[0]
    assert hash(nn.split(again)[0]) == hash(nn.split(module)[0])


@every_module
def test_bfloat16_keeps_float32_parameters(cls):
    module = cls(D, N, dtype="bfloat16", rngs=nnx.Rngs(0))
    out = module(X, mask=masks.Causal())
    assert out.dtype == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(nn.split(module)[1])} == {"float32"}
    assert_close(out, cls(D, N, rngs=nnx.Rngs(0))(X, mask=masks.Causal()), scale=4)


@every_module
def test_dropout_happens_only_with_a_key(cls):
    module = cls(D, N, dropout_rate=0.5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(module(X), cls(D, N, rngs=nnx.Rngs(0))(X))
    assert np.abs(module(X, rng=jax.random.key(0)) - module(X)).max() > 0.01


def test_lambda_is_near_its_start():
    module = DifferentialAttention(D, N, lambda_init=0.3, rngs=nnx.Rngs(0))
    seen = []

    def watch(q, k, v, *, lam, **kwargs):
        seen.append(lam)
        return jnp.zeros(q.shape)

    module.op = watch
    module(X)
    assert abs(seen[0] - 0.3) < 0.1 and seen[0] != 0.3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 3}, "num_heads: heads come in pairs, so wanted an even number, got 3"),
        ({"num_kv_heads": 1}, "num_kv_heads: heads come in pairs, so wanted an even number, got 1"),
        ({"num_kv_heads": 6}, "num_kv_heads: wanted a divisor of num_heads = 8, got 6"),
    ],
)
def test_sizes_that_do_not_fit_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DifferentialAttention(**({"width": D, "num_heads": N} | kwargs), rngs=nnx.Rngs(0))


@every_module
def test_another_op_is_refused(cls):
    with pytest.raises(TypeError, match="op"):
        cls(D, N, op=lambda q, k, v, **kwargs: q, rngs=nnx.Rngs(0))
