"""What all methods share that freeze the base and train something beside it.

A method of this kind says what it needs (`_targets`, `_new_parts`, a mixin of `nn.adapted`), and has the rest
from here: which tensors train, state, merge and unmerge, detach, switching off. Methods that put hooks on a
model instead of swapping its layers override `own`, `_insert` and `_remove`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.errors import CannotDetach, CannotMerge, CheckpointError, ConfigError
from trimtab.methods.attached import record_of
from trimtab.methods.base import Adapter, AdapterState, Method, Trainable, group_of
from trimtab.methods.folder import SAMPLE, SavedAdapter, base_sample, encode_sample
from trimtab.methods.keep import Kept
from trimtab.nn.adapted import Adapted, dress, merge_report, plain_weights, undress
from trimtab.nn.inject import ALL_LINEAR, find_targets, parameter_roles
from trimtab.nn.residence import Residence
from trimtab.nn.weights import Dense, holder_of

Role = Literal["embeddings", "norms", "head"]
ROLES: dict[Role, str] = {"embeddings": "embedding", "norms": "norm", "head": "head"}

#: The prefix of a carry among the tensors of a state, before its parameter's name.
CARRY = "carry:"


class FrozenBase(Method):
    """Settings of a method that freezes the base.

    Args:
        train_also: what trains in full beside the adapter; None means nothing in `attach`, and
            embeddings, norms and head in `pretrain`.
        seed: of what is drawn at the start; None is 0 in `attach`, and the run's seed in `pretrain`.
    """

    abstract: ClassVar[bool] = True
    train_also: tuple[Role, ...] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None

    @property
    def trained_roles(self) -> frozenset[str]:
        """The roles of the tensors that train in full beside the adapter."""
        return frozenset(ROLES[role] for role in self.train_also or ())

    @property
    def writes_base(self) -> str:
        return f"train_also={list(self.train_also)}" if self.train_also else ""

    def for_pretraining(self, seed: int) -> FrozenBase:
        return self.model_copy(
            update={
                "train_also": tuple(ROLES) if self.train_also is None else self.train_also,
                "seed": seed if self.seed is None else self.seed,
            }
        )


class Targeted(FrozenBase):
    """Settings of a method that adapts linear layers.

    Args:
        targets: "all-linear" (every linear of the blocks, not the head), a list of name endings, or a
            regular expression that matches a whole qualified name.
        exclude: name endings that are left out.
    """

    abstract: ClassVar[bool] = True
    targets: str | tuple[str, ...] = ALL_LINEAR
    exclude: tuple[str, ...] = ()


class FrozenBaseAdapter(Adapter):
    """A frozen base, what trains in full beside it, and the method's own parameters.

    Attributes:
        mixin: what the adapted layers wear, for methods made of layers.
        embeddings: whether targets may name embeddings, too.
    """

    mixin: ClassVar[type[Adapted]] = Adapted
    embeddings: ClassVar[bool] = False

    def __init__(self, model: nn.Module, config: Method, residence: Residence) -> None:
        super().__init__(model, config)
        self._residence = residence
        self._roles = parameter_roles(model)
        self._targets: dict[str, nn.Module] = {}
        if isinstance(config, Targeted):
            self._targets = find_targets(model, config.targets, config.exclude, embeddings=self.embeddings)
        self._parts: dict[str, dict[str, nn.Parameter]] = {}
        self._inserted = False
        self._base_sample = base_sample(model)
        self._widened: list[Callable[[], None]] = []
        self._undo: Kept | None = None

    # -- what a method says --------------------------------------------------------------------

    def _new_parts(self, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
        """The method's own parameters for a target layer, on its device, by their names on the layer."""
        raise NotImplementedError

    def _mixin(self, module: nn.Module) -> type[Adapted]:
        """What a target layer wears."""
        return self.mixin

    def _attributes(self, name: str, module: nn.Module) -> dict[str, Any]:
        """Plain attributes that the layer's forward reads."""
        return {}

    def _in_full(self) -> Iterable[str]:
        """The base's tensors that train, by name."""
        wanted = self.config.trained_roles if isinstance(self.config, FrozenBase) else frozenset()
        return [name for name, roles in self._roles.items() if roles & wanted]

    # -- putting it on -------------------------------------------------------------------------

    def _begin(self) -> None:
        """Freeze the base, let go what trains in full, and put the adapter on."""
        parameters, trained = self._residence.parameters, set(self._in_full())
        self._residence.freeze(name for name in parameters if name not in trained)
        self._residence.train(name for name in parameters if name in trained)
        self._parts = {name: self._new_parts(name, module) for name, module in self._targets.items()}
        self._insert()
        self._inserted = True

    def _insert(self) -> None:
        """Put the adapter on the model."""
        for name, module in self._targets.items():
            carry = self._residence.carries.pop(f"{name}.weight", None)
            base, own = holder_of(module, carry=carry, exact=not self._residence.pure), self._parts[name]
            dress(module, self._mixin(module), parameters=own, base=base, **self._attributes(name, module))

    def _remove(self) -> None:
        """Take the adapter off the model; its parameters keep their identity."""
        for name, layer in self.layers.items():
            carry = layer.base.carry
            if isinstance(layer.base, Dense) and carry is not None:
                self._residence.carries[f"{name}.weight"] = carry
            undress(self._targets[name])

    def _suspend(self) -> None:
        if lost := self._residence.lost():
            raise CannotDetach(
                f"{_several(lost, 'base tensors')} written into, and no copy is kept to go back to; "
                "attach with keep_base='host' or keep_base=<folder>"
            )
        self._remove()
        self._inserted = False
        self._residence.show_base()

    def _resume(self) -> None:
        self._residence.hide_base()
        self._insert()
        self._inserted = True

    def train_in_full(self, names: Iterable[str]) -> None:
        """Let further tensors of the model train beside the adapter, by name.

        Raises:
            ConfigError: another adapter is on the model, which would see its base change.
        """
        names = list(names)
        if not names:
            return
        if not self._alone():
            raise ConfigError(
                f"{names[0]} cannot train in full: the model has other adapters, and it is their base, too"
            )
        self._remove()
        self._residence.train(names)
        self._insert()

    # -- what trains ---------------------------------------------------------------------------

    @property
    def writes_base(self) -> str:
        trained = self._residence.trained
        return self.config.writes_base or (f"{trained[0]} trains in full" if trained else "")

    @property
    def layers(self) -> dict[str, Any]:
        """The adapted layers by name, while they wear the adapter."""
        return {name: module for name, module in self._targets.items() if isinstance(module, Adapted)}

    def own(self) -> dict[str, nn.Parameter]:
        """The method's own parameters by qualified name."""
        return {f"{name}.{leaf}": part for name, parts in self._parts.items() for leaf, part in parts.items()}

    def trainable(self) -> list[Trainable]:
        own = self.own()
        named = dict(self.model.named_parameters()) if self._inserted else {}
        named |= {name: self._residence.parameters[name] for name in self._residence.trained}
        named |= own
        return [
            Trainable(name, parameter, "adapter" if name in own else group_of(self._roles[name]))
            for name, parameter in named.items()
            if parameter.requires_grad
        ]

    # -- state ---------------------------------------------------------------------------------

    def _carries(self) -> dict[str, Tensor]:
        """The carries by parameter name, those of adapted and those of other frozen weights."""
        held = {f"{name}.weight": layer.base.carry for name, layer in self.layers.items()}
        return {name: c for name, c in {**self._residence.carries, **held}.items() if c is not None}

    def _meta(self) -> dict[str, Any]:
        """Counters of the method; plain JSON values."""
        return {}

    def _take_meta(self, meta: Mapping[str, Any]) -> None:
        """Take up what `_meta` gave, before the tensors are loaded."""

    def state_dict(self) -> AdapterState:
        tensors = {entry.name: entry.parameter.detach() for entry in self.trainable()}
        tensors.update({CARRY + name: carry for name, carry in self._carries().items()})
        return AdapterState(tensors, {"last_step": self._last_step, **self._meta()})

    def load_state_dict(self, state: AdapterState) -> None:
        self._take_meta(state.meta)
        trained = {entry.name: entry.parameter for entry in self.trainable()}
        stored = {name for name in state.tensors if not name.startswith(CARRY)}
        if stored != set(trained):
            odd = sorted(stored ^ set(trained))
            raise CheckpointError(
                f"the stored state is of another model or method: {len(odd)} names differ, {odd[0]} first"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state.tensors[name])
        self._residence.carries.clear()
        layers = self.layers
        for layer in layers.values():
            layer.base.carry = None
        for key, tensor in state.tensors.items():
            if not key.startswith(CARRY):
                continue
            name = key.removeprefix(CARRY)
            layer = layers.get(name.removesuffix(".weight"))
            weight = self._residence.parameters[name] if layer is None else layer.weight
            carry = torch.empty_like(tensor, device="cpu", pin_memory=weight.device.type == "cuda").copy_(tensor)
            if layer is None:
                self._residence.carries[name] = carry
            else:
                layer.base.carry = carry
        self._last_step = int(state.meta["last_step"])

    def effective_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self._targets.items():
            if isinstance(module, Adapted):
                yield f"{name}.weight", module.effective_weight()
            else:
                yield from plain_weights({name: module})

    # -- endings -------------------------------------------------------------------------------

    def merge(self, *, quantized: bool = False) -> None:
        self._require_open("merge()")
        if self.no_merge:
            raise CannotMerge(f"method {self.config.name}: {self.no_merge}")
        if not self._alone():
            others = ", ".join(repr(name) for name in self.record.adapters if name != self.attached_name)
            raise CannotMerge(f"the model has other adapters, {others}, on the same base; detach them first")
        if self.record.active != self.attached_name:
            raise CannotMerge("this adapter is not the active one; trimtab.activate() it first")
        if quantized:
            merge_report(self.layers)
        self._record, self._name = self.record, self.attached_name
        self._prepare_undo(quantized)
        for name, layer in self.layers.items():
            if layer.base.quantized and not quantized:
                dense, module = layer.dense(self._residence.compute_dtype(name, layer)), self._targets[name]
                undress(module)
                self._widened.append(holder_of(module).widen(module, dense))
            else:
                layer.merge_()
        self._remove()
        if not quantized:
            self._widened += self._residence.widen()
        self._residence.settle()
        self._inserted = False
        self._close("merged")

    def _prepare_undo(self, quantized: bool) -> None:
        """Keep what `unmerge` needs, if anything is to be kept; quantised weights if they are to be written into."""
        kept, plain = self._residence.kept, self._residence.parameters
        if isinstance(kept, Kept):
            self._undo = kept.another("merged")
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

    def merged_tensor(self, name: str, value: Tensor) -> Tensor:
        if self.no_merge:
            raise CannotMerge(f"method {self.config.name}: {self.no_merge}")
        owner, _, leaf = name.rpartition(".")
        layer = self.layers.get(owner)
        if layer is not None and leaf == "weight":
            merged: Tensor = layer.merged(value)
            return merged
        if name in self._residence.trained:
            return self._residence.parameters[name].detach().to(value.dtype)
        return value

    def detach(self) -> None:
        self._require_open("detach()")
        if self._alone():
            self._refuse_loss()
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
                f"{_several(lost, 'base tensors')} written into ({self.writes_base or 'training in full'}); call "
                "merge() to keep them, load the base anew, or attach with keep_base='host'"
            )
        if narrowed := self._residence.narrowed():
            raise CannotDetach(
                f"{_several(narrowed, 'weights')} stored in fewer bits (dtype="
                f"{self._residence.compute[narrowed[0]]}); call merge(), or attach without "
                "dtype or with keep_base='host'"
            )

    # -- files ---------------------------------------------------------------------------------

    def _peft_config(self, kind: str) -> dict[str, Any]:
        """What every adapter_config.json says."""
        base = getattr(getattr(self.model, "config", None), "_name_or_path", None)
        return {"peft_type": kind, "task_type": None, "base_model_name_or_path": base, "inference_mode": True}

    def _extra(self, **values: Any) -> dict[str, Any]:
        """Our own entries of a saved adapter, the base's sample among them."""
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
            CheckpointError: a tensor is missing, unknown, or of another shape.
        """
        own, parameters = self.own(), self._residence.parameters
        known = {**parameters, **own}
        named = saved.matched(suffixes, required=own, known=known)
        self.train_in_full(name for name in named if name not in own and not parameters[name].requires_grad)
        with torch.no_grad():
            for name, tensor in named.items():
                known[name].copy_(tensor)


def _several(names: list[str], what: str) -> str:
    """`a`, or `a and 3 more <what>`, with the verb that goes with it."""
    return f"{names[0]} was" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more {what} were"
