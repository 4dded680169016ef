"""How an adapter beside a frozen base ends, and how it becomes files.

A method of this kind says what it needs (`_targets`, `_new_parts`, a mixin of `nn.adapted`), and has the rest
from here and from `worn`. Methods that put hooks on a model instead of swapping its layers override `own`,
`_insert` and `_remove`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import CannotDetach, CannotMerge
from trimtab.methods.attached import record_of
from trimtab.methods.folder import SAMPLE, SavedAdapter, encode_sample
from trimtab.methods.foldercheck import PEFT_TYPES
from trimtab.methods.keep import Kept
from trimtab.methods.tiedfiles import TIED, fitting, refuse_parted, tied_names
from trimtab.methods.worn import CARRY, ROLES, FrozenBase, Role, Targeted, WornAdapter, several
from trimtab.nn.adapted import check_bases, merge_report
from trimtab.nn.residence import fingerprint
from trimtab.nn.split import refuse_split
from trimtab.nn.weights import holder_of

__all__ = ["CARRY", "ROLES", "FrozenBase", "FrozenBaseAdapter", "Role", "Targeted"]


class FrozenBaseAdapter(WornAdapter):
    """A frozen base, what trains in full beside it, and the method's own parameters."""

    # -- endings -------------------------------------------------------------------------------

    def merge(self, *, quantized: bool = False) -> None:
        self._require_open("merge()")
        self._check_model("merge()")
        if self.no_merge:
            raise CannotMerge(f"method {self.config.name}: {self.no_merge}")
        if not self._alone():
            others = ", ".join(repr(name) for name in self.record.adapters if name != self.attached_name)
            raise CannotMerge(f"the model has other adapters, {others}, on the same base; detach them first")
        if self.record.active != self.attached_name:
            raise CannotMerge("this adapter is not the active one; trimtab.activate() it first")
        check_bases(self.layers)
        if quantized:
            merge_report(self.layers)
        self._record, self._name = self.record, self.attached_name
        self._prepare_undo(quantized)
        for name, layer in self.layers.items():
            if layer.base.quantized and not quantized:
                dense, module = layer.dense(self._residence.compute_dtype(name, layer)), self._targets[name]
                self._undress(name)
                self._widened.append(holder_of(module).widen(module, dense))
            else:
                layer.merge_()
        self._remove()
        if not quantized:
            self._widened += self._residence.widen()
        self._residence.settle()
        self._inserted = False
        self._mark()
        self._close("merged")

    def _prepare_undo(self, quantized: bool) -> None:
        """Keep what `unmerge` needs, if anything is to be kept; quantised weights if they are to be written into."""
        kept, plain = self._residence.kept, self._residence.parameters
        if isinstance(kept, Kept):
            self._undo = kept.another()
            self._carried = {name: carry.clone() for name, carry in self._carries().items() if name in plain}
            self._trained = list(self._residence.trained)
            targets = [n for target in self._targets if (n := f"{target}.weight") in plain or quantized]
            self._residence.copy_to(self._undo, *targets, *self._trained)

    def unmerge(self) -> None:
        if self._closed != "merged":
            raise ValueError("unmerge(): this adapter is not merged")
        if self._undo is None:
            raise CannotDetach("unmerge: no copy of the base is kept; attach with keep_base='host' or a folder")
        if record_of(self.model) is not None:
            raise CannotDetach("unmerge: the model has another adapter now; merge() or detach() that one first")
        if moved := [name for name, p in self._undone().items() if fingerprint(p) != self._marks[name]]:
            raise CannotDetach(f"unmerge: {several(moved, 'base tensors')} written into since the merge")
        for put_back in self._widened:
            put_back()
        self._widened.clear()
        self._residence.take_back(self._trained, self._undo)
        self._residence.carries.update(self._carried)
        self._undo.drop()
        self._undo = None
        self._record.put_back(self.model, self._name, self)
        self._closed = ""
        self._insert()
        self._inserted = True

    def _mark(self) -> None:
        """Take the marks by which `unmerge` sees whether somebody wrote into what the merge left."""
        self._marks = {name: fingerprint(p) for name, p in self._undone().items()}

    def _undone(self) -> dict[str, Tensor]:
        """The parameters that `unmerge` would put back."""
        plain = self._residence.parameters
        return {} if self._undo is None else {name: p for name, p in plain.items() if name in self._undo}

    def merged_tensor(self, name: str, value: Tensor) -> Tensor:
        if self.no_merge:
            raise CannotMerge(f"method {self.config.name}: {self.no_merge}")
        owner, _, leaf = name.rpartition(".")
        with self._working():
            layer = self.layers.get(owner)
            if layer is not None and leaf == "weight":
                merged: Tensor = layer.merged(value)
                return merged
            if name in self._residence.trained:
                return self._residence.parameters[name].detach().to(value.dtype)
            return value

    def detach(self) -> None:
        self._require_open("detach()")
        refuse_split(self.model, "an adapter cannot be detached", "detach before fully_shard, or use DDP")
        if self._alone():
            self._refuse_loss()
            self._residence.check_kept()
        if self._inserted:
            self._remove()
            self._inserted = False
        if self._alone():
            self._residence.hide_base()
            self._residence.restore()
        self._close("detached")

    def _refuse_loss(self) -> None:
        """Raise CannotDetach where the base cannot be given back bit for bit."""
        if lost := self._residence.lost():
            raise CannotDetach(
                f"{several(lost, 'base tensors')} written into ({self.writes_base or 'training in full'}); call "
                "merge() to keep them, load the base anew, or attach with keep_base='host'"
            )
        if narrowed := self._residence.narrowed():
            raise CannotDetach(
                f"{several(narrowed, 'weights')} stored in fewer bits than the model came with "
                f"({self._residence.parameters[narrowed[0]].dtype}); call merge(), or attach without dtype or with "
                "keep_base='host'"
            )

    # -- files ---------------------------------------------------------------------------------

    def _peft_config(self, kind: str) -> dict[str, Any]:
        """What every adapter_config.json says.

        Raises:
            CannotSave: PEFT reads files of this kind, and would part a tied weight that was trained.
        """
        if kind in PEFT_TYPES:
            refuse_parted(self, self._saved_in_full()[0])
        base = getattr(getattr(self.model, "config", None), "_name_or_path", None)
        return {"peft_type": kind, "task_type": None, "base_model_name_or_path": base, "inference_mode": True}

    def _extra(self, **values: Any) -> dict[str, Any]:
        """Our own entries of a saved adapter, the base's sample among them."""
        if full := self._saved_in_full()[0]:
            values[TIED] = tied_names(self.model, full)
        sample = self._base_sample
        return {**values, SAMPLE: encode_sample(sample)} if sample.numel() else values

    def _saved_in_full(self) -> tuple[dict[str, Tensor], list[str]]:
        """The tensors that train in full, and the modules they belong to (PEFT's modules_to_save)."""
        own = self.own()
        full = {e.name: e.parameter.detach() for e in self.trainable() if e.name not in own}
        return full, list(dict.fromkeys(name.rpartition(".")[0] for name in full))

    def load_tensors(self, saved: SavedAdapter, suffixes: Mapping[str, str]) -> None:
        """Take the tensors of a saved adapter, all of them or none.

        Args:
            saved: the folder's content.
            suffixes: endings of PEFT's names and what our names have instead: {".lora_A.weight": ".lora_A"}.

        Raises:
            CheckpointError: a tensor is missing, unknown, of another shape, or tied otherwise than in this model.
        """
        saved = replace(saved, tensors=fitting(saved, self.model))
        own, parameters = self.own(), self._residence.parameters
        known = {**parameters, **own}
        named = saved.matched(suffixes, required=own, known=known)
        self.train_in_full(name for name in named if name not in own and not parameters[name].requires_grad)
        with torch.no_grad():
            for name, tensor in named.items():
                known[name].copy_(tensor)
