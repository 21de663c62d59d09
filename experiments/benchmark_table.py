"""What a benchmark of attention measured, row by row, and the table that says so."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qkv_jax.training.run_directory import versions, write_text_atomic

Values = list[float] | str  # one a round; or why there are none


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The quotient `of / to` of two sides, and what it is hoped to be.

    Args:
      of, to: names of sides.
      target: the bound, or None where the quotient is only shown.
      at_least: whether the target is reached from above.
    """

    of: str
    to: str
    target: float | None = None
    at_least: bool = True

    @property
    def name(self) -> str:
        return f"{self.of} / {self.to}"

    def verdict(self, value: float) -> str:
        """`reached` or `missed`; nothing without a target."""
        if self.target is None:
            return ""
        good = value >= self.target if self.at_least else value <= self.target
        return "reached" if good else "missed"

    def shown(self, value: float) -> str:
        """The value, and beside a target whether it is reached."""
        if self.target is None:
            return f"{value:.2f}"
        bound = "≥" if self.at_least else "≤"
        return f"**{value:.2f}** ({bound} {self.target:g}: {self.verdict(value)})"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: the same computation by several sides, timed in turn.

    Args:
      what: the computation.
      values: by side, a figure for each round, or a word such as "not installed".
      ratios: what to compare.
      unit: of the values.
    """

    what: str
    values: dict[str, Values]
    ratios: tuple[Ratio, ...] = ()
    unit: str = "ms"

    @classmethod
    def from_record(cls, record: dict) -> "Row":
        """From JSON."""
        return cls(**record | {"ratios": tuple(Ratio(**ratio) for ratio in record["ratios"])})

    def median(self, side: str) -> float | None:
        values = self.values.get(side, "")
        return None if isinstance(values, str) else statistics.median(values)

    def quotient(self, ratio: Ratio) -> float | None:
        """The median over rounds of the quotient in one round; None where a side is absent."""
        of, to = self.values.get(ratio.of, ""), self.values.get(ratio.to, "")
        if isinstance(of, str) or isinstance(to, str):
            return None
        return statistics.median(a / b for a, b in zip(of, to, strict=True))

    def verdicts(self) -> list[str]:
        """Of each ratio that has a target and could be computed."""
        found = ((ratio, self.quotient(ratio)) for ratio in self.ratios)
        return [r.verdict(value) for r, value in found if value is not None and r.target]


@dataclasses.dataclass(frozen=True)
class Section:
    """The rows of one case.

    Args:
      name: as `--cases` takes it.
      title: the heading.
      about: what is measured, in a sentence or two.
      rows: all with the same unit.
      notes: why a side is absent, or how the case failed.
    """

    name: str
    title: str
    about: str
    rows: list[Row]
    notes: list[str] = dataclasses.field(default_factory=list)

    def lines(self) -> list[str]:
        """The section as Markdown."""
        notes = [f"- {note}" for note in self.notes]
        return [f"## {self.title}", "", self.about, "", *_table(self.rows), "", *notes, ""]


def _table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["No row was measured."]
    sides = list(dict.fromkeys(side for row in rows for side in row.values))
    ratios = list(dict.fromkeys(ratio.name for row in rows for ratio in row.ratios))
    heads = ["what", *(f"{side}, {rows[0].unit}" for side in sides), *ratios]
    lines = [line(heads), "|---|" + "---:|" * (len(heads) - 1)]
    for row in rows:
        values = [_value(row, side) for side in sides]
        cells = {ratio.name: _ratio(row, ratio) for ratio in row.ratios}
        lines.append(line([row.what, *values, *(cells.get(name, "-") for name in ratios)]))
    return lines


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def _value(row: Row, side: str) -> str:
    values = row.values.get(side, "-")
    return values if isinstance(values, str) else figure(row.median(side))


def _ratio(row: Row, ratio: Ratio) -> str:
    value = row.quotient(ratio)
    return "-" if value is None else ratio.shown(value)


def figure(value: float) -> str:
    """A number with about three digits."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def summary(sections: Sequence[Section]) -> str:
    """How many targets were reached, and which rows missed one."""
    return tally([(f"{s.name}: {row.what}", row.verdicts()) for s in sections for row in s.rows])


def tally(found: Sequence[tuple[str, Sequence[str]]]) -> str:
    """How many of the verdicts on what is named are `reached`, and what missed one."""
    verdicts = [verdict for _, of_one in found for verdict in of_one]
    if not verdicts:
        return "No target could be checked."
    missed = [name for name, of_one in found if "missed" in of_one]
    text = f"Targets reached: {verdicts.count('reached')} of {len(verdicts)}."
    return text + (f" Missed: {'; '.join(missed)}." if missed else "")


def made_with() -> dict[str, str]:
    """The versions of what computed a table, PyTorch's among them, the machine and the day."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "not installed"
    return versions() | {
        "torch": torch,
        "cores": str(os.cpu_count()),
        "processor": processor(),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "not set"),
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    """The name of the processor."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def write_both(out: Path, text: str, record: dict[str, Any]) -> None:
    """A table as `out`.md, and all that was measured as `out`.json."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out.with_name(out.name + ".md"), text)
    write_text_atomic(out.with_name(out.name + ".json"), json.dumps(record, indent=2) + "\n")
