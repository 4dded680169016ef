"""Energy of a piece of training on a GPU, from the board's own counter: measured, or not given at all."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch

#: Joules since some moment in the past.
Counter = Callable[[], float]


def energy_counter(device: torch.device | str) -> Counter | None:
    """What reads the joules that a CUDA device's board has drawn since its driver was loaded.

    NVML counts them itself (`nvmlDeviceGetTotalEnergyConsumption`), so nothing is sampled; the counter is of the whole
    board, whoever uses it.

    Args:
        device: on which the work runs.

    Returns:
        None where there is no such reading: another kind of device, no `pynvml` (the package nvidia-ml-py), no driver,
        or a board or a part of one (MIG) that does not count.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        # By its unique name: CUDA_VISIBLE_DEVICES renumbers what torch sees, and not what NVML sees.
        board = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(board)
    except nvml.NVMLError:
        return None

    def read() -> float:
        torch.cuda.synchronize(device)
        millijoules: int = nvml.nvmlDeviceGetTotalEnergyConsumption(board)
        return millijoules / 1000

    return read


def joules(
    function: Callable[[], object],
    counter: Counter,
    seconds: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Joules of one call of `function`: the mean over calls that together take at least `seconds`.

    The counter moves some ten times a second, so one short call would show nothing. What the board draws while idle
    is part of it.

    Args:
        function: called once before the count, and then again and again.
        counter: of `energy_counter`.
        seconds: how long to go on.
        clock: seconds; a test hands in its own.
    """
    function()
    begin, before, calls = clock(), counter(), 0
    while not calls or clock() - begin < seconds:
        function()
        calls += 1
    return (counter() - before) / calls
