"""Models whose parameters are split over processes: by whom, and how far that works.

FSDP2 (`torch.distributed.fsdp.fully_shard`) makes *units* of modules. While a unit's forward or backward runs, its
parameters are there whole; otherwise each process has a part of each in its place, a DTensor. A unit is known by the
class that it is given, and a part by its own, both by name, so that nothing is imported where nothing is split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError

#: Attributes of parameters that hold a part of themselves.
_PARTS = {"_fsdp_flattened": "FSDP", "ds_tensor": "DeepSpeed's stage 3"}


def _is_a(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)


def is_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module."""
    return _is_a(module, "FSDPModule")


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is split over processes."""
    return type(tensor).__name__ == "DTensor"


# -- what is refused -------------------------------------------------------------------------------


def refuse_split(
    model: nn.Module,
    what: str = "adapters of this method do not work",
    way_out: str = "use DDP, and trimtab.quantize for a base that is too large",
) -> None:
    """Raise ConfigError for a model whose parameters are split over processes.

    Args:
        model: any module.
        what: does not work there.
        way_out: what to do instead.
    """
    if found := _units(model) or _split(model):
        raise ConfigError(f"{found}, and {what} on models that are split over processes; {way_out}")


def refuse_split_before(model: nn.Module) -> None:
    """Raise ConfigError for a model that was split before a method came that works on those that are split after."""
    if found := _units(model):
        raise ConfigError(
            f"{found}, which splits what is there when it is called; attach to the whole model first, and call "
            "fully_shard on its blocks and on the model then"
        )
    _refuse_other(model)


def check_split(model: nn.Module, trained: Mapping[str, Tensor]) -> None:
    """Accept a model that is whole, or that `fully_shard` split together with what trains.

    Args:
        model: whose units hold their parts (see `let_go`).
        trained: what trains, by name.

    Raises:
        ConfigError: it is split by others, or a part of it is not split, which each process would train alone.
    """
    if not any(map(is_unit, model.modules())):
        _refuse_other(model)
        return
    for name, parameter in trained.items():
        if not is_part(parameter):
            raise ConfigError(
                f"{_units(model)}, and {name} is not, so each process would train its own; call fully_shard on "
                f"{type(model).__name__} last, after attach and with all that trains"
            )
    parts: dict[str, Any] = {name: parameter for name, parameter in model.named_parameters() if is_part(parameter)}
    meshes = {part.device_mesh: name for name, part in parts.items()}
    if len(meshes) > 1:
        one, other = list(meshes.values())[:2]
        raise ConfigError(
            f"{one} and {other} are split over different meshes, and adapters work with fully_shard alone, without "
            "tensor parallelism; use one mesh for all"
        )


def _refuse_other(model: nn.Module) -> None:
    if found := _split(model):
        raise ConfigError(f"{found}, and adapters work with DDP and FSDP2 alone; attach and call fully_shard instead")


def _units(model: nn.Module) -> str:
    """The first unit of FSDP2 in a model, as the beginning of a message; empty where there is none."""
    found = next((name or type(module).__name__ for name, module in model.named_modules() if is_unit(module)), "")
    return f"{found} is under FSDP (fully_shard)" if found else ""


def _split(model: nn.Module) -> str:
    """What of a model is split otherwise, and by whom; empty where nothing is."""
    for name, module in model.named_modules():
        if _is_a(module, "FullyShardedDataParallel"):
            return f"{name or type(module).__name__} is under FSDP"
    for name, parameter in model.named_parameters():
        if is_part(parameter):
            return f"{name} is a DTensor, of FSDP or of tensor parallelism"
        for attribute, how in _PARTS.items():
            if getattr(parameter, attribute, None) is not None:
                return f"{name} is split by {how}"
    return ""


# -- units -----------------------------------------------------------------------------------------


def let_go(model: nn.Module) -> None:
    """Let all units hold their parts: after a forward without a backward the outermost still has the whole ones."""
    for module in model.modules():
        if is_unit(module):
            unit: Any = module
            unit.reshard()


def check_units(model: nn.Module, apart: Iterable[tuple[str, nn.Module]], blocks: Iterable[nn.Module]) -> None:
    """Make sure that a model's units, if it has any, let a network stand beside its blocks.

    The network's parameters are read in the hooks of the blocks and kept for the backward pass, so they must be those
    of a unit that is whole until the backward pass has come through: the model's.

    Args:
        model: of the adapter.
        apart: names and modules of what must not be units.
        blocks: the frozen ones. Nothing is back-propagated through them, so units among them stay split in the
            backward pass.

    Raises:
        ConfigError: as said.
    """
    if odd := next((name for name, module in apart if is_unit(module)), ""):
        raise ConfigError(
            f"fully_shard was called on {odd}, whose parameters are then let go before the network beside the blocks "
            "is done with them; call it on the blocks and on the model, and not on what holds or is a part of the "
            "network"
        )
    inner = [module for block in blocks if is_unit(block) for module in block.modules() if is_unit(module)]
    if inner and not is_unit(model):
        raise ConfigError(
            f"fully_shard was called on blocks and not on {type(model).__name__}, which has the adapter, so that each "
            "process would train its own; call it on the blocks first and on the model last"
        )
    for module in inner:
        unit: Any = module
        unit.set_unshard_in_backward(False)


# -- tensors ---------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts; where it has some, all its processes must ask for it."""
    part: Any = tensor
    gathered: Tensor = part.full_tensor() if is_part(tensor) else tensor
    return gathered


def laid_out(value: Tensor, like: Any) -> Tensor:
    """A value split as `like` is, or whole where that is whole."""
    if not is_part(like):
        return whole(value)
    if is_part(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    # No rank sends: each has the whole value, and cuts its part out of it.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def mesh_of(tensors: Iterable[Tensor]) -> Any:
    """The mesh of processes that tensors are split over, or None where none is."""
    parts: Iterable[Any] = tensors
    return next((tensor.device_mesh for tensor in parts if is_part(tensor)), None)


def is_first(mesh: Any) -> bool:
    """Whether this process is the first one of a mesh."""
    return not any(mesh.get_coordinate())


def all_agree(mesh: Any, well: bool) -> bool:
    """Whether all processes of a mesh say that all is well; each waits for the others."""
    failed = torch.tensor(float(not well), device=mesh.device_type)
    for dimension in range(mesh.ndim):
        torch.distributed.all_reduce(failed, group=mesh.get_group(dimension))
    return not failed
