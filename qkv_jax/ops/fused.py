"""Kernels that others wrote, in place of a function of ours, which has the derivatives they lack.

cuDNN's attention and JAX's kernels for TPUs have values and one derivative, the first in reverse
mode. Forward mode and everything of higher order are errors there. `fused` takes from the kernel
what it has, which is what training asks for, and the rest from the function that it stands for:

                                    from the kernel        from the function
    f(x)                            f
    jax.vjp, jax.grad               f, its pullback
    jax.jvp                         f                      the tangent
    a derivative of a derivative    f, its pullback        what is differentiated

In reverse mode JAX transposes the tangent. So the tangent is a primitive of its own here, linear in
the tangents that come in: computed, it is the function's; transposed, it is the kernel's pullback.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qkv_jax.ops.block_sum import batch_by_loop
from qkv_jax.ops.manual import abstract_array, varying_like

Arrays = Sequence[jax.Array]
Function = Callable[..., jax.Array]


def fused(kernel: Function, exact: Function, *arrays: jax.Array) -> jax.Array:
    """`kernel(*arrays)`, with derivatives of every order, in both modes.

    Args:
      kernel: returns one array, and can be differentiated once in reverse mode.
      exact: the same function, with all derivatives.
      *arrays: of any dtype; there are derivatives in those that are floating.

    Returns:
      What `kernel` returns. `jax.vmap` is a loop. Inside `jax.shard_map` the kernel sees arrays
      that vary over the mesh alike, so that the gradient of one that did not is summed.
    """
    return _Pair(kernel, exact).values(*varying_like(arrays, arrays))


class _Pair:
    """One call: its kernel, its exact function, and what leads from one to the other."""

    def __init__(self, kernel: Function, exact: Function):
        self.kernel, self.exact = kernel, exact
        # Of the kernel's pullback, once it was taken: its tree, and which of its leaves are given.
        self.tree, self.given = None, []

        self.values = _with_jvp(_by_loop(kernel), self._values_jvp)
        # The pullback comes as the arrays that it holds beside those that are given.
        self._linearized = _with_jvp(_by_loop(self._linearize), self._linearized_jvp)
        self._pulled = _with_jvp(_by_loop(self._pull), self._pulled_jvp)

    def _values_jvp(self, arrays, tangents):
        out, *held = self._linearized(*arrays)
        moved = [t for x, t in zip(arrays, tangents, strict=True) if _moves(x)]
        (tangent,) = tangent_p.bind(
            *arrays, *held, *moved,
            pair=self, sizes=(len(arrays), len(held)), shape=out.shape, dtype=out.dtype,
        )  # fmt: skip
        return out, tangent

    def push(self, arrays: Arrays, moved: Arrays) -> jax.Array:
        """The exact tangent, from those of the floating arrays."""
        rest = iter(moved)
        tangents = [next(rest) if _moves(x) else _float0(x) for x in arrays]
        return jax.jvp(self.exact, tuple(arrays), tuple(tangents))[1]

    def _linearize(self, *arrays):
        out, pullback = jax.vjp(self.kernel, *arrays)
        leaves, self.tree = jax.tree.flatten(pullback)
        places = {id(x): i for i, x in enumerate(arrays)}
        self.given = [places.get(id(x)) for x in leaves]
        return out, *(x for x, i in zip(leaves, self.given, strict=True) if i is None)

    def _linearized_jvp(self, arrays, tangents):
        """What the pullback holds has no tangent: `_pulled_jvp` differentiates in the arrays."""
        out, *held = self._linearized(*arrays)
        _, tangent = jax.jvp(self.exact, arrays, tangents)
        return (out, *held), (tangent, *map(_no_tangent, held))

    def pull(self, arrays: Arrays, held: Arrays, cotangent: jax.Array) -> list[jax.Array]:
        """The kernel's cotangents of the floating arrays."""
        return self._pulled(tuple(arrays), tuple(held), cotangent)

    def _pull(self, arrays, held, cotangent):
        rest = iter(held)
        leaves = [next(rest) if i is None else arrays[i] for i in self.given]
        return _moving(arrays, jax.tree.unflatten(self.tree, leaves)(cotangent))

    def _pulled_jvp(self, primals, tangents):
        def exact(arrays, cotangent):
            return _moving(arrays, jax.vjp(self.exact, *arrays)[1](cotangent))

        arrays, _, cotangent = primals
        arrays_dot, _, cotangent_dot = tangents
        _, moved = jax.jvp(exact, (arrays, cotangent), (arrays_dot, cotangent_dot))
        return self._pulled(*primals), moved


def _with_jvp(function: Callable, rule: Callable) -> Callable:
    function = jax.custom_jvp(function)
    function.defjvp(rule)
    return function


def _by_loop(function: Callable) -> Callable:
    return jax.custom_batching.sequential_vmap(function)


def _moves(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _moving(arrays: Arrays, cotangents: Arrays) -> list[jax.Array]:
    return [ct for x, ct in zip(arrays, cotangents, strict=True) if _moves(x)]


def _float0(x: jax.Array) -> jax.Array:
    return ad.instantiate_zeros(ad.Zero(jax.typeof(x).to_tangent_aval()))


def _no_tangent(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x) if _moves(x) else _float0(x)


# The tangent: of the arrays, of what the kernel's pullback holds, and of the tangents that come in

tangent_p = Primitive("fused_tangent")
tangent_p.multiple_results = True


@dataclasses.dataclass(frozen=True)
class _Operands:
    arrays: list
    held: list
    moved: list

    @classmethod
    def of(cls, operands: Sequence, sizes: tuple[int, int]) -> "_Operands":
        a, b = sizes[0], sum(sizes)
        return cls(list(operands[:a]), list(operands[a:b]), list(operands[b:]))


def _tangent(*operands, pair, sizes, shape, dtype):
    x = _Operands.of(operands, sizes)
    return [pair.push(x.arrays, x.moved)]


def _abstract(*operands, pair, sizes, shape, dtype):
    return [abstract_array(shape, dtype, operands)]


def _jvp(primals, tangents, *, pair, sizes, shape, dtype):
    out = tangent_p.bind(*primals, pair=pair, sizes=sizes, shape=shape, dtype=dtype)
    x = _Operands.of(primals, sizes)
    dx = _Operands.of([ad.instantiate_zeros(t) for t in tangents], sizes)
    _, moved = jax.jvp(pair.push, (x.arrays, x.moved), (dx.arrays, dx.moved))
    return out, [moved]


def _transpose(cotangents, *operands, pair, sizes, shape, dtype):
    x = _Operands.of(operands, sizes)
    results = pair.pull(x.arrays, x.held, ad.instantiate_zeros(cotangents[0]))
    return [None] * sum(sizes) + [
        ct if ad.is_undefined_primal(t) else None for t, ct in zip(x.moved, results, strict=True)
    ]


tangent_p.def_impl(_tangent)
tangent_p.def_abstract_eval(_abstract)
ad.primitive_jvps[tangent_p] = _jvp
ad.primitive_transposes[tangent_p] = _transpose
batching.primitive_batchers[tangent_p] = batch_by_loop(tangent_p)
mlir.register_lowering(tangent_p, mlir.lower_fun(_tangent, multiple_results=True))
