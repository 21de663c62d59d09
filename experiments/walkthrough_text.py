"""How the walkthrough prints: headings, paragraphs, tables, and matrices side by side."""

import textwrap
from collections.abc import Iterable

import numpy as np

from experiments.walkthrough_mechanisms import Step
from qkv_jax import viz
from qkv_jax.viz.fonts import columns as width_of

COLUMNS = 100  # of the terminal


def heading(text: str) -> str:
    return f"{'═' * COLUMNS}\n{text}\n{'═' * COLUMNS}\n"


def paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), COLUMNS - 10) + "\n"


def number(value: float, decimals: int = 3) -> str:
    """Fixed decimals; an exact 0 is a bare 0."""
    if np.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    return f"{value:z.{decimals}f}"  # z: no minus sign before 0.000


def numbers(values: Iterable[float], decimals: int = 3) -> str:
    return " ".join(f"{number(float(value), decimals):>6}" for value in values)


def left(text: str, width: int) -> str:
    """`str.ljust` for a terminal, where East Asian letters take two columns."""
    return text + " " * (width - width_of(text))


def right(text: str, width: int) -> str:
    return " " * (width - width_of(text)) + text


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Names on the left, then columns as wide as their widest cell, flush right."""
    widths = [max(map(width_of, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for name, *cells in (header, ["─" * width for width in widths], *rows):
        flush = [right(cell, width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("   ".join(["", left(name, widths[0]), *flush]).rstrip() + "\n")
    return "".join(lines)


def print_steps(steps: list[Step], tokens: list[str]) -> str:
    """The matrices side by side, as many as fit the line, rows labelled by token."""
    gap = "   "
    tokens = [viz.visible(token) for token in tokens]
    longest = max(map(width_of, tokens))
    labels = [gap + left(token, longest) for token in ["", "", "", *tokens]]
    lines: list[list[list[str]]] = []
    free = 0
    for step in steps:
        block = print_matrix(step, tokens)
        width = len(gap) + width_of(block[0])
        if width > free:
            lines.append([])
            free = COLUMNS - width_of(labels[0])
        lines[-1].append(block)
        free -= width
    return "\n".join(
        "\n".join(gap.join(row).rstrip() for row in zip(labels, *blocks, strict=True)) + "\n"
        for blocks in lines
    )


def print_matrix(step: Step, tokens: list[str]) -> list[str]:
    """Formula, shape, column labels, then a line per row; all lines of one width."""
    matrix = np.asarray(step.matrix)
    columns = tokens if step.over_keys else [str(i) for i in range(matrix.shape[1])]
    width = max(6, *map(width_of, columns))
    if matrix.dtype == bool:
        cells = [["1" if value else "·" for value in row] for row in matrix]
    else:
        cells = [[number(float(value)) for value in row] for row in matrix]
    lines = [
        f"{step.name} = {step.formula}",
        f"[{matrix.shape[0]}, {matrix.shape[1]}]",
        *(" ".join(right(cell, width) for cell in row) for row in [columns, *cells]),
    ]
    longest = max(map(width_of, lines))
    return [left(line, longest) for line in lines]
