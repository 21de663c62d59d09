"""`python -m experiments.benchmark attention`: speed and memory of attention beside its peers.

    --cases=peers,windows       these cases alone, by name or number; by default all
    --rounds=7                  how often each side is timed, in turn with the others
    --quick                     sizes and batches divided by 16: whether it works, not how fast

`benchmark_cases` says what is measured. Each case runs in a process of its own, with huge pages as
in the Makefile. Torch is a peer where it is installed, FlexAttention also needs a C++ compiler.
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
from experiments.benchmark_cases import CASES, section_from
from experiments.benchmark_picture import picture
from experiments.benchmark_table import Section, summary, write_both
from qkv_jax.viz import style

CASES_FLAG = flags.DEFINE_list("cases", [], "attention: cases by name or number; by default all")
# These two are flags of `mechanisms` as well.
ROUNDS = flags.DEFINE_integer("rounds", 7, "timings of each side", lower_bound=1)
QUICK = flags.DEFINE_bool("quick", False, "small sizes, to see whether it works")

ROOT = Path(__file__).resolve().parents[1]
SHRINK = 16
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # as the Makefile's `script`


def benchmark_attention(out: Path) -> None:
    """Measures case by case; writes `out` as .md, .json and a picture after each of them."""
    names = chosen(CASES_FLAG.value)
    sections, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            section, made_with = run_case(name, Path(folder) / f"{name}.json")
            if section:
                sections.append(section)
                write(out, sections, made_with)
            if not section or any(note.startswith("FAILED") for note in section.notes):
                failed.append(name)
    if sections:
        print(f"\n{summary(sections)}\nwritten: {out}.md")
    if failed:
        cli.fail(f"these cases failed: {', '.join(failed)}; the reasons stand above")


def chosen(wanted: Sequence[str]) -> list[str]:
    """The names of cases given by name or number, in the order of the numbers."""
    names = list(CASES)
    numbers = {str(i + 1): name for i, name in enumerate(names)}
    found = {numbers.get(text.strip(), text.strip()) for text in wanted}
    if unknown := sorted(found - set(names)):
        known = ", ".join(f"{number} {name}" for number, name in numbers.items())
        cli.fail(f"--cases: no such case {unknown[0]!r}; there are {known}")
    return [name for name in names if name in found or not found]


def run_case(name: str, result: Path) -> tuple[Section | None, dict[str, str]]:
    """One case in a process of its own: its section, None if it wrote nothing, and versions."""
    shrink = SHRINK if QUICK.value else 1
    command = [sys.executable, "-m", "experiments.benchmark_cases", name, str(ROUNDS.value),
               str(shrink), str(result)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=os.environ | HUGE_PAGES)
    if not result.exists():
        return None, {}
    record = json.loads(result.read_text())
    section = section_from(record["section"])
    if done.returncode:
        section.notes.append("FAILED after these rows")
    return section, record["made_with"]


def write(out: Path, sections: Sequence[Section], made_with: dict[str, str]) -> None:
    """The table as Markdown, all the timings as JSON, and a picture of them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fig = picture(sections)
    if fig:
        style.save_figure(fig, out.with_name(out.name + ".png"))
    text = markdown(sections, made_with, f"{out.name}.png" if fig else None)
    record = {"sections": [dataclasses.asdict(s) for s in sections], "made_with": made_with}
    write_both(out, text, record)


def markdown(sections: Sequence[Section], made_with: dict[str, str], png: str | None) -> str:
    """The whole page; `png` names the picture beside it."""
    quick = " --quick" if QUICK.value else ""
    cases = f" --cases={','.join(CASES_FLAG.value)}" if CASES_FLAG.value else ""
    command = f"python -m experiments.benchmark attention --rounds={ROUNDS.value}{cases}{quick}"
    tunables = " ".join(f"{name}={value}" for name, value in HUGE_PAGES.items())
    lines = [
        "# Attention, beside its peers",
        "",
        f"`{command}`",
        "",
        *(["**Sizes divided by 16: a smoke test. The figures mean nothing.**", ""] * bool(quick)),
        summary(sections),
        "",
        *([f"![milliseconds by side and by length]({png})", ""] if png else []),
        "float32 with 8 heads of width 64, unless a row says otherwise. \"Both passes\" are the "
        "output and the gradients of q, k and v for a random cotangent. The sides are timed in "
        f"turn, in {ROUNDS.value} rounds; figures are medians over rounds, quotients medians "
        "of the quotients within a round. Compilation is not timed, and a peer's timing starts "
        "when the side before it is done. Before that, the answers were compared. Targets are set "
        f"for the CPU. Each case is a process of its own, with `{tunables}`.",
        "",
        *(line for section in sections for line in section.lines()),
        "## Made with",
        "",
        *(f"- {name}: {value}" for name, value in made_with.items()),
        "",
    ]  # fmt: skip
    return "\n".join(lines)
