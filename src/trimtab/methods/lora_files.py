"""LoRA in PEFT's files: which settings a config gives, what a file's tensors say, and what `save` writes.

Not every setting of PEFT's LoraConfig has a form here; those that change what an adapter computes are refused by
name, and so is whatever field a newer PEFT may add.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.errors import CannotSave, CheckpointError
from trimtab.methods.folder import SavedAdapter, endings_pattern, refuse_unknown, saved_targets
from trimtab.methods.lora_checks import pattern_of
from trimtab.nn.initial import stacked
from trimtab.nn.inject import ALL_LINEAR, name_ends
from trimtab.nn.tied import owners_of
from trimtab.nn.weights import is_conv1d

if TYPE_CHECKING:
    from trimtab.methods.lora import LoRA, LoRAAdapter

#: Endings of PEFT's names, and what ours have instead.
SUFFIXES = {".lora_A.weight": ".lora_A", ".lora_B.weight": ".lora_B", ".base_layer.bias": ".bias"}

#: Of an embedding PEFT writes the frozen table, too.
TABLE = ".base_layer.weight"

#: Fields of LoraConfig that are read here, and those that do not change what an adapter computes.
_READ = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "fan_in_fan_out",
}  # fmt: skip
_NO_EFFECT = {"megatron_core", "qalora_group_size", "eva_config", "runtime_config"}

#: Fields of LoraConfig that change what an adapter computes, and have no form here.
_UNSUPPORTED = (
    "layer_replication", "target_parameters", "lora_bias", "trainable_token_indices", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "arrow_config", "velora_config", "monteclora_config", "kasa_config",
    "megatron_config", "ensure_weight_tying",
)  # fmt: skip

#: Initialisations that leave the base alone, so that A and B say everything.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def settings_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `LoRA` that a PEFT config stands for.

    Raises:
        CheckpointError: a field is missing, is not what it should be, or has no form here.
    """
    for key in _UNSUPPORTED:
        if saved.get(key):
            raise CheckpointError(f"the adapter's {key} = {saved[key]!r} is not supported")
    refuse_unknown(dict(saved), _READ | _NO_EFFECT | set(_UNSUPPORTED))
    for key in ("r", "lora_alpha"):
        if key not in saved:
            raise CheckpointError(f"the adapter's config lacks {key}")
    init = saved.get("init_lora_weights", True)
    if init not in _PLAIN_INITS and init != "pissa":
        raise CheckpointError(
            f"the adapter's init_lora_weights = {init!r} replaced the base weights by others, which the file does not "
            "hold; save it with PEFT's path_initial_model_for_weight_conversion, as a plain LoRA"
        )
    targets, exclude = _without_excluded(saved_targets(saved), saved.get("exclude_modules") or [])
    return {
        "rank": saved["r"],
        "alpha": _size("lora_alpha", saved["lora_alpha"]),
        "dropout": saved.get("lora_dropout", 0.0),
        "rslora": saved.get("use_rslora", False),
        "dora": saved.get("use_dora", False),
        "init": "pissa" if init == "pissa" else "kaiming",
        "bias": saved.get("bias", "none"),
        "rank_pattern": saved.get("rank_pattern") or {},
        "alpha_pattern": _sizes(saved.get("alpha_pattern") or {}),
        "targets": targets,
        "exclude": exclude,
    }


def _size(field: str, alpha: Any) -> Any:
    """The size of an alpha; its sign goes into B, see `with_signs`."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise CheckpointError(f"the adapter's {field} = {alpha!r} is no number")
    if not alpha or not math.isfinite(alpha):
        raise CheckpointError(f"the adapter's {field} = {alpha!r} gives no update that could be read or trained")
    return abs(alpha)


def _sizes(patterns: Any) -> Any:
    if not isinstance(patterns, dict):
        return patterns  # refused by its own name later
    return {pattern: _size(f"alpha_pattern[{pattern!r}]", alpha) for pattern, alpha in patterns.items()}


def _without_excluded(targets: str | tuple[str, ...], excluded: Any) -> tuple[str | tuple[str, ...], tuple[str, ...]]:
    """Our `targets` and `exclude`: PEFT has regular expressions and idle entries there, and ours may hold neither."""
    if not excluded:
        return targets, ()
    if isinstance(excluded, list) and targets == ALL_LINEAR:
        return targets, tuple(str(name) for name in excluded)
    if not isinstance(excluded, list | str) or targets == ALL_LINEAR:
        raise CheckpointError(
            f"the adapter's exclude_modules = {excluded!r} is not supported; a list is, and with a list of "
            "target_modules a regular expression"
        )
    without = excluded if isinstance(excluded, str) else endings_pattern(map(str, excluded))
    wanted = targets if isinstance(targets, str) else endings_pattern(targets)
    for field, part in (("exclude_modules", without), ("target_modules", wanted)):
        try:
            re.compile(f"(?:{part})")
        except re.error as error:
            raise CheckpointError(f"the adapter's {field} = {part!r} is no regular expression: {error}") from None
    return rf"(?!(?:{without})\Z)(?:{wanted})", ()


def settings_from_tensors(saved: SavedAdapter, config: LoRA) -> dict[str, Any]:
    """Settings of `LoRA` that the config alone does not decide: PEFT allows entries that match nothing in a model."""
    found: dict[str, Any] = {"untie": bool(saved.extra.get("untie", False))}
    ending = ".base_layer.bias" if saved.config.get("bias") == "lora_only" else ".bias"
    if not any(name.endswith(ending) for name in saved.tensors):
        found["bias"] = "none"
    layers = list(dict.fromkeys(owner for name in saved.tensors if (owner := _owner_of_b(name))))
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key)
        used = {pattern_of(patterns, layer) for layer in layers}
        found[key] = {pattern: value for pattern, value in patterns.items() if pattern in used}
    targets = config.targets
    if not isinstance(targets, str) and not all(any(name_ends(n, end) for n in layers) for end in targets):
        found["targets"] = endings_pattern(targets)
    return found


def _owner_of_b(name: str) -> str:
    """The layer whose B is stored under this name; empty for other tensors."""
    return next((name.removesuffix(end) for end in (".lora_B.weight", ".lora_embedding_B") if name.endswith(end)), "")


def with_signs(saved: SavedAdapter) -> SavedAdapter:
    """The adapter with alphas above 0: where PEFT's is negative, B is stored with the other sign."""
    patterns, alpha = saved.config.get("alpha_pattern") or {}, saved.config["lora_alpha"]
    tensors = dict(saved.tensors)
    for name, tensor in saved.tensors.items():
        if (layer := _owner_of_b(name)) and patterns.get(pattern_of(patterns, layer), alpha) < 0:
            tensors[name] = -tensor
    return SavedAdapter(saved.config, tensors, saved.extra)


def without_base(saved: SavedAdapter, model: nn.Module) -> SavedAdapter:
    """The adapter without the copies of frozen tables that PEFT puts beside an adapted embedding.

    Raises:
        CheckpointError: such a table is not the model's.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tables = {name: tensor for name, tensor in saved.tensors.items() if name.endswith(TABLE)}
    for name, tensor in tables.items():
        own = parameters.get(f"{name.removesuffix(TABLE)}.weight")
        if own is None or own.shape != tensor.shape or not _alike(own, tensor):
            raise CheckpointError(
                f"the adapter is of another base: it brings {name}, which is not the model's; load that table into the "
                "model first"
            )
    return SavedAdapter(saved.config, {n: t for n, t in saved.tensors.items() if n not in tables}, saved.extra)


def _alike(own: Tensor, stored: Tensor) -> bool:
    """Whether two tables are the same up to the rounding of the coarser dtype."""
    if own.device.type == "meta":
        return True
    coarse = min((own.dtype, stored.dtype), key=lambda dtype: torch.finfo(dtype).bits)
    return bool(torch.equal(own.detach().to(coarse).cpu(), stored.to(coarse).cpu()))


def saved_adapter(adapter: LoRAAdapter) -> SavedAdapter:
    """What `save` writes.

    PiSSA is written as a plain LoRA of twice the rank on the base as the model came: with A0 and B0 taken out of
    W, what was learned is s (B A - B0 A0) = s [B, -B0] [A; A0].

    Raises:
        CannotSave: a weight that several modules share was trained.
    """
    config, names = adapter.config, list(adapter._targets)
    own: dict[str, Tensor] = {name: parameter.detach() for name, parameter in adapter.own().items()}
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    if adapter.start:
        ranks, alphas = {}, {}
        for name, (a0, b0) in adapter.start.items():
            a, b = own[f"{name}.lora_A"].cpu(), own[f"{name}.lora_B"].cpu()
            a, b = stacked([(1.0, a, b), (-1.0, a0, b0)])
            own |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
            exactly = f"^{re.escape(name)}"
            ranks[exactly] = len(a)
            alphas[exactly] = config.scale_of(name) * (math.sqrt(len(a)) if config.rslora else len(a))
    full, modules = _in_full(adapter)
    described = {
        **adapter._peft_config("LORA"),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": names,
        "modules_to_save": modules or None,
        "fan_in_fan_out": any(is_conv1d(module) for module in adapter._targets.values()),
        "bias": config.bias,
        "init_lora_weights": True,
    }
    factors = {f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name: t for name, t in own.items()}
    extra = adapter._extra(untie=True) if config.untie else adapter._extra()
    return SavedAdapter(described, factors | full, extra)


def _in_full(adapter: LoRAAdapter) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that train in full, as PEFT names them, and its modules_to_save."""
    full, _ = adapter._saved_in_full()
    for name in full:
        shared = owners_of(adapter.model, adapter._residence.parameters[name])
        if len(shared) > 1:
            raise CannotSave(
                f"{' = '.join(shared)} is one weight and was trained, and an adapter's file would part its users: "
                "call merge() and model.save_pretrained() instead, or attach with untie=True"
            )
    beside = {name for name, roles in adapter._roles.items() if roles & adapter.config.trained_roles}
    named, modules = {}, []
    for name, tensor in full.items():
        owner, _, leaf = name.rpartition(".")
        if name in adapter._biases() and name not in beside:
            named[f"{owner}.base_layer.{leaf}" if owner in adapter._targets else name] = tensor
        else:
            named[name] = tensor
            modules.append(owner)
    return named, list(dict.fromkeys(modules))
