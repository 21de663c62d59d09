"""The arithmetic of the benchmarks; the figures themselves are in results/, never asserted."""

import json
import subprocess
import sys

import pytest

from experiments import benchmark
from experiments.benchmark import Run
from experiments.benchmark_nanogpt import ms_per_step


def _run(rows=(), output=""):
    return Run(rows=list(rows), output=output, seconds=1.0, first_step=0.5, peak_bytes=7)


def test_time_per_step_is_the_median_over_lines_without_an_evaluation_between():
    rows = [
        {"step": 10, "loss": 3.0, "elapsed": 5.0},
        {"step": 20, "loss": 2.9, "elapsed": 5.2},  # 20 ms a step
        {"step": 30, "loss": 2.8, "elapsed": 5.5},  # 30
        {"step": 30, "validation_loss": 2.8, "elapsed": 9.5},
        {"step": 40, "loss": 2.7, "elapsed": 9.6},  # after an evaluation: left out
        {"step": 50, "loss": 2.6, "elapsed": 10.0},  # 40
    ]
    assert _run(rows).ms_per_step == pytest.approx(30.0)
    assert [row["step"] for row in _run(rows).validation] == [30]


def test_the_full_loss_is_read_from_the_printed_report():
    output = "text: ...\n| model | 1.6789 | 2.4222 | 5.360 |\n| uniform | 4.1744 | 6.0 | 65.0 |\n"
    assert _run(output=output).full_loss == 1.6789


def test_nanogpts_time_leaves_out_warm_up_and_evaluations():
    lines = [f"iter {i}: loss 2.0, time {30 + i % 3}.00ms, mfu 0.04%" for i in range(11, 20)]
    slow = ["iter 0: loss 4.2, time 4147.80ms, mfu -100.00%", "iter 250: loss 2, time 363.21ms,"]
    assert ms_per_step("\n".join(slow[:1] + lines + slow[1:])) == 31.0


def test_the_time_to_the_target_is_that_of_the_first_evaluation_below_it():
    rows = [
        {"step": 20, "validation_loss": 2.0, "elapsed": 7.0},
        {"step": 40, "validation_loss": 1.87, "elapsed": 9.0},
        {"step": 60, "validation_loss": 1.80, "elapsed": 11.0},
    ]
    assert benchmark._reached(_run(rows)) == 9.0
    assert benchmark._reached(_run(rows[:1])) == float("inf")


def test_the_table_is_written_as_markdown_and_json(tmp_path, monkeypatch, capsys):
    class Flag:
        def __init__(self, value):
            self.value = value

    monkeypatch.setattr(benchmark, "OUT", Flag(str(tmp_path / "deep/table")))
    monkeypatch.setattr(benchmark, "REPEATS", Flag(3))
    benchmark.write([("time per step, ms", "31.0", "20.0")])
    assert "| time per step, ms | 31.0 | 20.0 |" in (tmp_path / "deep/table.md").read_text()
    record = json.loads((tmp_path / "deep/table.json").read_text())
    assert record["rows"] == [["time per step, ms", "31.0", "20.0"]]
    assert record["made_with"]["jax"]
    assert "time per step" in capsys.readouterr().out


def test_an_unknown_benchmark_or_a_missing_text_is_one_sentence():
    for arguments, wanted in (
        (["nothing"], "wanted one of ['attention', 'decode', 'mechanisms', 'train']"),
        (["train", "--text=absent.txt"], "absent.txt does not exist"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "experiments.benchmark", *arguments],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and wanted in done.stderr
        assert done.stderr.count("\n") == 1
