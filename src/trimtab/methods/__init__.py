"""The methods. Importing this package fills the registry; adding a method is adding a file and a line."""

from __future__ import annotations

from trimtab.methods.adalora import AdaLoRA
from trimtab.methods.attached import activate, adapters
from trimtab.methods.base import GROUPS, Adapter, AdapterState, Method, StepReport, Trainable
from trimtab.methods.bitfit import BitFit
from trimtab.methods.bottleneck import Bottleneck
from trimtab.methods.full import Full
from trimtab.methods.ia3 import IA3
from trimtab.methods.ladder import Ladder
from trimtab.methods.lora import LoRA
from trimtab.methods.lora_combine import combine
from trimtab.methods.prefix import PrefixTuning
from trimtab.methods.prompt import PromptTuning
from trimtab.methods.read import READ
from trimtab.methods.registry import MethodField, attach, load_adapter, parse_method, registry
from trimtab.methods.relora import ReLoRA
from trimtab.methods.vera import VeRA

__all__ = [
    "GROUPS",
    "IA3",
    "READ",
    "AdaLoRA",
    "Adapter",
    "AdapterState",
    "BitFit",
    "Bottleneck",
    "Full",
    "Ladder",
    "LoRA",
    "Method",
    "MethodField",
    "PrefixTuning",
    "PromptTuning",
    "ReLoRA",
    "StepReport",
    "Trainable",
    "VeRA",
    "activate",
    "adapters",
    "attach",
    "combine",
    "load_adapter",
    "parse_method",
    "registry",
]
