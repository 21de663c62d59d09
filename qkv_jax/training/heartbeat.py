"""A file that says that a run is alive: for whoever watches it from elsewhere.

    heartbeat = Heartbeat("runs/char_lm/heartbeat.json")
    with heartbeat:  # an error is noted in the file
        heartbeat.beat(250, loss=1.87)
    heartbeat.mark("finished")

    {"status": "running", "time": "2025-01-31T12:00:00+00:00", "step": 250, "loss": 1.87,
     "longest_pause": 41.7, "pid": 4711, "host": "node7", "process": 0}

A run whose `time` moves is slow at worst. `longest_pause` is the most seconds that have passed
between two beats of this process, compiling and evaluating included: a run whose status is
"running" and whose `time` is older than some times that hangs, or was killed, which its `pid`
tells.
"""

import contextlib
import datetime
import json
import math
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qkv_jax.training.run_directory import write_text_atomic


class Heartbeat:
    """Writes the file, and never stops a run: where that fails, the file grows old.

    Args:
      path: the file; each time replaced as a whole.
      process: the number of this process among those of the run.
      every: least seconds between two writes.
      clock: seconds since any moment.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        process: int = 0,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._path = Path(path)
        self._who = {"pid": os.getpid(), "host": socket.gethostname(), "process": process}
        self._every = every
        self._clock = clock
        self._last: dict[str, Any] = {"step": None}  # what was said last
        self._last_beat = clock()
        self._longest_pause = 0.0
        self._last_write = -float("inf")

    def beat(self, step: int, **metrics: float) -> None:
        """Says that `step` steps are done, and the latest metrics."""
        now = self._clock()
        self._longest_pause = max(self._longest_pause, now - self._last_beat)
        self._last_beat = now
        # JSON has no NaN: as in metrics.jsonl, it is a string.
        written = {name: x if math.isfinite(x) else str(x) for name, x in metrics.items()}
        self._last = {"step": step, **written}
        if now - self._last_write >= self._every:
            self.mark("running")
            self._last_write = now

    def mark(self, status: str) -> None:
        """Writes a status, such as "finished", at once, with what was said last."""
        time_now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        content = {"status": status, "time": time_now, **self._last}
        content |= {"longest_pause": round(self._longest_pause, 3), **self._who}
        with contextlib.suppress(OSError):
            write_text_atomic(self._path, json.dumps(content) + "\n")

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is not None:
            said = " ".join(f"{error_type.__name__} {error}".split())
            self.mark(f"failed: {said}")
