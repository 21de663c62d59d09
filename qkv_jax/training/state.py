"""Everything that training changes, in one pytree."""

import chex
import jax
import jax.numpy as jnp
import optax

from qkv_jax.nn import Params


@chex.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds. Random numbers and data are functions of (seed, step): not in here.

    Args:
      step: int32 [], how many updates have been made.
      params: the model's parameters, a nested dict.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> "TrainState":
        """The state before the first step."""
        return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))
