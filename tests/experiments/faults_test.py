"""Whatever stops a run, nothing saved is lost, and the run that goes on ends equal to the bit."""

import random
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from qkv_jax.training import load_checkpoint
from tests.experiments.runs import (
    SLOWLY,
    assert_one_sentence,
    assert_same_run,
    files_of,
    finish,
    has_logged,
    heartbeat,
    is_saving,
    messages,
    numbers,
    saved_steps,
    wait_until,
)


def kill(process):
    process.kill()
    assert finish(process).returncode == -signal.SIGKILL  # it had not ended by itself


def test_a_run_killed_while_saving_and_again_while_training_ends_the_same(
    scripts, finished, tmp_path
):
    process = scripts.start_training(tmp_path, patch=SLOWLY)
    wait_until(lambda: is_saving(tmp_path, 10), process)
    kill(process)
    assert saved_steps(tmp_path) == [5]

    process = scripts.start_training(tmp_path, patch=SLOWLY)
    wait_until(lambda: has_logged(tmp_path, 12), process)
    kill(process)
    assert heartbeat(tmp_path)["status"] == "running"  # it had no time to say otherwise
    assert heartbeat(tmp_path)["pid"] == process.pid

    done = scripts.train(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming from step " in done.stdout
    assert_same_run(tmp_path, finished)
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_random_points_ends_the_same(scripts, tmp_path, seed):
    fields = (
        "optimizer.name=muon", "optimizer.accumulate=2", "model.num_layers=2",
        "train.num_steps=40", "train.save_every=4", "train.keep=1",
    )  # fmt: skip
    done = scripts.train(tmp_path / "unbroken", *fields)
    assert done.returncode == 0, done.stderr

    workdir, choose = tmp_path / "killed", random.Random(seed)
    for target in (8, 16, 24, 32):
        process = scripts.start_training(workdir, *fields, patch=SLOWLY)
        if choose.random() < 0.5:
            wait_until(lambda target=target: is_saving(workdir, target), process)
            time.sleep(choose.uniform(0, 0.05))
        else:
            wait_until(lambda target=target: has_logged(workdir, target), process)
            time.sleep(choose.uniform(0, 0.3))
        kill(process)
    done = scripts.train(workdir, *fields)
    assert done.returncode == 0, done.stderr
    assert_same_run(workdir, tmp_path / "unbroken")


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_a_run_after_its_step_saved_and_resumable(
    scripts, finished, tmp_path, number
):
    process = scripts.start_training(tmp_path, "train.save_every=0", patch=SLOWLY)
    wait_until(lambda: has_logged(tmp_path, 4), process)
    process.send_signal(number)
    done = finish(process)
    assert done.returncode == 0, done.stderr
    (step,) = saved_steps(tmp_path)
    assert 4 <= step < 20  # at once: the rest would have taken two seconds
    stopped = f"stopped by {number.name} after step {step}, saved; the same command goes on"
    assert stopped in done.stdout and "Traceback" not in done.stderr
    assert not (tmp_path / "report.md").exists()
    assert heartbeat(tmp_path)["status"] == f"stopped by {number.name}"
    assert heartbeat(tmp_path)["step"] == step

    done = scripts.train(tmp_path)
    assert done.returncode == 0 and f"resuming from step {step}" in done.stdout, done.stderr
    assert_same_run(tmp_path, finished)


def limit_file_size(process, size):
    """From now on the process can make no file longer than that, as on a disk that is full."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux's prlimit")
def test_a_full_disk_ends_the_run_in_one_sentence_and_it_resumes_when_there_is_room(
    scripts, finished, tmp_path
):
    process = scripts.start_training(tmp_path, patch=SLOWLY)
    wait_until(lambda: 5 in saved_steps(tmp_path), process)
    limit_file_size(process, 2**12)  # a checkpoint is larger, a line of metrics is not
    done = finish(process)
    assert_one_sentence(done, "cannot save checkpoint", str(tmp_path))
    assert saved_steps(tmp_path) == [5]
    assert max(row["step"] for row in numbers(tmp_path)) < 20  # it did not train on unsaved

    done = scripts.train(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 5" in done.stdout
    assert_same_run(tmp_path, finished)


@pytest.mark.slow
def test_a_disk_without_a_byte_left_ends_the_run_in_one_sentence(scripts, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small disk: {error}")
    try:
        done = scripts.train(tmp_path / "run", "train.keep=9")
        assert_one_sentence(done, "no space left on the disk")
        steps = saved_steps(tmp_path / "run")
        for step in steps:
            load_checkpoint(tmp_path / "run" / "checkpoints", step=step)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


# So large that the second step's parameters overflow; what normalises them hides it for a while.
DIVERGING = ("optimizer.learning_rate=3e38", "optimizer.warmup_steps=0")


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(scripts, tmp_path):
    done = scripts.train(tmp_path, *DIVERGING)
    assert_one_sentence(done, "step 3: the loss is nan", "learning rate")
    assert saved_steps(tmp_path) == []
    assert heartbeat(tmp_path)["status"].startswith("failed: FloatingPointError step 3: the loss")
    assert all(np.isfinite(list(row.values())).all() for row in numbers(tmp_path))


def test_parameters_that_are_not_finite_never_reach_a_checkpoint(scripts, tmp_path):
    done = scripts.train(tmp_path, *DIVERGING, "train.save_every=1")
    assert_one_sentence(done, "step 2: params/", "is not finite")
    step, leaves = load_checkpoint(tmp_path / "checkpoints")
    assert step == 1
    assert all(np.isfinite(leaf).all() for leaf in leaves.values())


def test_a_loss_that_jumps_stops_the_run_which_goes_on_from_before_it(scripts, tmp_path):
    fields = (
        "train.spike_factor=2.0", "train.log_every=1", "train.save_every=55",
        "train.eval_every=100", "train.figures=False", "optimizer.schedule=constant",
    )  # fmt: skip
    done = scripts.train(tmp_path, *fields, "train.num_steps=110")
    assert done.returncode == 0, done.stderr
    (tmp_path / "report.md").unlink()  # a finished run keeps its learning rate
    done = scripts.train(
        tmp_path,
        *fields,
        "train.num_steps=120",
        "optimizer.learning_rate=9.0",
        "train.save_every=1",
    )
    # The loss of step 111 is of the parameters before it, and that of 112 of those after it.
    warning, sentence = messages(done)
    assert "config.optimizer.learning_rate: 0.003 there, 9.0 now" in warning
    words = (
        "error: step 116: the loss is ", "since step 112 more than 2 times the recent median",
        "checkpoint from before is 110: remove 111 to go on from there",
    )  # fmt: skip
    assert done.returncode == 2 and all(word in sentence for word in words), sentence
    assert saved_steps(tmp_path) == [110, 111]
    assert heartbeat(tmp_path)["status"].startswith("failed: LossSpikeError step 116: the loss")

    shutil.rmtree(tmp_path / "checkpoints" / "111")
    done = scripts.train(tmp_path, *fields, "train.num_steps=120")
    assert done.returncode == 0 and "resuming from step 110" in done.stdout, done.stderr
    assert max(row.get("loss", 0) for row in numbers(tmp_path) if row["step"] > 110) < 3
    assert saved_steps(tmp_path) == [110, 120]


def flip_a_bit(step):
    path = max(step.glob("arrays/**/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(step):
    path = max(step.glob("arrays/**/d/*"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:100])


def remove_manifest(step):
    shutil.rmtree(step / "manifest")


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        pytest.param(truncate, marks=pytest.mark.slow),
        pytest.param(remove_manifest, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_goes_on(
    scripts, finished, tmp_path, damage
):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    damage(workdir / "checkpoints" / "20")
    done = scripts.train(workdir)
    assert done.returncode == 0, done.stderr
    assert "checkpoint 20 is broken" in done.stderr and "20.broken" in done.stderr
    assert "resuming from step 15" in done.stdout
    assert (workdir / "checkpoints" / "20.broken").is_dir()
    assert_same_run(workdir, finished)


def test_when_no_checkpoint_can_be_read_all_are_kept_and_one_sentence_says_so(
    scripts, finished, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    flip_a_bit(workdir / "checkpoints" / "15")
    truncate(workdir / "checkpoints" / "20")
    before = files_of(workdir)
    done = scripts.train(workdir)
    assert_one_sentence(done, "no checkpoint in ", "can be read, all are kept", "15: ", "20: ")
    assert files_of(workdir) == before


def test_a_run_killed_before_its_report_writes_it_and_trains_no_more(scripts, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for name in ("report.md", "sample.txt", "figures/loss.png"):
        (workdir / name).unlink()
    done = scripts.train(workdir)
    assert done.returncode == 0 and "resuming from step 20" in done.stdout, done.stderr
    assert files_of(workdir).keys() >= {"report.md", "figures/loss.png"}
    assert_same_run(workdir, finished)


def test_metrics_damaged_by_hand_end_in_one_sentence(scripts, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join([*lines[:3], "what is this\n", *lines[3:]]))
    done = scripts.train(workdir, "train.num_steps=26")
    assert_one_sentence(done, "metrics.jsonl, line 4", "not a JSON object")
    assert saved_steps(workdir) == [15, 20]


ASKED_TO_STOP_FROM_THE_NTH_LOOK_ON = """
from qkv_jax.training import StopSignal
looks = 0
def requested(self):
    global looks
    looks += 1
    self.name = "SIGTERM"
    return looks >= {n}
StopSignal.requested = property(requested, lambda self, value: None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_signal_at_any_moment_of_the_loop_is_followed_by_a_save(scripts, tmp_path, n):
    patch = ASKED_TO_STOP_FROM_THE_NTH_LOOK_ON.format(n=n)
    done = finish(scripts.start_training(tmp_path, "train.save_every=0", patch=patch))
    assert done.returncode == 0, done.stderr
    (step,) = saved_steps(tmp_path)
    assert f"after step {step}, saved" in done.stdout
