"""BitFit (arXiv 2106.10199): train the biases, and nothing else but what `train_also` names (the head of a task).

Biases are tensors of the base, so this edits the base: with `keep_base` it can be taken back. Models without biases
(LLaMA, T5) can be given new ones, which start at zero and are the adapter's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from trimtab.errors import CheckpointError, TargetError
from trimtab.methods.base import Adapter
from trimtab.methods.folder import SavedAdapter, reading_config, refuse_unknown
from trimtab.methods.frozen import FrozenBase, FrozenBaseAdapter
from trimtab.nn.addedbias import AddedBiasMixin
from trimtab.nn.inject import ALL_LINEAR, find_targets, is_linear
from trimtab.nn.residence import Residence
from trimtab.nn.weights import shape_of

ALL: Final = "all"

#: What our files call it: PEFT has no such method.
FILE_TYPE = "TRIMTAB_BITFIT"


class BitFit(FrozenBase):
    """Train biases.

    Args:
        biases: "all" (norms' and the head's among them), or a list of name endings, of biases ("query.bias") or of
            the layers that they belong to ("query", "intermediate.dense").
        add_bias: give linear layers that have no bias one that starts at zero: those of the blocks, or those that
            `biases` names. It is kept beside the model, which cannot be merged then.

    `train_also` is as for every method that freezes the base. Nothing is drawn, so `seed` has no effect.
    """

    abstract = False
    name: Literal["bitfit"] = "bitfit"
    biases: Literal["all"] | tuple[str, ...] = ALL
    add_bias: bool = False

    @property
    def writes_base(self) -> str:
        return "biases train"

    def idle_settings(self) -> dict[str, str]:
        return {} if self.seed is None else {"seed": "BitFit draws nothing: what it adds starts at zero"}

    def chosen(self, model: nn.Module) -> tuple[list[str], dict[str, nn.Module]]:
        """The names of the model's biases to train, and the linear layers to give a bias to.

        Raises:
            TargetError: there is nothing to train, or an ending matches nothing.
        """
        known = [name for name, p in model.named_parameters() if _is_bias(name, p)]
        bare = {n: m for n, m in model.named_modules() if is_linear(m) and getattr(m, "bias", None) is None}
        bare = bare if self.add_bias else {}
        if self.biases == ALL:
            if bare:
                blocks = find_targets(model, ALL_LINEAR)
                bare = {name: module for name, module in bare.items() if name in blocks}
            if not known and not bare:
                raise TargetError(
                    f"{type(model).__name__} has no biases to train; add_bias=True gives its linear layers new ones, "
                    "which start at zero"
                )
            return known, bare
        if not self.biases:
            raise TargetError(f"biases is an empty list; name endings, or use '{ALL}'")
        for ending in self.biases:
            if not any(_belongs(name, ending) for name in known) and not any(_ends(name, ending) for name in bare):
                raise TargetError(f"biases: {ending!r} matches no bias; {_closest(ending, [*known, *bare], model)}")
        trained = [name for name in known if any(_belongs(name, ending) for ending in self.biases)]
        return trained, {n: m for n, m in bare.items() if any(_ends(n, ending) for ending in self.biases)}

    @property
    def no_merge(self) -> str:
        if not self.add_bias:
            return ""
        return (
            "add_bias gave biases to layers that have none, and a checkpoint of this model has no place for them: "
            "whoever loads it would lose them. Use save() and trimtab.load_adapter()"
        )

    def _attach(self, model: nn.Module, residence: Residence) -> BitFitAdapter:
        return BitFitAdapter(model, self, residence)

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> BitFit | None:
        if saved.get("peft_type") != FILE_TYPE:
            return None
        refuse_unknown(dict(saved), {"biases", "add_bias", "train_also"})
        with reading_config():
            return cls(**{key: saved[key] for key in ("biases", "add_bias", "train_also")})

    def load_saved(self, adapter: Adapter, saved: SavedAdapter) -> None:
        assert isinstance(adapter, BitFitAdapter)
        trained = {entry.name for entry in adapter.trainable()}
        if odd := sorted(trained ^ set(saved.tensors)):
            what = "lacks" if odd[0] in trained else "has, but does not train here,"
            raise CheckpointError(f"the adapter is of another base: it {what} {odd[0]}")
        adapter.load_tensors(saved, {})


def _is_bias(name: str, parameter: nn.Parameter) -> bool:
    """A vector called "bias", or "..._bias" as those of nn.MultiheadAttention are."""
    leaf = name.rpartition(".")[2]
    return parameter.dim() == 1 and parameter.is_floating_point() and (leaf == "bias" or leaf.endswith("_bias"))


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _belongs(bias: str, ending: str) -> bool:
    """Whether an ending names a bias or the layer that has it."""
    return _ends(bias, ending) or _ends(bias.rpartition(".")[0], ending)


def _closest(wanted: str, known: Iterable[str], model: nn.Module) -> str:
    names = sorted({name.removesuffix(".bias").rpartition(".")[2] for name in known})
    if not names:
        return f"{type(model).__name__} has none; add_bias=True gives linear layers new ones"
    near = difflib.get_close_matches(wanted.removesuffix(".bias").rpartition(".")[2], names, n=4, cutoff=0.3)
    return f"the closest names are {', '.join(near or names[:8])}"


class BitFitAdapter(FrozenBaseAdapter):
    """The biases of a model, in training."""

    config: BitFit
    mixin = AddedBiasMixin

    def __init__(self, model: nn.Module, config: BitFit, residence: Residence) -> None:
        super().__init__(model, config, residence)
        self._biases, self._targets = config.chosen(model)
        self._begin()

    def _in_full(self) -> Iterable[str]:
        return [*self._biases, *super()._in_full()]

    def _new_parts(self, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
        weight = module.weight
        assert isinstance(weight, Tensor)
        dtype = self._residence.held_dtype(self._residence.compute_dtype(name, module))
        return {"added_bias": nn.Parameter(torch.zeros(shape_of(module)[0], dtype=dtype, device=weight.device))}

    @property
    def writes_base(self) -> str:
        trained = self._residence.trained
        return f"{trained[0]} trains" if trained else ""

    def _updated(self) -> dict[str, nn.Module]:
        return {}  # no matrix of the base is

    @property
    def no_merge(self) -> str:
        return self.config.no_merge if self._targets else ""  # each layer may have had a bias of its own

    def _saved(self) -> SavedAdapter:
        full, _ = self._saved_in_full()
        config = {
            **self._peft_config(FILE_TYPE),
            "biases": self.config.biases if self.config.biases == ALL else list(self.config.biases),
            "add_bias": self.config.add_bias,
            "train_also": None if self.config.train_also is None else list(self.config.train_also),
        }
        return SavedAdapter(config, dict(self.own()) | full, self._extra())
