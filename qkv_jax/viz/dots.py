"""Numbers of named things as dots in rows: ours and the published ones on one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qkv_jax.viz import style
from qkv_jax.viz.panels import MARKERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Dots:
    """Axes with a row for each name.

    Args:
      title: above the axes.
      series: whose -> name -> number, or (number, half of its spread).
      x_label: under the axes.
      levels: what -> number, for a vertical line such as chance.
    """

    title: str
    series: Mapping[str, Mapping[str, float | tuple[float, float]]]
    x_label: str
    levels: Mapping[str, float] = dataclasses.field(default_factory=dict)


@style.house_style()
def dots_figure(panels: Sequence[Dots], *, title: str | None = None) -> Figure:
    """Panels in a row that share the names; a series has the same look in each.

    Args:
        panels: at least one, each with at least one number.
        title: above all panels.

    Returns:
        A new figure. Names stand from top to bottom in the order in which they come.

    Raises:
        ValueError: no panel, or one without a number.
    """
    if not panels or not all(any(panel.series.values()) for panel in panels):
        raise ValueError("panels: wanted at least one, each with a number")
    every = [panel.series for panel in panels]
    names = list(dict.fromkeys(name for s in every for numbers in s.values() for name in numbers))
    whose = list(dict.fromkeys(who for s in every for who in s))
    fig = style.new_figure(2.0 + 2.2 * len(panels), 1.5 + 0.28 * len(names), layout="constrained")
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        for who, numbers in panel.series.items():
            look = whose.index(who)
            found = [n if isinstance(n, tuple) else (n, 0.0) for n in numbers.values()]
            ax.errorbar(
                [x for x, _ in found], [names.index(name) for name in numbers],
                xerr=[spread for _, spread in found], label=who, linestyle="none", markersize=6,
                color=style.PALETTE[look % len(style.PALETTE)], elinewidth=1.0, capsize=2,
                marker=MARKERS[look % len(MARKERS)], alpha=0.9,
            )  # fmt: skip
        for what, level in panel.levels.items():
            ax.axvline(level, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            ax.annotate(
                what, (level, 1), xycoords=("data", "axes fraction"), xytext=(3, -2), va="top",
                textcoords="offset points", color=style.MUTED, fontsize=7.5,
            )  # fmt: skip
        ax.set_title(panel.title, loc="left")
        ax.set_xlabel(panel.x_label)
        ax.margins(x=0.12)
        ax.grid(axis="y", color=style.HAIRLINE, linewidth=0.7)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.7)
    if title:
        fig.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=10)
    handles = {}
    for ax in axes:
        found, labels = ax.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    fig.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=8.5)
    return fig
