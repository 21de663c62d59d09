"""Sentences with ambiguous words, and questions: trained, looked into, reported and judged."""

import json

import numpy as np
import pytest

from experiments import setup
from experiments.studies import senses
from experiments.studies.senses import CHANCE, Look
from experiments.tasks.senses import Occurrences, Told
from qkv_jax.data.grammar import SENSES
from tests.experiments.runs import TINY, assert_one_sentence, messages
from tests.experiments.studies import judged, result_of, study_of

OWN = ("data.corpus", "data.tokenizer", "data.validation", "data.context", "model.dropout")


def train(scripts, workdir, *fields):
    settings = [field for field in TINY if not field.startswith(OWN)]
    flags = [f"--config.{field}" for field in (*settings, "model.num_layers=2", *fields)]
    return scripts.run("train", f"--workdir={workdir}", *flags)


def test_similarity_is_the_mean_cosine_of_different_pairs():
    vectors = np.array([[[1, 0], [2, 0], [0, 3]], [[1, 1], [1, 1], [1, 1]]], np.float32)
    of = Occurrences(vectors, np.array([4, 4, 7]), np.array([1, 2, 1]))
    within, between = of.similarity
    np.testing.assert_allclose(within, [1, 1], rtol=1e-6)
    np.testing.assert_allclose(between, [0, 1], rtol=1e-6, atol=1e-6)


def test_a_sense_is_told_by_the_nearest_mean_of_other_sentences():
    known = Occurrences(
        np.array([[[0.0, 0], [2, 0], [5, 5], [7, 5]]]), np.array([4, 4, 7, 7]), np.ones(4)
    )
    new = Occurrences(np.array([[[1.0, 1], [9, 9], [0, 0]]]), np.array([4, 7, 7]), np.ones(3))
    np.testing.assert_array_equal(new.told_by(known), [[True, True, False]])


@pytest.fixture(scope="module")
def words(scripts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("words") / "run"
    mixing = "model.zero_init_outputs=False"  # from the start
    done = train(scripts, workdir, "task=senses", "data.context=12", mixing)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_a_run_of_hidden_words_reports_what_vectors_tell_by_depth(words):
    workdir, done = words
    assert messages(done) == [], done.stderr
    scores = json.loads((workdir / "result.json").read_text())["scores"]
    assert set(scores) == {"loss", "accuracy"} | {
        f"{name}_{depth}" for name in ("sense", "within", "between") for depth in range(3)
    }
    # Before the first block a word is a row of a table.
    assert scores["within_0"] == pytest.approx(1) == pytest.approx(scores["between_0"])
    assert scores["within_2"] < 1 and scores["sense_0"] < CHANCE + 0.15
    report = (workdir / "report.md").read_text()
    assert "| before the first block | 1.0000 | 1.0000 |" in report
    assert "| after block 2 |" in report and "attention_layer_2.png" in report
    sample = (workdir / "sample.txt").read_text().splitlines()
    assert len(sample) == 4 and all("□[" in line for line in sample)


def test_what_no_neighbour_reaches_tells_no_sense(scripts, tmp_path):
    """A convolution over one word: vectors stay the same in every sentence, at any depth."""
    run = tmp_path / "run"
    done = train(scripts, run, "task=senses", "data.context=12", "model.mixer=gated_conv",
                 "model.conv_width=1", "train.num_steps=3")  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads((run / "result.json").read_text())["scores"]
    assert scores["between_2"] == pytest.approx(1, abs=1e-5)
    assert scores["sense_2"] < CHANCE + 0.15


def test_a_run_of_questions_reports_exact_answers(scripts, tmp_path):
    done = train(scripts, tmp_path / "run", "task=spans", "data.context=19")
    assert done.returncode == 0 and messages(done) == [], done.stderr
    scores = json.loads((tmp_path / "run" / "result.json").read_text())["scores"]
    assert set(scores) == {"loss", "accuracy", "exact_match"}
    assert 0 <= scores["exact_match"] <= scores["accuracy"] <= 1
    sample = (tmp_path / "run" / "sample.txt").read_text().splitlines()
    assert len(sample) == 4 and all("?" in line and line.endswith("]") for line in sample)
    done = scripts.run("evaluate", f"--workdir={tmp_path / 'run'}")
    assert f"{scores['exact_match']:.1%} of the answers are exactly right" in done.stdout


@pytest.mark.parametrize(
    "fields, words",
    [
        (["task=senses", "data.context=6"], ["context is 6", "at least 8"]),
        (["task=spans", "data.context=12"], ["context is 12", "at least 19"]),
        (["task=spans", "data.context=19", "data.mask_rate=0.5"], ["data.mask_rate", "senses"]),
        (["task=senses", "data.context=12", "data.vocab_size=9"], ["config.data.vocab_size"]),
    ],
)
def test_what_does_not_fit_ends_in_one_sentence(scripts, tmp_path, fields, words):
    assert_one_sentence(train(scripts, tmp_path / "run", *fields), *words)
    assert not (tmp_path / "run").exists()


def test_the_study_reads_a_trained_model(words):
    run = study_of("senses", words[0].parent).runs[0]
    trained = setup.load_run(words[0])
    run.config.update(model=trained.settings.model)
    found = senses.look_at(type(run)(run.name, run.fields, 0, run.config, words[0]))
    assert found.told.accuracy.keys() == set(SENSES) and set(found.told.by_distance) == {1, 2, 3, 4}
    assert {name: maps.shape for name, maps in found.maps.items()} == {
        "cat": (2, 2, 7, 7), "watashi": (2, 2, 6, 6),
    }  # fmt: skip
    np.testing.assert_allclose(found.maps["cat"].sum(-1), 1, rtol=1e-5)


def looks(*, conv=1.0, beyond=CHANCE, before=CHANCE, apart=0.4):
    """What runs find that reach as far as the study's configs say."""

    def look(run):
        model = run.config.model
        attends = model.mixer == "attention"
        reach = 99 if attends else model.num_layers * (model.conv_width - 1) // 2
        after = [1.0 if reach else CHANCE] * 2
        by_distance = {
            d: np.array([before, 0.7, (1.0 if attends else conv) if d <= reach else beyond])
            for d in range(1, 10)
        }
        told = Told(
            within={word: np.array([1, 0.9, 0.8]) for word in SENSES},
            between={word: np.array([1, 0.9, 0.8 - apart]) for word in SENSES},
            accuracy={word: np.array([before, *after]) for word in SENSES},
            by_distance=by_distance,
        )
        sizes = {name: len(words) for name, (words, *_) in senses.READ.items()}
        maps = {name: np.full((2, 4, n, n), 1 / n) for name, n in sizes.items()}
        return Look(told, maps if attends else {})

    return look


def answered(attention, others):
    def of_run(run):
        result = result_of(run)
        if run.name.startswith("answers"):
            exact = attention if run.config.model.mixer == "attention" else others
            result.scores["exact_match"] = exact
        return result

    return of_run


@pytest.mark.parametrize(
    "look, of_run, failed",
    [
        (looks(), answered(0.99, 0.3), ""),
        (looks(before=0.7), answered(0.99, 0.3), "nothing told by an embedding"),
        (looks(conv=0.75), answered(0.99, 0.3), "all told within reach"),
        (looks(beyond=0.8), answered(0.99, 0.3), "nothing told beyond"),
        (looks(apart=0.01), answered(0.99, 0.3), "senses apart after attention"),
        (looks(), answered(0.9, 0.3), "answers by attention alone"),
        (looks(), answered(0.99, 0.6), "answers by attention alone"),
    ],
)
def test_senses_are_judged_by_reach_depth_and_answers(monkeypatch, tmp_path, look, of_run, failed):
    monkeypatch.setattr(senses, "look_at", look)
    _, _, findings = judged("senses", tmp_path, of_run)
    assert findings.holds == (not failed), findings.margin
    assert not failed or findings.margin.endswith(f"Not as claimed: {failed}."), findings.margin
    assert (
        set(findings.figures) == {"similarity", "told", "cat", "watashi"} <= set(findings.captions)
    )
    assert "sat 0.14 (0.14) / 0.14 (0.14)" in findings.notes[1]
