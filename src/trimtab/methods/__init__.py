"""The methods. Importing this package fills the registry; adding a method is adding a file and a line."""

from __future__ import annotations

from trimtab.methods.adalora import AdaLoRA
from trimtab.methods.attached import activate, adapters
from trimtab.methods.base import GROUPS, Adapter, AdapterState, Method, StepReport, Trainable
from trimtab.methods.full import Full
from trimtab.methods.lora import LoRA
from trimtab.methods.registry import MethodField, attach, load_adapter, parse_method, registry
from trimtab.methods.relora import ReLoRA
from trimtab.methods.vera import VeRA

__all__ = [
    "GROUPS",
    "AdaLoRA",
    "Adapter",
    "AdapterState",
    "Full",
    "LoRA",
    "Method",
    "MethodField",
    "ReLoRA",
    "StepReport",
    "Trainable",
    "VeRA",
    "activate",
    "adapters",
    "attach",
    "load_adapter",
    "parse_method",
    "registry",
]
