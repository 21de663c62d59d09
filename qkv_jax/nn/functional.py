"""Modules as pure functions of a plain nested dict of arrays.

What crosses `jax.jit` is that dict: an `nnx.State` takes longer to dispatch and `nnx.jit` ten times
as long, which a small model's training step feels.
"""

from typing import Any

import jax
from flax import nnx

Params = dict[Any, Any]  # nested, with arrays as leaves


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A module's structure, which is static and hashable, and its parameters as a nested dict."""
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Params) -> nnx.Module:
    """The module with these parameters: the inverse of `split`."""
    return nnx.merge(graphdef, params)


def count(params: Params) -> int:
    """How many numbers the parameters hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
