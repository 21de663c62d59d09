"""Which axes of a mesh cut which parameter, and what lies whole while a block is computed.

The rules are one table, by the end of a parameter's path. What they say of an axis that the mesh
does not have, or that does not divide a parameter, is moved to another axis of it, or left out.
`qkv_jax.ops.mesh` says what the mesh's axes mean.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from qkv_jax.nn.functional import merge, split
from qkv_jax.ops.mesh import HEADS, ROWS, TOKENS, Axes, constrain, fitted, sizes

FSDP = ("fsdp",)
SMALL = 4096  # numbers: an array of fewer that no rule names lies whole
# Of a matrix's two axes, fsdp cuts the one that the residual stream has, tensor the other.
RULES: tuple[tuple[str, tuple[Axes, ...]], ...] = (
    (r"\w*embedding/embedding", (HEADS, FSDP)),  # [V, D]
    ("positions/table", (None, FSDP)),  # [T, D]
    ("(query|key|value|gate|up|head)/kernel", (FSDP, HEADS)),  # [D, N H], [D, F], [D, V]
    ("(query|key|value|gate|up)/bias", (HEADS,)),
    ("(out|down)/kernel", (HEADS, FSDP)),  # [N H, D], [F, D]
    # Muon's stacks of equal matrices: it needs whole ones, so fsdp cuts between them if it can.
    (r"\d+x\d+", (FSDP, None, HEADS)),
)


def parameter_axes(path: str, shape: Sequence[int], sizes: dict[str, int]) -> tuple[Axes, ...]:
    """The mesh axes that cut each axis of a parameter, or of what an optimizer keeps for it.

    Args:
      path: such as "blocks/0/mixer/query/kernel"; its end decides.
      shape: of the parameter.
      sizes: of the mesh's axes.

    Returns:
      By the first of `RULES`; without one, fsdp cuts the first axis of a matrix that it divides,
      and what has one axis or few numbers lies whole.
    """
    if len(shape) < 2 or math.prod(shape) < SMALL:
        default: tuple[Axes, ...] = (None,) * len(shape)
    else:
        default = (FSDP, *(None,) * (len(shape) - 1))
    matching = (axes for end, axes in RULES if re.search(f"(^|/){end}$", path))
    wanted = next((axes for axes in matching if len(axes) == len(shape)), default)
    found = fitted(wanted, shape, sizes)
    placed = [name for axes in found for name in axes or ()]
    for name in (name for axes in wanted for name in axes or ()):
        if name in placed or name not in sizes or len(shape) < 2:
            continue
        for i, axes in enumerate(found):
            widened = tuple((axes or ()) + (name,) if j == i else x for j, x in enumerate(found))
            if fitted(widened, shape, sizes) == widened:
                found = widened
                break
    return found


def leaf_axes(tree: Any, sizes: dict[str, int]) -> list[tuple[Axes, ...]]:
    """`parameter_axes` of each leaf of a tree of parameters, or of an optimizer's state."""
    return [
        parameter_axes(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, sizes)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def as_parameters(tree: Any) -> Any:
    """The leaves of a tree of parameters, gradients or state, cut as `RULES` say."""
    if not (known := sizes()):
        return tree
    leaves, structure = jax.tree.flatten(tree)
    cut = [
        jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))
        for x, axes in zip(leaves, leaf_axes(tree, known), strict=True)
    ]
    return jax.tree.unflatten(structure, cut)


def gathered(module: nnx.Module) -> nnx.Module:
    """A module with its parameters whole along fsdp."""
    known = sizes()
    if "fsdp" not in known:
        return module
    graphdef, params = split(module)
    leaves, structure = jax.tree.flatten(params)
    whole = [
        constrain(leaf, *(tuple(a for a in axes or () if a not in FSDP) for axes in cut))
        for leaf, cut in zip(leaves, leaf_axes(params, known), strict=True)
    ]
    return merge(graphdef, jax.tree.unflatten(structure, whole))


# What only moves or casts numbers: on the way from a parameter to the product that it is used in.
_MOVES = {
    "sharding_constraint", "convert_element_type", "concatenate", "transpose",
    "reshape", "squeeze", "broadcast_in_dim", "split", "slice", "copy",
}  # fmt: skip


def saved(primitive: Any, *inputs: Any, **_: Any) -> bool:
    """The policy of `jax.checkpoint` that keeps activations and gathers parameters again.

    Complex numbers are computed again too: JAX cannot keep them, and fails.
    """
    is_complex = any(jax.dtypes.issubdtype(x.dtype, np.complexfloating) for x in inputs)
    return primitive.name not in _MOVES and primitive.name != "fft" and not is_complex


def looked_up(x: jax.Array) -> jax.Array:
    """Rows [B, T, D] of an embedding: each device looks up its part of them, then they move."""
    return all_tokens(constrain(x, ("data",), TOKENS, FSDP))


def by_heads(x: jax.Array) -> jax.Array:
    """Hidden units [B, T, F] or heads [B, T, N, H], cut by tensor."""
    return constrain(x, ROWS, TOKENS, HEADS, *[None] * (x.ndim - 3)) if x.ndim >= 3 else x


def by_tokens(x: jax.Array) -> jax.Array:
    """The residual stream [B, T, D], and what norms and adds to it: tokens cut by tensor too.

    Korthikanti et al. 2022, arxiv.org/abs/2205.05198: sequence parallelism.
    """
    return constrain(x, ROWS, TOKENS + HEADS, None)


def all_tokens(x: jax.Array) -> jax.Array:
    """[B, T, D], where every device of an axis `tensor` has the same tokens, for its own heads."""
    return constrain(x, ROWS, TOKENS, None)
