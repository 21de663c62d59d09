"""Lines in panels side by side, with one legend: what was measured beside what was published."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qkv_jax.viz import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X<>"
MANY = 20  # points, from which on a line has no markers
ABREAST = 4  # panels in a row at most


@dataclasses.dataclass(frozen=True)
class Panel:
    """Axes with lines.

    Args:
        title: above the axes.
        lines: name -> points (x, y), or (x, y, half of the spread of y).
        x_label: under the axes.
        levels: name -> y of a horizontal line, for what does not depend on x.
        marks: name -> x of a vertical line, for what happens there.
        ticks: x -> what is written there, where x only counts.
    """

    title: str
    lines: Mapping[str, Sequence[tuple[float, ...]]]
    x_label: str
    levels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    marks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ticks: Mapping[float, str] = dataclasses.field(default_factory=dict)


@style.house_style()
def lines_figure(
    panels: Sequence[Panel],
    *,
    y_label: str,
    title: str | None = None,
    log_x: bool = False,
    log_base: int = 2,
    share_x: bool = False,
    y_limits: tuple[float, float] | None = None,
) -> Figure:
    """Panels that share the vertical axis, four in a row at most; a name has one colour in all.

    Args:
        panels: at least one, each with at least one line or mark.
        y_label: of the shared axis.
        title: above all panels.
        log_x: whether x is on a logarithmic axis.
        log_base: of that axis.
        share_x: whether the panels share the horizontal axis too.
        y_limits: of the shared axis; None: what the lines need.

    Returns:
        A new figure.

    Raises:
        ValueError: no panel, or an empty one.
    """
    if not panels or not all(panel.lines or panel.marks for panel in panels):
        raise ValueError("panels: wanted at least one, each with a line or a mark")
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    look = {
        name: {
            "color": style.PALETTE[i % len(style.PALETTE)],
            # Where colours begin anew, markers are moved by one.
            "marker": MARKERS[(i + i // len(style.PALETTE)) % len(MARKERS)],
        }
        for i, name in enumerate(names)
    }
    rows = math.ceil(len(panels) / ABREAST)
    columns = math.ceil(len(panels) / rows)
    fig = style.new_figure(1.6 + 2.5 * columns, 0.4 + 3.0 * rows, layout="constrained")
    grid = fig.subplots(rows, columns, sharex=share_x, sharey=True, squeeze=False)
    axes = grid.flat[: len(panels)]
    for ax, panel in zip(axes, panels, strict=True):
        _draw(ax, panel, look, log_base if log_x else None)
    for ax in grid.flat[len(panels) :]:
        ax.set_axis_off()
    for ax in grid[:, 0]:
        ax.set_ylabel(y_label)
    if y_limits is not None:
        axes[0].set_ylim(*y_limits)
    if title:
        fig.suptitle(style.heading(title), x=0.01, ha="left", weight="bold", fontsize=10)
    handles = {}
    for ax in axes:
        handles |= {
            label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
    fig.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=8.5)
    return fig


def _draw(ax: Axes, panel: Panel, look: Mapping[str, dict], log_base: int | None) -> None:
    for name, points in panel.lines.items():
        columns = list(zip(*sorted(points), strict=True))
        spread = columns[2] if len(columns) > 2 else None
        ax.errorbar(
            columns[0], columns[1], yerr=spread, label=name, linewidth=1.5, markersize=4.5,
            capsize=2, elinewidth=0.8,
            **look[name] | ({"marker": ""} if len(points) >= MANY else {}),
        )  # fmt: skip
    for name, level in panel.levels.items():
        ax.axhline(level, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        ax.annotate(
            name, (0.02, level), xycoords=("axes fraction", "data"), xytext=(0, 2),
            textcoords="offset points", color=style.MUTED, fontsize=7.5,
        )  # fmt: skip
    for name, place in panel.marks.items():
        ax.axvline(place, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        ax.annotate(
            name, (place, 0.6), xycoords=("data", "axes fraction"), xytext=(1.5, 0), rotation=90,
            textcoords="offset points", color=style.MUTED, fontsize=7.5, va="top",
        )  # fmt: skip
    ax.set_title(style.heading(panel.title), loc="left")
    ax.set_xlabel(panel.x_label)
    if log_base is not None:
        ax.set_xscale("log", base=log_base)
        ax.xaxis.get_major_locator().set_params(numticks=4)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:,g}")
    places = sorted({x for points in panel.lines.values() for x, *_ in points})
    few = 0 < len(places) <= 6
    if panel.ticks:
        slant = {"rotation": 30, "ha": "right"} if len(panel.ticks) <= 6 else {"rotation": 90}
        ax.set_xticks(list(panel.ticks), list(panel.ticks.values()), **slant)
    elif few and (log_base is not None or all(float(x).is_integer() for x in places)):
        ax.set_xticks(places, [f"{x:g}" if float(x).is_integer() else f"{x:.2g}" for x in places])
        ax.minorticks_off()
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="y", color=style.HAIRLINE, linewidth=0.7)
    ax.set_axisbelow(True)
