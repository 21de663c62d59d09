"""Kernels that others wrote, as implementations of attention: where they run, and what they refuse.

A kernel honours some calls and refuses the rest, naming the argument. For those that it honours it
has the output alone, no statistics, and one derivative: `fused` takes all others from `blockwise`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.backend import get_backend

from qkv_jax.ops.arguments import Arguments
from qkv_jax.ops.blockwise import Blockwise
from qkv_jax.ops.fused import fused
from qkv_jax.ops.stats import Stats

Array = jax.Array | np.ndarray
PLATFORMS = {"gpu": "NVIDIA's GPUs", "tpu": "TPUs", "cpu": "CPUs"}
LOWERED = {"gpu": "cuda"}  # the platforms that XLA's programs know by another name


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An implementation of attention by a kernel of one platform.

    Args:
      name: what `implementation` calls it.
      platform: where it runs: a name out of `PLATFORMS`.
      refusal: why the kernel cannot honour a call, naming the argument; None if it can.
      attend: the output of a call that it can honour.
    """

    name: str
    platform: str
    refusal: Callable[[Arguments], str | None]
    attend: Callable[[Arguments], jax.Array]

    def __call__(self, args: Arguments, *, entropy: bool = True) -> tuple[jax.Array, None]:
        """The output, without statistics; errors are those of `check_call`."""
        del entropy
        self.check_call(args)
        arrays, rebuilt = _parts(args)
        out = fused(
            lambda *arrays: self.attend(rebuilt(arrays)),
            lambda *arrays: Blockwise()(rebuilt(arrays), entropy=False)[0],
            *arrays,
        )
        return out, None

    def check_call(self, args: Arguments) -> None:
        """Raises a NotImplementedError where the kernel cannot honour a call: which argument."""
        if reason := self.refusal(args):
            raise NotImplementedError(f'{reason} (implementation="{self.name}")')

    def check_place(self, platform: str, stats: bool) -> None:
        """Raises a NotImplementedError on another platform, or where statistics are wanted."""
        if platform != self.platform:
            raise NotImplementedError(
                f'implementation: "{self.name}" runs on {PLATFORMS[self.platform]}, '
                f"and JAX computes on {platform!r} here"
            )
        if stats:
            raise NotImplementedError(
                f'implementation: "{self.name}" leaves no statistics behind, only an output: '
                'wanted "blockwise", "reference" or None'
            )


@dataclasses.dataclass(frozen=True)
class Preferred:
    """A kernel for the calls that it honours, on its platform; for all others, another."""

    kernel: Kernel
    otherwise: Callable[..., tuple[jax.Array, Stats]]

    def of(self, args: Arguments) -> Callable[..., tuple[jax.Array, Stats | None]]:
        """The one that a call takes."""
        return self.otherwise if self.kernel.refusal(args) else self.kernel

    def __call__(self, args: Arguments, *, entropy: bool = True) -> tuple[jax.Array, Stats | None]:
        """The output; statistics, if there are any, are not for use."""
        if self.of(args) is self.otherwise:
            return self.otherwise(args, entropy=entropy)
        arrays, rebuilt = _parts(args)

        def by(implementation: Callable) -> Callable:
            return lambda *arrays: implementation(rebuilt(arrays), entropy=False)[0]

        # A program may be compiled for a CPU beside the accelerator, and is told so late.
        platform = LOWERED.get(self.kernel.platform, self.kernel.platform)
        out = jax.lax.platform_dependent(
            *arrays, **{platform: by(self.kernel)}, default=by(self.otherwise)
        )
        return out, None


def platform() -> str:
    """Where JAX computes by default: "cpu", "tpu", "gpu" for NVIDIA's, or what else JAX has."""
    name = jax.default_backend()
    if name == "gpu" and "cuda" not in get_backend().platform_version:
        return "rocm"
    return name


def in_order(positions: Array) -> bool:
    """Whether positions are known while tracing, and 0, 1, 2 ... in every row."""
    return isinstance(positions, np.ndarray) and bool(
        (positions.reshape(len(positions), -1) == np.arange(positions[0].size)).all()
    )


def allowed_pairs(args: Arguments) -> jax.Array:
    """What the mask of a call says of every query and key, bool, broadcastable to [B, N, T, S]."""
    return args.mask.mask(*map(jnp.asarray, (args.q_pos, args.kv_pos, args.head)))


def _parts(args: Arguments) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], Arguments]]:
    """The arrays of a call, and the call as a function of them.

    What is known while tracing, NumPy's arrays and numbers, is not among them and stays known.
    """
    names = ("q", "k", "v", "mask", "score", "sinks", "scale", "q_pos", "kv_pos", "first")
    leaves, tree = jax.tree.flatten({name: getattr(args, name) for name in names})
    traced = [isinstance(x, jax.Array) for x in leaves]

    def rebuilt(arrays: Sequence[jax.Array]) -> Arguments:
        rest = iter(arrays)
        mixed = [next(rest) if here else x for x, here in zip(leaves, traced, strict=True)]
        fields: dict[str, Any] = jax.tree.unflatten(tree, mixed)
        return dataclasses.replace(args, **fields)

    return [x for x, here in zip(leaves, traced, strict=True) if here], rebuilt
