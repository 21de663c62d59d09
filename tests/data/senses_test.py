"""Batches of sentences: the labels are right, nothing but the deciding words tells a sense."""

import numpy as np
import pytest

from qkv_jax import data
from qkv_jax.data.grammar import IDS, KINDS, SENSE_NAMES, SENSES, WORDS
from qkv_jax.data.senses import farthest

SIZES = {"batch_size": 37, "context": 18}


def test_a_row_is_a_sentence_with_the_label_of_its_ambiguous_word():
    batch = data.sentences(seed=3, step=11, **SIZES)
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "tokens": ((37, 18), "int32"), "lengths": ((37,), "int32"), "places": ((37,), "int32"),
        "senses": ((37,), "int32"), "distances": ((37,), "int32"),
    }  # fmt: skip
    seen = 0
    for tokens, length, place, sense, distance in zip(*batch.values(), strict=True):
        assert not tokens[length:].any() and WORDS[tokens[length - 1]] in (".", "。")
        words = [WORDS[token] for token in tokens]
        if place < 0:
            assert sense == distance == -1 and not set(words) & set(SENSES)
            continue
        seen += 1
        word, name = SENSE_NAMES[sense]
        assert words[place] == word and 1 <= distance <= farthest(18) == 7
        assert sum(other in SENSES[word][name] for other in words) == 2
    assert 10 <= seen <= 28


def test_a_batch_is_a_function_of_seed_step_and_stream():
    for rows in (data.sentences, data.masked_sentences):
        first = next(iter(rows(seed=3, step=11, **SIZES).values()))
        np.testing.assert_array_equal(
            next(iter(rows(seed=3, step=11, **SIZES).values())), first
        )  # fmt: skip
        for other in (
            {"seed": 4},
            {"step": 12},
            {"stream": data.EVALUATION},
            {"stream": data.TEST},
        ):
            found = next(iter(rows(**({"seed": 3, "step": 11} | SIZES | other)).values()))
            assert (found != first).any()


def test_words_and_senses_are_uniform_and_with_distances_tell_nothing_of_one_another():
    batch = data.sentences(seed=0, step=0, batch_size=6000, context=18)
    is_one = batch["senses"] >= 0
    np.testing.assert_allclose(is_one.mean(), 0.5, atol=0.02)
    words = [name for name, _ in SENSE_NAMES]
    for sense, word in enumerate(words):
        share = (batch["senses"][is_one] == sense).mean()
        np.testing.assert_allclose(share, 1 / 6 / words.count(word), atol=0.015)
    distances = batch["distances"][is_one]
    shares = [sum(1 / most for most in range(d, 8)) / 7 for d in range(1, 8)]
    np.testing.assert_allclose(np.bincount(distances)[1:] / len(distances), shares, atol=0.02)
    shore, lender = (batch["senses"] == SENSE_NAMES.index(("bank", n)) for n in ("shore", "lender"))
    for name in ("lengths", "places", "distances"):
        np.testing.assert_allclose(batch[name][shore].mean(), batch[name][lender].mean(), atol=0.6)


def test_hidden_words_are_in_the_sentence_and_no_label_is_handed_on():
    masked = data.masked_sentences(seed=3, step=11, mask_rate=0.3, **SIZES)
    rows = data.sentences(seed=3, step=11, **SIZES)
    assert masked.keys() == {"inputs", "targets", "weights", "lengths"}
    np.testing.assert_array_equal(masked["targets"], rows["tokens"])
    real = np.arange(18) < rows["lengths"][:, None]
    chosen = masked["weights"] == 1
    assert not (chosen & ~real).any()
    np.testing.assert_array_equal(chosen.sum(1), np.rint(0.3 * rows["lengths"]))
    assert (masked["inputs"] == masked["targets"])[~chosen].all()


def test_half_of_the_chosen_words_are_hidden_and_most_others_replaced_by_their_kind():
    masked = data.masked_sentences(seed=3, step=11, mask_rate=0.3, batch_size=2000, context=18)
    chosen = masked["weights"] == 1
    inputs, targets = masked["inputs"][chosen], masked["targets"][chosen]
    hidden = inputs == len(WORDS)
    np.testing.assert_allclose(hidden.mean(), 0.5, atol=0.02)
    kind = {word: i for i, of in enumerate(KINDS) for word in of}
    kinds = np.array([kind[word] for word in WORDS])
    assert (kinds[inputs[~hidden]] == kinds[targets[~hidden]]).all()
    bank = ~hidden & (targets == IDS["bank"])
    (spoken,) = (of for of in KINDS if "bank" in of)
    # Replaced by any of its kind, itself among them, or not at all.
    stays = (0.1 + 0.4 / len(spoken)) / 0.5
    np.testing.assert_allclose((inputs[bank] == IDS["bank"]).mean(), stays, atol=0.15)
    assert len(set(inputs[bank])) > 4


def test_most_sentences_of_the_test_do_not_occur_in_training():
    def rows(number, stream):
        batch = data.sentences(seed=0, step=0, batch_size=number, context=24, stream=stream)
        return {row.tobytes() for row in batch["tokens"][batch["distances"] >= 3]}

    trained, new = rows(20_000, data.TRAINING), rows(500, data.TEST)
    assert len(new - trained) / len(new) > 0.95


def test_a_context_that_holds_no_sentence_is_refused():
    with pytest.raises(ValueError, match="context is 7; wanted at least 8"):
        data.sentences(seed=0, step=0, batch_size=2, context=7)
    assert IDS["."] == 0 and farthest(8) == 2
