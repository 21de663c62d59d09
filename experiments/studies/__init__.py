"""Studies: a claim about attention, the runs that would show it, and what is found.

Another study is a config in `configs/<name>.py`, made with `configs/study.py`, and a function
`judge` in `experiments/studies/<name>.py` that reads the results and judges the claim, with its
name in `NAMES`.
"""

import importlib
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from experiments.studies.study import Findings, Line, Result, Run, Study, by_run

NAMES = (
    "recall", "distance", "translate", "senses", "projections", "heads", "scale",
    "positions", "sinks", "long_range", "approximation", "long_documents", "induction", "grokking",
    "lm", "tokens",
)  # fmt: skip
# name -> what a study's results, one line for each run, say of its claim
STUDIES: dict[str, Callable[[Sequence[Line]], Findings]] = {
    name: importlib.import_module(f"{__name__}.{name}").judge for name in NAMES
}


def config_of(name: str, size: str = "small") -> ConfigDict:
    """The config of a study, in one of its sizes."""
    return importlib.import_module(f"configs.{name}").get_config(size)


def listing() -> str:
    """All studies, with how long each takes and what it is about."""
    lines = ["study           small    full     claim (minutes: two CPU cores | one accelerator)"]
    for name in STUDIES:
        small, full = (config_of(name, size) for size in ("small", "full"))
        lines.append(f"{name:14}  {small.minutes:3} min  {full.minutes:3} min  {small.claim}")
    return "\n".join(lines)


__all__ = [
    "NAMES",
    "STUDIES",
    "Findings",
    "Line",
    "Result",
    "Run",
    "Study",
    "by_run",
    "config_of",
    "listing",
]
