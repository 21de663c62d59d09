"""Gates of a decoder's heads, which learn to close: what is pruned is found by training."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.models.decoder import Decoder
from qkv_jax.models.pruning import PRUNABLE, lowest, scale_heads

Gates = Mapping[int, jax.Array]  # layer -> a number for each of its key/value heads, [K]

# The hard concrete distribution's temperature and stretch, of Louizos et al. 2018.
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
OPEN = 2.0  # log_alpha before training: a gate is open with probability 0.97


def sampled_gates(log_alpha: jax.Array, uniform: jax.Array) -> jax.Array:
    """A draw of hard concrete gates, differentiable in log_alpha, often exactly 0 or 1.

        s = sigmoid((log u - log(1 - u) + log_alpha) / TEMPERATURE)
        gate = clip((HIGH - LOW) s + LOW, 0, 1)

    Louizos et al. 2018, arxiv.org/abs/1712.01312, equations 10 and 11.

    Args:
      log_alpha: where the gates stand, floating.
      uniform: u, of that shape, in (0, 1).

    Returns:
      Gates in [0, 1], of that shape.
    """
    logistic = jnp.log(uniform) - jnp.log1p(-uniform)
    concrete = jax.nn.sigmoid((logistic + log_alpha) / TEMPERATURE)
    return jnp.clip((HIGH - LOW) * concrete + LOW, 0, 1)


def settled_gates(log_alpha: jax.Array) -> jax.Array:
    """The gates to use after training: without noise and temperature (the paper's equation 13)."""
    return jnp.clip((HIGH - LOW) * jax.nn.sigmoid(log_alpha) + LOW, 0, 1)


def probability_open(log_alpha: jax.Array) -> jax.Array:
    """How likely a draw is not 0; the sum over gates is their expected L0 norm (equation 12)."""
    return jax.nn.sigmoid(log_alpha - TEMPERATURE * np.log(-LOW / HIGH))


def open_gates(model: Decoder) -> dict[int, jax.Array]:
    """log_alpha to begin with: nearly open gates on all heads that may go.

    A gate is a key/value head's, and so its whole group's.

    Raises:
      ValueError: no layer's heads may go, or some went before.
    """
    config = model.config
    if config.heads_per_layer is not None:
        raise ValueError(
            "model: wanted one that is not pruned, got model.heads_per_layer = "
            f"{config.heads_per_layer}"
        )
    layers = [i for i, name in enumerate(config.mixers) if name in PRUNABLE]
    if not layers:
        raise ValueError(
            f"model: wanted a layer whose heads can go, got model.mixer = {config.mixer!r}; these "
            f"have such heads: {', '.join(PRUNABLE)}"
        )
    return {i: jnp.full((config.kv_heads,), OPEN) for i in layers}


def gated(model: Decoder, gates: Gates) -> Decoder:
    """The decoder with each head's output times its gate.

    Voita et al. 2019, arxiv.org/abs/1905.09418, section 6.

    Args:
      model: it stays as it was.
      gates: of layers whose heads may go.
    """
    group = model.config.num_heads // model.config.kv_heads
    return scale_heads(model, {i: jnp.repeat(gate, group) for i, gate in gates.items()})


def closed_heads(
    model: Decoder, log_alpha: Gates, number: int | None = None
) -> dict[int, list[int]]:
    """The heads to prune, but never a layer's last.

    Args:
      model: whose heads they are.
      log_alpha: where its gates stand.
      number: of heads that go, of the most closed gates; None: all whose settled gate is 0.

    Returns:
      Layer -> heads, for `prune_heads`.

    Raises:
      ValueError: so many cannot go, or they are no whole groups.
    """
    values = {i: np.asarray(value) for i, value in log_alpha.items()}
    group = model.config.num_heads // model.config.kv_heads
    if number is None:
        closed = [int((np.asarray(settled_gates(x)) == 0).sum()) for x in values.values()]
        most = [len(x) - 1 for x in values.values()]
        number = group * sum(map(min, closed, most))
    return lowest(values, number, group)
