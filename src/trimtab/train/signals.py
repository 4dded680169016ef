"""SIGINT and SIGTERM as a wish to stop, read between two steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

#: Exit status of a process that ended on a signal, by the shell's convention (128 + number).
STATUS = {"SIGINT": 130, "SIGTERM": 143}


class StopSignals:
    """Within `with`, the first SIGINT or SIGTERM only sets `name`; a SIGINT after that interrupts at once.

    Python lets only the main thread set handlers; elsewhere nothing is set and `name` stays None.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            # None: the old handler was not set from Python and cannot be given back; the default is next to it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old.clear()

    @property
    def status(self) -> int:
        """The exit status that tells of the signal; 0 without one."""
        return STATUS[self.name] if self.name else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        arrived = signal.Signals(number).name
        if arrived == "SIGINT" and self.name is not None:
            raise KeyboardInterrupt
        if self.name is None:
            self.name = arrived
            text = f"\n{arrived}: finishing this step, then a last checkpoint (Ctrl-C now leaves at once)\n"
            # print() may be in the middle of a write when the signal comes; os.write cannot be re-entered.
            os.write(2, text.encode())
