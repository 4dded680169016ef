"""Trimtab: train large Transformers through small updates."""

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
from trimtab.methods import Adapter, Full, LoRA, Method, ReLoRA, StepReport, attach, load_adapter
from trimtab.optim.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "CannotDetach",
    "CannotMerge",
    "CannotSave",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Full",
    "LoRA",
    "Method",
    "NonFiniteError",
    "ReLoRA",
    "Schedule",
    "StepReport",
    "TargetError",
    "TrimtabError",
    "attach",
    "load_adapter",
]
