"""Turning a plain linear layer into an NF4 layer, and back; room for masters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.nn import nf4
from trimtab.nn.nf4layer import DOUBLE_SCALES, NF4, NF4Linear
from trimtab.nn.weights import is_conv1d


def pack(
    module: nn.Module,
    *,
    double: bool,
    compute: torch.dtype | None = None,
    master: Tensor | None = None,
    min_kept: float = 0.5,
    value: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Turn a plain nn.Linear or Conv1D into an `NF4Linear`, in place.

    Args:
        module: its class is swapped; its weight is replaced by a frozen int8 one.
        double: quantise the scales, too.
        compute: compute in this dtype whatever the input's is; None computes in the input's.
        master: fp32 (out, in) on the CPU, to be filled with the weight; see `new_master`.
        min_kept: as `NF4` has it.
        value: the weight, where the module's own is on the meta device; in the module's layout.
        dtype: the layer's `compute_dtype`; None is `compute`, or else the weight's.

    Raises:
        ValueError: an entry of the weight is not finite.
    """
    own = module.weight
    assert isinstance(own, Tensor)
    weight = own.detach() if value is None else value
    dense = weight.t() if is_conv1d(module) else weight  # (out, in)
    packed, absmax = nf4.quantize(dense)
    stored = {"absmax": absmax}
    if double:
        mean = absmax.mean()  # of weights near the end of fp32 the sum overflows, where their mean does not
        offset = torch.where(mean.isfinite(), mean, (absmax / absmax.numel()).sum())
        stored = dict(zip(DOUBLE_SCALES, (*nf4.quantize_scales(absmax, offset), offset), strict=True))
    module.__dict__.update(
        out_features=dense.shape[0],
        in_features=dense.shape[1],
        compute_dtype=dtype or compute or weight.dtype,
        plain_class=type(module),
    )
    module._parameters["weight"] = nn.Parameter(packed.view(torch.int8), requires_grad=False)
    for name, tensor in stored.items():
        module.register_buffer(name, tensor)
    module.__class__ = NF4Linear
    assert isinstance(module, NF4Linear)
    module.holder = NF4(module, compute=compute, master=master, min_kept=min_kept)
    if master is not None and dense.device.type != "meta":
        for block in module.holder.row_blocks(module.weight):
            master[block] = dense[block].to(master.device, torch.float32)


def new_master(where: str | Path, name: str, shape: tuple[int, int]) -> Tensor:
    """Room for a master (out, in) in fp32: in host memory, or mapped to a new file of the folder `where`.

    Raises:
        ConfigError: the file is there already, or cannot be made.
    """
    if where == "host":
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    file = Path(where) / f"{name}.fp32"
    if file.exists():
        raise ConfigError(f"master={str(where)!r}: {file.name} is there already; give a folder without masters")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return torch.from_file(str(file), shared=True, size=shape[0] * shape[1], dtype=torch.float32).view(shape)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"master={str(where)!r}: {file} cannot be written: {error}") from None


@torch.no_grad()
def dequantize_layer(
    module: nn.Module, dtype: torch.dtype | None = None, fold: Callable[[Tensor, slice], Tensor] | None = None
) -> Callable[[], None]:
    """Give an NF4 layer a dense weight again: it is a plain nn.Linear (or Conv1D) afterwards.

    Args:
        module: an `NF4Linear`.
        dtype: of the dense weight; None takes the layer's `compute_dtype`.
        fold: from a block of rows (rows, in), in float64, and which rows they are, to the rows to store.

    Returns:
        A function that undoes it, bit for bit.
    """
    assert isinstance(module, NF4Linear)
    holder, weight = module.holder, module.weight
    dense = torch.empty(
        module.out_features, module.in_features, dtype=dtype or module.compute_dtype, device=weight.device
    )
    for block in holder.row_blocks(weight):
        rows = holder.rows(weight, block).double()
        dense[block] = (rows if fold is None else fold(rows, block)).to(dense.dtype)
    return module.widen(dense)
