"""Modules with every parameter random: a bias of 0 or a norm's scale of 1 could hide a mistake."""

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax import nn


def randomised(module, scale=0.5):
    """The module with all parameters drawn anew from a normal distribution."""
    graphdef, params = nn.split(module)
    random = np.random.RandomState(0)
    params = jax.tree.map(lambda x: jnp.asarray(random.randn(*x.shape) * scale, x.dtype), params)
    return nn.merge(graphdef, params)
