"""The picture of a benchmark of attention: who takes how long, and how time grows with length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.benchmark_table import Row, Section, figure
from qkv_jax.viz import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "ours": style.BLUE, "jax.nn": style.MUTED, "SDPA": style.ORANGE, "cuDNN": style.GREEN,
    "ours, chosen": style.LIGHT_BLUE, "window": style.GREEN, "causal": style.BLUE,
    "blockwise": style.BLUE, "reference": style.ORANGE,
}  # fmt: skip
PASSES = ("forward", "both passes")


@style.house_style()
def picture(sections: Sequence[Section]) -> Figure | None:
    """Bars for the case `peers`, and lines for `windows` and `crossover`; None without any."""
    rows = {s.name: s.rows for s in sections if s.rows}
    draw = {"windows": _windows, "crossover": _crossover}
    below = [name for name in draw if name in rows]
    bars = "peers" in rows
    if not bars and not below:
        return None
    wide = 1.2 * len(rows["peers"]) if bars else 0.0
    fig = style.new_figure(max(10.0, wide), 3.9 * (bars + bool(below)), layout="constrained")
    fig.get_layout_engine().set(hspace=0.08, wspace=0.06)
    parts = list(fig.subfigures(bars + bool(below), 1, squeeze=False)[:, 0])
    if bars:
        _bars(parts[0].add_subplot(), rows["peers"])
    for index, name in enumerate(below):
        draw[name](parts[-1].add_subplot(1, len(below), index + 1), rows[name])
    return fig


def _bars(ax: Axes, rows: Sequence[Row]) -> None:
    """A group of bars for each row, a bar for each side, with its milliseconds above."""
    sides = [side for side in dict.fromkeys(side for row in rows for side in row.values)
             if any(row.median(side) for row in rows)]  # fmt: skip
    width = 0.84 / len(sides)
    for index, side in enumerate(sides):
        points = [(x, row.median(side)) for x, row in enumerate(rows) if row.median(side)]
        at = [x + (index - (len(sides) - 1) / 2) * width for x, _ in points]
        ax.bar(at, [y for _, y in points], width * 0.94, color=COLORS[side], label=side)
        for x, (_, y) in zip(at, points, strict=True):
            ax.annotate(figure(y), (x, y), xytext=(0, 2), textcoords="offset points",
                        ha="center", fontsize=7, color=style.INK)  # fmt: skip
    found = [row.median(side) for row in rows for side in sides if row.median(side)]
    ax.set_yscale("log")
    ax.set_ylim(min(found) / 2, max(found) * 2)
    ax.set_xlim(-0.6, len(rows) - 0.4)
    labels = [re.sub(",? (?!passes)", "\n", row.what) for row in rows]
    ax.set_xticks(range(len(rows)), labels, fontsize=8)
    ax.tick_params(axis="x", length=0)
    _finish(ax, "Attention by its makers", "ms, shorter is faster")
    # Above the bars: no corner is free.
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(sides))


def _windows(ax: Axes, rows: Sequence[Row]) -> None:
    window = re.search(r"window (\d+)", rows[0].what)[1]
    names = {"causal": "causal", "window": f"causal, window {window}"}
    for side, name in names.items():
        for passes in PASSES:
            _line(ax, [r for r in rows if passes in r.what], side, f"{name}, {passes}", passes)
    _lengths(ax, rows)
    _finish(ax, "Time by length: causal, and a window", "ms")


def _crossover(ax: Axes, rows: Sequence[Row]) -> None:
    for side in ("reference", "blockwise"):
        for passes in PASSES:
            chosen = [r for r in rows if r.what.startswith("B=1 ") and passes in r.what]
            _line(ax, chosen, side, f"{side}, {passes}", passes)
    _lengths(ax, rows)
    _finish(ax, "Where blocks pay: causal, B=1", "ms")


def _line(ax: Axes, rows: Sequence[Row], side: str, label: str, passes: str) -> None:
    points = [(length(row), row.median(side)) for row in rows]
    dashed = passes == "forward"
    ax.plot(*zip(*points, strict=True), color=COLORS[side], marker="o", markersize=4,
            linestyle="--" if dashed else "-", linewidth=1.6, label=label)  # fmt: skip


def length(row: Row) -> int:
    """T, from what the row is called."""
    return int(re.search(r"\bT=(\d+)", row.what)[1])


def _lengths(ax: Axes, rows: Sequence[Row]) -> None:
    """A logarithmic axis of lengths, marked where there are points, and the legend above it."""
    lengths = sorted({length(row) for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(lengths, [f"{T:,}" for T in lengths])
    ax.minorticks_off()
    ax.set_xlabel("T, queries and keys")
    ax.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2,
              handlelength=3)  # fmt: skip


def _finish(ax: Axes, title: str, unit: str) -> None:
    from matplotlib.ticker import LogLocator

    ax.set_title(title, loc="left", weight="bold", pad=34 if ax.get_legend() else 8)
    ax.set_ylabel(unit)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.minorticks_off()
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    ax.grid(axis="y", color=style.HAIRLINE, linewidth=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
