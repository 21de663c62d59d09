"""What the benchmark of mechanisms computes from its figures; the figures are never asserted."""

import dataclasses
import json
import math
import subprocess

import numpy as np
import pytest

from experiments import benchmark_growth, benchmark_mechanisms, benchmark_mixers, benchmark_sides
from experiments.benchmark_growth import (
    FULL,
    LINEAR,
    LOOP,
    QUICK,
    Growth,
    Loop,
    faster_from,
    in_order,
    slope,
    summary,
    table,
    verdicts,
)  # fmt: skip
from experiments.benchmark_growth_picture import apart, picture
from experiments.benchmark_mechanisms import Results
from experiments.benchmark_table import Ratio, Row
from qkv_jax.models import MIXERS
from qkv_jax.models.mixers import HEADS, SETTINGS

SIZES = dataclasses.replace(QUICK, lengths=(16, 32, 64, 128), start=32)


class Flag:
    def __init__(self, value):
        self.value = value


@pytest.fixture
def settings(monkeypatch):
    for name, value in (
        ("MIXERS_FLAG", []), ("ROUNDS", 3), ("QUICK", True), ("LIMIT", 20.0),
    ):  # fmt: skip
        monkeypatch.setattr(benchmark_mechanisms, name, Flag(value))


def growth(name, *ms, power=1.0, **fields):
    """A mixer with these times, and memory that grows by a power."""
    memory = {T: int(1000 * T**power) for T in SIZES.lengths[: len(ms)]}
    return Growth(name, dict(zip(SIZES.lengths, ms, strict=False)), memory, **fields)


EXACT = growth("attention", 1.0, 4.0, 16.0, 64.0, state=512)


def test_every_mixer_has_a_family_and_what_claims_to_be_linear_exists():
    families = [name for names in benchmark_growth.FAMILIES.values() for name in names]
    assert len(families) == len(set(families))
    assert set(MIXERS) <= set(families) and set(families) >= LINEAR
    assert in_order(["lstm", "unheard_of", "attention"]) == ["attention", "lstm", "unheard_of"]
    assert Growth("unheard_of").family == "other"


@pytest.mark.parametrize("sizes", [FULL, QUICK])
def test_all_settings_are_stated_and_lengths_double(sizes):
    as_always = {
        *HEADS,
        "attention_scale",
        "local_rotary_base",
        "rotary_scaling",
        "window_blocks",
    }
    assert set(sizes.settings) == set(SETTINGS) - as_always
    assert sizes.start in sizes.lengths
    assert all(b == 2 * a for a, b in zip(sizes.lengths, sizes.lengths[1:], strict=False))


def test_a_slope_is_fitted_from_the_start_alone():
    values = {16: 1e9, 32: 3.0, 64: 12.0, 128: 48.0}
    assert slope(values, 32) == pytest.approx(2.0)
    noisy = {T: T**1.5 * error for T, error in zip(values, (9, 1.1, 0.9, 1.1), strict=True)}
    x = np.log([32, 64, 128])
    y = np.log([noisy[T] for T in (32, 64, 128)])
    wanted = ((x - x.mean()) * y).sum() / ((x - x.mean()) ** 2).sum()
    assert slope(noisy, 32) == pytest.approx(wanted)
    assert slope({16: 1.0, 32: 2.0}, 32) is None


@pytest.mark.parametrize(
    ("ms", "first"),
    [
        ((0.5, 2.0, 8.0, 32.0), 16),
        ((2.0, 3.0, 6.0, 12.0), 32),
        ((0.5, 5.0, 6.0, 12.0), 64),  # faster at 16, slower at 32
        ((0.5, 2.0, 8.0, 64.0), None),  # as fast is not faster
        ((0.5, 2.0, "> 20 s", "> 20 s"), None),
        ((0.5, 2.0), 16),  # it failed after these
    ],
)
def test_faster_is_faster_at_all_longer_lengths(ms, first):
    assert faster_from(growth("linear", *ms), EXACT) == first


def test_what_exact_attention_was_too_slow_for_counts_for_those_that_were_not():
    exact = growth("attention", 1.0, 4.0, "> 20 s", "> 20 s")
    assert faster_from(growth("linear", 9.0, 9.0, 9.0, "> 20 s"), exact) == 64
    assert faster_from(growth("linear", 9.0, 9.0, "> 20 s", "> 20 s"), exact) is None


def test_targets_are_those_of_linear_mechanisms():
    assert verdicts(growth("linear", 1.0, 2.0, 4.0, 8.0, power=1.2), EXACT, SIZES) == {
        "time": "reached", "memory": "missed", "against exact attention": "reached"
    }  # fmt: skip
    late = growth("delta", 3.0, 6.0, 12.0, 24.0)
    assert verdicts(late, EXACT, SIZES)["against exact attention"] == "missed"
    assert verdicts(late, None, SIZES) == {"time": "reached", "memory": "reached"}
    assert verdicts(growth("lstm", 1.0, 4.0, 16.0, 64.0), EXACT, SIZES) == {}
    loop = Loop(row=Row("T=32", {"steps": [2.0], "chunks": [1.0]}, (Ratio("steps", "chunks", 20),)))
    assert summary([EXACT, late], loop, SIZES) == (
        "Targets reached: 2 of 4. Missed: delta: against exact attention; delta_loop."
    )


def test_the_table_says_what_was_measured_and_why_something_was_not():
    rows = [
        EXACT,
        growth("sliding_window", 1.0, 2.0, 4.0, 8.0, state=64),
        growth("topk", 2.0, 8.0, "> 20 s", "> 20 s", state=512),
        growth("delta", 3.0, 6.0, 12.0, 24.0, state=256),
        growth("linformer", 1.0, 2.0, failed="ValueError: no"),
    ]
    lines = table(rows, SIZES)
    assert lines[0].startswith("| mixer | family | 16, ms | 32, ms | 64, ms | 128, ms | time ~ T^")
    window, top_k, delta, linformer = lines[3:7]
    assert "| `sliding_window` | part of the keys | 1.00 | 2.00 | 4.00 | 8.00 |" in window
    assert "**1.00** (≤ 1.15: reached) | 0.13 | **1.00** (≤ 1.15: reached) | 64 |" in window
    assert window.endswith("| from T = 32; 8.00 times at 128 (≤ 32: **reached**) |")
    assert "| 2.00 | 8.00 | > 20 s | > 20 s | - | 0.13 | 1.00 | 512 |" in top_k
    assert top_k.endswith("| never; 0.50 times at 32 |")
    assert delta.endswith("| from T = 64; 2.67 times at 128 (≤ 32: **missed**) |")
    assert "| 1.00 | 2.00 | - | - |" in linformer and linformer.endswith("failed: ValueError: no |")
    assert "- `topk`: it takes all logits in order to choose" in lines
    assert any(line.startswith("- `delta`: its chunks wait for one another") for line in lines)
    assert {line.count(" | ") for line in lines[:7] if line.startswith("| ")} == {10}


def test_what_is_slower_without_a_known_reason_is_said_to_be_unexplained():
    lines = table([EXACT, growth("chunked", 3.0, 6.0, 12.0, 24.0, state=256)], SIZES)
    assert "- `chunked`: not explained" in lines


def test_a_slope_over_fewer_lengths_says_so():
    row = growth("linear", 1.0, 2.0, 4.0, "> 20 s")
    assert "**1.00** (≤ 1.15: reached), 2 of 3 lengths" in table([row], SIZES)[2]


def test_the_next_length_is_foretold_from_the_two_before():
    assert benchmark_mixers.foretold({}) == benchmark_mixers.foretold({16: 5.0}) == 0.0
    assert benchmark_mixers.foretold({16: 1.0, 32: 2.0, 64: 8.0}) == 32.0
    assert benchmark_mixers.foretold({16: 3.0, 32: 2.0}) == 2.0  # it does not shrink
    assert benchmark_mixers.foretold({16: 1.0, 32: "> 20 s"}) == math.inf


def measured(monkeypatch, limit, memory):
    """What `measure` makes of calls that take 4, 16, 64 and 256 s and need these gigabytes."""
    found, saved = Growth("linear"), []
    ms, plan = iter((4e3, 16e3, 64e3, 256e3)), iter(memory)
    monkeypatch.setattr(benchmark_mixers, "prepare", lambda *a: (None, (), 7))
    monkeypatch.setattr(benchmark_mixers, "planned_bytes", lambda compiled: next(plan) * 10**9)
    monkeypatch.setattr(benchmark_mixers, "milliseconds", lambda run, rounds: next(ms))
    benchmark_mixers.measure(found, SIZES, 3, limit, lambda so_far: saved.append(len(so_far.ms)))
    assert saved == list(range(1, len(saved) + 1))  # after each length
    return found


def test_what_would_take_too_long_is_compiled_but_not_run(monkeypatch):
    found = measured(monkeypatch, limit=60, memory=[1, 2, 4, 8])
    assert found.ms == {16: 4e3, 32: 16e3, 64: "> 60 s", 128: "> 60 s"}
    assert found.memory == {16: 1e9, 32: 2e9, 64: 4e9, 128: 8e9} and found.state == 7
    assert measured(monkeypatch, limit=64, memory=[1, 2, 4, 8]).times == {
        16: 4e3,
        32: 16e3,
        64: 64e3,
    }


def test_what_would_need_too_much_is_not_run_and_what_is_longer_not_compiled(monkeypatch):
    found = measured(monkeypatch, limit=1000, memory=[1, 9])
    assert found.ms == {16: 4e3, 32: "> 8 GB", 64: "> 8 GB", 128: "> 8 GB"}
    assert found.memory == {16: 1e9, 32: 9e9}


def test_a_call_is_the_median_of_rounds_and_a_long_one_is_timed_once(monkeypatch):
    rounds = []
    monkeypatch.setattr(
        benchmark_mixers, "in_turn", lambda sides, n: rounds.append(n) or {"": [1.0, 2.0, 9.0]}
    )
    assert benchmark_mixers.milliseconds(lambda: [np.ones(3)], 7) == 2.0
    monkeypatch.setattr(benchmark_mixers, "LONG", 0.0)
    assert 0 < benchmark_mixers.milliseconds(lambda: [np.ones(3)], 7) < 1e3
    assert rounds == [7]
    with pytest.raises(FloatingPointError, match="not finite"):
        benchmark_mixers.milliseconds(lambda: [np.array([1.0, np.nan])], 7)


@pytest.mark.parametrize("name", ["gated_conv", "linformer"])
def test_a_mixer_is_measured(name, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_sides, "SAMPLE", 1e-6)
    monkeypatch.setitem(
        benchmark_mixers.SIZES, "quick", dataclasses.replace(QUICK, lengths=(16, 32))
    )
    benchmark_mixers.main(name, 2, 20.0, "quick", tmp_path / "result.json")
    found = Growth.from_record(json.loads((tmp_path / "result.json").read_text()))
    assert not found.failed and list(found.times) == [16, 32] == list(found.memory)
    projections = 3 * QUICK.width**2  # at least, and their gradients are outputs
    assert all(found.memory[T] >= 4 * (projections + 2 * T * QUICK.width) for T in (16, 32))
    assert (found.state is None) == (name == "linformer")


@pytest.mark.slow  # to compile
def test_the_delta_rule_in_chunks_equals_its_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_sides, "SAMPLE", 1e-6)
    benchmark_mixers.main(LOOP, 2, 20.0, "quick", tmp_path / "result.json")
    found = Loop.from_record(json.loads((tmp_path / "result.json").read_text()))
    assert not found.failed and found.row.what == "T=64, both passes"
    assert len(found.row.values["steps"]) == 2 and found.row.quotient(*found.row.ratios) > 0


def test_a_mixer_that_raises_is_a_row_of_one_sentence(monkeypatch, tmp_path, capsys):
    def broken(name, T, sizes):
        if T > 32:
            raise ValueError("head_dim: wanted\n  an even one")
        return None, (), 7

    monkeypatch.setattr(benchmark_mixers, "prepare", broken)
    monkeypatch.setattr(benchmark_mixers, "planned_bytes", lambda compiled: 1000)
    monkeypatch.setattr(benchmark_mixers, "milliseconds", lambda run, rounds: 1.0)
    benchmark_mixers.main("linear", 2, 20.0, "quick", tmp_path / "result.json")
    found = Growth.from_record(json.loads((tmp_path / "result.json").read_text()))
    assert found.ms == {32: 1.0} and found.failed == "ValueError: head_dim: wanted an even one"
    assert "Traceback" in capsys.readouterr().err


def test_a_process_that_is_killed_keeps_what_it_had(tmp_path, settings, monkeypatch):
    killed = subprocess.CompletedProcess([], returncode=-9)
    monkeypatch.setattr(benchmark_mechanisms.subprocess, "run", lambda *a, **k: killed)
    result = tmp_path / "linear.json"
    assert benchmark_mechanisms.run_one("linear", "quick", result) == Growth(
        "linear", failed="the process ended with status -9"
    )
    result.write_text(json.dumps(dataclasses.asdict(growth("linear", 1.0, 2.0))))
    assert benchmark_mechanisms.run_one("linear", "quick", result).ms == {16: 1.0, 32: 2.0}


def test_all_is_measured_written_and_its_failures_named_at_the_end(tmp_path, settings, monkeypatch):
    def run_one(name, size, result):
        return growth(name, 1.0, 2.0, failed="ValueError: no" if name == "delta" else "")

    monkeypatch.setattr(benchmark_mechanisms, "run_one", run_one)
    monkeypatch.setattr(benchmark_mechanisms, "chosen", lambda wanted: ["linear", "delta", "gru"])
    with pytest.raises(SystemExit, match="error: these failed: delta; the reasons stand above"):
        benchmark_mechanisms.benchmark_mechanisms(tmp_path / "deep/table")
    text = (tmp_path / "deep/table.md").read_text()
    assert "`python -m experiments.benchmark mechanisms --rounds=3 --limit=20 --quick`" in text
    assert "**Small sizes: a smoke test. The figures mean nothing.**" in text
    assert "glibc.malloc.hugetlb=1" in text and "| failed: ValueError: no |" in text
    assert (tmp_path / "deep/table.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "deep/table.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["linear", "delta", "gru"]


def test_rows_that_are_not_measured_now_stay_if_the_machine_and_the_versions_do(tmp_path, settings):
    out = tmp_path / "table"
    made = {"jax": "1.2.3"}
    old = Results(SIZES, made)
    for name in ("attention", "lstm", "no_longer_there"):
        old.put(growth(name, 1.0, "> 20 s", made="commit a, 2026-01-01"))
    old.put(Loop(row=Row("T=32", {"steps": [2.0]}), made="commit a, 2026-01-01"))
    benchmark_mechanisms.write(out, old)

    found = benchmark_mechanisms.with_earlier(out, Results(SIZES, made))
    assert found.rows == {name: old.rows[name] for name in ("attention", "lstm")}
    assert found.loop == old.loop
    found.put(growth("lstm", 2.0, 4.0, made="commit b, 2026-01-02"))
    text = benchmark_mechanisms.markdown(found, None)
    assert "- commit a, 2026-01-01: attention, delta_loop\n" in text
    assert "- commit b, 2026-01-02: lstm\n" in text

    for other in (Results(SIZES, {"jax": "1.2.4"}), Results(QUICK, made)):
        fresh = benchmark_mechanisms.with_earlier(out, other)
        assert not fresh.rows and fresh.loop is None


def test_an_unknown_mixer_is_one_sentence(capsys):
    with pytest.raises(SystemExit):
        benchmark_mechanisms.chosen(["lstm", "speed"])
    error = capsys.readouterr().err
    assert error.startswith("error: --mixers: no such mixer 'speed'; there are attention, ")
    assert error.count("\n") == 1


def test_mixers_go_by_family():
    assert benchmark_mechanisms.chosen(["lstm", " attention"]) == ["attention", "lstm"]
    assert benchmark_mechanisms.chosen([]) == [*in_order(list(MIXERS)), LOOP]


def test_names_beside_lines_are_moved_apart_no_further_than_they_must():
    assert apart([0.2, 0.8, 0.5], 0.1) == pytest.approx([0.2, 0.8, 0.5])
    assert apart([0.5, 0.5, 0.9], 0.1) == pytest.approx([0.45, 0.55, 0.9])
    crowded = apart([0.99, 0.98, 0.97, 0.0], 0.1)
    assert crowded == pytest.approx([1.0, 0.9, 0.8, 0.0])


def test_there_is_no_picture_without_something_to_draw():
    assert picture([EXACT, Growth("linear", failed="ValueError: no")], SIZES) is None
    assert picture([growth("linear", 1.0, 2.0)], SIZES) is not None
