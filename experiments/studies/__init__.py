"""Studies: a claim about attention, the runs that would show it, and what is found.

Another study is a config in `configs/<name>.py`, made with `configs/study.py`, and a function in
`experiments/studies/<name>.py` that reads the results and judges the claim, with a line in
`STUDIES`.
"""

import importlib
from collections.abc import Callable, Sequence

from experiments.studies import (
    distance,
    grokking,
    heads,
    induction,
    lm,
    long_documents,
    positions,
    projections,
    recall,
    scale,
    sinks,
    tokens,
)
from experiments.studies import distance, heads, lm, long_range, positions, projections, recall
from experiments.studies.study import Findings, Line, Result, Run, Study, by_run

# name -> what a study's results, one line for each run, say of its claim
STUDIES: dict[str, Callable[[Sequence[Line]], Findings]] = {
    "recall": recall.judge,
    "distance": distance.judge,
    "projections": projections.judge,
    "heads": heads.judge,
    "positions": positions.judge,
    "sinks": sinks.judge,
    "long_documents": long_documents.judge,
    "lm": lm.judge,
    "scale": scale.judge,
    "induction": induction.judge,
    "grokking": grokking.judge,
    "tokens": tokens.judge,
    "long_range": long_range.judge,
}


def listing() -> str:
    """All studies, with how long each takes and what it is about."""
    lines = ["study           small    full     claim (minutes: two CPU cores | one accelerator)"]
    for name in STUDIES:
        module = importlib.import_module(f"configs.{name}")
        small, full = (module.get_config(size) for size in ("small", "full"))
        lines.append(f"{name:14}  {small.minutes:3} min  {full.minutes:3} min  {small.claim}")
    return "\n".join(lines)


__all__ = ["STUDIES", "Findings", "Line", "Result", "Run", "Study", "by_run", "listing"]
