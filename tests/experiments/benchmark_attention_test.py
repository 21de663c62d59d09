"""What the benchmark of attention computes from its timings; the timings are never asserted."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from experiments import benchmark_attention, benchmark_cases, benchmark_sides
from experiments.benchmark_cases import CASES, Bench, section_from
from experiments.benchmark_picture import length, picture
from experiments.benchmark_sides import Side, check_equal, check_tail, in_turn, ours, random_arrays
from experiments.benchmark_table import Ratio, Row, Section, figure, summary
from qkv_jax.ops import masks


class Flag:
    def __init__(self, value):
        self.value = value


@pytest.fixture
def settings(monkeypatch):
    for name, value in (("CASES_FLAG", ["1", "windows"]), ("ROUNDS", 3), ("QUICK", False)):
        monkeypatch.setattr(benchmark_attention, name, Flag(value))


FAST = Ratio("peer", "ours", 3.0)
ROW = Row(
    "T=64 causal, forward", {"ours": [1.0, 2.0, 10.0], "peer": [4.0, 6.0, 20.0]}, (FAST,)
)  # fmt: skip


def _section(*rows, name="peers"):
    return Section(name, f"1. {name}", "What it is.", list(rows))


def test_a_quotient_is_the_median_of_the_quotients_within_a_round():
    assert ROW.median("peer") == 6.0
    assert ROW.quotient(FAST) == 3.0  # of 4, 3 and 2
    assert ROW.verdicts() == ["reached"]


@pytest.mark.parametrize(
    ("ratio", "value", "verdict"),
    [
        (Ratio("a", "b", 1.5), 1.5, "reached"),
        (Ratio("a", "b", 1.5), 1.49, "missed"),
        (Ratio("a", "b", 1.5, at_least=False), 1.5, "reached"),
        (Ratio("a", "b", 1.5, at_least=False), 1.51, "missed"),
        (Ratio("a", "b"), 9.0, ""),
    ],
)
def test_a_target_is_reached_from_its_own_side(ratio, value, verdict):
    assert ratio.verdict(value) == verdict


def test_an_absent_side_is_named_in_its_cell_and_has_no_verdict():
    row = dataclasses.replace(ROW, values=ROW.values | {"peer": "not installed"})
    assert row.quotient(FAST) is None and row.verdicts() == []
    assert "| T=64 causal, forward | 2.00 | not installed | - |" in _section(row).lines()
    assert summary([_section(row)]) == "No target could be checked."


def test_a_table_holds_all_sides_and_quotients_of_its_rows():
    other = Row("T=128", {"ours": [123.4], "third": [1234.5]}, (Ratio("third", "ours"),))
    lines = _section(ROW, other).lines()
    assert "| what | ours, ms | peer, ms | third, ms | peer / ours | third / ours |" in lines
    assert "| T=64 causal, forward | 2.00 | 6.00 | - | **3.00** (≥ 3: reached) | - |" in lines
    assert "| T=128 | 123 | - | 1,234 | - | 10.00 |" in lines
    assert [figure(x) for x in (0.1234, 12.34)] == ["0.12", "12.3"]


def test_the_summary_counts_verdicts_and_names_what_missed():
    slow = dataclasses.replace(ROW, what="slow", ratios=(Ratio("peer", "ours", 4.0), FAST))
    assert summary([_section(ROW, slow)]) == "Targets reached: 2 of 3. Missed: peers: slow."


def test_cases_go_by_name_or_number_in_their_order():
    assert benchmark_attention.chosen(["memory", "3", " 1"]) == ["peers", "windows", "memory"]
    assert benchmark_attention.chosen([]) == list(CASES)


def test_an_unknown_case_is_one_sentence():
    command = [sys.executable, "-m", "experiments.benchmark", "attention", "--cases=1,speed"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --cases: no such case 'speed'; there are 1 peers, 2 ")
    assert done.stderr.count("\n") == 1


def test_the_results_are_written_as_markdown_json_and_a_picture(tmp_path, settings):
    out = tmp_path / "deep/table"
    rows = [
        Row(f"T={T} window 4, {passes}", {"causal": [2.0 * T], "window": [1.0 * T]})
        for T in (64, 128) for passes in ("forward", "both passes")
    ]  # fmt: skip
    bars = dataclasses.replace(
        ROW, values={"ours": [1.0], "jax.nn": [2.0], "SDPA": "not installed"}
    )
    sections = [_section(bars), _section(*rows, name="windows")]
    benchmark_attention.write(out, sections, {"jax": "1.2.3", "device": "1 x cpu"})
    text = (tmp_path / "deep/table.md").read_text()
    assert "`python -m experiments.benchmark attention --rounds=3 --cases=1,windows`" in text
    assert "glibc.malloc.hugetlb=1" in text and "- device: 1 x cpu" in text
    record = json.loads((tmp_path / "deep/table.json").read_text())
    assert [section_from(s) for s in record["sections"]] == sections
    assert (tmp_path / "deep/table.png").read_bytes().startswith(b"\x89PNG")
    assert length(rows[2]) == 128


def test_there_is_no_picture_without_something_to_draw():
    assert picture([_section(ROW, name="memory")]) is None


def test_a_case_that_fails_keeps_its_rows_and_says_so(tmp_path, settings, monkeypatch):
    def broken(bench):
        yield ROW
        raise ValueError("the answers differ")

    monkeypatch.setitem(CASES, "batch", (broken, "Broken", "What it is."))
    result = tmp_path / "batch.json"
    with pytest.raises(ValueError, match="the answers differ"):
        benchmark_cases.measure("batch", Bench(rounds=1), result)
    failed = subprocess.CompletedProcess([], returncode=1)
    monkeypatch.setattr(benchmark_attention.subprocess, "run", lambda *a, **k: failed)
    section, made_with = benchmark_attention.run_case("batch", result)
    assert section.rows == [ROW] and section.notes == ["FAILED after these rows"]
    assert made_with["jax"] and made_with["date"]


def test_a_case_is_measured_without_the_peer_that_is_not_installed(tmp_path, monkeypatch):
    def sdpa(*args):
        raise ImportError("No module named 'torch'")

    monkeypatch.setattr(benchmark_cases, "sdpa", sdpa)
    monkeypatch.setattr(benchmark_sides, "SAMPLE", 1e-6)
    benchmark_cases.measure("batch", Bench(rounds=2, shrink=16), tmp_path / "batch.json")
    section = section_from(json.loads((tmp_path / "batch.json").read_text())["section"])
    assert [row.what for row in section.rows] == [
        "B=2 T=16 causal, forward", "B=2 T=16 causal, both passes"
    ]  # fmt: skip
    assert len(section.rows[0].values["ours"]) == 2
    assert section.rows[0].values["SDPA"] == "not installed"
    assert section.notes == ["sdpa: ImportError: No module named 'torch'"]


def test_sides_are_called_in_turn_and_short_ones_several_times(monkeypatch):
    monkeypatch.setattr(benchmark_sides, "SAMPLE", 1e-6)
    called = []
    sides = {name: Side(lambda name=name: called.append(name), list) for name in ("a", "b")}
    monkeypatch.setattr(benchmark_sides, "_calls", lambda run: 2)
    times = in_turn(sides, rounds=3)
    assert called == ["a", "a", "b", "b"] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_wrong_answers_are_found_before_they_are_timed():
    right = [np.ones((2, 3)), np.full((2, 3), 100.0)]
    check_equal("same", right, [x * 1.0001 for x in right])
    for wrong in (right[1] * 1.01, right[1] * np.nan):
        with pytest.raises(ValueError, match="other: array 1 of their answers differs"):
            check_equal("other", [right[0], wrong], right)


def test_the_tail_tells_a_window_from_one_that_is_a_key_wider():
    arrays = random_arrays(1, 300, N=2, H=4)  # longer than the tail
    mask, wider = (masks.Causal() & masks.SlidingWindow(n) for n in (31, 32))
    for backward in (False, True):
        answer = ours(arrays, backward, mask=mask).answer()
        check_tail(arrays, answer, mask)
        with pytest.raises(ValueError, match="the last queries"):
            check_tail(arrays, answer, wider)


@pytest.mark.oracle
@pytest.mark.parametrize("causal", [True, False])
def test_the_peers_compute_what_ours_does(causal):
    arrays = random_arrays(2, 24, N=2, H=8)
    for backward in (False, True):
        sides = {
            "ours": ours(arrays, backward, mask=masks.Causal() if causal else None),
            "jax.nn": benchmark_sides.jax_nn(arrays, backward, causal),
            "SDPA": benchmark_sides.sdpa(arrays, backward, causal),
        }
        assert len(sides["ours"].answer()) == (4 if backward else 1)
        assert benchmark_cases.checked(sides) is sides
