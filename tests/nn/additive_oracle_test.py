"""`AdditiveAttention` against PyTorch operations, as in the appendix of Bahdanau et al."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.nn.additive import AdditiveAttention, LuongAttention
from qkv_jax.ops import masks
from tests.parameters import randomised
from tests.tolerances import assert_close

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-all` installs it")
pytestmark = pytest.mark.oracle

B, T, S, D, C, N, H = 2, 3, 5, 12, 7, 3, 4
RANDOM = np.random.RandomState(0)
X, CONTEXT = RANDOM.randn(B, T, D).astype("f"), RANDOM.randn(B, S, C).astype("f")
LENGTHS = np.array([4, 2])


def torch_additive(p, x, context):
    """e_ij = v . tanh(W s_i + U h_j), alpha = softmax(e), c_i = sum of alpha_ij h_j; per head."""
    heads = lambda y: y.unflatten(-1, (N, H))  # noqa: E731
    query, key, value = (
        heads(x @ p["query"]),
        heads(context @ p["key"]),
        heads(context @ p["value"]),
    )
    energies = (torch.tanh(query[:, :, None] + key[:, None]) * p["energy"]).sum(-1)  # b t s n
    padding = torch.arange(S)[None, None, :, None] >= torch.tensor(LENGTHS)[:, None, None, None]
    alpha = torch.softmax(energies.masked_fill(padding, -torch.inf), dim=2)
    return torch.einsum("btsn,bsnh->btnh", alpha, value).flatten(2) @ p["out"]


@pytest.mark.parametrize("module", [AdditiveAttention, LuongAttention])
def test_values_and_gradients(module):
    kwargs = {"kind": "concat"} if module is LuongAttention else {}
    ours = randomised(module(D, N, context_width=C, rngs=nnx.Rngs(0), **kwargs))
    graphdef, params = nn.split(ours)

    def loss(params, x, context):
        out = nn.merge(graphdef, params)(x, context, mask=masks.Lengths(LENGTHS))
        return jnp.sum(out**3), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(params, X, CONTEXT)

    flat = {name: p["kernel"] if isinstance(p, dict) else p for name, p in params.items()}
    p, x, context = jax.tree.map(
        lambda a: torch.tensor(np.asarray(a), requires_grad=True), (flat, X, CONTEXT)
    )
    expected = torch_additive(p, x, context)
    (expected**3).sum().backward()
    assert_close(out, expected.detach().numpy(), scale=10)
    for name, tensor in p.items():
        ours = gradients[0][name]
        ours = ours["kernel"] if isinstance(ours, dict) else ours
        assert_close(ours, tensor.grad.numpy(), scale=200)
    assert_close(gradients[1], x.grad.numpy(), scale=200)
    assert_close(gradients[2], context.grad.numpy(), scale=200)
