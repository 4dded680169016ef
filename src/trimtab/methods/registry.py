"""The methods by name, and the ways to put one on a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, SerializeAsAny, ValidationError
from torch import nn

from trimtab.errors import CheckpointError, ConfigError, TargetError, TrimtabError
from trimtab.methods.attached import activate, check_model, check_whole, record_of
from trimtab.methods.base import REGISTRY, Adapter, Method
from trimtab.methods.folder import SavedAdapter, layer_of, read_adapter_folder
from trimtab.methods.foldercheck import PEFT_TYPES
from trimtab.methods.oneline import check_kinds, misfit
from trimtab.nn.tied import can_part, groups_of


def registry() -> dict[str, type[Method]]:
    """The known methods by name."""
    return dict(REGISTRY)


def parse_method(value: Method | Mapping[str, Any]) -> Method:
    """A config as it is, or one made from a mapping such as `{"name": "relora", "rank": 128}`.

    Raises:
        ConfigError: the mapping has no known `name`.
        pydantic.ValidationError: a setting of the named method is unknown or out of range.
    """
    if isinstance(value, Method):
        return value
    given: object = value
    if not isinstance(given, Mapping):
        said = f"the class; give {given.__name__}()" if isinstance(given, type) else type(given).__name__
        raise ConfigError(f"a method is a config or a mapping with a `name`, got {said}")
    name = value.get("name")
    if name is None:
        raise ConfigError(f"name is missing; the methods are {', '.join(sorted(REGISTRY))}")
    if name not in REGISTRY:
        raise ConfigError(f"name: no method is called {name!r}; the methods are {', '.join(sorted(REGISTRY))}")
    return REGISTRY[name].model_validate(dict(value))


def method_from_user(config: Method | Mapping[str, Any]) -> Method:
    """As `parse_method`, with every mistake as a ConfigError of one line."""
    try:
        method = parse_method(config)
        if isinstance(config, Mapping):
            check_kinds(type(method), config)
        return method
    except ValidationError as error:
        assert isinstance(config, Mapping)
        raise misfit(REGISTRY[config["name"]], error) from None


#: A field of a settings tree that holds any registered method, given as a config or a mapping.
MethodField = Annotated[SerializeAsAny[Method], BeforeValidator(parse_method)]


def attach(
    model: nn.Module,
    config: Method | Mapping[str, Any],
    *,
    name: str = "default",
    dtype: torch.dtype | None = None,
    pure: bool = False,
    keep_base: str | Path | None = None,
) -> Adapter:
    """Put a method to work on a model, in place; `model(**batch)` keeps working.

    Several adapters may be on a model if none of them changes base tensors; the one attached last is active, and
    `activate` switches.

    Args:
        model: any module with linear layers.
        config: a method's config, or a mapping such as `{"name": "relora", "restart_every": 1000}`.
        name: the adapter's name on this model.
        dtype: compute dtype, and storage dtype of frozen weights; None keeps what each weight has. What
            trains is held in fp32 in either case.
        pure: hold what trains in the compute dtype as well (small updates are then lost in bf16).
        keep_base: "host", or a folder: where to keep a copy of every base tensor that is written into, so that
            `detach`, `disabled` and `unmerge` can give it back. None keeps none.

    Raises:
        ConfigError: the name is taken, the adapters would change the same base, or the mapping is none of a method.
        TargetError: the targets match nothing that can be adapted.
    """
    return method_from_user(config).attach(model, name=name, dtype=dtype, pure=pure, keep_base=keep_base)


def method_of(saved: SavedAdapter) -> Method | None:
    """The config of an adapter folder's method; None when no method knows the folder.

    Raises:
        CheckpointError: the folder's config cannot be used.
    """
    configs = (method.from_folder(saved) for method in REGISTRY.values())
    return next((config for config in configs if config is not None), None)


def load_adapter(
    model: nn.Module, path: str | Path, *, name: str = "default", keep_base: str | Path | None = None
) -> Adapter:
    """Attach an adapter folder that `Adapter.save` (or PEFT) wrote, as `attach` does.

    Raises:
        CheckpointError: the folder is missing, damaged, of no known method, or of another base.
        ConfigError: what is given is no model or no path, or the name is taken.
    """
    check_model(model)
    if not isinstance(path, str | Path):
        raise ConfigError(f"path={path!r}: give the adapter's folder")
    return attach_saved(model, read_adapter_folder(Path(path)), path, name=name, keep_base=keep_base)


def attach_saved(
    model: nn.Module,
    saved: SavedAdapter,
    path: str | Path,
    *,
    name: str = "default",
    keep_base: str | Path | None = None,
) -> Adapter:
    """As `load_adapter`, of a folder that was read already; `path` is for messages."""
    try:
        config = method_of(saved)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if config is None:
        raise CheckpointError(
            f"{path}: peft_type {saved.config.get('peft_type')!r} is of no known method; those known are "
            f"{', '.join(PEFT_TYPES)}, and trimtab's own"
        )
    check_whole(model, config, "load_adapter")
    record = record_of(model)
    before = record.active if record else ""
    if record and before and not record.adapters[before].writes_base:
        activate(model, None)  # what is compared is the base
    adapter = None
    try:
        saved.check_base(model, str(path))
        adapter = config.attach(model, name=name, keep_base=keep_base)
        config.load_saved(adapter, saved)
    except BaseException as error:
        if adapter is not None:
            adapter.detach()
        if before:
            activate(model, before)
        if isinstance(error, TargetError | CheckpointError):
            raise _misfit(model, saved, path, error) from None
        raise
    return adapter


def _misfit(model: nn.Module, saved: SavedAdapter, path: str | Path, error: TrimtabError) -> CheckpointError:
    """Why a folder's adapter does not go on a model; what `attach` advises cannot be followed in loading."""
    if layer := saved.missing_layer(model):
        what = f"the adapter is of another base: {type(model).__name__} has no layer {layer}"
        return CheckpointError(f"{path}: {what}; load it on the model that it was trained on")
    if isinstance(error, CheckpointError):
        return error if str(error).startswith(str(path)) else CheckpointError(f"{path}: {error}")
    groups = groups_of(model)
    tied = next((groups[n] for name in saved.tensors if (n := f"{layer_of(name)}.weight") in groups), None)
    if tied is None:
        return CheckpointError(f"{path}: the adapter does not go with this model: {error}")
    way = "call trimtab.untie(model) first" if can_part(model, tied) else "this model cannot part them: use PEFT"
    return CheckpointError(
        f"{path}: the adapter changes one user alone of {' = '.join(tied)}, which is one weight in this model; {way}"
    )
