"""What the config of a study has: `experiments/compare.py` trains its runs and reports on them.

A study is a claim about attention, and the runs that would show it. Each run is the config of
`experiments/train.py` in `base`, with some fields changed, once for each seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from configs import char_lm

SIZES = ("small", "full")  # a CPU, in minutes | the published setting, for an accelerator


def get_config(name: str, size: str, sizes: Sequence[str] = SIZES) -> ConfigDict:
    """The fields of every study, to be filled in."""
    if size not in sizes:
        raise ValueError(f"a study's size: wanted one of {list(sizes)}, got {size!r}")
    study = ConfigDict()
    study.name = name  # of the study: results/<name>, runs/<name>
    study.size = size
    study.minutes = 0  # that it takes: small on two CPU cores, full on one accelerator
    study.claim = ""  # in a sentence
    study.published = ""  # the figure that others found, in a sentence
    study.source = ""  # where: paper, table or figure, address
    study.differences = ()  # of this setting from the published one, a phrase each
    study.base = char_lm.get_config()  # what all runs have in common
    study.base.name = name
    study.base.train.update(save_every=0, sample_tokens=200, figures=False)  # it has its own
    study.seeds = (0, 1, 2)
    study.runs = ()  # of `run`
    return study


def run(name: str, fields: Mapping[str, Any]) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """A run of a study: its name, and the fields of the base that it changes, dotted."""
    return name, tuple(fields.items())
