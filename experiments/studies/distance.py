"""Judges `configs/distance.py`: accuracy and gradients against distance, speed against length."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import setup
from experiments.studies.study import Findings, Line, Run, by_kind
from qkv_jax import data, nn, training, viz
from qkv_jax.models.blocks import apply_blocks
from qkv_jax.ops.masks import Causal
from qkv_jax.viz import Panel

EXACT = 0.99
PREFIX = "accuracy_"
ROWS = 64  # over which a gradient is averaged
LENGTHS = (32, 128, 512, 2048)  # of rows, at which steps are timed
TOKENS = 4096  # of such a step, whatever the length
CALLS = 5  # of which the median is taken

CAPTIONS = {
    "accuracy": "Claimed: attention's line is flat at the top, the others fall with "
    "distance. Each point is the accuracy over the distances up to it from the one before.",
    "gradient": "Claimed: a direct bridge. The size of the gradient from the answer to the "
    "cue's vector, beside that to the last token's, before any training: flat for "
    "attention, falling for a recurrence, zero where a convolution does not see.",
    "speed": "Claimed: a recurrence takes one token after another, the others all at once; "
    f"attention's work grows with the length. {TOKENS:,} tokens a step in rows of "
    "different lengths; on a processor of few cores, which has little to gain.",
}

NOTE = (
    "A cue is 5 bits, to be kept through all that follows; a copy is up to 64 tokens, 320 bits, at "
    "once. A recurrence that keeps the one and loses the others lacks room, not reach. Whether it "
    "learns to keep the cue depends on training: by AdamW, in as many steps, the LSTM did not."
)


@dataclasses.dataclass(frozen=True)
class Look:
    """What a model is before any training.

    Args:
      gradients: of the answer, by the distance of what it is taken in: see `gradient_norms`.
      speed: length of rows -> steps of training a second.
    """

    gradients: np.ndarray
    speed: Mapping[int, float]


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
    found = (
        f"Attention's lowest accuracy at any distance is {worst:.3f} (wanted: {EXACT}). From near "
        "to far the others lose: "
        + ", ".join(f"{name} {fall:.2f}" for name, fall in falls.items())
        + "."
    )
    cues = {name: line.results[0].run for name, line in table["cue"].items()}
    looks = {name: look_at(run) for name, run in cues.items()}
    slower = {name: of.speed[LENGTHS[0]] / of.speed[LENGTHS[-1]] for name, of in looks.items()}
    found += (
        f" With {TOKENS:,} tokens a step, a step on rows of {LENGTHS[-1]:,} takes, in the time of "
        f"one on rows of {LENGTHS[0]}: "
        + ", ".join(f"{name} {ratio:.1f}" for name, ratio in slower.items())
        + "."
    )
    ours = "; ".join(
        f"{task}, accuracy near / far: "
        + ", ".join(
            f"{name} {near_to_far[0]:.2f} / {near_to_far[-1]:.2f}"
            for name, line in named.items()
            for near_to_far in [list(_by_distance(line).values())]
        )
        for task, named in table.items()
    )
    return Findings(
        parts={
            "attention's recall": worst >= EXACT,
            **{f"the fall of {name}": fall > 1 - EXACT for name, fall in falls.items()},
        },
        ours=ours,
        found=found,
        figures={
            "accuracy": _accuracy(table), "gradient": _gradients(looks), "speed": _speed(looks),
        },
        captions=CAPTIONS,
        notes=(NOTE,),
        tables={
            "speed": [
                {"model": name, "length": length, "steps_per_second": speed}
                for name, of in looks.items()
                for length, speed in of.speed.items()
            ]
        },
    )  # fmt: skip


def look_at(run: Run) -> Look:
    """Gradients and speed of a run's model, untrained."""
    return Look(gradient_norms(run), {length: steps_per_second(run, length) for length in LENGTHS})


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


def _gradients(looks: Mapping[str, Look]):
    points = {}
    for name, of in looks.items():
        norms = of.gradients
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


def _speed(looks: Mapping[str, Look]):
    lines = {
        name: [(length, float(np.log10(speed))) for length, speed in of.speed.items()]
        for name, of in looks.items()
    }
    return viz.lines_figure(
        [Panel(f"{TOKENS:,} tokens a step", lines, "tokens in a row")],
        y_label="log10 of steps a second", log_x=True, title="Speed by length",
    )  # fmt: skip


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


def steps_per_second(run: Run, length: int) -> float:
    """Of training a run's model on rows of a length, `TOKENS` in all; the median of some calls."""
    config = run.config.copy_and_resolve_references()
    config.data.context, config.train.batch_size = length, max(1, TOKENS // length)
    settings = setup.resolve(config)
    task = settings.task(settings)
    graphdef, params = setup.make_model(settings, task.vocab_size)
    optimizer = training.make_optimizer(settings.optimizer, settings.train.num_steps)
    loss = training.cross_entropy_loss(graphdef, task.predict)
    step = jax.jit(training.make_train_step(loss, optimizer, seed=run.seed))
    state = training.TrainState.create(params, optimizer)
    batch = task.generate(0, config.train.batch_size, data.TRAINING)
    times = []
    for _ in range(CALLS + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        times.append(time.perf_counter() - start)
    return 1 / float(np.median(times[1:]))  # the first compiles
