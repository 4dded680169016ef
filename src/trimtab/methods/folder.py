"""Adapter folders in PEFT's layout: adapter_config.json and adapter_model.safetensors.

What is ours alone (a sample of the base, a seed, a checksum) lies as JSON in the tensor file's metadata, which
PEFT passes over.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.errors import CannotSave, CheckpointError, ConfigError
from trimtab.inside import inside
from trimtab.methods.foldercheck import check_fields, check_values, covers, finite
from trimtab.nn.inject import is_linear
from trimtab.nn.split import all_agree, is_first, mesh_of, whole
from trimtab.nn.weights import holder_of

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

#: What older versions of PEFT wrote instead.
PICKLE_FILE = "adapter_model.bin"

#: What PEFT puts before the model's own names in an adapter file.
PREFIX = "base_model.model."

#: The key of ours in the tensor file's metadata, and that of the base's sample in it.
OURS, SAMPLE = "trimtab", "base_sample"

#: Fields that every PEFT config has and that say nothing about the adapter's function.
COMMON_FIELDS = frozenset(
    {"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
)


#: Where the name of an adapted layer ends and that of what it wears begins, in the methods' files.
_LEAVES = re.compile(r"\.(?=lora_|vera_lambda_|ia3_|adapter_|added_bias|base_layer)")


@dataclass
class SavedAdapter:
    """An adapter as a folder holds it.

    Attributes:
        config: PEFT's adapter_config.json.
        tensors: under the model's own names, as PEFT spells them ("...q_proj.lora_A.weight").
        extra: plain JSON values that are ours alone.
        prefix: what `write_adapter_folder` puts before the names.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    extra: dict[str, Any] = field(default_factory=dict)
    prefix: str = PREFIX

    def check_base(self, model: nn.Module, path: str) -> None:
        """Refuse a model that is clearly not the base that the adapter was trained on.

        Raises:
            CheckpointError: the sampled weights do not go with the model's.
        """
        if SAMPLE not in self.extra:
            return
        then = decode_sample(self.extra[SAMPLE])
        now = base_sample(model)
        if not len(now) or now.device.type == "meta":
            return
        if len(now) != len(then):
            raise CheckpointError(f"{path}: the adapter is of another base: its linear layers are of other sizes")
        alike = float(torch.nn.functional.cosine_similarity(now, then, dim=0))
        if not alike > 0.5:
            raise CheckpointError(
                f"{path}: the adapter is of another base: sampled weights agree to {alike:.2f} only (1 is the same "
                "base, and a 4-bit copy of it gives 0.99); load the checkpoint that it was trained on"
            )

    def missing_layer(self, model: nn.Module) -> str | None:
        """The first layer that the adapter has tensors for, and a model lacks; None when there is none."""
        known = {name for name, _ in model.named_modules()}
        return next((layer for name in self.tensors if (layer := layer_of(name)) and layer not in known), None)

    def matched(
        self, suffixes: Mapping[str, str], *, required: Iterable[str], known: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors under the names that the model has for them.

        Args:
            suffixes: endings of PEFT's names and what ours have instead: {".lora_A.weight": ".lora_A"}.
            required: names that must be there.
            known: all names that may be there, with what they are on the model. What is not required is the
                base's, and may be there only where the config covers it, or as a copy of what the base has.

        Raises:
            CheckpointError: a tensor is missing, unknown, of another shape, or the base's and not covered.
        """
        required = list(required)
        named = {}
        for name, tensor in self.tensors.items():
            ending = next((end for end in suffixes if name.endswith(end)), "")
            named[name.removesuffix(ending) + suffixes.get(ending, "")] = tensor
        missing = [name for name in required if name not in named]
        unknown = [name for name in named if name not in known]
        if missing or unknown:
            name, what = (missing[0], "lacks") if missing else (unknown[0], "has, but the model lacks,")
            raise CheckpointError(f"the adapter is damaged, or of another base: it {what} {name}")
        for name, tensor in named.items():
            if known[name].shape != tensor.shape:
                raise CheckpointError(
                    f"the adapter is of another base: {name} is {tuple(tensor.shape)} in the file and "
                    f"{tuple(known[name].shape)} in the model"
                )
        own = set(required)
        idle = [n for n in named if n not in own and not known[n].requires_grad and not covers(self.config, n, own)]
        for name in idle:
            # PEFT writes the embeddings of a model whose vocabulary it saw grow, trained or not.
            if not _is_copy(named.pop(name), known[name]):
                raise CheckpointError(
                    f"the adapter's file would replace the base's {name}, and its config does not say that it trained "
                    f"it; if it did, name {name.rpartition('.')[0]!r} in the config's modules_to_save; if not, take "
                    "the tensor out of the file"
                )
        return named


def layer_of(name: str) -> str:
    """The adapted layer whose tensor has this name in a file; empty for tensors that are of no such layer."""
    return _LEAVES.split(name)[0] if _LEAVES.search(name) else ""


def _is_copy(stored: Tensor, own: Tensor) -> bool:
    """Whether a file's tensor is what the base has."""
    return own.device.type != "meta" and torch.equal(own.detach().cpu(), stored.to(own.dtype))


def refuse_unknown(saved: dict[str, Any], known: Set[str]) -> None:
    """Refuse a config with fields that we know nothing of, unless they are switched off.

    Raises:
        CheckpointError: such a field has a value that may change what the adapter computes.
    """
    for key, value in saved.items():
        if key not in known and key not in COMMON_FIELDS and value not in (None, False, "", [], {}):
            raise CheckpointError(
                f"the adapter's {key} = {value!r} is not supported: this version does not know the field, which a "
                "newer PEFT may have written; save the adapter without it, or merge it with the PEFT that made it"
            )


def endings_pattern(names: Iterable[str]) -> str:
    """A regular expression for whole names that end with one of these."""
    return rf"(?:.*\.)?(?:{'|'.join(re.escape(name) for name in names)})"


def saved_targets(saved: Mapping[str, Any]) -> str | tuple[str, ...]:
    """Our `targets` of a PEFT config: its target_modules, in the layers that it numbers.

    Raises:
        CheckpointError: it names no layers, or its numbers cannot be used.
    """
    targets, in_full = saved.get("target_modules"), saved.get("modules_to_save") or []
    if not targets or not isinstance(targets, str | list):
        raise CheckpointError(f"the adapter's config names no target_modules: {targets!r}")
    layers = saved.get("layers_to_transform")
    if isinstance(targets, str):
        if layers not in (None, []):
            raise CheckpointError("the adapter's layers_to_transform goes with a list of target_modules only")
        return targets
    names = tuple(str(name) for name in targets if name not in in_full)
    if layers in (None, []):
        return names
    try:
        numbers = "|".join(str(int(n)) for n in (layers if isinstance(layers, list) else [layers]))
    except (TypeError, ValueError):
        raise CheckpointError(f"the adapter's layers_to_transform = {layers!r} is no list of numbers") from None
    endings = "|".join(re.escape(name) for name in names)
    patterns = saved.get("layers_pattern") or []
    if patterns:
        stacks = "|".join(patterns if isinstance(patterns, list) else [str(patterns)])
        return rf"{endings}|(?:.*\.)?(?:{stacks})\.(?:{numbers})\.(?:.*\.)?(?:{endings})"
    # PEFT takes the first number among the parts of the name, from the third part on.
    return rf"{endings}|[^.]+\.(?:(?!\d+\.)[^.]+\.)+(?:{numbers})\.(?:.*\.)?(?:{endings})"


def saved_layers(saved: Mapping[str, Any], known: Set[str]) -> dict[str, Any]:
    """`targets` and `exclude` of a method's config, from a PEFT config that names its layers.

    Args:
        saved: adapter_config.json.
        known: its fields that the method reads, or that decide nothing.

    Raises:
        CheckpointError: it names no layers, or has what is not supported.
    """
    if saved.get("bias", "none") != "none":
        raise CheckpointError(f"the adapter's bias = {saved['bias']!r} is not supported; only 'none' is")
    refuse_unknown({key: value for key, value in saved.items() if key != "bias"}, known)
    targets, excluded = saved_targets(saved), saved.get("exclude_modules") or ()
    if isinstance(excluded, str):
        raise CheckpointError(f"the adapter's exclude_modules = {excluded!r} is not supported; only a list is")
    return {"targets": targets, "exclude": tuple(excluded)}


@contextlib.contextmanager
def reading_config() -> Iterator[None]:
    """Within this context, what a method refuses of an adapter folder's config is the folder's fault.

    Raises:
        CheckpointError: a field is missing, or a value cannot be used.
    """
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"the adapter's config lacks {error.args[0]}") from None
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"the adapter's config cannot be used: {error}") from None


def base_sample(model: nn.Module) -> Tensor:
    """256 entries of the model's linear weights, in fp32 on the CPU: enough to tell one base from another.

    They stand the rounding to 16 or 4 bits, and are taken from layers in stacks of blocks where there are any,
    since heads are often exchanged. Take it before anything is attached.
    """
    linears = {n: m for n, m in model.named_modules() if is_linear(m)}
    stacks = tuple(f"{n}." for n, m in model.named_modules() if n and isinstance(m, nn.ModuleList))
    inside = {n: m for n, m in linears.items() if n.startswith(stacks)} or linears
    names = sorted(inside)
    chosen = [names[i * len(names) // 16] for i in range(min(16, len(names)))]
    parts = []
    for name in chosen:
        module = inside[name]
        weight = module.weight
        assert isinstance(weight, Tensor)
        if weight.device.type == "meta":
            return torch.empty(0)
        row = holder_of(module).rows(weight, slice(0, 1))[0]
        at = torch.arange(16, device=row.device) * len(row) // 16
        parts.append(row[at].detach().float().cpu())
    return torch.cat(parts) if parts else torch.empty(0)


def encode_sample(sample: Tensor) -> str:
    """A sample as text: base64 of bf16."""
    return base64.b64encode(sample.to(torch.bfloat16).view(torch.int16).numpy().tobytes()).decode()


def decode_sample(text: str) -> Tensor:
    """The inverse of `encode_sample`."""
    try:
        raw = bytearray(base64.b64decode(text, validate=True))
        return torch.frombuffer(raw, dtype=torch.int16).view(torch.bfloat16).float()
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the adapter's {SAMPLE} is damaged: {error}") from None


def read_adapter_folder(path: Path) -> SavedAdapter:
    """Read an adapter folder.

    Raises:
        CheckpointError: a file is missing, damaged or leads out of the folder, or a field is not of its kind.
    """
    if not path.is_dir():
        what = "is a file; give the folder that holds it" if path.is_file() else "there is no such folder"
        raise CheckpointError(
            f"{path}: {what}; adapters are not looked up on the hub (huggingface_hub.snapshot_download fetches one)"
        )
    config_file, tensor_file = inside(path, CONFIG_FILE), inside(path, TENSOR_FILE)
    for file in (config_file, tensor_file):
        if not file.is_file():
            raise CheckpointError(f"{path} is no adapter folder: {file.name} is missing{_instead(path, file.name)}")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{config_file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_file} is not a JSON object")
    try:
        with safe_open(tensor_file, "pt") as opened:
            tensors = {name.removeprefix(PREFIX): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            extra = json.loads((opened.metadata() or {}).get(OURS, "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{tensor_file} is damaged: {error}") from None
    if not isinstance(extra, dict):
        raise CheckpointError(f"{tensor_file} is damaged: its metadata {OURS!r} is no JSON object")
    try:
        check_fields(config)
        check_values(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return SavedAdapter(config, tensors, extra)


def _instead(path: Path, missing: str) -> str:
    """What a folder without one of an adapter's files may be, and the way out; empty if nothing is known of it."""
    if missing == CONFIG_FILE and (path / "adapter" / CONFIG_FILE).is_file():
        return f"; it is a run's folder, and its adapter is {path / 'adapter'}"
    if missing == TENSOR_FILE and (path / PICKLE_FILE).is_file():
        return (
            f"; {PICKLE_FILE} is a pickle, which could run code and is never loaded: where you trust it, load it with "
            "peft and write it anew with save_pretrained(folder, safe_serialization=True)"
        )
    return ""


def write_adapter_folder(path: Path, saved: SavedAdapter) -> None:
    """Write an adapter folder.

    Raises:
        CannotSave: a tensor is not finite; what was there before stays.
        CheckpointError: the folder cannot be written.
    """
    for name, tensor in saved.tensors.items():
        if tensor.is_floating_point() and not finite(tensor):
            raise CannotSave(
                f"{name} is not finite (it has NaN or infinity), so what would be saved is of no use: the training has "
                "diverged; go back to an earlier checkpoint and train with a lower lr, or in bf16 or fp32 if it was in "
                "fp16"
            )
    try:
        path.mkdir(parents=True, exist_ok=True)
        # What PEFT keeps outside the model (VeRA's pair) comes under its own whole name.
        outside = PREFIX.partition(".")[0] + "."
        contiguous = {
            (name if name.startswith(outside) else saved.prefix + name): tensor.detach().cpu().contiguous()
            for name, tensor in saved.tensors.items()
        }
        metadata = {"format": "pt", OURS: json.dumps(saved.extra, sort_keys=True)}
        # Fields in order of their names, but nothing inside them: the first pattern that matches a layer counts.
        text = json.dumps(dict(sorted(saved.config.items())), indent=2) + "\n"
        # Both under other names first, so that a full disk leaves an older adapter as it was.
        fresh = [path / f"{name}.tmp" for name in (TENSOR_FILE, CONFIG_FILE)]
        save_file(contiguous, fresh[0], metadata=metadata)
        fresh[1].write_text(text, encoding="utf-8")
        for file in fresh:
            file.replace(file.with_suffix(""))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the adapter cannot be written to {path}: {error}") from None


def write_together(path: Path, saved: SavedAdapter) -> None:
    """As `write_adapter_folder`; where tensors are split over processes all of these call, and the first one writes.

    Raises:
        CheckpointError: the folder cannot be written; in all processes.
    """
    mesh = mesh_of(saved.tensors.values())
    if mesh is None:
        write_adapter_folder(path, saved)
        return
    first, failed = is_first(mesh), None
    tensors = {}
    for name, tensor in saved.tensors.items():
        gathered = whole(tensor)
        if first:
            tensors[name] = gathered.cpu()
    try:
        if first:
            write_adapter_folder(path, replace(saved, tensors=tensors))
    except Exception as error:  # whatever it is, the others wait to hear of it
        failed = error
    if not all_agree(mesh, failed is None):
        raise failed or CheckpointError(f"{path}: the first process could not write the adapter; its error says why")
