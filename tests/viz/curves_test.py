"""Loss curves: the logged numbers, the best validation loss, and the floors."""

import itertools
import math

import pytest

from qkv_jax import viz
from qkv_jax.viz import style

ROWS = [
    {"step": 10, "loss": 4.0},
    {"step": 20, "loss": 3.0},
    {"step": 20, "validation_loss": 3.5},
    {"event": "resumed"},
    {"step": 30, "loss": 2.0},
    {"step": 1040, "loss": 1.5, "validation_loss": 1.875},
    {"step": 2050, "validation_loss": 2.5},
]


def line(fig, color, kind="-"):
    (found,) = (
        line
        for line in fig.axes[0].lines
        if line.get_color() == color and line.get_linestyle() == kind
    )
    return list(found.get_xdata()), list(found.get_ydata())


def texts(fig):
    legend = fig.axes[0].get_legend()
    return [text.get_text() for text in [*fig.axes[0].texts, *legend.get_texts()]]


def test_training_and_validation_losses_are_drawn_over_their_steps():
    fig = viz.loss_curve(ROWS, title="run")
    assert line(fig, style.LIGHT_BLUE) == ([10, 20, 30, 1040], [4.0, 3.0, 2.0, 1.5])
    assert line(fig, style.ORANGE) == ([20, 1040, 2050], [3.5, 1.875, 2.5])
    assert fig.axes[0].get_title(loc="left") == "run"
    assert fig.axes[0].get_ylabel() == "loss (nats per token)"


def test_the_best_validation_loss_is_ringed_and_named():
    fig = viz.loss_curve(ROWS)
    assert line(fig, style.ORANGE, "None") == ([1040], [1.875])
    assert "validation, best 1.875 at step 1,040" in texts(fig)


def test_floors_are_named_lines_that_fit_into_the_picture():
    fig = viz.loss_curve(ROWS, floors={"uniform": 4.6, "bigram": 2.45, "nearly bigram": 2.46})
    drawn = [line.get_ydata()[0] for line in fig.axes[0].lines if line.get_color() == style.MUTED]
    assert sorted(drawn) == [2.45, 2.46, 4.6]
    assert {"uniform 4.60", "bigram 2.45", "nearly bigram 2.46"} <= set(texts(fig))
    low, high = fig.axes[0].get_ylim()
    assert low < 1.5 and high > 4.6
    heights = sorted(text.xy[1] for text in fig.axes[0].texts)
    assert min(upper - lower for lower, upper in itertools.pairwise(heights)) > 0.1


def test_a_step_logged_twice_counts_the_last_time():
    rows = [{"step": 2, "loss": 9.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    assert line(viz.loss_curve(rows), style.LIGHT_BLUE) == ([1, 2], [3.0, 2.0])


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "loss": 2.0}],
        [{"step": 1, "validation_loss": 2.0}, {"step": 2, "validation_loss": math.nan}],
        [{"step": 1, "loss": math.inf}, {"step": 2, "loss": 1.0}],
        [{"step": 1, "loss": 1.0}, {"step": 2, "validation_loss": math.nan}],
    ],
)
def test_short_and_damaged_runs_are_drawn_without_a_warning(rows, tmp_path):
    viz.save_figure(viz.loss_curve(rows), tmp_path / "loss.png")


@pytest.mark.parametrize("rows", [[], [{"step": 1}], [{"step": 1, "loss": math.nan}]])
def test_rows_without_a_loss_are_a_value_error(rows):
    with pytest.raises(ValueError, match="rows must hold"):
        viz.loss_curve(rows)
