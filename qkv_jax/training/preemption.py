"""Stopping on request: the first signal ends training after the current step, with a checkpoint.

with StopSignal() as stop:
    for step in range(start, num_steps):
        ...
        if stop.requested:
            break  # save, say why (stop.name), and exit
"""

import signal
import threading
from types import FrameType
from typing import Any


class StopSignal:
    """Turns SIGTERM (a scheduler's notice) and SIGINT (Ctrl-C) into a flag while it is entered.

    A second SIGINT raises KeyboardInterrupt at once. The handlers from before are restored on exit.
    Outside the main thread, where Python allows no handlers, nothing is changed.

    Attributes:
      requested: whether a signal has come.
      name: the first signal's name, such as "SIGTERM"; empty before.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.requested = False
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            # None: the handler was set by C code, and Python cannot give it back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self.name = True, signal.Signals(number).name
