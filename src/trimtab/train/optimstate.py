"""Optimizer state by parameter name, as tensors and plain JSON values.

`torch.optim.Optimizer.state_dict` numbers the parameters, so a state of it fits only an optimizer with
the same parameters in the same order, and its pickled form must be trusted. Here each value is filed
under the name of its parameter (the groups' `names`), with its own dtype; a parameter without state
stays without. A tensor that several parameters share (the code maps of bitsandbytes' 8-bit
optimizers) is stored once, and shared again after loading.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trimtab.errors import CheckpointError

#: Keys of a group that are not hyperparameters of the method: what the group holds, the rate (the schedule's), and
#: how torch runs the step (which may differ on another machine).
_NOT_STORED = {"params", "names", "group", "lr", "initial_lr", "foreach", "fused", "capturable", "differentiable"}

#: The moments of bitsandbytes' optimizers, which paged ones hold in memory of a special kind.
_PAGED = ("state1", "state2")


def encode(value: Any) -> Any:
    """A Python scalar, string, list or tuple as JSON that `decode` turns back into the same type and value."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    raise CheckpointError(f"the optimizer holds a {type(value).__name__}, which a checkpoint cannot store")


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, dict):
        if "float" in value:
            return float(value["float"])
        return tuple(decode(item) for item in value["tuple"])
    return [decode(item) for item in value] if isinstance(value, list) else value


def named_parameters(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's parameters by name.

    Raises:
        CheckpointError: a group has no `names`, or not one for each parameter, or a name comes twice.
    """
    found: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        given = group.get("names", [])
        if len(given) != len(group["params"]):
            raise CheckpointError(
                f"an optimizer group has {len(group['params'])} parameters and {len(given)} names; "
                "build the optimizer from adapter.parameter_groups"
            )
        for name, parameter in zip(given, group["params"], strict=True):
            if name in found:
                raise CheckpointError(f"the optimizer holds the name {name} twice")
            found[name] = parameter
    return found


def pack(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as (tensors by key, JSON values).

    The JSON part is `{"groups": [{"group", "names", "settings"}], "state": {parameter: {key: value}}}`, in
    which a tensor is `{"tensor": key}`; the tensors are the optimizer's own, not copies.
    """
    tensors: dict[str, Tensor] = {}
    keys: dict[tuple[Any, ...], str] = {}
    state: dict[str, dict[str, Any]] = {}
    for name, parameter in named_parameters(optimizer).items():
        if parameter not in optimizer.state or not optimizer.state[parameter]:
            continue
        entry: dict[str, Any] = {}
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                identity = (value.data_ptr() if value.numel() else id(value), value.dtype, value.shape, value.stride())
                file_key = keys.setdefault(identity, f"{name}/{key}")
                tensors[file_key] = value
                entry[key] = {"tensor": file_key}
            else:
                entry[key] = encode(value)
        state[name] = entry
    groups = [
        {
            "group": group.get("group"),
            "names": list(group.get("names", [])),
            "settings": {key: encode(value) for key, value in group.items() if key not in _NOT_STORED},
        }
        for group in optimizer.param_groups
    ]
    return tensors, {"groups": groups, "state": state}


def unpack(optimizer: Optimizer, tensors: Mapping[str, Tensor], packed: Mapping[str, Any]) -> None:
    """Give a fresh optimizer over the same named parameters the state that `pack` took.

    Raises:
        CheckpointError: the groups or the names in them differ from those of the state, or a tensor of it
            is missing.
    """
    parameters = named_parameters(optimizer)
    stored_groups = packed["groups"]
    here = [(group.get("group"), list(group["names"])) for group in optimizer.param_groups]
    there = [(group["group"], group["names"]) for group in stored_groups]
    if here != there:
        ours, theirs = {n for _, names in here for n in names}, {n for _, names in there for n in names}
        differing = sorted(ours ^ theirs)
        what = (
            f"only one of them has {', '.join(differing[:3])}" if differing else "they are grouped or ordered otherwise"
        )
        raise CheckpointError(f"the checkpoint's optimizer trains other parameters than this run: {what}")
    placed: dict[tuple[str, torch.device], Tensor] = {}
    fresh: dict[Tensor, dict[str, Any]] = {}
    paged = bool(getattr(optimizer, "is_paged", False))
    for group, stored in zip(optimizer.param_groups, stored_groups, strict=True):
        group.update({key: decode(value) for key, value in stored["settings"].items()})
        for name in stored["names"]:
            if name not in packed["state"]:
                continue
            parameter = parameters[name]
            entry: dict[str, Any] = {}
            for key, value in packed["state"][name].items():
                if isinstance(value, dict) and "tensor" in value and key in _PAGED and paged:
                    entry[key] = _page(optimizer, parameter, value["tensor"], tensors)
                elif isinstance(value, dict) and "tensor" in value:
                    entry[key] = _place(value["tensor"], _device(key, group, parameter), tensors, placed)
                else:
                    entry[key] = decode(value)
            fresh[parameter] = entry
    optimizer.state.clear()
    optimizer.state.update(fresh)


def _device(key: str, group: Mapping[str, Any], parameter: Tensor) -> torch.device:
    """Where torch keeps this value: its counters stay on the host unless the step runs fused or captured."""
    if key == "step" and not (group.get("fused") or group.get("capturable")):
        return torch.device("cpu")
    return parameter.device


def _page(optimizer: Any, parameter: Tensor, key: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The stored moment in memory that the optimizer pages, as its own first step would have taken it."""
    if key not in tensors:
        raise CheckpointError(f"the checkpoint's optimizer state lacks the tensor {key}")
    buffer: Tensor = optimizer.get_state_buffer(parameter, dtype=tensors[key].dtype)
    return buffer.copy_(tensors[key])


def _place(
    key: str, device: torch.device, tensors: Mapping[str, Tensor], placed: dict[tuple[str, torch.device], Tensor]
) -> Tensor:
    """The stored tensor on `device`, one object for all who share it."""
    if key not in tensors:
        raise CheckpointError(f"the checkpoint's optimizer state lacks the tensor {key}")
    if (key, device) not in placed:
        placed[key, device] = tensors[key].to(device, copy=True)
    return placed[key, device]


def dump(value: Mapping[str, Any]) -> str:
    """JSON in one canonical form (sorted keys, no spaces, no NaN)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
