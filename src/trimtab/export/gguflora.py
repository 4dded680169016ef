"""A LoRA folder in PEFT's layout as a GGUF adapter for llama.cpp.

llama.cpp adds (alpha / r) B A to a weight, with one alpha for the file and r the columns of each B. Where a layer's
scale is another one (rank-stabilised LoRA with several ranks, an alpha of its own), the rest of it goes into B.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import CheckpointError, ConfigError
from trimtab.export.checkpoint import INDEX, SINGLE, mapped_model, meta_model, open_checkpoint, open_config, ties
from trimtab.export.gguffile import FILE_TYPES, refuse_used_file, write_gguf
from trimtab.export.ggufnames import Names
from trimtab.methods.folder import SAMPLE, SavedAdapter, read_adapter_folder
from trimtab.methods.registry import method_of

_WAY_OUT = "merge it with trimtab merge, and export the merged model"

#: Fields of an adapter_config.json that decide how B A is computed and are honoured, and those that decide nothing
#: once it is trained. Any other that is set is something that llama.cpp would not compute.
_HONOURED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
_IDLE = {
    "base_model_name_or_path", "task_type", "inference_mode", "init_lora_weights", "lora_dropout", "fan_in_fan_out",
    "exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping", "peft_version", "revision",
    "megatron_core", "loftq_config", "qalora_group_size", "eva_config", "corda_config", "lora_ga_config",
    "arrow_config", "ensure_weight_tying", "runtime_config",
}  # fmt: skip


def export_lora(source: Path, out: Path, base: str | None = None, dtype: torch.dtype = torch.float32) -> int:
    """Write an adapter for llama.cpp.

    Args:
        source: an adapter folder.
        out: the new file.
        base: the model that the adapter is of, a folder or a hub name; its config is read, and of a folder with
            weights a sample that tells whether it is the adapter's. None takes the one that the adapter names.
        dtype: of A and B: fp32, fp16 or bf16.

    Returns:
        The number of adapted weights.

    Raises:
        ConfigError: the base is not known, or `out` is in use.
        CheckpointError: the adapter is damaged, of another base, or does what llama.cpp cannot.
    """
    refuse_used_file(out)
    folder = read_adapter_folder(source)
    saved, tensors = folder.config, folder.tensors
    _check(folder, source)
    base = base or saved.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{source} does not name the model that it adapts; name it with --base")
    place = open_config(base)
    model = meta_model(place, base)
    _check_base(folder, place, model, source)
    names = Names(model.config, base)
    pairs = _pairs(tensors, model, source)
    alpha = float(saved["lora_alpha"]) * (math.sqrt(saved["r"]) if saved.get("use_rslora") else 1.0)
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    values: dict[str, Tensor] = {}
    for layer, (a, b) in pairs.items():
        theirs = names.of(f"{layer}.weight")
        if theirs is None:
            raise CheckpointError(f"{source}: {layer} has no place in llama.cpp's {names.family.arch}; {_WAY_OUT}")
        rest = _scale(saved, layer, a.shape[0]) / (alpha / a.shape[0])
        turned = names.rows(f"{layer}.weight", b)
        values[f"{theirs}.lora_a"] = a
        values[f"{theirs}.lora_b"] = turned if math.isclose(rest, 1.0, rel_tol=1e-12) else turned.double() * rest
    kinds = {name: (dtype, tuple(value.shape)) for name, value in values.items()}

    def describe(writer: Any) -> None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_name(source.resolve().name)
        writer.add_file_type(FILE_TYPES[dtype])

    write_gguf(out, names.family.arch, describe, kinds, values.__getitem__)
    return len(pairs)


def _check_base(folder: SavedAdapter, place: Path, model: nn.Module, source: Path) -> None:
    """Compare the sample that the adapter carries with the base's weights, where they lie beside its config."""
    here = any((place / name).is_file() for name in (SINGLE, INDEX))
    if here and SAMPLE in folder.extra and getattr(model.config, "quantization_config", None) is None:
        folder.check_base(mapped_model(open_checkpoint(str(place))), str(source))


def _check(folder: SavedAdapter, source: Path) -> None:
    """Refuse what llama.cpp does not compute."""
    saved = folder.config
    if saved.get("peft_type") != "LORA":
        method = None
        with contextlib.suppress(CheckpointError):  # what else is wrong with it would only distract
            method = method_of(folder)
        if method is not None and method.no_merge:
            raise CheckpointError(
                f"{source} cannot be used in llama.cpp, whose adapters are LoRA alone: {method.no_merge}; use it "
                "through trimtab.load_adapter"
            )
        raise CheckpointError(
            f"{source} is an adapter of the kind {saved.get('peft_type')!r}; llama.cpp knows LoRA alone: {_WAY_OUT}, "
            "or turn the update into a LoRA with --delta-rank"
        )
    for key in ("r", "lora_alpha"):
        if isinstance(saved.get(key), bool) or not isinstance(saved.get(key), int | float) or not saved[key] > 0:
            raise CheckpointError(f"{source}: {key} = {saved.get(key)!r} in its config is no number above 0")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = saved.get(key) or {}
        if not isinstance(pattern, dict) or not all(isinstance(v, int | float) and v > 0 for v in pattern.values()):
            raise CheckpointError(f"{source}: {key} = {pattern!r} in its config is no table of numbers above 0")
        for expression in pattern:
            try:
                re.compile(expression)
            except re.error as error:
                raise CheckpointError(f"{source}: {key}: {expression!r} is no regular expression: {error}") from None
    for key, value in saved.items():
        if value and key not in _HONOURED | _IDLE and not (key == "bias" and value == "none"):
            raise CheckpointError(f"{source}: {key} = {value!r} is nothing that llama.cpp's adapters have; {_WAY_OUT}")
    for name in folder.tensors:
        if not re.search(r"\.lora_[AB]\.weight$", name):
            raise CheckpointError(f"{source} holds {name}, for which llama.cpp's adapters have no place; {_WAY_OUT}")


def _pairs(tensors: Mapping[str, Tensor], model: nn.Module, source: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer, in the model's order."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    tied = {name for group in ties(model) for name in group}
    modules = dict(model.named_modules())
    layers = {name.rpartition(".lora_")[0] for name in tensors}
    for layer in [*(name for name in modules if name in layers), *sorted(layers - set(modules))]:
        a, b = (tensors.get(f"{layer}.lora_{part}.weight") for part in "AB")
        if a is None or b is None:
            raise CheckpointError(f"{source} has only one of lora_A and lora_B of {layer}; it is damaged")
        weight = getattr(modules.get(layer), "weight", None)
        if not isinstance(weight, Tensor):
            raise CheckpointError(f"{source} is of another base: the model has no layer {layer}")
        if f"{layer}.weight" in tied:
            raise CheckpointError(f"{source} adapts {layer}, which is tied and not in a GGUF file; {_WAY_OUT}")
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or weight.shape != (b.shape[0], a.shape[1]):
            raise CheckpointError(
                f"{source} is of another base: {layer} is {tuple(weight.shape)} in the model, A is {tuple(a.shape)} "
                f"and B is {tuple(b.shape)}"
            )
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise CheckpointError(f"{source}: A or B of {layer} is not finite")
        found[layer] = (a, b)
    if not found:
        raise CheckpointError(f"{source} adapts no layer")
    return found


def _scale(saved: Mapping[str, Any], layer: str, rank: int) -> float:
    """The factor of B A in a layer, as PEFT computes it."""
    alpha = next(
        (
            value
            for key, value in (saved.get("alpha_pattern") or {}).items()
            if re.fullmatch(rf"(.*\.)?({key})", layer) or layer == key
        ),
        saved["lora_alpha"],
    )
    return float(alpha) / (math.sqrt(rank) if saved.get("use_rslora") else rank)
