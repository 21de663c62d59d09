"""A model of masked tokens: trained, resumed, reported, evaluated, and no writer of text."""

import re

import jax
import numpy as np
import pytest

from experiments import setup
from qkv_jax import data, nn, viz
from tests.experiments.runs import (
    EVALUATED,
    LOGGED,
    assert_one_sentence,
    assert_same_run,
    files_of,
    messages,
    numbers,
    saved_steps,
)
from tests.pages import data_of

# A rate that does not depend on how many steps there will be.
MASKED = (
    "task=masked_lm", "data.mask_rate=0.3", "optimizer.schedule=constant",
    "optimizer.warmup_steps=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def masked(scripts, tmp_path_factory):
    """The directory of a run that nothing has interrupted, and how its process ended."""
    workdir = tmp_path_factory.mktemp("masked") / "run"
    done = scripts.train(workdir, *MASKED)
    assert done.returncode == 0, done.stderr
    return workdir, done


def table(text):
    """{predictor: [nats, perplexity]} of what was printed."""
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    return {name: [float(number) for number in numbers] for name, *numbers in rows}


def test_it_trains_as_others_do_and_its_loss_falls(masked):
    workdir, done = masked
    rows = numbers(workdir)
    assert messages(done) == [] and saved_steps(workdir) == [15, 20]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert [row["step"] for row in rows if "loss" in row] == LOGGED
    assert [row["step"] for row in rows if "validation_loss" in row] == EVALUATED
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(masked, scripts, tmp_path):
    done = scripts.train(tmp_path / "run", *MASKED, "train.num_steps=14")
    assert done.returncode == 0, done.stderr
    done = scripts.train(tmp_path / "run", *MASKED)
    assert done.returncode == 0 and "resuming from step 14" in done.stdout, done.stderr
    assert_same_run(tmp_path / "run", masked[0])


def expected_loss(trained, tokens):
    """In nats per masked token, every window alone, in NumPy but for the model."""
    mask_id, losses = trained.task.tokenizer.vocab_size, []
    apply = jax.jit(nn.merge(trained.graphdef, trained.params))
    batches = data.sequential_masked_windows(
        tokens, batch_size=1, context=16, mask_id=mask_id, mask_rate=0.3
    )
    for batch in batches:
        logits = np.asarray(apply(batch["inputs"]), np.float64)[0]
        assert logits.shape[1] == mask_id + 1
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place in np.nonzero(batch["weights"][0])[0]:
            losses.append(-log_probabilities[place, batch["targets"][0, place]])
    assert 0.25 < len(losses) / len(tokens) < 0.35
    return np.mean(losses)


def test_the_loss_over_the_validation_text_is_that_of_the_masked_tokens(masked, scripts, tmp_path):
    workdir, _ = masked
    before = files_of(workdir)
    done, again = (scripts.run("evaluate", f"--workdir={workdir}") for _ in range(2))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout == again.stdout
    assert "nats per masked token" in done.stdout and "neither a decoder's loss" in done.stdout
    printed = table(done.stdout)
    assert list(printed) == ["model", "uniform", "unigram"]
    trained = setup.load_run(str(workdir))
    tokens = trained.task.tokenizer.encode(scripts.corpus.read_text())
    loss = expected_loss(trained, tokens[int(len(tokens) * 0.9) :])
    np.testing.assert_allclose(printed["model"], [loss, np.exp(loss)], rtol=0, atol=2e-3)
    assert table((workdir / "report.md").read_text()) == printed
    assert files_of(workdir) == before

    other = tmp_path / "other.txt"
    other.write_text("a dog sat")  # shorter than a window
    done = scripts.run("evaluate", f"--workdir={workdir}", f"--text={other}")
    assert done.returncode == 0 and "9 tokens" in done.stdout, done.stderr
    assert np.isfinite(table(done.stdout)["model"]).all()


def test_the_report_shows_blanks_their_answers_and_where_the_model_looked(masked, scripts):
    workdir, done = masked
    report, sample = ((workdir / name).read_text() for name in ("report.md", "sample.txt"))
    assert report in done.stdout and sample.strip("\n") in report
    assert report.startswith("# char_lm\n\nAn encoder of ")
    assert "](figures/attention_layer_1.png)" in report
    assert {"figures/loss.png", "figures/attention_layer_1.png"} <= files_of(workdir).keys()

    text = scripts.corpus.read_text()
    start = text[int(len(text) * 0.9) :][:16]  # 23 tokens: a window and a bit
    blanks, title, filled, *rest = sample.splitlines()
    assert len(blanks) == len(filled) == 16 and blanks.count("□") == 5  # round(0.3 * 16)
    assert all(b in ("□", c) for b, c in zip(blanks, start, strict=True))
    assert all(b in ("□", c) for b, c in zip(blanks, filled, strict=True))
    right = sum(b == "□" and f == c for b, f, c in zip(blanks, filled, start, strict=True))
    assert title == f"--- filled in by the model: {right} of 5 are right ---"
    assert rest[0] == "--- wrong ---" and rest[1].count(" for ") == 5 - right


def test_a_page_says_what_it_expects_behind_masks(masked, scripts, tmp_path):
    workdir, _ = masked
    page = tmp_path / "page.html"
    done = scripts.run(
        "visualize", f"--workdir={workdir}", "--text=[MASK]he c[MASK]t", f"--out={page}"
    )
    assert done.returncode == 0, done.stderr
    shown = data_of(page.read_text(encoding="utf-8"))
    assert shown["views"][0]["queries"] == ["[MASK]", "h", "e", " ", "c", "[MASK]", "t"]
    (table,) = shown["tables"]
    assert table["tokens"] == [0, 5]
    trained = setup.load_run(str(workdir))
    tokenizer = trained.task.tokenizer
    tokens = tokenizer.encode("_he c_t".replace("_", "t"))
    tokens[[0, 5]] = tokenizer.vocab_size
    chances = jax.nn.softmax(nn.merge(trained.graphdef, trained.params)(tokens[None])[0])
    where = ["[MASK] he␣c[MASK]t", "[MASK]he␣c [MASK] t"]
    for place, row, around in zip([0, 5], table["rows"], where, strict=True):
        best = np.argmax(chances[place, :-1])
        assert row[1] == f"{viz.visible(tokenizer.decode([best]))} {chances[place, best]:.0%}"
        assert (row[0], row[-1]) == (str(place + 1), around)
        assert len(row) == len(table["columns"]) == 7


def test_it_does_not_continue_a_text(masked, scripts):
    done = scripts.run("generate", f"--workdir={masked[0]}")
    assert_one_sentence(done, str(masked[0]), "masked tokens", "cannot continue a text")


@pytest.mark.parametrize(
    "fields, words",
    [
        (["task=guess"], ["config.task", "'masked_lm'", "got 'guess'"]),
        (["task=masked_lm", "data.mask_rate=1.5"], ["config.data.mask_rate", "(0, 1)", "1.5"]),
        (["task=masked_lm", "model.mixer=gru"], ["model.mixer", "'gru'", "no encoder can use it"]),
    ],
)
def test_what_cannot_be_trained_ends_in_one_sentence_and_leaves_nothing(
    scripts, tmp_path, fields, words
):
    assert_one_sentence(scripts.train(tmp_path / "run", *fields), *words)
    assert not (tmp_path / "run").exists()


def test_another_task_is_another_run(masked, scripts):
    before = files_of(masked[0])
    done = scripts.train(masked[0], *MASKED[1:])
    assert_one_sentence(done, "config.task", "masked_lm", "causal_lm")
    assert files_of(masked[0]) == before


def test_a_mixer_without_attention_weights_has_a_report_without_their_pictures(scripts, tmp_path):
    done = scripts.train(
        tmp_path / "run", *MASKED, "model.mixer=linformer", "model.rank=4", "train.num_steps=3"
    )
    assert done.returncode == 0 and messages(done) == [], done.stderr
    assert "There are no pictures of attention (attention_maps: layer 0, Linformer" in done.stdout
    assert "figures/attention_layer_1.png" not in files_of(tmp_path / "run")
