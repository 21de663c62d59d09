"""The tables of a plan: on devices that need not be there, and beside what a compiler plans."""

import dataclasses

import jax

from experiments import setup
from experiments.abstract_step import AbstractStep
from experiments.benchmark_table import line
from qkv_jax import nn
from qkv_jax.training import CHIPS, Estimate, sharding


def planned(settings: setup.Settings, vocab_size: int, devices: int, chips: list[str]) -> str:
    """The tables of a plan, in Markdown.

    Raises:
      ValueError: the mesh does not divide the devices, or the batch.
    """
    mesh = sharding.abstract_mesh(settings.mesh, devices, batch_size=settings.train.batch_size)
    setup.check_mesh(settings, mesh)
    step = AbstractStep.of(settings, vocab_size)
    found = step.estimate(mesh)
    lines = [*_heading(settings, step, found), "", *_memory(found), ""]
    if received := found.axis_bytes():
        lines += [line(["a device receives in a step, along", "by", "GB"]), "|---|---|---:|"]
        for axis in received:
            parts = {kind: b for (name, kind), b in found.received.items() if name == axis}
            lines += [line([axis, kind, f"{b / 1e9:,.3f}"]) for kind, b in parts.items()]
        lines.append("")
    return "\n".join([*lines, *_speeds(found, chips)])


def _heading(settings: setup.Settings, step: AbstractStep, found: Estimate) -> list[str]:
    sizes = ", ".join(f"{name}={size}" for name, size in found.sizes.items())
    rows, context = step.batch["inputs"].shape
    return [
        f"model: {nn.count(step.state.params):,} parameters, {settings.train.compute_dtype}"
        + (", activations recomputed" if settings.train.remat else ""),
        f"step:  {rows:,} windows of {context:,} tokens ({found.tokens:,}), "
        f"{found.flops / found.tokens / 1e9:,.3f} GFLOP a token, {found.flops / 1e12:,.1f} TFLOP",
        f"mesh:  {sizes}, {found.devices} devices",
    ]


def _memory(found: Estimate) -> list[str]:
    rows = {
        "parameters": found.parameters,
        "optimizer": found.optimizer,
        "batch": found.batch,
        "activations and gradients, at most": found.temporary,
        "of these gradients, in the end": found.gradients,
        "all of these": found.total,
    }
    return [line(["on each device", "GB"]), "|---|---:|",
            *(line([name, f"{size / 1e9:,.3f}"]) for name, size in rows.items())]  # fmt: skip


def _speeds(found: Estimate, chips: list[str]) -> list[str]:
    heads = ["chip", "memory filled", "computes, s", "communicates, s", "tokens/s", "MFU"]
    lines = [line(heads), "|---|" + "---:|" * (len(heads) - 1)]
    for name in chips:
        chip = CHIPS[name]
        compute, communication = found.seconds(chip)
        seconds = compute + communication, max(compute, communication)
        filled = f"{found.total / chip.memory:.0%}"
        lines.append(
            line([
                name,
                filled if found.total <= chip.memory else f"{filled}: too much",
                f"{compute:,.3f}",
                f"{communication:,.3f}",
                " to ".join(dict.fromkeys(f"{found.tokens / s:,.0f}" for s in seconds)),
                " to ".join(dict.fromkeys(f"{found.utilization(chip, s):.0%}" for s in seconds)),
            ])
        )  # fmt: skip
    return lines


def checked(settings: setup.Settings, vocab_size: int, devices: int) -> str:
    """A table in Markdown: bytes as estimated, and as the compiler for CPUs has them.

    Raises:
      ValueError: there are not so many devices, or the mesh does not divide them.
    """
    there = len(jax.devices())
    if there != devices:
        raise ValueError(
            f"devices: wanted the {there} that JAX_NUM_CPU_DEVICES makes, got {devices}"
        )
    train = dataclasses.replace(settings.train, compute_dtype="float32", remat=False)
    settings = dataclasses.replace(settings, train=train)
    mesh = setup.make_mesh(settings)
    step = AbstractStep.of(settings, vocab_size)
    found = step.estimate(mesh, depth_first=True)
    plan = step.compiled(mesh).memory_analysis()
    rows = {
        "parameters, optimizer, batch": (found.arguments, plan.argument_size_in_bytes),
        "activations and gradients, at most": (found.temporary, plan.temp_size_in_bytes),
    }
    rows["all of these"] = tuple(map(sum, zip(*rows.values(), strict=True)))
    lines = [*_heading(settings, step, found), ""]
    lines += [
        line(["bytes on a device", "estimated", "compiled", "difference"]),
        "|---|---:|---:|---:|",
    ]
    lines += [
        line([name, f"{ours:,}", f"{theirs:,}", f"{ours / theirs - 1:+.1%}"])
        for name, (ours, theirs) in rows.items()
    ]
    return "\n".join(lines)
