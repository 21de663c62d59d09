"""Judges `configs/grokking.py`: accuracy on sums that were shown, and on others, over the steps."""

import math
from collections.abc import Sequence

from experiments.studies.study import Findings, Line, Result, all_evaluations
from qkv_jax import viz
from qkv_jax.viz import Panel

DECAY, NO_DECAY = "weight decay 1", "weight decay 0"
SHOWN, HELD_OUT = "train_accuracy", "validation_accuracy"
KNOWN = 0.99  # accuracy
LATER = 5  # times the steps

# Nanda et al. 2023, p = 113: the ends of the three phases, in epochs.
PUBLISHED = {"known by heart": 1_400, "circuit formed": 9_400, "cleaned up": 14_000}


def judge(lines: Sequence[Line]) -> Findings:
    """Whether the held-out sums are known much later than the others, and only with decay."""
    named = {line.name: line for line in lines}
    shown, held_out = (
        {name: [reached(r, what) for r in named[name].results] for name in (DECAY, NO_DECAY)}
        for what in (SHOWN, HELD_OUT)
    )
    delays = [
        b / a if a < math.inf else 0.0 for a, b in zip(shown[DECAY], held_out[DECAY], strict=True)
    ]
    first = named[DECAY].results[0].run
    last, seed = first.config.train.num_steps, first.seed
    parts = {
        "learning by heart": max(shown[DECAY] + shown[NO_DECAY]) <= last,
        "understanding": max(held_out[DECAY]) <= last,
        "the delay": min(delays) >= LATER,
        "the need of weight decay": min(held_out[NO_DECAY]) > last,
    }
    found = (
        f"With weight decay {KNOWN:.0%} of the sums shown are right at step {_told(shown[DECAY])}, "
        f"of the held-out ones at step {_told(held_out[DECAY])} (by seed): "
        f"{min(delays):.0f} times as many at least, wanted {LATER}. Without it the former are "
        f"reached at step {_told(shown[NO_DECAY])}, the latter at {_told(held_out[NO_DECAY])}: at "
        f"the end {named[NO_DECAY].mean('accuracy'):.1%} are right."
    )
    return Findings(
        parts=parts,
        ours=f"{KNOWN:.0%} of the sums shown / held out are right at step "
        f"{_told(shown[DECAY])} / {_told(held_out[DECAY])}; without weight decay at "
        f"{_told(shown[NO_DECAY])} / {_told(held_out[NO_DECAY])}; share of the embedding in 5 "
        f"frequencies {named[DECAY].mean('frequencies'):.2f}, without weight decay "
        f"{named[NO_DECAY].mean('frequencies'):.2f}",
        found=found,
        figures={"accuracy": _accuracy(named), "frequencies": _frequencies(named)},
        captions={
            "accuracy": "Claimed: what was shown is known early, what was held out much later, and "
            "without weight decay not at all. The held-out sums known early are b + a where a + b "
            f"was shown. On the right the paper's phases, p = 113. Seed {seed}.",
            "frequencies": "Claimed: what is understood is a few circles on which angles are "
            "added. The share of the numbers' embedding, in its Fourier transform, that lies in "
            "five frequencies. It grows before the accuracy does.",
        },
        tables={"curves": all_evaluations(lines)},
    )


def reached(result: Result, what: str) -> float:
    """The first step from which on an accuracy was high enough; infinity: never."""
    return next((step for step, accuracy in result.curve(what) if accuracy >= KNOWN), math.inf)


def _told(steps: Sequence[float]) -> str:
    return ", ".join("never" if step == math.inf else f"{step:,.0f}" for step in steps)


def _accuracy(named: dict[str, Line]):
    panels = [
        Panel(
            name,
            {
                "shown": line.results[0].curve(SHOWN),
                "held out": line.results[0].curve(HELD_OUT),
            },
            "steps",
        )
        for name, line in named.items()
    ]
    panels.append(Panel("Nanda et al. 2023, p = 113", {}, "epochs", marks=PUBLISHED))
    return viz.lines_figure(
        panels, y_label="accuracy", y_limits=(-0.03, 1.05), log_x=True, log_base=10,
        share_x=True, title="Sums modulo p, shown and held out",
    )  # fmt: skip


def _frequencies(named: dict[str, Line]):
    lines = {name: line.results[0].curve("frequencies") for name, line in named.items()}
    return viz.lines_figure(
        [Panel("embedding of the numbers", lines, "steps")],
        y_label="share in 5 frequencies", y_limits=(-0.03, 1.05), log_x=True, log_base=10,
        title="From a table to circles",
    )  # fmt: skip
