"""How far training is: a bar on a terminal, a line now and then in a log file.

with Progress(total=1000, start=0, tokens_per_step=2048) as progress:
    progress.update(250, loss=1.873)

step 250/1000  loss 1.873  41,000 tokens/s  0:45 left
"""

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

_WINDOW = 60.0  # seconds over which the speed is averaged
_SOON = 5.0  # seconds to the second line of a log: the first that knows the speed
_REDRAW = 0.1  # seconds between drawings of the bar


class Progress:
    """Shows steps, metrics, tokens/s and the time left, and never stops a run nobody watches.

    Args:
      total: the step at which training ends.
      start: the step it starts or resumes from.
      tokens_per_step: tokens that a step trains on.
      every: seconds between lines in a log; the first comes at once, the second soon.
      stream: where to write; None: the standard output.
      clock: seconds since any moment.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        tokens_per_step: int = 1,
        *,
        every: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total = total
        self._tokens_per_step = tokens_per_step
        self._every = every
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        # Recent (time, step). The start is not among them: the first step waits for the compiler.
        self._recent: deque[tuple[float, int]] = deque()
        self._text = ""  # of the last update
        self._shown = ""
        self._next = -float("inf")  # when to show again
        self._lines = 0
        self._bar = None
        if _is_terminal(self._stream):
            with self._unless_gone():
                self._bar = _start_bar(self._stream, total, start)

    def update(self, step: int, **metrics: float) -> None:
        """Says that `step` steps are done, and the latest metrics."""
        now = self._clock()
        self._recent.append((now, step))
        while len(self._recent) > 2 and self._recent[0][0] < now - _WINDOW:
            self._recent.popleft()
        self._text = self._describe(step, metrics)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, text=self._text)
        if now >= self._next:
            self._show()
            self._next = now + self._interval()

    def print(self, text: str) -> None:
        """Writes a line of its own, above the bar if there is one."""
        with self._unless_gone():
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            elif self._stream is not None:
                print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Shows the last update if it was not, and ends the bar; may be called again."""
        if self._text != self._shown:
            self._show()
        if self._bar is not None:
            with self._unless_gone():
                self._bar.stop()
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _describe(self, step: int, metrics: Mapping[str, float]) -> str:
        parts = [f"step {step}/{self.total}"]
        parts += [f"{name} {value:.4g}" for name, value in metrics.items()]
        (first_time, first_step), (last_time, _) = self._recent[0], self._recent[-1]
        if last_time > first_time and step > first_step:
            speed = (step - first_step) / (last_time - first_time)
            parts.append(f"{speed * self._tokens_per_step:,.0f} tokens/s")
            parts.append(f"{_duration((self.total - step) / speed)} left")
        return "  ".join(parts)

    def _interval(self) -> float:
        if self._bar is not None:
            return _REDRAW
        return min(_SOON, self._every) if self._lines == 1 else self._every

    def _show(self) -> None:
        self._shown = self._text
        self._lines += 1
        with self._unless_gone():
            if self._bar is not None:
                self._bar.refresh()
                return
        self.print(self._text)

    @contextlib.contextmanager
    def _unless_gone(self):
        """Goes on in silence when the terminal or the reader of the pipe has gone."""
        try:
            yield
        except (OSError, ValueError, SystemExit):  # a closed file raises ValueError, Rich exits
            # What the script itself prints later would fail likewise.
            with contextlib.suppress(OSError, ValueError):
                target, nowhere = self._stream.fileno(), os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, target)
                os.close(nowhere)
            self._bar = self._stream = None


def _is_terminal(stream: TextIO | None) -> bool:
    """Whether a person watches: CI services may offer a terminal, and keep what is drawn on it."""
    if stream is None or stream.closed or os.environ.get("CI"):
        return False
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _start_bar(stream: TextIO, total: int, start: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = BarColumn(), TextColumn("{task.fields[text]}", markup=False)
    # Redrawn by update: Rich's own thread would take the interpreter from the training loop.
    console = Console(file=stream, force_terminal=True)
    bar = Progress(*columns, console=console, auto_refresh=False)
    bar.add_task("", total=total, completed=start, text="compiling")
    bar.start()
    return bar


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
