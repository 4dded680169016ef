"""The whole update of a training as one low-rank adapter: W_end - W_start, cut off after `rank` singular values.

Legend: D = W_end - W_start (out, in) of one linear layer; k the rank; s_1 >= s_2 >= ... the singular values of D.

    D = U diag(s) V'        B = U_k diag(s_k)^(1/2)  (out, k)        A = diag(s_k)^(-1/2) U_k' D  (k, in)

B A is the best approximation of rank k (Eckart and Young); it keeps the share (s_1^2 + ... + s_k^2) / |D|^2 of the
energy |D|^2. U comes from the eigenvectors of the smaller Gram matrix in float64, as in `report.spectrum`. With every
singular value kept B A = D, whatever the accuracy of U, since U is orthonormal. alpha = k, so that the scale is 1.

What is no linear layer of a block and changed too (embeddings, norms, the head) is stored in full beside the
adapter, and so are the biases; what has no place in such a file is left out, and named.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import CheckpointError, ConfigError, NonFiniteError, TargetError
from trimtab.export.checkpoint import ties
from trimtab.export.folder import whole_folder
from trimtab.export.sources import Update, Weights
from trimtab.methods.folder import SavedAdapter, write_adapter_folder
from trimtab.nn.inject import ALL_LINEAR, find_targets
from trimtab.nn.weights import is_conv1d

#: What is beside the adapter's own two files, which PEFT does not look at.
REPORT_FILE = "delta.json"


@dataclass(frozen=True)
class LayerKept:
    """One linear layer's update and what of it the adapter keeps.

    Attributes:
        name: of the layer.
        shape: (out, in).
        rank: of B A, at most min(out, in).
        update: |D|, Frobenius norm.
        relative: |D| / |W_start|; infinite for a start of zeros.
        kept: share of |D|^2 that B A holds.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    update: float
    relative: float
    kept: float


@dataclass(frozen=True)
class DeltaReport:
    """What an exported adapter holds.

    Attributes:
        layers: the linear layers that changed.
        whole: modules stored in full, with their numbers of parameters.
        biases: names of the biases stored.
        unknown: names of stored tensors whose start was not given, so that they may not have changed.
        left_out: names of changed tensors that the adapter does not hold, each with the reason.
        unchanged: how many tensors are equal at start and end.
    """

    layers: tuple[LayerKept, ...]
    whole: dict[str, int]
    biases: tuple[str, ...]
    unknown: tuple[str, ...]
    left_out: dict[str, str]
    unchanged: int

    @property
    def kept(self) -> float:
        """Share of the energy of all linear layers' updates that is kept; 1 when none changed."""
        total = math.fsum(layer.update**2 for layer in self.layers)
        return math.fsum(layer.kept * layer.update**2 for layer in self.layers) / total if total else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = asdict(self)
        for layer in plain["layers"]:
            layer["relative"] = layer["relative"] if math.isfinite(layer["relative"]) else None
        return {"format": 1, "kept": self.kept, **plain}


def export_delta(update: Update, out: Path, rank: int, *, require_all: bool = False) -> DeltaReport:
    """Write the update as a LoRA folder in PEFT's layout, which loads on the start model.

    Memory: the adapter, and one matrix of the model with its Gram matrix in float64.

    Args:
        update: start and end, as `find_update` gives them.
        out: the new folder.
        rank: k, at least 1; a layer with fewer singular values keeps all of them.
        require_all: raise instead of leaving anything out.

    Raises:
        ConfigError: the rank fits no layer, `out` is in use, or something would be left out that must not.
        CheckpointError: nothing changed, the two do not fit together, or the folder cannot be written.
        NonFiniteError: a weight is not finite.
    """
    model, start, end = update.model, update.start, update.end
    linears = _linears(model)
    largest = max((min(module.weight.shape) for module in linears.values()), default=0)
    if not 1 <= rank <= largest:
        raise ConfigError(
            f"--delta-rank {rank}: the rank must lie between 1 and {largest}, the most that an update of this model's "
            "linear layers can have"
        )
    tensors: dict[str, Tensor] = {}
    layers: list[LayerKept] = []
    for name, module in linears.items():
        key = f"{name}.weight"
        if key not in start.names():
            raise CheckpointError(f"the start lacks {key}; give the whole checkpoint with --base")
        layer = _factor(key, start.read(key), end.read(key), rank, turned=is_conv1d(module))
        if layer is None:
            continue
        a, b, kept = layer
        layers.append(kept)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    if not layers:
        raise CheckpointError("start and end have the same linear layers, so there is no update to export")
    rest = _rest(model, {f"{layer.name}.weight" for layer in layers}, set(linears), start, end)
    if rest.left_out and require_all:
        name, why = next(iter(rest.left_out.items()))
        raise ConfigError(f"--require-all: {len(rest.left_out)} changed tensors cannot be stored; {name}: {why}")
    adapted = {layer.name for layer in layers}
    for name in rest.biases:
        owner = name.removesuffix(".bias")
        tensors[f"{owner}.base_layer.bias" if owner in adapted else name] = end.read(name)
    for name in rest.whole_tensors:
        tensors[name] = end.read(name)
    with whole_folder(out) as folder:
        # With `untie`, load_adapter gives a tied head a tensor of its own, as PEFT does for what it stores in full.
        extra = {**start.fingerprint(), **({"untie": True} if rest.parted else {})}
        saved = SavedAdapter(_config(start, model, layers, rest), tensors, extra)
        write_adapter_folder(folder, saved)
        report = rest.report(layers)
        (folder / REPORT_FILE).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    return report


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    try:
        found: Any = find_targets(model, ALL_LINEAR)
    except TargetError as error:
        raise CheckpointError(f"this model has no linear layers for an adapter: {error}") from None
    return dict(found)


def _factor(
    key: str, start: Tensor, end: Tensor, rank: int, *, turned: bool
) -> tuple[Tensor, Tensor, LayerKept] | None:
    """A (k, in), B (out, k) in fp32, and what they keep; None where nothing changed."""
    old, new = (value.to(torch.float64).t() if turned else value.to(torch.float64) for value in (start, end))
    delta = new - old
    peak = float(delta.abs().max())
    if not math.isfinite(peak):
        raise NonFiniteError(f"the update of {key} is not finite, so it has no low-rank form; the run has diverged")
    if peak == 0.0:
        return None
    rows, columns = delta.shape
    k = min(rank, rows, columns)
    scaled = delta / peak  # so that neither tiny nor huge updates leave float64's range when they are squared
    if rows <= columns:
        values, vectors = torch.linalg.eigh(scaled @ scaled.T)
        left = vectors[:, -k:].flip(1)  # (out, k), the largest first
        right = left.T @ scaled  # (k, in): rows s_i v_i'
        size = values[-k:].flip(0).clamp_min(0.0).sqrt()
        b, a = left * size.sqrt(), _divided(right, size.sqrt())
    else:
        values, vectors = torch.linalg.eigh(scaled.T @ scaled)
        right = vectors[:, -k:].flip(1).T  # (k, in)
        left = scaled @ right.T  # (out, k): columns s_i u_i
        size = values[-k:].flip(0).clamp_min(0.0).sqrt()
        b, a = _divided(left.T, size.sqrt()).T, right * size.sqrt()[:, None]
    a, b = ((part * math.sqrt(peak)).float().contiguous() for part in (a, b))
    norm = float(torch.linalg.vector_norm(delta))
    lost = float(torch.linalg.vector_norm(delta - b.double() @ a.double()))
    before = float(torch.linalg.vector_norm(old))
    kept = LayerKept(
        name=key.removesuffix(".weight"),
        shape=(rows, columns),
        rank=k,
        update=norm,
        relative=norm / before if before else math.inf,
        kept=max(0.0, 1.0 - (lost / norm) ** 2),
    )
    return a, b, kept


def _divided(rows: Tensor, by: Tensor) -> Tensor:
    """Each row divided by its number; rows of zeros for a number that is rounding noise."""
    real = by > 1e-8 * by.max()
    return torch.where(real[:, None], rows / torch.where(real, by, 1.0)[:, None], 0.0)


@dataclass
class _Rest:
    """The changed tensors that are no adapted weight, and where each of them goes."""

    biases: list[str]
    whole: dict[str, int]
    whole_tensors: list[str]
    unknown: list[str]
    left_out: dict[str, str]
    unchanged: int
    parted: bool = False

    def report(self, layers: list[LayerKept]) -> DeltaReport:
        return DeltaReport(
            tuple(layers), self.whole, tuple(self.biases), tuple(self.unknown), self.left_out, self.unchanged
        )


def _rest(model: nn.Module, adapted: set[str], linears: set[str], start: Weights, end: Weights) -> _Rest:
    rest = _Rest([], {}, [], [], {}, 0)
    modules = dict(model.named_modules())
    twins = {name: [other for other in group if other != name] for group in ties(model) for name in group}
    changed: list[str] = []
    for name, parameter in model.named_parameters():
        if name in adapted:
            continue
        if name not in start.names():
            rest.unknown.append(name)
            changed.append(name)
        elif _differ(name, start.read(name), end.read(name), tuple(parameter.shape)):
            changed.append(name)
        else:
            rest.unchanged += 1
    for name in changed:
        owner, _, kind = name.rpartition(".")
        if owner in linears and kind == "bias":
            rest.biases.append(name)
            continue
        rest.parted |= name in twins
        for held in [name, *twins.get(name, ())]:  # a tied weight is stored under each of its names
            _store_whole(held.rpartition(".")[0], modules, linears, rest, name)
    for name, _ in model.named_buffers():
        if name in end.names() & start.names() and not torch.equal(start.read(name), end.read(name)):
            rest.left_out[name] = "it is a buffer, for which an adapter file has no place"
    return rest


def _store_whole(owner: str, modules: dict[str, nn.Module], linears: set[str], rest: _Rest, name: str) -> None:
    if owner in rest.whole:
        return
    if not owner or any(inner.startswith(f"{owner}.") for inner in modules):
        rest.left_out[name] = "its module holds other modules, and only a module without any can be stored in full"
        return
    held = [f"{owner}.{key}" for key, parameter in modules[owner].named_parameters() if parameter is not None]
    rest.whole[owner] = sum(parameter.numel() for parameter in modules[owner].parameters())
    rest.whole_tensors += [key for key in held if key not in rest.whole_tensors]


def _differ(name: str, start: Tensor, end: Tensor, shape: tuple[int, ...]) -> bool:
    for value in (start, end):
        if tuple(value.shape) != shape:
            raise CheckpointError(f"{name} is {tuple(value.shape)} and should be {shape}; the two are not of one model")
    if not bool(torch.isfinite(end).all()):
        raise NonFiniteError(f"{name} is not finite at the end; the run has diverged")
    wide = torch.promote_types(start.dtype, end.dtype)
    return not torch.equal(start.to(wide), end.to(wide))


def _config(start: Weights, model: nn.Module, layers: list[LayerKept], rest: _Rest) -> dict[str, Any]:
    """PEFT's adapter_config.json."""
    rank = max(layer.rank for layer in layers)
    smaller = {layer.name: layer.rank for layer in layers if layer.rank < rank}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": start.name,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": [layer.name for layer in layers],
        "modules_to_save": list(rest.whole) or None,
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(layer.name)) for layer in layers),
        "bias": "all" if rest.biases else "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
