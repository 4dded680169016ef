"""Trimtab: train large Transformers through small updates.

The names below are imported when they are first used: `trimtab --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.errors import (
        CannotDetach,
        CannotMerge,
        CannotSave,
        CheckpointError,
        ConfigError,
        DataError,
        NonFiniteError,
        TargetError,
        TrimtabError,
    )
    from trimtab.methods import (
        IA3,
        READ,
        AdaLoRA,
        Adapter,
        BitFit,
        Bottleneck,
        Full,
        Ladder,
        LoRA,
        Method,
        PrefixTuning,
        PromptTuning,
        ReLoRA,
        StepReport,
        VeRA,
        activate,
        adapters,
        attach,
        combine,
        load_adapter,
    )
    from trimtab.models.quantize import dequantize, quantize
    from trimtab.models.quantized import load_quantized, save_quantized
    from trimtab.nn.loss import linear_cross_entropy
    from trimtab.nn.recompute import recomputing
    from trimtab.nn.tied import untie
    from trimtab.optim.schedule import Schedule
    from trimtab.train.hidden import HiddenCache

__version__ = "0.1.0"

__all__ = [
    "IA3",
    "READ",
    "AdaLoRA",
    "Adapter",
    "BitFit",
    "Bottleneck",
    "CannotDetach",
    "CannotMerge",
    "CannotSave",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Full",
    "HiddenCache",
    "Ladder",
    "LoRA",
    "Method",
    "NonFiniteError",
    "PrefixTuning",
    "PromptTuning",
    "ReLoRA",
    "Schedule",
    "StepReport",
    "TargetError",
    "TrimtabError",
    "VeRA",
    "activate",
    "adapters",
    "attach",
    "combine",
    "dequantize",
    "linear_cross_entropy",
    "load_adapter",
    "load_quantized",
    "quantize",
    "recomputing",
    "save_quantized",
    "untie",
]

_HOMES = {
    "trimtab.methods": (
        "IA3",
        "AdaLoRA",
        "Adapter",
        "BitFit",
        "Bottleneck",
        "Full",
        "Ladder",
        "LoRA",
        "Method",
        "PrefixTuning",
        "PromptTuning",
        "READ",
        "ReLoRA",
        "StepReport",
        "VeRA",
        "activate",
        "adapters",
        "attach",
        "combine",
        "load_adapter",
    ),
    "trimtab.models.quantize": ("dequantize", "quantize"),
    "trimtab.models.quantized": ("load_quantized", "save_quantized"),
    "trimtab.nn.loss": ("linear_cross_entropy",),
    "trimtab.nn.recompute": ("recomputing",),
    "trimtab.nn.tied": ("untie",),
    "trimtab.optim.schedule": ("Schedule",),
    "trimtab.train.hidden": ("HiddenCache",),
}
#: Where each public name lives; what is not listed is an error class.
_HOME = dict.fromkeys(__all__, "trimtab.errors") | {n: home for home, names in _HOMES.items() for n in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
