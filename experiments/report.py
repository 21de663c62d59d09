"""What a finished run leaves: `result.json` for programs; pictures and `report.md` to read."""

import itertools
import json
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.memory import peak_memory
from experiments.setup import TrainConfig
from experiments.tasks import Task
from qkv_jax import nn, viz
from qkv_jax.training.run_directory import RunDirectory, write_text_atomic
from qkv_jax.training.writers import read_metrics


def write(
    run: RunDirectory,
    task: Task,
    graphdef: nnx.GraphDef,
    params: nn.Params,
    step: int,
    seconds: float,
) -> str:
    """Measures, samples and draws a trained model, and writes it all into the run's directory.

    Returns:
      The report, Markdown.
    """
    params = jax.device_put(params, jax.local_devices()[0])
    scores = task.measure(graphdef, params)
    sample, about_sample = task.sample(graphdef, params)
    rows = read_metrics(run.metrics)
    figures = []
    if task.settings.train.figures:
        figures = draw_figures(run, task, graphdef, params, rows)
    if sample:
        write_text_atomic(run.sample, sample + "\n")
    result = {
        "scores": scores,
        "parameters": nn.count(params),
        "steps": step,
        "seconds": seconds,
        "milliseconds_per_step": milliseconds_per_step(rows, task.settings.train),
        "peak_memory_bytes": peak_memory(),
        "state_size": state_size(task, graphdef, params),
    }
    lines = [
        *_heading(task, result),
        "",
        *task.describe(scores),
        "",
        *_while_training(task, rows),
        *(["## Sample", "", about_sample, "", "```text", sample.replace("```", "'''"), "```", ""]
          if sample else []),
        *(["## Figures", "", *(f"{line}\n" for line in figures)] if figures else []),
        *_made_with(run, task),
        "",
    ]  # fmt: skip
    markdown = "\n".join(lines)
    write_text_atomic(run.result, json.dumps(result, indent=2) + "\n")
    write_text_atomic(run.report, markdown)
    return markdown


def draw_figures(
    run: RunDirectory,
    task: Task,
    graphdef: nnx.GraphDef,
    params: nn.Params,
    rows: list[dict[str, Any]],
) -> list[str]:
    """Draws the loss curve and the attention; returns Markdown that shows them."""
    curve = viz.loss_curve(rows, floors=task.floors(), title=f"{task.settings.name}: loss")
    viz.save_figure(curve, run.figures / "loss.png")
    shown = ["![Loss](figures/loss.png)"]
    try:
        pictures = task.attention_figures(nn.merge(graphdef, params))
    except NotImplementedError as error:  # a mixer without attention weights
        return [*shown, f"There are no pictures of attention ({error})."]
    for title, figure in pictures.items():
        name = title.lower().replace(" of ", " ").replace(" ", "_") + ".png"
        viz.save_figure(figure, run.figures / name)
        shown.append(f"![{title}](figures/{name})")
    return shown


def milliseconds_per_step(rows: list[dict[str, Any]], train: TrainConfig) -> float | None:
    """The median over the run, or None where it was too short.

    The first dispatch waits for the compiler; the steps of one dispatch are logged together.
    """
    logged = [(row["step"], row["elapsed"]) for row in rows if "loss" in row]
    logged = logged[1 :: -(-train.steps_per_dispatch // train.log_every)]
    times = [(t - s) / (b - a) for (a, s), (b, t) in itertools.pairwise(logged) if b > a]
    return 1e3 * float(np.median(times)) if times else None


def state_size(task: Task, graphdef: nnx.GraphDef, params: nn.Params) -> int | None:
    """The numbers that the model keeps of a full context to decode one more token, if known."""
    try:
        return task.state_size(nn.merge(graphdef, params))
    except NotImplementedError:
        return None


def _heading(task: Task, result: dict[str, Any]) -> list[str]:
    return [
        f"# {task.settings.name}",
        "",
        f"{task.kind} of {result['parameters']:,} parameters, {task.trained_on(result['steps'])} "
        f"in {result['seconds']:.0f} s, compiling and evaluating included.",
    ]


def _while_training(task: Task, rows: list[dict[str, Any]]) -> list[str]:
    validation = [row for row in rows if "validation_loss" in row]
    best = min(validation, key=lambda row: row["validation_loss"])
    last = validation[-1]
    return [
        f"While training, over {task.watched}: best loss {best['validation_loss']:.4f} at "
        f"step {best['step']}, last {last['validation_loss']:.4f}.",
        "",
    ]


def _made_with(run: RunDirectory, task: Task) -> list[str]:
    versions = json.loads(run.versions.read_text(encoding="utf-8"))
    return [
        "## What it was made with",
        "",
        *task.about_data(),
        *(f"- {name}: {value}" for name, value in versions.items()),
        "- everything else: `config.json`, `result.json`, `metrics.jsonl`, `tensorboard/`, "
        "`checkpoints/`",
    ]
