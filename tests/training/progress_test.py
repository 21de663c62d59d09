"""Progress: a bar for people, lines for logs, and nothing that can stop a run."""

import io
import itertools
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qkv_jax.training.progress import Progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def a_persons_terminal(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")


def follow(stream, steps, seconds_per_step=0.05, **options) -> list[str]:
    clock = Clock()
    with Progress(1000, steps[0], 2048, stream=stream, clock=clock, **options) as progress:
        for before, step in itertools.pairwise(steps):
            clock.now += (step - before) * seconds_per_step
            progress.update(step, loss=1.87349)
    return stream.getvalue().splitlines()


def test_a_log_gets_the_first_line_at_once_the_second_soon_and_then_one_now_and_then():
    lines = follow(io.StringIO(), range(0, 1001, 10), every=20)
    assert lines == [
        "step 10/1000  loss 1.873",
        "step 110/1000  loss 1.873  40,960 tokens/s  0:44 left",
        "step 510/1000  loss 1.873  40,960 tokens/s  0:24 left",
        "step 910/1000  loss 1.873  40,960 tokens/s  0:04 left",
        "step 1000/1000  loss 1.873  40,960 tokens/s  0:00 left",
    ]


def test_the_speed_is_that_of_the_last_minute_and_not_of_the_compiler():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100_000, 0, 1, stream=stream, clock=clock, every=0)
    clock.now += 1000  # compiling
    for step in range(1, 101):
        progress.update(step)
        clock.now += 10
    for step in range(101, 201):
        progress.update(step)
        clock.now += 1
    assert stream.getvalue().splitlines()[1].startswith("step 2/100000  0 tokens/s  277:46:20 left")
    assert stream.getvalue().splitlines()[-1].startswith("step 200/100000  1 tokens/s  27:43:20")


def test_a_resumed_run_counts_its_own_steps_only():
    lines = follow(io.StringIO(), [500, 510, 520], seconds_per_step=1, every=0)
    assert lines[1] == "step 520/1000  loss 1.873  2,048 tokens/s  8:00 left"


def test_a_terminal_gets_a_bar_and_lines_of_text_above_it():
    stream, clock = Terminal(), Clock()
    with Progress(1000, 0, 2048, stream=stream, clock=clock) as progress:
        progress.update(10, loss=2.0)
        clock.now += 10
        progress.update(500, loss=1.5)
        progress.print("[a sample]")
    drawn = stream.getvalue()
    assert "━" in drawn and "\x1b[" in drawn
    assert "step 500/1000  loss 1.5  100,352 tokens/s  0:10 left" in drawn
    assert "[a sample]\n" in drawn
    assert drawn.endswith("\x1b[?25h")  # the cursor is back


def test_the_bar_is_not_drawn_at_every_step():
    stream, clock = Terminal(), Clock()
    progress = Progress(1000, 0, 1, stream=stream, clock=clock)
    progress.update(1)
    drawn = len(stream.getvalue())
    for step in range(2, 100):
        clock.now += 0.0005
        progress.update(step)
    assert len(stream.getvalue()) == drawn
    progress.close()
    assert "step 99/1000" in stream.getvalue()


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("TERM", "dumb")])
def test_no_bar_is_drawn_where_nobody_can_see_it(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    lines = follow(Terminal(), [0, 10, 20])
    assert lines[0] == "step 10/1000  loss 1.873" and "━" not in "".join(lines)


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_stream_that_is_closed_stops_nothing(kind):
    stream = kind()
    progress = Progress(10, stream=stream, every=0, clock=Clock())
    progress.update(1)
    stream.close()
    progress.update(2)
    progress.print("text")
    progress.close()
    Progress(10, stream=stream).update(1)


WRITE_LINES = """
    import sys
    from qkv_jax.training.progress import Progress

    with Progress(1000, every=0) as progress:
        for step in range(1, 10_000):  # more than a pipe holds
            progress.update(step)
            progress.print("text")
    print("what a script prints at its end")
    sys.stderr.write("done")
"""


def run_python(code: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True, **options)


def test_a_reader_that_leaves_stops_nothing():
    process = run_python(WRITE_LINES, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "done"
    process.stderr.close()
    assert process.wait(timeout=60) == 0


def test_no_standard_output_stops_nothing():
    command = (
        f"exec {shlex.quote(sys.executable)} -c {shlex.quote(textwrap.dedent(WRITE_LINES))} >&-"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(command, shell=True, cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "done")


def test_a_log_needs_no_library():
    code = """
        import sys
        from qkv_jax.training.progress import Progress
        Progress(10).update(1)
        sys.exit("rich.progress" in sys.modules)
    """
    process = run_python(code, stdout=subprocess.DEVNULL)
    process.communicate(timeout=60)
    assert process.returncode == 0
