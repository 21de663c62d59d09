"""`MultiHeadAttention` against torch.nn.MultiheadAttention with the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.ops import masks
from tests.parameters import randomised
from tests.tolerances import assert_close

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-all` installs it")
pytestmark = pytest.mark.oracle

B, T, S, D, C, N = 2, 3, 5, 12, 7, 6
RANDOM = np.random.RandomState(0)
X, CONTEXT = RANDOM.randn(B, T, D).astype("f"), RANDOM.randn(B, S, C).astype("f")


def torch_attention(params, context_width):
    """PyTorch's module with our parameters; its matrices are [outputs, inputs]."""
    module = torch.nn.MultiheadAttention(
        D, N, kdim=context_width, vdim=context_width, batch_first=True
    )
    tensor = lambda x: torch.tensor(np.asarray(x))  # noqa: E731
    weights = [tensor(params[name]["kernel"]).T for name in ("query", "key", "value")]
    biases = [tensor(params[name]["bias"]) for name in ("query", "key", "value")]
    with torch.no_grad():
        if context_width == D:
            module.in_proj_weight.copy_(torch.cat(weights))
        else:
            module.q_proj_weight.copy_(weights[0])
            module.k_proj_weight.copy_(weights[1])
            module.v_proj_weight.copy_(weights[2])
        module.in_proj_bias.copy_(torch.cat(biases))
        module.out_proj.weight.copy_(tensor(params["out"]["kernel"]).T)
        module.out_proj.bias.copy_(tensor(params["out"]["bias"]))
    return module


def pair(context_width=D):
    ours = randomised(
        nn.MultiHeadAttention(D, N, use_bias=True, context_width=context_width, rngs=nnx.Rngs(0))
    )
    return ours, torch_attention(nn.split(ours)[1], context_width)


def test_self_attention():
    ours, theirs = pair()
    x = torch.tensor(X)
    expected, _ = theirs(x, x, x)
    assert_close(ours(X), expected.detach().numpy(), scale=10)
    forbidden = torch.tensor(~np.tril(np.ones((T, T), bool)))
    expected, _ = theirs(x, x, x, attn_mask=forbidden)
    assert_close(ours(X, mask=masks.Causal()), expected.detach().numpy(), scale=10)


def test_cross_attention_to_padded_keys():
    ours, theirs = pair(C)
    padding = torch.tensor(np.arange(S) >= np.array([[4], [2]]))
    context = torch.tensor(CONTEXT)
    expected, _ = theirs(torch.tensor(X), context, context, key_padding_mask=padding)
    out = ours(X, CONTEXT, mask=masks.Lengths(np.array([4, 2])))
    assert_close(out, expected.detach().numpy(), scale=10)


def test_gradients():
    ours, theirs = pair()
    graphdef, params = nn.split(ours)
    gradients = jax.grad(lambda p: jnp.sum(nn.merge(graphdef, p)(X) ** 2))(params)
    x = torch.tensor(X)
    (theirs(x, x, x)[0] ** 2).sum().backward()
    of_inputs = np.split(theirs.in_proj_weight.grad.numpy(), 3)
    for name, expected in zip(("query", "key", "value"), of_inputs, strict=True):
        assert_close(gradients[name]["kernel"], expected.T, scale=200)
    assert_close(gradients["out"]["kernel"], theirs.out_proj.weight.grad.numpy().T, scale=200)
