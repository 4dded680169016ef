"""(IA)3 (arXiv 2205.05638): vectors that scale keys, values, and the feed-forward's inner activation.

Keys and values are scaled at the output of their projections, the inner activation at the input of the projection
that takes it down; both merge into the weight, into its rows (and the bias) or its columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.errors import TargetError
from trimtab.methods.base import Adapter
from trimtab.methods.folder import SavedAdapter, reading_config, saved_layers
from trimtab.methods.frozen import FrozenBaseAdapter, Targeted
from trimtab.nn.ia3 import IA3Mixin
from trimtab.nn.inject import find_targets, is_linear
from trimtab.nn.residence import Residence
from trimtab.nn.weights import is_conv1d, join, shape_of

AUTO = "auto"

#: What the projections to keys and values are called, alone and fused with the queries'.
KEYS_AND_VALUES = re.compile(
    r"(.*\.)?([kv]|key|value|[kv]_proj|(key|value)_proj|[kv]_lin|c_attn|query_key_value|qkv|qkv_proj|Wqkv)"
)

#: What the second projection of a feed-forward layer is called (BERT gives one of the names to attention's, too).
DOWN = re.compile(
    r"(.*\.)?(down_proj|wo|w2|fc2|fc_out|lin2|linear2|dense_4h_to_h|mlp\.c_proj|(?<!attention\.)output\.dense)"
)

#: Fields of PEFT's config that are read here, or that change nothing in what is computed.
PEFT_FIELDS = {
    "target_modules", "feedforward_modules", "exclude_modules", "fan_in_fan_out", "init_ia3_weights", "modules_to_save",
}  # fmt: skip


class IA3(Targeted):
    """Scales on keys, values and the feed-forward's inner activation.

    Args:
        targets: layers whose outputs are scaled. "auto": the projections to keys and values, known by their names;
            where queries, keys and values come from one layer, all of its outputs (as PEFT does: a scale on a query
            does what the one on its key does). Else as for every method on linear layers; an empty list for none.
        feedforward: layers whose inputs are scaled, in the same way. "auto": the second projection of each
            feed-forward layer. A layer that both name is one of these.

    `exclude` and `train_also` are as for every method on linear layers. Nothing is drawn, so `seed` has no effect.
    """

    abstract = False
    name: Literal["ia3"] = "ia3"
    targets: str | tuple[str, ...] = AUTO
    feedforward: str | tuple[str, ...] = AUTO

    def idle_settings(self) -> dict[str, str]:
        return {} if self.seed is None else {"seed": "(IA)3 draws nothing: its vectors start at one"}

    def resolve(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """The names of the layers whose outputs are scaled, and of those whose inputs are.

        Raises:
            TargetError: a setting matches nothing.
        """
        inputs = _found(model, "feedforward", self.feedforward, DOWN)
        outputs = [name for name in _found(model, "targets", self.targets, KEYS_AND_VALUES) if name not in inputs]
        if not inputs and not outputs:
            raise TargetError("targets and feedforward are both empty lists, so nothing would be scaled")
        return outputs, inputs

    def _attach(self, model: nn.Module, residence: Residence) -> IA3Adapter:
        return IA3Adapter(model, self, residence)

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> IA3 | None:
        if saved.get("peft_type") != "IA3":
            return None
        layers = saved_layers(saved, PEFT_FIELDS)
        feedforward = saved.get("feedforward_modules") or ()
        with reading_config():
            return cls(feedforward=feedforward if isinstance(feedforward, str) else tuple(feedforward), **layers)

    def load_saved(self, adapter: Adapter, saved: SavedAdapter) -> None:
        assert isinstance(adapter, IA3Adapter)
        adapter.load_tensors(saved, {})


def _found(model: nn.Module, setting: str, value: str | tuple[str, ...], names: re.Pattern[str]) -> list[str]:
    """The names of the layers that a setting names."""
    if not value:
        return []
    if value != AUTO:
        return list(find_targets(model, value))
    found = [name for name, module in model.named_modules() if is_linear(module) and names.fullmatch(name)]
    if not found:
        what = "keys or values" if setting == "targets" else "the second projection of a feed-forward layer"
        raise TargetError(
            f"{setting}='{AUTO}': no linear layer of {type(model).__name__} is called as {what} would be; name the "
            f"layers, or give {setting}=[] for none"
        )
    return found


class IA3Adapter(FrozenBaseAdapter):
    """(IA)3 at work on a model."""

    config: IA3
    mixin = IA3Mixin

    def __init__(self, model: nn.Module, config: IA3, residence: Residence) -> None:
        outputs, inputs = config.resolve(model)
        super().__init__(model, config.model_copy(update={"targets": (*outputs, *inputs)}), residence)
        self.config = config
        self._inputs = frozenset(inputs)
        self._begin()

    def _new_parts(self, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
        out_features, in_features = shape_of(module)
        weight = module.weight
        assert isinstance(weight, Tensor)
        dtype = self._residence.held_dtype(self._residence.compute_dtype(name, module))
        shape = (1, in_features) if name in self._inputs else (out_features, 1)  # as PEFT stores them
        return {"ia3_l": nn.Parameter(torch.ones(shape, dtype=dtype, device=weight.device))}

    def _attributes(self, name: str, module: nn.Module) -> dict[str, Any]:
        return {"feedforward": name in self._inputs}

    # -- endings -------------------------------------------------------------------------------

    def _biases(self) -> list[tuple[str, nn.Parameter, Tensor]]:
        """Of each layer with scaled outputs and a bias: the bias's name, the bias, and l (out,)."""
        return [
            (f"{name}.bias", module.bias, self._parts[name]["ia3_l"].detach()[:, 0])
            for name, module in self._targets.items()
            if name not in self._inputs and isinstance(module.bias, nn.Parameter)
        ]

    def merge(self, *, quantized: bool = False) -> None:
        merged = []
        for name, bias, scales in self._biases():
            carry = self._residence.carries.get(name)
            value = bias.detach() if carry is None else join(bias.detach(), carry.to(bias.device))
            merged.append((bias, _product(value, scales)))
        super().merge(quantized=quantized)
        for bias, value in merged:
            bias.data.copy_(value)
        self._mark()

    def _prepare_undo(self, quantized: bool) -> None:
        super()._prepare_undo(quantized)
        if self._undo is not None:
            self._residence.copy_to(self._undo, *(name for name, _, _ in self._biases()))

    def merged_tensor(self, name: str, value: Tensor) -> Tensor:
        value = super().merged_tensor(name, value)
        scales = {bias: scales for bias, _, scales in self._biases()}.get(name)
        return value if scales is None else _product(value, scales).to(value.dtype)

    def _saved(self) -> SavedAdapter:
        full, modules = self._saved_in_full()
        config = {
            **self._peft_config("IA3"),
            "target_modules": list(self._targets),
            "feedforward_modules": [name for name in self._targets if name in self._inputs],
            "modules_to_save": modules or None,
            "fan_in_fan_out": any(is_conv1d(module) for module in self._targets.values()),
            "init_ia3_weights": True,
        }
        return SavedAdapter(config, dict(self.own()) | full, self._extra())


def _product(value: Tensor, scales: Tensor) -> Tensor:
    """The product in float64 (fp32 on MPS, which has no float64), so that storing it is the only rounding."""
    wide = torch.float32 if value.device.type == "mps" else torch.float64
    return value.detach().to(wide) * scales.to(value.device, wide)
