"""Checkpoints: exact, complete or absent, and never a wrong value from a damaged file."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qkv_jax.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    leaf_names,
    list_steps,
    load_checkpoint,
)


@jax.tree_util.register_dataclass
@dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple


def make_state(step: int) -> State:
    rng = np.random.default_rng(step)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(59, 61)), jnp.float32),
        "layers": {0: {"scale": jnp.asarray(rng.normal(size=3), jnp.bfloat16)}},
    }
    return State(jnp.int32(step), params, optax.adam(1e-3).init(params))


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for name, a, b in zip(
        leaf_names(expected), jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


@pytest.fixture
def two_steps(tmp_path) -> Path:
    directory = tmp_path / "checkpoints"
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(11, make_state(11))
        checkpointer.save(13, make_state(13))
    return directory


def largest_file(step: Path) -> Path:
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << (position % 8)
    path.write_bytes(data)


def test_a_train_state_comes_back_bit_for_bit(tmp_path):
    state = make_state(17)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(17, state)
        step, restored = checkpointer.restore(jax.eval_shape(lambda: state))
    assert step == 17
    assert_same_bits(restored, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_every_kind_of_array_comes_back_bit_for_bit(tmp_path):
    tree = {
        "bfloat16": jnp.arange(3, dtype=jnp.bfloat16) / 7,
        "big endian": np.arange(5, dtype=">i4"),
        "bool": np.array([True, False, True]),
        "empty": jnp.zeros((0, 5)),
        "empty_bfloat16": jnp.zeros((3, 0), jnp.bfloat16),
        "float64": np.array([1 / 3, np.nan, -0.0, np.inf]),
        "int32": jnp.arange(5),
        "int64": np.array(2**40),
        "numpy scalar": np.float64(0.1),
        "scalar": jnp.float32(2),
        "strided": np.arange(35.0).reshape(5, 7).T[::2],
        "uint32": jax.random.key_data(jax.random.key(3)),
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, tree)
        _, restored = checkpointer.restore(tree)
    tree["big endian"] = tree["big endian"].astype(np.int32)
    assert_same_bits(restored, tree)
    for name, leaf in tree.items():
        assert isinstance(restored[name], jax.Array) == isinstance(leaf, jax.Array), name


def test_nothing_saved_restores_as_none(tmp_path):
    with Checkpointer(tmp_path / "new") as checkpointer:
        assert checkpointer.restore(make_state(0)) is None
        assert checkpointer.steps() == []


def test_arrays_may_be_donated_or_changed_as_soon_as_save_returns(tmp_path):
    donated, changed = jnp.arange(10_007.0), np.arange(5)
    double = jax.jit(lambda x: x * 2, donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"donated": donated, "changed": changed})
        double(donated).block_until_ready()
        changed[:] = -1
        _, restored = checkpointer.restore({"donated": jnp.zeros(10_007), "changed": changed})
    np.testing.assert_array_equal(restored["donated"], np.arange(10_007.0))
    np.testing.assert_array_equal(restored["changed"], np.arange(5))


def test_only_the_newest_steps_are_kept(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (2, 3, 5, 10):
            checkpointer.save(step, make_state(step))
        checkpointer.wait()
        assert checkpointer.steps() == [5, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "5"]


def test_multiples_of_keep_every_stay_whatever_comes_after_them(tmp_path):
    for steps in ((2, 5, 7, 10), (12, 13, 16)):  # a run, and the same resumed
        with Checkpointer(tmp_path, keep=1, keep_every=5) as checkpointer:
            for step in steps:
                checkpointer.save(step, make_state(step))
    assert checkpointer.steps() == [5, 10, 16]


def test_a_step_can_be_asked_for_and_must_exist(two_steps):
    with Checkpointer(two_steps) as checkpointer:
        assert_same_bits(checkpointer.restore(make_state(0), step=11), (11, make_state(11)))
        with pytest.raises(CheckpointError, match=r"no checkpoint 12 in .*only \[11, 13\]"):
            checkpointer.restore(make_state(0), step=12)


def test_the_step_saved_or_restored_last_is_not_saved_again_and_no_other_is_overwritten(two_steps):
    with Checkpointer(two_steps) as checkpointer:
        checkpointer.restore(make_state(0))
        checkpointer.save(13, make_state(13))
        with pytest.raises(CheckpointError, match="has a checkpoint 11 already"):
            checkpointer.save(11, make_state(99))
    assert_same_bits(load_checkpoint(two_steps, make_state(0), step=11)[1], make_state(11))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": jnp.zeros((3, 5)), "b": jnp.zeros(7)}, "b is missing"),
        ({}, "a is not wanted"),
        ({"a": jnp.zeros((3, 7))}, r"a is float32\[3, 5\], not float32\[3, 7\]"),
        ({"a": jnp.zeros((3, 5), "bfloat16")}, r"a is float32\[3, 5\], not bfloat16\[3, 5\]"),
        ({"c": {"d": jnp.zeros((3, 5))}}, "c/d is missing; a is not wanted"),
    ],
)
def test_a_checkpoint_of_another_model_is_an_error_that_names_the_leaf(tmp_path, like, message):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": jnp.ones((3, 5))})
        checkpointer.save(2, {"a": jnp.ones((3, 5))})
        with pytest.raises(CheckpointError, match=message):
            checkpointer.restore(like)
        assert checkpointer.steps() == [1, 2]  # the checkpoint is sound and stays


def test_float64_is_not_restored_as_float32(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": np.ones(3)})
        with pytest.raises(CheckpointError, match="leaf a is float64: set jax_enable_x64"):
            checkpointer.restore({"a": jax.ShapeDtypeStruct((3,), np.float64)})


@pytest.mark.parametrize(
    "leaf", [3, "text", jax.random.key(0), np.array(["text"]), np.zeros(3, "i4,f4")]
)
def test_what_is_not_an_array_of_numbers_is_refused_by_name(tmp_path, leaf):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="leaf a/0 must be an array of numbers"):
            checkpointer.save(1, {"a": [leaf], "b": np.ones(3)})
        with pytest.raises(ValueError, match="holds no numbers"):
            checkpointer.save(1, {"a": np.ones((0, 3))})


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpointer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="keep_every must not be negative, got -1"):
        Checkpointer(tmp_path, keep_every=-1)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="step must not be negative, got -1"):
            checkpointer.save(-1, make_state(0))
        with pytest.raises(ValueError, match="the same name: a/b"):
            checkpointer.save(1, {"a": {"b": np.ones(3)}, "a/b": np.ones(3)})


def test_links_and_other_names_are_not_steps(two_steps, tmp_path):
    (two_steps / "17").symlink_to(two_steps / "11")
    (two_steps / "19").write_text("a file")
    for name in ("-1", "023", "29.broken", "latest", "٣١", "1e3"):
        (two_steps / name).mkdir()
    assert list_steps(two_steps) == [11, 13]
    shutil.move(two_steps / "13" / "arrays", tmp_path / "elsewhere")
    (two_steps / "13" / "arrays").symlink_to(tmp_path / "elsewhere")
    assert load_checkpoint(two_steps, make_state(0))[0] == 11


def test_a_broken_newest_step_is_set_aside_and_training_goes_on(two_steps, caplog):
    damaged = largest_file(two_steps / "13")
    flip(damaged, damaged.stat().st_size // 2)
    with Checkpointer(two_steps) as checkpointer:
        with caplog.at_level(logging.WARNING):
            step, state = checkpointer.restore(make_state(0))
        assert "checkpoint 13 is broken" in caplog.text and "13.broken" in caplog.text
        assert step == 11
        assert_same_bits(state, make_state(11))
        checkpointer.save(13, make_state(13))
        assert_same_bits(checkpointer.restore(make_state(0)), (13, make_state(13)))
    assert sorted(path.name for path in two_steps.iterdir()) == ["11", "13", "13.broken"]


def test_damage_to_a_name_is_damage_and_not_another_model(two_steps):
    (path,) = (
        path for path in (two_steps / "13" / "manifest").iterdir() if path.name == "metadata"
    )
    path.write_bytes(path.read_bytes().replace(b"params/kernel", b"params/kermel"))
    assert load_checkpoint(two_steps, make_state(0))[0] == 11


def test_a_step_under_another_number_is_damaged(two_steps):
    (two_steps / "13").rename(two_steps / "17")
    assert load_checkpoint(two_steps, make_state(0))[0] == 11


def test_what_a_killed_process_left_is_removed_by_the_next_save_and_nothing_else(two_steps):
    others = ["17.broken", "deleted", "notes"]
    for name in ["5.deleted", "17.orbax-checkpoint-tmp", *others]:
        (two_steps / name).mkdir()
        (two_steps / name / "file").write_text("...")
    with Checkpointer(two_steps) as checkpointer:
        checkpointer.restore(make_state(0))
        checkpointer.save(17, make_state(17))
    assert sorted(path.name for path in two_steps.iterdir()) == ["13", "17", *others]


def test_a_step_is_renamed_before_it_is_deleted(two_steps, monkeypatch):
    def fail(path, **options):
        raise OSError(5, "Input/output error")

    with Checkpointer(two_steps, keep=1) as checkpointer:
        monkeypatch.setattr("qkv_jax.training.checkpoint.shutil.rmtree", fail)
        checkpointer.save(17, make_state(17))
        with pytest.raises(CheckpointError, match="Input/output error"):
            checkpointer.wait()
        assert checkpointer.steps() == [13, 17]


def test_if_no_step_is_good_each_reason_is_named_and_nothing_is_lost(two_steps):
    for step in ("11", "13"):
        shutil.rmtree(two_steps / step / "manifest")
    before = sorted(two_steps.rglob("*"))
    with Checkpointer(two_steps) as checkpointer:
        for _ in range(2):  # a second start does not begin anew either
            with pytest.raises(CheckpointError, match=r"no checkpoint .* can be read.*13: .*11: "):
                checkpointer.restore(make_state(0))
    assert sorted(two_steps.rglob("*")) == before


def test_reading_a_run_changes_nothing_in_it(two_steps, caplog):
    flip(largest_file(two_steps / "13"), 0)
    before = sorted((path, path.stat().st_mtime_ns) for path in two_steps.rglob("*"))
    with caplog.at_level(logging.WARNING):
        step, leaves = load_checkpoint(two_steps)
    assert step == 11 and "checkpoint 13 is broken" in caplog.text
    np.testing.assert_array_equal(leaves["params/kernel"], make_state(11).params["kernel"])
    assert leaves["params/layers/0/scale"].dtype == jnp.bfloat16
    assert sorted((path, path.stat().st_mtime_ns) for path in two_steps.rglob("*")) == before
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        load_checkpoint(two_steps / "absent")


def damages(path: Path, flips: int):
    """Yields (description, what to do to a copy of the file)."""
    size = path.stat().st_size
    yield "deleted", lambda file: file.unlink()
    yield "emptied", lambda file: file.write_bytes(b"")
    yield "halved", lambda file: os.truncate(file, size // 2)
    for position in sorted({round(i * (size - 1) / flips) for i in range(flips)}):
        yield f"bit flipped at {position}", lambda file, p=position: flip(file, p)


def check_corruption(directory: Path, tmp_path: Path, flips: int) -> dict[str, int]:
    outcomes = {"intact": 0, "previous": 0}
    newest = directory / "13"
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        for what, damage in damages(path, flips):
            copy = tmp_path / "copy"
            shutil.copytree(directory, copy)
            damage(copy / path.relative_to(directory))
            with Checkpointer(copy) as checkpointer:
                step, state = checkpointer.restore(make_state(0))
                assert (copy / "13.broken").exists() == (step == 11), (path, what)
            assert_same_bits(state, make_state(step))
            outcomes["intact" if step == 13 else "previous"] += 1
            shutil.rmtree(copy)
    return outcomes


def test_no_damage_to_any_file_ever_gives_wrong_values(two_steps, tmp_path):
    outcomes = check_corruption(two_steps, tmp_path, flips=3)
    assert outcomes["previous"] > 20, outcomes


@pytest.mark.slow
def test_no_bit_flip_anywhere_ever_gives_wrong_values(two_steps, tmp_path):
    outcomes = check_corruption(two_steps, tmp_path, flips=60)
    assert outcomes["previous"] > 200, outcomes


SAVE_FOREVER = """
    import sys
    import numpy as np
    from qkv_jax.training.checkpoint import Checkpointer

    checkpointer = Checkpointer(sys.argv[1], keep=3)
    step = max(checkpointer.steps(), default=0)
    while True:
        step += 1
        checkpointer.save(step, {"step": np.array(step), "w": np.full((211, 97), step, np.float32)})
        print(step, flush=True)
"""


def run_python(code: str, *args, **options) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        cwd=root,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        text=True,
        **options,
    )


def check_kills(directory: Path, kills: int) -> None:
    like = {"step": np.array(0), "w": np.zeros((211, 97), np.float32)}
    reached = 0
    for seed in range(kills):
        process = run_python(SAVE_FOREVER, directory, stdout=subprocess.PIPE)
        with process:
            for _ in range(2):  # the second save begins when the first is complete
                process.stdout.readline()
            time.sleep(np.random.default_rng(seed).uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
        steps = list_steps(directory)
        assert steps and max(steps) > reached
        reached = max(steps)
        for step in steps:
            _, tree = load_checkpoint(directory, like, step=step)
            assert tree["step"] == step
            np.testing.assert_array_equal(tree["w"], np.full((211, 97), step))
    with Checkpointer(directory, keep=2) as checkpointer:
        checkpointer.save(reached + 1, like)
    assert sorted(p.name for p in directory.iterdir()) == sorted(map(str, list_steps(directory)))


def test_killed_at_any_moment_every_listed_step_is_good(tmp_path):
    check_kills(tmp_path, kills=3)


@pytest.mark.slow
def test_killed_at_many_moments_every_listed_step_is_good(tmp_path):
    check_kills(tmp_path, kills=25)


FILL_THE_DISK = """
    import sys, time
    import numpy as np
    from qkv_jax.training.checkpoint import CheckpointError, Checkpointer

    tree = {"w": np.random.default_rng(0).normal(size=100_000)}
    checkpointer = Checkpointer(sys.argv[1], keep=9)
    checkpointer.save(1, tree)
    checkpointer.wait()
    if sys.argv[2:]:  # the largest file from here on
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        for step in range(2, 9):
            checkpointer.save(step, tree)
            for _ in range(60):  # training steps, which look at what the save is doing
                time.sleep(0.01)
                checkpointer.check()
    except CheckpointError as error:
        print(error)
        found, restored = checkpointer.restore(tree)
        assert found == max(checkpointer.steps()) == step - 1, (found, checkpointer.steps())
        assert np.array_equal(restored["w"], tree["w"])
    else:
        sys.exit("the error did not surface")
"""


def test_a_failed_write_surfaces_within_a_few_steps_and_loses_nothing(tmp_path):
    process = run_python(
        FILL_THE_DISK, tmp_path, "limit", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.strip() == f"cannot save checkpoint {tmp_path}/2: File too large"
    assert errors == ""  # Orbax's own tracebacks stay away
    assert [path.name for path in tmp_path.iterdir()] == ["1"]  # half a step would fill the disk


def test_a_full_disk_surfaces_within_a_few_steps_and_loses_nothing(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system of 2 MB needs the right to mount one")
    try:
        process = run_python(
            FILL_THE_DISK, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        output, errors = process.communicate(timeout=60)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert process.returncode == 0, errors
    assert output.startswith("cannot save checkpoint") and "no space left on the disk" in output


def test_an_error_in_the_background_is_raised_once_by_the_next_call(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            "orbax.checkpoint.Checkpointer.save",
            lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
        checkpointer.save(1, make_state(1))
        with pytest.raises(CheckpointError, match=r"checkpoint .*/1: no space left on the disk"):
            checkpointer.save(2, make_state(2))
    checkpointer.check()
    checkpointer.save(1, make_state(1))
    checkpointer.close()
    assert checkpointer.steps() == [1]


def test_an_error_of_training_is_not_hidden_by_one_of_saving(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", lambda *a, **k: 1 / 0)
    with pytest.raises(FloatingPointError, match="loss"), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1))
        raise FloatingPointError("the loss is NaN")
    assert "cannot save checkpoint" in caplog.text


def test_a_directory_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot create .*file/checkpoints: Not a directory"):
        Checkpointer(tmp_path / "file" / "checkpoints")


def test_a_directory_that_is_read_only_is_one_clear_error(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("the superuser may write everywhere")
    with Checkpointer(tmp_path) as checkpointer:
        tmp_path.chmod(0o500)
        checkpointer.save(1, make_state(1))
        with pytest.raises(CheckpointError, match="Permission denied"):
            checkpointer.wait()


def test_importing_the_module_does_not_import_orbax():
    code = "import sys, qkv_jax.training.checkpoint; sys.exit('orbax.checkpoint' in sys.modules)"
    assert run_python(code).wait(timeout=60) == 0
