"""The lesson runs as a reader runs it: prints the book's numbers, draws every mechanism."""

import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from experiments.walkthrough_sentences import words
from tests.experiments.runs import assert_one_sentence

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests" / "ops" / "golden_ch03.json").read_text())
TITLES = {
    "simplified": "1. Self-attention without weights",
    "trained": "2. Self-attention with trained projections",
    "causal": "3. Causal self-attention",
    "two_heads": "4. Two-head attention",
}


def walkthrough(*args):
    command = [sys.executable, "-m", "experiments.walkthrough", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """What it printed, and the folder it wrote."""
    out = tmp_path_factory.mktemp("lesson") / "new" / "folder"
    done = walkthrough(f"--out={out}")
    assert done.returncode == 0, done.stderr
    return done.stdout, out


def section(text, sentence, mechanism):
    """The part of the text about one mechanism and one sentence."""
    start = text.index(f"{TITLES[mechanism]}: {sentence}")
    return text[start : text.index("drawn in", start)]


def printed_matrix(text, name):
    """The numbers under the heading `name = ...`, read back from the columns they stand in."""
    lines = text.splitlines()
    top = next(i for i, line in enumerate(lines) if re.search(rf"(^|   ){name} = ", line))
    left = lines[top].index(f"{name} = ")
    following = re.search(r"   \S", lines[top][left:])
    right = left + following.start() if following else None
    rows, columns = map(int, re.match(r"\[(\d+), (\d+)\]", lines[top + 1][left:]).groups())
    numbers = [line[left:right].split() for line in lines[top + 3 : top + 3 + rows]]
    assert all(len(row) == columns for row in numbers), numbers
    return np.array([[float(n.replace("∞", "inf")) for n in row] for row in numbers])


@pytest.mark.parametrize(
    "mechanism, name, expected",
    [
        ("simplified", "x", GOLDEN["inputs"]),
        ("simplified", "scores", GOLDEN["simple"]["attn_scores"]),
        ("simplified", "weights", GOLDEN["simple"]["attn_weights"]),
        ("simplified", "output", GOLDEN["simple"]["all_context_vecs"]),
        ("trained", "output", GOLDEN["trainable_seed123"]["SelfAttention_v1"]),
        ("causal", "output", GOLDEN["CausalAttention_seed123"]),
        ("two_heads", "output", GOLDEN["MultiHeadAttention_seed123_2heads_dout2"]),
    ],
)
def test_the_printed_matrices_are_those_of_the_book(lesson, mechanism, name, expected):
    text = section(lesson[0], "Your journey starts with one step", mechanism)
    np.testing.assert_allclose(printed_matrix(text, name), expected, rtol=0, atol=6e-4)


@pytest.mark.parametrize(
    "sentence", ["Your journey starts with one step", "The cat sat on the mat"]
)
def test_printed_weights_are_zero_where_the_future_is_hidden(lesson, sentence):
    text = section(lesson[0], sentence, "causal")
    future = np.triu(np.ones((6, 6), bool), 1)
    assert (printed_matrix(text, "masked")[future] == -np.inf).all()
    weights = printed_matrix(text, "weights")
    assert (weights[future] == 0).all()
    np.testing.assert_allclose(weights.sum(1), 1, atol=4e-3)


def test_one_word_twice_has_one_output_until_the_mask_tells_them_apart(lesson):
    outputs = {
        mechanism: printed_matrix(section(lesson[0], "The cat sat on the mat", mechanism), "output")
        for mechanism in TITLES
    }
    for mechanism in ("simplified", "trained"):
        assert (outputs[mechanism][0] == outputs[mechanism][4]).all()
    for mechanism in ("causal", "two_heads"):
        assert (outputs[mechanism][0] != outputs[mechanism][4]).any()


def test_naive_softmax_is_shown_overflowing_beside_the_stable_one(lesson):
    assert re.search(r"1000 +1001 +1002 +nan +nan +nan +0\.090 +0\.245 +0\.665", lesson[0])


def test_loop_and_matrix_forms_are_equal_and_timed(lesson):
    rows = re.findall(r"^ +(.+?) +([\d.]+) ms +([\d.]+) ms +[\d.]+ +(\S+)$", lesson[0], re.M)
    assert [row[0] for row in rows] == ["simple self-attention", "self-attention", "8 heads"]
    for _, loop, matrix, difference in rows:
        assert float(loop) > 0 and float(matrix) > 0
        assert float(difference) < 1e-5


def test_every_mechanism_of_every_sentence_is_drawn(lesson):
    pictures = {path.name: path.read_bytes() for path in lesson[1].glob("*.png")}
    wanted = {
        f"{sentence}_{place}_{mechanism}.png"
        for sentence in ("journey", "cat")
        for place, mechanism in enumerate(TITLES, start=1)
    }
    assert set(pictures) == wanted
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    assert all(f"drawn in {name}" in lesson[0] for name in wanted)


JAPANESE = "猫は猫を、人は人を見る"
OWN = ["猫", "は", "猫", "を", "、", "人", "は", "人", "を", "見る"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """What it printed of a sentence that a reader gives, in columns of the terminal."""
    pytest.importorskip("fugashi")
    pytest.importorskip("ipadic")
    out = tmp_path_factory.mktemp("own")
    done = walkthrough(f"--out={out}", f"--text={JAPANESE}")
    assert done.returncode == 0, done.stderr
    assert f"--text='{JAPANESE}'" in (out / "walkthrough.txt").read_text(encoding="utf-8")
    assert len(list(out.glob("own_*.png"))) == len(TITLES)
    wide = {c: c + "_" for c in done.stdout if unicodedata.east_asian_width(c) in "WF"}
    return done.stdout.translate(str.maketrans(wide))


@pytest.mark.parametrize("mechanism", TITLES)
def test_a_sentence_of_ones_own_goes_through_the_mechanisms_in_columns_that_align(own, mechanism):
    text = section(own, "猫_は_", mechanism)
    name = "weights 1" if mechanism == "two_heads" else "weights"
    x, weights = printed_matrix(text, "x"), printed_matrix(text, name)
    same = [[one == other for other in OWN] for one in OWN]
    np.testing.assert_array_equal((x[:, None] == x).all(-1), same)  # an embedding for each word
    np.testing.assert_allclose(weights.sum(1), 1, atol=6e-3)
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if f"{name} = " in line)
    columns, *rows = (line.rstrip() for line in lines[at + 2 : at + 3 + len(OWN)])
    assert columns.split()[: len(OWN)] == [re.sub("(.)", r"\1_", word) for word in OWN]
    ends = [[m.end() for m in re.finditer(r"\S+", line)] for line in (columns, *rows)]
    assert all(row[1:] == ends[0] for row in ends[1:])  # a word ends where its numbers end
    assert max(map(len, lines)) <= 100


def test_words_stand_between_spaces_or_are_mecabs():
    pytest.importorskip("fugashi")
    pytest.importorskip("ipadic")
    assert words(JAPANESE) == OWN
    assert words(" The  cat,\nﾈｺ が") == ["The", "cat,", "ﾈｺ", "が"]


def test_without_mecab_japanese_falls_into_characters(monkeypatch):
    monkeypatch.setitem(sys.modules, "fugashi", None)
    assert words("学校に 行く the cat") == ["学", "校", "に", "行", "く", "the", "cat"]


@pytest.mark.parametrize(("text", "number"), [("", 0), ("x " * 13, 13)])
def test_a_sentence_without_words_or_with_too_many_ends_in_one_sentence(text, number, tmp_path):
    done = walkthrough(f"--out={tmp_path}", f"--text={text}")
    assert_one_sentence(done, "text: wanted 1 to 12 words", f"got {number}")


def test_the_text_fits_a_hundred_columns_and_is_kept_in_a_file(lesson):
    text, out = lesson
    kept = (out / "walkthrough.txt").read_text(encoding="utf-8")
    assert max(map(len, kept.replace(str(out), "").splitlines())) <= 100
    assert text.startswith(kept)


def test_a_folder_that_cannot_be_written_ends_in_one_clear_sentence(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = walkthrough(f"--out={tmp_path / 'file' / 'lesson'}")
    assert_one_sentence(done, "cannot write", str(tmp_path / "file"))
