"""Judges `configs/distance.py`: accuracy and gradients against distance."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import setup
from experiments.studies.study import Findings, Line, Run, by_kind
from qkv_jax import data, nn, viz
from qkv_jax.models.blocks import apply_blocks
from qkv_jax.ops.masks import Causal
from qkv_jax.viz import Panel

EXACT = 0.99
PREFIX = "accuracy_"
ROWS = 64  # over which a gradient is averaged


def judge(lines: Sequence[Line]) -> Findings:
    """Whether attention is exact at every distance, and each other model worse far than near."""
    table = by_kind(lines)
    attention = {task: _by_distance(named["attention"]) for task, named in table.items()}
    worst = min(min(accuracies.values()) for accuracies in attention.values())
    falls = {
        f"{name} ({task})": accuracies[min(accuracies)] - accuracies[max(accuracies)]
        for task, named in table.items()
        for name, line in named.items()
        if name != "attention"
        for accuracies in [_by_distance(line)]
    }
    stays = [name for name, fall in falls.items() if fall < 1 - EXACT]
    found = (
        f"Attention's lowest accuracy at any distance is {worst:.3f} (wanted: {EXACT}). From near "
        "to far the others lose: "
        + ", ".join(f"{name} {fall:.2f}" for name, fall in falls.items())
        + "."
    )
    if stays:
        found += f" {', '.join(stays)} lose{'s' * (len(stays) == 1)} nothing that counts."
    ours = "; ".join(
        f"{task}, accuracy near / far: "
        + ", ".join(
            f"{name} {near_to_far[0]:.2f} / {near_to_far[-1]:.2f}"
            for name, line in named.items()
            for near_to_far in [list(_by_distance(line).values())]
        )
        for task, named in table.items()
    )
    cues = {name: line.results[0].run for name, line in table["cue"].items()}
    return Findings(
        parts={"attention's recall": worst >= EXACT, "the others' fall": not stays},
        ours=ours,
        found=found,
        figures={"accuracy": _accuracy(table), "gradient": _gradients(cues)},
        captions={
            "accuracy": "Claimed: attention's line is flat at the top, the others fall with "
            "distance. Each point is the accuracy over the distances up to it from the one before.",
            "gradient": "Claimed: a direct bridge. The size of the gradient from the answer to the "
            "cue's vector, beside that to the last token's, before any training: flat for "
            "attention, falling for a recurrence, zero where a convolution does not see.",
        },
    )


def _by_distance(line: Line) -> dict[int, float]:
    """The mean accuracy of answers at most so far back, and farther than the entry before."""
    names = [name for name in line.results[0].scores if name.startswith(PREFIX)]
    return {int(name.removeprefix(PREFIX)): line.mean(name) for name in names}


def _accuracy(table: dict[str, dict[str, Line]]):
    panels = [
        Panel(
            task,
            {
                name: [
                    (far, mean, line.spread(f"{PREFIX}{far}"))
                    for far, mean in _by_distance(line).items()
                ]
                for name, line in named.items()
            },
            "tokens back",
        )
        for task, named in table.items()
    ]
    return viz.lines_figure(
        panels, y_label="accuracy", log_x=True, y_limits=(-0.03, 1.05),
        title="Accuracy by distance",
    )  # fmt: skip


def _gradients(runs: dict[str, Run]):
    points = {}
    for name, run in runs.items():
        norms = gradient_norms(run)
        groups = np.array_split(np.arange(1, len(norms)), 8)
        last = norms[0]
        points[name] = [
            (float(group.mean()), float(np.log10(max(norms[group].mean() / last, 1e-12))))
            for group in groups
        ]
    return viz.lines_figure(
        [Panel("before training", points, "tokens back")],
        y_label="log10 of gradient, relative to the last token's",
        title="From the answer back to the cue",
    )


def gradient_norms(run: Run) -> np.ndarray:
    """By distance, 0 ... T-1: the norm of d loss / d (vector of the token so far back).

    Of the last place's loss, before any training, averaged over rows of noise.
    """
    settings = setup.resolve(run.config)
    task = settings.task(settings)
    graphdef, params = setup.make_model(settings, task.vocab_size)
    batch = task.generate(0, ROWS, data.TEST)

    def loss(shift: jax.Array) -> jax.Array:
        model = nn.merge(graphdef, params)
        x = model.embed(batch["inputs"]) + shift
        x = apply_blocks(
            model.config, model.blocks, x, mask=Causal(), positions=None,
            rngs=[None] * len(model.blocks),
        )  # fmt: skip
        logits, targets = model.logits(x)[:, -1], batch["targets"][:, -1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum()

    zero = jnp.zeros((*batch["inputs"].shape, settings.model["width"]))
    gradient = jax.jit(jax.grad(loss))(zero)
    return np.asarray(jnp.linalg.norm(gradient, axis=-1).mean(0)[::-1])
