"""The matrices of a computation: every value is written in its cell."""

import numpy as np
import pytest

from qkv_jax import viz


def written(ax):
    """The texts of the cells, row by row."""
    columns = int(ax.get_xlim()[1] + 0.5)
    texts = [text.get_text() for text in ax.texts if text.get_fontsize() == 7.5]
    return [texts[i : i + columns] for i in range(0, len(texts), columns)]


def test_every_matrix_is_drawn_in_order_with_its_name_shape_and_numbers():
    matrices = {"x": [[1.0, -2.345], [0.0, 123.4]], "weights": np.array([[0.25, 0.5, 0.25]])}
    fig = viz.matrices_figure(matrices, ["the", "cat"], title="a lesson")
    first, second = fig.axes
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["x", "weights"]
    assert "2 × 2" in [text.get_text() for text in first.texts]
    assert "1 × 3" in [text.get_text() for text in second.texts]
    assert written(first) == [["1.00", "−2.35"], ["0", "123"]]
    assert written(second) == [["0.25", "0.50", "0.25"]]
    assert fig.texts[0].get_text() == "a lesson"


def test_rows_are_tokens_and_columns_too_where_they_stand_for_keys():
    matrices = {"x": np.ones((2, 3)), "scores": np.ones((2, 2))}
    fig = viz.matrices_figure(matrices, ["the", " cat"], over_keys=["scores"])
    x, scores = fig.axes
    for ax in (x, scores):
        assert [label.get_text() for label in ax.get_yticklabels()] == ["the", "␣cat"]
    assert [label.get_text() for label in scores.get_xticklabels()] == ["the", "␣cat"]
    assert [label.get_text() for label in x.get_xticklabels()] == ["0", "1", "2"]


@pytest.mark.parametrize(("tokens", "turned"), [
    (["the", "cat"], 0), (["a", "食べ"], 0), (["the", "kitten"], 90), (["a", "食べる"], 90),
])  # fmt: skip
def test_columns_tokens_are_turned_where_one_is_wider_than_a_cell(tokens, turned):
    (ax,) = viz.matrices_figure({"scores": np.ones((2, 2))}, tokens, over_keys=["scores"]).axes
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {turned}
    upright = viz.matrices_figure({"x": np.ones((2, 2))}, tokens)
    taller = ax.figure.get_size_inches()[1] > upright.get_size_inches()[1]
    assert taller == (turned == 90)


def test_masks_and_hidden_scores_are_drawn_as_such(tmp_path):
    matrices = {
        "mask": np.array([[True, False]]),
        "masked": [[1.0, -np.inf]],
        "all hidden": [[-np.inf, -np.inf]],
    }
    fig = viz.matrices_figure(matrices)
    assert [written(ax) for ax in fig.axes] == [[["1", ""]], [["1.00", "−∞"]], [["−∞", "−∞"]]]
    viz.save_figure(fig, tmp_path / "matrices.png")


def test_matrices_that_do_not_fit_the_line_start_a_new_one():
    fig = viz.matrices_figure({str(i): np.ones((2, 7)) for i in range(5)})
    tops = [ax.get_position().y1 for ax in fig.axes]
    assert len(set(np.round(tops, 6))) > 1
    assert all(ax.get_position().x1 <= 1 and ax.get_position().y0 >= 0 for ax in fig.axes)


def test_a_large_matrix_is_drawn_without_numbers():
    (ax,) = viz.matrices_figure({"x": np.ones((17, 3))}).axes
    assert written(ax) == []


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: viz.matrices_figure({}), "at least one"),
        (lambda: viz.matrices_figure({"x": np.ones(3)}), r"matrices\['x'\].*\(3,\)"),
        (lambda: viz.matrices_figure({"x": [[1.0]]}, over_keys=["y"]), r"over_keys.*\['y'\]"),
    ],
)
def test_bad_input_is_a_value_error_that_says_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
