"""Recurrent cells over sequences: Flax's LSTM and GRU as mixers of tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from qkv_jax.nn.linear import Linear
from qkv_jax.ops import masks
from qkv_jax.ops.arguments import check_positive
from qkv_jax.ops.masks import Mask

_default_init = nnx.initializers.lecun_normal()


def run(
    cell: nnx.RNNCellBase,
    x: jax.Array,
    *,
    state: Any = None,
    lengths: int | jax.Array | None = None,
    reverse: bool = False,
) -> tuple[jax.Array, Any]:
    """Applies a cell to one token after another.

        state, outputs[:, t] = cell(state, x[:, t])                  t = 0 ... T-1, or backwards

    O(T) time, one token after another. The last state carries a sequence across any split, and one
    token is a sequence of length 1. The state is float32 (float64 for float64 input), whatever the
    cell computes in, as sums along a sequence are everywhere here.

    Args:
      cell: such as `nnx.LSTMCell`, whose state is the pair (c, h), or `nnx.GRUCell`, with h.
      x: [B, T, features of the cell].
      state: what the first step begins with; by default `initial_state`.
      lengths: of the rows, an integer or integers [B]: a padded token leaves the state as it was
        and has output 0. So a row backwards begins at its own last token.
      reverse: from the last token to the first. The outputs stay in the order of `x`.

    Returns:
      The outputs [B, T, hidden], in the dtype that the cell computes in, and the last state.

    Raises:
      ValueError: for an `x` that is no batch of sequences, or lengths that do not fit.
    """
    if x.ndim != 3:
        raise ValueError(f"x: wanted [B, T, features], got {list(x.shape)}")
    B, T = x.shape[:2]
    dtype = cell.dtype or jnp.result_type(x, cell.param_dtype)
    state_dtype = jnp.promote_types(dtype, jnp.float32)
    state = initial_state(cell, B) if state is None else state
    state = jax.tree.map(lambda s: jnp.asarray(s, state_dtype), state)
    real = None
    if lengths is not None:
        if jnp.shape(lengths) not in ((), (B,)):
            raise ValueError(
                f"lengths: wanted a number or [B] = [{B}], got {list(jnp.shape(lengths))}"
            )
        real = jnp.broadcast_to(
            jnp.arange(T)[:, None, None] < jnp.reshape(lengths, (-1, 1)), (T, B, 1)
        )

    def step(state: Any, inputs: tuple[jax.Array, jax.Array | None]) -> tuple[Any, jax.Array]:
        x, real = inputs
        new_state, y = cell(state, x)
        if real is None:
            return new_state, y
        new_state = jax.tree.map(lambda new, old: jnp.where(real, new, old), new_state, state)
        return new_state, jnp.where(real, y, 0)

    # Flax's cells project the input inside the step. One product for all tokens, before the scan,
    # is no faster on a CPU: it saves time in the backward pass and loses it in the forward pass.
    state, y = jax.lax.scan(step, state, (jnp.swapaxes(x, 0, 1), real), reverse=reverse)
    return jnp.swapaxes(y, 0, 1).astype(dtype), state


def initial_state(cell: nnx.RNNCellBase, batch: int) -> Any:
    """The state of a cell before any token: zeros, for Flax's cells."""
    # Flax asks for random numbers here, which zeros do not use.
    return cell.initialize_carry((batch, cell.in_features), nnx.Rngs(0))


class Recurrent(nnx.Module):
    """A recurrent cell over the tokens, and a projection of its outputs to the model's width.

        out = run(cell, x) W_out

    Args:
      width: D, of the input and the output.
      hidden: of the cell's state; by default `width`.
      cell: the class of the cell, one of Flax's.
      kernel_init: initialiser of the cell's projections of the input. The recurrent matrices are
        orthogonal, gate by gate.
      out_init: initialiser of the projection out.
      dtype: of the computation; None: that of the input and the parameters. The state is float32 or
        better.
      param_dtype: of the parameters.
      rngs: where the initial parameters come from.

    Raises:
      ValueError: for a `hidden` that is not positive.
    """

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        *,
        cell: type[nnx.RNNCellBase],
        kernel_init: Initializer = _default_init,
        out_init: Initializer = _default_init,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden = width if hidden is None else hidden
        check_positive(hidden=hidden)
        self.cell = cell(
            width, hidden, kernel_init=kernel_init, recurrent_kernel_init=_orthogonal_gates,
            dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        self.out = Linear(
            hidden, width, use_bias=False, kernel_init=out_init, dtype=dtype,
            param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: Mask | None = None,
        positions: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Mixes each token with those before it.

        Args:
          x: [B, T, D].
          mask: `Causal()`, alone or with `Lengths(...)`: no token reads what comes after it, so
            padding at the end needs no care.
          positions: unused: tokens come in the order of the array.
          rng: unused: there is no dropout inside.

        Returns:
          [B, T, D].

        Raises:
          NotImplementedError: for a mask that is not causal, or that says more.
        """
        del positions, rng
        masks.causal_lengths(mask, type(self).__name__)
        y, _ = run(self.cell, x)
        return self.out(y)

    def init_cache(self, batch: int, length: int, **_: Any) -> Any:
        """What `extend` begins with: the state of the cell."""
        del length
        return jax.tree.map(lambda x: x.astype(jnp.float32), initial_state(self.cell, batch))

    def extend(
        self, x: jax.Array, cache: Any, *, positions: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """As `MultiHeadAttention.extend`; the cache does not grow."""
        del positions
        y, cache = run(self.cell, x, state=cache, lengths=lengths)
        return self.out(y), cache

    def state_size(self, length: int) -> int:
        """The state of the cell, whatever the `length`."""
        del length
        state = jax.eval_shape(lambda: initial_state(self.cell, 1))
        return sum(leaf.size for leaf in jax.tree.leaves(state))


class LSTMCell(nnx.LSTMCell):
    """Flax's cell, whose forget gates begin open: their bias is 1.

    With Flax's own 0 a cell keeps half of its state from one token to the next, so little of the
    gradient comes back to what is a few tokens away (Jozefowicz et al. 2015, section 2.4,
    proceedings.mlr.press/v37/jozefowicz15.html).

    Args:
      all: as in `nnx.LSTMCell`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.hf.bias[...] = jnp.ones_like(self.hf.bias[...])


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; with a forget gate, Gers 2000).

        i, f, o = sigmoid(W x[t] + U h + b), each its own;  g = tanh(W_g x[t] + U_g h + b_g)
        c = f c + i g
        h = o tanh(c)

    The bias of f begins at 1: see `LSTMCell`.

    Args:
      width, hidden and the others: as in `Recurrent`.
    """

    def __init__(self, width: int, hidden: int | None = None, **kwargs: Any):
        # Not nnx.OptimizedLSTMCell, whose step is one product of the same numbers: on a CPU its
        # forward pass is a little faster, but its gradient takes up to 1.5 times as long.
        super().__init__(width, hidden, cell=LSTMCell, **kwargs)


class GRU(Recurrent):
    """Gated recurrent unit (Cho et al. 2014, arxiv.org/abs/1406.1078).

        r, z = sigmoid(W x[t] + U h + b), each its own
        n = tanh(W_n x[t] + b_n + r (U_n h))
        h = (1 - z) n + z h

    The reset gate is applied after the product with U_n, as in cuDNN and PyTorch; PyTorch's second
    bias, inside r (...), is 0 here.

    Args:
      width, hidden and the others: as in `Recurrent`.
    """

    def __init__(self, width: int, hidden: int | None = None, **kwargs: Any):
        super().__init__(width, hidden, cell=nnx.GRUCell, **kwargs)


def _orthogonal_gates(rng: jax.Array, shape: tuple[int, int], dtype: Dtype) -> jax.Array:
    """Orthogonal matrices [hidden, hidden], one beside the other; drawn in float32, as QR must be.

    Flax's initialiser makes the cells that hold their gates in one matrix orthogonal as a whole.
    """
    hidden, total = shape
    gates = jax.random.split(rng, total // hidden)
    draw = nnx.initializers.orthogonal()
    return jnp.concatenate([draw(gate, (hidden, hidden)) for gate in gates], axis=1).astype(dtype)
