"""The methods. Importing this package fills the registry; adding a method is adding a file and a line."""

from __future__ import annotations

from trimtab.methods.attached import activate, adapters
from trimtab.methods.base import GROUPS, Adapter, AdapterState, Method, StepReport, Trainable
from trimtab.methods.full import Full
from trimtab.methods.lora import LoRA
from trimtab.methods.registry import MethodField, attach, load_adapter, parse_method, registry
from trimtab.methods.relora import ReLoRA

__all__ = [
    "GROUPS",
    "Adapter",
    "AdapterState",
    "Full",
    "LoRA",
    "Method",
    "MethodField",
    "ReLoRA",
    "StepReport",
    "Trainable",
    "activate",
    "adapters",
    "attach",
    "load_adapter",
    "parse_method",
    "registry",
]
