"""The line on the terminal: step, loss, rate, tokens/s, time left, and the restarts as marks in a bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

WIDTH = 32


def bar(step: int, total: int, marks: Sequence[int], width: int = WIDTH) -> str:
    """A bar of `width` cells, heavy up to `step`; a cell in which a restart lies is crossed."""
    cells = []
    crossed = {min(mark * width // total, width - 1) for mark in marks}
    for cell in range(width):
        done = cell < step * width // total
        cells.append(("╋" if done else "┼") if cell in crossed else ("━" if done else "─"))
    return "".join(cells)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressLine:
    """One live line on a terminal; elsewhere a plain line for each logged step. Use it in a `with` block.

    Args:
        total: steps of the schedule.
        start: completed steps at the beginning.
        end: the step at which this run ends.
        marks: the restarts.
        more: words to put behind the figures of a step.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        start: int,
        end: int,
        marks: Sequence[int],
        more: Callable[[], str] = lambda: "",
    ) -> None:
        self.console = console
        self._more = more
        self._total, self._end, self._marks = total, end, tuple(marks)
        self._step, self._seconds, self._timed = start, 0.0, 0
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> ProgressLine:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, step: int, loss: float, lr: float, speed: float, seconds: float, *, logged: bool) -> None:
        """A completed step; `seconds` is its duration, `speed` in tokens a second."""
        self._step = step
        self._seconds += seconds
        self._timed += 1
        if self._live is None and not logged:
            return
        left = clock(self._seconds / self._timed * (self._end - step))
        done = sum(mark <= step for mark in self._marks)
        restarts = f"  restarts {done}/{len(self._marks)}" if self._marks else ""
        figures = (
            f"step {step}/{self._total}  loss {loss:.4f}  lr {lr:.2e}  {speed:,.0f} tokens/s  {left} left{restarts}"
            f"  {self._more()}"
        ).rstrip()
        if self._live is None:
            self._print(figures)
        else:
            line = f"{bar(step, self._total, self._marks)} {figures}"
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))

    def event(self, record: dict[str, Any]) -> None:
        """Something worth a line of its own."""
        kind, step = record["event"], record["step"]
        if kind == "eval":
            label = "merged model, validation" if record.get("merged") else "validation"
            if "scores" in record:
                label = (
                    "scores"
                    if not record.get("final")
                    else "final scores, merged"
                    if record.get("merged")
                    else "final scores"
                )
            self._print(f"step {step}  {label}: {_figures(record)}")
        elif kind in ("restart", "switch", "stop", "resume"):
            rest = {key: value for key, value in record.items() if key not in ("event", "step", "time")}
            details = "  ".join(f"{key} {value}" for key, value in rest.items())
            self._print(f"step {step}  {kind}  {details}".rstrip())

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _figures(record: dict[str, Any]) -> str:
    """The figures of an evaluation: a task's scores by split, or those of a text."""
    if "scores" in record:
        splits = record["scores"].items()
        return "   ".join(f"{s}: " + "  ".join(f"{name} {value:.4g}" for name, value in v.items()) for s, v in splits)
    return (
        f"loss {record['loss']:.4f}  perplexity {record['perplexity']:.2f}  "
        f"{record['bits_per_byte']:.4f} bits/byte  ({record['tokens']:,} tokens)"
    )
