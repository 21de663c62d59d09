"""A loss that jumps and stays up stops a run; noise, and a single bad batch, do not."""

import random

import pytest

from qkv_jax.training import LossSpikeError, LossSpikes
from qkv_jax.training.spikes import PATIENCE, WINDOW


def losses_of(number, seed=0):
    """Losses that fall from 7 to 2, with noise."""
    noise = random.Random(seed).gauss
    return [2 + 5 * 0.99**step + noise(0, 0.1) for step in range(number)]


def see_all(spikes, losses, start=0, **options):
    for step, loss in enumerate(losses, start + 1):
        spikes.see(step, loss, **options)


def test_a_falling_noisy_loss_with_single_outliers_is_no_spike():
    losses = losses_of(1000)
    for step in range(0, 1000, PATIENCE):
        losses[step : step + PATIENCE - 1] = [20.0] * (PATIENCE - 1)  # one short each time
    spikes = LossSpikes(2.0, losses_of(WINDOW))
    see_all(spikes, losses)


def test_a_loss_that_stays_up_is_named_with_its_step_and_the_median_from_before():
    spikes = LossSpikes(2.0)
    see_all(spikes, [3.0] * 299 + [6.5] * (PATIENCE - 1))
    assert spikes.suspected
    with pytest.raises(LossSpikeError) as raised:
        spikes.see(304, 6.25, lambda: [100, 200, 297])
    assert str(raised.value) == (
        "step 304: the loss is 6.25, and since step 300 more than 2 times the recent median, 3; "
        "stopped without saving it. The last checkpoint from before is 297: go on from there with "
        "a smaller learning rate."
    )


def test_a_checkpoint_that_the_first_of_the_losses_is_of_is_not_from_before():
    def said(saved):
        with pytest.raises(LossSpikeError) as raised:
            see_all(LossSpikes(2.0, [3.0] * WINDOW), [9.0] * PATIENCE, 40, saved=lambda: saved)
        return str(raised.value)

    assert "from before is 39: go on" in said([38, 39])
    assert "from before is 38: remove 40, 42 to go on from there" in said([38, 40, 42])
    assert "No checkpoint is from before" in said([40]) and "No checkpoint" in said([])


def test_a_loss_that_comes_down_again_is_suspected_no_more():
    spikes = LossSpikes(1.5, [1.0] * WINDOW)
    spikes.see(1, 1.5)
    assert not spikes.suspected
    spikes.see(2, 1.51)
    assert spikes.suspected
    spikes.see(3, 1.0)
    assert not spikes.suspected


def test_no_loss_is_judged_before_there_are_enough_and_those_from_before_count():
    see_all(LossSpikes(2.0), [1.0] * (WINDOW - 1) + [9.0] + [1.0] * 9)
    see_all(LossSpikes(2.0, [1.0] * (WINDOW - 10)), [9.0] * 10)
    with pytest.raises(LossSpikeError):
        see_all(LossSpikes(2.0, [1.0] * (3 * WINDOW)), [9.0] * PATIENCE)


def test_a_loss_that_stays_at_zero_is_no_outlier():
    see_all(LossSpikes(2.0), [0.0] * 300)


def test_a_factor_of_zero_never_stops():
    spikes = LossSpikes(0.0, [1.0] * WINDOW)
    see_all(spikes, [1e9] * 50)
    assert not spikes.suspected
