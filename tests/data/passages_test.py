"""Passages: where they are from, how often, and that two of one text do not overlap."""

import numpy as np
import pytest

from qkv_jax import data
from qkv_jax.data.passages import CLS, to_bytes

STEP = {"seed": 5, "step": 2}
# No byte is in two texts or twice in one, so that each tells its text and its place.
TEXTS = [np.arange(start, end, dtype=np.uint8) for start, end in ((0, 13), (13, 60), (60, 77))]


def test_a_passage_is_from_the_text_that_its_class_says():
    batch = data.which_document(TEXTS, **STEP, batch_size=500, context=12)
    seen = set()
    for inputs, target in zip(*batch.values(), strict=True):
        assert inputs[0] == CLS and (np.diff(inputs[1:]) == 1).all()
        assert {inputs[1], inputs[-1]} <= set(TEXTS[target].tolist())
        seen.add((int(target), int(inputs[1])))
    starts = {(i, int(text[0]) + n) for i, text in enumerate(TEXTS) for n in range(len(text) - 10)}
    assert seen == starts  # every place of every text
    counts = np.bincount(batch["targets"]) / 500
    assert np.abs(counts - 1 / 3).max() < 0.07


def test_two_passages_are_of_one_text_without_overlap_or_of_two():
    batch = data.same_document(TEXTS, **STEP, batch_size=600, context=13)
    firsts, later = set(), 0
    for inputs, segments, target in zip(*batch.values(), strict=True):
        a, b = inputs[1:7], inputs[7:]
        assert segments.tolist() == [0] * 7 + [1] * 6
        assert (np.diff(a) == 1).all() and (np.diff(b) == 1).all()
        of = [next(i for i, text in enumerate(TEXTS) if x[0] in text) for x in (a, b)]
        assert (of[0] == of[1]) == target
        if target:
            assert abs(a[0] - b[0]) >= 6
            firsts.add(of[0])
            later += a[0] > b[0]
    assert firsts == {0, 1, 2}
    assert 0.43 < batch["targets"].mean() < 0.57
    assert 0.4 < later / batch["targets"].sum() < 0.6  # either may come first


@pytest.mark.parametrize("generate", [data.which_document, data.same_document])
def test_a_batch_is_a_function_of_seed_step_and_stream(generate):
    sizes = {"batch_size": 5, "context": 7}
    batch = generate(TEXTS, **STEP, **sizes)
    np.testing.assert_array_equal(generate(TEXTS, **STEP, **sizes)["inputs"], batch["inputs"])
    for other in ({"seed": 4}, {"step": 12}, {"stream": data.TEST}):
        assert (generate(TEXTS, **(STEP | other), **sizes)["inputs"] != batch["inputs"]).any()
    assert all(array.dtype == np.int32 for array in batch.values())
    assert batch["inputs"].shape == (5, 7) and batch["targets"].shape == (5,)


@pytest.mark.parametrize(
    "generate, texts, context, words",
    [
        (data.which_document, TEXTS[:1], 4, "texts: wanted at least 2"),
        (data.which_document, TEXTS, 15, "the shortest has 13 bytes; a row takes 14"),
        (data.which_document, TEXTS, 1, "context is 1"),
        (data.same_document, TEXTS, 12, "context is 12; wanted an odd number"),
        (data.same_document, TEXTS, 15, "the shortest has 13 bytes; a row takes 14"),
        (data.same_document, TEXTS, 1, "context is 1"),
    ],
)
def test_what_does_not_fit_is_refused(generate, texts, context, words):
    with pytest.raises(ValueError, match=words):
        generate(texts, **STEP, batch_size=1, context=context)


def test_a_text_becomes_its_utf8_bytes():
    assert to_bytes("aé").tolist() == [97, 195, 169]
