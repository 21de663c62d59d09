"""What masks and scores share: small frozen pytrees that carry arrays to the blocks of `attention`.

An array that a mask or a score carries is an *operand*, of one of two kinds:

    aligned   rank 4 and broadcastable to [B, N, T, S]; a block of attention sees its own cut of it
    table     any other rank; every block sees the whole of it

Constructors take natural shapes (slopes [N], lengths [B], ids [B, T]) and keep what they are given,
so that gradients come back in that shape. `aligned()`, which `attention` calls once, is the step
from those shapes to rank 4.
"""

import dataclasses
import math
from collections.abc import Hashable, Iterator
from typing import Any, Self, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

AXES = "BNTS"
_DTYPES = {"integer": jnp.integer, "floating": jnp.floating, "bool": jnp.bool_}


@dataclasses.dataclass(frozen=True)
class _Spec:
    """What a field accepts: the argument of `operand`."""

    layouts: tuple[str, ...]
    tables: tuple[str, ...]
    dtype: str
    number: bool
    sign: str
    optional: bool


def operand(
    *layouts: str,
    tables: tuple[str, ...] = (),
    dtype: str,
    number: bool = False,
    sign: str = "",
    optional: bool = False,
    default: Any = dataclasses.MISSING,
) -> Any:
    """Declares a field of an `Operands` class, checked by its constructor.

    Args:
      *layouts: the axes, out of "BNTS", of each array the field accepts: "BT" is an array [B, T],
        "" a scalar array. With any layout, an array of rank 4 is accepted too, as aligned already.
      tables: the axes, by name, of each table the field accepts: "buckets N" is [buckets, N].
      dtype: integer, floating or bool.
      number: whether a Python number is accepted.
      sign: what a Python number must be: "positive", "non-negative" or "" for any.
      optional: whether None is accepted.
      default: the field's default.
    """
    spec = _Spec(layouts, tables, dtype, number, sign, optional)
    return dataclasses.field(default=default, metadata={"operand": spec})


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(operand,))
class Operands:
    """Base of masks and scores: its subclasses are frozen dataclasses and JAX pytrees.

    A field that holds an array or a pytree with arrays (another mask, a tuple of operands) is a
    child; numbers, strings, functions and None are static: part of the tree's structure, hashable,
    compared by value. The elements of a tuple are told apart one by one. NumPy scalars count as
    Python numbers.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        jax.tree_util.register_pytree_with_keys(
            cls, _flatten_with_keys, _unflattener(cls), _flatten
        )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                value = value.item()
            if spec := field.metadata.get("operand"):
                value = _checked(self, field.name, spec, value)
            try:
                hash(_structure(value))
            except TypeError:
                found = f"{type(self).__name__}: {field.name} must be an array or hashable"
                raise ValueError(f"{found}, got {described(value)}") from None
            self.__dict__[field.name] = value

    def aligned(self) -> Self:
        """The same object with each operand of natural shape in rank 4, tables as they are.

        Differentiable; idempotent; NumPy arrays stay NumPy arrays.
        """
        values = {}
        for field in dataclasses.fields(self):
            spec = field.metadata.get("operand")
            value = getattr(self, field.name)
            values[field.name] = _aligned(self, field.name, spec, value)
        return _new(type(self), values)

    def __eq__(self, other: object) -> bool:
        """Whether both have the same class, the same numbers and the very same arrays."""
        if type(self) is not type(other):
            return NotImplemented
        leaves, treedef = jax.tree.flatten(self)
        other_leaves, other_treedef = jax.tree.flatten(other)
        return treedef == other_treedef and all(
            a is b for a, b in zip(leaves, other_leaves, strict=True)
        )

    def __hash__(self) -> int:
        return hash(jax.tree.structure(self))

    def __repr__(self) -> str:
        fields = (f"{f.name}={described(getattr(self, f.name))}" for f in dataclasses.fields(self))
        return f"{type(self).__name__}({', '.join(fields)})"


def check_aligned(obj: Any, name: str, *, B: int, N: int, T: int, S: int, shards: int = 1) -> None:
    """Checks that the aligned operands of `obj` broadcast to [B, N, T, S].

    Args:
      obj: what `aligned()` returned, a tuple of such, or None.
      name: the argument that `obj` came as, for the message.
      B, N, T, S: the sizes.
      shards: where the keys are one of so many shards, an operand may also have the S axis of all.

    Raises:
      ValueError: naming the class, the field, the shape found and the shape wanted.
    """
    sizes = (B,), (N,), (T,), (S, shards * S)
    if isinstance(obj, tuple | list):
        for part in obj:
            check_aligned(part, name, B=B, N=N, T=T, S=S, shards=shards)
        return
    for field, child in _children(obj) if isinstance(obj, Operands) else ():
        if isinstance(child, Operands):
            check_aligned(child, name, B=B, N=N, T=T, S=S, shards=shards)
            continue
        for leaf in jax.tree.leaves(child):
            shape = np.shape(leaf)
            if len(shape) == 4 and any(n not in (1, *m) for n, m in zip(shape, sizes, strict=True)):
                raise ValueError(
                    f"{name}: {type(obj).__name__}.{field} has shape {list(shape)} once aligned, "
                    f"which does not broadcast to [B, N, T, S] = {[B, N, T, S]}"
                    + (f", nor to S = {shards * S}, the keys of all shards" if shards > 1 else "")
                )


def described(value: Any) -> str:
    """A value in an error message: dtype and shape of an array, the name of a function."""
    if is_array(value):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if type(value) is tuple:
        return f"({', '.join(map(described, value))})"
    return getattr(value, "__qualname__", None) or repr(value)


def is_array(value: Any) -> bool:
    """Whether `value` is a JAX or NumPy array, a tracer or a `ShapeDtypeStruct`."""
    return isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def as_jax(operands: Any) -> Any:
    """Operands with their NumPy arrays as JAX arrays, which a traced index may index."""
    return jax.tree.map(lambda x: jnp.asarray(x) if is_array(x) else x, operands)


# The pytree. A structure mirrors the fields: _Child where there is a child, else a _Static. It is
# read off an object that a person built, and remembered in the copies that JAX makes: their
# children may be anything (None, an axis number, a sharding) and must flatten to the same tree.


class _Child:
    """Stands for a child in a structure."""


@dataclasses.dataclass(frozen=True)
class _Static:
    kind: type  # 1, 1.0 and True are equal, and a function may treat them differently
    value: Hashable


def _structure(value: Any) -> Any:
    if type(value) is tuple:
        return tuple(_structure(part) for part in value)
    if isinstance(value, Operands) or any(is_array(leaf) for leaf in jax.tree.leaves(value)):
        return _Child
    return _Static(type(value), value)


def _structure_of(obj: Operands) -> tuple:
    if "_structure" in obj.__dict__:
        return obj.__dict__["_structure"]
    return tuple((f.name, _structure(getattr(obj, f.name))) for f in dataclasses.fields(obj))


def _walk(name: str, structure: Any, value: Any) -> Iterator[tuple[str, Any]]:
    if structure is _Child:
        yield name, value
    elif isinstance(structure, tuple):
        for i, part in enumerate(structure):
            yield from _walk(f"{name}[{i}]", part, value[i])


def _children(obj: Operands) -> Iterator[tuple[str, Any]]:
    for name, structure in _structure_of(obj):
        yield from _walk(name, structure, getattr(obj, name))


def _flatten(obj: Operands) -> tuple[tuple, tuple]:
    return tuple(child for _, child in _children(obj)), _structure_of(obj)


def _flatten_with_keys(obj: Operands) -> tuple[tuple, tuple]:
    keyed = tuple((jax.tree_util.GetAttrKey(name), child) for name, child in _children(obj))
    return keyed, _structure_of(obj)


def _unflattener(cls: type):
    def filled(structure: Any, children: Iterator[Any]) -> Any:
        if structure is _Child:
            return next(children)
        if isinstance(structure, tuple):
            return tuple(filled(part, children) for part in structure)
        return structure.value

    def unflatten(structure: tuple, children: Any) -> Operands:
        children = iter(children)
        values = {name: filled(part, children) for name, part in structure}
        return _new(cls, values | {"_structure": structure})

    return unflatten


def _new(cls: type, values: dict[str, Any]) -> Any:
    """An instance with these fields, without the constructor and its checks."""
    obj = object.__new__(cls)
    obj.__dict__.update(values)
    return obj


# Checks and alignment.


def _checked(owner: Operands, name: str, spec: _Spec, value: Any) -> Any:
    if value is None and spec.optional:
        return value
    if (spec.layouts or spec.tables) and isinstance(value, list | tuple):
        value = np.asarray(value)
    if is_array(value):
        ranks = {len(layout) for layout in spec.layouts} | ({4} if spec.layouts else set())
        ranks |= {len(table.split()) for table in spec.tables}
        accepted = value.ndim in ranks and jnp.issubdtype(value.dtype, _DTYPES[spec.dtype])
    else:
        accepted = spec.number and _is_number(value, spec)
    if not accepted:
        raise ValueError(
            f"{type(owner).__name__}: {name} must be {_wanted(spec)}, got {described(value)}"
        )
    return value


def _is_number(value: Any, spec: _Spec) -> bool:
    kinds = int if spec.dtype == "integer" else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
        return False
    return {"positive": value > 0, "non-negative": value >= 0}.get(spec.sign, True)


def _aligned(owner: Operands, name: str, spec: _Spec | None, value: Any) -> Any:
    if isinstance(value, Operands):
        return value.aligned()
    if type(value) is tuple:
        return tuple(_aligned(owner, name, spec, part) for part in value)
    if spec is None or not spec.layouts or not is_array(value) or value.ndim == 4:
        return value
    for layout in spec.layouts:
        if len(layout) == value.ndim:
            return value[tuple(slice(None) if axis in layout else None for axis in AXES)]
    raise ValueError(
        f"{type(owner).__name__}: {name} must be {_wanted(spec)}, got {described(value)}"
    )


def _wanted(spec: _Spec) -> str:
    noun = "integer" if spec.dtype == "integer" else "number"
    wanted = [f"a {spec.sign} {noun}" if spec.sign else f"a Python {noun}"] if spec.number else []
    axes = [*spec.layouts, *(table.split() for table in spec.tables)]
    if axes:
        shapes = " or ".join(f"[{', '.join(names)}]" for names in axes)
        array = f"{'an' if spec.dtype == 'integer' else 'a'} {spec.dtype} array of shape {shapes}"
        wanted.append(array + (" (or aligned with [B, N, T, S])" if spec.layouts else ""))
    return " or ".join(wanted + (["None"] if spec.optional else []))
