"""Linear layers whose compiled form is one matrix product over all tokens."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.ops import mesh


def flat_dot_general(
    x: jax.Array, kernel: jax.Array, dimension_numbers, precision=None, **kwargs
) -> jax.Array:
    """`lax.dot_general` of `x` [..., D] and `kernel` [D, F], with the axes in front made one.

    The result is the same. The gradient of the kernel then contracts one axis instead of two,
    which spares XLA's CPU compiler a transposing copy of every activation: a training step of the
    small models takes two thirds of the time. On a mesh that cuts tokens, the one axis could not be
    cut as the two are.
    """
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    if mesh.cuts("tensor", "context"):
        return jax.lax.dot_general(x, kernel, dimension_numbers, precision, **kwargs)
    flat = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), precision, **kwargs
    )
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nnx.Linear):
    """`x W + b` over the last axis: `nnx.Linear` on flattened tokens."""

    def __init__(self, in_features: int, out_features: int, **kwargs):
        super().__init__(in_features, out_features, dot_general=flat_dot_general, **kwargs)


def compute_dtype(layer: Linear) -> str:
    """The name of the dtype that a layer computes in, for input that is no wider."""
    return jnp.dtype(layer.dtype or layer.kernel.dtype).name


FEW = 64  # tokens: for fewer, laying kernels side by side takes longer than it saves


def project(x: jax.Array, layers: Sequence[Linear]) -> list[jax.Array]:
    """Applies several linear layers to one input, as one matrix product where it has many tokens.

    Args:
      x: [..., D].
      layers: linear layers of D inputs, of one compute dtype, all with a bias or all without; what
        stands for one, such as a quantized layer, is applied by itself.

    Returns:
      `[layer(x) for layer in layers]`.
    """
    alike = all(isinstance(layer, Linear) for layer in layers)  # and not quantized
    # Kernels that a mesh cuts along `tensor` would have to be gathered to lie side by side, and of
    # those that it cuts along `fsdp` the sum of the gradients could not be scattered as they lie.
    cut = mesh.cuts("tensor", "fsdp")
    if len(layers) == 1 or x.size // x.shape[-1] <= FEW or not alike or cut:
        return [layer(x) for layer in layers]
    kernel = jnp.concatenate([layer.kernel[...] for layer in layers], axis=1)
    x, kernel = layers[0].promote_dtype((x, kernel), dtype=layers[0].dtype)
    y = flat_dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    if layers[0].bias is not None:
        y += jnp.concatenate([layer.bias[...] for layer in layers]).astype(y.dtype)
    ends = [sum(layer.out_features for layer in layers[: i + 1]) for i in range(len(layers) - 1)]
    return jnp.split(y, ends, axis=-1)
