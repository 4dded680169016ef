"""A command of this package in a process of its own: its peak memory is its own, and so is its random state.

It runs in a session of its own, so that a Ctrl-C reaches it once, through here, and not from the terminal as well:
a second one would make it leave without its checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import trimtab

# The package of this process, wherever it was found; the path must not stand before that of other packages.
_BOOT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import trimtab
del sys.path[0]
from {module} import main
main()
"""
#: How every line of an error begins that is the user's to mend.
_ERROR = b"trimtab: "


class Ended(NamedTuple):
    """How a child ended: its status (128 + the number of a signal that came to us meanwhile), and its error."""

    status: int
    error: str


class Child:
    """One child at a time; the signals that come meanwhile are handed on to it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._arrived: list[int] = []

    def run(self, module: str, words: Sequence[str]) -> Ended:
        """Call `main()` of a module with the words as its command line; its output is ours.

        The last line of an error is returned, not shown.
        """
        old = self._take_signals()
        try:
            root = str(Path(trimtab.__file__).parents[1])
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT.format(module=module), root, *words],
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            for number in self._arrived:
                self._process.send_signal(number)
            error = self._pass_errors()
            status = self._process.wait()
        finally:
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()
                self._process.wait()
            for number, handler in old.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._arrived:
            return Ended(128 + self._arrived[0], error)
        return Ended(128 - status if status < 0 else status, error)

    def _take_signals(self) -> dict[int, Any]:
        old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:  # of nohup
                    continue
                old[number] = signal.signal(number, self._hand_on)
        return old

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append(number)
        if self._process is not None:
            self._process.send_signal(number)

    def _pass_errors(self) -> str:
        """Let the child's standard error through, but for its last word to the user."""
        assert self._process is not None and self._process.stderr is not None
        error = ""
        for line in self._process.stderr:
            if line.startswith(_ERROR):
                error = line.removeprefix(_ERROR).decode(errors="replace").strip()
            else:
                os.write(2, line)
        return error
