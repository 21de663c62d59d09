"""Evaluating a run: the loss is that of the model, computed again in NumPy, over the whole text."""

import re
import shutil

import numpy as np
import pytest

from qkv_jax.data import Tokenizer
from qkv_jax.training import load_checkpoint
from tests.experiments.runs import assert_one_sentence, files_of

CONTEXT, HEADS = 16, 2


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def rotated(x):
    """x [T, N, H], the first half of each head's coordinates paired with the second."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * 1e4 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


def log_probabilities(params, tokens):
    """The model of the tiny config, for one window [T]: float64 [T, V]."""
    T = len(tokens)
    x = params["embedding/embedding"][tokens]
    block = {
        name.removeprefix("blocks/0/"): leaf
        for name, leaf in params.items()
        if name.startswith("blocks/0/")
    }
    y = rms_norm(x, block["mixer_norm/scale"])
    q, k, v = (
        (y @ block[f"mixer/{name}/kernel"]).reshape(T, HEADS, -1)
        for name in ("query", "key", "value")
    )
    q = rotated(rms_norm(q, block["mixer/query_norm/scale"]))
    k = rotated(rms_norm(k, block["mixer/key_norm/scale"]))
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    x = x + np.einsum("nts,snh->tnh", weights, v).reshape(T, -1) @ block["mixer/out/kernel"]
    y = rms_norm(x, block["feed_forward_norm/scale"])
    hidden = np.maximum(y @ block["feed_forward/up/kernel"], 0) ** 2
    x = x + hidden @ block["feed_forward/down/kernel"]
    logits = rms_norm(x, params["final_norm/scale"]) @ params["head/kernel"]
    logits = 15 * np.tanh(logits / 15)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def expected_loss(workdir, tokens):
    """In nats per token, each window alone; the text's first token is not predicted."""
    _, leaves = load_checkpoint(workdir / "checkpoints")
    params = {
        name.removeprefix("params/"): leaf.astype(np.float64)
        for name, leaf in leaves.items()
        if name.startswith("params/")
    }
    losses = []
    for start in range(0, len(tokens) - 1, CONTEXT):
        window = tokens[start : start + CONTEXT + 1]
        predicted = log_probabilities(params, window[:-1])
        losses += [-predicted[i, target] for i, target in enumerate(window[1:])]
    assert len(losses) == len(tokens) - 1
    return np.mean(losses)


def table(text):
    """{predictor: [nats, bits, perplexity]} of what was printed."""
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    return {name: [float(number) for number in numbers] for name, *numbers in rows}


def assert_scores(scores, loss):
    """Losses are printed to four digits after the point; a token is a character here."""
    np.testing.assert_allclose(scores[0], loss, rtol=0, atol=6e-5)
    np.testing.assert_allclose(scores[2], np.exp(loss), rtol=0, atol=2e-3)


def test_the_loss_over_the_validation_text_equals_numpys(scripts, finished):
    text = scripts.corpus.read_text()
    tokens = Tokenizer.load(finished / "tokenizer.json").encode(text)
    boundary = int(len(tokens) * 0.9)
    before = files_of(finished)
    done = scripts.run("evaluate", f"--workdir={finished}")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"step 20, on the validation part of {scripts.corpus}" in done.stdout
    printed = table(done.stdout)
    assert list(printed) == ["model", "uniform", "unigram", "bigram"]
    assert_scores(printed["model"], expected_loss(finished, tokens[boundary:]))
    assert_scores(printed["uniform"], np.log(len(set(text))))
    counts = np.bincount(tokens[:boundary]) + 1
    assert_scores(printed["unigram"], -np.log(counts / counts.sum())[tokens[boundary:]].mean())
    assert files_of(finished) == before
    # The report of the training has the same table.
    assert table((finished / "report.md").read_text()) == printed


def test_another_text_is_evaluated_whole(scripts, finished, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("a dog sat on the cat and the cat looked at a mat.")
    tokens = Tokenizer.load(finished / "tokenizer.json").encode(other.read_text())
    done = scripts.run("evaluate", f"--workdir={finished}", f"--text={other}")
    assert done.returncode == 0, done.stderr
    assert f"on all of {other}" in done.stdout and f"{len(tokens)} tokens" in done.stdout
    scores = table(done.stdout)["model"]
    loss = expected_loss(finished, tokens)
    assert_scores(scores, loss)
    bits = loss / np.log(2) * (len(tokens) - 1) / len(tokens)  # the first character costs nothing
    np.testing.assert_allclose(scores[1], bits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "content, words",
    [
        ("The cat sat", ["'T'", "position 0"]),
        ("a", ["1 token"]),
        (None, ["other.txt", "does not exist"]),
    ],
)
def test_a_text_that_cannot_be_evaluated_ends_in_one_sentence(
    scripts, finished, tmp_path, content, words
):
    other = tmp_path / "other.txt"
    if content is not None:
        other.write_text(content)
    done = scripts.run("evaluate", f"--workdir={finished}", f"--text={other}")
    assert_one_sentence(done, *words)


def test_a_run_that_is_not_there_ends_in_one_sentence(scripts, tmp_path):
    done = scripts.run("evaluate", f"--workdir={tmp_path}")
    assert_one_sentence(done, str(tmp_path), "holds no run", "train one there first")


def test_a_corpus_that_has_changed_since_is_refused(scripts, finished, tmp_path):
    config = (finished / "config.json").read_text()
    changed = tmp_path / "changed.txt"
    changed.write_text(scripts.corpus.read_text()[:-1] + " a")
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "config.json").write_text(config.replace(str(scripts.corpus), str(changed)))
    assert_one_sentence(scripts.run("evaluate", f"--workdir={workdir}"), "another text")
