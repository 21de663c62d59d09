"""What a training step takes, on devices that need not be there: memory, messages, time.

Floating point operations are counted as is usual for model FLOPs utilization (Chowdhery et al.
2022, appendix B, arxiv.org/abs/2204.02311): of products alone, three times those of the forward
pass, whatever is recomputed; and attention's of all tokens with all tokens, also of those that a
mask hides. For a decoder that is 6 for each parameter of a product, and 12 * layers * width *
context, for each token.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from qkv_jax.nn import Params
from qkv_jax.training import liveness
from qkv_jax.training.chips import Chip, chip_of
from qkv_jax.training.program import Received, traced
from qkv_jax.training.sharding import device_bytes
from qkv_jax.training.state import TrainState
from qkv_jax.training.step import Batch, Loss, make_train_step

log = logging.getLogger(__name__)


def model_flops(loss: Loss, params: Params, batch: Batch) -> float:
    """Floating point operations of one step's products, on all devices together.

    Args:
      loss: what the step lowers.
      params, batch: arrays or `jax.ShapeDtypeStruct`s. Nothing is computed.
    """
    # In shapes: arrays lie on a mesh, and this counts for one device.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, batch))
    return 3.0 * traced(lambda params, batch: loss(params, batch, None), *shapes).flops()


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step takes; bytes are those of one device.

    Args:
      sizes: of the mesh's axes.
      tokens: of a step, on all devices together.
      parameters, optimizer, batch: bytes that stay.
      gradients: bytes of all parameters' gradients, where they lie in the end.
      temporary: the most bytes beside what stays: activations, and the gradients that are there.
      received: bytes from other devices, by axis of the mesh and kind of collective.
      flops: of the model, as `model_flops` counts, on all devices together.
      work: (floating point operations, bytes read and written) of each kernel.
    """

    sizes: dict[str, int]
    tokens: int
    parameters: int
    optimizer: int
    batch: int
    gradients: int
    temporary: int
    received: Received
    flops: float
    work: tuple[tuple[float, float], ...]

    @property
    def devices(self) -> int:
        return int(np.prod(list(self.sizes.values())))

    @property
    def arguments(self) -> int:
        """Bytes that stay."""
        return self.parameters + self.optimizer + self.batch

    @property
    def total(self) -> int:
        """Bytes that a device has to have."""
        return self.arguments + self.temporary

    def axis_bytes(self) -> dict[str, float]:
        """The bytes received along each axis of the mesh that has devices."""
        return {
            axis: sum(number for (name, _), number in self.received.items() if name == axis)
            for axis, size in self.sizes.items()
            if size > 1
        }

    def seconds(self, chip: Chip) -> tuple[float, float]:
        """How long a step computes and how long it communicates, at the speeds of the data sheet.

        A kernel takes as long as its products or its memory traffic do (Williams et al. 2009,
        doi.org/10.1145/1498765.1498785).
        """
        compute = sum(max(f / chip.flops, b / chip.memory_speed) for f, b in self.work)
        communication, inner = 0.0, 1
        received = self.axis_bytes()
        for axis, size in reversed(self.sizes.items()):  # neighbours differ in the last axis
            inner *= size
            communication += received.get(axis, 0.0) / chip.speed_between(inner)
        return compute, communication

    def utilization(self, chip: Chip, seconds: float) -> float:
        """The model's floating point operations in that time, as a fraction of the peak."""
        return self.flops / (seconds * chip.flops * self.devices)


def estimate(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    params: Params,
    batch: Batch,
    mesh: AbstractMesh | Mesh,
    *,
    accumulate: int = 1,
    depth_first: bool = False,
) -> Estimate:
    """What a step of `make_train_step` takes.

    Args:
      loss, optimizer, accumulate: of the step.
      params: arrays or `jax.ShapeDtypeStruct`s.
      batch: of the step; [accumulate * B, T] `inputs` among it.
      mesh: the devices, none of which need exist.
      depth_first: as `liveness.temporary_bytes`.
    """
    state = jax.eval_shape(lambda params: TrainState.create(params, optimizer), params)
    step = make_train_step(loss, optimizer, seed=0, accumulate=accumulate)
    program = traced(step, state, batch, mesh=mesh)
    parameters = device_bytes(state.params, mesh)
    return Estimate(
        sizes=dict(mesh.shape),
        tokens=int(np.prod(batch["inputs"].shape)),
        parameters=parameters,
        optimizer=device_bytes(state, mesh) - parameters,
        batch=sum(x.bytes for x in program.inputs[-len(jax.tree.leaves(batch)) :]),
        gradients=parameters,
        temporary=liveness.temporary_bytes(program, depth_first=depth_first),
        received=program.received(),
        flops=model_flops(loss, params, batch),
        work=tuple(_work(program)),
    )


def _work(program: Any) -> list[tuple[float, float]]:
    """Of each kernel, those of loops as often as they run."""
    found: list[tuple[float, float]] = []
    for kernel in liveness.kernels(program):
        operation = kernel.operation
        if operation.inner is None:
            found.append((operation.flops, float(kernel.bytes)))
        else:
            found += [(f * operation.times, b * operation.times) for f, b in _work(operation.inner)]
    return found


def peak_steps(
    loss: Loss, params: Params, make_batch: Callable[[], Batch], mesh: Mesh
) -> float | None:
    """Steps a second at the peak of a mesh's chips; None where they are not known, as CPUs are not.

    Args:
      loss, params: as of `model_flops`.
      make_batch: returns a step's batch; called where the chips are known.
      mesh: the devices.
    """
    chip = chip_of(mesh.devices.flat[0])
    if chip is None:
        return None
    try:
        return mesh.size * chip.flops / model_flops(loss, params, make_batch())
    except Exception as error:  # no estimate may end a run
        log.warning("mfu is left out, for the step cannot be counted: %r", error)
        return None
