"""Metrics: every line valid JSON, no step twice, whatever the crash."""

import json
import math
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.training import writers
from qkv_jax.training.run_directory import RunDirectory
from qkv_jax.training.writers import MetricWriter, read_metrics


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path)


def write_steps(run, steps, resume_step=None, **metrics):
    with MetricWriter(run, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / (step + 1)} | metrics)


def steps_of(run) -> list[int]:
    return [record["step"] for record in read_metrics(run.metrics)]


def test_numbers_come_back_exactly(run):
    metrics = {
        "python": 0.1,
        "jax": jnp.float32(0.1),
        "numpy": np.float64(1 / 3),
        "array": np.array([7]),
        "bfloat16": jnp.bfloat16(1.5),
        "int": 2**60,
        "flag": True,
    }
    with MetricWriter(run, resume_step=None) as writer:
        writer.write(np.int64(3), metrics)
        assert read_metrics(run.metrics) == [  # readable while training goes on
            {"step": 3} | {name: np.asarray(value).item() for name, value in metrics.items()}
        ]


def test_every_line_is_strict_json_and_non_finite_numbers_come_back(run):
    values = {"a": math.nan, "b": math.inf, "c": jnp.float32(-math.inf)}
    write_steps(run, [1], **values)
    line = json.loads(run.metrics.read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": 0.5, "a": "nan", "b": "inf", "c": "-inf"}
    (record,) = read_metrics(run.metrics)
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf


@pytest.mark.parametrize("value", [np.zeros(3), "text", None])
def test_what_is_not_one_number_is_refused_by_name(run, value):
    with MetricWriter(run, resume_step=None) as writer:
        with pytest.raises(ValueError, match="metric a must be one number"):
            writer.write(1, {"a": value})
        with pytest.raises(ValueError, match="cannot be named step"):
            writer.write(1, {"step": 3})


def test_a_full_disk_is_an_error_that_names_the_run(run):
    writer = MetricWriter(run, resume_step=None)
    writer.write(1, {"a": 3})
    writer._file.close()
    writer._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match=f"No space left on device: '{run.path}'"):
        writer.write(2, {"a": 3})
    with pytest.raises(OSError, match="No space left"):
        writer.close()


def test_resuming_drops_the_steps_that_will_be_taken_again(run):
    write_steps(run, [10, 20, 30, 40], a=math.nan)
    before = run.metrics.read_text().splitlines(keepends=True)
    write_steps(run, [30, 40, 50], resume_step=20)
    assert steps_of(run) == [10, 20, 30, 40, 50]
    assert run.metrics.read_text().splitlines(keepends=True)[:2] == before[:2]  # to the byte
    write_steps(run, [10], resume_step=None)
    assert steps_of(run) == [10]


@pytest.mark.parametrize("kept", range(1, 12))
def test_a_last_line_that_a_crash_cut_short_is_dropped(run, kept):
    write_steps(run, [10, 20])
    data = run.metrics.read_bytes()
    first = data.index(b"\n") + 1
    run.metrics.write_bytes(data[: first + kept])
    assert steps_of(run) == [10]
    write_steps(run, [20], resume_step=10)
    assert run.metrics.read_bytes() == data


def test_a_damaged_line_is_named_and_nothing_is_dropped(run):
    write_steps(run, [10, 20, 30])
    for damaged in (b"[1]", b'{"loss": 1}', b"\xff", b"{"):
        lines = run.metrics.read_bytes().split(b"\n")
        lines[1] = damaged
        run.metrics.write_bytes(b"\n".join(lines))
        with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not a JSON object"):
            MetricWriter(run, resume_step=20)
        assert run.metrics.read_bytes() == b"\n".join(lines)


def read_events(run) -> list:
    """All events in the order of their files, by the format's definition."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(run.tensorboard.iterdir(), key=lambda p: int(p.suffix[1:])):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_tensorboard_gets_every_number_and_forgets_repeated_steps(run):
    write_steps(run, [10, 20], a=3)
    write_steps(run, [20], resume_step=10)
    events = read_events(run)
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [
        (10, "loss", pytest.approx(1 / 11)),
        (10, "a", 3),
        (20, "loss", pytest.approx(1 / 21)),
        (20, "a", 3),
        (20, "loss", pytest.approx(1 / 21)),
    ]
    starts = [e.step for e in events if e.HasField("session_log")]
    assert starts == [0, 11]  # TensorBoard hides these and later steps of earlier files


def test_weights_and_biases_is_asked_for_by_name_and_must_be_there(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="needs Weights & Biases: pip install wandb"):
        MetricWriter(run, wandb=True, resume_step=None)


def test_weights_and_biases_gets_every_number(run, monkeypatch):
    calls = []

    class Session:
        def log(self, numbers, step):
            calls.append((step, numbers))

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append(options)
        return Session()

    run.config.write_text('{"seed": 3}')
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resume_step in (None, 5):
        with MetricWriter(run, wandb=True, resume_step=resume_step) as writer:
            writer.write(7, {"loss": jnp.float32(0.5)})
    first, *logged, second, _, _ = calls
    assert logged == [(7, {"loss": 0.5}), "finished"]
    assert first["config"] == {"seed": 3} and first["name"] == run.path.name
    assert first["id"] == second["id"]
    assert (first["resume"], second["resume"]) == (None, "allow")


def test_no_writer_is_imported_before_the_first_number():
    code = """
import sys, pathlib, tempfile
from qkv_jax.training.run_directory import RunDirectory
from qkv_jax.training.writers import MetricWriter
with tempfile.TemporaryDirectory() as path:
    MetricWriter(RunDirectory(pathlib.Path(path)), resume_step=None).close()
sys.exit(bool({"tensorboardX", "wandb", "tensorflow", "torch"} & set(sys.modules)))
"""
    path = writers.__file__.rsplit("qkv_jax", 1)[0]
    assert subprocess.run([sys.executable, "-c", code], cwd=path, timeout=60).returncode == 0
