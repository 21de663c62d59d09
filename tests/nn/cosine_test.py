"""`CosineAttention` against the op, and against Swin v2's attention in transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.nn.cosine import CosineAttention
from qkv_jax.ops import masks
from qkv_jax.ops.cosine import cosine_attention
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, D, N = 2, 5, 12, 6
X = np.random.RandomState(0).randn(B, T, D).astype("f")


@pytest.mark.oracle
def test_it_is_the_attention_of_swin_v2():
    torch = pytest.importorskip("torch")
    swin = pytest.importorskip("transformers.models.swinv2.modeling_swinv2")
    config = swin.Swinv2Config(qkv_bias=True, attention_probs_dropout_prob=0.0)
    theirs = swin.Swinv2SelfAttention(config, dim=D, num_heads=N, window_size=2).eval()
    module = CosineAttention(D, N, rngs=nnx.Rngs(0))
    start = nn.split(module)[1]["log_temperature"]
    assert_close(start, theirs.logit_scale.detach().numpy().reshape(N))
    module.log_temperature[...] = jnp.array([0.5, 1, 2, 3, 4, 9])  # the last is above the cap
    graphdef, params = nn.split(module)
    params["out"]["kernel"] = jnp.eye(D)
    module = nn.merge(graphdef, params)
    state = theirs.state_dict()
    for name in ("query", "key", "value"):
        state[f"{name}.weight"] = torch.tensor(np.asarray(params[name]["kernel"]).T)
        if f"{name}.bias" in state:
            state[f"{name}.bias"] *= 0
    for name in state:
        if "continuous_position_bias_mlp" in name:  # the same bias everywhere: none
            state[name] *= 0
    state["logit_scale"] = torch.tensor(np.asarray(params["log_temperature"])).reshape(N, 1, 1)
    theirs.load_state_dict(state)
    x = X[:, :4]  # a window of 2 x 2
    with torch.no_grad():
        [out, *_] = theirs(torch.tensor(x))
    assert_close(module(x), out.numpy(), scale=10)


def test_temperatures_start_at_10_and_end_at_100():
    module = CosineAttention(D, N, num_kv_heads=3, rngs=nnx.Rngs(0))
    assert_close(jnp.exp(module.log_temperature[...]), np.full(N, 10.0))
    seen = []

    def watch(q, k, v, *, temperature, **kwargs):
        seen.append(temperature)
        return cosine_attention(q, k, v, temperature=temperature, **kwargs)

    module.op = watch
    module.log_temperature[...] = jnp.log(jnp.array([1, 20, 99, 100, 101, 1e9]))
    module(X)
    assert_close(seen[0], [1, 20, 99, 100, 100, 100], scale=2)


def test_it_is_causal_and_trains_every_parameter():
    module = randomised(CosineAttention(D, N, num_kv_heads=3, use_bias=True, rngs=nnx.Rngs(0)))
    graphdef, params = nn.split(module)
    loss = lambda p, x: (nn.merge(graphdef, p)(x, mask=masks.Causal())[:, 2] ** 2).sum()  # noqa: E731
    of_params, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, X)
    np.testing.assert_array_equal(of_x[:, 3:], 0)
    assert (np.abs(of_x[:, :3]).max(-1) > 0).all()
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(of_params))


def test_parameters_and_state():
    module = CosineAttention(D, N, num_kv_heads=3, rngs=nnx.Rngs(0))
    plain = nn.MultiHeadAttention(D, N, num_kv_heads=3, rngs=nnx.Rngs(0))
    assert nn.count(nn.split(module)[1]) == nn.count(nn.split(plain)[1]) + N
    assert module.state_size(10) == plain.state_size(10)
    again = CosineAttention(D, N, num_kv_heads=3, rngs=nnx.Rngs(1))
    assert nn.split(again)[0] == nn.split(module)[0]
    assert hash(nn.split(again)[0]) == hash(nn.split(module)[0])


def test_bfloat16_keeps_float32_parameters():
    module = CosineAttention(D, N, dtype="bfloat16", rngs=nnx.Rngs(0))
    out = module(X, mask=masks.Causal())
    assert out.dtype == "bfloat16" and module.log_temperature[...].dtype == "float32"
    assert_close(out, CosineAttention(D, N, rngs=nnx.Rngs(0))(X, mask=masks.Causal()), scale=4)


@pytest.mark.parametrize("temperature", [0, -1.0, 101])
def test_a_temperature_beyond_the_cap_is_an_error(temperature):
    with pytest.raises(ValueError, match=r"temperature: wanted a number in \(0, 100.0\], got"):
        CosineAttention(D, N, temperature=temperature, rngs=nnx.Rngs(0))
