"""A study: a claim, the runs that would show it, and what came of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from configs import char_lm
from experiments import setup
from qkv_jax.training.run_directory import (
    RunDirectory,
    config_from_json,
    config_to_json,
    flat_fields,
    read_config,
)
from qkv_jax.training.writers import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of a study.

    Args:
      name: what is trained, the same for each seed.
      fields: what it changes in the study's base config, by dotted name.
      seed: of parameters and batches.
      config: of `experiments/train.py`, complete.
      workdir: where it is trained.
    """

    name: str
    fields: dict[str, Any]
    seed: int
    config: ConfigDict
    workdir: Path

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.workdir.absolute())

    @property
    def flags(self) -> list[str]:
        """What makes `experiments.train` train this run: the fields that differ from the base."""
        before, now = (
            dict(flat_fields(config.to_dict())) for config in (char_lm.get_config(), self.config)
        )
        return [f"--config.{name}={now[name]}" for name in now if now[name] != before[name]]

    def result(self) -> Result | None:
        """What a finished run found; None where it has not finished.

        Raises:
          ValueError: what has finished there is a run of another config.
        """
        path = self.directory.result
        if not path.exists():
            return None
        if read_config(self.directory, char_lm.get_config()) != self.config:
            raise ValueError(
                f"{self.workdir} holds the run of another config; delete it, or choose another "
                "--runs"
            )
        return Result(self, **json.loads(path.read_text(encoding="utf-8")))


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run found: the fields of its `result.json`.

    Args:
      run: which.
      scores: by name, such as `loss` and `accuracy`.
      parameters: their number.
      steps: that were made.
      seconds: in all.
      milliseconds_per_step: the median, on what the run had of the machine.
      peak_memory_bytes: of its process, or on its device.
      state_size: numbers kept of a full context to decode one more token; None: not known.
    """

    run: Run
    scores: dict[str, float]
    parameters: int
    steps: int
    seconds: float
    milliseconds_per_step: float | None
    peak_memory_bytes: int | None
    state_size: int | None

    def evaluations(self) -> list[dict[str, float]]:
        """What was measured while training: `step`, `validation_loss` and so on, in order."""
        rows = read_metrics(self.run.directory.metrics)
        return [row for row in rows if "validation_loss" in row]

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of what was measured while training, by its name there."""
        return [(row["step"], row[name]) for row in self.evaluations()]


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a study's results say of its claim.

    Args:
      parts: of the claim, and whether each is as claimed.
      ours: the figures, as short as the published ones.
      found: by how much, in a sentence or a few.
      figures: pictures, by file name without suffix, in the order in which to show them.
      captions: what was claimed and found, a sentence each.
      notes: what else is to be said, a paragraph each.
      tables: what was measured beside the runs' scores, by file name without suffix: rows, each a
        value by the name of its column.
    """

    parts: Mapping[str, bool]
    ours: str
    found: str
    figures: dict[str, Figure]
    captions: dict[str, str]
    notes: Sequence[str] = ()
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """The parts that are not as claimed."""
        return [part for part, is_so in self.parts.items() if not is_so]

    @property
    def holds(self) -> bool:
        return not self.failed

    @property
    def verdict(self) -> str:
        return "holds" if self.holds else "does not hold here"

    @property
    def margin(self) -> str:
        """By how much the claim holds, and in what it does not."""
        return self.found + (f" Not as claimed: {'; '.join(self.failed)}." if self.failed else "")


@dataclasses.dataclass(frozen=True)
class Study:
    """A study's config, checked: every run's mistakes are found before the first begins.

    Raises:
      ValueError: naming the field and the run.
    """

    name: str
    size: str
    minutes: int
    claim: str
    published: str
    source: str
    differences: tuple[str, ...]
    runs: tuple[Run, ...]

    @classmethod
    def from_config(cls, config: ConfigDict, folder: Path) -> Study:
        """The study of a config such as `configs/recall.py`, with its runs in a folder."""
        fields = [field.name for field in dataclasses.fields(cls)]  # runs among them
        if missing := [name for name in (*fields, "base", "seeds") if name not in config]:
            raise ValueError(
                f"config.{missing[0]} is missing: wanted the config of a study, such as "
                "configs/recall.py; a single run's is for experiments.train"
            )
        runs = tuple(
            _make_run(config.base, name, dict(fields), seed, folder)
            for name, fields in config.runs
            for seed in config.seeds
        )
        return cls(**{name: config[name] for name in fields} | {"runs": runs})


def _make_run(base: ConfigDict, name: str, fields: dict, seed: int, folder: Path) -> Run:
    config = base.copy_and_resolve_references()
    try:
        config.update_from_flattened_dict(fields)
        config.seed = seed
        config = config_from_json(config_to_json(config), char_lm.get_config())
        setup.resolve(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"run {name!r}: {error}") from error
    slug = "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
    return Run(name, fields, seed, config, folder / f"{slug}-{seed}")


@dataclasses.dataclass(frozen=True)
class Line:
    """The results of one run with all its seeds."""

    name: str
    fields: dict[str, Any]
    results: tuple[Result, ...]

    def mean(self, what: str | Callable[[Result], float]) -> float:
        """The mean over seeds of a score, or of what a function says of a result."""
        return float(np.mean(self._values(what)))

    def spread(self, what: str | Callable[[Result], float]) -> float:
        """Half of the distance between the smallest and the largest over seeds."""
        values = self._values(what)
        return (max(values) - min(values)) / 2

    def _values(self, what: str | Callable[[Result], float]) -> list[float]:
        return [r.scores[what] if isinstance(what, str) else what(r) for r in self.results]


def by_run(results: Iterable[Result]) -> list[Line]:
    """The results of equal runs with different seeds together, in the order of the study."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.run.name, []).append(result)
    return [Line(name, group[0].run.fields, tuple(group)) for name, group in groups.items()]


def all_evaluations(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """What was measured while training, of every run and seed, as rows of a table."""
    return [
        {"run": line.name, "seed": result.run.seed} | row
        for line in lines
        for result in line.results
        for row in result.evaluations()
    ]


def by_kind(lines: Iterable[Line], separator: str = ", ") -> dict[str, dict[str, Line]]:
    """Lines whose names are a kind, a separator and a name: kind -> name -> line."""
    kinds: dict[str, dict[str, Line]] = {}
    for line in lines:
        kind, _, name = line.name.partition(separator)
        kinds.setdefault(kind, {})[name] = line
    return kinds
