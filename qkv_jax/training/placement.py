"""Where on a mesh the result of an operation lies, by where its operands lie.

As GSPMD has it (Xu et al. 2021, arxiv.org/abs/2105.04663): what cuts an axis of an operand cuts the
same axis of the result, and a sum along a cut axis leaves a part of the sum on each device.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

Cut = tuple[tuple[str, ...], ...]  # for each axis of an array, the mesh's axes that cut it

# What changes no number, and so keeps a part of a sum a part of it.
MOVES = {
    "broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "neg",
    "optimization_barrier", "pvary", "reshape", "squeeze", "stop_gradient", "transpose",
}  # fmt: skip
SUMS = {"add", "add_any", "sub"}


@dataclasses.dataclass(eq=False)
class Value:
    """What an operation returns.

    Args:
      shape: of the whole; inside `shard_map`, of what one device has.
      itemsize: bytes of a number.
      cut: the mesh's axes that cut each axis.
      pieces: into how many pieces they do.
      partial: the mesh's axes over whose devices it is still to be summed.
    """

    shape: tuple[int, ...]
    itemsize: int
    cut: Cut
    pieces: int = 1
    partial: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """What one device holds."""
        return math.prod(self.shape) * self.itemsize // self.pieces

    @property
    def axes(self) -> set[str]:
        """The mesh's axes that cut it."""
        return {name for names in self.cut for name in names}


def cut_of(spec: Iterable[Any], ndim: int, sizes: dict[str, int]) -> Cut:
    """A `PartitionSpec`: an entry for each axis of an array, without mesh axes of one device."""
    entries = [(names,) if isinstance(names, str) else tuple(names or ()) for names in spec]
    entries += [()] * (ndim - len(entries))
    return tuple(tuple(name for name in names if sizes.get(name, 1) > 1) for names in entries)


def results(
    name: str,
    params: dict[str, Any],
    inputs: Sequence[Value],
    shapes: Sequence[tuple[int, ...]],
    sizes: dict[str, int],
) -> tuple[list[Cut], tuple[str, ...]]:
    """The cut of each result of a primitive, and over which mesh axes they are still to be summed.

    Args:
      name, params: of the primitive.
      inputs: its operands.
      shapes: of its results.
      sizes: of the mesh's axes.
    """
    cuts, partial = _results(name, params, inputs, shapes)
    return [_fitted(cut, shape, sizes) for cut, shape in zip(cuts, shapes, strict=True)], partial


def _results(
    name: str, params: dict[str, Any], inputs: Sequence[Value], shapes: Sequence[tuple[int, ...]]
) -> tuple[list[Cut], tuple[str, ...]]:
    if not inputs:
        return [((),) * len(shape) for shape in shapes], ()
    if name == "dot_general":
        return _of_product(params["dimension_numbers"], *inputs)
    x = max(inputs, key=lambda x: math.prod(x.shape))
    if name == "transpose":
        return [tuple(x.cut[i] for i in params["permutation"])], x.partial
    if name == "broadcast_in_dim":
        x = inputs[0]
        places = dict(zip(params["broadcast_dimensions"], x.cut, strict=True))
        return [tuple(places.get(i, ()) for i in range(len(shapes[0])))], x.partial
    if name.startswith("reduce_") and "axes" in params:
        summed = [i in params["axes"] for i in range(len(x.shape))]
        kept = tuple(names for names, gone in zip(x.cut, summed, strict=True) if not gone)
        partial = (names for names, gone in zip(x.cut, summed, strict=True) if gone)
        return [kept] * len(shapes), tuple(name for names in partial for name in names)
    if name == "gather" and len(inputs[0].shape) == 2:  # rows of a table, each on one device of it
        (rows, columns), looked_up = inputs[0].cut, inputs[1].cut[:-1]
        cut = _once((*looked_up, columns))[: len(shapes[0])]
        taken = {name for names in looked_up for name in names}
        return [cut], tuple(name for name in rows if name not in taken)
    if name == "scatter-add" and len(inputs[0].shape) == 2:  # and its gradient
        *rows, columns = inputs[2].cut
        return [((), columns)], tuple(name for names in rows for name in names)
    partial = x.partial if name in MOVES | SUMS else ()
    return [_reshaped(inputs, shape) for shape in shapes], partial


def _of_product(numbers: Any, x: Value, y: Value) -> tuple[list[Cut], tuple[str, ...]]:
    (x_summed, y_summed), (x_batch, y_batch) = numbers
    batch = [x.cut[i] or y.cut[j] for i, j in zip(x_batch, y_batch, strict=True)]
    left = [x.cut[i] for i in range(len(x.shape)) if i not in (*x_summed, *x_batch)]
    right = [y.cut[i] for i in range(len(y.shape)) if i not in (*y_summed, *y_batch)]
    pairs = zip(x_summed, y_summed, strict=True)
    partial = dict.fromkeys(name for i, j in pairs for name in (*x.cut[i], *y.cut[j]))
    return [_once((*batch, *left, *right), partial)], tuple(partial)


def factors(numbers: Any, x: Value, y: Value) -> tuple[Cut, Cut]:
    """How the two factors of a product are to be cut.

    What cuts the axis of one that is summed, and another axis of the other, cannot do both: the
    first is gathered.
    """
    (x_summed, y_summed), _ = numbers

    def cut(x: Value, summed: Sequence[int], y: Value, others: Sequence[int]) -> Cut:
        elsewhere = {n for i, names in enumerate(y.cut) if i not in others for n in names}
        return tuple(
            tuple(name for name in names if i not in summed or name not in elsewhere)
            for i, names in enumerate(x.cut)
        )

    return cut(x, x_summed, y, y_summed), cut(y, y_summed, x, x_summed)


def _reshaped(inputs: Sequence[Value], shape: tuple[int, ...]) -> Cut:
    """Cuts of equal axes, in order; one that is split or merged passes on what cuts its first."""
    found: list[tuple[str, ...]] = [()] * len(shape)
    for x in sorted(inputs, key=lambda x: -math.prod(x.shape)):
        for i, names in enumerate(_followed(x, shape)):
            found[i] = found[i] or names
    return _once(found)


def _followed(x: Value, shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [()] * len(shape)
    i = j = 0
    while i < len(x.shape) and j < len(shape):
        before, after = x.shape[i], shape[j]
        if before != after and 1 in (before, after):
            i, j = i + (before == 1), j + (before != 1)
            continue
        found[j] = x.cut[i]
        first = j
        while before < after and i + 1 < len(x.shape):  # merged with what follows
            i += 1
            before *= x.shape[i]
            found[first] += x.cut[i]
        while after < before and j + 1 < len(shape):  # split
            j += 1
            after *= shape[j]
        i, j = i + 1, j + 1
    return found


def _once(cut: Iterable[tuple[str, ...]], taken: Iterable[str] = ()) -> Cut:
    """A cut in which no mesh axis stands twice."""
    seen, found = set(taken), []
    for names in cut:
        found.append(tuple(name for name in names if name not in seen))
        seen |= set(names)
    return tuple(found)


def _fitted(cut: Cut, shape: tuple[int, ...], sizes: dict[str, int]) -> Cut:
    """A cut without what does not divide the array."""
    return tuple(
        names if length % math.prod(sizes[name] for name in names) == 0 else ()
        for names, length in zip(cut, shape, strict=True)
    )
