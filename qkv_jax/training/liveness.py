"""What a program keeps in memory while it runs, and what it reads and writes, before it runs.

Compilers fuse what is computed number by number into what reads it. Such values take no memory,
unless a product or a message reads them, or they are dear and read more than once; all others live
from where they are computed to where they are read last.
"""

import dataclasses
import math
from collections.abc import Sequence

from qkv_jax.training.placement import Value
from qkv_jax.training.program import Operation, Program

# Computed number by number, or only moved: fused into what reads it.
CHEAP = {
    "abs", "add", "add_any", "and", "broadcast_in_dim", "ceil", "clamp", "concatenate",
    "convert_element_type", "copy", "eq", "floor", "ge", "gt", "integer_pow", "iota", "is_finite",
    "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pad", "reduce_precision", "rev",
    "round", "select_n", "shift_left", "shift_right_logical", "sign", "slice", "split", "square",
    "stack", "sub", "transpose", "unstack", "xor",
}  # fmt: skip
# The same, but computed once: not again for a second reader.
DEAR = {
    "cbrt", "cos", "div", "erf", "erf_inv", "exp", "exp2", "expm1", "log", "log1p", "logistic",
    "pow", "rem", "rsqrt", "sin", "sqrt", "tan", "tanh",
}  # fmt: skip
# The same numbers under another shape.
VIEWS = {"expand_dims", "optimization_barrier", "pvary", "reshape", "squeeze", "stop_gradient"}
# What may be written over what it reads.
IN_PLACE = CHEAP | DEAR | {"dynamic_update_slice", "scatter", "scatter-add"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operation whose results stand in memory, with all that is fused into it.

    Args:
      operation: the last of them.
      reads: what has to stand in memory.
      sizes: bytes of each result, on one device.
    """

    operation: Operation
    reads: list[Value]
    sizes: dict[Value, int]

    @property
    def bytes(self) -> int:
        """Read and written."""
        if self.operation.name == "gather":
            return 2 * sum(self.sizes.values())
        if self.operation.name == "scatter-add":  # in place
            return 2 * self.operation.inputs[-1].bytes
        return sum(x.bytes for x in self.reads) + sum(self.sizes.values())


def kernels(program: Program) -> list[Kernel]:
    """What is computed into memory, in the order of the program; nothing that no output needs."""
    operations, origin = _without_views(_needed(program))
    outside = {origin.get(x, x) for x in (*program.inputs, *program.outputs)}
    fused = _fused(operations, outside)
    numbers: dict[Value, int] = {}
    stands_for: dict[Value, list[Value]] = {}  # what has to stand in memory, to compute it
    found = []
    for operation in operations:
        arrays = [x for x in operation.inputs if x.shape]
        reads = dict.fromkeys(z for x in operation.inputs for z in stands_for.get(x, [x]))
        for y in operation.outputs:
            numbers[y] = math.prod(y.shape) // y.pieces
            # What is computed of a few numbers that are repeated, is computed before they are.
            if operation.name in CHEAP | DEAR and len(arrays) == 1:
                numbers[y] = min(numbers[y], numbers.get(arrays[0], numbers[y]))
            stands_for[y] = list(reads) if y in fused else [y]
        if not fused.issuperset(operation.outputs):
            repeats = operation.name in DEAR
            sizes = {y: numbers[y] * y.itemsize if repeats else y.bytes for y in operation.outputs}
            found.append(Kernel(operation, list(reads), sizes))
    return found


def temporary_bytes(program: Program, *, depth_first: bool = False) -> int:
    """The most bytes that live at once on a device, beside inputs and outputs of the program.

    Args:
      program: of one step.
      depth_first: in the order in which XLA's compiler for CPUs computes, where it is told to save
        memory, instead of the program's: what nothing waits for, such as the gradients of
        parameters, comes late.
    """
    _, origin = _without_views(program.operations)
    outputs = [origin.get(x, x) for x in program.outputs]
    outside = {*outputs, *(origin.get(x, x) for x in program.inputs)}
    steps = kernels(program)
    if depth_first:
        steps = _depth_first(steps, outputs)
    last = {x: i for i, kernel in enumerate(steps) for x in (*kernel.sizes, *kernel.reads)}
    freed = [0] * (len(steps) + 1)
    now = most = 0
    for i, kernel in enumerate(steps):
        for x, size in kernel.sizes.items():
            if x not in outside:
                now += size
                freed[last[x] + (steps[last[x]].operation.name not in IN_PLACE)] += size
        now -= freed[i]
        inner = kernel.operation.inner
        most = max(most, now + (temporary_bytes(inner, depth_first=depth_first) if inner else 0))
    return most


def _needed(program: Program) -> list[Operation]:
    """The operations that an output depends on."""
    wanted, found = set(program.outputs), []
    for operation in reversed(program.operations):
        if not wanted.isdisjoint(operation.outputs):
            found.append(operation)
            wanted |= set(operation.inputs)
    return found[::-1]


def _without_views(
    operations: Sequence[Operation],
) -> tuple[list[Operation], dict[Value, Value]]:
    """The operations that do something, reading what views are of; and what each is of."""
    origin: dict[Value, Value] = {}
    found = []
    for operation in operations:
        inputs = [origin.get(x, x) for x in operation.inputs]
        if operation.name in VIEWS:
            origin |= dict(zip(operation.outputs, inputs, strict=True))
        else:
            found.append(dataclasses.replace(operation, inputs=inputs))
    return found, origin


def _fused(operations: Sequence[Operation], outside: set[Value]) -> set[Value]:
    """The values that do not stand in memory."""
    readers: dict[Value, list[Operation]] = {}
    for operation in operations:
        for x in dict.fromkeys(operation.inputs):
            readers.setdefault(x, []).append(operation)
    added = _added_in_place(operations, readers)
    times: dict[Value, int] = {}  # each of them is computed
    for operation in reversed(operations):
        for y in operation.outputs:
            reading = readers.get(y, [])
            soft = all(
                r.name in CHEAP | DEAR or r.name.startswith("reduce_") or r.outputs[0] in added
                for r in reading
            )
            number = sum(max(times.get(z, 1) for z in r.outputs) for r in reading)
            once = operation.name in CHEAP or (operation.name in DEAR and number < 2)
            once |= y in added
            if once and soft and y not in outside:
                times[y] = number
    return set(times)


def _added_in_place(
    operations: Sequence[Operation], readers: dict[Value, list[Operation]]
) -> set[Value]:
    """What is scattered into zeros and then added to something: scattered into that instead."""
    zeros = {
        y
        for operation in operations
        if operation.name == "broadcast_in_dim" and not operation.inputs[0].shape
        for y in operation.outputs
    }
    return {
        o.outputs[0]
        for o in operations
        if o.name == "scatter-add" and o.inputs[0] in zeros
        if [r.name for r in readers.get(o.outputs[0], [])] in (["add"], ["add_any"])
    }


def _depth_first(steps: Sequence[Kernel], outputs: Sequence[Value]) -> list[Kernel]:
    """Each after what it reads, of which comes first what most else reads, then what is largest.

    XLA's `DFSMemoryScheduler`, in hlo_memory_scheduler.cc of github.com/openxla/xla.
    """
    maker = {y: i for i, kernel in enumerate(steps) for y in kernel.sizes}
    makers = [list(dict.fromkeys(maker[x] for x in k.reads if x in maker)) for k in steps]
    users = dict.fromkeys(maker, 0)
    for kernel in steps:
        for x in kernel.reads:
            users[x] = users.get(x, 0) + 1
    rank: list[tuple[int, int]] = []
    for kernel, before in zip(steps, makers, strict=True):
        others = sum(max(0, users[y] - 1) for y in kernel.sizes)
        size = sum(kernel.sizes.values())
        rank.append((others + sum(rank[i][0] for i in before),
                     size + sum(rank[i][1] for i in before)))  # fmt: skip
    order, seen = [], set()
    stack = sorted({maker[x] for x in outputs if x in maker}, key=rank.__getitem__)
    while stack:
        i = stack[-1]
        waiting = [j for j in makers[i] if j not in seen]
        if i in seen or not waiting:
            stack.pop()
            if i not in seen:
                seen.add(i)
                order.append(steps[i])
        else:
            stack += sorted(waiting, key=rank.__getitem__)
    return order
