"""What all figures share: colours, readable tokens, and how a figure becomes a file."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qkv_jax.viz import fonts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
LIGHT_BLUE = "#8FC1E0"
PALETTE = (
    BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#1F2933", "#9A6324", "#7A5195",
    "#A0A000",
)  # fmt: skip
INK, MUTED, HAIRLINE, HIDDEN = "#1F2933", "#697586", "#E3E8EF", "#E9ECF0"

SEQUENTIAL = "Blues"  # weights: nothing is white
DIVERGING = "RdBu_r"  # signed numbers: 0 is white

_SYMBOLS = {" ": "␣", "\n": "⏎", "\t": "⇥"}


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """The look of all figures, whatever the user's matplotlib settings say; also a decorator."""
    import matplotlib

    look = {
        "font.family": list(fonts.families()),
        "font.size": 9.0,
        "text.color": INK,
        "text.usetex": False,
        "text.parse_math": False,  # a token may be a dollar sign
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.labelsize": 9.0,
        "axes.linewidth": 0.8,
        "axes.titlesize": 10.0,
        "axes.facecolor": "white",
        "figure.facecolor": "white",
        "savefig.facecolor": "auto",
        "savefig.bbox": None,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "svg.hashsalt": "qkv_jax",  # otherwise the ids inside an SVG are random
    }
    with matplotlib.rc_context(look):
        yield


def new_figure(
    width: float, height: float, layout: str | None = "compressed", dpi: int = 150
) -> Figure:
    """An empty figure, in inches, outside pyplot's list of open figures."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout=layout)


@house_style()
def save_figure(fig: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG or SVG, the same bytes every time; missing folders are made.

    Args:
        fig: any matplotlib figure.
        path: ends in .png or .svg.

    Returns:
        The path written.

    Raises:
        ValueError: another suffix.
        OSError: the path cannot be written; the message says why.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".png", ".svg"):
        raise ValueError(f"path must end in .png or .svg; got {str(path)!r}")
    picture = io.BytesIO()
    # The date and the version of matplotlib would make equal pictures different files.
    metadata = {"Software": None} if suffix == ".png" else {"Date": None, "Creator": None}
    fig.savefig(picture, format=suffix[1:], metadata=metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.getvalue())
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot write the figure: {error.strerror}", str(path)
        ) from error
    return path


def visible(token: str) -> str:
    """The token as text that one can see: spaces as ␣, newlines as ⏎, the unprintable as escapes.

    >>> visible(" the"), visible("\\n"), visible("\\x00")
    ('␣the', '⏎', '\\\\x00')
    """
    return "".join(_visible_character(character) for character in str(token))


def _visible_character(character: str) -> str:
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    return character if character.isprintable() else fonts.escape(character)


def labels(tokens: Iterable[str]) -> list[str]:
    """The tokens as a picture shows them: visible, and in characters that a font has."""
    return fonts.drawable(map(visible, tokens))


def heading(text: str | None) -> str:
    """A picture's title as it can be drawn; none is empty."""
    return fonts.drawable([text or ""])[0]
