"""When the next checkpoint of a run is due: by steps, and by the clock."""

import time
from collections.abc import Callable, Collection


class SaveTimes:
    """Says when to save; what is not saved when it is due stays due.

    Args:
      start: the step that training starts or resumes from.
      every: steps whose multiples are saved; a 0 among them is none.
      minutes: the longest time between two checkpoints, up to a dispatch; 0: any.
      clock: seconds since any moment.
    """

    def __init__(
        self,
        start: int,
        *,
        every: Collection[int] = (),
        minutes: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._every = [steps for steps in every if steps]
        self._seconds = 60 * minutes
        self._clock = clock
        self.saved(start)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be made after `step` steps, whatever the clock says."""
        return any(step // steps > self._last_step // steps for steps in self._every)

    def late(self) -> bool:
        """Whether a checkpoint is to be made by the clock, of which each process has its own."""
        return 0 < self._seconds <= self._clock() - self._last_time

    def saved(self, step: int) -> None:
        """Says that there is a checkpoint of `step`."""
        self._last_step, self._last_time = step, self._clock()
