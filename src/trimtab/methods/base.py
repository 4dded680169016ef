"""The contract of a method, and the registry of methods.

A method is two things: a frozen config (`Method`), which is data, and the live `Adapter` that the
config makes when it is attached to a model. The training loop knows only what is on this page:

    config.attach(model)            freeze, inject, mark what trains
    adapter.parameter_groups(lr)    what the optimizer gets
    adapter.after_step(step, opt)   restarts, budget changes, the end of a warm start
    adapter.restarts(total_steps)   the list of steps that the schedule reads, too

Nothing outside a method's own file knows its name: a config tree, the command line and the loop
reach methods through `registry()` alone.
"""

from __future__ import annotations

import abc
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, SerializeAsAny, ValidationError
from torch import nn

from trimtab.errors import CheckpointError, ConfigError
from trimtab.methods.folder import read_adapter_folder
from trimtab.settings import Settings

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(Settings)

#: What a trained tensor is, in the order in which `parameter_groups` returns the groups.
GROUPS = ("adapter", "embedding", "norm", "head", "base")

#: Where a model keeps the adapters attached to it, by their names.
_ATTACHED = "_trimtab_adapters"

_REGISTRY: dict[str, type[Method]] = {}


def group_of(roles: frozenset[str]) -> str:
    """The group of a tensor with these roles; a tied embedding and head counts as embedding."""
    return next(group for group in GROUPS if group in roles)


@dataclass(frozen=True)
class Trainable:
    """One trained tensor: its qualified name in the model, the parameter, and its group."""

    name: str
    parameter: nn.Parameter
    group: str


@dataclass(frozen=True)
class StepReport:
    """What `after_step` did.

    `trainable_changed` tells a loop that the set of trained tensors is another one now (the end of a
    warm start): the optimizer's groups are already rewritten in place, and anything that was derived
    from the old set (a printed table, a wrapper) is stale. `events` are plain dictionaries with an
    `event` key, to be logged as they are; `{"event": "restart", ...}` is the one that plots mark.
    """

    trainable_changed: bool = False
    events: tuple[dict[str, Any], ...] = ()


@dataclass
class AdapterState:
    """What a method stores beyond the frozen base: tensors by name, and plain JSON values."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


class _OneLine(ModelMetaclass):
    """Calling a config's class with wrong settings is a ConfigError of one line.

    Validation of a tree of settings does not come by here, so that the tree still knows where it went wrong.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise _misfit(cls, error) from None


def _misfit(method: Any, error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    key, known = str(first["loc"][0]), list(method.model_fields)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1)
        what = f"is no setting of it; did you mean {near[0]}?" if near else f"is no setting of it: {', '.join(known)}"
    elif first["type"] == "missing":
        what = "is missing; it has no default"
    else:
        what = f"= {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return ConfigError(f"{method.__name__}: {key} {what}")


class Method(Settings, abc.ABC, metaclass=_OneLine):
    """A frozen config of one method; subclasses are registered by the default of their `name`."""

    name: str

    #: Set by a subclass that is no method of its own.
    abstract: ClassVar[bool] = True

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if not cls.__dict__.get("abstract", False):
            _REGISTRY[cls.model_fields["name"].default] = cls

    @abc.abstractmethod
    def attach(self, model: nn.Module, *, dtype: torch.dtype | None = None, pure: bool = False) -> Adapter:
        """Edit `model` in place and return the live adapter.

        Args:
            model: any module; `model(**batch)` keeps working.
            dtype: compute dtype, and storage dtype of frozen weights. None keeps each weight's own.
            pure: hold trained tensors in the compute dtype as well, instead of fp32.

        Raises:
            TargetError: a target matches nothing that can be adapted.
        """

    @property
    def switch_step(self) -> int:
        """Steps of full-rank training before the adapter comes into being; 0 for none."""
        return 0

    def idle_settings(self) -> dict[str, str]:
        """Settings that were given and have no effect, each with the reason."""
        return {}

    def check_length(self, total_steps: int) -> tuple[str, str] | None:
        """A setting that does not go with a run of `total_steps`, and what is wrong with it; None when all do."""
        return None

    @property
    def update_rank(self) -> int | None:
        """The highest rank that a matrix's update can have between two restarts; None where nothing bounds it."""
        return None

    def restarts(self, total_steps: int, rewarm_steps: int = 0) -> tuple[int, ...]:
        """The completed-step counts after which a restart happens in a run of `total_steps`.

        None lies at the end, and none leaves a last cycle shorter than `rewarm_steps`.
        """
        return ()

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> Method | None:
        """The config of an adapter folder's `adapter_config.json`, or None when it is another method's."""
        return None

    def load_saved(self, adapter: Adapter, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put the tensors of an adapter folder into `adapter`, which this config has just attached."""
        raise CheckpointError(f"method {self.name} has no adapter files")

    def for_pretraining(self, seed: int) -> Method:
        """This config with the defaults that hold in pre-training filled in."""
        return self


class Adapter(abc.ABC):
    """A method at work on a model.

    Attributes:
        model: the edited model.
        config: the method's config.
    """

    def __init__(self, model: nn.Module, config: Method) -> None:
        self.model = model
        self.config = config
        self._last_step = 0
        self._closed = ""

    def __repr__(self) -> str:
        trained = sum(entry.parameter.numel() for entry in self.trainable())
        state = self._closed or f"step {self._last_step}, {trained:,} parameters train"
        return f"<{type(self).__name__} on {type(self.model).__name__}: {self.config!r}; {state}>"

    # -- what trains ---------------------------------------------------------------------------

    @abc.abstractmethod
    def trainable(self) -> list[Trainable]:
        """The tensors that train now, tied ones once, in the model's order."""

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for a torch optimizer: always one for each of `GROUPS`, in that order.

        A group may be empty. Each has the keys `params`, `lr`, `weight_decay`, `group` (its name) and
        `names` (the parameters' names, in the order of `params`); optimizers carry the last two along.
        """
        groups: list[dict[str, Any]] = [
            {"params": [], "names": [], "group": group, "lr": lr, "weight_decay": weight_decay} for group in GROUPS
        ]
        by_name = {group["group"]: group for group in groups}
        for entry in self.trainable():
            by_name[entry.group]["params"].append(entry.parameter)
            by_name[entry.group]["names"].append(entry.name)
        return groups

    # -- the loop's calls ----------------------------------------------------------------------

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> StepReport:
        """Do what the method does between two steps. Call it after every `optimizer.step()`.

        Args:
            step: the number of completed optimizer steps, from 1.
            optimizer: built from `parameter_groups`.

        Raises:
            ValueError: `step` does not follow the step of the previous call.
        """
        if step <= self._last_step:
            raise ValueError(
                f"after_step({step}) follows after_step({self._last_step}): it takes the number of completed "
                f"optimizer steps, each number once and in rising order; the next one is {self._last_step + 1}"
            )
        if self._closed:
            raise ValueError(f"after_step({step}): this adapter was {self._closed}; attach a new one to go on")
        report = self._after_step(step, optimizer)
        self._last_step = step
        return report

    def _after_step(self, step: int, optimizer: torch.optim.Optimizer) -> StepReport:
        return StepReport()

    def restarts(self, total_steps: int, rewarm_steps: int = 0) -> tuple[int, ...]:
        """The restarts of a run of `total_steps`; from now on `after_step` restarts at exactly these."""
        return self.config.restarts(total_steps, rewarm_steps)

    def catch_up(self, optimizer: torch.optim.Optimizer) -> StepReport:
        """After a state was loaded: do what is due at its step and was not done, since its run ended there."""
        return StepReport()

    def extra_loss(self) -> torch.Tensor | None:
        """A term to add to the loss of each micro-batch's share, or None."""
        return None

    # -- state and endings ---------------------------------------------------------------------

    @abc.abstractmethod
    def state_dict(self) -> AdapterState:
        """All that must be stored beyond the frozen base to continue: tensors (not copies) and counters.

        A key of `tensors` that is also a name in `model.named_parameters()` is that parameter; what the
        model holds under names that are not in `tensors` is the frozen base.
        """

    @abc.abstractmethod
    def load_state_dict(self, state: AdapterState) -> None:
        """Take up a state of `state_dict`, on an adapter just attached with the same config.

        It first brings the model into the state's phase (after the end of a warm start the trained set
        is another one), so build the optimizer from `parameter_groups` after this call.
        """

    @abc.abstractmethod
    def effective_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and fp32 value on the CPU of each matrix that the method updates, one at a time.

        The value is what a merge would give before rounding (W + carry + s B A for the LoRA family), so
        the difference of two calls is the update between them.
        """

    @abc.abstractmethod
    def merge(self) -> None:
        """Fold everything into the base, rounded once, and leave a plain model of the compute dtype.

        Raises:
            CannotMerge: the method has no merged form.
        """

    @abc.abstractmethod
    def detach(self) -> None:
        """Remove the adapter and give the untouched base back, bit for bit.

        Raises:
            CannotDetach: something was written into the base; the message names it and the way out.
        """

    @abc.abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the adapter as a folder that `trimtab.load_adapter` reads, in PEFT's layout where it has one."""

    def _close(self, how: str) -> None:
        """The adapter's end: the model is free for another one."""
        self._closed = how
        attached = self.model.__dict__.get(_ATTACHED, {})
        for name in [name for name, adapter in attached.items() if adapter is self]:
            del attached[name]


def registry() -> dict[str, type[Method]]:
    """The known methods by name."""
    return dict(_REGISTRY)


def parse_method(value: Method | Mapping[str, Any]) -> Method:
    """A config as it is, or one made from a mapping such as `{"name": "relora", "rank": 128}`.

    Raises:
        ConfigError: the mapping has no known `name`.
        pydantic.ValidationError: a setting of the named method is unknown or out of range.
    """
    if isinstance(value, Method):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"a method is a config or a mapping with a `name`, got {type(value).__name__}")
    name = value.get("name")
    if name not in _REGISTRY:
        raise ConfigError(f"name: no method is called {name!r}; the methods are {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name].model_validate(dict(value))


def _from_user(config: Method | Mapping[str, Any]) -> Method:
    """As `parse_method`, with every mistake as a ConfigError of one line."""
    try:
        return parse_method(config)
    except ValidationError as error:
        assert isinstance(config, Mapping)
        raise _misfit(_REGISTRY[config["name"]], error) from None


#: A field of a settings tree that holds any registered method, given as a config or a mapping.
MethodField = Annotated[SerializeAsAny[Method], BeforeValidator(parse_method)]


def attach(
    model: nn.Module,
    config: Method | Mapping[str, Any],
    *,
    name: str = "default",
    dtype: torch.dtype | None = None,
    pure: bool = False,
) -> Adapter:
    """Put a method to work on a model, in place; `model(**batch)` keeps working.

    Args:
        model: any module with linear layers.
        config: a method's config, or a mapping such as `{"name": "relora", "restart_every": 1000}`.
        name: the adapter's name on this model.
        dtype: compute dtype, and storage dtype of frozen weights; None keeps what each weight has. What
            trains is held in fp32 in either case.
        pure: hold what trains in the compute dtype as well (small updates are then lost in bf16).

    Raises:
        ConfigError: the model already has an adapter, or the mapping is none of a method.
        TargetError: the targets match nothing that can be adapted.
    """
    attached = model.__dict__.setdefault(_ATTACHED, {})
    if attached:
        raise ConfigError(
            f"name={name!r}: the model already has the adapter {next(iter(attached))!r}; merge() or detach() it first"
        )
    adapter = _from_user(config).attach(model, dtype=dtype, pure=pure)
    attached[name] = adapter
    return adapter


def load_adapter(model: nn.Module, path: str | Path, *, name: str = "default") -> Adapter:
    """Attach an adapter folder that `Adapter.save` (or PEFT) wrote.

    Raises:
        CheckpointError: the folder is missing, damaged, of no known method, or of another base.
    """
    saved, tensors = read_adapter_folder(Path(path))
    for method in _REGISTRY.values():
        config = method.from_saved(saved)
        if config is not None:
            adapter = attach(model, config, name=name)
            try:
                config.load_saved(adapter, tensors)
            except BaseException:
                adapter.detach()
                raise
            return adapter
    kind = saved.get("peft_type")
    raise CheckpointError(
        f"{path}: no known method has peft_type {kind!r}; known methods: {', '.join(sorted(_REGISTRY))}"
    )
