"""Trains the runs of a study, and reports what they say of its claim.

    python -m experiments.compare --list
    python -m experiments.compare --config=configs/recall.py            # small: a CPU, in minutes
    python -m experiments.compare --config=configs/recall.py:full       # the published setting
    python -m experiments.compare --config=configs/recall.py --config.base.train.num_steps=100

Run it again with the same flags and it goes on where it stopped, run by run. The report is written
to results/<study> (or --out): report.md, runs.csv, study.json and pictures.
"""

import shlex
import sys
from pathlib import Path

from absl import flags

from experiments import cli
from experiments.studies import STUDIES, Study, by_run, listing, report
from experiments.studies.training import train

CONFIG = cli.config_flag(default=None)
flags.declare_key_flag("config")
LIST = flags.DEFINE_bool("list", False, "list the studies and how long they take")
JOBS = flags.DEFINE_integer(
    "jobs", 2, "runs that train at a time, each on its share of the cores", lower_bound=1
)
RUNS = flags.DEFINE_string("runs", None, "the runs' folder; default: runs/<study>_<size>")
OUT = flags.DEFINE_string(
    "out", None, "where to write the report; default: results/<study>, results/<study>_full"
)


def main(_) -> None:
    if LIST.value:
        print(listing())
        return
    with cli.one_sentence():
        if CONFIG.value is None:
            raise ValueError(
                "config: wanted a study, such as --config=configs/recall.py; see --list"
            )
        config = CONFIG.value
        name, size = config.get("name"), config.get("size")
        study = Study.from_config(config, Path(RUNS.value or f"runs/{name}_{size}"))
        if name not in STUDIES:
            raise ValueError(f"config.name: wanted one of {list(STUDIES)}, got {name!r}")
        print(f"{study.name}: {study.claim}")
        print(f"{len(study.runs)} runs, about {study.minutes} minutes at {study.size} size")
        if failed := train(study.runs, jobs=JOBS.value):
            run, reason = next(iter(failed.items()))
            raise ValueError(f"{len(failed)} runs did not finish, the first {run}: {reason}")
        lines = by_run(run.result() for run in study.runs)
        findings = STUDIES[name](lines)
        out = Path(OUT.value or f"results/{name}{'' if size == 'small' else f'_{size}'}")
        report.write(out, study, lines, findings, _command())
    print(f"\nclaim:     {study.claim}")
    print(f"ours:      {findings.ours}")
    print(f"published: {study.published} ({study.source})")
    print(f"verdict:   {findings.verdict}. {findings.margin}")
    print(f"report:    {out / report.REPORT}")


def _command() -> str:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--jobs")]
    return shlex.join(["python", "-m", "experiments.compare", *arguments])


if __name__ == "__main__":
    sys.exit(cli.run(main))
