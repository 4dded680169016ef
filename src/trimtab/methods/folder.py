"""Adapter folders in PEFT's layout: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

#: What PEFT puts before the model's own names in an adapter file.
PREFIX = "base_model.model."


def read_adapter_folder(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter folder, the tensors under the model's own names.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    config_file, tensor_file = path / CONFIG_FILE, path / TENSOR_FILE
    for file in (config_file, tensor_file):
        if not file.is_file():
            raise CheckpointError(f"{path} is no adapter folder: {file.name} is missing")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{config_file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_file} is not a JSON object")
    try:
        tensors = load_file(tensor_file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{tensor_file} is damaged: {error}") from None
    return config, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def write_adapter_folder(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter folder; `tensors` come under the model's own names.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        contiguous = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path / TENSOR_FILE, metadata={"format": "pt"})
        (path / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the adapter cannot be written to {path}: {error}") from None
