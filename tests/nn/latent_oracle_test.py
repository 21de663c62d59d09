"""`LatentAttention` against transformers' DeepseekV3Attention with the same parameters."""

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

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-all` installs it")
deepseek = pytest.importorskip(
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    reason="transformers is not installed; `make test-all` installs it",
)
pytestmark = pytest.mark.oracle

B, T, D, N, H, C, R, Q = 2, 5, 12, 3, 8, 7, 6, 11
X = np.random.RandomState(0).randn(B, T, D).astype("f")
POSITIONS = np.array([[0, 1, 2, 3, 4], [3, 5, 6, 9, 10]])


def tensor(x):
    return torch.tensor(np.asarray(x))


def swapped(kernel, interleaved):
    """Heads' outputs [rotary, other] as [other, rotary], pairs i, i + R/2 as 2i, 2i + 1."""
    rotary, other = np.split(kernel.reshape(len(kernel), N, R + H), [R], axis=-1)
    return np.concatenate([other, rotary[..., pairs(interleaved)]], -1).reshape(len(kernel), -1)


def pairs(interleaved):
    return np.arange(R).reshape(2, -1).T.reshape(-1) if interleaved else np.arange(R)


def deepseek_attention(params, interleaved):
    """Their module with our parameters; matrices are [outputs, inputs]."""
    config = deepseek.DeepseekV3Config(
        hidden_size=D, num_attention_heads=N, num_key_value_heads=N, kv_lora_rank=C,
        q_lora_rank=Q if "query_latent" in params else None, qk_rope_head_dim=R, v_head_dim=H,
        qk_nope_head_dim=H, rope_interleave=interleaved, attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        attn_implementation="eager",
    )  # fmt: skip
    module = deepseek.DeepseekV3Attention(config, layer_idx=0)
    kernels = {name: np.asarray(p["kernel"]) for name, p in params.items() if "kernel" in p}
    query = swapped(kernels["query"], interleaved)
    latent, k_rotary = np.split(kernels["latent"], [C], axis=1)
    up = np.concatenate(
        [kernels[name].reshape(C, N, H) for name in ("key_up", "value_up")], axis=-1
    )
    state = {
        "kv_a_proj_with_mqa": np.concatenate([latent, k_rotary[:, pairs(interleaved)]], axis=1),
        "kv_b_proj": up.reshape(C, -1),
        "o_proj": kernels["out"],
    }
    if "query_latent" in params:
        state |= {"q_a_proj": kernels["query_latent"], "q_b_proj": query}
    else:
        state |= {"q_proj": query}
    state = {f"{name}.weight": tensor(x).T for name, x in state.items()}
    state["kv_a_layernorm.weight"] = tensor(params["latent_norm"]["scale"])
    if "query_latent" in params:
        state["q_a_layernorm.weight"] = tensor(params["query_norm"]["scale"])
    module.load_state_dict(state)
    return module.eval(), deepseek.DeepseekV3RotaryEmbedding(config)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("query_latent_dim", [None, Q])
def test_causal_attention_and_its_gradients(query_latent_dim, interleaved):
    ours = randomised(
        LatentAttention(
            D, N, head_dim=H, latent_dim=C, rotary_dim=R, query_latent_dim=query_latent_dim,
            rotary_base=100.0, rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    graphdef, params = nn.split(ours)
    theirs, rotary = deepseek_attention(params, interleaved)
    x = torch.tensor(X, requires_grad=True)
    bias = torch.tensor(np.triu(np.full((T, T), -np.inf, "f"), 1))[None, None]
    expected, _ = theirs(x, rotary(x, torch.tensor(POSITIONS)), bias)
    (expected**2).sum().backward()

    def loss(params, x):
        # Positions grow with the index, so that the mask is the lower triangle.
        out = nn.merge(graphdef, params)(x, mask=masks.Causal(), positions=POSITIONS)
        return jnp.sum(out**2), out

    (of_params, of_x), out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, X)
    assert_close(out, expected.detach().numpy(), scale=20)
    assert_close(of_x, x.grad.numpy(), scale=500)
    up = theirs.kv_b_proj.weight.grad.numpy().T.reshape(C, N, 2, H)
    for i, name in enumerate(("key_up", "value_up")):
        assert_close(of_params[name]["kernel"].reshape(C, N, H), up[:, :, i], scale=500)
    norm = theirs.kv_a_layernorm.weight.grad.numpy()
    assert_close(of_params["latent_norm"]["scale"], norm, scale=500)
