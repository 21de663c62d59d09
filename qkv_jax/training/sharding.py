"""One program on many devices: the mesh, where the state lies on it, and what that takes.

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), batch_size=16)
    print(plan(params, optimizer, mesh))  # before anything is compiled
    state = placed(params, optimizer, mesh)
    with jax.set_mesh(mesh):
        state, metrics = train_step(state, batch)

The rules stand in `qkv_jax.nn.sharding`, the meaning of the axes in `qkv_jax.ops.mesh`. Axes are of
type Auto: GSPMD partitions one program for all devices, and what it is not told it finds out.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qkv_jax.nn import Params
from qkv_jax.nn.sharding import leaf_axes
from qkv_jax.ops.mesh import AXES, ROWS
from qkv_jax.training import processes
from qkv_jax.training.packing import leaf_names
from qkv_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has. `configs/char_lm.py` explains the fields.

    Raises:
      ValueError: naming the field, what came and what was wanted.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    zigzag: bool = False

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            if type(size) is not int or not (size >= 1 or size == -1):
                raise ValueError(f"mesh.{name}: wanted an integer >= 1, or -1, got {size!r}")
        if list(self.sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh: wanted at most one axis of -1, got {_described(self.sizes)}")
        if type(self.zigzag) is not bool:
            raise ValueError(f"mesh.zigzag: wanted True or False, got {self.zigzag!r}")

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis, by name."""
        return {name: getattr(self, name) for name in AXES}


def make_mesh(config: MeshConfig, *, batch_size: int) -> Mesh:
    """The mesh of the devices there are, its axes of type Auto.

    The axis of -1 takes the devices that the others leave; `data`, as many of them as divide the
    batch. Where the product is less than there are devices, it takes the first.

    Args:
      config: the sizes.
      batch_size: rows that are computed at once; data x fsdp divides it.

    Raises:
      ValueError: the sizes do not divide the devices, or the batch, or leave devices over while
        there are several processes.
    """
    devices = jax.devices()
    sizes = tuple(axis_sizes(config, len(devices), batch_size).values())
    if math.prod(sizes) < len(devices) and processes.count() > 1:
        raise ValueError(
            f"config.mesh: wanted all {len(devices)} devices, as there are several processes, got "
            f"{_described(dict(zip(AXES, sizes, strict=True)))}"
        )
    return jax.make_mesh(
        sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices[: math.prod(sizes)],
    )  # fmt: skip


def abstract_mesh(
    config: MeshConfig, num_devices: int, *, batch_size: int
) -> jax.sharding.AbstractMesh:
    """The mesh of so many devices, which need not exist; otherwise as `make_mesh`."""
    sizes = tuple(axis_sizes(config, num_devices, batch_size).values())
    return jax.sharding.AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(config: MeshConfig, num_devices: int, batch_size: int) -> dict[str, int]:
    """The sizes of a mesh's axes, -1 filled in; arguments and errors as of `make_mesh`."""
    wanted = config.sizes
    given = math.prod(size for size in wanted.values() if size != -1)
    if num_devices % given:
        raise ValueError(
            f"config.mesh: {_described(wanted)} takes {given} devices, which do not divide the "
            f"{num_devices} there are (on a CPU, config.train.cpu_devices makes them)"
        )
    rest = num_devices // given
    if wanted["data"] == -1:
        fits = (n for n in range(rest, 0, -1) if batch_size % (n * wanted["fsdp"]) == 0)
        rest = next(fits, 1)
    sizes = {name: rest if size == -1 else size for name, size in wanted.items()}
    rows = math.prod(sizes[name] for name in ROWS)
    if batch_size % rows:
        raise ValueError(
            f"config.train.batch_size: wanted a multiple of the {rows} devices that share its rows "
            f"(config.mesh.data x config.mesh.fsdp), got {batch_size}"
        )
    return sizes


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Where each leaf of a state lies, or of its parameters, by the rules: `NamedSharding`s."""
    axes = leaf_axes(tree, dict(mesh.shape))
    where = [NamedSharding(mesh, PartitionSpec(*cut)) for cut in axes]
    return jax.tree.unflatten(jax.tree.structure(tree), where)


def placed(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, the optimizer's made where it is to lie."""
    with jax.set_mesh(mesh):
        params = processes.place(params, shardings(params, mesh))
        state = TrainState.create(params, optimizer)
        return jax.device_put(state, shardings(state, mesh))


def device_bytes(tree: Any, mesh: jax.sharding.AbstractMesh | Mesh) -> int:
    """The bytes that one device holds of a state, or of its parameters."""
    sizes = dict(mesh.shape)
    leaves = zip(jax.tree.leaves(tree), leaf_axes(tree, sizes), strict=True)
    return sum(_held(leaf, axes, sizes)[1] for leaf, axes in leaves)


def plan(
    params: Params, optimizer: optax.GradientTransformation, mesh: jax.sharding.AbstractMesh | Mesh
) -> str:
    """A table in Markdown: which parameter lies where, and the bytes that each device holds.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s.
      optimizer: whose state lies beside them.
      mesh: where all that is to lie.
    """
    state = jax.eval_shape(lambda params: TrainState.create(params, optimizer), params)
    sizes = dict(mesh.shape)
    lines = [
        f"mesh: {_described(sizes)}, {mesh.size} devices",
        "",
        "| parameter | shape | cut by | bytes | of which on a device |",
        "|---|---|---|---:|---:|",
    ]
    # Layers alike are one row.
    rows: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    leaves = jax.tree.leaves(state.params)
    for name, leaf, axes in zip(
        leaf_names(state.params), leaves, leaf_axes(state.params, sizes), strict=True
    ):
        shape = " x ".join(map(str, leaf.shape))
        cut = ", ".join("+".join(along or ()) or "-" for along in axes)
        key = re.sub(r"(?<=/)\d+(?=/)", "*", name), shape, cut if any(axes) else "whole"
        rows.setdefault(key, []).append(_held(leaf, axes, sizes))
    for (name, shape, cut), held in rows.items():
        times = f"{len(held)} of " if len(held) > 1 else ""
        lines.append(_row(name, times + shape, cut, np.sum(held, axis=0)))
    parameters, optimizer = (
        np.sum([_held(x, axes, sizes) for x, axes in zip(
            jax.tree.leaves(tree), leaf_axes(tree, sizes), strict=True)], axis=0)
        for tree in (state.params, state.opt_state)
    )  # fmt: skip
    lines.append(_row("parameters", "", "", parameters))
    lines.append(_row("gradients", "", "", parameters))
    lines.append(_row("optimizer", "", "", optimizer))
    lines.append(_row("all of these", "", "", 2 * parameters + optimizer))
    return "\n".join(lines)


def _held(leaf: Any, axes: Any, sizes: dict[str, int]) -> tuple[int, int]:
    """The bytes of a leaf, and of one device's piece of it."""
    total = math.prod(leaf.shape) * leaf.dtype.itemsize
    return total, total // math.prod(sizes[name] for along in axes for name in along or ())


def _row(name: str, shape: str, cut: str, held: np.ndarray) -> str:
    return f"| {name} | {shape} | {cut} | {held[0]:,} | {held[1]:,} |"


def _described(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
