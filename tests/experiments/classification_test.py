"""Tasks that ask for a row's class: trained, reported and evaluated; what they ask is their own."""

import json

import numpy as np
import pytest

from configs import char_lm
from experiments import setup
from qkv_jax import data
from qkv_jax.training.writers import read_metrics
from tests.experiments.runs import TINY, assert_one_sentence, messages

LISTOPS = (
    "task=listops", "data.context=24", "data.min_length=5", "data.max_depth=4", "data.max_args=3",
)  # fmt: skip
PASSAGES = ("task=which_document", "data.num_documents=2", "data.context=15")


def train(scripts, workdir, *fields):
    kept = [f for f in TINY if not f.startswith(("data.corpus", "data.valid", "data.context"))]
    settings = (*kept, "model.position=learned", *fields)
    return scripts.run("train", f"--workdir={workdir}", *(f"--config.{s}" for s in settings))


@pytest.fixture(scope="module")
def two_texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, letters in (("a", "abc"), ("b", "xyz")):
        text = "".join(letters[i * i % 7 % 3] for i in range(400 + len(letters)))
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def listops(scripts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("listops") / "run"
    done = train(scripts, workdir, *LISTOPS)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_its_report_says_how_many_rows_are_right_and_shows_some(listops):
    workdir, done = listops
    assert messages(done) == []
    assert "ListOps, nested operations on lists of digits, in rows of 24 ids" in done.stdout
    result = json.loads((workdir / "result.json").read_text())
    assert set(result["scores"]) == {"loss", "accuracy"}
    report = (workdir / "report.md").read_text()
    assert f"| all | {result['scores']['accuracy']:.4f} |" in report
    assert "| by chance, of 10 classes | 0.1000 |" in report and "uniform" not in report
    lines = (workdir / "sample.txt").read_text().splitlines()
    assert len(lines) == 4 and all(" -> " in line for line in lines)
    assert lines[0].split()[0] in ("MIN", "MAX", "MED", "SM")
    maps = sorted(path.name for path in (workdir / "figures").iterdir())
    assert maps == ["attention_layer_1.png", "loss.png"]
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows if "validation_accuracy" in row] == [7, 14, 20]


def test_evaluating_it_prints_the_same_scores(listops, scripts):
    workdir, _ = listops
    done = scripts.run("evaluate", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    scores = json.loads((workdir / "result.json").read_text())["scores"]
    assert f"| all | {scores['accuracy']:.4f} |" in done.stdout


def test_documents_of_different_letters_are_told_apart(scripts, two_texts, tmp_path):
    fields = ("data.corpus=text_file", f"data.path={two_texts}", "train.num_steps=60")
    done = train(scripts, tmp_path / "run", *PASSAGES, *fields, "model.dropout_rate=0.0")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["scores"]["accuracy"] > 0.9
    assert "a.txt" in (tmp_path / "run" / "sample.txt").read_text()
    (two_texts / "a.txt").write_text("xyz" * 140)  # another corpus than it was trained on
    fields = (*fields[:2], "train.num_steps=70", "model.dropout_rate=0.0")
    assert_one_sentence(train(scripts, tmp_path / "run", *PASSAGES, *fields), "another text")


def task_of(**fields):
    config = char_lm.get_config()
    config.update_from_flattened_dict(fields)
    settings = setup.resolve(config)
    return settings.task(settings)


def test_what_is_asked_at_the_end_was_never_trained_on(two_texts):
    fields = {"data.corpus": "text_file", "data.path": str(two_texts), "data.context": 15}
    task = task_of(task="which_document", **{**fields, "data.num_documents": 2})
    for name, train_part, test_part in zip(
        task.names, task.texts(data.TRAINING), task.texts(data.TEST), strict=True
    ):
        np.testing.assert_array_equal(np.concatenate([train_part, test_part]), task.documents[name])
        assert len(test_part) / len(train_part) == pytest.approx(1 / 9, rel=0.05)


def test_no_document_of_two_passages_was_trained_on(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(chr(97 + i) * (20 + i))
    task = task_of(
        task="same_document",
        **{"data.corpus": "text_file", "data.path": str(tmp_path), "data.context": 23,
           "data.validation_fraction": 0.34},
    )  # fmt: skip
    train_letters, test_letters = (
        {chr(text[0]) for text in task.texts(stream)} for stream in (data.TRAINING, data.TEST)
    )
    # At least 22 bytes have c ... h; from the longest on, every third is held out.
    assert (train_letters, test_letters) == (set("hged"), set("fc"))


def test_the_model_gets_lengths_segments_and_as_many_classes_as_there_are():
    task = task_of(task="listops", **{"data.context": 24})
    assert set(task.generate(0, 2, data.TEST)) == {"inputs", "targets", "lengths"}
    assert task.settings.model_config(task.vocab_size).num_classes == 10
    seen = {}
    batch = {"inputs": 1, "targets": 2, "lengths": 3, "segments": 4}
    task.predict(lambda inputs, **more: seen.update(more, inputs=inputs), batch, None)
    assert seen == {"inputs": 1, "lengths": 3, "segments": 4, "rng": None}
    config = char_lm.get_config()
    config.task, config.data.num_documents = "which_document", 7
    assert setup.resolve(config).model_config(257).num_classes == 7


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"task": "listops", "data.context": 12}, "min_length is 16.*context = 12"),
        ({"task": "digits", "data.context": 64}, "context is 64; wanted 65"),
        ({"task": "digits", "data.min_length": 9}, r"config\.data\.min_length: 9 was set.*listops"),
        (
            {"task": "listops", "data.max_args": 0},
            r"config\.data\.max_args: wanted an integer >= 1",
        ),
        ({"task": "same_document", "data.context": 20}, "context is 20; wanted an odd number"),
        (
            {"task": "which_document", "data.num_documents": 3, "data.corpus": "text_file"},
            r"config\.data\.num_documents: wanted at most the 2 .* got 3",
        ),
    ],
)
def test_what_does_not_fit_is_refused(two_texts, fields, words):
    if "data.corpus" in fields:
        fields = fields | {"data.path": str(two_texts)}
    with pytest.raises(ValueError, match=words):
        task_of(**fields)
