"""Any script in a picture: a font that has it, or escapes and a sentence that says what to do."""

import numpy as np
import pytest
from absl import logging
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from qkv_jax import viz
from qkv_jax.viz import fonts


@pytest.fixture
def installed(monkeypatch):
    """Pretends that these fonts are installed, and returns the warnings from then on."""

    def installed(entries):
        monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
        monkeypatch.setattr(fonts, "_told", set())
        said = []
        monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
        forget()
        return said

    yield installed
    forget()


@pytest.fixture
def only_its_own(installed):
    """matplotlib's own font alone, whatever this machine has; the warnings."""
    return installed([f for f in font_manager.fontManager.ttflist if f.name.startswith("DejaVu")])


def forget():
    fonts.families.cache_clear()
    fonts._code_points.cache_clear()


def labels(fig):
    return [label.get_text() for label in fig.axes[0].get_yticklabels()]


def test_what_no_font_has_is_escaped_and_told_once(only_its_own, tmp_path):
    tokens = ["私", "は", "猫", " the"]
    for _ in range(2):  # matplotlib's own warning of a missing glyph would be an error here
        fig = viz.heads_figure(np.full((1, 4, 4), 0.25), tokens, title="私は猫\nthe", names=["猫"])
        viz.save_figure(fig, tmp_path / "map.png")
    assert labels(fig) == ["\\u79c1", "\\u306f", "\\u732b", "␣the"]
    assert fig.get_suptitle() == "\\u79c1\\u306f\\u732b\nthe"
    (warning,) = only_its_own
    assert "は 猫 私" in warning and "such as \\u306f" in warning and "fonts-noto-cjk" in warning
    fig = viz.matrices_figure({"x": np.ones((2, 2))}, ["猫", "犬"], title="犬")
    viz.save_figure(fig, tmp_path / "matrices.svg")
    assert labels(fig) == ["\\u732b", "\\u72ac"]
    assert len(only_its_own) == 2 and "has 犬:" in only_its_own[1]  # the other is known


def test_many_missing_characters_are_counted(only_its_own):
    viz.attention_heatmap(np.eye(1), query_tokens=["".join(map(chr, range(0x4E00, 0x4E14)))])
    (warning,) = only_its_own
    assert "䷿" not in warning and "一" in warning and "and 8 more: " in warning


def test_an_installed_font_that_has_them_is_used(installed, monkeypatch, tmp_path):
    own = [font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    path = a_font_of("猫", "A Japanese font", tmp_path / "japanese.ttf")
    said = installed([*own, font_manager.FontEntry(fname=str(path), name="A Japanese font")])
    monkeypatch.setattr(fonts, "FALLBACKS", ("One that is not installed", "A Japanese font"))
    fig = viz.attention_heatmap(np.eye(2), query_tokens=["猫", "naïve"], title="猫")
    viz.save_figure(fig, tmp_path / "map.png")
    assert fonts.families() == ("DejaVu Sans", "A Japanese font")
    assert labels(fig) == ["猫", "naïve"] and said == []


def a_font_of(character, name, path):
    """A font that draws one character, as a box."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in [(100, 800), (900, 800), (900, 0)]:
        pen.lineTo(corner)
    pen.closePath()
    glyphs = [".notdef", "box"]
    font = FontBuilder(unitsPerEm=1000)
    font.setupGlyphOrder(glyphs)
    font.setupCharacterMap({ord(character): "box"})
    font.setupGlyf(dict.fromkeys(glyphs, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 100)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": name, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return path


def test_a_token_in_a_table_does_not_depend_on_fonts(only_its_own):
    assert viz.visible("猫 🙂\n") == "猫␣🙂⏎" and only_its_own == []


@pytest.mark.parametrize(("text", "width"), [
    ("cat", 3), ("猫", 2), ("ﾈｺ", 2), ("ｶ", 1), ("Ａ", 2), ("🙂", 2), ("e\u0301", 1), ("", 0),
])  # fmt: skip
def test_a_text_is_as_wide_as_a_terminal_draws_it(text, width):
    cells = pytest.importorskip("rich.cells")
    assert fonts.columns(text) == width == cells.cell_len(text)
