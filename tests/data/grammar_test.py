"""The grammar: each sense has words of its own, and sentences are what they claim."""

import itertools

import numpy as np
import pytest

from qkv_jax.data import grammar
from qkv_jax.data.grammar import SENSE_NAMES, SENSES, WORDS


def pick_of(seed):
    return grammar.picker(np.random.RandomState(seed).random_sample(500))


def test_every_word_that_decides_belongs_to_one_sense_and_is_nowhere_else():
    cues = [cue for senses in SENSES.values() for of_one in senses.values() for cue in of_one]
    assert len(set(cues)) == len(cues)
    rest = set(grammar.ENGLISH_ADJECTIVES + grammar.JAPANESE_ADJECTIVES) | set(SENSES)
    for habits in (grammar.ENGLISH_HABITS, grammar.JAPANESE_HABITS):
        rest |= set(habits) | {w for of in habits.values() for w in itertools.chain(*of)}
    assert not rest & set(cues)
    assert len(set(WORDS)) == len(WORDS) and set(cues) | rest <= set(WORDS)


def test_each_language_has_ambiguous_words_with_at_least_two_senses():
    for senses in (grammar.ENGLISH_SENSES, grammar.JAPANESE_SENSES):
        assert len(senses) >= 2 and all(len(of) >= 2 for of in senses.values())
    assert ("bank", "lender") in SENSE_NAMES and ("はし", "橋") in SENSE_NAMES


@pytest.mark.parametrize("seed", range(40))
def test_two_words_of_its_sense_stand_around_an_ambiguous_word_at_the_distance_that_is_said(seed):
    pick = pick_of(seed)
    sentence = next(
        of for of in iter(lambda: grammar.ambiguous_sentence(pick, 7), None) if of.place
    )
    word, sense = SENSE_NAMES[sentence.sense]
    assert sentence.words[sentence.place] == word
    (left, _), (right, _) = [
        (place, other) for place, other in enumerate(sentence.words) if other in SENSES[word][sense]
    ]
    assert left < sentence.place < right
    gaps = (sentence.place - left, right - sentence.place)
    assert min(gaps) == sentence.distance and min(gaps) >= 1 and max(gaps) <= 7
    others = {cue for of in SENSES.values() for cues in of.values() for cue in cues}
    assert sum(other in others for other in sentence.words) == 2
    assert len(sentence.words) <= grammar.longest_ambiguous(7)
    assert set(sentence.words) <= set(WORDS)


def test_the_word_for_a_sense_stands_where_the_ambiguous_word_does_in_a_third_of_sentences():
    found = [grammar.ambiguous_sentence(pick_of(seed), 4) for seed in range(900)]
    clear = [of for of in found if of.place is None]
    np.testing.assert_allclose(len(clear) / len(found), 1 / 3, atol=0.05)
    for sentence in clear:
        (sense,) = (of for of in SENSE_NAMES if of[1] in sentence.words)
        assert sum(word in SENSES[sense[0]][sense[1]] for word in sentence.words) == 2
        assert sense[0] not in sentence.words


def test_words_of_a_kind_are_those_that_may_stand_in_each_others_place():
    (spoken,) = (kind for kind in grammar.KINDS if "bank" in kind)
    assert {"bat", "shore", "lender", "coil"} <= set(spoken) and "river" not in spoken
    assert sorted(itertools.chain(*grammar.KINDS)) == sorted(WORDS)


def test_the_longest_sentence_is_as_long_as_is_said():
    lengths = [len(grammar.ambiguous_sentence(pick_of(seed), 3).words) for seed in range(300)]
    assert max(lengths) == grammar.longest_ambiguous(3)


def test_the_sentences_of_the_source_texts_are_among_the_plain_ones():
    plain = {grammar.plain_sentence(pick_of(seed)).words for seed in range(2000)}
    assert grammar.CAT in plain and grammar.WATASHI in plain
    assert all(set(words) <= set(WORDS) for words in plain)


def test_what_is_told_says_who_and_where():
    pick = pick_of(0)
    who, where, words = grammar.told(pick, True, "cat", "sat", "mat", adjective=True)
    assert [words[i] for i in who] == ["the", "cat"]
    assert [words[i] for i in where][1] == "the" and words[where[-1]] == "mat" and len(where) == 4
    who, where, words = grammar.told(pick, False, "私", "行く", "学校")
    assert [words[i] for i in who] == ["私"]
    assert words[where[0]] == "学校" and words[where[-1]] in ("に", "へ") and len(where) == 2
