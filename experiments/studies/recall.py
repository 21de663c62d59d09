"""Judges `configs/recall.py`: accuracy of recall by mixer, length and width."""

from collections.abc import Sequence

import numpy as np

from experiments.studies.study import Findings, Line
from qkv_jax import viz
from qkv_jax.viz import Panel

EXACT = 0.99  # accuracy that counts as recalling everything
TIE = 0.02  # of accuracy, that counts as nothing

# Arora et al. 2023, figure 2, read off the picture (+- 0.02): N -> name -> accuracy by width.
WIDTHS = (64, 128, 256, 512)
PUBLISHED = {
    64: {
        "attention": (1, 1, 1, 1), "Hyena": (0.52, 0.75, 0.84, 0.87),
        "RWKV": (0.76, 0.94, 0.97, 0.99), "BaseConv": (0.70, 0.94, 0.97, 1.00),
    },
    128: {
        "attention": (1, 1, 1, 1), "Hyena": (0.18, 0.65, 0.74, 0.84),
        "RWKV": (0.18, 0.50, 0.75, 0.93), "BaseConv": (0.37, 0.62, 0.84, 0.96),
    },
    256: {
        "attention": (1, 1, 1, 1), "Hyena": (0.05, 0.13, 0.54, 0.69),
        "RWKV": (0.05, 0.06, 0.67, 0.79), "BaseConv": (0.14, 0.33, 0.81, 0.94),
    },
}  # fmt: skip


def judge(lines: Sequence[Line]) -> Findings:
    """Whether attention recalls all, and the others less with length and more with width."""
    table = _table(lines)
    lengths = sorted({length for _, length, _ in table})
    widths = sorted({width for _, _, width in table})
    others = [name for name in dict.fromkeys(name for name, *_ in table) if name != "attention"]

    accuracy = {key: line.mean("accuracy") for key, line in table.items()}
    worst = min(found for (name, *_), found in accuracy.items() if name == "attention")
    first, last, narrow, wide = lengths[0], lengths[-1], widths[0], widths[-1]
    lost = _mean_difference(
        accuracy, [((n, first, D), (n, last, D)) for n in others for D in widths]
    )
    gained = _mean_difference(
        accuracy, [((n, N, wide), (n, N, narrow)) for n in others for N in lengths]
    )
    exact = [name for name in others if accuracy[name, last, narrow] >= EXACT]
    found = (
        f"Attention's lowest accuracy is {worst:.3f} (wanted: {EXACT}). From N = {first} to {last} "
        f"the others lose {lost:.2f} on average, from width {narrow} to {wide} they gain "
        f"{gained:.2f}."
    )
    if exact:
        found += f" {' and '.join(exact)} recall{'s' * (len(exact) == 1)} all at N = {last} too."
    ours = f"N = {' / '.join(map(str, lengths))} at width {narrow}: " + ", ".join(
        f"{name} " + " / ".join(f"{accuracy[name, N, narrow]:.2f}" for N in lengths)
        for name in ("attention", *others)
    )
    return Findings(
        parts={
            "attention's recall": worst >= EXACT,
            "the others' fall with length": lost > TIE,
            "the others' rise with width": gained > TIE,
        },
        ours=ours,
        found=found,
        figures={"accuracy": _accuracy(table, lengths), "state": _state(table)},
        captions={
            "accuracy": "Claimed: attention alone is at the top everywhere, the others rise with "
            "width and sink with length. The panels on the left are ours, those on the "
            "right are the paper's.",
            "state": "Claimed: what a model can recall is bounded by the numbers it keeps. Each "
            "point is a run; attention keeps every key and value.",
        },
        notes=[
            "The loss falls suddenly in this task: a run that has found no way to look a key up "
            "stays near chance, so an accuracy between 0.1 and 0.9 says how far training got as "
            "much as what a state can hold."
        ],
    )


def _mean_difference(accuracy: dict[tuple, float], pairs: Sequence[tuple[tuple, tuple]]) -> float:
    """Of those pairs that were both measured, the first less the second."""
    return float(np.mean([
        accuracy[a] - accuracy[b] for a, b in pairs if a in accuracy and b in accuracy
    ]))  # fmt: skip


def _table(lines: Sequence[Line]) -> dict[tuple[str, int, int], Line]:
    """(mixer's name, N, width) -> results."""
    return {
        (
            line.name.partition(",")[0], line.fields["data.context"], line.fields["model.width"],
        ): line
        for line in lines
    }  # fmt: skip


def _accuracy(table: dict[tuple[str, int, int], Line], lengths: Sequence[int]):
    ours, theirs = [], []
    for length in lengths:
        points: dict[str, list] = {}
        for (name, N, D), line in table.items():
            if length == N:
                points.setdefault(name, []).append(
                    (D, line.mean("accuracy"), line.spread("accuracy"))
                )
        ours.append(Panel(f"ours, N = {length}", points, "width"))
        if length in PUBLISHED:
            published = {
                name: list(zip(WIDTHS, values, strict=True))
                for name, values in PUBLISHED[length].items()
            }
            theirs.append(Panel(f"paper, N = {length}", published, "width"))
    return viz.lines_figure(
        [*ours, *theirs], y_label="accuracy", log_x=True, y_limits=(-0.03, 1.05),
        title="Multi-query associative recall",
    )  # fmt: skip


def _state(table: dict[tuple[str, int, int], Line]):
    panels = []
    for length in sorted({N for _, N, _ in table}):
        points: dict[str, list] = {}
        for (name, N, _), line in table.items():
            size = line.results[0].state_size
            if length == N and size is not None:
                points.setdefault(name, []).append((size, line.mean("accuracy")))
        panels.append(Panel(f"N = {length}", points, "numbers kept to decode a token"))
    return viz.lines_figure(
        panels, y_label="accuracy", log_x=True, y_limits=(-0.03, 1.05),
        title="Recall against the size of the state",
    )  # fmt: skip
