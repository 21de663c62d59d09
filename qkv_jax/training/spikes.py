"""Stopping a run whose loss has jumped, before the jump is all that its checkpoints hold.

A loss is an outlier if it is more than `factor` times the median of the recent ones; `PATIENCE`
outliers in a row are a spike. Single outliers, which a batch may cause, pass. The rule and its two
numbers are those of LLM Foundry's `KillLossSpike` (github.com/mosaicml/llm-foundry, with a factor
of 2), which has a mean where we have a median: that no outlier moves.
"""

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence

WINDOW = 100  # losses that the median is of; no loss is judged before there are so many
PATIENCE = 5  # outliers in a row


class LossSpikeError(RuntimeError):
    """The loss has jumped and stays up: one sentence for the user."""


class LossSpikes:
    """Looks at each loss of a run.

    Args:
      factor: times the recent median, above which a loss is an outlier; above 1. 0: none is.
      recent: losses from before, oldest first, where a run is resumed.
    """

    def __init__(self, factor: float, recent: Iterable[float] = ()):
        self._factor = factor
        self._recent = deque(recent, maxlen=WINDOW)
        self._outliers = 0  # in a row, up to now

    @property
    def suspected(self) -> bool:
        """Whether the last loss was an outlier: no time for a checkpoint."""
        return self._outliers > 0

    def see(self, step: int, loss: float, saved: Callable[[], Sequence[int]] = list) -> None:
        """Takes the loss of the next step.

        Args:
          step: its number, from 1: the loss is of the parameters after `step - 1` steps.
          loss: in any unit.
          saved: returns the steps that there are checkpoints of; called only where it is a spike.

        Raises:
          LossSpikeError: the loss was an outlier `PATIENCE` times in a row.
        """
        if not self._factor:
            return
        if len(self._recent) < WINDOW:
            self._recent.append(loss)
            return
        median = statistics.median(self._recent)
        if loss <= self._factor * median:
            self._outliers = 0
            self._recent.append(loss)
            return
        self._outliers += 1
        if self._outliers == PATIENCE:
            first = step - PATIENCE + 1
            raise LossSpikeError(
                f"step {step}: the loss is {loss:.4g}, and since step {first} more than "
                f"{self._factor:g} times the recent median, {median:.4g}; stopped without saving "
                f"it. {_where_to_go_on(first, saved())}"
            )


def _where_to_go_on(first: int, saved: Sequence[int]) -> str:
    """What to do about a spike of which the loss of step `first` is the first."""
    good = [step for step in saved if step < first - 1]  # of `first - 1` is that loss
    later = sorted(set(saved) - set(good))
    if not good:
        return "No checkpoint is from before: start again with a smaller learning rate."
    where = f"The last checkpoint from before is {max(good)}"
    if later:
        where += f": remove {', '.join(map(str, later))} to go on from there,"
    else:
        where += ": go on from there"
    return where + " with a smaller learning rate."
