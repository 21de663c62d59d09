"""Token files from the command line, and runs that learn from them."""

import json
import os

import jax
import numpy as np
import pytest

from experiments import setup
from experiments.tasks import TextTask
from experiments.text import keep_text
from qkv_jax import data, nn
from qkv_jax.data.token_files import file_facts
from qkv_jax.training.run_directory import open_run
from tests.experiments.runs import (
    SLOWLY,
    assert_one_sentence,
    assert_same_run,
    finish,
    has_logged,
    heartbeat,
    saved_steps,
    wait_until,
)
from tests.experiments.setup_test import SMALL, make_config, sentence

DOCUMENTS = [f"document {i}: the cat sat on mat {i * i}, and so on." for i in range(97)]


def write(folder, name: str, tokenizer: data.Tokenizer):
    lines = folder / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    data.write_token_files([lines], folder / name, lambda _: tokenizer, named=name)
    return folder / name


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path, "tokens", data.CharTokenizer("\n".join(DOCUMENTS)))


def task_of(folder, **fields) -> TextTask:
    config = make_config(folder, SMALL | {"data.corpus": "token_files"} | fields)
    settings = setup.resolve(config)
    return settings.task(settings)


# --- the script ---------------------------------------------------------------------------------


def test_the_script_makes_a_folder_and_verifies_it(scripts, folder, tmp_path):
    flags = [f"--input={folder.parent / '*.jsonl'}", "--tokenizer=char", f"--out={tmp_path / 'o'}"]
    done = scripts.run("prepare_tokens", *flags)
    assert done.returncode == 0, done.stderr
    assert "part 1/1" in done.stdout and "97 documents" in done.stdout
    made = data.TokenFiles.open(tmp_path / "o")
    assert made.sha256 == data.TokenFiles.open(folder).sha256
    again = scripts.run("prepare_tokens", *flags)
    assert again.returncode == 0 and "finished before; verified" in again.stdout
    other = scripts.run("prepare_tokens", *flags, "--vocab_size=300")
    assert_one_sentence(other, "another tokenizer", "choose another folder")


# --- runs ---------------------------------------------------------------------------------------


def test_a_run_reads_each_window_once_an_epoch_and_any_process_its_share(folder):
    task = task_of(folder, **{"train.batch_size": 4, "train.steps_per_dispatch": 3})
    train = task.text.train
    assert len(train) == int(len(task.text.corpus.tokens) * 0.9)
    num_windows = (len(train) - 1) // 13
    batches = [task.train_batches(step) for step in range(0, num_windows // 4 + 1, 3)]
    seen = np.concatenate([batch["inputs"].reshape(-1, 13) for batch in batches])[:num_windows]
    windows = np.asarray(train[: num_windows * 13]).reshape(-1, 13)
    as_bytes = [sorted(row.astype(np.int32).tobytes() for row in rows) for rows in (seen, windows)]
    assert len(seen) == num_windows > 100 and as_bytes[0] == as_bytes[1]
    for processes in (1, 2, 4):
        shares = [
            task.train_rows(3, slice(first, first + 4 // processes))["targets"]
            for first in range(0, 4, 4 // processes)
        ]
        np.testing.assert_array_equal(np.concatenate(shares, axis=1), batches[1]["targets"])


def memory(name: str) -> int:
    """Bytes of this process, as Linux counts them: mapped pages of files are among them."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{name}:"))


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
@pytest.mark.parametrize("corpus", ["token_files", "token_documents"])
def test_ten_gigabytes_of_tokens_cost_no_more_than_200_megabytes(tmp_path, corpus):
    folder = write(tmp_path, "tokens", data.ByteTokenizer())
    facts = {}
    for name, dtype, length in (("tokens", "|u1", 10**10), ("documents", "<i8", 10**7)):
        with open(folder / f"{name}.npy", "wb") as file:  # zeros, of which no block is on the disk
            head = {"descr": dtype, "fortran_order": False, "shape": (length,)}
            np.lib.format.write_array_header_1_0(file, head)
            file.truncate(file.tell() + length * np.dtype(dtype).itemsize)
        facts |= file_facts(folder / f"{name}.npy", length, "")
    header = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps(header | facts))

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is that from here on
    before, own = memory("VmRSS"), memory("RssAnon")
    task = task_of(
        folder, **{"data.corpus": corpus, "data.context": 1024, "train.batch_size": 512,
                   "train.steps_per_dispatch": 1},
    )  # fmt: skip
    for step in range(5):
        assert task.train_batches(step)["inputs"].shape == (1, 512, 1024)
    assert memory("VmHWM") - before < 50e6
    assert memory("RssAnon") - own < 50e6


@pytest.mark.parametrize("corpus", ["text_file", "token_files"])
@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm"])
def test_what_a_process_reads_is_its_rows_in_every_task(folder, corpus, kind):
    path = folder if corpus == "token_files" else folder.parent / "lines.jsonl"
    task = task_of(path, **{"data.corpus": corpus, "task": kind, "train.batch_size": 4})
    whole, part = task.train_batches(2), task.train_rows(2, slice(1, 3))
    assert all(np.array_equal(part[name], whole[name][:, 1:3]) for name in whole)


def test_in_packed_documents_no_logit_depends_on_another_document(folder):
    task = task_of(folder, **{"data.corpus": "token_documents", "data.context": 61})
    (batch, *_) = task.eval_batches()
    batch = {name: array[:1] for name, array in batch.items()}
    edge = int(np.argmax(batch["segments"][0] == 1))
    assert edge > 0 and batch["positions"][0, edge] == 0 and batch["weights"][0, edge - 1] == 0
    graphdef, params = setup.make_model(task.settings, task.vocab_size)
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    for block in params["blocks"].values():
        block["mixer"]["out"]["kernel"] = jax.random.normal(
            jax.random.key(2), block["mixer"]["out"]["kernel"].shape
        )
    predict = jax.jit(lambda batch: task.predict(nn.merge(graphdef, params), batch, None))
    other = batch | {"inputs": batch["inputs"].copy()}
    other["inputs"][0, :edge] = (other["inputs"][0, :edge] + 1) % task.vocab_size
    logits, changed = predict(batch), predict(other)
    np.testing.assert_array_equal(logits[0, edge:], changed[0, edge:])
    assert not np.array_equal(logits[0, :edge], changed[0, :edge])


@pytest.mark.parametrize("corpus", ["token_files", "token_documents"])
def test_the_whole_validation_text_is_measured_in_bits_per_character(folder, corpus):
    task = task_of(folder, **{"data.corpus": corpus})
    sums = sum(batch["weights"].sum() for batch in task.all_batches())
    assert sums == task.text.validation_targets
    documents = "".join(task.tokenizer.decode(task.text.validation)).count("\n")
    expected = len(task.text.validation) - 1
    assert sums == (expected if corpus == "token_files" else expected - documents + 1)
    graphdef, params = setup.make_model(task.settings, task.vocab_size)
    scores = task.measure(graphdef, params)
    characters = task.text.validation_characters
    assert characters == len(task.text.validation)  # characters are the tokens
    bits = scores["loss"] * sums / np.log(2) / characters
    assert scores["bits_per_character"] == pytest.approx(bits)
    assert set(task.floors()) == {"uniform", "unigram", "bigram"}


FIELDS = [
    ({"data.path": None}, ["token_files", "needs a path"]),
    ({"data.tokenizer": "bpe"}, ["config.data.tokenizer", "'bpe'", "'char' of"]),
    ({"data.vocab_size": 300}, ["config.data.vocab_size", "300"]),
    ({"task": "masked_lm", "data.corpus": "token_documents"}, ["causal_lm", "'token_files'"]),
    ({"data.corpus": "tokens"}, ["corpus 'tokens' is unknown", "token_documents"]),
    ({"data.context": 10**6}, ["shorter context"]),
]


@pytest.mark.parametrize(("fields", "words"), FIELDS)
def test_settings_that_token_files_decide_are_refused(folder, capsys, fields, words):
    said = sentence(capsys, lambda: task_of(folder, **fields))
    assert all(word in said for word in words), said


def test_a_run_is_bound_to_its_token_files(folder, tmp_path, capsys):
    config = make_config(folder, SMALL | {"data.corpus": "token_files"})
    run = open_run(tmp_path / "run", config)
    task = task_of(folder)
    keep_text(run, task.text)
    assert type(task).of_run(task.settings, run).text.corpus.sha256 == task.text.corpus.sha256

    masked = task_of(folder, task="masked_lm")
    os.utime(folder / "tokens.npy", ns=(0, 0))
    for one in (task, masked):
        for read in (one.train_batches, lambda _, one=one: next(one.eval_batches()),
                     lambda _, one=one: next(one.all_batches())):  # fmt: skip
            assert "changed since it was opened" in sentence(capsys, lambda read=read: read(0))

    other = task_of(write(tmp_path, "other", data.ByteTokenizer()))
    assert "another text" in sentence(capsys, lambda: keep_text(run, other.text))
    moved = setup.resolve(make_config(tmp_path / "other", SMALL | {"data.corpus": "token_files"}))
    task = type(task).of_run(moved, run)
    assert "another tokenizer" in sentence(capsys, lambda: task.text)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_file_that_changes_while_a_batch_is_read_ends_in_one_sentence(
    folder, monkeypatch, capsys, after
):
    task, path = task_of(folder), folder / "tokens.npy"
    pread, reads = os.pread, []

    def pread_and_truncate(*args):
        reads.append(args)
        if len(reads) == after + 1:
            os.truncate(path, path.stat().st_size // 2)
        return pread(*args)

    monkeypatch.setattr(os, "pread", pread_and_truncate)
    said = sentence(capsys, lambda: task.train_batches(0))
    assert str(folder) in said and "tokens.npy" in said and "since it was opened" in said


def test_a_file_that_is_truncated_ends_the_run_in_one_sentence(scripts, folder, tmp_path):
    fields = f"data.path={folder}", "data.corpus=token_files"
    workdir = tmp_path / "run"
    process = scripts.start_training(workdir, *fields, patch=SLOWLY)
    wait_until(lambda: has_logged(workdir, 6), process)
    os.truncate(folder / "tokens.npy", 200)
    done = finish(process)
    assert_one_sentence(done, "tokens.npy", str(folder), "since it was opened")
    assert saved_steps(workdir)[-1] >= 5
    assert heartbeat(workdir)["status"].startswith("failed: ValueError ")
    assert_one_sentence(scripts.train(workdir, *fields), "tokens.npy", "truncated?")


@pytest.mark.slow
def test_a_run_that_was_killed_resumes_equal_to_the_bit_and_the_scripts_read_it(
    scripts, folder, tmp_path
):
    fields = (f"data.path={folder}", "data.corpus=token_documents")
    assert scripts.train(tmp_path / "whole", *fields).returncode == 0
    process = scripts.start_training(tmp_path / "parts", *fields, patch=SLOWLY)
    wait_until(lambda: has_logged(tmp_path / "parts", 12), process)
    process.kill()
    finish(process)
    done = scripts.train(tmp_path / "parts", *fields)
    assert done.returncode == 0 and "resuming from step" in done.stdout
    assert_same_run(tmp_path / "parts", tmp_path / "whole")

    done = scripts.run("evaluate", f"--workdir={tmp_path / 'parts'}")
    assert done.returncode == 0 and "each document's first" in done.stdout
    done = scripts.run("generate", f"--workdir={tmp_path / 'parts'}", "--num_tokens=3")
    assert done.returncode == 0, done.stderr
