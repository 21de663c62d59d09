"""How fast training is: tokens a second, and what part of the chip's peak that takes.

speed = Throughput(tokens_per_step=2048)
speed.count(10)  # the results of ten steps have come
speed.numbers()  # {"tokens_per_second": 41000.0}
"""

import time
from collections.abc import Callable


class Throughput:
    """Counts steps and the time between them: neither compilation nor what interrupts training.

    Args:
      tokens_per_step: tokens that a step trains on.
      peak_steps: steps a second at the devices' peak, by the model's floating point operations;
        None: not known.
      clock: seconds since any moment.
    """

    def __init__(
        self,
        tokens_per_step: int,
        peak_steps: float | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._tokens_per_step = tokens_per_step
        self._peak_steps = peak_steps
        self._clock = clock
        self._since: float | None = None  # None: the next steps wait for the compiler
        self._steps, self._seconds = 0, 0.0
        self._numbers: dict[str, float] = {}

    def count(self, steps: int) -> None:
        """Says that the results of so many more steps are there."""
        now = self._clock()
        if self._since is not None:
            self._steps += steps
            self._seconds += now - self._since
        self._since = now

    def resume(self) -> None:
        """Says that something else took time, and steps begin again."""
        if self._since is not None:
            self._since = self._clock()

    def numbers(self) -> dict[str, float]:
        """`tokens_per_second` since the last time, and `mfu` where the peak is known."""
        if self._seconds > 0:
            rate = self._steps / self._seconds
            self._numbers = {"tokens_per_second": rate * self._tokens_per_step}
            if self._peak_steps is not None:
                self._numbers["mfu"] = rate / self._peak_steps
            self._steps, self._seconds = 0, 0.0
        return self._numbers
