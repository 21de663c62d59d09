"""Curves of a training run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qkv_jax.viz import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]


@style.house_style()
def loss_curve(
    rows: Iterable[Mapping[str, Any]],
    *,
    floors: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Figure:
    """Training and validation loss over the steps, beside the losses that need no network.

    Args:
        rows: the lines of a run's metrics, such as `{"step": 10, "loss": 2.3}` (training) and
            `{"step": 250, "validation_loss": 1.9}`, losses in nats per token; other rows are
            ignored, and losses that are not finite leave a gap.
        floors: name -> loss of a simple predictor ("uniform", "unigram", "bigram"), as a line.
        title: above the curves.

    Returns:
        A new figure.

    Raises:
        ValueError: no row has a step and a finite loss.
    """
    rows = list(rows)
    training, validation = _points(rows, "loss"), _points(rows, "validation_loss")
    finite = [loss for _, loss in training + validation if math.isfinite(loss)]
    if not finite:
        raise ValueError("rows must hold a 'step' with a finite 'loss' or 'validation_loss'")

    fig = style.new_figure(6.4, 4.0)
    ax = fig.add_subplot()
    if training:
        steps, losses = zip(*training, strict=True)
        ax.plot(steps, losses, color=style.LIGHT_BLUE, linewidth=1.1, label="training")
    if validation:
        _draw_validation(ax, validation)
    floors = {name: float(loss) for name, loss in (floors or {}).items()}
    _frame(ax, finite + list(floors.values()))
    _draw_floors(ax, floors)
    ax.set_title(style.heading(title), loc="left", weight="bold", pad=22)
    ax.set_xlabel("training step")
    ax.set_ylabel("loss (nats per token)")
    # Above the curves: no corner is free in every run.
    ax.legend(frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(-0.015, 0.99), ncols=2)
    return fig


def _points(rows: list[Mapping[str, Any]], name: str) -> Points:
    """(step, loss) in the order of the steps; a step that was logged twice counts the last time."""
    points = {
        row["step"]: float(row[name])
        for row in rows
        if row.get("step") is not None and row.get(name) is not None
    }
    return sorted(points.items())


def _draw_validation(ax: Axes, validation: Points) -> None:
    """The validation loss, its lowest point ringed and named in the legend."""
    steps, losses = zip(*validation, strict=True)
    label = "validation"
    if finite := [(loss, step) for step, loss in validation if math.isfinite(loss)]:
        best, step = min(finite)
        label = f"validation, best {best:.3f} at step {step:,}"
        ax.plot(step, best, "o", color=style.ORANGE, markersize=9, markerfacecolor="none")
    look = {"linewidth": 1.8, "marker": "o", "markersize": 3.5}
    ax.plot(steps, losses, color=style.ORANGE, label=label, **look)


def _frame(ax: Axes, losses: list[float]) -> None:
    """Axes that hold every loss and every floor, with quiet lines."""
    low, high = min(losses), max(losses)
    margin = 0.05 * (high - low) or 0.5
    ax.set_ylim(low - margin, high + margin)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="y", color=style.HAIRLINE, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    ax.xaxis.get_major_locator().set_params(integer=True)


def _draw_floors(ax: Axes, floors: Mapping[str, float]) -> None:
    """Dashed lines, named in the right margin; names that would touch are moved apart."""
    low, high = ax.get_ylim()
    pitch, lowest_free = 0.045 * (high - low), -math.inf
    for name, loss in sorted(floors.items(), key=lambda item: item[1]):
        ax.axhline(loss, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        y = max(loss, lowest_free)
        lowest_free = y + pitch
        ax.annotate(
            f"{name} {loss:.2f}",
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=style.MUTED,
            fontsize=8.5,
        )
