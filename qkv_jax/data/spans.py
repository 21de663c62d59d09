"""Questions about generated passages, whose answer is a span of the passage."""

import numpy as np

from qkv_jax.data import draws
from qkv_jax.data.batches import Batch
from qkv_jax.data.grammar import (
    ENGLISH_HABITS,
    JAPANESE_HABITS,
    WHERE,
    WHO,
    Pick,
    picker,
    told,
)
from qkv_jax.data.senses import padded

QUESTION = 3  # tokens: where cat ?
LONGEST = 8  # words of a sentence: the cat sat on the old mat .


def passages(
    *, seed: int, step: int, batch_size: int, context: int, stream: int = draws.TRAINING
) -> Batch:
    """A question, and sentences one of which answers it: where does the answer begin and end?

        where cat ?  the dog lay on the old rug .  the cat sat under the mat .    under the mat
        who rug ?    ...                                                          the dog

    A passage is English or Japanese. Everybody and every place is in it at most once, who does what
    and where is drawn anew, so that nothing but the passage tells. A pure function of the seed and
    the step. Rajpurkar et al. 2016, arxiv.org/abs/1606.05250, ask such questions of Wikipedia.

    Args:
        seed, step, batch_size, stream: as for `recall`.
        context: tokens of a row, `T`, at least 19; with it grows the number of sentences, from two
            to five.

    Returns:
        `inputs`, int32 [B, T], ids of `WORDS`, filled up with id 0; `segments`, int32 [B, T], 1 in
        the passage; `lengths`, int32 [B]; `targets`, int32 [B, 2]: the answer's first and last
        place.

    Raises:
        ValueError: the context is too short.
    """
    number = min((context - QUESTION) // LONGEST, len(ENGLISH_HABITS), len(JAPANESE_HABITS))
    if number < 2:
        raise ValueError(f"context is {context}; wanted at least {QUESTION + 2 * LONGEST}")
    uniform = draws.uniform((batch_size, 8 * number + 8), seed=seed, step=step, stream=stream)
    rows = [_passage(picker(row), number) for row in uniform]
    lengths = np.array([len(words) for words, _ in rows], np.int32)
    place = np.arange(context)
    return {
        "inputs": padded([words for words, _ in rows], context),
        "segments": ((place >= QUESTION) & (place < lengths[:, None])).astype(np.int32),
        "lengths": lengths,
        "targets": np.array([(answer[0], answer[-1]) for _, answer in rows], np.int32),
    }


def _passage(pick: Pick, number: int) -> tuple[tuple[str, ...], range]:
    """The question and the passage, and where the answer stands."""
    english = pick((True, False))
    habits = ENGLISH_HABITS if english else JAPANESE_HABITS
    people = list(habits)
    actions = [action for of_one, _ in habits.values() for action in of_one]
    places = [place for _, of_one in habits.values() for place in of_one]
    asked, about = pick(range(number)), pick((WHERE, WHO))
    words, answer, key = [], range(0), ""
    for i in range(number):
        who, place = _taken(pick, people), _taken(pick, places)
        spans = told(
            pick, english, who, pick(actions), place, adjective=pick((True, False))
        )  # fmt: skip
        who_span, where_span, sentence = spans
        if i == asked:
            key = who if about is WHERE else place
            begin = QUESTION + len(words)
            span = where_span if about is WHERE else who_span
            answer = range(begin + span.start, begin + span.stop)
        words += sentence
    return (about[0 if english else 1], key, "?", *words), answer


def _taken(pick: Pick, options: list[str]) -> str:
    """One of the options, which then is no longer among them."""
    return options.pop(pick(range(len(options))))
