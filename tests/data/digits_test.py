"""Digits: scikit-learn's images as rows, the last of them never among those trained on."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from qkv_jax import data

DRAW = {"seed": 5, "context": 65, "validation_fraction": 0.2}
IMAGES = {
    tuple(row): (int(target), number)
    for number, (row, target) in enumerate(
        zip(*(x.astype(int) for x in load_digits(return_X_y=True)), strict=True)
    )
}


def test_rows_are_images_with_their_digits_from_the_part_of_their_stream():
    numbers = {}
    for stream in (data.TRAINING, data.EVALUATION, data.TEST):
        batch = data.digits(**DRAW, step=3, batch_size=400, stream=stream)
        assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
        assert batch["inputs"].shape == (400, 65) and (batch["inputs"][:, 0] == 17).all()
        found = [IMAGES[tuple(row)] for row in batch["inputs"][:, 1:]]
        assert [target for target, _ in found] == batch["targets"].tolist()
        numbers[stream] = [number for _, number in found]
    first = int(1797 * 0.8)
    assert max(numbers[data.TRAINING]) < first <= min(numbers[data.TEST])
    assert min(numbers[data.EVALUATION]) >= first
    assert len(set(numbers[data.TRAINING])) > 300
    assert numbers[data.EVALUATION] != numbers[data.TEST]


def test_a_batch_is_a_function_of_seed_and_step():
    batch = data.digits(**DRAW, step=3, batch_size=9)
    np.testing.assert_array_equal(
        data.digits(**DRAW, step=3, batch_size=9)["inputs"], batch["inputs"]
    )
    for other in ({"seed": 6}, {"step": 4}):
        inputs = data.digits(**(DRAW | {"step": 3} | other), batch_size=9)["inputs"]
        assert (inputs != batch["inputs"]).any()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"context": 64}, "context is 64; wanted 65"),
        ({"validation_fraction": 0.9999}, "validation_fraction is 0.9999"),
    ],
)
def test_what_does_not_fit_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        data.digits(**(DRAW | fields), step=0, batch_size=1)
