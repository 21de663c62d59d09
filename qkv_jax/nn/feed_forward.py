"""The position-wise network of a Transformer block."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from qkv_jax.nn.linear import Linear, project
from qkv_jax.nn.sharding import by_heads


def relu_squared(x: jax.Array) -> jax.Array:
    """`max(x, 0)^2` (So et al. 2021, arxiv.org/abs/2109.08668)."""
    return jnp.square(jax.nn.relu(x))


def gelu(x: jax.Array) -> jax.Array:
    """`x Phi(x)`, the exact GELU (Hendrycks and Gimpel 2016, arxiv.org/abs/1606.08415).

    `jax.nn.gelu(approximate=False)` computes the same through erfc, which costs more.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


GATED = ("swiglu", "geglu")
ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu_squared": relu_squared,
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=True),
}


class FeedForward(nnx.Module):
    """`act(x W_up) W_down`; gated, for "swiglu" and "geglu", `(act(x W_gate) * (x W_up)) W_down`.

    Args:
      width: D.
      hidden: F.
      activation: gelu (exact), gelu_tanh, relu (Vaswani et al. 2017), relu_squared; swiglu, whose
        act is silu, or geglu, whose act is gelu_tanh (Shazeer 2020, arxiv.org/abs/2002.05202).
      use_bias: whether the layers have biases.
      kernel_init, out_init: initialisers of the layers in and of the layer out.
      dtype, param_dtype: of the computation and of the parameters.
      rngs: where the initial parameters come from.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str = "gelu",
        use_bias: bool = False,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        out_init: Initializer = nnx.initializers.lecun_normal(),
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: wanted one of {sorted(ACTIVATIONS)}, got {activation!r}")

        def linear(inputs: int, outputs: int, init: Initializer) -> Linear:
            return Linear(
                inputs, outputs, use_bias=use_bias, kernel_init=init, dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        self.activation = activation
        self.gate = linear(width, hidden, kernel_init) if activation in GATED else None
        self.up = linear(width, hidden, kernel_init)
        self.down = linear(hidden, width, out_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D]."""
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(act(by_heads(self.up(x))))
        gate, up = map(by_heads, project(x, [self.gate, self.up]))
        return self.down(act(gate) * up)
