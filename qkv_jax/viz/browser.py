"""Attention as one HTML file that a browser opens: every head, every weight, nothing loaded."""

from __future__ import annotations

import base64
import dataclasses
import html
import importlib.resources
import json
import math
import string
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

# How many steps a weight's square root is told in, tried in turn: fewer take less room.
LEVELS = (255, 127, 63, 31, 15)
SMALL, LARGE, PER_WEIGHT = 340_000, 14_000_000, 0.29  # bytes that packed weights may take
SCRIPTS = ("state.js", "pictures.js", "page.js")  # in this order, one script
VECTOR_LEVELS = 127  # steps from 0 to the largest component of a query or key
VECTOR_BYTES = 1_000_000  # of a view's packed queries and keys, beyond which they are left out


@dataclasses.dataclass(frozen=True)
class AttentionView:
    """The attention of one stack of layers on one text.

    Args:
      name: what it is, such as "encoder".
      weights: [L, N, T, S], each in [0, 1].
      queries: T tokens.
      keys: S tokens; None: the queries, which attend to themselves.
      q, k: [L, T, N, H] and [L, S, K, H], what the weights were made from; None: not shown.
      measures: of heads, [L, N], by name.
    """

    name: str
    weights: ArrayLike
    queries: Sequence[str]
    keys: Sequence[str] | None = None
    q: ArrayLike | None = None
    k: ArrayLike | None = None
    measures: Mapping[str, ArrayLike] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PageTable:
    """A table under the pictures.

    Args:
      title, note: above it.
      columns: their names.
      rows: text, a cell for each column.
      tokens: for each row the place of a query, which a click on the row opens; None: no row does.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    tokens: Sequence[int] | None = None


def attention_page(
    views: Sequence[AttentionView],
    *,
    title: str,
    about: str = "",
    tables: Sequence[PageTable] = (),
    vector_bytes: int = VECTOR_BYTES,
) -> str:
    """A page that shows attention: lines between tokens, maps, a text's shading, q . k of a pair.

    It holds all that it shows and loads nothing; a text in it stays text, whatever it says. Weights
    are kept as squares of multiples of 1/255, or of fewer levels where they would take more than
    0.29 bytes each and 340 kB together, or 14 MB; and shown with as many digits as that allows.
    Queries and keys are multiples of 1/127 of the largest component of each, about 1.35 bytes a
    component; q . k comes with the error that this makes.

    Args:
      views: what one can choose between: stacks of layers, or several models' for comparison.
      title: of the page.
      about: a line or a few under it.
      tables: under the pictures.
      vector_bytes: that the queries and keys of a view may take; where they need more, the page
        says so instead of showing q . k.

    Returns:
      HTML, to be written as UTF-8.

    Raises:
      ValueError: there is nothing to show, or an array's shape or values do not fit.
    """
    if not views:
        raise ValueError("views: wanted at least one, got none")
    for view in views:
        _check(view)
    number = sum(np.size(view.weights) for view in views)
    most = min(max(SMALL, PER_WEIGHT * number), LARGE)
    for levels in LEVELS:
        cells = [_cells(view, levels) for view in views]
        if sum(map(len, cells)) <= most:
            break
    data = {
        "about": about,
        "views": [
            _view(view, levels, packed, vector_bytes)
            for view, packed in zip(views, cells, strict=True)
        ],
        "tables": [dataclasses.asdict(table) for table in tables],
    }  # fmt: skip
    files = importlib.resources.files("qkv_jax.viz") / "page"
    template = string.Template((files / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(title),
        style=(files / "page.css").read_text(encoding="utf-8"),
        script="\n".join((files / name).read_text(encoding="utf-8") for name in SCRIPTS),
        # Within <script> only "<" can end the element or begin a comment.
        data=json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
            "<", "\\u003c"
        ),
    )


def _check(view: AttentionView) -> None:
    weights = np.asarray(view.weights)
    keys = view.queries if view.keys is None else view.keys
    wanted = (len(view.queries), len(keys))
    if weights.ndim != 4 or weights.shape[2:] != wanted or not weights.size:
        raise ValueError(
            f"weights of {view.name!r}: wanted [L, N, {wanted[0]}, {wanted[1]}] for "
            f"{wanted[0]} queries and {wanted[1]} keys, got {list(weights.shape)}"
        )
    low, high = weights.min(), weights.max()
    if not (low >= 0 and high <= 1 + 1e-4):
        raise ValueError(
            f"weights of {view.name!r}: wanted numbers in [0, 1], got {low:.3g} to {high:.3g}"
        )
    for name, values in view.measures.items():
        if np.shape(values) != weights.shape[:2]:
            raise ValueError(
                f"measures[{name!r}] of {view.name!r}: wanted [L, N] = {weights.shape[:2]}, got "
                f"{np.shape(values)}"
            )


def _cells(view: AttentionView, levels: int) -> str:
    """The weights as integers n that stand for (n / levels)^2, packed."""
    weights = np.clip(np.asarray(view.weights, np.float32), 0, 1)
    return _pack(np.rint(np.sqrt(weights) * levels).astype(np.uint8))


def _pack(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 6)).decode("ascii")


def _view(view: AttentionView, levels: int, cells: str, vector_bytes: int) -> dict[str, Any]:
    weights = np.asarray(view.weights)
    return {
        "name": view.name,
        "shape": weights.shape,
        "levels": levels,
        "cells": cells,
        "queries": list(view.queries),
        "keys": list(view.queries if view.keys is None else view.keys),
        "self": view.keys is None,
        "measures": {name: _finite(values) for name, values in view.measures.items()},
        **_product(view, vector_bytes),
    }


def _finite(values: ArrayLike) -> list[list[float | None]]:
    """Numbers to four digits, for JSON, which knows no NaN."""
    rows = np.asarray(values, np.float64).tolist()
    return [[float(f"{x:.4g}") if np.isfinite(x) else None for x in row] for row in rows]


def _product(view: AttentionView, most: int) -> dict[str, Any]:
    """Queries and keys, head by head, or why there are none."""
    if view.q is None or view.k is None:
        return {"q": None, "why_no_product": "This attention has no queries and keys of one width."}
    q, k = _vectors(view.q), _vectors(view.k)
    size = sum(len(text) for vectors in (q, k) for text in vectors.values())
    if size > most:
        needed = math.ceil(size / 1e5) / 10  # MB
        return {"q": None, "why_no_product":
                f"Left out: the queries and keys of this text take {needed} MB, more than the "
                f"{most / 1e6:g} MB that the page may give them. A shorter text, --vector_mb="
                f"{needed} of experiments.visualize or attention_page(vector_bytes="
                f"{needed * 1e6:.0f}) shows them."}  # fmt: skip
    return {"q": q, "k": k, "width": np.shape(view.q)[-1], "key_heads": np.shape(view.k)[2]}


def _vectors(x: ArrayLike) -> dict[str, str]:
    """Vectors [L, T, N, H] as integers, packed in the order [L, N, T, H], times a scale of each."""
    x = np.moveaxis(np.asarray(x, np.float32), 2, 1)
    scales = np.abs(x).max(-1, keepdims=True) / VECTOR_LEVELS
    integers = np.rint(x / np.where(scales > 0, scales, 1)).astype(np.int8)
    return {"integers": _pack(integers), "scales": _pack(scales)}
