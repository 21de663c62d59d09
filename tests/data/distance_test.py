"""Cues in noise and copies: every row is as the docstring draws it."""

import numpy as np
import pytest

from qkv_jax import data

STEP = {"seed": 5, "step": 2}


def test_one_token_is_no_noise_and_the_last_asks_for_it():
    batch = data.cue(**STEP, batch_size=400, context=11, vocab_size=9)
    seen = set()
    for inputs, targets, weights, distances in zip(*batch.values(), strict=True):
        assert inputs[-1] == 0 and weights.tolist() == [0] * 10 + [1]
        (place,) = np.flatnonzero((inputs > 0) & (inputs < 4))
        assert targets.tolist() == [0] * 10 + [inputs[place]]
        assert distances.tolist() == [0] * 10 + [10 - place]
        seen.add((int(place), int(inputs[place])))
        assert (np.delete(inputs, place)[:-1] >= 4).all() and (inputs < 9).all()
    assert {place for place, _ in seen} == set(range(10))
    assert {symbol for _, symbol in seen} == {1, 2, 3}


@pytest.mark.parametrize("context", [13, 14])
def test_after_the_mark_the_same_symbols_are_wanted(context):
    batch = data.copying(**STEP, batch_size=300, context=context, vocab_size=5)
    lengths = set()
    for inputs, targets, weights, distances in zip(*batch.values(), strict=True):
        length = int(np.flatnonzero(inputs == 0)[0])
        lengths.add(length)
        row = inputs[:length].tolist()
        padding = context - 2 * length
        assert inputs.tolist() == row + [0] + row[:-1] + [0] * padding
        assert targets.tolist() == [0] * length + row + [0] * padding
        assert weights.tolist() == [0] * length + [1] * length + [0] * padding
        assert distances.tolist() == [0] * length + [length] * length + [0] * padding
    assert lengths == set(range(1, context // 2 + 1))


@pytest.mark.parametrize("generate", [data.cue, data.copying])
def test_a_batch_is_a_function_of_seed_step_and_stream(generate):
    sizes = {"batch_size": 3, "context": 20, "vocab_size": 30}
    batch = generate(**STEP, **sizes)
    np.testing.assert_array_equal(generate(**STEP, **sizes)["inputs"], batch["inputs"])
    for other in ({"seed": 4}, {"step": 12}, {"stream": data.TEST}):
        assert (generate(**(STEP | sizes | other))["inputs"] != batch["inputs"]).any()
    assert all(array.shape == (3, 20) for array in batch.values())
    assert [array.dtype.name for array in batch.values()] == ["int32", "int32", "float32", "int32"]


@pytest.mark.parametrize("generate, least", [(data.cue, 6), (data.copying, 3)])
def test_sizes_that_do_not_fit_are_refused(generate, least):
    with pytest.raises(ValueError, match="context is 1; wanted at least 2"):
        generate(**STEP, batch_size=1, context=1, vocab_size=9)
    with pytest.raises(ValueError, match=f"vocab_size is {least - 1}; wanted at least {least}"):
        generate(**STEP, batch_size=1, context=9, vocab_size=least - 1)
    generate(**STEP, batch_size=1, context=2, vocab_size=least)
