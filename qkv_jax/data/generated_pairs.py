"""Pairs that are generated: numbers in the words of two languages, dates in many formats.

They are functions of (number, seed), and of the versions of `num2words` and `babel`, which are
imported where they are asked for. No source occurs twice.
"""

import datetime
import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from qkv_jax.data import draws

LOCALES = ("en_US", "en_GB", "de_DE", "fr_FR", "es_ES", "ja_JP")
FORMATS = ("medium", "long", "full")  # "short" ones of several locales contradict one another
FIRST, LAST = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)


@dataclass(frozen=True)
class Generated:
    """Pairs that are made by a function.

    Attributes:
        pairs: (number, seed) -> so many different pairs.
        origin: what they are, for a person.
    """

    pairs: Callable[[int, int], list[tuple[str, str]]]
    origin: str


def number_words(number: int, seed: int, *, language: str, digits: int = 15) -> list:
    """Numbers in English words and in another language's.

        two hundred and thirty-four      zweihundertvierunddreißig      二百三十四

    German says the units before the tens, in one word; Japanese counts in groups of four digits,
    not three. The number of digits, 1 to `digits`, is uniform as long as there are unseen numbers.

    Args:
        number: of pairs, at most half of all numbers of so many digits.
        seed: 0 <= seed < 2**64.
        language: of the targets, as `num2words` knows it.
        digits: of the largest number, at most 15.

    Returns:
        `number` pairs of a source and a target.

    Raises:
        ValueError: naming the argument that does not fit.
        ImportError: `num2words` is not installed.
    """
    if not 1 <= digits <= 15:
        raise ValueError(f"digits is {digits}; wanted 1 to 15")
    _check_number(number, 10**digits // 2)

    def draw(step: int) -> np.ndarray:
        length, place = draws.uniform((2, number), seed=seed, step=step, stream=draws.TRAINING)
        length = 1 + (length * digits).astype(np.int64)
        low = np.where(length == 1, 0, 10 ** (length - 1))
        return low + (place * (10**length - low)).astype(np.int64)

    say = _library("num2words", "num2words").num2words
    return [(say(n), say(n, lang=language)) for n in _different(draw, number, seed)]


def dates(number: int, seed: int) -> list[tuple[str, str]]:
    """Dates of 1900 to 2099 as people of several countries write them, and as ISO 8601 does.

        Saturday, March 4, 2017      4. März 2017      2017年3月4日      ->      2017-03-04

    Args:
        number: of pairs, at most half of all days in all formats: 657,450.
        seed: 0 <= seed < 2**64.

    Returns:
        `number` pairs of a source and a target.

    Raises:
        ValueError: naming the argument that does not fit.
        ImportError: `babel` is not installed.
    """
    kinds = tuple(itertools.product(LOCALES, FORMATS))
    days = (LAST - FIRST).days + 1
    _check_number(number, days * len(kinds) // 2)

    def draw(step: int) -> np.ndarray:
        uniform = draws.uniform((number,), seed=seed, step=step, stream=draws.TRAINING)
        return (uniform * days * len(kinds)).astype(np.int64)

    @functools.cache
    def written(index: int) -> tuple[str, str]:
        day, kind = divmod(index, len(kinds))
        date, (locale, form) = FIRST + datetime.timedelta(day), kinds[kind]
        return babel.format_date(date, form, locale=locale), date.isoformat()

    babel = _library("babel.dates", "babel")
    # Some countries write alike: their formats give the same source.
    return [written(n) for n in _different(draw, number, seed, seen_as=lambda n: written(n)[0])]


GENERATED = {
    "numbers_de": Generated(
        functools.partial(number_words, language="de"),
        "numbers in English words, and in German ones",
    ),
    "numbers_ja": Generated(
        functools.partial(number_words, language="ja"),
        "numbers in English words, and in Japanese ones",
    ),
    "dates": Generated(dates, "dates in many formats, and in ISO 8601"),
}


def _different(
    draw: Callable[[int], np.ndarray],
    number: int,
    seed: int,
    seen_as: Callable[[int], object] = lambda n: n,
) -> list[int]:
    """So many different ones of what `draw(step)` gives for the steps from 0 on, shuffled.

    What is rare is drawn early and then no more: without shuffling, the end would lack it.
    """
    found: dict[object, int] = {}
    for step in itertools.count():
        for n in draw(step).tolist():
            if len(found) < number:
                found.setdefault(seen_as(n), n)
        if len(found) == number:
            break
    bits = draws.raw_bits(number, seed=seed, step=0, stream=draws.TRAINING, series=1)
    return _ordered(found.values(), np.argsort(bits, kind="stable"))


def _ordered(values: Iterable[int], order: np.ndarray) -> list[int]:
    values = list(values)
    return [values[i] for i in order]


def _check_number(number: int, most: int) -> None:
    if not 1 <= number <= most:
        raise ValueError(f"number is {number}; wanted 1 to {most:,} pairs")


def _library(module: str, package: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"these pairs need a package: pip install {package}") from error
