"""`python -m experiments.benchmark mechanisms`: how every mixer's time and memory grow with T.

    --mixers=linear,delta       these alone, by their names in models.MIXERS; by default all
    --limit=20                  seconds that a call may take; what would take longer is not run
    --rounds=7                  how often a call is timed, as far as it is short
    --quick                     small sizes: whether it works, not how fast

`benchmark_mixers` measures, each mixer in a process of its own, with huge pages as in the Makefile.
The results are written after each of them. Rows that are not measured now stay, where the machine,
the versions and the sizes are the same.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import cli
from experiments.benchmark_attention import HUGE_PAGES, QUICK, ROOT, ROUNDS
from experiments.benchmark_growth import (
    LOOP,
    SIZES,
    Growth,
    Loop,
    Sizes,
    in_order,
    summary,
    table,
)
from experiments.benchmark_growth_picture import picture
from experiments.benchmark_mixers import LONG, MEMORY_LIMIT, SECONDS
from experiments.benchmark_table import made_with, write_both
from qkv_jax.models import MIXERS
from qkv_jax.viz import style

MIXERS_FLAG = flags.DEFINE_list("mixers", [], "mechanisms: mixers by name; by default all")
LIMIT = flags.DEFINE_float("limit", 20.0, "mechanisms: seconds that a call may take", 0.0)


@dataclasses.dataclass
class Results:
    """What was measured, now or before.

    Args:
      sizes: of everything.
      made_with: the machine and the versions; what differs between rows stands in `made`.
      rows: by the name of the mixer.
      loop: the delta rule in chunks beside its steps.
    """

    sizes: Sizes
    made_with: dict[str, str]
    rows: dict[str, Growth] = dataclasses.field(default_factory=dict)
    loop: Loop | None = None

    def put(self, found: Growth | Loop) -> None:
        """Takes what a process has measured, in the place of what was there."""
        if isinstance(found, Loop):
            self.loop = found
        else:
            self.rows[found.name] = found

    def in_order(self) -> list[Growth]:
        return [self.rows[name] for name in in_order(list(self.rows))]

    def record(self) -> dict:
        """For JSON."""
        return {
            "made_with": self.made_with,
            "sizes": dataclasses.asdict(self.sizes),
            "loop": self.loop and dataclasses.asdict(self.loop),
            "rows": [dataclasses.asdict(row) for row in self.in_order()],
        }


def benchmark_mechanisms(out: Path) -> None:
    """Measures mixer by mixer; writes `out` as .md, .json and a picture after each of them."""
    names = chosen(MIXERS_FLAG.value)
    size = "quick" if QUICK.value else "full"
    made = made_with() | HUGE_PAGES
    stamp = f"commit {made.pop('commit')}, {made.pop('date')}, {ROUNDS.value} rounds"
    results = with_earlier(out, Results(SIZES[size], made))
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found = run_one(name, size, Path(folder) / f"{name}.json")
            found.made = stamp
            results.put(found)
            if found.failed:
                failed.append(name)
            write(out, results)
    print(f"\n{summary(results.in_order(), results.loop, results.sizes)}\nwritten: {out}.md")
    if failed:
        sys.exit(f"error: these failed: {', '.join(failed)}; the reasons stand above")


def chosen(wanted: Sequence[str]) -> list[str]:
    """The given names, or all, by family."""
    known = [*in_order(list(MIXERS)), LOOP]
    found = {name.strip() for name in wanted}
    if unknown := sorted(found - set(known)):
        cli.fail(f"--mixers: no such mixer {unknown[0]!r}; there are {', '.join(known)}")
    return [name for name in known if name in found or not found]


def with_earlier(out: Path, fresh: Results) -> Results:
    """`fresh`, with the rows that lie in `out` if they were measured in the same way."""
    path = out.with_name(out.name + ".json")
    if not path.exists():
        return fresh
    earlier, wanted = json.loads(path.read_text()), json.loads(json.dumps(fresh.record()))
    for what in ("sizes", "made_with"):
        if earlier[what] != wanted[what]:
            print(f"{path} was measured with other {what.replace('_', ' ')}: its rows are dropped")
            return fresh
    for record in earlier["rows"]:
        if record["name"] in MIXERS:
            fresh.put(Growth.from_record(record))
    if earlier["loop"]:
        fresh.put(Loop.from_record(earlier["loop"]))
    return fresh


def run_one(name: str, size: str, result: Path) -> Growth | Loop:
    """What one process measures; whatever ends it early is said in `failed`."""
    command = [sys.executable, "-m", "experiments.benchmark_mixers", name, str(ROUNDS.value),
               str(LIMIT.value), size, str(result)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=os.environ | HUGE_PAGES)
    kind = Loop if name == LOOP else Growth
    found = kind.from_record(json.loads(result.read_text())) if result.exists() else kind(name)
    if done.returncode and not found.failed:
        found.failed = f"the process ended with status {done.returncode}"
    return found


def write(out: Path, results: Results) -> None:
    """The table as Markdown, all figures as JSON, and a picture of them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fig = picture(results.in_order(), results.sizes)
    if fig:
        style.save_figure(fig, out.with_name(out.name + ".png"))
    text = markdown(results, f"{out.name}.png" if fig else None)
    write_both(out, text, results.record())


def markdown(results: Results, png: str | None) -> str:
    """The whole page; `png` names the picture beside it."""
    rows, sizes = results.in_order(), results.sizes
    ahead = ", ".join(f"`{name}`" for name, mixer in MIXERS.items() if not mixer.causal)
    quick = sizes == SIZES["quick"]
    command = (
        f"python -m experiments.benchmark mechanisms --rounds={ROUNDS.value} "
        f"--limit={LIMIT.value:g}{' --quick' if quick else ''}"
    )
    tunables = " ".join(f"{name}={value}" for name, value in HUGE_PAGES.items())
    lines = [
        "# Mechanisms, by the length of the sequence",
        "",
        f"`{command}`",
        "",
        *(["**Small sizes: a smoke test. The figures mean nothing.**", ""] * quick),
        summary(rows, results.loop, sizes),
        "",
        *([f"![time and memory by length]({png})", ""] if png else []),
        f"Both passes of one mixer of `models.MIXERS`: the output [1, T, {sizes.width}] and, for a "
        "random cotangent, the gradients of the input and of all parameters, which are random. "
        "float32, under `Causal()`; without a mask what sees later tokens too "
        f"({ahead}). {sizes}; no positions, no biases.",
        "",
        "Exact attention is `attention`: blockwise, causal, memory linear in T.",
        "",
        f"- *ms*: the median of {ROUNDS.value} rounds, or of as many as {SECONDS:g} s hold, but of "
        f"two at least, after a call that is not timed; a call of more than {LONG:g} s is timed "
        f"once. Compilation is not timed. *> {LIMIT.value:g} s*: "
        "not run, as it would take longer if it grew once more as it grew between the two lengths "
        f"before. *> {MEMORY_LIMIT} GB*: not run, as it would need more memory.",
        "- *MB*: temporaries and outputs, gradients included, as XLA lays them out when it "
        "compiles. That is no measurement, so it has no noise, and there is a figure for what was "
        "not run, too. Inputs and parameters are not in it, nor what a library function "
        "takes for itself while it runs.",
        f"- *~ T^*: the slope of the logarithm against log T by least squares, from "
        f"T = {sizes.start:,} on.",
        "- *state*: the numbers that one layer keeps per sequence to decode one more token "
        "(`state_size`); `-` for what cannot decode.",
        "- *faster*: from which length on, at all lengths; and how many times, at the "
        "longest that both were timed at.",
        f"- Each mixer is a process of its own, with `{tunables}`. Targets are those of linear, "
        "low-rank and window mechanisms.",
        "",
        *table(rows, sizes),
        *(results.loop.lines() if results.loop else []),
        "## Made with",
        "",
        *(f"- {name}: {value}" for name, value in results.made_with.items()),
        *_stamps(results),
        "",
    ]
    return "\n".join(lines)


def _stamps(results: Results) -> list[str]:
    """When and at which commit; with the rows that were measured then, if there are several."""
    measured: dict[str, list[str]] = {}
    for found in (*results.in_order(), *filter(None, [results.loop])):
        measured.setdefault(found.made, []).append(found.name)
    if len(measured) == 1:
        return [f"- {stamp}" for stamp in measured]
    return [f"- {stamp}: {', '.join(names)}" for stamp, names in measured.items()]
