"""What each phase of a run holds, counted before it is paid, and the peak that was measured."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any, cast

import torch
from rich.table import Table
from torch import nn

from trimtab.bench.meters import own_peak_resident
from trimtab.config import OptimConfig
from trimtab.methods.base import GROUPS, Adapter, Method
from trimtab.methods.registry import attach
from trimtab.models.quantize import quantize
from trimtab.nn.nf4layer import NF4Linear
from trimtab.nn.weights import Holder, shape_of


def phase_row(adapter: Adapter, optim: OptimConfig, phase: str, from_step: int) -> dict[str, Any]:
    """Parameters and bytes of the phase in which `adapter` is now.

    A parameter in 4 bits counts as one. Weights are counted as they are stored (tied ones once, buffers included),
    gradients in the dtype of what trains, optimizer state by `optimizer_bytes`; the carry lies in host memory.
    """
    model = adapter.model
    parameters = list(model.parameters())
    held = {id(t): t for t in (*parameters, *model.buffers())}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    trainable = adapter.trainable()
    aside = [tensor for name, tensor in adapter.state_dict().tensors.items() if name not in names]
    return {
        "phase": phase,
        "from_step": from_step,
        "total": sum(p.numel() for p in parameters) + sum(_packed_away(module) for module in model.modules()),
        "trainable": sum(entry.parameter.numel() for entry in trainable),
        "groups": {
            group: sum(entry.parameter.numel() for entry in trainable if entry.group == group) for group in GROUPS
        },
        "memory": {
            "weights": sum(t.numel() * t.element_size() for t in held.values()),
            "carry_host": sum(t.numel() * t.element_size() for t in aside),
            "gradients": sum(e.parameter.numel() * e.parameter.element_size() for e in trainable),
            "optimizer": sum(optimizer_bytes(optim.name, e.parameter) for e in trainable),
        },
    }


def _packed_away(module: nn.Module) -> int:
    """How many more parameters a quantised layer stands for than its packed weight has entries."""
    held = getattr(module, "holder", None)
    if not (isinstance(held, Holder) and held.quantized):
        return 0
    return math.prod(shape_of(module)) - cast(nn.Parameter, module.weight).numel()


def optimizer_bytes(name: str, parameter: torch.Tensor) -> int:
    """Bytes of one parameter's optimizer state.

    AdamW: two moments in the parameter's dtype. 8-bit AdamW: two codes a value and one fp32 maximum for each
    block of 256, twice; below 4,096 values bitsandbytes keeps both moments in fp32.
    """
    n = parameter.numel()
    if name == "adamw":
        return 2 * n * parameter.element_size()
    return 2 * n * 4 if n < 4096 else 2 * n + 2 * 4 * math.ceil(n / 256)


def predict_phases(
    model: nn.Module, method: Method, optim: OptimConfig, *, dtype: torch.dtype, pure: bool
) -> list[dict[str, Any]]:
    """The rows of all phases of a run, from a shadow of `model` on the meta device, which holds no memory.

    `model` is a transformers model before anything is attached to it, quantised or not; it is not touched.
    """
    with torch.device("meta"):
        shadow = type(model)(copy.deepcopy(model.config))
    if hasattr(shadow, "tie_weights"):
        cast(Any, shadow).tie_weights()
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
    for name, parameter in shadow.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    if packed:
        quantize(shadow, double=packed[0].doubly)
    adapter = attach(shadow, method, dtype=dtype, pure=pure)
    switch = method.switch_step
    if not switch:
        return [phase_row(adapter, optim, "training", 0)]
    rows = [phase_row(adapter, optim, "warm start", 0)]
    adapter.after_step(switch, torch.optim.SGD(adapter.parameter_groups(lr=1.0)))
    return [*rows, phase_row(adapter, optim, "adapter", switch)]


def measured_peak(device: torch.device) -> dict[str, int]:
    """The highest resident memory of this process so far, and on a GPU the highest allocated; in bytes."""
    if sys.platform == "win32":
        return {}
    peak = {"peak_resident": own_peak_resident()}
    if device.type == "cuda":
        peak["peak_device"] = torch.cuda.max_memory_allocated(device)
    return peak


def phase_table(phases: list[dict[str, Any]]) -> Table:
    """Parameters and memory of each phase, a column each; what no phase has is left out."""
    table = Table(title="Parameters and memory", title_justify="left")
    table.add_column("")
    for row in phases:
        table.add_column(f"{row['phase']} (from step {row['from_step']})", justify="right")
    for key in ("total", "trainable"):
        table.add_row(f"{key} parameters", *(f"{row[key]:,}" for row in phases))
    for group in phases[0]["groups"]:
        if any(row["groups"][group] for row in phases):
            table.add_row(f"  {group}", *(f"{row['groups'][group]:,}" for row in phases))
    labels = {
        "weights": "weights", "gradients": "gradients", "optimizer": "optimizer state", "carry_host": "carry (host)",
    }  # fmt: skip
    for key, label in labels.items():
        if any(row["memory"][key] for row in phases):
            table.add_row(label, *(size_text(row["memory"][key]) for row in phases))
    table.add_row("together (no activations)", *(size_text(sum(row["memory"].values())) for row in phases))
    return table


def size_text(count: int) -> str:
    """Bytes in binary units."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
