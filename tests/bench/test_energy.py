"""Energy is read from a counter, and not given where there is none."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trimtab.bench.energy import energy_counter, joules


def test_joules_are_the_mean_over_calls() -> None:
    """The first call is not counted; then calls go on until the time is up."""
    state = {"now": 0.0, "drawn": 100.0}

    def work() -> None:
        state["now"] += 2.0
        state["drawn"] += 30.0

    assert joules(work, lambda: state["drawn"], seconds=5.0, clock=lambda: state["now"]) == 30.0
    assert state["now"] == 2.0 + 3 * 2.0
    assert joules(work, lambda: state["drawn"], seconds=0.0, clock=lambda: state["now"]) == 30.0


class Board:
    """NVML, and the one board it knows."""

    class NVMLError(Exception):
        pass

    def __init__(self, counts: bool) -> None:
        self.counts = counts
        self.millijoules = 5000

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        assert name == "GPU-1234"
        return name

    def nvmlDeviceGetTotalEnergyConsumption(self, board: str) -> int:
        assert board == "GPU-1234"
        if not self.counts:
            raise self.NVMLError("not supported")
        return self.millijoules


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, as far as torch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))


@pytest.mark.usefixtures("cuda")
def test_counter_of_a_board_gives_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML counts millijoules, of the board with torch's unique name."""
    board = Board(counts=True)
    monkeypatch.setitem(sys.modules, "pynvml", board)  # type: ignore[arg-type]
    read = energy_counter("cuda")
    assert read is not None
    assert read() == 5.0
    board.millijoules = 6500
    assert read() == 6.5


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("nvml", [Board(counts=False), None])
def test_no_reading_is_no_figure(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A board that does not count, or no NVML, is None, and no guess."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert energy_counter("cuda") is None


def test_there_is_no_counter_of_a_cpu() -> None:
    """Whatever is installed."""
    assert energy_counter("cpu") is None
