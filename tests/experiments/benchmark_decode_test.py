"""The benchmark of decoding: its rows and its page, at small sizes."""

from experiments import benchmark_decode
from experiments.benchmark_cases import Bench
from experiments.benchmark_table import Ratio, Row, Section
from qkv_jax import interop


def test_the_times_of_a_call_become_those_of_a_token():
    row = Row("batch 8", {"ours": [256.0, 512.0], "transformers": "not installed"})
    found = benchmark_decode.per_token(row, 128)
    assert found.values == {"ours": [2.0, 4.0], "transformers": "not installed"}
    assert found.unit == "ms a token"


def test_ours_alone_is_timed_where_transformers_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    ours, theirs = benchmark_decode.pair(benchmark_decode.SMALL, tmp_path)
    assert theirs is None and isinstance(ours, interop.Checkpoint)
    (row,) = benchmark_decode.cache_bytes(Bench(1), ours, theirs)
    assert 0.25 < row.quotient(row.ratios[0]) < 0.34
    (row,) = benchmark_decode.prefill(Bench(1), ours, theirs)
    assert row.values["transformers"] == "not installed" and row.median("ours") > 0


def test_the_page_has_rates_and_what_it_was_made_with(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_decode, "ROUNDS", type("Flag", (), {"value": 3}))
    monkeypatch.setattr(benchmark_decode, "QUICK", type("Flag", (), {"value": False}))
    monkeypatch.setattr(benchmark_decode.nanogpt, "NANOGPT", type("Flag", (), {"value": None}))
    row = Row(
        "batch 8", {"transformers": [40.0, 20.0], "ours": [10.0, 10.0]},
        (Ratio("transformers", "ours", 2.0),), "ms a token",
    )  # fmt: skip
    benchmark_decode.write(tmp_path / "decode", [Section("gpt2", "GPT-2", "about", [row])])
    page = (tmp_path / "decode.md").read_text(encoding="utf-8")
    assert "batch 8, transformers: 267; batch 8, ours: 800." in page
    assert "**3.00** (≥ 2: reached)" in page and "- jax:" in page
