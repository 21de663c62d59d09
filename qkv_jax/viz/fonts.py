"""The fonts of pictures, and what becomes of characters that none of them has."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable

# Drawn with where they are installed, each for what those before it lack. matplotlib cannot draw
# fonts of coloured bitmaps, such as Noto Color Emoji.
FALLBACKS = (
    "Noto Sans CJK JP", "Noto Sans JP", "IPAexGothic", "IPAGothic", "TakaoGothic", "Hiragino Sans",
    "Yu Gothic", "Meiryo", "MS Gothic", "Arial Unicode MS", "Noto Emoji", "Symbola",
    "Segoe UI Emoji",
)  # fmt: skip
NAMED = 12  # missing characters that the warning lists
_told: set[str] = set()  # characters that a warning has named


@functools.cache
def families() -> tuple[str, ...]:
    """matplotlib's own font, then the fallbacks that are installed."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in FALLBACKS if name in installed))


def drawable(texts: Iterable[str]) -> list[str]:
    """The texts with an escape, such as \\u732b, for each character that no font can draw.

    A warning names those characters and says what to install, once for each.
    """
    texts = list(texts)
    missing = {c for text in texts for c in text if c != "\n" and ord(c) not in _code_points()}
    _tell(missing)
    escapes = str.maketrans({character: escape(character) for character in missing})
    return [text.translate(escapes) for text in texts]


def escape(character: str) -> str:
    """The character as Python writes it in ASCII."""
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def columns(text: str) -> int:
    """How wide a text is, in letters: East Asian ones are as wide as two, marks have no width.

    >>> columns("cat"), columns("猫"), columns("e\\u0301")
    (3, 2, 1)
    """
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


@functools.cache
def _code_points() -> frozenset[int]:
    """Those that one of the fonts can draw."""
    from matplotlib import font_manager

    paths = map(font_manager.findfont, families())
    return frozenset(point for path in paths for point in font_manager.get_font(path).get_charmap())


def _tell(missing: set[str]) -> None:
    # What cannot be printed has no glyph in any font.
    new = sorted(c for c in missing - _told if c.isprintable())
    if not new:
        return
    import matplotlib
    from absl import logging

    _told.update(new)
    more = f" and {len(new) - NAMED} more" if len(new) > NAMED else ""
    logging.warning(
        "No installed font that matplotlib can draw has %s%s: pictures show escapes such as %s "
        "instead. Install one, such as fonts-noto-cjk (Japanese, Chinese, Korean) or fonts-symbola "
        "(emoji), and remove %s/fontlist*.json, matplotlib's list of what is installed.",
        " ".join(new[:NAMED]), more, escape(new[0]), matplotlib.get_cachedir(),
    )  # fmt: skip
