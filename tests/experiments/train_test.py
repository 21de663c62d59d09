"""Training as a person does it: what a run leaves, says, and does when it is started again."""

import json
import shutil

import numpy as np
import pytest

from qkv_jax.data import CharTokenizer
from qkv_jax.training.writers import read_metrics
from tests.experiments.runs import (
    EVALUATED,
    LOGGED,
    assert_one_sentence,
    assert_same_run,
    files_of,
    heartbeat,
    messages,
    numbers,
    saved_steps,
)


def test_a_run_leaves_every_file_that_it_promises(finished):
    names = set(files_of(finished))
    assert {
        "config.json",
        "corpus.json",
        "tokenizer.json",
        "metrics.jsonl",
        "sample.txt",
        "report.md",
        "figures/loss.png",
        "figures/attention_layer_1.png",
    } <= names
    assert not [name for name in names if name.endswith(".tmp")]
    assert saved_steps(finished) == [15, 20]
    for name in names:
        if name.endswith(".png"):
            assert (finished / name).read_bytes().startswith(b"\x89PNG")
    (events,) = (finished / "tensorboard").iterdir()
    assert all(tag in events.read_bytes() for tag in (b"loss", b"grad_norm", b"validation_loss"))


def test_config_versions_and_corpus_are_json_that_says_what_was_run(finished, scripts):
    config = json.loads((finished / "config.json").read_text())
    assert config["train"]["num_steps"] == 20 and config["data"]["path"] == str(scripts.corpus)
    versions = json.loads((finished / "versions.json").read_text())
    assert {"python", "jax", "flax", "optax", "numpy", "commit", "device"} <= set(versions)
    assert versions["device"].startswith("2 x")
    corpus = json.loads((finished / "corpus.json").read_text())
    text = scripts.corpus.read_text()
    assert (corpus["characters"], corpus["vocab_size"]) == (len(text), len(set(text)))


def test_metrics_stand_at_the_promised_steps_and_the_loss_falls(finished):
    rows = numbers(finished)
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == LOGGED
    assert [row["step"] for row in rows if "validation_loss" in row] == EVALUATED
    training = [row for row in rows if "loss" in row]
    assert all(row.keys() == {"step", "loss", "grad_norm", "learning_rate"} for row in training)
    assert training[-1]["loss"] < training[0]["loss"]
    rates = [row["learning_rate"] for row in training]
    np.testing.assert_allclose(rates, 3e-3 * np.array(LOGGED) / 20, rtol=1e-5)  # 20 to warm up


def test_metrics_say_how_fast_it_is_but_of_the_steps_that_wait_for_the_compiler(finished):
    rows = [row for row in read_metrics(finished / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows if "tokens_per_second" not in row] == [2]  # of three steps
    assert all(row["tokens_per_second"] > 0 for row in rows[1:])
    assert not any("mfu" in row for row in rows)  # what a CPU can do at most, nobody knows


def test_the_report_ties_the_results_together_and_is_printed(trained):
    workdir, done = trained
    report = (workdir / "report.md").read_text()
    assert report in done.stdout
    assert "\n| model | " in report and "\n| bigram | " in report
    assert (workdir / "sample.txt").read_text().strip("\n") in report
    assert "](figures/loss.png)" in report and "](figures/attention_layer_1.png)" in report
    last = numbers(workdir)[-1]["validation_loss"]
    assert f"last {last:.4f}" in report
    assert messages(done) == []


def test_a_log_file_gets_the_last_step_with_its_losses(trained):
    workdir, done = trained
    shown = [line for line in done.stdout.splitlines() if line.startswith("step 20/20  loss ")]
    last = numbers(workdir)[-1]["validation_loss"]
    assert len(shown) == 1 and f"validation {last:.4g}" in shown[0]


def test_a_sample_continues_the_validation_text(finished, scripts):
    text = scripts.corpus.read_text()
    validation = text[int(len(text) * 0.9) :]
    sample = (finished / "sample.txt").read_text()
    assert sample.startswith(validation[:4])  # a quarter of the context
    assert len(sample) == 4 + 23 + 1


def test_a_finished_run_started_again_says_so_and_reprints_its_report(finished, scripts):
    before = files_of(finished)
    done = scripts.train(finished)
    assert done.returncode == 0 and messages(done) == []
    assert "finished" in done.stdout and "20 steps" in done.stdout
    assert (finished / "report.md").read_text() in done.stdout
    assert files_of(finished) == before


def test_more_steps_and_other_intervals_resume_a_finished_run(finished, scripts, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    done = scripts.train(workdir, "train.num_steps=26", "train.log_every=3", "train.keep=3")
    assert done.returncode == 0, done.stderr
    assert "resuming from step 20" in done.stdout
    rows = numbers(workdir)
    assert rows[: len(numbers(finished))] == numbers(finished)
    after = [row for row in rows if row["step"] > 20]
    assert [row["step"] for row in after if "loss" in row] == [21, 24, 26]
    assert [row["step"] for row in after if "validation_loss" in row] == [21, 26]
    assert saved_steps(workdir) == [20, 25, 26]
    assert "26 steps" in (workdir / "report.md").read_text()


def test_another_config_is_refused_naming_field_and_values_and_changes_nothing(finished, scripts):
    before = files_of(finished)
    done = scripts.train(finished, "optimizer.b2=0.99", "train.num_steps=50")
    assert_one_sentence(done, "config.optimizer.b2", "0.95", "0.99", str(finished))
    assert "num_steps" not in done.stderr
    assert files_of(finished) == before


def test_dispatch_and_save_intervals_do_not_change_a_bit(finished, scripts, tmp_path):
    done = scripts.train(tmp_path / "run", "train.steps_per_dispatch=64", "train.save_every=0")
    assert done.returncode == 0, done.stderr
    assert saved_steps(tmp_path / "run") == [20]  # 0: only at the end
    assert_same_run(tmp_path / "run", finished)


def test_saves_by_the_clock_and_a_profile_do_not_change_a_bit(finished, scripts, tmp_path):
    fields = (
        "train.save_every=0", "train.save_minutes=1e-9", "train.keep=2", "train.keep_every=7",
        "train.figures=False",
    )  # fmt: skip
    done = scripts.run("train", *scripts.training(tmp_path, *fields), "--profile=10:13")
    assert done.returncode == 0, done.stderr
    assert f"profile of steps 10:13: {tmp_path / 'profile'}\n" in done.stdout
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    assert saved_steps(tmp_path) == [7, 14, 17, 20]  # 17 is the last dispatch but one
    assert_same_run(tmp_path, finished)

    done = scripts.train(tmp_path, *fields, "train.num_steps=26")
    assert done.returncode == 0 and "resuming from step 20" in done.stdout, done.stderr
    assert saved_steps(tmp_path) == [7, 14, 21, 24, 26]


def test_the_heartbeat_of_a_finished_run_says_so(finished):
    found = heartbeat(finished)
    assert (found["status"], found["step"], found["process"]) == ("finished", 20, 0)
    last = numbers(finished)[-1]
    assert found["validation"] == last["validation_loss"] and found["loss"] > 0


def assert_close_metrics(actual, expected, tolerance):
    pairs = list(zip(numbers(actual), numbers(expected), strict=True))
    for row, wanted in pairs:
        assert row.keys() == wanted.keys() and row["step"] == wanted["step"]
        np.testing.assert_allclose(
            list(row.values()), list(wanted.values()), rtol=0, atol=tolerance, err_msg=str(row)
        )


def test_one_device_and_two_agree(finished, scripts, tmp_path):
    done = scripts.train(tmp_path / "run", "train.cpu_devices=1")
    assert done.returncode == 0 and " on 1 x " in done.stdout, done.stderr
    assert_close_metrics(tmp_path / "run", finished, 1e-4)


def test_a_run_goes_on_on_another_mesh_as_if_nothing_had_changed(finished, scripts, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    done = scripts.train(
        workdir, "train.cpu_devices=4", "mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2"
    )
    assert done.returncode == 0, done.stderr
    assert " on 4 x " in done.stdout and "resuming from step 15" in done.stdout
    assert "| blocks/*/mixer/query/kernel | 16 x 16 | fsdp, tensor | 1,024 | 256 |" in done.stdout
    assert_close_metrics(workdir, finished, 1e-4)


@pytest.mark.slow
def test_accumulated_halves_of_a_batch_are_the_batch(scripts, tmp_path):
    same = ("model.dropout_rate=0.0",)  # micro-batches drop out other elements
    halves = ("train.batch_size=2", "optimizer.accumulate=2")
    for name, fields in {"whole": same, "halves": same + halves}.items():
        done = scripts.train(tmp_path / name, *fields)
        assert done.returncode == 0, done.stderr
    assert_close_metrics(tmp_path / "halves", tmp_path / "whole", 1e-4)


def assert_learns(workdir, done):
    assert done.returncode == 0 and messages(done) == [], done.stderr
    losses = [row["loss"] for row in numbers(workdir) if "loss" in row]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_bfloat16_recomputation_muon_and_bpe_work_together(scripts, tmp_path):
    done = scripts.train(
        tmp_path,
        "train.compute_dtype=bfloat16",
        "train.remat=True",
        "optimizer.name=muon",
        "data.tokenizer=bpe",
        "data.vocab_size=270",
    )
    assert_learns(tmp_path, done)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["tokenizer"] == "bpe"
    assert "tokens: bpe, vocabulary 270" in done.stdout


@pytest.mark.slow
def test_bytes_are_a_vocabulary_for_any_text(scripts, tmp_path):
    japanese = tmp_path / "text.txt"
    japanese.write_text("私はその人を常に先生と呼んでいた。だからここでもただ先生と書く。" * 23)
    done = scripts.train(tmp_path / "run", f"data.path={japanese}", "data.tokenizer=byte")
    assert_learns(tmp_path / "run", done)
    assert "tokens: byte, vocabulary 256" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        ("train.remat=True",),
        ("train.compute_dtype=bfloat16",),
        ("model.num_layers=2", "model.num_kv_heads=1", "model.activation=swiglu"),
        (
            "model.norm=layer", "model.norm_position=post", "model.position=learned",
            "model.use_bias=True", "model.tie_embeddings=True", "model.qk_norm=False",
            "model.zero_init_outputs=False", "model.logit_softcap=0.0", "optimizer.schedule=cosine",
        ),
    ],
    ids=["remat", "bfloat16", "llama", "gpt2"],
)  # fmt: skip
def test_each_kind_of_model_trains(scripts, tmp_path, fields):
    assert_learns(tmp_path, scripts.train(tmp_path, *fields, "optimizer.warmup_steps=2"))


def test_a_tokenizer_file_lists_the_characters(finished, scripts):
    assert (finished / "tokenizer.json").read_text() == CharTokenizer(
        scripts.corpus.read_text()
    ).to_json()
