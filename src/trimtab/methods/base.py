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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from trimtab.errors import CannotDetach, CannotMerge, CannotSave, CheckpointError, ConfigError
from trimtab.methods.attached import place
from trimtab.methods.folder import SavedAdapter, write_together
from trimtab.methods.oneline import OneLine
from trimtab.methods.parts import GROUPS, AdapterState, StepReport, Trainable
from trimtab.methods.placed import Placed
from trimtab.methods.watch import Watch
from trimtab.nn.residence import Residence
from trimtab.settings import Settings, check_whole

__all__ = ["GROUPS", "REGISTRY", "Adapter", "AdapterState", "Method", "StepReport", "Trainable"]

#: The methods by name; read it through `registry.registry()`.
REGISTRY: dict[str, type[Method]] = {}


class Method(Settings, abc.ABC, metaclass=OneLine):
    """A frozen config of one method; subclasses are registered by the default of their `name`."""

    name: str

    #: Set by a subclass that is no method of its own.
    abstract: ClassVar[bool] = True

    #: Whether it works on a model that FSDP2 (`fully_shard`) splits over processes after it was attached.
    works_sharded: ClassVar[bool] = False

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if not cls.__dict__.get("abstract", False):
            REGISTRY[cls.model_fields["name"].default] = cls

    def attach(
        self,
        model: nn.Module,
        *,
        name: str = "default",
        dtype: torch.dtype | None = None,
        pure: bool = False,
        keep_base: str | Path | None = None,
    ) -> Adapter:
        """Edit `model` in place and return the live adapter, which is the active one from now on; see `attach`."""
        return place(model, self, name=name, dtype=dtype, pure=pure, keep_base=keep_base)

    @abc.abstractmethod
    def _attach(self, model: nn.Module, residence: Residence) -> Adapter:
        """Freeze, inject, mark what trains. Whatever can be wrong is found before anything is edited.

        Raises:
            TargetError: a target matches nothing that can be adapted.
        """

    @property
    def writes_base(self) -> str:
        """The setting by which this method changes tensors of the base; empty when it leaves them alone."""
        return ""

    @property
    def no_merge(self) -> str:
        """Why what this method trains has no merged form; empty where it has one."""
        return ""

    @property
    def no_checkpointing(self) -> str:
        """Why this method does not go with activation checkpointing; empty where it does."""
        return ""

    @property
    def virtual_tokens(self) -> int:
        """How many of the model's positions are taken before each sequence."""
        return 0

    @property
    def no_hidden_cache(self) -> str:
        """Why hidden states cannot be kept for this method; empty where its adapter is one that `nn.replay.Reads`."""
        return "it works inside the model, or reads more of it than its hidden states"

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
        """The steps of a run of `total_steps` after which a restart happens: none at the end, none without re-warm.

        Raises:
            ConfigError: one of the two is no whole number.
        """
        check_whole("total_steps", total_steps)
        check_whole("rewarm_steps", rewarm_steps)
        return ()

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> Method | None:
        """The config of an adapter folder's `adapter_config.json`, or None when it is another method's."""
        return None

    @classmethod
    def from_folder(cls, saved: SavedAdapter) -> Method | None:
        """As `from_saved`, for methods whose files say more than their `adapter_config.json`."""
        return cls.from_saved(saved.config)

    def load_saved(self, adapter: Adapter, saved: SavedAdapter) -> None:
        """Put the tensors of an adapter folder into `adapter`, which this config has just attached.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape.
        """
        raise CheckpointError(f"method {self.name} has no adapter files")

    def for_pretraining(self, seed: int) -> Method:
        """This config with the defaults that hold in pre-training filled in."""
        return self

    def for_finetuning(self, seed: int, *, new_head: bool) -> Method:
        """This config with the defaults that hold in fine-tuning filled in: a new head trains."""
        return self


class Adapter(Placed, abc.ABC):
    """A method at work on a model.

    Attributes:
        model: the edited model.
        config: the method's config.
    """

    def __init__(self, model: nn.Module, config: Method) -> None:
        super().__init__(model)
        self.config = config
        self._last_step = 0
        self._watch = Watch()

    @property
    def writes_base(self) -> str:
        """As `Method.writes_base`, and what was asked of this adapter since."""
        return self.config.writes_base

    @property
    def no_merge(self) -> str:
        """Why there is no merged form; empty where `merge` works."""
        return self.config.no_merge

    @property
    def no_cache(self) -> str:
        """Why `generate()` must do without a cache (`use_cache=False`) on this model; empty where it need not."""
        return ""

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

        Raises:
            ConfigError: a rate or a decay is no number, or below 0; or the model is not as the adapter left it, see
                `after_step`.
            ValueError: the adapter was merged or detached.
        """
        self._require_open("parameter_groups()")
        self._check_model("parameter_groups()")
        for key, value in (("lr", lr), ("weight_decay", weight_decay)):
            number = isinstance(value, int | float | torch.Tensor) and not isinstance(value, bool)
            if not number or not float(value) >= 0:
                raise ConfigError(f"parameter_groups: {key} = {value!r}: give a number, at least 0")
        groups: list[dict[str, Any]] = [
            {"params": [], "names": [], "group": group, "lr": lr, "weight_decay": weight_decay} for group in GROUPS
        ]
        by_name = {group["group"]: group for group in groups}
        entries = self.trainable()
        self._watch.remember(entries)
        for entry in entries:
            by_name[entry.group]["params"].append(entry.parameter)
            by_name[entry.group]["names"].append(entry.name)
        return groups

    @abc.abstractmethod
    def _check_model(self, call: str) -> None:
        """Raise ConfigError, with the name of the `call`, if the model lacks what trains or is split over processes."""

    # -- the loop's calls ----------------------------------------------------------------------

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> StepReport:
        """Do what the method does between two steps. Call it after every `optimizer.step()`.

        Args:
            step: the number of completed optimizer steps, from 1.
            optimizer: built from `parameter_groups`.

        Raises:
            ValueError: `step` does not follow the step of the previous call.
            ConfigError: the optimizer has nothing of what trains, or something that was replaced in the model since;
                or the model is not as the adapter left it: split over processes, tied weights parted, modules changed.
        """
        if not isinstance(step, int):
            raise ValueError(f"after_step({step!r}): it takes the number of completed optimizer steps, an integer")
        if step <= self._last_step:
            raise ValueError(
                f"after_step({step}) follows after_step({self._last_step}): it takes the number of completed "
                f"optimizer steps, each number once and in rising order; the next one is {self._last_step + 1}"
            )
        self._require_open(f"after_step({step})")
        if self.record.adapters.get(self.record.active) is not self:
            raise ValueError(f"after_step({step}): this adapter is not at work; trimtab.activate() it first")
        self._watch.check(self, step, optimizer)
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
    def updated(self) -> list[str]:
        """The names that `effective_weights` gives, in its order."""

    @abc.abstractmethod
    def base_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `effective_weights`, without what the adapter adds: W + carry."""

    @abc.abstractmethod
    def merge(self, *, quantized: bool = False) -> None:
        """Fold everything into the base, rounded once, and leave a plain model of the compute dtype.

        Args:
            quantized: keep 4-bit weights in 4 bits, with their rounding, instead of widening them.

        Raises:
            CannotMerge: the method has no merged form, or other adapters are on the model.
        """

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit, and be at work again.

        Raises:
            CannotDetach: nothing was kept to go back to (`keep_base`), or the model has another adapter now.
        """
        raise CannotDetach(f"unmerge: method {self.config.name} cannot be undone")

    def merged_tensor(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """What `merge` would make of the base parameter `name`, if its value were `value`; rounded once.

        For merging a checkpoint that is never whole in memory: the adapter may sit on a model on the meta device.
        """
        raise CannotMerge(f"method {self.config.name} has no merged form")

    @abc.abstractmethod
    def detach(self) -> None:
        """Remove the adapter and give the untouched base back, bit for bit.

        Raises:
            CannotDetach: something was written into the base; the message names it and the way out.
        """

    def _suspend(self) -> None:
        """Leave the base's function; nothing is lost."""
        raise CannotDetach(f"method {self.config.name} cannot be switched off")

    def _resume(self) -> None:
        """Undo `_suspend`."""
        raise CannotDetach(f"method {self.config.name} cannot be switched on again")

    def save(self, path: str | Path) -> None:
        """Write the adapter as a folder that `trimtab.load_adapter` reads, in PEFT's layout where it has one.

        On a model that is split over processes all of them call it, and the first one writes.

        Raises:
            CannotSave: the adapter alone would not describe what was trained.
        """
        self._require_open("save()")
        if not isinstance(path, str | Path):
            raise ConfigError(f"path={path!r}: give the folder to write")
        self._check_model("save()")
        with self.record.at_work(self.attached_name):
            write_together(Path(path), self._saved())

    def check_save(self) -> None:
        """Find out whether `save` would work now, and write nothing.

        Raises:
            CannotSave: it would not.
        """
        self._require_open("check_save()")
        with self.record.at_work(self.attached_name):
            self._saved()

    def _saved(self) -> SavedAdapter:
        """What `save` writes."""
        raise CannotSave(f"method {self.config.name} has no adapter to save")
