"""Several processes of one test, which end: one that stands still is shown where, and fails the test."""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.multiprocessing as mp

#: Seconds; a test has 300 in all, maybe for two such calls, which seldom take 30.
LIMIT = 120


def spawn(run: Callable[..., None], args: tuple[Any, ...], processes: int, limit: float = LIMIT) -> None:
    """Call run(rank, *args) in so many processes, and wait for them.

    One that is not done in time writes where each of its threads stands, and ends. That it did, or was killed after it,
    fails the test; as does whatever one of them raises.
    """
    context = mp.spawn(_watched, (run, limit, *args), nprocs=processes, join=False)
    end = time.monotonic() + limit + 20  # one that cannot even end by itself
    while not context.join(timeout=1.0):
        if time.monotonic() > end:
            left = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
            for process in context.processes:
                process.kill()
            pytest.fail(f"processes {left} of {processes} did not end in {limit + 20:.0f} s; where they stand is above")


def _watched(rank: int, run: Callable[..., None], limit: float, *args: Any) -> None:
    faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
    run(rank, *args)
