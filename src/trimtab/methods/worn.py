"""What a model wears: an adapter beside a frozen base, put on, taken off, in training, and as a state.

`frozen` adds how it ends and how it becomes files; methods build on that one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.errors import CannotDetach, CheckpointError, ConfigError
from trimtab.methods.base import Adapter, AdapterState, Method, Trainable
from trimtab.methods.folder import base_sample
from trimtab.methods.keep import Kept
from trimtab.methods.parts import group_of
from trimtab.nn.adapted import Adapted, dress, plain_weights, undress
from trimtab.nn.inject import ALL_LINEAR, find_targets, parameter_roles, warn_of_rest
from trimtab.nn.present import module_at
from trimtab.nn.residence import Residence
from trimtab.nn.split import check_split, laid_out, let_go, refuse_split
from trimtab.nn.weights import Dense, holder_of

Role = Literal["embeddings", "norms", "head"]
ROLES: dict[Role, str] = {"embeddings": "embedding", "norms": "norm", "head": "head"}

#: The prefix of a carry among the tensors of a state, before its parameter's name.
CARRY = "carry:"

#: The roles of a tensor that the model did not have when the adapter came.
_NEW = frozenset({"base"})


class FrozenBase(Method):
    """Settings of a method that freezes the base.

    Args:
        train_also: what trains in full beside the adapter; None means nothing in `attach`, and
            embeddings, norms and head in `pretrain`, and a new head in `finetune`.
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

    def for_finetuning(self, seed: int, *, new_head: bool) -> FrozenBase:
        also: tuple[Role, ...] | None = ("head",) if new_head else None
        return self.model_copy(
            update={
                "train_also": also if self.train_also is None else self.train_also,
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


class WornAdapter(Adapter):
    """An adapter that a model wears: put on and taken off, in training, and as a state.

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
            if config.targets == ALL_LINEAR:
                every = find_targets(model, ALL_LINEAR) if config.exclude else self._targets
                warn_of_rest(model, every, f"targets='{ALL_LINEAR}'", "no adapter is on them")
        self._taken: dict[str, dict[str, nn.Parameter]] = {}
        self._inserted = False
        self._base_sample = base_sample(model)
        self._widened: list[Callable[[], None]] = []
        self._undo: Kept | None = None

    # -- what a method says --------------------------------------------------------------------

    def _new_parts(self, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
        """The method's own parameters for a target layer, on its device, by their names on the layer."""
        raise TypeError(f"{type(self).__name__} has targets, and no parameters for {name}")

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
        self._taken |= {name: self._new_parts(name, module) for name, module in self._targets.items()}
        self._insert()
        self._inserted = True

    def _insert(self) -> None:
        """Put the adapter on the model."""
        for name, module in self._targets.items():
            carry = self._residence.carries.pop(f"{name}.weight", None)
            base, own = holder_of(module, carry=carry, exact=not self._residence.pure), self._taken[name]
            for parameter in own.values():  # the model may have moved while the adapter was off it
                parameter.data = parameter.data.to(module.weight.device)  # type: ignore[arg-type]
            dress(module, self._mixin(module), parameters=own, base=base, **self._attributes(name, module))

    def _remove(self) -> None:
        """Take the adapter off the model; its parameters keep their identity."""
        for name, layer in self.layers.items():
            carry = layer.base.carry
            if isinstance(layer.base, Dense) and carry is not None:
                self._residence.carries[f"{name}.weight"] = carry
            self._undress(name)

    def _undress(self, name: str) -> None:
        """Take the adapter off one layer, and keep the parameters that it had."""
        taken = undress(self._targets[name])
        self._taken[name] = {leaf: taken.get(leaf, part) for leaf, part in self._taken[name].items()}

    def _suspend(self) -> None:
        self._residence.check_kept()
        if lost := self._residence.lost():
            raise CannotDetach(
                f"{several(lost, 'base tensors')} written into, and no copy is kept to go back to; "
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
        """The adapted layers by name, while they wear this adapter; another one may be on them."""
        targets = self._targets if self._inserted else {}
        return {name: module for name, module in targets.items() if isinstance(module, Adapted)}

    @property
    def _wearers(self) -> dict[str, nn.Module]:
        """The modules that the method's own parameters are put on, by name."""
        return self._targets

    @property
    def _parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """The method's own parameters by wearer and leaf: those that are there, whoever put them there."""
        if not self._inserted:
            return self._taken
        found = {}
        for name, parts in self._taken.items():
            worn = self._wearers[name]._parameters
            found[name] = {leaf: part if (now := worn.get(leaf)) is None else now for leaf, part in parts.items()}
        return found

    def own(self) -> dict[str, nn.Parameter]:
        """The method's own parameters by qualified name."""
        return {f"{name}.{leaf}": part for name, parts in self._parts.items() for leaf, part in parts.items()}

    def _check_model(self, call: str) -> None:
        try:
            if self.config.works_sharded:
                let_go(self.model)
                check_split(self.model, {entry.name: entry.parameter for entry in self.trainable()})
            else:
                refuse_split(self.model)
            self._residence.check()
            for layer in self.layers.values():
                if layer.base.carry is not None and layer.base.carry.is_meta and not layer.weight.is_meta:
                    layer.base.carry = None
            for name, module in self._wearers.items() if self._inserted else ():
                if module_at(self.model, name) is not module:
                    raise ConfigError(
                        f"{name} is another module than the one that the adapter is on, so it has none "
                        "(resize_token_embeddings puts a new head in); change the model first and attach then"
                    )
                if gone := [leaf for leaf in self._taken[name] if module._parameters.get(leaf) is None]:
                    raise ConfigError(f"the adapter's {name}.{gone[0]} is gone from the model; attach a new adapter")
        except ConfigError as error:
            raise ConfigError(f"{call}: {error}") from None

    def trainable(self) -> list[Trainable]:
        own = self.own()
        named = dict(self.model.named_parameters()) if self._inserted else {}
        named |= {name: self._residence.parameters[name] for name in self._residence.trained}
        named |= own
        return [
            Trainable(name, parameter, "adapter" if name in own else group_of(self._roles.get(name, _NEW)))
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
        self._require_open("state_dict()")
        self._check_model("state_dict()")
        with self.record.at_work(self.attached_name):
            tensors = {entry.name: entry.parameter.detach() for entry in self.trainable()}
            tensors.update({CARRY + name: carry for name, carry in self._carries().items()})
            return AdapterState(tensors, {"last_step": self._last_step, **self._meta()})

    def load_state_dict(self, state: AdapterState) -> None:
        self._require_open("load_state_dict()")
        self._check_model("load_state_dict()")
        with self.record.at_work(self.attached_name):
            self._load(state)

    def _load(self, state: AdapterState) -> None:
        last_step = state.meta.get("last_step")
        if not isinstance(last_step, int) or isinstance(last_step, bool):
            raise CheckpointError(f"the stored state is damaged: last_step = {last_step!r} is no number of steps")
        try:
            self._take_meta(state.meta)
        except KeyError as error:
            raise CheckpointError(f"the stored state is of another method: it lacks {error}") from None
        trained = {entry.name: entry.parameter for entry in self.trainable()}
        carries = {key.removeprefix(CARRY): t for key, t in state.tensors.items() if key.startswith(CARRY)}
        self._check_state({k: t for k, t in state.tensors.items() if not k.startswith(CARRY)}, trained, carries)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(laid_out(state.tensors[name], parameter))
        self._residence.carries.clear()
        layers = self.layers
        for layer in layers.values():
            layer.base.carry = None
        for name, tensor in carries.items():
            layer = layers.get(name.removesuffix(".weight"))
            weight = self._residence.parameters[name] if layer is None else layer.weight
            carry = torch.empty_like(tensor, device="cpu", pin_memory=weight.device.type == "cuda").copy_(tensor)
            if layer is None:
                self._residence.carries[name] = carry
            else:
                layer.base.carry = carry
        self._last_step = last_step

    def _check_state(
        self, stored: Mapping[str, Tensor], trained: Mapping[str, Tensor], carries: Mapping[str, Tensor]
    ) -> None:
        """Refuse a state that does not go with the model, before anything is written."""
        if odd := sorted(set(stored) ^ set(trained)):
            raise CheckpointError(
                f"the stored state is of another model or method: {len(odd)} names differ, {odd[0]} first"
            )
        weights = {f"{name}.weight": layer.weight for name, layer in self.layers.items() if not layer.base.quantized}
        shapes = {name: (tensor, trained[name]) for name, tensor in stored.items()}
        for name, carry in carries.items():
            if name not in self._residence.parameters and name.removesuffix(".weight") not in self.layers:
                raise CheckpointError(f"the stored state has a carry of {name}, which the model lacks")
            known = weights.get(name, self._residence.parameters.get(name))
            shapes |= {} if known is None else {CARRY + name: (carry, known)}
        for name, (tensor, here) in shapes.items():
            if tensor.shape != here.shape:
                raise CheckpointError(
                    f"the stored state is of another model: {name} is {tuple(tensor.shape)} there and "
                    f"{tuple(here.shape)} here"
                )

    def effective_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self._values(lambda layer: layer.effective_weight())

    def base_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self._values(lambda layer: layer.base_weight())

    def updated(self) -> list[str]:
        return [f"{name}.weight" for name in self._updated()]

    def _values(self, of: Callable[[Any], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Name and fp32 value of each matrix that the method updates; `of` gives those of adapted layers."""
        for name, module in self._updated().items():
            with self._working():  # for each anew: between two of them the model is as its user left it
                layer = self.layers.get(name)
                known = plain_weights({name: module}) if layer is None else [(f"{name}.weight", of(layer))]
                found = list(known)
            yield from found

    def _updated(self) -> dict[str, nn.Module]:
        """The layers whose matrices the method updates, by name."""
        return self._targets

    def _working(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the adapter is at work, unless its life is over."""
        return contextlib.nullcontext() if self._closed else self.record.at_work(self.attached_name)


def several(names: list[str], what: str) -> str:
    """`a`, or `a and 3 more <what>`, with the verb that goes with it."""
    return f"{names[0]} was" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more {what} were"
