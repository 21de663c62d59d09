"""What a finished run leaves for a person to read: figures, a sample and `report.md`."""

import json
import math

import jax
import numpy as np
from flax import nnx

from experiments.setup import Settings, Text
from qkv_jax import data, inference, nn, training, viz
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
    sample = draw_sample(settings, text, graphdef, params)
    figures = draw_figures(run, settings, text, graphdef, params, scores)
    write_text_atomic(run.sample, sample + "\n")
    rows = read_metrics(run.metrics)
    markdown = _markdown(run, settings, text, params, scores, rows, sample, figures, seconds)
    write_text_atomic(run.report, markdown)
    return markdown


def evaluate(settings: Settings, text: Text, params: nn.Params, eval_step) -> dict[str, float]:
    """The loss over the full validation text, in nats per token, beside the floors."""
    batches = data.sequential_windows(
        text.validation, batch_size=settings.train.batch_size, context=settings.data.context
    )
    return {"model": training.mean_loss(eval_step, params, batches)} | text.floors


def scores_table(scores: dict[str, float], text: Text) -> str:
    """The losses in nats per token, bits per character and perplexity, as a Markdown table."""
    tokens, characters = len(text.validation) - 1, text.validation_characters
    lines = [
        "| predictor | nats per token | bits per character | perplexity per token |",
        "|---|---:|---:|---:|",
    ]
    for name, loss in scores.items():
        bits = data.bits_per_character(loss, tokens, characters)
        lines.append(f"| {name} | {loss:.4f} | {bits:.4f} | {math.exp(loss):.3f} |")
    return "\n".join(lines)


def draw_sample(
    settings: Settings, text: Text, graphdef: nnx.GraphDef, params: nn.Params
) -> str:  # fmt: skip
    """Text that the model writes after the validation text's first line."""
    prompt = text.validation[: settings.data.context // 4 or 1].astype(np.int32)[None]
    tokens = inference.generate(
        graphdef,
        params,
        prompt,
        num_tokens=settings.train.sample_tokens,
        context=settings.data.context,
        rng=jax.random.key(settings.seed),
        temperature=0.8,
    )
    return text.tokenizer.decode(np.concatenate([prompt[0], np.asarray(tokens[0])]))


def draw_figures(
    run: RunDirectory,
    settings: Settings,
    text: Text,
    graphdef: nnx.GraphDef,
    params: nn.Params,
    scores: dict[str, float],
) -> list[tuple[str, str]]:
    """Draws the loss curve and one attention map per head; returns (title, file name) of each."""
    floors = {name: loss for name, loss in scores.items() if name != "model"}
    curve = viz.loss_curve(read_metrics(run.metrics), floors=floors, title=f"{settings.name}: loss")
    viz.save_figure(curve, run.figures / "loss.png")
    drawn = [("Loss", "loss.png")]
    tokens = text.validation[: min(SAMPLE_LENGTH, settings.data.context)].astype(np.int32)
    labels = [text.tokenizer.decode(tokens[i : i + 1]) for i in range(len(tokens))]
    maps = attention_maps(nn.merge(graphdef, params), tokens[None])[:, 0]
    for layer, weights in enumerate(np.asarray(maps)):
        title = f"Attention of layer {layer + 1}"
        figure = viz.heads_figure(weights, labels, title=title)
        name = f"attention_layer_{layer + 1}.png"
        viz.save_figure(figure, run.figures / name)
        drawn.append((title, name))
    return drawn


def _markdown(
    run: RunDirectory,
    settings: Settings,
    text: Text,
    params: nn.Params,
    scores: dict[str, float],
    rows: list[dict],
    sample: str,
    figures: list[tuple[str, str]],
    seconds: float,
) -> str:
    versions = json.loads(run.versions.read_text(encoding="utf-8"))
    validation = [row for row in rows if "validation_loss" in row]
    best = min(validation, key=lambda row: row["validation_loss"])
    train = settings.train
    windows = train.batch_size * settings.optimizer.accumulate  # a step
    tokens = train.num_steps * windows * settings.data.context
    lines = [
        f"# {settings.name}",
        "",
        f"A decoder of {nn.count(params):,} parameters, {train.num_steps:,} steps of "
        f"{windows} windows of {settings.data.context} tokens ({tokens:,} tokens) in "
        f"{seconds:.0f} s, compiling and evaluating included.",
        "",
        "## Loss over the full validation text",
        "",
        scores_table(scores, text),
        "",
        f"While training, over {train.eval_batches * windows} random windows: best "
        f"{best['validation_loss']:.4f} at step {best['step']}, last "
        f"{validation[-1]['validation_loss']:.4f}. The floors are predictors that count, with "
        "add-one smoothing.",
        "",
        "## Sample",
        "",
        "The first words are the validation text's; temperature 0.8.",
        "",
        "```text",
        sample.replace("```", "'''"),
        "```",
        "",
        "## Figures",
        "",
        *(f"![{title}](figures/{name})\n" for title, name in figures),
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
