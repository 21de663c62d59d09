"""Training by two processes of two devices each: as by one, whatever happens to either."""

import json
import signal
import socket

import numpy as np
import pytest

from qkv_jax.training import load_checkpoint
from qkv_jax.training.writers import read_metrics
from tests.experiments.runs import (
    SLOWLY,
    assert_same_run,
    finish,
    has_logged,
    saved_steps,
    wait_until,
)

MESH = ("mesh.data=1", "mesh.fsdp=4")  # no process has all of a parameter
QUICK = ("train.figures=False", "train.sample_tokens=1")
# So that a process that was killed is missed sooner.
IMPATIENT = "from qkv_jax.training import processes\nprocesses.HEARTBEAT = 5\n"


def start(scripts, workdir, *fields, patch="", others=()):
    """Two processes; `others` are flags of the second one alone."""
    flags = [f"--coordinator={free_address()}", "--process_count=2", "--join_timeout=100"]
    flags += scripts.training(workdir, *MESH, *QUICK, *fields)
    return [
        scripts.start("train", f"--process_index={i}", *flags, *(others if i else ()), patch=patch)
        for i in range(2)
    ]


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


@pytest.fixture(scope="module")
def unbroken(scripts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    first, second = map(finish, start(scripts, workdir))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "4 x cpu, 2 processes" in first.stdout
    assert second.stdout == ""
    return workdir


def test_two_processes_train_what_one_trains(unbroken, finished):
    (step, leaves), (_, expected) = (
        load_checkpoint(run / "checkpoints") for run in (unbroken, finished)
    )
    assert step == 20
    for name, leaf in leaves.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
    mine, theirs = (read_metrics(run / "metrics.jsonl") for run in (unbroken, finished))
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (mine, theirs)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    scores = [
        json.loads((run / "result.json").read_text())["scores"] for run in (unbroken, finished)
    ]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=1e-4)


def test_each_process_writes_what_its_devices_hold(unbroken):
    parts = [unbroken / "checkpoints" / "20" / f"part_{i}" / "arrays.npy" for i in range(2)]
    sizes = [path.stat().st_size for path in parts]
    assert sizes[1] > 0.2 * sizes[0]  # the first has what is not cut, too


def test_a_signal_to_one_stops_both_and_a_kill_of_one_ends_both_and_the_run_ends_the_same(
    scripts, unbroken, tmp_path
):
    pair = start(scripts, tmp_path, patch=SLOWLY)
    wait_until(lambda: has_logged(tmp_path, 2), pair[0])
    pair[1].send_signal(signal.SIGTERM)
    first, second = map(finish, pair)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "stopped by a signal after step" in first.stdout
    (stopped,) = {max(saved_steps(tmp_path))}
    assert 2 <= stopped < 20

    pair = start(scripts, tmp_path, "train.save_every=3", patch=IMPATIENT + SLOWLY)
    wait_until(lambda: has_logged(tmp_path, stopped + 4), pair[0])
    pair[1].kill()
    assert finish(pair[1]).returncode == -signal.SIGKILL
    assert finish(pair[0]).returncode not in (0, -signal.SIGKILL)  # it ends by itself

    first, second = map(finish, start(scripts, tmp_path))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "resuming from step " in first.stdout
    assert_same_run(tmp_path, unbroken)
    assert not list((tmp_path / "checkpoints").glob("*.parts"))


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_two(scripts, tmp_path):
    fields = *QUICK, "optimizer.schedule=constant"
    done = scripts.train(tmp_path, *fields, "train.num_steps=7")
    assert done.returncode == 0, done.stderr
    first, second = map(finish, start(scripts, tmp_path, *fields, "train.num_steps=11"))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "resuming from step 7" in first.stdout


def one_sentence(done, *words):
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in said[0], said[0]


def test_unequal_configs_are_one_sentence_on_every_process(scripts, tmp_path):
    others = ["--config.seed=3", "--config.train.batch_size=8"]
    for done in map(finish, start(scripts, tmp_path / "run", others=others)):
        one_sentence(done, "config.seed: 0 of process 0, 3 of process 1", "config.train.batch_size")
    assert not (tmp_path / "run").exists()


def test_what_one_process_cannot_do_ends_both(scripts, tmp_path):
    (tmp_path / "run").write_text("a file")  # which the first alone would write to
    for done in map(finish, start(scripts, tmp_path / "run")):
        one_sentence(done, "is a file; choose another --workdir")


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_never_comes_ends_the_others(scripts, tmp_path, index):
    address = free_address()
    done = finish(scripts.start(
        "train", f"--coordinator={address}", "--process_count=2", f"--process_index={index}",
        "--join_timeout=1", *scripts.training(tmp_path / "run"),
    ))  # fmt: skip
    one_sentence(done, f"process {index} waited 1 s at {address}")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--distributed"], "wanted coordinator, process_count and process_index"),
        (["--coordinator=host"], "coordinator: wanted host:port of process 0, got 'host'"),
        (["--coordinator=host:1", "--process_count=2"], "process_index"),
        (["--coordinator=h:1", "--process_count=2", "--process_index=2"], "in [0, 2), got 2"),
    ],
)
def test_flags_that_do_not_say_who_is_who_are_one_sentence(scripts, tmp_path, flags, words):
    one_sentence(scripts.run("train", *flags, *scripts.training(tmp_path / "run")), words)
