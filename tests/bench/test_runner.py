"""Interleaved timing, with a clock that only the programs move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trimtab.bench.runner import circumstances, interleave, markdown_table


class Machine:
    """A clock, and programs that each move it by their next duration."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def program(self, name: str, durations: list[float]) -> Callable[[], None]:
        steps = iter(durations)

        def run() -> None:
            self.order.append(name)
            self.now += next(steps)

        return run


def test_programs_run_interleaved_and_the_warm_up_does_not_count() -> None:
    """A B, A B, ...; the first round is left out of every figure."""
    machine = Machine()
    programs = {
        "a": machine.program("a", [100.0, 1.0, 2.0, 6.0]),
        "b": machine.program("b", [100.0, 2.0, 8.0, 8.0]),
    }
    timings = interleave(programs, rounds=3, warmup=1, clock=lambda: machine.now)
    assert machine.order == ["a", "b"] * 4
    assert timings.seconds == {"a": (1.0, 2.0, 6.0), "b": (2.0, 8.0, 8.0)}
    assert timings.median("a") == 2.0
    assert timings.ratio("a", "b") == 0.5  # median of 1/2, 1/4, 3/4
    assert timings.ratios() == {("a", "b"): 0.5, ("b", "a"): 2.0}
    assert timings.spread("a", "b") == (0.25, 0.75)
    assert timings.shown("a", "b") == "0.50 (0.25-0.75)"
    assert type(timings)({"a": (1.0,), "b": (2.0,)}).shown("a", "b") == "0.50"


@pytest.mark.parametrize(("programs", "rounds", "warmup"), [({}, 1, 0), ({"a": int}, 0, 0), ({"a": int}, 1, -1)])
def test_nothing_to_time_is_an_error(programs: dict[str, Callable[[], object]], rounds: int, warmup: int) -> None:
    """No program, no round, or a negative warm-up is a ValueError."""
    with pytest.raises(ValueError, match="at least"):
        interleave(programs, rounds=rounds, warmup=warmup)


def test_circumstances_name_what_a_figure_depends_on() -> None:
    """The line holds torch's version, the threads and the command."""
    line = circumstances()
    assert f"torch {torch.__version__}, {torch.get_num_threads()} threads" in line
    assert "`python " in line
    assert "\n" not in line


def test_markdown_table_is_aligned() -> None:
    """The first column is left-aligned, the others right-aligned, and all lines are of one length."""
    table = markdown_table(["row", "x"], [["a", "1.25"], ["long name", "2"]]).splitlines()
    assert table == [
        "| row       |    x |",
        "|-----------|-----:|",
        "| a         | 1.25 |",
        "| long name |    2 |",
    ]
