"""Run directories: one config each, kept as data, written atomically."""

import json
import logging
import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import char_lm
from qkv_jax.training import run_directory
from qkv_jax.training.run_directory import (
    ADJUSTABLE,
    RESUMABLE,
    RunDirectory,
    config_from_json,
    config_to_json,
    open_run,
    read_config,
    versions,
    write_text_atomic,
)


def make_config(**changes) -> ConfigDict:
    config = char_lm.get_config().lock()
    config.update_from_flattened_dict(changes)
    return config


def test_a_new_run_holds_its_config_and_versions(tmp_path):
    config = make_config(**{"model.width": 37})
    run = open_run(tmp_path / "runs" / "new", config)
    assert run == RunDirectory(tmp_path / "runs" / "new")
    assert read_config(run, char_lm.get_config()).to_dict() == config.to_dict()
    assert json.loads(run.versions.read_text())["jax"]
    assert sorted(path.name for path in run.path.iterdir()) == [
        "config.json",
        "figures",
        "versions.json",
    ]
    assert run.metrics == run.path / "metrics.jsonl"
    assert run.checkpoints == run.path / "checkpoints"


def test_a_run_is_resumed_with_other_lengths_and_intervals_and_keeps_the_new_ones(tmp_path):
    open_run(tmp_path, make_config())
    flags = {"train.wandb": True, "train.figures": False, "mesh.zigzag": True}
    changes = dict.fromkeys(RESUMABLE - flags.keys(), 3) | flags
    run = open_run(tmp_path, make_config(**changes))
    assert read_config(run, char_lm.get_config()).train.num_steps == 3


def test_every_field_that_may_change_on_resume_is_in_the_base_config():
    fields = dict(run_directory.flat_fields(char_lm.get_config().to_dict()))
    assert fields.keys() >= RESUMABLE | ADJUSTABLE


def test_another_config_is_refused_with_every_field_and_both_values(tmp_path):
    open_run(tmp_path, make_config())
    before = RunDirectory(tmp_path).config.read_text()
    other = make_config(**{"model.width": 37, "seed": 5, "data.path": "x.txt", "train.keep": 3})
    with pytest.raises(ValueError) as error:
        open_run(tmp_path, other)
    message = str(error.value)
    assert 'config.data.path: null there, "x.txt" now' in message
    assert "config.model.width: 128 there, 37 now; config.seed: 0 there, 5 now" in message
    assert "choose another --workdir" in message and "train.keep" not in message
    assert RunDirectory(tmp_path).config.read_text() == before


def test_an_unfinished_run_may_go_on_with_another_learning_rate_which_is_told(tmp_path, caplog):
    open_run(tmp_path, make_config())
    assert not caplog.records
    run = open_run(tmp_path, make_config(**{"optimizer.learning_rate": 0.5, "train.keep": 3}))
    (record,) = caplog.records
    assert "config.optimizer.learning_rate: 0.02 there, 0.5 now" in record.message
    assert read_config(run, char_lm.get_config()).optimizer.learning_rate == 0.5

    run.report.write_text("")  # it is finished: its results are those of this rate
    with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.5 there, 0.1 now"):
        open_run(tmp_path, make_config(**{"optimizer.learning_rate": 0.1}))


def test_a_field_that_one_config_lacks_is_a_difference(tmp_path):
    open_run(tmp_path, make_config())
    config = char_lm.get_config()
    config.model.new_field = 1.0
    del config.seed
    with pytest.raises(
        ValueError, match=r"new_field: absent there, 1.0 now; .*seed: 0 there, abse"
    ):
        open_run(tmp_path, config)


def test_values_that_are_equal_but_of_other_types_differ(tmp_path):
    open_run(tmp_path, ConfigDict({"a": 1, "b": 1.0}))
    with pytest.raises(
        ValueError, match=r"config.a: 1 there, true now; config.b: 1.0 there, 1 now"
    ):
        open_run(tmp_path, ConfigDict({"a": True, "b": 1}))


def test_files_of_others_are_not_mixed_with(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match=r"not a run's directory: it holds thesis.tex"):
        open_run(tmp_path, make_config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match=r"thesis.tex is a file"):
        open_run(tmp_path / "thesis.tex", make_config())


def test_a_run_killed_while_it_was_created_can_be_started_again(tmp_path):
    (tmp_path / "config.json.tmp").write_text('{"se')
    run = open_run(tmp_path, make_config())
    assert read_config(run, char_lm.get_config()).seed == 0
    assert not list(tmp_path.glob("*.tmp"))


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run cannot be written: Not a directory"):
        open_run(tmp_path / "file" / "run", make_config())


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path, monkeypatch):
    open_run(tmp_path, make_config())
    before = RunDirectory(tmp_path).config.read_text()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory.os, "fsync", fail)
    with pytest.raises(ValueError, match="cannot be written: No space left on device"):
        open_run(tmp_path, make_config(**{"train.num_steps": 7}))
    assert RunDirectory(tmp_path).config.read_text() == before
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"seed": 1e999}', "\x00"])
def test_a_damaged_config_is_an_error_that_names_the_file(tmp_path, text):
    run = RunDirectory(tmp_path)
    run.config.write_text(text)
    with pytest.raises(ValueError, match="config"):
        open_run(tmp_path, make_config())
    with pytest.raises(ValueError, match="config"):
        read_config(run, char_lm.get_config())


def test_a_config_that_is_not_text_or_not_there_is_named(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match=r"config.json cannot be read: No such file"):
        read_config(run, char_lm.get_config())
    run.config.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"config.json is not text"):
        open_run(tmp_path, make_config())


def fields(config: ConfigDict, prefix: str = ""):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, config.get_type(name)


VALUES = {
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: st.text(),
    tuple: st.recursive(st.integers() | st.text(), lambda s: st.lists(s).map(tuple)).filter(
        lambda value: isinstance(value, tuple)
    ),
}


def base_config() -> ConfigDict:
    """The default config, and kinds of fields that it has none of."""
    config = char_lm.get_config()
    config.extra = ConfigDict({"widths": (3, 5), "names": ("a", "b"), "none": ()})
    config.extra.rate = placeholder(float)
    config.extra.sizes = placeholder(tuple)
    return config


OVERRIDES = st.fixed_dictionaries(
    {}, optional={name: VALUES[kind] for name, kind in fields(base_config())}
)


@given(OVERRIDES)
def test_any_config_comes_back_as_it_was(overrides):
    config = base_config()
    config.update_from_flattened_dict(overrides)
    restored = config_from_json(config_to_json(config), base_config())
    assert repr(restored.to_dict()) == repr(config.to_dict())  # repr: 1, 1.0 and True are equal
    assert restored.is_locked


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", "3", "config.seed must be int, got '3'"),
        ("seed", 3.0, "config.seed must be int, got 3.0"),
        ("seed", True, "config.seed must be int, got True"),
        ("seed", None, "config.seed must be int, got None"),
        ("name", 3, "config.name must be str, got 3"),
        ("model", 3, "config.model must be a group of fields, got 3"),
        ("model.qk_norm", 1, "config.model.qk_norm must be bool, got 1"),
        ("model.num_kv_heads", "x", "config.model.num_kv_heads must be int, got 'x'"),
        ("model.rotary_base", [1.0], r"config.model.rotary_base must be float, got \[1.0\]"),
        ("model.widht", 3, "there is no field config.model.widht"),
    ],
)
def test_a_field_of_another_type_or_name_is_refused(name, value, message):
    values = json.loads(config_to_json(make_config()))
    *groups, last = name.split(".")
    group = values
    for key in groups:
        group = group[key]
    group[last] = value
    with pytest.raises(ValueError, match=message):
        config_from_json(json.dumps(values), char_lm.get_config())


def test_a_run_from_before_a_field_was_there_has_the_value_of_the_base(tmp_path):
    config = make_config()
    run = open_run(tmp_path / "run", config)
    older = json.loads(run.config.read_text())
    del older["model"]["window"], older["seed"]
    run.config.write_text(json.dumps(older))
    assert read_config(run, char_lm.get_config()).to_dict() == config.to_dict()
    open_run(run.path, config, char_lm.get_config())
    assert json.loads(run.config.read_text()) == json.loads(config_to_json(config))

    run.config.write_text(json.dumps(older))
    other = make_config(**{"model.window": 7})
    with pytest.raises(ValueError, match=r"config\.model\.window: 64 there, 7 now"):
        open_run(run.path, other, char_lm.get_config())


def test_an_infinite_field_is_refused():
    text = config_to_json(make_config())
    for value in ("1e999", "NaN", "-Infinity"):
        with pytest.raises(ValueError, match=r"config.optimizer.b1 must be finite"):
            config_from_json(text.replace('"b1": 0.9', f'"b1": {value}'), char_lm.get_config())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_config_that_is_not_finite_is_not_written(tmp_path, value):
    config = make_config(**{"optimizer.learning_rate": value})
    with pytest.raises(ValueError, match=r"config.optimizer.learning_rate must be finite, got"):
        open_run(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"config.f must be plain data, got function"):
        config_to_json(ConfigDict({"f": make_config}))


def test_reading_a_config_leaves_the_base_as_it_was():
    base = char_lm.get_config()
    config_from_json(config_to_json(make_config(seed=7)), base)
    assert base.to_dict() == char_lm.get_config().to_dict() and not base.is_locked


def test_a_write_replaces_the_whole_text(tmp_path):
    path = tmp_path / "text"
    write_text_atomic(path, "a longer text\n")
    write_text_atomic(path, "注意\n")
    assert path.read_bytes() == "注意\n".encode()
    assert os.listdir(tmp_path) == ["text"]


def test_versions_name_the_commit_and_never_fail(tmp_path, monkeypatch):
    found = versions()
    assert {"python", "platform", "jax", "jaxlib", "flax", "optax", "numpy", "device"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert versions()["commit"] == "unknown"


def test_the_commit_says_whether_the_checkout_was_changed(tmp_path, monkeypatch):
    package = tmp_path / "qkv_jax" / "training" / "run_directory.py"
    package.parent.mkdir(parents=True)
    package.write_text("")
    monkeypatch.setattr(run_directory, "__file__", str(package))
    assert versions()["commit"] == "unknown"

    def git(*command):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=first")
    git("tag", "v1")
    assert versions()["commit"] == git("rev-parse", "HEAD")
    package.write_text("changed")
    assert versions()["commit"] == git("rev-parse", "HEAD") + "-dirty"


def test_resuming_with_other_versions_is_said(tmp_path, caplog):
    run = open_run(tmp_path, make_config())
    run.versions.write_text(json.dumps(versions() | {"jax": "0.0.1"}))
    with caplog.at_level(logging.WARNING):
        open_run(tmp_path, make_config())
    assert "resuming with other versions: jax 0.0.1 -> " in caplog.text
    for damaged in ("", "[]", '{"jax"'):
        run.versions.write_text(damaged)
        open_run(tmp_path, make_config())
    assert json.loads(run.versions.read_text()) == versions()
