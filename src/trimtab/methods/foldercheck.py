"""What an adapter folder may say: the kinds of its config's fields, its values, and the base tensors it may replace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import CheckpointError

#: The peft_types that are read.
PEFT_TYPES = ("ADALORA", "IA3", "LORA", "PREFIX_TUNING", "PROMPT_TUNING", "VERA")

#: Heads that PEFT's wrapper of a task trains unasked, and misses in a file without them, by their last name parts.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def _is_list(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or _is_list(value)


def _is_table(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(_is_number(entry) for entry in value.values()))


def _is_kept(value: Any) -> bool:
    """AdaLoRA's rank_pattern: of each layer, which triplets were kept."""
    return value is None or (
        isinstance(value, dict)
        and all(isinstance(kept, list) and all(isinstance(k, bool) for k in kept) for kept in value.values())
    )


_KINDS: tuple[tuple[Callable[[Any], bool], str, tuple[str, ...]], ...] = (
    (_is_text, "a text", ("peft_type", "base_model_name_or_path", "task_type", "revision", "bias", "peft_version")),
    (
        _is_bool,
        "true or false",
        ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode", "save_projection", "prefix_projection"),
    ),
    (
        _is_number,
        "a number",
        (
            "r", "lora_alpha", "lora_dropout", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2",
            "orth_reg_weight", "total_step", "d_initial", "vera_dropout", "num_virtual_tokens", "projection_prng_key",
        ),
    ),
    (_is_list, "a list of names", ("modules_to_save",)),
    (
        _is_names,
        "a text or a list of names",
        ("target_modules", "feedforward_modules", "exclude_modules", "layers_pattern"),
    ),
    (_is_table, "a table of numbers", ("rank_pattern", "alpha_pattern")),
)  # fmt: skip


def check_fields(config: Mapping[str, Any]) -> None:
    """Refuse a config whose fields are not of their kind; whether a value makes sense is the method's to say.

    Raises:
        CheckpointError: names the field.
    """
    for fits, what, keys in _KINDS:
        for key in keys:
            if key == "rank_pattern" and config.get("peft_type") == "ADALORA":
                fits, what = _is_kept, "a table of lists of true and false"
            if key in config and not fits(config[key]):
                raise CheckpointError(
                    f"the adapter's {key} = {_shown(config[key])} in its config is not {what}; restore the folder as "
                    "it was saved"
                )


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that no training leaves: integers, truth values, complex numbers, infinities.

    Raises:
        CheckpointError: names the tensor.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"the adapter is damaged: {name} is {str(tensor.dtype).removeprefix('torch.')}, and its tensors are "
                "fp16, bf16, fp32 or fp64; restore the folder as it was saved"
            )
        if not finite(tensor):
            raise CheckpointError(
                f"the adapter is damaged: {name} is not finite (it has NaN or infinity); train it anew, or take an "
                "earlier copy"
            )


def finite(tensor: Tensor) -> bool:
    """Whether all entries are finite, without a copy of the tensor."""
    return tensor.numel() == 0 or all(math.isfinite(float(end)) for end in torch.aminmax(tensor.detach()))


def covers(config: Mapping[str, Any], name: str, adapted: Iterable[str]) -> bool:
    """Whether an adapter's config says that it holds a tensor of the base.

    Args:
        config: adapter_config.json.
        name: the tensor's, in the model.
        adapted: names of the adapter's own parameters.
    """
    owner, _, leaf = name.rpartition(".")
    parts = owner.split(".")
    modules = [".".join(parts[: n + 1]) for n in range(len(parts))]
    for ending in config.get("modules_to_save") or ():
        # PEFT compares plain endings. A parameter of the model itself has the empty name for its module.
        if (ending == owner == "") or (ending and any(module.endswith(ending) for module in modules)):
            return True
    if any(part in HEADS.get(config.get("task_type") or "", ()) for part in parts):
        return True
    if leaf == "bias" and config.get("bias") == "lora_only":
        return any(own.rpartition(".")[0] == owner for own in adapted)
    return leaf.endswith("bias") and config.get("bias") == "all"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
