"""Decoders whose matrices are integers of 8 or 4 bits, quantized by Google's qwix."""

import jax
from flax import nnx

from qkv_jax import nn
from qkv_jax.models import Decoder

DTYPES = ("int8", "int4")
# Of activations: the axes of x [tokens, D] along which scales differ.
SCALED = {"int8": (0,), "int8_tensor": ()}


class QuantizedLinear(nnx.Module):
    """`x W + b` with W = values * scale, values integers: weight-only or W8A8 quantization.

        scale = max |W| / 127.5 (7.5 for 4 bits)     over an output's column, or a group of its rows
        y = x (values * scale), or (x_values values) * x_scale * scale with a product of integers

    Symmetric and rounded to the nearest, by github.com/google/qwix; both scales as Dettmers et al.
    2022, arxiv.org/abs/2208.07339, have them, without their outliers.

    Args:
      layer: what it was made of, of [D, F].
      dtype: of `DTYPES`, of the values.
      group: how many rows share a scale; None: all of them.
      activations: "int8" to quantize x too, with a scale for each token; "int8_tensor" with one for
        all of x, which the largest number in it sets, as static ranges do: for measuring, as one
        token's result then depends on all others; None: x stays floating.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
      ImportError: qwix is not installed.
    """

    def __init__(
        self,
        layer: nn.Linear,
        dtype: str = "int8",
        *,
        group: int | None = None,
        activations: str | None = None,
    ):
        import qwix

        if dtype not in DTYPES:
            raise ValueError(f"dtype: wanted one of {list(DTYPES)}, got {dtype!r}")
        if group is not None and (group < 1 or layer.in_features % group):
            raise ValueError(
                f"group: wanted a divisor of the layer's {layer.in_features} inputs, got {group}"
            )
        if activations not in (None, *SCALED):
            raise ValueError(
                f"activations: wanted one of {list(SCALED)} or None, got {activations!r}"
            )
        kernel = layer.kernel[...]
        tiles = {} if group is None else {0: group}
        made = qwix.quantize(kernel, dtype, channelwise_axes=(1,), tiled_axes=tiles)
        self.values, self.scale = nnx.Param(made.qvalue), nnx.Param(made.scale)
        self.bias = layer.bias
        self.dtype = layer.dtype or kernel.dtype
        self.activations = activations

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., F]."""
        import qwix

        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        if self.activations is not None:
            flat = qwix.quantize(flat, "int8", channelwise_axes=SCALED[self.activations])
        kernel = qwix.QArray(self.values[...], self.scale[...].astype(self.dtype))
        y = qwix.dot_general(flat, kernel, (((1,), (0,)), ((), ())))
        if self.bias is not None:
            y += self.bias[...].astype(y.dtype)
        return y.reshape(*x.shape[:-1], -1)


def quantize(
    model: Decoder,
    dtype: str = "int8",
    *,
    group: int | None = None,
    activations: str | None = None,
) -> Decoder:
    """The decoder with all its linear layers quantized; embeddings and norms stay as they are.

    Args:
      model: any but of the mixer "latent", which multiplies its matrices with one another. It stays
        as it was.
      dtype, group, activations: as in `QuantizedLinear`.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
      ImportError: qwix is not installed.
    """
    if "latent" in model.config.mixers:
        raise ValueError("model: wanted one without the mixer 'latent', which cannot be quantized")
    model = nn.merge(*nn.split(model))
    for _, module in list(nnx.iter_modules(model)):
        for name, layer in list(vars(module).items()):
            if isinstance(layer, nn.Linear):
                quantized = QuantizedLinear(layer, dtype, group=group, activations=activations)
                setattr(module, name, quantized)
    return model
