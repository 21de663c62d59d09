"""A study's report: what was claimed, published and found, as Markdown, CSV, JSON and pictures."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark_table import line, made_with
from experiments.studies.study import Findings, Line, Study
from qkv_jax import viz
from qkv_jax.training.run_directory import write_text_atomic

REPORT, TABLE, RECORD = "report.md", "runs.csv", "study.json"


def write(out: Path, study: Study, lines: Sequence[Line], findings: Findings, command: str) -> None:
    """Writes the report into a folder, in place of an earlier one."""
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in findings.figures.items():
        viz.save_figure(figure, out / f"{name}.png")
    record = {
        "command": command,
        "study": study.name,
        "size": study.size,
        "minutes": round(sum(r.seconds for of_run in lines for r in of_run.results) / 60, 1),
        "claim": study.claim,
        "published": study.published,
        "source": study.source,
        "differences": list(study.differences),
        "ours": findings.ours,
        "verdict": findings.verdict,
        "failed": findings.failed,
        "margin": findings.margin,
        "made_with": made_with(),
        "runs": [_record(of_run) for of_run in lines],
    }
    write_text_atomic(out / RECORD, json.dumps(record, indent=1) + "\n")
    write_text_atomic(out / TABLE, _csv(_rows(lines), command))
    for name, rows in findings.tables.items():
        write_text_atomic(out / f"{name}.csv", _csv(rows, command))
    write_text_atomic(out / REPORT, _markdown(study, lines, findings, record))


def _record(of_run: Line) -> dict[str, Any]:
    return {
        "name": of_run.name,
        "fields": of_run.fields,
        "results": [{"seed": r.run.seed} | _numbers(r) for r in of_run.results],
    }


def _numbers(result: Any) -> dict[str, Any]:
    return {
        **result.scores,
        "parameters": result.parameters,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "milliseconds_per_step": result.milliseconds_per_step,
        "peak_memory_bytes": result.peak_memory_bytes,
        "state_size": result.state_size,
    }


def _rows(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [
        {"run": of_run.name, "seed": result.run.seed} | _numbers(result)
        for of_run in lines
        for result in of_run.results
    ]


def _csv(rows: Sequence[Mapping[str, Any]], command: str) -> str:
    text = io.StringIO()
    text.write(f"# {command}\n")
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(
    study: Study, lines: Sequence[Line], findings: Findings, record: dict[str, Any]
) -> str:
    pictures = []
    for name in findings.figures:
        pictures += [
            f"![{findings.captions[name]}]({name}.png)",
            "",
            f"*{findings.captions[name]}*",
            "",
        ]
    made = record["made_with"]
    return "\n".join(
        [
            f"# {study.name}",
            "",
            f"**Claim.** {study.claim}",
            "",
            f"**Verdict: {findings.verdict}.** {findings.margin}",
            "",
            "| | here | published |",
            "|---|---|---|",
            line(["figure", findings.ours, study.published]),
            line(["setting", _setting(study, lines), f"{study.source}"]),
            line(["what differs", "; ".join(study.differences) or "nothing known", ""]),
            "",
            *pictures,
            *(f"{note}\n" for note in findings.notes),
            *(f"Every number of it: [{name}.csv]({name}.csv).\n" for name in findings.tables),
            "## All runs",
            "",
            *_table(lines),
            "",
            "± is half of the range over the seeds. Time is a whole process's, its compiling "
            "included; memory is its most; state is the numbers kept of a full context to decode "
            f"one more token. Every run and seed: [{TABLE}]({TABLE}).",
            "",
            "## What it was made with",
            "",
            f"- `{record['command']}`, {record['minutes']:g} minutes of processes",
            *(f"- {name}: {value}" for name, value in made.items()),
            "",
        ]
    )  # fmt: skip


def _setting(study: Study, lines: Sequence[Line]) -> str:
    train = lines[0].results[0].run.config.train
    seeds = max(len(of_run.results) for of_run in lines)
    return (
        f"`{study.size}`: {len(lines)} runs of at most {train.num_steps:,} steps of "
        f"{train.batch_size} rows, {seeds} seed{'s' if seeds > 1 else ''}"
    )


def _table(lines: Sequence[Line]) -> list[str]:
    scores = list(dict.fromkeys(score for of_run in lines for score in of_run.results[0].scores))
    heads = ["run", *scores, "parameters", "steps", "seconds", "ms a step", "peak MB", "state"]
    found = [line(heads), "|---|" + "---:|" * (len(heads) - 1)]
    for of_run in lines:
        first, several = of_run.results[0], len(of_run.results) > 1
        cells = [of_run.name]
        for score in scores:
            if score not in first.scores:
                cells.append("-")
                continue
            spread = f" ± {of_run.spread(score):.4f}" if several else ""
            cells.append(f"{of_run.mean(score):.4f}{spread}")
        cells += [
            f"{first.parameters:,}",
            f"{of_run.mean(lambda r: r.steps):,.0f}",
            f"{of_run.mean(lambda r: r.seconds):.0f}",
            _shown(of_run, lambda r: r.milliseconds_per_step, "{:.1f}"),
            _shown(of_run, lambda r: r.peak_memory_bytes, "{:.0f}", 1e-6),
            "-" if first.state_size is None else f"{first.state_size:,}",
        ]
        found.append(line(cells))
    return found


def _shown(of_run: Line, what: Any, pattern: str, factor: float = 1.0) -> str:
    if any(what(result) is None for result in of_run.results):
        return "-"
    return pattern.format(of_run.mean(what) * factor)
