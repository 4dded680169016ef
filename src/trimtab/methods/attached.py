"""What is attached to a model: its adapters by name, at most one of them at work, and what they share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from trimtab.errors import ConfigError
from trimtab.methods.keep import Kept
from trimtab.nn.residence import Residence
from trimtab.nn.split import refuse_split, refuse_split_before

if TYPE_CHECKING:
    from trimtab.methods.base import Adapter, Method

_ATTRIBUTE = "_trimtab_adapters"


@dataclass
class Attached:
    """The adapters on a model by name, the name of the active one ("" for none), and their shared residence."""

    residence: Residence
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: str = ""

    def remove(self, model: nn.Module, name: str) -> None:
        """Free a name, and with the last one the model."""
        del self.adapters[name]
        self.active = "" if self.active == name else self.active
        if not self.adapters:
            del model.__dict__[_ATTRIBUTE]

    def switch(self, name: str) -> None:
        """Let the adapter called `name` be the one at work, or none for ""."""
        if name == self.active:
            return
        # What splits a model keeps to the parameters that the model had then.
        refuse_split(
            next(iter(self.adapters.values())).model,
            "adapters cannot be switched (by activate(), disabled(), or save() of one that is not active)",
            "do so before fully_shard, or use DDP",
        )
        if self.active:
            self.adapters[self.active]._suspend()
            self.active = ""
        if name:
            self.adapters[name]._resume()
            self.active = name

    @contextlib.contextmanager
    def at_work(self, name: str) -> Iterator[None]:
        """Within this context the adapter called `name` is the one at work, whichever was before and is afterwards."""
        before = self.active
        self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def put_back(self, model: nn.Module, name: str, adapter: Adapter) -> None:
        """Let an adapter that was removed be the one on a model that has none."""
        self.adapters, self.active = {name: adapter}, name
        model.__dict__[_ATTRIBUTE] = self


def record_of(model: nn.Module) -> Attached | None:
    """What is attached to a model, or None."""
    return model.__dict__.get(_ATTRIBUTE)


def place(
    model: nn.Module,
    config: Method,
    *,
    name: str,
    dtype: torch.dtype | None,
    pure: bool,
    keep_base: str | Path | None,
) -> Adapter:
    """Attach a config to a model under a name, as `registry.attach` says."""
    check_model(model)
    if wrapped := next((n for n, m in model.named_modules() if type(m).__module__.startswith("peft.tuners.")), None):
        raise ConfigError(
            f"{wrapped} is a layer of peft: load the plain model and the adapter with trimtab.load_adapter, or give "
            "the peft model restarts with trimtab.interop.peft.Restarts"
        )
    check_settings(name=name, dtype=dtype, pure=pure)
    check_whole(model, config, "attach")
    record = record_of(model)
    if record is None:
        record = Attached(Residence(model, dtype, pure, None if keep_base is None else Kept(keep_base)))
    else:
        _refuse_beside(record, name, config, dtype, pure, keep_base)
    before = record.active
    record.switch("")
    try:
        adapter = config._attach(model, record.residence)
    except BaseException:
        if not record.adapters:
            record.residence.restore()
        else:
            record.switch(before)
        raise
    model.__dict__[_ATTRIBUTE] = record
    record.adapters[name] = adapter
    record.active = name
    adapter._watch.remember(adapter.trainable())
    return adapter


def check_model(model: object) -> None:
    """Raise ConfigError for what is no model."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={model!r}: give a torch.nn.Module; transformers' from_pretrained makes one of a name")


def check_whole(model: nn.Module, config: Method, call: str) -> None:
    """Raise ConfigError, with the name of the `call`, for a model that is split over processes already."""
    try:
        if config.works_sharded:
            refuse_split_before(model)
        else:
            refuse_split(model)
    except ConfigError as error:
        raise ConfigError(f"{call}: {error}") from None


def check_settings(*, name: object = "default", dtype: object = None, pure: object = False) -> None:
    """Raise ConfigError for settings of `attach` that no model could take."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"name={name!r}: an adapter's name is a text that is not empty")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype={dtype!r}: nothing can compute in it; give torch.bfloat16, float16 or float32")
    if not isinstance(pure, bool):
        raise ConfigError(f"pure={pure!r}: give True or False")


def _refuse_beside(
    record: Attached, name: str, config: Method, dtype: torch.dtype | None, pure: bool, keep_base: str | Path | None
) -> None:
    """Whether an adapter can come beside those that are there."""
    if name in record.adapters:
        raise ConfigError(
            f"name={name!r}: the model already has an adapter {name!r}; "
            "merge() or detach() it first, or give another name"
        )
    for other, adapter in record.adapters.items():
        if adapter.writes_base:
            raise ConfigError(
                f"name={name!r}: the model already has the adapter {other!r}, which changes base tensors "
                f"({adapter.writes_base}); merge() or detach() it first"
            )
    if config.writes_base:
        raise ConfigError(
            f"name={name!r}: {config.name} changes base tensors ({config.writes_base}), and the model already has the "
            f"adapter {next(iter(record.adapters))!r}; merge() or detach() it first"
        )
    if dtype is not None and dtype != record.residence.dtype:
        theirs = record.residence.dtype or "the dtype that each weight has"
        raise ConfigError(f"dtype={dtype}: the model's adapters compute in {theirs}; leave dtype out")
    if pure and not record.residence.pure:
        raise ConfigError("pure=True: the model's adapters were attached without it; leave it out")
    if keep_base is not None and record.residence.kept is None:
        raise ConfigError("keep_base: give it with the first adapter of a model")


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on a model by name."""
    record = record_of(model)
    return dict(record.adapters) if record else {}


def activate(model: nn.Module, name: str | None) -> None:
    """Let the adapter called `name` be the one at work; None leaves the base alone at work.

    Raises:
        ConfigError: no adapter has that name.
        CannotDetach: the one at work wrote into the base, and no copy is kept.
    """
    record = record_of(model)
    known = adapters(model)
    if name is not None and name not in known:
        raise ConfigError(
            f"name={name!r}: the model has no such adapter; it has {', '.join(map(repr, known)) or 'none'}"
        )
    if record is not None:
        record.switch(name or "")
