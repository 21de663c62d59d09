"""The matrices of a computation side by side, as heat maps with their values written in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from qkv_jax.viz import fonts, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The layout, in inches.
LARGE_CELL, SMALL_CELL = (0.43, 0.3), (0.16, 0.16)  # with the number written in, and without
CHARACTER = 0.085  # width of a letter of a label
MARGIN, GAP = 0.1, 0.25  # left of the first panel of a line, and right of each
TITLE, ABOVE, BELOW = 0.4, 0.55, 0.3  # heights: the figure's title, a panel's name, its columns


@style.house_style()
def matrices_figure(
    matrices: Mapping[str, ArrayLike],
    tokens: Sequence[str] | None = None,
    *,
    over_keys: Collection[str] = (),
    title: str | None = None,
    width: float = 11.2,
) -> Figure:
    """The matrices of a computation, in order, with their values written in if none is large.

    Each matrix has its own colour scale. Numbers of both signs are blue below 0 and red above,
    others run from white to blue. A boolean matrix shows a 1 where it is True; a number that is not
    finite, such as the -inf of a hidden score, is grey. The tokens of columns are turned where
    one is wider than a cell.

    Args:
        matrices: name -> [rows, columns], drawn from left to right, then in further lines.
        tokens: labels for the rows of matrices that have as many.
        over_keys: names of the matrices whose columns stand for the tokens too.
        title: above all.
        width: of the figure, in inches.

    Returns:
        A new figure.

    Raises:
        ValueError: nothing to draw, something that is not a matrix, or an unknown name.
    """
    panels = {name: _matrix(name, matrix) for name, matrix in matrices.items()}
    if not panels:
        raise ValueError("matrices must name at least one matrix; got none")
    if unknown := set(over_keys) - set(panels):
        raise ValueError(f"over_keys must name matrices of {list(panels)}; got {sorted(unknown)}")

    labels = style.labels(tokens or ())
    longest_label = CHARACTER * max(map(fonts.columns, labels), default=0)
    written = max(max(panel.shape) for panel in panels.values()) <= 12
    cell_width, cell_height = LARGE_CELL if written else SMALL_CELL
    lines = _lines(panels, width, cell_width, longest_label + 0.15)
    upright = longest_label <= cell_width  # the labels of columns; else they are turned
    heights = []  # of the cells and the column labels of each line
    for line in lines:
        labelled = any(name in over_keys for name in line)
        below = max(BELOW, longest_label + 0.1) if labelled and not upright else BELOW
        heights.append(cell_height * max(len(panels[name]) for name in line) + below)
    total = (TITLE if title else 0) + len(lines) * ABOVE + sum(heights)
    fig = style.new_figure(width, total, layout=None, dpi=110)
    if title:
        place = MARGIN / width, 1 - 0.12 / total
        fig.text(*place, style.heading(title), fontsize=12, va="top", weight="bold")
    top = TITLE if title else 0
    for line, height in zip(lines, heights, strict=True):
        top += ABOVE
        for name, left in line.items():
            rows, columns = panels[name].shape
            size = columns * cell_width, rows * cell_height
            bottom = total - top - size[1]
            ax = fig.add_axes((left / width, bottom / total, size[0] / width, size[1] / total))
            columns = labels if name in over_keys else None
            _draw(ax, panels[name], labels, columns, written, upright)
            ax.set_title(name, loc="left", fontsize=9.5, weight="bold", pad=17)
            _write_shape(ax, panels[name].shape)
        top += height
    return fig


def _matrix(name: str, matrix: ArrayLike) -> np.ndarray:
    array = np.asarray(matrix)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"matrices[{name!r}] must be [rows, columns]; got shape {array.shape}")
    return array if array.dtype == bool else array.astype(np.float64)


def _lines(
    panels: Mapping[str, np.ndarray], width: float, cell_width: float, label_width: float
) -> list[dict[str, float]]:
    """Panels filled into lines from the left, as in a text: name -> left edge of its cells."""
    lines: list[dict[str, float]] = [{}]
    x = MARGIN
    for name, panel in panels.items():
        needed = label_width + max(panel.shape[1] * cell_width, CHARACTER * len(name)) + GAP
        if lines[-1] and x + needed > width:
            lines.append({})
            x = MARGIN
        lines[-1][name] = x + label_width
        x += needed
    return lines


def _draw(
    ax: Axes,
    array: np.ndarray,
    row_labels: list[str],
    column_labels: list[str] | None,
    written: bool,
    upright: bool,
) -> None:
    rows, columns = array.shape
    colours = _colours(array)
    ax.imshow(colours, aspect="auto", interpolation="nearest")
    ax.set_yticks(range(rows), row_labels if len(row_labels) == rows else range(rows))
    if column_labels is not None and len(column_labels) == columns:
        ax.set_xticks(range(columns), column_labels, rotation=0 if upright else 90)
    else:
        ax.set_xticks(range(columns), range(columns), rotation=0 if written else 90)
    ax.tick_params(length=0, labelsize=8, pad=3)
    if not written:
        return
    # White lines between the cells.
    ax.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.2)
    ax.tick_params(which="minor", length=0)
    for edge in ax.spines.values():
        edge.set_visible(False)
    for (row, column), value in np.ndenumerate(array):
        dark = colours[row, column] @ (0.299, 0.587, 0.114, 0) < 0.5
        ink = "white" if dark else style.INK
        ax.text(column, row, _number(value), ha="center", va="center", fontsize=7.5, color=ink)


def _colours(array: np.ndarray) -> np.ndarray:
    """Red, green, blue and opacity of every cell."""
    import matplotlib

    values = np.ma.masked_invalid(array.astype(np.float64))
    extreme = np.ma.max(np.abs(values)) if values.count() else 0
    extreme = 1.25 * float(extreme) or 1.0  # short of the darkest shades: the numbers stay legible
    signed = values.count() > 0 and values.min() < 0
    cmap = matplotlib.colormaps[style.DIVERGING if signed else style.SEQUENTIAL]
    scaled = (values / extreme + 1) / 2 if signed else values / extreme
    return cmap.with_extremes(bad=style.HIDDEN)(scaled)


def _write_shape(ax: Axes, shape: tuple[int, ...]) -> None:
    ax.annotate(
        " × ".join(map(str, shape)),
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=8,
        color=style.MUTED,
    )


def _number(value: float | np.bool_) -> str:
    """A cell's number, two decimals; an exact 0 is a bare 0."""
    if isinstance(value, np.bool_):
        return "1" if value else ""
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    text = f"{value:z.2f}" if abs(value) < 100 else f"{value:.0f}"
    return text.replace("-", "−")
