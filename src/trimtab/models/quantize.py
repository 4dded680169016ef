"""Quantising the frozen linear layers of a model, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError, TargetError
from trimtab.methods.attached import record_of
from trimtab.nn.inject import closest, head_modules, is_linear, name_ends, passed_over, warn_of_rest
from trimtab.nn.nf4layer import NF4Linear
from trimtab.nn.packing import dequantize_layer, new_master, pack
from trimtab.nn.residence import disarm_fused_encoders
from trimtab.nn.swap import Swapped
from trimtab.nn.weights import shape_of

KINDS = ("nf4",)


def quantize(
    model: nn.Module,
    kind: str = "nf4",
    *,
    double: bool = True,
    skip: Sequence[str] = (),
    compute_dtype: torch.dtype | None = None,
    master: str | Path | None = None,
    min_kept: float = 0.5,
) -> list[str]:
    """Hold the weights of a model's linear layers in 4 bits, in place and frozen, before an adapter is attached.

    Every nn.Linear and Conv1D is taken but output heads and layers whose weight another module reads, too. A
    quantised layer is an `NF4Linear`: `model(**batch)`, `.to()`, `state_dict()` and copies work as before, and any
    method can be attached. `trimtab.load_quantized` does the same while it loads.

    A fresh model, which would train all over, is fine. A weight that trains is refused where that is meant: it has a
    gradient, others of the layers are frozen, or an adapter is attached.

    Args:
        model: any module, without an adapter.
        kind: "nf4".
        double: quantise the scales, too: 4.13 to 4.16 bits a weight of a large layer instead of 4.5.
        skip: name endings of further layers to leave as they are.
        compute_dtype: in which quantised layers compute; None takes that of their input.
        master: keep what each weight stands for in fp32 (a bf16 weight and its carry, 4 bytes a weight), "host" in
            memory or in files of a new folder. ReLoRA's restarts merge into it, so that nothing of them is lost.
        min_kept: without a master, refuse a merge into 4 bits that keeps less than this share of its update.

    Returns:
        The names of the quantised layers.

    Raises:
        ConfigError: a setting is wrong, the model has an adapter or trains a weight, or one is not finite in fp32.
        TargetError: an ending of `skip` matches nothing, or nothing is left. In either case the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={model!r}: give a torch.nn.Module, or load one with trimtab.load_quantized")
    check_settings(kind, compute_dtype, min_kept)
    _refuse_adapters(model)
    layers = choose(model, skip)
    _refuse_trained(layers)
    for name, module in layers.items():
        _refuse_infinite(name, module.weight)
    masters = make_masters(layers, master)
    for name, module in layers.items():
        pack(module, double=double, compute=compute_dtype, master=masters.get(name), min_kept=min_kept)
    disarm_fused_encoders(model)
    return list(layers)


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Give a quantised model without an adapter its dense layers back, frozen: the decoded codes, or the masters.

    Args:
        model: its `NF4Linear` layers become what they were, nn.Linear or Conv1D.
        dtype: of the weights; None takes what each layer had before it was quantised.

    Returns:
        The names of the layers.

    Raises:
        ConfigError: the model has an adapter (`merge()` folds it into dense layers), or no quantised layer.
    """
    _refuse_adapters(model)
    layers = {name: module for name, module in model.named_modules() if _packed(module)}
    if not layers:
        raise ConfigError(f"dequantize: {type(model).__name__} has no quantised layer")
    for module in layers.values():
        dequantize_layer(module, dtype)
    return list(layers)


def check_settings(kind: str, compute_dtype: torch.dtype | None, min_kept: float) -> None:
    """Raise ConfigError for a setting that cannot be."""
    if kind not in KINDS:
        raise ConfigError(f"kind = {kind!r}: no such quantisation; there is {', '.join(map(repr, KINDS))}")
    check_dtype("compute_dtype", compute_dtype)
    if not 0.0 <= min_kept <= 1.0:
        raise ConfigError(f"min_kept = {min_kept} is no share between 0 and 1")


def check_dtype(setting: str, dtype: torch.dtype | None) -> None:
    """Raise ConfigError for what is neither None nor a dtype that weights can have."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"{setting} = {dtype!r} is no floating dtype of torch; give torch.bfloat16, say, or None")


def _refuse_adapters(model: nn.Module) -> None:
    worn = [name for name, module in model.named_modules() if isinstance(module, Swapped)]
    record = record_of(model)
    if record is not None or worn:
        what = f"the adapter {next(iter(record.adapters))!r}" if record is not None else f"an adapter on {worn[0]}"
        raise ConfigError(f"the model has {what}; quantise it first and attach then, or merge() or detach() it")


def choose(model: nn.Module, skip: Sequence[str]) -> dict[str, nn.Module]:
    """The layers to quantise by name: linear, in no output head, not tied, not skipped.

    Raises:
        TargetError: an ending of `skip` matches no linear layer, or no layer is left.
    """
    if isinstance(skip, str):
        raise TargetError(f"skip = {skip!r} is a string; give a list of name endings: skip=[{skip!r}]")
    linears = {name: module for name, module in model.named_modules() if name and is_linear(module)}
    for ending in skip:
        if not any(name_ends(name, ending) for name in linears):
            raise TargetError(f"skip: {ending!r} matches no linear layer; {closest(ending, linears)}")
    heads = tuple(head_modules(model))
    inside = tuple(f"{name}." for name in heads)
    readers: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            readers.setdefault(id(parameter), set()).add(id(module))
    free = {n: m for n, m in linears.items() if n not in heads and not n.startswith(inside) and not _packed(m)}
    free = {name: module for name, module in free.items() if len(readers[id(module.weight)]) == 1}
    chosen = {n: m for n, m in free.items() if not any(name_ends(n, ending) for ending in skip)}
    if not chosen:
        if any(_packed(module) for module in linears.values()):
            raise TargetError(f"{type(model).__name__} is quantised already; nothing is left to quantise")
        why = "" if free else passed_over(model)
        what = f"skip = {list(skip)} leaves none of {len(free)}" if free else f"{type(model).__name__} has no"
        raise TargetError(f"{what} linear layers that can be quantised (heads and tied weights never are){why}")
    packed = {name: module for name, module in linears.items() if _packed(module)}
    warn_of_rest(
        model, {**packed, **free}, "quantize", "what is no linear layer stays as it is, and so does its memory"
    )
    return chosen


def _packed(module: nn.Module) -> bool:
    return isinstance(module, NF4Linear)


def _refuse_infinite(name: str, weight: Tensor | nn.Module) -> None:
    """Scales are fp32: what is finite in float64 may not be in them."""
    assert isinstance(weight, Tensor)
    if weight.device.type == "meta":
        return
    for end in torch.aminmax(weight.detach()):
        if not bool(end.float().isfinite()):
            raise ConfigError(
                f"{name}.weight has an entry that is not finite in fp32 ({float(end):g}), so it cannot be quantised; "
                f"mend the weight, or leave it out with skip=['{name}']"
            )


def _refuse_trained(layers: Mapping[str, nn.Module]) -> None:
    """A fresh model trains all over; a weight with a gradient, or one among frozen ones, is meant to train.

    Only these layers are looked at: many a fresh model has frozen parameters elsewhere, such as sinusoidal positions.
    """
    trained = [name for name, module in layers.items() if module.weight.requires_grad]
    for name in trained:
        if layers[name].weight.grad is not None:
            raise ConfigError(
                f"{name}.weight trains (it has a gradient), and a quantised weight cannot; freeze it with "
                f"requires_grad_(False), call model.zero_grad() if its training is over, or leave it out with "
                f"skip=['{name}']"
            )
    if trained and len(trained) < len(layers):
        raise ConfigError(
            f"{trained[0]}.weight trains while other layers are frozen, and a quantised weight cannot train; "
            f"freeze it with requires_grad_(False), or leave it out with skip=['{trained[0]}']"
        )


def make_masters(layers: Mapping[str, nn.Module], where: str | Path | None) -> dict[str, Tensor]:
    """Room for the masters of `layers`; none when `where` is None.

    Raises:
        ConfigError: a file is in the way or cannot be written; files that were made are gone again.
    """
    masters: dict[str, Tensor] = {}
    if where is None:
        return masters
    try:
        for name, module in layers.items():
            masters[name] = new_master(where, name, shape_of(module))
    except ConfigError:
        drop_masters(masters, where)
        raise
    return masters


def drop_masters(names: Iterable[str], where: str | Path | None) -> None:
    """Remove the files that `make_masters` made."""
    if where is None or where == "host":
        return
    for name in names:
        (Path(where) / f"{name}.fp32").unlink(missing_ok=True)
