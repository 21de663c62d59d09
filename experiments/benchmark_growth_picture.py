"""The picture of how mechanisms grow with length: for each family, time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.benchmark_growth import EXACT, Growth, Sizes, slope
from qkv_jax.viz import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, with two dark colours for a family of eight.
COLORS = (
    style.BLUE, style.ORANGE, style.GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#8B5E3C", style.INK,
)  # fmt: skip
PREFIXES = {1e9: "G", 1e6: "M", 1e3: "k", 1.0: "", 1e-3: "m", 1e-6: "µ"}
NAMES = 0.34  # the part of a panel, to the right of the lines, that their names take
GAP = 0.1  # between two names, as a part of the panel's height

Colored = list[tuple[Growth, str]]


@style.house_style()
def picture(rows: Sequence[Growth], sizes: Sizes) -> Figure | None:
    """Time and memory against T, by family, each beside exact attention; None without any."""
    families = _families([row for row in rows if row.times])
    if not families:
        return None
    fig = style.new_figure(11.0, 2.3 * len(families) + 0.3, layout="constrained")
    fig.get_layout_engine().set(hspace=0.06, wspace=0.02, h_pad=0.07)
    fig.suptitle(
        "Both passes of a mixer against T, the length. Behind each name: the slope from "
        f"T = {_length(sizes.start)} on. Grey: exact attention.",
        x=0.01, ha="left", fontsize=9, color=style.MUTED,
    )  # fmt: skip
    panels = fig.subplots(len(families), 2, squeeze=False)
    for column, (what, unit) in zip(panels.T, {"time": "s", "memory": "B"}.items(), strict=True):
        for ax, (family, members) in zip(column, families.items(), strict=True):
            ax.set_title(f"{family}: {what}", loc="left", weight="bold")
            for row, color in members:
                values = _values(row, unit)
                ax.plot(list(values), list(values.values()), color=color, marker="o",
                        markersize=3, linewidth=1.5)  # fmt: skip
        _scale(column, unit, sizes)
        for ax, members in zip(column, families.values(), strict=True):
            _name(ax, members, unit, sizes)
    return fig


def _families(rows: Sequence[Growth]) -> dict[str, Colored]:
    """The rows by family, with their colours; in each, exact attention comes first, in grey."""
    exact = [(row, style.MUTED) for row in rows if row.name == EXACT]
    families: dict[str, Colored] = {}
    for row in rows:
        if row.name != EXACT:
            members = families.setdefault(row.family, list(exact))
            members.append((row, COLORS[(len(members) - len(exact)) % len(COLORS)]))
    return families


def _values(row: Growth, unit: str) -> dict[int, float]:
    return {T: ms / 1e3 for T, ms in row.times.items()} if unit == "s" else row.memory


def _scale(column: Sequence[Axes], unit: str, sizes: Sizes) -> None:
    """The same logarithmic scales for all panels of a column, with room for names to the right."""
    found = np.log10([y for ax in column for line in ax.lines for y in line.get_ydata()])
    pad = 0.06 * np.ptp(found) + 0.05
    low, high = found.min() - pad, found.max() + pad
    first, last = np.log2(sizes.lengths[0]) - 0.3, np.log2(sizes.lengths[-1]) + 0.2
    for ax in column:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlim(2**first, 2 ** (first + (last - first) / (1 - NAMES)))
        ax.set_ylim(10**low, 10**high)
        ax.set_xticks(sizes.lengths, [_length(T) for T in sizes.lengths])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(lambda y, _: _figure(y, unit))
        powers = 10.0 ** np.arange(np.ceil(low), high)
        ax.hlines(powers, 2**first, 2**last, color=style.HAIRLINE, linewidth=0.7, zorder=0)
        ax.spines["bottom"].set_bounds(2**first, 2**last)
        ax.spines[["top", "right"]].set_visible(False)


def _name(ax: Axes, members: Colored, unit: str, sizes: Sizes) -> None:
    """The names to the right of the lines, moved apart, each with its slope."""
    low, high = np.log10(ax.get_ylim())
    ends = [list(_values(row, unit).items())[-1] for row, _ in members]
    heights = [(np.log10(y) - low) / (high - low) for _, y in ends]
    for (row, color), end, place in zip(members, ends, apart(heights, GAP), strict=True):
        found = slope(_values(row, unit), sizes.start)
        ax.annotate(
            row.name if found is None else f"{row.name}  {found:.2f}",
            end, (1 - NAMES + 0.04, place), "data", "axes fraction",
            color=color, fontsize=8, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.5,
                        "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1], at least `gap` apart, in the same order, near to those wanted."""
    order = np.argsort(wanted, kind="stable")
    # Of these differences, places are right if none is below the one before: pools of equal ones.
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([wanted[index] - rank * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    shifts = np.clip(
        [np.mean(pool) for pool in pools for _ in pool], 0, 1 - (len(wanted) - 1) * gap
    )
    places = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        places[index] = float(shifts[rank]) + rank * gap
    return places


def _length(T: int) -> str:
    return f"{T // 1024}k" if T >= 1024 and T % 1024 == 0 else f"{T}"


def _figure(value: float, unit: str) -> str:
    size = next(size for size in PREFIXES if value >= 0.999 * size)
    return f"{value / size:g} {PREFIXES[size]}{unit}"
