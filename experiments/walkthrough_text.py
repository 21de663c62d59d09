"""How the walkthrough prints: headings, paragraphs, tables, and matrices side by side."""

import textwrap
from collections.abc import Iterable

import numpy as np

from experiments.walkthrough_mechanisms import Step

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


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Names on the left, then columns as wide as their widest cell, flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for name, *cells in (header, ["─" * width for width in widths], *rows):
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("   ".join(["", name.ljust(widths[0]), *right]).rstrip() + "\n")
    return "".join(lines)


def print_steps(steps: list[Step], tokens: list[str]) -> str:
    """The matrices side by side, as many as fit the line, rows labelled by token."""
    gap = "   "
    longest = max(map(len, tokens))
    labels = [gap + token.ljust(longest) for token in ["", "", "", *tokens]]
    lines: list[list[list[str]]] = []
    free = 0
    for step in steps:
        block = print_matrix(step, tokens)
        width = len(gap) + len(block[0])
        if width > free:
            lines.append([])
            free = COLUMNS - len(labels[0])
        lines[-1].append(block)
        free -= width
    return "\n".join(
        "\n".join(gap.join(row).rstrip() for row in zip(labels, *blocks, strict=True)) + "\n"
        for blocks in lines
    )


def print_matrix(step: Step, tokens: list[str]) -> list[str]:
    """Formula, shape, column labels, then a line per row; all lines of one length."""
    matrix = np.asarray(step.matrix)
    columns = tokens if step.over_keys else [str(i) for i in range(matrix.shape[1])]
    width = max(6, *map(len, columns))
    if matrix.dtype == bool:
        cells = [["1" if value else "·" for value in row] for row in matrix]
    else:
        cells = [[number(float(value)) for value in row] for row in matrix]
    lines = [
        f"{step.name} = {step.formula}",
        f"[{matrix.shape[0]}, {matrix.shape[1]}]",
        *(" ".join(f"{cell:>{width}}" for cell in row) for row in [columns, *cells]),
    ]
    longest = max(map(len, lines))
    return [line.ljust(longest) for line in lines]
