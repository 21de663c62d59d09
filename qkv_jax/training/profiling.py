"""A profile of some steps of a run, for TensorBoard and Perfetto.

with Profile("runs/char_lm/profile", steps=(100, 110)) as profile:
    ...
    profile.before(step, state)
    state, metrics = train_steps(state, batches, count)
    said = profile.after(step + count, state)
"""

import re
from pathlib import Path
from typing import Any

import jax


def profiled_steps(text: str | None, *, start: int, end: int) -> tuple[int, int] | None:
    """The steps that "100:110" names: those after the hundredth, up to the 110th.

    Args:
      text: two numbers and a colon; None: no steps.
      start: the step that training starts or resumes from.
      end: the step that it ends at.

    Returns:
      (steps taken before the profile, steps taken after it), or None.

    Raises:
      ValueError: it is no such text, or not all of the steps will be taken.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
    if not found:
        raise ValueError(f"profile: wanted two steps and a colon, such as 100:110, got {text!r}")
    first, last = int(found[1]), int(found[2])
    if not start <= first < last <= end:
        raise ValueError(
            f"profile: wanted {start} <= first < last <= {end}, the steps that this run takes now, "
            f"got {text!r}"
        )
    return first, last


class Profile:
    """Traces some steps of a loop with `jax.profiler`, and nothing else of what they wait for.

    Args:
      directory: where the trace goes.
      steps: of `profiled_steps`; None: no profile is made.
    """

    def __init__(self, directory: str | Path, steps: tuple[int, int] | None = None):
        self._directory = Path(directory)
        self.steps = steps
        self._tracing = False

    def before(self, step: int, state: Any) -> None:
        """Begins where `step` is the first, when `state`, what was computed before, is there."""
        if self.steps and step == self.steps[0]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._tracing = True

    def after(self, step: int, state: Any) -> str:
        """Ends where `step` is the last, when `state` is there; says where it lies, or nothing."""
        if not (self._tracing and self.steps and step == self.steps[1]):
            return ""
        jax.block_until_ready(state)
        self.close()
        return f"profile of steps {self.steps[0]}:{self.steps[1]}: {self._directory}"

    def close(self) -> None:
        """Ends the trace if there is one, also of fewer steps than were asked for."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error) -> None:
        self.close()
