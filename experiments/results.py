"""Writes the README's table of studies from the reports in results/.

python -m experiments.results
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app

from experiments.benchmark_table import line
from experiments.studies import STUDIES, config_of
from experiments.studies.report import RECORD, REPORT
from qkv_jax.training.run_directory import write_text_atomic

ROOT = Path(__file__).parents[1]
START, END = "<!-- studies: make results -->", "<!-- /studies -->"


def main(_) -> None:
    readme = ROOT / "README.md"
    write_text_atomic(readme, with_table(readme.read_text(encoding="utf-8"), ROOT / "results"))


def with_table(readme: str, results: Path) -> str:
    """The README with a row for each study, from its report in the folder where it has one."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    lines = [START, line(["study", "claim", "ours", "published", "verdict"]), "|---" * 5 + "|"]
    for name in STUDIES:
        path = results / name / RECORD
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            link = f"[`{name}`]({results.name}/{name}/{REPORT})"
            ours, verdict = found["ours"], _verdict(found)
        else:
            found = config_of(name)
            link, ours, verdict = f"`{name}`", "not run yet", ""
        published = f"{found['published']} ({found['source']})"
        lines.append(line([link, found["claim"], ours, published, verdict]))
    return "".join([before, "\n".join(lines), "\n", END, after])


def _verdict(record: Mapping[str, Any]) -> str:
    """The verdict of a study's record, and what is not as claimed."""
    failed = "; ".join(record["failed"])
    return f"**{record['verdict']}**" + f": {failed}" * bool(failed)


if __name__ == "__main__":
    sys.exit(app.run(main))
