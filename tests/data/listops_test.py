"""ListOps: rows say what an independent reader of them computes, as often as the rule has it."""

import statistics

import numpy as np
import pytest

from qkv_jax import data
from qkv_jax.data.listops import TOKENS

STEP = {"seed": 5, "step": 2}
SIZES = {"context": 60, "min_length": 7, "max_depth": 5, "max_args": 6}
RULES = {
    "MIN": min, "MAX": max, "MED": lambda args: int(statistics.median(args)),
    "SM": lambda args: sum(args) % 10,
}  # fmt: skip


def read(words):
    """The value of the expression that the words begin with, and its greatest depth."""
    word = words.pop(0)
    if word.isdigit():
        return int(word), 1
    arguments, depths = [], []
    while words[0] != "X":
        value, depth = read(words)
        arguments.append(value)
        depths.append(depth)
    words.pop(0)
    assert 2 <= len(arguments) <= SIZES["max_args"]
    return RULES[word](arguments), 1 + max(depths)


def test_every_row_is_an_expression_and_its_value():
    batch = data.listops(**STEP, batch_size=300, **SIZES)
    depths, lengths = set(), set()
    for inputs, target, length in zip(*batch.values(), strict=True):
        words = [TOKENS[token] for token in inputs]
        assert words[0] == "CLS" and set(words[length:]) <= {"PAD"}
        expression = words[1:length]
        assert 7 <= len(expression) <= 59
        value, depth = read(expression)
        assert expression == [] and value == target
        depths.add(depth)
        lengths.add(length)
    assert max(depths) == 5 and len(lengths) > 25


def naive(random, depth):
    """The length of an expression, drawn as the arena's generator does."""
    if depth == SIZES["max_depth"] or random.random() > 0.25:
        return 1
    return 2 + sum(naive(random, depth + 1) for _ in range(random.randint(2, 7)))


def test_lengths_and_operators_are_as_frequent_as_in_the_arenas_recursion():
    batch = data.listops(**STEP, batch_size=4000, **SIZES)
    random = np.random.RandomState(0)
    lengths = [n for n in (naive(random, 1) for _ in range(40_000)) if 7 <= n <= 59]
    quantiles = np.linspace(0.1, 0.9, 9)
    ours = np.quantile(batch["lengths"] - 1, quantiles)
    assert np.abs(ours - np.quantile(lengths, quantiles)).max() <= 2.5
    roots = np.bincount(batch["inputs"][:, 1], minlength=14)[10:] / 4000
    assert np.abs(roots - 0.25).max() < 0.03
    digits = np.bincount(batch["inputs"][batch["inputs"] < 10], minlength=10)
    assert np.abs(digits / digits.sum() - 0.1).max() < 0.005


def test_a_batch_is_a_function_of_seed_step_and_stream():
    batch = data.listops(**STEP, batch_size=7, **SIZES)
    again = data.listops(**STEP, batch_size=7, **SIZES)
    assert all((batch[name] == again[name]).all() for name in batch)
    for other in ({"seed": 4}, {"step": 12}, {"stream": data.TEST}):
        inputs = data.listops(**(STEP | other), batch_size=7, **SIZES)["inputs"]
        assert (inputs != batch["inputs"]).any(-1).all()
    assert [(x.dtype.name, x.shape) for x in batch.values()] == [
        ("int32", (7, 60)), ("int32", (7,)), ("int32", (7,)),
    ]  # fmt: skip


def test_the_arenas_own_lengths_can_be_drawn():
    batch = data.listops(
        **STEP, batch_size=3, context=2001, min_length=500, max_depth=10, max_args=10
    )
    assert (batch["lengths"] > 500).all() and (batch["lengths"] <= 2001).all()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"min_length": 3}, r"min_length is 3; wanted 4 \.\.\. 59"),
        ({"min_length": 60}, r"min_length is 60; wanted 4 \.\.\. 59"),
        ({"max_depth": 2, "min_length": 9}, r"min_length is 9; wanted 4 \.\.\. 8: .*max_depth = 2"),
        ({"max_depth": 1}, "max_depth and max_args are 1 and 6"),
        ({"max_args": 1}, "max_depth and max_args are 5 and 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        data.listops(**STEP, batch_size=1, **(SIZES | fields))
