"""Sums modulo p: each is right, shown or held out for good, and comes once an epoch."""

import numpy as np
import pytest

from qkv_jax import data

P, B = 7, 5
SIZES = {"batch_size": B, "context": 3, "vocab_size": P + 1, "validation_fraction": 0.4}
SHOWN = 29  # 49 * 0.6 = 29.4


def rows(step, stream=data.TRAINING, **other):
    """The pairs of a batch that count, each with its sum."""
    batch = data.modular_addition(**({"seed": 3, "step": step, "stream": stream} | SIZES | other))
    inputs, targets, weights = batch.values()
    assert (inputs[:, 2] == P).all() and (weights[:, :2] == 0).all()
    np.testing.assert_array_equal(targets[:, 2], inputs[:, :2].sum(-1) % P)
    return [tuple(pair) for pair in inputs[weights[:, 2] == 1, :2].tolist()]


def test_every_sum_is_shown_or_held_out_and_never_both():
    epoch = [pair for step in range(SHOWN) for pair in rows(step)]  # five epochs
    shown = set(epoch)
    held_out = [pair for step in range(5) for pair in rows(step, data.EVALUATION)]
    assert len(shown) == SHOWN and len(held_out) == len(set(held_out)) == P * P - SHOWN
    assert shown | set(held_out) == {(a, b) for a in range(P) for b in range(P)}
    assert rows(5, data.EVALUATION) == []  # all have come
    assert all(epoch.count(pair) == 5 for pair in shown)


def test_each_epoch_has_an_order_of_its_own_and_the_full_batch_is_one():
    full = [rows(step, batch_size=SHOWN) for step in range(2)]
    assert set(full[0]) == set(full[1]) and full[0] != full[1]
    assert [pair for step in range(6) for pair in rows(step)][:SHOWN] == full[0]


def test_what_is_held_out_depends_on_the_seed_alone():
    held_out = rows(0, data.EVALUATION)
    assert rows(0, data.TEST) == held_out
    assert rows(0, data.EVALUATION, seed=4) != held_out


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"context": 4}, "context is 4; wanted 3"),
        ({"vocab_size": 2}, "vocab_size is 2; wanted at least 3"),
        ({"validation_fraction": 0.001}, "validation_fraction is 0.001; .* of 49"),
        ({"validation_fraction": 0.999}, "validation_fraction is 0.999"),
        ({"batch_size": SHOWN + 1}, "batch_size is 30; wanted at most 29"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        rows(0, **sizes)
