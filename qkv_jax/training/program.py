"""A traced function, operation by operation: where each value lies, what is computed and sent.

    program = traced(train_step, state, batch, mesh=abstract_mesh)
    program.flops()     # of products, on one device
    program.received()  # bytes that a device receives from others

Nothing is computed, and no device is needed.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, Literal
from jax.sharding import AbstractMesh, Mesh

from qkv_jax.ops.block_loop import block_shape
from qkv_jax.ops.mesh import ROWS
from qkv_jax.training import sharding
from qkv_jax.training.placement import MOVES, SUMS, Cut, Value, cut_of, factors, results

CALLS = {
    "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit",
    "remat2",
}  # fmt: skip
# Collectives inside `shard_map`, and how much of its piece each of n devices receives.
COLLECTIVES: dict[str, Callable[[int], float]] = {
    "psum": lambda n: 2 * (n - 1) / n,
    "psum_invariant": lambda n: 2 * (n - 1) / n,
    "pmax": lambda n: 2 * (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: n - 1,
    "all_gather_invariant": lambda n: n - 1,
    "all_to_all": lambda n: (n - 1) / n,
    "ppermute": lambda n: 1,
}
Received = dict[tuple[str, str], float]  # bytes, by the mesh's axis and the kind of collective


@dataclasses.dataclass(eq=False)
class Operation:
    """One step of a program.

    Args:
      name: of the primitive, or "moved" where a value is gathered, cut or summed over devices.
      inputs, outputs: what it reads and returns.
      inner, times: what it repeats, such as a scan's body.
      flops: of its products, on one device.
      received: by one device.
    """

    name: str
    inputs: list[Value]
    outputs: list[Value]
    inner: "Program | None" = None
    times: int = 1
    flops: float = 0.0
    received: Received = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Program:
    """Operations in the order in which they are written, calls inlined."""

    inputs: list[Value]
    outputs: list[Value]
    operations: list[Operation]

    def flops(self) -> float:
        """Floating point operations of all products, on one device.

        Those of attention are of all queries with all keys, also where a mask hides some.
        """
        return sum(
            o.flops + (o.inner.flops() * o.times if o.inner else 0.0) for o in self.operations
        )

    def received(self) -> Received:
        """The bytes that a device receives."""
        total: Received = collections.defaultdict(float)
        for operation in self.operations:
            inner = operation.inner.received() if operation.inner else {}
            for found, times in ((operation.received, 1), (inner, operation.times)):
                for key, number in found.items():
                    total[key] += number * times
        return dict(total)


def traced(
    f: Callable[..., Any], first: Any, *rest: Any, mesh: AbstractMesh | Mesh | None = None
) -> Program:
    """The program of a function of a state, or of parameters, and of a batch.

    Args:
      f: a function such as `make_train_step` returns, or a loss.
      first: a state or parameters, arrays or `jax.ShapeDtypeStruct`s, that lie where
        `sharding.shardings` says.
      rest: trees of [B, ...], of which each device has its rows.
      mesh: of any number of devices, which need not exist; None: one device.
    """
    if mesh is None:
        mesh = sharding.abstract_mesh(sharding.MeshConfig(), 1, batch_size=1)
    with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
        closed = jax.make_jaxpr(f)(first, *rest)
    walk = Walk({name: size for name, size in mesh.shape.items() if size > 1})
    where = jax.tree.leaves(sharding.shardings(first, mesh))
    rows = tuple(name for name in ROWS if name in walk.sizes)
    cuts = [
        cut_of(s.spec, x.ndim, walk.sizes)
        for s, x in zip(where, jax.tree.leaves(first), strict=True)
    ]
    cuts += [(rows, *[()] * (x.ndim - 1)) for x in jax.tree.leaves(rest)]
    jaxpr = closed.jaxpr
    inputs = [walk.value(v.aval, cut) for v, cut in zip(jaxpr.invars, cuts, strict=True)]
    walk.gathered_again = set(inputs)
    outputs = walk(jaxpr, [*(walk.value(v.aval) for v in jaxpr.constvars), *inputs])
    return Program(inputs, outputs, walk.settled())


class Walk:
    """Goes through a jaxpr and lists its operations.

    Args:
      sizes: of the mesh's axes that have more than one device.
    """

    def __init__(self, sizes: dict[str, int]):
        self.sizes = sizes
        self.operations: list[Operation] = []
        self.gathered_again: set[Value] = set()  # parameters: each use of them gathers its own
        self._moved: dict[tuple[Value, Cut], Value] = {}

    def __call__(self, jaxpr: Jaxpr, values: Sequence[Value]) -> list[Value]:
        """What a jaxpr returns, given its constants and inputs."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True))

        def read(x: Any) -> Value:
            return self.value(x.aval) if isinstance(x, Literal) else known[x]

        for equation in jaxpr.eqns:
            outputs = self.equation(equation, [read(x) for x in equation.invars])
            known |= dict(zip(equation.outvars, outputs, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def value(self, aval: Any, cut: Cut | None = None, partial: tuple[str, ...] = ()) -> Value:
        """A value of this shape and dtype, by default whole."""
        cut = ((),) * len(aval.shape) if cut is None else cut
        itemsize = getattr(aval.dtype, "itemsize", 4)  # keys of random numbers have none
        return Value(aval.shape, itemsize, cut, self.pieces(cut), partial)

    def pieces(self, cut: Cut) -> int:
        """Into how many pieces a value is cut."""
        return math.prod(self.sizes[name] for names in cut for name in names)

    def equation(self, equation: Any, inputs: list[Value]) -> list[Value]:
        """What an equation returns; what it does is added to the operations."""
        name, params = equation.primitive.name, equation.params
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if name in CALLS and inner is not None:
            jaxpr = getattr(inner, "jaxpr", inner)
            return self(jaxpr, [*(self.value(v.aval) for v in jaxpr.constvars), *inputs])
        if name == "cond":  # the last branch: what is done by default where platforms differ
            branch = params["branches"][-1]
            jaxpr = getattr(branch, "jaxpr", branch)
            return self(jaxpr, [*(self.value(v.aval) for v in jaxpr.constvars), *inputs[1:]])
        if name == "shard_map":
            return self.shard_map(equation, inputs)
        if name == "scan":
            return self.scan(equation, inputs)
        if name == "sharding_constraint":
            wanted = cut_of(params["sharding"].spec, len(inputs[0].shape), self.sizes)
            # Parts of a sum may wait: where they are cut next, less is left to sum.
            return [inputs[0] if wanted == inputs[0].cut else self.moved(inputs[0], wanted)]
        parts_of_one_sum = name in SUMS and len({x.partial for x in inputs}) == 1
        if name not in MOVES and not parts_of_one_sum:
            # Added to what is cut, less is left to sum too.
            cut = max(inputs, key=lambda x: x.pieces).cut if name in SUMS else None
            inputs = [
                self.moved(x, cut if x.partial and cut and len(cut) == len(x.cut) else x.cut)
                for x in inputs
            ]
        if name == "dot_general":
            cuts = factors(params["dimension_numbers"], *inputs)
            inputs = [self.moved(x, cut) for x, cut in zip(inputs, cuts, strict=True)]
        shapes = [v.aval.shape for v in equation.outvars]
        cuts, partial = results(name, params, inputs, shapes, self.sizes)
        outputs = [
            self.value(v.aval, c, partial) for v, c in zip(equation.outvars, cuts, strict=True)
        ]
        self.operations.append(
            Operation(
                name, inputs, outputs, flops=self.flops(name, params, inputs, outputs),
                received=self.collective(name, params, inputs),
            )
        )  # fmt: skip
        return outputs

    def flops(
        self, name: str, params: dict[str, Any], inputs: list[Value], outputs: list[Value]
    ) -> float:
        """Of an operation's products, on one device."""
        if name == "dot_general":
            x, y = inputs
            summed = math.prod(x.shape[i] for i in params["dimension_numbers"][0][0])
            devices = math.prod(self.sizes[axis] for axis in x.axes | y.axes)
            return 2.0 * math.prod(outputs[0].shape) * summed / devices
        if name == "attend":  # attention, block by block: q k and weights v
            q, k, v = (x.shape for x in inputs[2:5])
            return 2.0 * math.prod(q[:3]) * k[1] * (q[3] + v[3])
        if name == "block_sum":  # and its derivatives
            f, grid = params["f"], params["grid"]
            cuts = [
                jax.ShapeDtypeStruct(block_shape(axes, x.shape, grid), "float32")
                for x, axes in zip(inputs[2:], params["in_axes"], strict=True)
            ]
            block = block_flops(f, *cuts)
            rows, heads = -(-grid.B // grid.rows), -(-grid.N // grid.heads)
            return block * grid.q_blocks * grid.kv_blocks * rows * heads
        return 0.0

    def collective(self, name: str, params: dict[str, Any], inputs: list[Value]) -> Received:
        """What a device receives where a program says so itself."""
        if name not in COLLECTIVES:
            return {}
        axes = params.get("axes", params.get("axis_name"))
        known = [a for a in ((axes,) if isinstance(axes, str) else axes) if a in self.sizes]
        held = sum(x.bytes for x in inputs)
        return {(axis, name): COLLECTIVES[name](self.sizes[axis]) * held for axis in known}

    def shard_map(self, equation: Any, inputs: list[Value]) -> list[Value]:
        """What is written for one device: there, its piece of a value is all there is of it."""
        params, jaxpr = equation.params, equation.params["jaxpr"]

        def same(x: Value, y: Value) -> Value:
            self.operations.append(Operation("reshape", [x], [y]))
            return y

        here = []
        for x, spec, v in zip(inputs, params["in_specs"], jaxpr.invars, strict=True):
            x = self.moved(x, cut_of(spec, len(x.shape), self.sizes))
            here.append(same(x, self.value(v.aval)))
        consts = [self.value(v.aval) for v in jaxpr.constvars]
        found = zip(
            self(jaxpr, [*consts, *here]), params["out_specs"], equation.outvars, strict=True
        )
        return [
            same(x, self.value(v.aval, cut_of(spec, len(v.aval.shape), self.sizes)))
            for x, spec, v in found
        ]

    def scan(self, equation: Any, inputs: list[Value]) -> list[Value]:
        """A loop: what it carries lies where its body leaves it."""
        params, jaxpr = equation.params, equation.params["jaxpr"]
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        fixed, carried = _fixed_and_carried(params)
        inputs = [self.moved(x, x.cut) for x in inputs]
        cuts = [x.cut if i < fixed + carried else x.cut[1:] for i, x in enumerate(inputs)]
        for _ in range(2):  # the second time, from where the first has left what is carried
            walk = Walk(self.sizes)
            body = [walk.value(v.aval, c) for v, c in zip(jaxpr.invars, cuts, strict=True)]
            walk.gathered_again = set(body)
            consts = [walk.value(v.aval) for v in jaxpr.constvars]
            found = [walk.moved(x, x.cut) for x in walk(jaxpr, [*consts, *body])]
            cuts[fixed : fixed + carried] = [x.cut for x in found[:carried]]
        out_cuts = [x.cut if i < carried else ((), *x.cut) for i, x in enumerate(found)]
        outputs = [self.value(v.aval, c) for v, c in zip(equation.outvars, out_cuts, strict=True)]
        inner = Program(body, found, walk.settled())
        self.operations.append(Operation("scan", inputs, outputs, inner, params["length"]))
        return outputs

    def moved(self, x: Value, wanted: Cut) -> Value:
        """The value, summed over devices if it was a part of a sum, and cut as wanted."""
        if wanted == x.cut and not x.partial:
            return x
        if (x, wanted) in self._moved and x not in self.gathered_again:
            return self._moved[x, wanted]
        y = Value(x.shape, x.itemsize, wanted, self.pieces(wanted))
        self.operations.append(Operation("moved", [x], [y], received=self.sent(x, y)))
        self._moved[x, wanted] = y
        return y

    def sent(self, x: Value, y: Value) -> Received:
        """What each device receives where `x` is to lie as `y` does."""
        received: Received = {}
        held = float(x.bytes)
        new, gone, partial = y.axes - x.axes, x.axes - y.axes, set(x.partial)
        for name in sorted(new & partial):  # first: what is left to sum is smaller then
            held /= self.sizes[name]
            received[name, "reduce-scatter"] = held * (self.sizes[name] - 1)
        for name in sorted(partial - new):
            received[name, "all-reduce"] = 2 * held * (1 - 1 / self.sizes[name])
        held /= math.prod(self.sizes[name] for name in new - partial)  # each takes its part
        for name in sorted(x.axes & y.axes):
            was, is_now = ([name in names for names in z.cut] for z in (x, y))
            if was != is_now:
                received[name, "all-to-all"] = held * (1 - 1 / self.sizes[name])
        for name in sorted(gone):
            received[name, "all-gather"] = held * (self.sizes[name] - 1)
            held *= self.sizes[name]
        return received

    def settled(self) -> list[Operation]:
        """The operations; what was made of nothing lies where that lies which it is added to."""
        made = {
            y
            for operation in self.operations
            if operation.name in ("broadcast_in_dim", "iota", "scatter-add")
            for y in operation.outputs
        }
        for operation in reversed(self.operations):
            for x in operation.inputs:
                y = operation.outputs[0]
                if x in made and x.shape == y.shape and x.pieces < y.pieces:
                    x.cut, x.pieces = y.cut, y.pieces
        return self.operations


@functools.lru_cache(maxsize=256)
def block_flops(f: Callable[..., Any], *cuts: jax.ShapeDtypeStruct) -> float:
    """The floating point operations of a block function's products."""
    closed = jax.make_jaxpr(functools.partial(f, True))(*cuts)
    walk = Walk({})
    values = [walk.value(v.aval) for v in (*closed.jaxpr.constvars, *closed.jaxpr.invars)]
    walk(closed.jaxpr, values)
    return Program([], [], walk.operations).flops()


def _fixed_and_carried(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a loop's arguments stay, and how many it carries."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    fixed, carried, _ = params["ft_in"].unpack()  # from jax 0.11 on
    return len(fixed), len(carried)
