"""The progress of tokenisation on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from trimtab.data.tokens import Progress as Report

_STAGES = {"train tokenizer": "training the tokenizer", "tokenize": "tokenizing", "assemble": "writing the store"}


@contextmanager
def token_bar(console: Console) -> Iterator[Callable[[Report], None]]:
    """A callback for `build_store` that shows a bar for each stage; off a terminal, a line for each stage.

    Nothing is shown when the callback is never called, as for a store that is already complete.
    """
    columns = (
        TextColumn("{task.description:22}"),
        BarColumn(bar_width=32),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=console, transient=False, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}

    def show(report: Report) -> None:
        if report.stage not in tasks:
            if not console.is_terminal:
                console.print(_STAGES[report.stage], markup=False, highlight=False)
            if not bars.live.is_started:
                bars.start()
            for task in tasks.values():  # the stages follow each other
                bars.update(task, total=bars.tasks[task].completed or 1, completed=bars.tasks[task].completed or 1)
            tasks[report.stage] = bars.add_task(_STAGES[report.stage], counts="")
        by_tokens = report.stage == "tokenize" and report.total_tokens is not None
        done = report.tokens if by_tokens else report.bytes
        total = report.total_tokens if by_tokens else report.total_bytes
        counts = f"{report.documents:,} documents, {report.tokens:,} tokens"
        bars.update(tasks[report.stage], completed=done, total=total, counts=counts)

    try:
        yield show
    finally:
        if bars.live.is_started:
            bars.stop()
