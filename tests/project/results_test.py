"""What the README says of results is what stands in results/."""

import json
import re
from pathlib import Path

import pytest

from experiments.benchmark_growth import Growth, cell, slope
from experiments.benchmark_table import figure
from experiments.results import END, START, with_table
from experiments.studies import STUDIES
from experiments.studies.report import RECORD
from qkv_jax.models import MIXERS

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"\| `(\w+)` \| .* \| (\S+) \| ([^|]+) \| ([^|]+) \| (\S+) \|")


def test_the_readme_lists_every_mixer_with_what_was_measured():
    text = (ROOT / "README.md").read_text()
    text = text[text.index("### Mechanisms beside exact attention") :]
    rows = {name: found for name, *found in ROW.findall(text)}
    assert rows.keys() == MIXERS.keys()
    results = json.loads((ROOT / "results/benchmark_mechanisms.json").read_text())
    start = results["sizes"]["start"]
    for growth in map(Growth.from_record, results["rows"]):
        state = "-" if growth.state is None else f"{growth.state:,}"
        rate = slope(growth.times, start)
        wanted = [
            state, cell(growth.ms[start]), cell(growth.ms[results["sizes"]["lengths"][-1]]),
            "-" if rate is None else figure(rate),
        ]  # fmt: skip
        assert rows[growth.name] == wanted, growth.name


def test_the_readmes_table_of_studies_is_that_of_their_reports():
    text = (ROOT / "README.md").read_text()
    assert with_table(text, ROOT / "results") == text, "run make results"


@pytest.mark.parametrize(("verdict", "failed", "told"), [
    ("holds", [], "**holds**"),
    ("does not hold here", ["a", "b c"], "**does not hold here**: a; b c"),
])  # fmt: skip
def test_a_row_of_a_study_says_claim_figures_and_verdict(tmp_path, verdict, failed, told):
    name = next(iter(STUDIES))
    record = {"claim": "C", "ours": "1", "published": "2", "source": "S"}
    record |= {"verdict": verdict, "failed": failed}
    (tmp_path / "results" / name).mkdir(parents=True)
    (tmp_path / "results" / name / RECORD).write_text(json.dumps(record))
    text = with_table(f"before\n{START}\nold\n{END}\nafter", tmp_path / "results")
    row = f"| [`{name}`](results/{name}/report.md) | C | 1 | 2 (S) | {told} |"
    before, start, _, _, found, *others, end, after = text.splitlines()
    assert (before, start, found, end, after) == ("before", START, row, END, "after")
    assert len(others) == len(STUDIES) - 1 and all(" | not run yet | " in row for row in others)
