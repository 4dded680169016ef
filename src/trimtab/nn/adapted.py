"""Layers that wear an adapter: something trained beside a frozen weight.

The layer's class is swapped in place (see `swap`), so the weight stays a parameter of its layer, under its own
name. A method brings a mixin with two things: `forward`, and `merged_rows`, the value that a merge gives. All
else (merging block by block in float64, the value before rounding, taking the adapter off) is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.errors import CannotMerge
from trimtab.nn.swap import Swapped, put_on, take_off
from trimtab.nn.weights import Dense, Holder, holder_of, shape_of


class Adapted(Swapped):
    """Mixin of a layer with an adapter.

    Attributes:
        parts: names of the adapter's own parameters on the layer.
        starts_at_zero: the part that first gets a gradient, where one starts at zero.
        base: the holder of the layer's weight.
    """

    parts: ClassVar[tuple[str, ...]] = ()
    starts_at_zero: ClassVar[str] = ""
    label = "Adapted"
    base: Holder
    weight: Any
    bias: Any
    training: bool
    adapted_attributes: tuple[str, ...]

    def merged_rows(self, rows: Tensor, block: slice) -> Tensor:
        """The rows that a merge gives for these rows of the base weight.

        Args:
            rows: (rows, in) of W, in float64 (fp32 on a device without it); may be written into.
            block: which output rows they are.
        """
        raise CannotMerge(f"a {self.label} layer has no merged form")

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The merged value of a `weight` of the layer's stored layout, in its dtype, rounded once."""
        return self._written_to(torch.empty_like(weight), weight, self._layout())

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The merged weight (out, in) in `dtype`, rounded once, on the weight's device."""
        out = torch.empty(shape_of(self), dtype=dtype, device=self.weight.device)  # type: ignore[arg-type]
        for block in self.base.row_blocks(self.weight):
            out[block] = self._sum(self.weight, block, self.base).to(dtype)
        return out

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """The merged weight before rounding, in fp32, of shape (out, in), on the CPU."""
        blocks = self.base.row_blocks(self.weight)
        return torch.cat([self._sum(self.weight, block, self.base).float().cpu() for block in blocks])

    @torch.no_grad()
    def base_weight(self) -> Tensor:
        """The weight without what the adapter adds, in fp32, of shape (out, in), on the CPU."""
        blocks = self.base.row_blocks(self.weight)
        return torch.cat([self.base.rows(self.weight, block).float().cpu() for block in blocks])

    @torch.no_grad()
    def merge_(self) -> None:
        """Write the merged value into the base, a block of rows at a time; the adapter is left as it is."""
        for block in self.base.row_blocks(self.weight):
            self.base.write_rows(self.weight, block, self._sum(self.weight, block, self.base))

    @torch.no_grad()
    def survival(self) -> tuple[float, float] | None:
        """The sums of `Holder.survival` over the layer; None where `merge_` loses nothing for good."""
        if not self.base.lossy:
            return None
        kept = total = 0.0
        for block in self.base.row_blocks(self.weight):
            left, whole = self.base.survival(self.weight, block, self._sum(self.weight, block, self.base))
            kept, total = kept + left, total + whole
        return kept, total

    def _layout(self) -> Holder:
        """A plain holder for tensors of this layer's stored layout."""
        return Dense(transposed=getattr(self.base, "transposed", False), exact=False)

    def _written_to(self, out: Tensor, weight: Tensor, holder: Holder) -> Tensor:
        for block in holder.row_blocks(weight):
            holder.write_rows(out, block, self._sum(weight, block, holder))
        return out

    def _sum(self, weight: Tensor, block: slice, holder: Holder) -> Tensor:
        """A block of merged rows in float64, so that storing it is the only rounding.

        The product is a few parts in a thousand of a training step's work even where float64 is slow, and
        no setting of the user (TF32, bf16 in oneDNN) applies to it. MPS has no float64 and sums in fp32.
        """
        wide = torch.float32 if weight.device.type == "mps" else torch.float64
        return self.merged_rows(holder.rows(weight, block).to(wide), block)


def check_bases(layers: Mapping[str, Adapted]) -> None:
    """Find out whether these layers can be merged, before the first one is.

    Raises:
        CannotMerge: a weight was cast since its adapter was put on, and what rounding had lost no longer fits it.
    """
    for name, layer in layers.items():
        if fault := layer.base.fault(layer.weight):
            raise CannotMerge(f"{name}.weight {fault}; nothing was written")


def merge_report(layers: Mapping[str, Adapted]) -> dict[str, Any]:
    """What a merge of these layers into their bases would lose; nothing is written. Empty if nothing is lost.

    Returns:
        `kept`: the surviving share of the update of all layers whose base loses some of it; `least_kept` and
        `least_kept_layer`: that of the layer that loses most.

    Raises:
        CannotMerge: less survives than the bases' `min_kept`.
    """
    check_bases(layers)
    found = {name: sums for name, layer in layers.items() if (sums := layer.survival()) is not None}
    total = sum(sums[1] for sums in found.values())
    if not total:
        return {}
    kept = sum(sums[0] for sums in found.values()) / total
    shares = {name: part / whole for name, (part, whole) in found.items() if whole}
    least = min(shares, key=lambda name: shares[name])
    needed = max(layers[name].base.min_kept for name in found)
    if kept < needed:
        raise CannotMerge(
            f"rounding would leave {100 * kept:.1f} % of this merge ({100 * shares[least]:.1f} % in {least}), less "
            f"than min_kept = {needed}; nothing was written. Quantise with master='host' or a folder, which loses "
            "nothing, or with a lower min_kept"
        )
    return {"kept": round(kept, 4), "least_kept": round(shares[least], 4), "least_kept_layer": least}


def dress(
    module: nn.Module,
    mixin: type[Adapted],
    *,
    parameters: Mapping[str, nn.Parameter],
    base: Holder | None = None,
    **attributes: Any,
) -> None:
    """Let a layer wear an adapter, in place: its own parameters, and plain attributes that its forward reads."""
    module.__dict__.update(attributes, base=base or holder_of(module), adapted_attributes=("base", *attributes))
    put_on(module, mixin)
    for name, parameter in parameters.items():
        module.register_parameter(name, parameter)


def undress(module: nn.Module) -> dict[str, nn.Parameter]:
    """Take a layer's adapter off and return its own parameters; the weight is left as it stands."""
    assert isinstance(module, Adapted)
    taken = {name: module._parameters.pop(name) for name in module.parts if name in module._parameters}
    parameters = {name: parameter for name, parameter in taken.items() if parameter is not None}
    for name in (*module.adapted_attributes, "adapted_attributes"):
        del module.__dict__[name]
    take_off(module, Adapted)
    return parameters


def plain_weights(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """The weights (out, in) of linear layers without an adapter, by parameter name, in fp32 on the CPU."""
    for name, module in modules.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        yield f"{name}.weight", holder_of(module).rows(weight, slice(None)).float().cpu()
