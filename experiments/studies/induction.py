"""Judges `configs/induction.py`: loss on repeated tokens, and what heads look at, by step."""

import math
from collections.abc import Sequence

from experiments.studies.study import Findings, Line, Result, all_evaluations
from qkv_jax import viz
from qkv_jax.viz import Panel

DEEP, SHALLOW = "two layers", "one layer"
NEW, REPEATED = "loss_new", "loss_repeated"
MATCHING, PREVIOUS = "prefix_matching_", "previous_token_"
FAR = 0.25  # of the loss on new tokens: what repeats costs less where it is continued
LITTLE = 0.5  # of it: what repeats costs more where it is not
HEAD = 0.5  # of its attention: a head that matches prefixes gives more
TOGETHER = 1.5  # times the steps, within which two things happen at the same time
SHOWN = 4  # heads of a layer in the picture

Points = list[tuple[float, float]]


def judge(lines: Sequence[Line]) -> Findings:
    """Whether two layers' loss and a head's score turn together, and one layer's do not."""
    named = {line.name: line for line in lines}
    deep, shallow = named[DEEP].results, named[SHALLOW].results
    ratio = {name: [_ratio(r) for r in named[name].results] for name in (DEEP, SHALLOW)}
    best = {name: [_best(r)[1] for r in named[name].results] for name in (DEEP, SHALLOW)}
    turns = [
        (halfway(result.curve(REPEATED)), halfway(result.curve(_best(result)[0])))
        for result in deep
    ]
    apart = max(max(pair) / min(pair) for pair in turns)
    parts = {
        "two layers' loss": max(ratio[DEEP]) <= FAR,
        "two layers' heads": min(best[DEEP]) >= HEAD,
        "at the same time": apart <= TOGETHER,
        "one layer's loss": min(ratio[SHALLOW]) >= LITTLE,
        "one layer's heads": max(best[SHALLOW]) < HEAD,
    }
    found = (
        f"On repeated tokens two layers have {max(ratio[DEEP]):.0%} of the loss on new ones at "
        f"most, one layer {min(ratio[SHALLOW]):.0%} at least. The best head gives what followed "
        f"the present token before {min(best[DEEP]):.2f} of its attention at least, in one layer "
        f"{max(best[SHALLOW]):.2f} at most. Half of the fall of the loss and half of the rise of "
        "that head are reached at steps "
        + ", ".join(f"{loss:,.0f} and {head:,.0f}" for loss, head in turns)
        + f" (by seed; evaluated every {deep[0].run.config.train.eval_every} steps)."
    )
    return Findings(
        parts=parts,
        ours="nats on new / repeated tokens, and the best head's prefix matching: "
        + "; ".join(
            f"{name} {named[name].mean(NEW):.2f} / {named[name].mean(REPEATED):.2f}, "
            f"{sum(best[name]) / len(best[name]):.2f}"
            for name in (DEEP, SHALLOW)
        ),
        found=found,
        figures={"loss": _losses(deep[0], shallow[0]), "heads": _heads(deep[0], shallow[0])},
        captions={
            "loss": "Claimed: two layers' loss on what repeats falls suddenly and far below that "
            "on new tokens, which nothing can foretell; one layer's does not. The dashed line is "
            f"guessing; the vertical one is half-way down. Seed {deep[0].run.seed}.",
            "heads": "Claimed: at that moment heads of the second layer come to give their "
            "attention to what followed the present token before (prefix matching), which they can "
            "because a head of the first looks at the token before (on the right); one layer has "
            f"no such head. The {SHOWN} heads of each layer that end highest.",
        },
        tables={"curves": all_evaluations(lines)},
    )


def halfway(points: Points) -> float:
    """The first x at which y is at least half way from its first value to its last."""
    first, last = points[0][1], points[-1][1]
    middle = (first + last) / 2
    return next(x for x, y in points if (y - middle) * (last - first) >= 0)


def _ratio(result: Result) -> float:
    return result.scores[REPEATED] / result.scores[NEW]


def _best(result: Result) -> tuple[str, float]:
    """The head that matches prefixes best in the end, and how well."""
    scores = {name: x for name, x in result.scores.items() if name.startswith(MATCHING)}
    return max(scores.items(), key=lambda item: item[1])


def _losses(deep: Result, shallow: Result):
    guessing = {"guessing": math.log(deep.run.config.data.vocab_size)}
    half = {"half-way": halfway(deep.curve(REPEATED))}
    return viz.lines_figure(
        [
            Panel(
                result.run.name,
                {"new tokens": result.curve(NEW), "repeated tokens": result.curve(REPEATED)},
                "steps", guessing, marks,
            )
            for result, marks in ((deep, half), (shallow, {}))
        ],
        y_label="nats per token", title="Loss on random tokens, and on what repeats them",
    )  # fmt: skip


def _heads(deep: Result, shallow: Result):
    half = {"half-way": halfway(deep.curve(REPEATED))}
    return viz.lines_figure(
        [
            Panel("prefix matching, two layers", _curves(deep, MATCHING), "steps", marks=half),
            Panel("prefix matching, one layer", _curves(shallow, MATCHING), "steps"),
            Panel("previous token, two layers", _curves(deep, PREVIOUS), "steps", marks=half),
        ],
        y_label="share of attention", y_limits=(-0.03, 1.05), title="What heads look at",
    )  # fmt: skip


def _curves(result: Result, prefix: str) -> dict[str, Points]:
    """By layer, the heads that end highest."""
    layers: dict[str, list[str]] = {}
    for name in sorted(result.scores, key=result.scores.get, reverse=True):
        if name.startswith(prefix):
            layers.setdefault(name.removeprefix(prefix).partition(".")[0], []).append(name)
    return {
        f"layer {layer}, head {name.rpartition('.')[2]}": result.curve(name)
        for layer in sorted(layers)
        for name in sorted(layers[layer][:SHOWN])
    }
