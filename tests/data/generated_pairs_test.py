"""Generated pairs: all different, of the lengths that are said, the same for the same seed."""

import datetime

import babel.dates
import pytest
from num2words import num2words

from qkv_jax.data import generated_pairs
from qkv_jax.data.generated_pairs import FORMATS, LOCALES, dates, number_words

NUMBER = 211


@pytest.mark.parametrize("name", generated_pairs.GENERATED)
def test_pairs_are_a_function_of_the_seed_and_no_source_occurs_twice(name):
    make = generated_pairs.GENERATED[name].pairs
    pairs = make(NUMBER, 3)
    assert pairs == make(NUMBER, 3) != make(NUMBER, 4)
    assert len({source for source, _ in pairs}) == len(pairs) == NUMBER


def test_numbers_are_the_same_in_both_languages():
    known = {num2words(n): num2words(n, lang="ja") for n in range(1000)}
    assert known["two hundred and thirty-four"] == "二百三十四"
    pairs = number_words(NUMBER, 0, language="ja", digits=3)
    assert all(known[source] == target for source, target in pairs)


def test_numbers_of_every_length_are_equally_frequent_up_to_the_end():
    by_length = [0] * 5
    length_of = {num2words(n): len(str(n)) for n in range(10**4)}
    pairs = number_words(400, 0, language="de", digits=4)
    for source, _ in pairs:
        by_length[length_of[source]] += 1
    # There are 10 numbers of one digit and 90 of two: they run out, and the others share the rest.
    assert by_length[1] == 10 and 70 <= by_length[2] <= 90
    assert 120 <= by_length[3] <= 180 and 120 <= by_length[4] <= 180
    late = sum(length_of[source] < 3 for source, _ in pairs[200:])
    assert 30 <= late <= 70  # of about 98


def test_a_date_in_every_format_is_its_iso_date():
    found = {}
    for source, target in dates(2000, 0):
        day = datetime.date.fromisoformat(target)
        written = [
            (locale, form)
            for locale in LOCALES
            for form in FORMATS
            if babel.dates.format_date(day, form, locale=locale) == source
        ]
        assert written, source
        found |= dict.fromkeys(written, day.year)
    assert len(found) == len(LOCALES) * len(FORMATS)


def test_no_source_stands_for_two_dates():
    days = [datetime.date(2011, month, day) for month in range(1, 13) for day in range(1, 13)]
    seen = {}
    for day in days:
        for locale in LOCALES:
            for form in FORMATS:
                source = babel.dates.format_date(day, form, locale=locale)
                assert seen.setdefault(source, day) == day, source


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: number_words(0, 0, language="de"), "number is 0"),
        (lambda: number_words(51, 0, language="de", digits=2), "1 to 50 pairs"),
        (lambda: number_words(5, 0, language="de", digits=16), "digits is 16"),
        (lambda: dates(10**6, 0), "number is 1000000"),
    ],
)
def test_numbers_of_pairs_that_cannot_be_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
