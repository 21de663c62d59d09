"""Judges `configs/lm.py`: loss by mixer, and by ingredient of the recipe."""

import itertools
from collections.abc import Mapping, Sequence

from experiments import setup
from experiments.studies.study import Findings, Line, Run, by_kind
from qkv_jax import viz
from qkv_jax.viz import Panel

FIXED = ("LSTM", "GRU", "gated convolution", "Hyena", "linear attention", "RetNet", "Mamba-2")
HYBRID = "gated DeltaNet 3 : 1 attention"
TIE = 0.01  # nats per character that count as nothing
NOTE = (
    "Likely reasons where it differs: all are small and trained for few steps on a text of "
    "characters, whose nearest neighbours tell most, and gates know what is near from the start; "
    "squared ReLU and zero-initialised outputs begin more slowly, and were chosen for longer runs. "
    "In the study of heads, of the same text, three seeds of the better models differ by 0.002 to "
    "0.010 nats to either side: smaller differences of a single seed say nothing."
)


def judge(lines: Sequence[Line]) -> Findings:
    """Whether attention is ahead, the hybrid with it, and the recipe's ladder goes down."""
    kinds = by_kind(lines, ": ")
    mixers, recipe = kinds["mixer"], kinds["recipe"]
    counting = floors(lines[0].results[0].run)
    attention = mixers["attention"].mean("loss")
    ahead = {name: mixers[name].mean("loss") - attention for name in FIXED}
    hybrid = mixers[HYBRID].mean("loss") - attention
    steps = {
        name: line.mean("loss") - before.mean("loss")
        for (_, before), (name, line) in itertools.pairwise(recipe.items())
    }
    parts = {
        **{name: difference > 0 for name, difference in ahead.items()},
        HYBRID: hybrid <= TIE,
        **{name: difference < 0 for name, difference in steps.items()},
    }
    found = (
        f"Attention reaches {attention:.3f} nats per character; beside it: "
        + ", ".join(f"{name} {difference:+.3f}" for name, difference in ahead.items())
        + f", the hybrid {hybrid:+.3f}. The recipe, step by step: "
        + ", ".join(f"{name} {difference:+.3f}" for name, difference in steps.items())
        + "."
    )
    return Findings(
        parts=parts,
        ours=f"nats per character: bigrams {counting['bigram']:.3f}, "
        + ", ".join(f"{name} {line.mean('loss'):.3f}" for name, line in (mixers | recipe).items()),
        found=found,
        figures={"loss": _figure(mixers, recipe)},
        captions={
            "loss": "Claimed: attention and the hybrid at the bottom on the left, and a staircase "
            "down on the right."
        },
        notes=[
            "Predictors that only count characters, with add-one smoothing, reach "
            + ", ".join(f"{loss:.3f} ({name})" for name, loss in counting.items())
            + " nats per character.",
            NOTE,
        ],
    )


def floors(run: Run) -> Mapping[str, float]:
    """The validation losses of predictors that only count, of a run's text."""
    settings = setup.resolve(run.config)
    return settings.task(settings).floors()


def _figure(mixers: dict[str, Line], recipe: dict[str, Line]):
    cost = {
        name: [(line.mean(lambda r: r.milliseconds_per_step or 0), line.mean("loss"))]
        for name, line in mixers.items()
    }
    ladder = [(i, line.mean("loss"), line.spread("loss")) for i, line in enumerate(recipe.values())]
    return viz.lines_figure(
        [
            Panel("mixers", cost, "ms a step"),
            Panel(
                "recipe, from GPT-2 on", {"one more ingredient each": ladder}, "",
                ticks=dict(enumerate(recipe)),
            ),
        ],
        y_label="nats per character",
        title="One text, the same number of steps",
    )  # fmt: skip
