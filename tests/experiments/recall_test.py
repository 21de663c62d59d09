"""A task that generates its data: trained, stopped at its goal, resumed, reported, evaluated."""

import json

import pytest

from experiments import setup
from qkv_jax import data
from tests.experiments.runs import (
    TINY,
    assert_one_sentence,
    assert_same_run,
    messages,
    numbers,
    saved_steps,
)

RECALL = (
    "task=recall", "data.context=12", "data.num_pairs=2", "data.vocab_size=12",
    "data.corpus=python_docs", "model.mlp_width=0", "optimizer.schedule=constant",
    "optimizer.warmup_steps=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def recall(scripts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("recall") / "run"
    done = train(scripts, workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done


def train(scripts, workdir, *fields):
    settings = [field for field in (*TINY, *RECALL, *fields) if not field.startswith("data.corpus")]
    return scripts.run("train", f"--workdir={workdir}", *(f"--config.{s}" for s in settings))


def test_its_report_and_its_result_say_how_many_answers_are_right(recall):
    workdir, done = recall
    assert messages(done) == [] and saved_steps(workdir) == [15, 20]
    assert "2 pairs of a key and a value in 12 tokens, of 12 ids" in done.stdout
    result = json.loads((workdir / "result.json").read_text())
    assert set(result["scores"]) == {"loss", "accuracy"} and result["steps"] == 20
    report = (workdir / "report.md").read_text()
    assert report in done.stdout and f"| {result['scores']['accuracy']:.4f} |" in report
    assert "feed_forward" not in "".join(setup.load_run(str(workdir)).params["blocks"][0])
    assert result["peak_memory_bytes"] > 1e7 and result["state_size"] == 2 * 12 * 16
    evaluated = [row for row in numbers(workdir) if "validation_accuracy" in row]
    assert [row["step"] for row in evaluated] == [7, 14, 20]


def test_the_sample_shows_a_row_with_the_models_answers(recall):
    workdir, _ = recall
    words = (workdir / "sample.txt").read_text().split()
    rows = data.recall(
        seed=0, step=0, batch_size=4, context=12, num_pairs=2, vocab_size=12, stream=data.TEST
    )
    shown = [word for word in words if word[0] in "kv."][:12]
    labels = ["." if t == 0 else f"k{t}" if t < 6 else f"v{t - 6}" for t in rows["inputs"][0]]
    assert shown[:4] == labels[:4]
    assert sum(word.startswith("[") for word in words) == 2


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(recall, scripts, tmp_path):
    done = train(scripts, tmp_path / "run", "train.num_steps=14")
    assert done.returncode == 0, done.stderr
    done = train(scripts, tmp_path / "run")
    assert done.returncode == 0 and "resuming from step 14" in done.stdout, done.stderr
    assert_same_run(tmp_path / "run", recall[0])


def test_evaluating_it_prints_the_same_scores(recall, scripts, tmp_path):
    workdir, _ = recall
    done = scripts.run("evaluate", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    scores = json.loads((workdir / "result.json").read_text())["scores"]
    assert f"| all | {scores['accuracy']:.4f} |" in done.stdout
    assert f"{scores['loss']:.4f} nats per answer" in done.stdout
    other = scripts.run("evaluate", f"--workdir={workdir}", f"--text={tmp_path}")
    assert_one_sentence(other, "text", "2 pairs")
    assert_one_sentence(scripts.run("generate", f"--workdir={workdir}"), "cannot continue a text")


def test_it_stops_where_its_goal_is_reached_and_is_finished_then(scripts, tmp_path):
    goal = "train.stop_accuracy=0.001"
    done = train(scripts, tmp_path / "run", goal, "train.eval_batches=8")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 7 and saved_steps(tmp_path / "run")[-1] == 7
    again = train(scripts, tmp_path / "run", goal, "train.eval_batches=8")
    assert "finished: this run has made its 7 steps" in again.stdout


@pytest.mark.parametrize(
    "field, words",
    [
        ("data.context=13", ["context is 13", "even"]),
        ("data.vocab_size=5", ["vocab_size is 5"]),
        ("data.mask_rate=0.5", ["config.data.mask_rate", "'recall'", "masked_lm"]),
        ("train.stop_accuracy=2.0", ["config.train.stop_accuracy", "(0, 1]", "2.0"]),
    ],
)
def test_what_does_not_fit_ends_in_one_sentence(scripts, tmp_path, field, words):
    assert_one_sentence(train(scripts, tmp_path / "run", field), *words)
    assert not (tmp_path / "run").exists()
