"""Trains the runs of a study, each in a process of its own, by `experiments.train`."""

import contextlib
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from experiments.studies.study import Result, Run

ROOT = Path(__file__).parents[2]
TOLD = 4  # scores in the line that says that a run is done


def train(runs: Sequence[Run], *, jobs: int, say: Callable[[str], None] = print) -> dict[str, str]:
    """Trains all that have not finished, so many at a time, each on its share of the cores.

    A run that was interrupted goes on where it stopped. Its output goes to a `.log` beside its
    directory.

    Returns:
      Why runs did not finish, by name and seed; empty where all did.
    """
    pending = [run for run in runs if run.result() is None]
    if len(pending) < len(runs):
        say(f"{len(runs) - len(pending)} of {len(runs)} runs had finished before")
    slots: queue.Queue[list[int]] = queue.Queue()
    for slot in range(jobs):
        slots.put(_cores()[slot::jobs])
    started, failed = time.monotonic(), {}

    def one(run: Run) -> str | None:
        cores = slots.get()
        try:
            return _train(run, cores)
        finally:
            slots.put(cores)

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(one, run): run for run in pending}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                run, reason = futures[future], future.result()
                left = (time.monotonic() - started) / number * (len(pending) - number)
                name = f"{run.name}, seed {run.seed}"
                if reason is not None:
                    failed[name] = reason
                told = reason if reason is not None else _told(run.result())
                say(f"[{number}/{len(pending)}] {name}: {told}; {left / 60:.0f} min left")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those that train have the signal too
            raise
    return failed


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _train(run: Run, cores: list[int]) -> str | None:
    """Why the run did not finish; None where it did."""
    run.workdir.parent.mkdir(parents=True, exist_ok=True)
    log = run.workdir.with_name(run.workdir.name + ".log")
    command = [sys.executable, "-m", "experiments.train", f"--workdir={run.workdir}", *run.flags]
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        if cores and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(process.pid, cores)
        process.wait()
    if run.result() is not None:
        return None
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    return f"not finished ({lines[-1] if lines else 'no output'}); see {log}"


def _told(result: Result) -> str:
    shown = list(result.scores.items())[:TOLD]
    scores = ", ".join(f"{name} {value:.4f}" for name, value in shown)
    return f"{scores} after {result.steps:,} steps, {result.seconds:.0f} s"
