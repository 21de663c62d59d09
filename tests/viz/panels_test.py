"""Panels with lines: everything given is drawn, in one colour a name, under one legend."""

import numpy as np
import pytest

from qkv_jax import viz
from qkv_jax.viz import Panel

LINES = {"ours": [(8, 0.5, 0.1), (2, 0.25, 0.0)], "other": [(2, 0.75, 0.0)]}


def test_points_are_drawn_in_order_and_a_name_has_one_colour():
    panels = [Panel("a", LINES, "width"), Panel("b", {"other": [(1, 2)]}, "N", {"chance": 0.1})]
    fig = viz.lines_figure(panels, y_label="accuracy", title="both", log_x=True, y_limits=(0, 1))
    left, right = fig.axes
    assert (left.get_title("left"), right.get_title("left")) == ("a", "b")
    assert (left.get_xlabel(), right.get_xlabel(), left.get_ylabel()) == ("width", "N", "accuracy")
    assert left.get_ylim() == (0, 1) and left.get_xscale() == "log"
    ours, other = (container.lines[0] for container in left.containers)
    np.testing.assert_array_equal(ours.get_xydata(), [[2, 0.25], [8, 0.5]])
    assert other.get_color() == right.containers[0].lines[0].get_color() != ours.get_color()
    (legend,) = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ours", "other"]
    assert [text.get_text() for text in right.texts] == ["chance"]


@pytest.mark.parametrize(
    "xs, log_x, ticks",
    [
        ((2, 8), True, ["2", "8"]),
        ((0, 1, 2), False, ["0", "1", "2"]),
        ((1, 1.976, 4096), True, ["1", "2", "4096"]),
    ],
)
def test_a_few_values_of_x_have_a_tick_each(xs, log_x, ticks):
    panel = Panel("a", {"ours": [(x, 0.5) for x in xs]}, "x")
    (ax,) = viz.lines_figure([panel], y_label="y", log_x=log_x).axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ticks


def test_no_two_of_many_names_look_alike():
    panel = Panel("a", {f"{i}": [(1, i)] for i in range(20)}, "x")
    (ax,) = viz.lines_figure([panel], y_label="y").axes
    looks = [container.lines[0] for container in ax.containers]
    assert len({(line.get_color(), line.get_marker()) for line in looks}) == 20


def test_more_than_four_panels_stand_in_rows_and_each_row_says_what_y_is():
    panels = [Panel(f"{i}", {"ours": [(1, 0.5)]}, "x") for i in range(5)]
    *used, unused = viz.lines_figure(panels, y_label="y").axes
    assert [ax.get_title("left") for ax in used] == list("01234") and not unused.axison
    assert [ax.get_ylabel() for ax in used] == ["y", "", "", "y", ""]
    assert [ax.get_subplotspec().rowspan.start for ax in used] == [0, 0, 0, 1, 1]


def test_logarithmic_ticks_leave_room_for_their_numbers():
    panel = Panel("a", {"ours": [(2**i, 0.5) for i in range(8, 17)]}, "x")
    (ax,) = viz.lines_figure([panel], y_label="y", log_x=True).axes
    low, high = ax.get_xlim()
    assert 2 <= sum(low <= tick <= high for tick in ax.get_xticks()) <= 4


@pytest.mark.parametrize("panels", [[], [Panel("empty", {}, "x")]])
def test_nothing_to_draw_is_refused(panels):
    with pytest.raises(ValueError, match="panels: wanted at least one, each with a line or a mark"):
        viz.lines_figure(panels, y_label="y")


def test_a_line_of_many_points_has_no_markers_and_marks_stand_at_their_place():
    curve = [(x, x / 40) for x in range(1, 41)]
    panel = Panel("a", {"curve": curve, **LINES}, "steps", marks={"here": 10})
    fig = viz.lines_figure([panel], y_label="y", log_x=True, log_base=10)
    (ax,) = fig.axes
    many, few, _ = (container.lines[0] for container in ax.containers)
    assert many.get_marker() == "" and few.get_marker() not in ("", "None")
    assert ax.xaxis.get_transform().base == 10
    assert ax.xaxis.get_major_formatter()(1000, 0) == "1,000"  # no mathematics is parsed
    assert [text.get_text() for text in ax.texts] == ["here"]
    assert any(line.get_xdata()[0] == line.get_xdata()[-1] == 10 for line in ax.lines)


def test_where_x_only_counts_its_ticks_are_words():
    fig = viz.lines_figure(
        [Panel("a", {"x": [(0, 1), (1, 2)]}, "", ticks={0: "first", 1: "second"})], y_label="y"
    )
    assert [label.get_text() for label in fig.axes[0].get_xticklabels()] == ["first", "second"]
