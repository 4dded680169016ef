"""Where each parameter of a model lives while a method is at work on it.

A trained tensor lives in fp32 and its module casts it for compute (see `precision`); a frozen one lives in
the compute dtype, and what narrowing it lost is its carry, in host memory (see `weights`). `Residence`
moves tensors between the two, in place, and at the end gives everything back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.nn.precision import hold, release
from trimtab.nn.weights import narrow_with_carry


def _fingerprint(tensor: Tensor) -> tuple[int, float] | None:
    """Two numbers that an optimizer's step changes. (Version counters do not: fused AdamW leaves them alone.)

    The exclusive-or of all bits misses equal changes in an even number of equal entries, as in a norm's
    weights of one; the sum does not, since 1 + x and 1 - x round differently.
    """
    if tensor.device.type == "meta":
        return None
    exact = tensor.detach() if tensor.device.type != "mps" else tensor.detach().cpu()  # MPS has no float64
    return int(torch.hash_tensor(exact).view(torch.int64)), float(exact.sum(dtype=torch.float64))


def _disarm_fused_encoders(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Keep torch's encoder layers from reading their sublayers' weights past the sublayers' own forward.

    In eval mode without gradients `nn.TransformerEncoderLayer` takes a fused path that would see neither an
    adapter nor a cast. Returns what to set back: module, attribute, value.
    """
    armed: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            armed.append((module, "activation_relu_or_gelu", module.activation_relu_or_gelu))
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            armed.append((module, "use_nested_tensor", module.use_nested_tensor))
            module.use_nested_tensor = False
    return armed


class Residence:
    """The dtype, the carry and the `requires_grad` of each parameter of `model`, tied ones once.

    Args:
        model: any module; its parameters' names and identities never change here.
        dtype: compute dtype, and storage dtype of what is frozen; None keeps each parameter's own.
        pure: hold trained tensors in the compute dtype as well.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, pure: bool) -> None:
        self.pure = pure
        self.parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        self._plain = {name: (p.dtype, p.requires_grad) for name, p in self.parameters.items()}
        self.compute = {name: dtype or p.dtype for name, p in self.parameters.items()}
        self.carries: dict[str, Tensor] = {}
        self._fingerprints: dict[str, tuple[int, float] | None] = {}
        self._armed = _disarm_fused_encoders(model)
        self._owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._owners.setdefault(id(parameter), []).append(module)

    def train(self, names: Iterable[str]) -> None:
        """Let these parameters train: fp32 (unless `pure`), cast by their modules."""
        for name in names:
            parameter, compute = self.parameters[name], self.compute[name]
            parameter.requires_grad_(True)
            parameter.data = parameter.data.to(compute if self.pure else torch.promote_types(compute, torch.float32))
            if not self.pure:
                for owner in self._owners[id(parameter)]:
                    hold(owner, compute)
            self._fingerprints[name] = _fingerprint(parameter)

    def freeze(self, names: Iterable[str]) -> None:
        """Freeze these parameters: gradient freed, stored in the compute dtype, the rest in a carry."""
        for name in names:
            parameter = self.parameters[name]
            parameter.requires_grad_(False)
            parameter.grad = None
            self._fingerprints.pop(name, None)
            compute = self.compute[name]
            if torch.promote_types(parameter.dtype, compute) == compute:
                parameter.data = parameter.data.to(compute)  # nothing is lost
            else:
                parameter.data, carry = narrow_with_carry(parameter.data, compute)
                if not self.pure:
                    self.carries[name] = carry
            for owner in self._owners[id(parameter)]:
                if not any(p is not None and p.requires_grad for p in owner._parameters.values()):
                    release(owner)

    def written(self) -> list[str]:
        """The trained parameters that something was written into since they began to train."""
        return [name for name, mark in self._fingerprints.items() if _fingerprint(self.parameters[name]) != mark]

    def narrowed(self) -> list[str]:
        """The frozen parameters that are stored in fewer bits than the model came with."""
        return [
            name
            for name, p in self.parameters.items()
            if name not in self._fingerprints and torch.promote_types(p.dtype, self._plain[name][0]) != p.dtype
        ]

    def settle(self) -> None:
        """Leave a plain model in the compute dtype: every parameter rounded once, no module held."""
        self._leave(self.compute)

    def restore(self) -> None:
        """Leave the model as it came, its dtypes included; exact if nothing was written or narrowed."""
        self._leave({name: dtype for name, (dtype, _) in self._plain.items()})

    def _leave(self, dtypes: dict[str, torch.dtype]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data = parameter.data.to(dtypes[name])
            parameter.grad = None
            parameter.requires_grad_(self._plain[name][1])
            for owner in self._owners[id(parameter)]:
                release(owner)
        for module, attribute, value in self._armed:
            setattr(module, attribute, value)
        self.carries.clear()
