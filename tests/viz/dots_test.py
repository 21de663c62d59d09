"""Dots in rows: every number stands in its name's row, under one legend."""

import numpy as np
import pytest

from qkv_jax import viz
from qkv_jax.viz import Dots


def test_numbers_stand_in_the_row_of_their_name_and_a_series_has_one_look():
    panels = [
        Dots("a", {"ours": {"x": 0.5, "y": (0.25, 0.1)}, "paper": {"y": 0.75}}, "accuracy"),
        Dots("b", {"paper": {"z": 3.0}}, "ms", {"chance": 1.0}),
    ]
    fig = viz.dots_figure(panels, title="both")
    left, right = fig.axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["x", "y", "z"]
    assert left.yaxis_inverted()  # the first on top
    ours, paper = (container.lines[0] for container in left.containers)
    np.testing.assert_array_equal(ours.get_xydata(), [[0.5, 0], [0.25, 1]])
    np.testing.assert_array_equal(paper.get_xydata(), [[0.75, 1]])
    (other,) = (container.lines[0] for container in right.containers)
    np.testing.assert_array_equal(other.get_xydata(), [[3, 2]])
    assert other.get_color() == paper.get_color() != ours.get_color()
    (legend,) = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ours", "paper"]
    assert [text.get_text() for text in right.texts] == ["chance"]


@pytest.mark.parametrize("panels", [[], [Dots("empty", {"ours": {}}, "x")]])
def test_nothing_to_draw_is_refused(panels):
    with pytest.raises(ValueError, match="panels: wanted at least one, each with a number"):
        viz.dots_figure(panels)
