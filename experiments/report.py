"""What a finished run leaves for a person to read: figures, a sample and `report.md`."""

import json
import math

import jax
import numpy as np
from flax import nnx

from experiments.setup import Settings, Text
from qkv_jax import data, nn, training, viz
from qkv_jax.models import attention_maps
from qkv_jax.training.run_directory import RunDirectory, write_text_atomic
from qkv_jax.training.writers import read_metrics

SAMPLE_LENGTH = 32  # tokens of the line whose attention is drawn


def write(
    run: RunDirectory,
    settings: Settings,
    text: Text,
    graphdef: nnx.GraphDef,
    params: nn.Params,
    eval_step,
    seconds: float,
) -> str:
    """Evaluates, samples and draws a trained model, and writes it all into the run's directory.

    Returns:
      The report, Markdown.
    """
    params = jax.device_put(params, jax.devices()[0])
    scores = evaluate(settings, text, params, eval_step)
    sample = settings.task.sample(settings, text, graphdef, params)
    figures = draw_figures(run, settings, text, graphdef, params, scores)
    write_text_atomic(run.sample, sample + "\n")
    rows = read_metrics(run.metrics)
    markdown = _markdown(run, settings, text, params, scores, rows, sample, figures, seconds)
    write_text_atomic(run.report, markdown)
    return markdown


def evaluate(settings: Settings, text: Text, params: nn.Params, eval_step) -> dict[str, float]:
    """The loss over the full validation text, in nats per token, beside the floors."""
    task = settings.task
    loss = training.mean_loss(eval_step, params, task.all_batches(settings, text))
    return {"model": loss} | {name: text.floors[name] for name in task.floors}


def scores_table(settings: Settings, scores: dict[str, float], text: Text) -> str:
    """The losses in nats per token, bits per character and perplexity, as a Markdown table.

    Bits per character only where the losses of all tokens add up to the text's.
    """
    task, tokens, characters = settings.task, len(text.validation) - 1, text.validation_characters
    columns = {f"nats per {task.unit}": lambda loss: f"{loss:.4f}"}
    if task.continues_text:
        columns["bits per character"] = lambda loss: (
            f"{data.bits_per_character(loss, tokens, characters):.4f}"
        )
    columns[f"perplexity per {task.unit}"] = lambda loss: f"{math.exp(loss):.3f}"
    lines = [f"| predictor | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, loss in scores.items():
        lines.append(f"| {name} | {' | '.join(show(loss) for show in columns.values())} |")
    return "\n".join(lines)


def draw_figures(
    run: RunDirectory,
    settings: Settings,
    text: Text,
    graphdef: nnx.GraphDef,
    params: nn.Params,
    scores: dict[str, float],
) -> list[str]:
    """Draws the loss curve and one attention map per head; returns Markdown that shows them."""
    floors = {name: loss for name, loss in scores.items() if name != "model"}
    curve = viz.loss_curve(read_metrics(run.metrics), floors=floors, title=f"{settings.name}: loss")
    viz.save_figure(curve, run.figures / "loss.png")
    shown = ["![Loss](figures/loss.png)"]
    tokens = text.validation[: min(SAMPLE_LENGTH, settings.data.context)].astype(np.int32)
    labels = [text.tokenizer.decode(tokens[i : i + 1]) for i in range(len(tokens))]
    try:
        stack = settings.task.stack(nn.merge(graphdef, params))
        maps = np.asarray(attention_maps(stack, tokens[None])[:, 0])
    except NotImplementedError as error:  # a mixer without attention weights
        return [*shown, f"There are no pictures of attention ({error})."]
    for layer, weights in enumerate(maps, start=1):
        title, name = f"Attention of layer {layer}", f"attention_layer_{layer}.png"
        viz.save_figure(viz.heads_figure(weights, labels, title=title), run.figures / name)
        shown.append(f"![{title}](figures/{name})")
    return shown


def _markdown(
    run: RunDirectory,
    settings: Settings,
    text: Text,
    params: nn.Params,
    scores: dict[str, float],
    rows: list[dict],
    sample: str,
    figures: list[str],
    seconds: float,
) -> str:
    versions = json.loads(run.versions.read_text(encoding="utf-8"))
    validation = [row for row in rows if "validation_loss" in row]
    best = min(validation, key=lambda row: row["validation_loss"])
    train, task = settings.train, settings.task
    windows = settings.windows["batch_size"]  # a step
    tokens = train.num_steps * windows * settings.data.context
    lines = [
        f"# {settings.name}",
        "",
        f"{task.kind} of {nn.count(params):,} parameters, {train.num_steps:,} steps of "
        f"{windows} windows of {settings.data.context} tokens ({tokens:,} tokens) in "
        f"{seconds:.0f} s, compiling and evaluating included.",
        "",
        "## Loss over the full validation text",
        "",
        scores_table(settings, scores, text),
        "",
        task.about_loss,
        "",
        f"While training, over {train.eval_batches * windows} random windows: best "
        f"{best['validation_loss']:.4f} at step {best['step']}, last "
        f"{validation[-1]['validation_loss']:.4f}. The floors are predictors that count, with "
        "add-one smoothing.",
        "",
        "## Sample",
        "",
        task.about_sample,
        "",
        "```text",
        sample.replace("```", "'''"),
        "```",
        "",
        "## Figures",
        "",
        *(f"{line}\n" for line in figures),
        "## What it was made with",
        "",
        f"- text: {text.corpus.source}; {len(text.corpus.text):,} characters, sha256 "
        f"`{text.corpus.sha256}`",
        f"- tokens: {text.tokenizer.name}, vocabulary {text.tokenizer.vocab_size}; "
        f"{len(text.train):,} to train on, {len(text.validation):,} to validate",
        *(f"- {name}: {value}" for name, value in versions.items()),
        "- everything else: `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`",
        "",
    ]
    return "\n".join(lines)
