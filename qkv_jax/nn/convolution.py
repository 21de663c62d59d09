"""Mixers that convolve: a gated one over a few neighbours, and one as long as the sequence."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from qkv_jax.nn.linear import Linear, compute_dtype, project
from qkv_jax.ops import masks
from qkv_jax.ops.arguments import check_positive
from qkv_jax.ops.cache import Cache
from qkv_jax.ops.convolution import causal_convolution, last_inputs, long_convolution, shifted
from qkv_jax.ops.masks import Mask

_default_init = nnx.initializers.lecun_normal()


class GatedConvolution(nnx.Module):
    """A convolution with a gated linear unit: ConvS2S's block, and ByteNet's causal convolution.

        out[t] = sum over w of V[w] x[t - w]  *  sigmoid(sum over w of G[w] x[t - w])

    Gehring et al. 2017, arxiv.org/abs/1705.03122; Kalchbrenner et al. 2016,
    arxiv.org/abs/1610.10099. Every channel reads every channel, so both sums are one matrix product
    over `conv_width` shifted copies of the input. O(T) time. A token reads its own place and the
    `conv_width - 1` before it where the mask is causal; without, the window lies around it.

    Args:
      width: D, of the input and the output.
      conv_width: W, the places that a token reads.
      use_bias: whether both sums have biases.
      kernel_init: initialiser of the gate, whose fan in is W D.
      out_init: initialiser of the values: zeros make the output 0.
      dtype: of the computation; None: that of the input and the parameters.
      param_dtype: of the parameters.
      rngs: where the initial parameters come from.

    Raises:
      ValueError: for a `conv_width` that is not positive.
    """

    def __init__(
        self,
        width: int,
        *,
        conv_width: int = 3,
        use_bias: bool = False,
        kernel_init: Initializer = _default_init,
        out_init: Initializer = _default_init,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_positive(conv_width=conv_width)

        def linear(init: Initializer) -> Linear:
            return Linear(
                conv_width * width, width, use_bias=use_bias, kernel_init=init, dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        self.width, self.conv_width = width, conv_width
        self.value, self.gate = linear(out_init), linear(kernel_init)

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: Mask | None = None,
        positions: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Mixes each token with its neighbours.

        Args:
          x: [B, T, D].
          mask: `Causal()`, `Lengths(...)`, both or None; see above.
          positions: unused: neighbours are neighbours in the array.
          rng: unused: there is no dropout inside.

        Returns:
          [B, T, D].
        """
        del positions, rng
        causal, lengths = masks.order_of(mask, "a gated convolution")
        x = _without_padding(x, lengths)
        return self._gated(shifted(x, self.conv_width, causal=causal))

    def _gated(self, moved: list[jax.Array]) -> jax.Array:
        value, gate = project(jnp.concatenate(moved, axis=-1), [self.value, self.gate])
        return value * jax.nn.sigmoid(gate)

    def init_cache(self, batch: int, length: int, **_: Any) -> jax.Array:
        """What `extend` begins with: the last W - 1 inputs, [B, W-1, D]."""
        del length
        dtype = compute_dtype(self.value)
        return jnp.zeros((batch, self.conv_width - 1, self.width), dtype)

    def extend(
        self,
        x: jax.Array,
        cache: jax.Array,
        *,
        positions: jax.Array,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """As `MultiHeadAttention.extend`; the cache does not grow."""
        del positions
        out = self._gated(shifted(x, self.conv_width, state=cache))
        return out, last_inputs(x, self.conv_width, state=cache, lengths=lengths)

    def state_size(self, length: int) -> int:
        """The last W - 1 inputs, whatever the `length`."""
        del length
        return (self.conv_width - 1) * self.width


class LongConvolution(nnx.Module):
    """A convolution as long as the sequence between two gates: Hyena of order 2.

        value, first, second = short causal convolution of (x W_v, x W_1, x W_2)
        out = (second * (filter (*) (first * value) + skip * first * value)) W_out

    Poli et al. 2023, arxiv.org/abs/2302.10866, with one long filter as in the authors' code. The
    filter of each channel is implicit, a function of the distance between two tokens, so its number
    of parameters does not depend on the length. (*) is `ops.convolution.long_convolution`:
    O(T log T) time, causal up to the last digits of its numbers. Where attention decides by content
    whom to read, here the filter decides by distance and the gates by content.

    Args:
      width: D, of the input and the output.
      length: of a typical sequence: the distance at which the filter's features repeat. Longer
        sequences are allowed.
      short_width: width of the short convolution.
      filter_hidden: width of the filter's hidden layers.
      use_bias: whether the projections have biases.
      kernel_init, out_init: initialisers of the projections in and of the projection out.
      dtype: of the computation; None: that of the input and the parameters. The long convolution is
        computed in float32 or better.
      param_dtype: of the parameters.
      rngs: where the initial parameters come from.

    Raises:
      ValueError: for sizes that are not positive.
    """

    def __init__(
        self,
        width: int,
        *,
        length: int,
        short_width: int = 3,
        filter_hidden: int = 64,
        use_bias: bool = False,
        kernel_init: Initializer = _default_init,
        out_init: Initializer = _default_init,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_positive(length=length, short_width=short_width, filter_hidden=filter_hidden)

        def linear(init: Initializer) -> Linear:
            return Linear(
                width, width, use_bias=use_bias, kernel_init=init, dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        self.width, self.short_width = width, short_width
        self.value, self.first, self.second = (linear(kernel_init) for _ in range(3))
        short = nnx.initializers.normal(short_width**-0.5)
        self.short = nnx.Param(short(rngs.params(), (short_width, 3 * width), param_dtype))
        self.filter = ImplicitFilter(
            width, length, hidden=filter_hidden, param_dtype=param_dtype, rngs=rngs
        )
        skip = nnx.initializers.normal(1.0)
        self.skip = nnx.Param(skip(rngs.params(), (width,), param_dtype))
        self.out = linear(out_init)

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: Mask | None = None,
        positions: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Mixes each token with all before it.

        Args:
          x: [B, T, D].
          mask: `Causal()`, alone or with `Lengths(...)`: padded tokens are 0, so that the FFT does
            not round by their size.
          positions: unused: distances are those in the array.
          rng: unused: there is no dropout inside.

        Returns:
          [B, T, D].

        Raises:
          NotImplementedError: for a mask that is not causal, or that says more.
        """
        del positions, rng
        x = _without_padding(x, masks.causal_lengths(mask, "a long convolution"))
        gated, second = self._gated(self._inputs(x), None)
        return self._out(long_convolution(gated, self.filter(x.shape[1])), gated, second)

    def _inputs(self, x: jax.Array) -> jax.Array:
        """Of the short convolution, [B, T, 3 D]."""
        return jnp.concatenate(project(x, [self.value, self.first, self.second]), axis=-1)

    def _gated(self, inputs: jax.Array, state: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The long filter's inputs and the second gate, each [B, T, D]."""
        short = causal_convolution(inputs, self.short[...], state=state)
        value, first, second = jnp.split(short, 3, axis=-1)
        return first * value, second

    def _out(self, mixed: jax.Array, gated: jax.Array, second: jax.Array) -> jax.Array:
        return self.out(second * (mixed + self.skip[...].astype(gated.dtype) * gated))

    def init_cache(self, batch: int, length: int, **_: Any) -> tuple[jax.Array, Cache]:
        """What `extend` begins with: the short filter's last inputs, and all of the long one's."""
        dtype = compute_dtype(self.value)
        tail = jnp.zeros((batch, self.short_width - 1, 3 * self.width), dtype)
        return tail, Cache.empty(batch, length, (self.width,), dtype=dtype)

    def extend(
        self,
        x: jax.Array,
        cache: tuple[jax.Array, Cache],
        *,
        positions: jax.Array,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, Cache]]:
        """As `MultiHeadAttention.extend`: a sum over the whole cache for each token, O(T S D)."""
        tail, inputs = cache
        joined = self._inputs(x)
        gated, second = self._gated(joined, tail)
        tail = last_inputs(joined, self.short_width, state=tail, lengths=lengths)
        (seen,), kv_positions, inputs = inputs.attended((gated,), positions, lengths)
        rows = self.filter(inputs.capacity)

        def mix(position: jax.Array) -> jax.Array:  # [B or 1] -> [B, D]
            distance = position[:, None] - kv_positions
            taps = jnp.take(rows, jnp.maximum(distance, 0), axis=0)
            taps = jnp.where((distance >= 0)[..., None], taps, 0)
            return jnp.sum(taps * seen, axis=1)

        places = jnp.atleast_2d(positions).T  # [T, B or 1]
        mixed = jnp.moveaxis(jax.lax.map(mix, places), 0, 1).astype(gated.dtype)
        return self._out(mixed, gated, second), (tail, inputs)

    def state_size(self, length: int) -> int:
        """All inputs of the long filter, and the last of the short one."""
        return length * self.width + (self.short_width - 1) * 3 * self.width


class ImplicitFilter(nnx.Module):
    """A long filter that is a function of distance: a small network of sines, times a window.

        t = distance / length
        features = (t, cos(2 pi b t), sin(2 pi b t) for b = 1 ... bands)
        filter[distance] = W_3 sin(W_2 sin(W_1 sin(W_0 features))) * exp(-decay t)

    Poli et al. 2023, section 3.3. `decay` runs, over the channels, from one that leaves 1% at
    t = 1.5 to one that leaves 1% at t = 0.3. The initialisers are the network's own: the matrices
    of a model's other layers are too small for its sines.

    Args:
      width: D, of the channels.
      length: the distance at which t = 1.
      hidden: width of the hidden layers.
      bands: how many frequencies the features have.
      frequency: what the first layer's features are multiplied by: how fast the filter may change.
      param_dtype: of the parameters.
      rngs: where the initial parameters come from.
    """

    def __init__(
        self,
        width: int,
        length: int,
        *,
        hidden: int = 64,
        bands: int = 8,
        frequency: float = 10.0,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.width, self.length, self.bands, self.frequency = width, length, bands, frequency
        sizes = [2 * bands + 1, hidden, hidden, hidden, width]
        self.layers = nnx.List(
            Linear(a, b, use_bias=b == hidden, param_dtype=param_dtype, rngs=rngs)
            for a, b in itertools.pairwise(sizes)
        )

    def __call__(self, num: int) -> jax.Array:
        """The weights of the distances 0 ... num - 1, [num, D]."""
        t = jnp.arange(num)[:, None] / self.length
        angles = 2 * math.pi * t * jnp.arange(1, self.bands + 1)
        y = jnp.concatenate([t, jnp.cos(angles), jnp.sin(angles)], axis=-1)
        for layer in self.layers[:-1]:
            y = jnp.sin(self.frequency * layer(y))
        decay = math.log(100) / jnp.linspace(1.5, 0.3, self.width)
        return self.layers[-1](y) * jnp.exp(-decay * t)


def _without_padding(x: jax.Array, lengths: int | jax.Array | None) -> jax.Array:
    if lengths is None:
        return x
    real = jnp.arange(x.shape[1]) < jnp.reshape(lengths, (-1, 1))
    return jnp.where(real[..., None], x, 0)
