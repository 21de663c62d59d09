"""Attention maps: what is drawn is what was given, readable for any token."""

import numpy as np
import pytest

from qkv_jax import viz
from qkv_jax.viz import style


def causal_weights(num_heads, num_tokens, seed=0):
    exps = np.tril(np.exp(np.random.RandomState(seed).randn(num_heads, num_tokens, num_tokens)))
    return exps / exps.sum(-1, keepdims=True)


def maps(fig):
    return [ax for ax in fig.axes if ax.images]


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_a_map_shows_the_weights_with_queries_down_and_keys_across():
    weights = np.random.RandomState(0).rand(3, 5)
    fig = viz.attention_heatmap(
        weights, query_tokens=list("abc"), key_tokens=list("defgh"), title="layer 0"
    )
    (ax,) = maps(fig)
    assert (ax.images[0].get_array() == weights).all()
    assert labels(ax.yaxis) == list("abc")
    assert labels(ax.xaxis) == list("defgh")
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("layer 0", "key", "query")


def test_keys_have_the_labels_of_the_queries_where_the_lengths_agree():
    fig = viz.attention_heatmap(causal_weights(1, 3)[0], query_tokens=list("abc"))
    assert labels(maps(fig)[0].xaxis) == list("abc")


def test_a_map_can_be_drawn_into_given_axes():
    fig = style.new_figure(4, 2)
    axes = fig.subplots(1, 2)
    assert viz.attention_heatmap(causal_weights(1, 3)[0], ax=axes[1]) is fig
    assert [len(ax.images) for ax in axes] == [0, 1]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 7])
def test_all_heads_share_one_colour_scale_from_zero_to_the_largest_weight(num_heads):
    weights = causal_weights(num_heads, 7) * np.linspace(0.2, 0.9, num_heads)[:, None, None]
    drawn = maps(viz.heads_figure(weights, list("abcdefg")))
    assert len(drawn) == num_heads
    for head, ax in enumerate(drawn):
        assert ax.get_title() == f"head {head}"
        assert (ax.images[0].get_array() == weights[head]).all()
        assert ax.images[0].norm.vmin == 0
        assert ax.images[0].norm.vmax == weights.max()


def test_labels_stand_on_the_outer_edge_of_the_grid_of_heads():
    drawn = maps(viz.heads_figure(causal_weights(5, 7), list("abcdefg"), num_columns=3))
    visible_on_y = [ax.yaxis.get_tick_params()["labelleft"] for ax in drawn]
    visible_on_x = [ax.xaxis.get_tick_params()["labelbottom"] for ax in drawn]
    assert visible_on_y == [True, False, False, True, False]
    assert visible_on_x == [False, False, True, True, True]


def test_tokens_that_cannot_be_read_are_made_visible():
    assert viz.visible(" the") == "␣the"
    assert viz.visible("a\n\tb") == "a⏎⇥b"
    assert viz.visible("\x00\x7f") == "\\x00\\x7f"
    assert viz.visible("\ufffd\ue000") == "\ufffd\\ue000"
    assert viz.visible("naïve ∑") == "naïve␣∑"


@pytest.mark.parametrize(
    "tokens",
    [["\n", " ", "\t"], ["$", "$x$", "a$b$"], ["日本", "\ud800", "🙂"], ["", "$_^{$", "%"]],
)
def test_any_token_is_drawn_without_a_warning(tokens, tmp_path):
    fig = viz.attention_heatmap(causal_weights(1, 3)[0], query_tokens=tokens, title="$x$")
    viz.save_figure(fig, tmp_path / "map.png")
    viz.save_figure(fig, tmp_path / "map.svg")


def test_tokens_too_many_to_read_are_counted_instead(tmp_path):
    fig = viz.heads_figure(causal_weights(2, 211), ["token"] * 211)
    fig.draw_without_rendering()
    (ax, _) = maps(fig)
    assert "token" not in labels(ax.yaxis)
    assert 2 < len(labels(ax.yaxis)) < 20


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: viz.attention_heatmap(np.ones(3)), r"weights must have shape \[T, S\].*\(3,\)"),
        (lambda: viz.attention_heatmap(np.ones((0, 3))), r"weights must have.*\(0, 3\)"),
        (lambda: viz.heads_figure(np.ones((3, 3))), r"weights must have shape \[N, T, S\]"),
        (lambda: viz.attention_heatmap(np.full((2, 3), np.nan)), "weights must be finite"),
        (lambda: viz.attention_heatmap(-np.ones((2, 3))), "not negative"),
        (lambda: viz.attention_heatmap(np.ones((2, 3)), query_tokens="abc"), "query.*2.*got 3"),
        (lambda: viz.heads_figure(np.ones((1, 2, 3)), "ab", key_tokens="ab"), "key.*3.*got 2"),
    ],
)
def test_bad_input_is_a_value_error_that_says_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_maps_that_are_no_heads_have_names():
    fig = viz.heads_figure(np.ones((2, 3, 5)), names=["one", "other"])
    assert [ax.get_title() for ax in fig.axes[:2]] == ["one", "other"]
    with pytest.raises(ValueError, match=r"names: 2 wanted, for shape \(2, 3, 5\); got 1"):
        viz.heads_figure(np.ones((2, 3, 5)), names=["one"])
