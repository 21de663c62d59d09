"""What the README says of results is what stands in results/."""

import json
import re
from pathlib import Path

from experiments.benchmark_growth import Growth, cell, slope
from experiments.benchmark_table import figure
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
