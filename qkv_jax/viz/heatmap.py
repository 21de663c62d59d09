"""Heat maps of attention weights, one or one per head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from qkv_jax.viz import fonts, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# In inches.
CELL = 0.16  # what a token takes along an axis, as long as the map stays within:
SMALLEST_MAP, LARGEST_MAP = 2.0, 7.0
LABEL_PITCH = 0.085  # from token to token; closer ones have no label, and the axis counts positions
UNLABELLED_MAP = 4.0  # the map of so many tokens


@style.house_style()
def attention_heatmap(
    weights: ArrayLike,
    *,
    query_tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """One attention map: a row per query, a column per key, darker where the weight is larger.

    Colours run from 0 (palest) to the largest weight, on a square-root scale: in causal attention
    the first rows hold weights near 1, and a linear scale would leave all others pale.

    Args:
        weights: [T, S], not negative.
        query_tokens: T labels for the rows.
        key_tokens: S labels for the columns; the query tokens, if T == S and none are given.
        title: above the map.
        ax: draw here instead of in a new figure.

    Returns:
        The figure that holds the map.

    Raises:
        ValueError: `weights` is not a matrix of finite numbers >= 0, or labels do not match it.
    """
    weights = _weights(weights, "[T, S]")
    query_tokens, key_tokens = _labels(weights.shape, query_tokens, key_tokens)
    size = _map_size(weights.shape)
    if ax is None:
        beside, below = _label_room(query_tokens), _label_room(key_tokens)
        fig = style.new_figure(size[0] + beside + 1.3, size[1] + below + (0.6 if title else 0.3))
        ax = fig.add_subplot()
    image = _draw_map(ax, weights, query_tokens, key_tokens, _norm(weights), size)
    ax.set_title(style.heading(title))
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    _colour_bar(ax.figure, image, ax, size[1])
    return ax.figure


@style.house_style()
def heads_figure(
    weights: ArrayLike,
    tokens: Sequence[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    title: str | None = None,
    num_columns: int | None = None,
) -> Figure:
    """One attention map per head, in a grid, all on one colour scale (see `attention_heatmap`).

    Args:
        weights: [N, T, S], not negative.
        tokens: T labels for the queries.
        key_tokens: S labels for the keys; `tokens`, if T == S and none are given.
        names: of the N maps, if they are not heads.
        title: above the grid.
        num_columns: maps in a row of the grid; chosen by N if not given.

    Returns:
        A new figure.

    Raises:
        ValueError: `weights` is not [N, T, S] of finite numbers >= 0, or labels do not match it.
    """
    weights = _weights(weights, "[N, T, S]")
    num_heads = len(weights)
    names = [f"head {head}" for head in range(num_heads)] if names is None else names
    if len(names) != num_heads:
        raise ValueError(f"names: {num_heads} wanted, for shape {weights.shape}; got {len(names)}")
    query_tokens, key_tokens = _labels(weights.shape[1:], tokens, key_tokens)
    columns = min(num_heads, num_columns or _grid_columns(num_heads))
    rows = math.ceil(num_heads / columns)
    size = _map_size(weights.shape[1:])
    beside, below = _label_room(query_tokens), _label_room(key_tokens)
    fig = style.new_figure(
        columns * (size[0] + 0.15) + beside + 1.3,
        rows * (size[1] + 0.3) + below + (0.6 if title else 0.3),
    )
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    norm = _norm(weights)
    for head, ax in enumerate(axes):
        if head >= num_heads:
            ax.set_axis_off()
            continue
        # Labels stand on the outer edges only; the last map of each column is an outer one.
        left, bottom = head % columns == 0, head + columns >= num_heads
        image = _draw_map(ax, weights[head], query_tokens, key_tokens, norm, size)
        ax.tick_params(labelleft=left, labelbottom=bottom)
        ax.set_title(style.heading(names[head]))
        ax.set_ylabel("query" if left else "")
        ax.set_xlabel("key" if bottom else "")
    fig.suptitle(style.heading(title), fontsize=11)
    _colour_bar(fig, image, list(axes), size[1])
    return fig


def _weights(weights: ArrayLike, shape: str) -> np.ndarray:
    weights = np.asarray(weights, np.float64)
    if weights.ndim != shape.count(",") + 1 or 0 in weights.shape:
        raise ValueError(f"weights must have shape {shape}; got {weights.shape}")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("weights must be finite and not negative")
    return weights


def _labels(
    shape: tuple[int, ...], query_tokens: Sequence[str] | None, key_tokens: Sequence[str] | None
) -> tuple[list[str] | None, list[str] | None]:
    """Readable labels for rows and columns, checked against the shape."""
    if key_tokens is None and shape[0] == shape[1]:
        key_tokens = query_tokens
    labels = []
    for name, tokens, length in zip(
        ("query tokens", "key tokens"), (query_tokens, key_tokens), shape, strict=True
    ):
        if tokens is not None and len(tokens) != length:
            raise ValueError(
                f"{name}: {length} labels wanted, for shape {shape}; got {len(tokens)}"
            )
        labels.append(None if tokens is None else style.labels(tokens))
    return labels[0], labels[1]


def _grid_columns(num_heads: int) -> int:
    """A grid without holes if there is one that is not too flat, wider than high otherwise."""
    widest = math.ceil(math.sqrt(num_heads)) + 1
    whole = [columns for columns in range(2, widest + 1) if num_heads % columns == 0]
    return whole[-1] if whole else widest


def _map_size(shape: tuple[int, ...]) -> tuple[float, float]:
    """Width and height of a map in inches: square cells, but stretched if it were a thread."""
    longest = max(shape)
    cell = min(max(CELL, SMALLEST_MAP / longest), LARGEST_MAP / longest)
    if cell < LABEL_PITCH:
        cell = UNLABELLED_MAP / longest
    return max(cell * shape[1], 1.0), max(cell * shape[0], 1.0)


def _label_room(labels: list[str] | None) -> float:
    """Inches that the labels of an axis take away from the map."""
    return 0.3 if labels is None else 0.085 * max(map(fonts.columns, labels)) + 0.1


def _norm(weights: np.ndarray) -> PowerNorm:
    """The colour scale from 0 to the largest weight."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=float(weights.max()) or 1.0)


def _draw_map(
    ax: Axes,
    weights: np.ndarray,
    query_tokens: list[str] | None,
    key_tokens: list[str] | None,
    norm: PowerNorm,
    size: tuple[float, float],
) -> AxesImage:
    cell_width, cell_height = size[0] / weights.shape[1], size[1] / weights.shape[0]
    aspect = cell_height / cell_width
    image = ax.imshow(weights, norm=norm, cmap=style.SEQUENTIAL, aspect=aspect)
    for axis, labels, count, inches in (
        (ax.yaxis, query_tokens, weights.shape[0], size[1]),
        (ax.xaxis, key_tokens, weights.shape[1], size[0]),
    ):
        pitch = inches / count
        if labels is None or pitch < LABEL_PITCH:
            most = max(1, int(inches / 0.3))
            axis.get_major_locator().set_params(integer=True, nbins=most, min_n_ticks=1)
            continue
        axis.set_ticks(range(count), labels)
        axis.set_tick_params(labelsize=min(9.0, 0.95 * 72 * pitch), length=0)
        if axis is ax.xaxis and max(map(len, labels)) > 1:
            axis.set_tick_params(rotation=90)
    return image


def _colour_bar(fig: Figure, image: AxesImage, axes: Axes | list[Axes], map_height: float) -> None:
    bar = fig.colorbar(image, ax=axes, fraction=0.15, aspect=max(10, 8 * map_height), pad=0.02)
    bar.set_label("attention weight")
    bar.outline.set_visible(False)
