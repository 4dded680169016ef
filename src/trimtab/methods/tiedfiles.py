"""Tied weights in adapter folders.

A trained weight that several modules read lies in a file under one of its names. A reader that ties them as we do
takes it for all of them; PEFT, which trains a copy for one module, takes it for that module alone. So a file that PEFT
reads holds no such weight, and one that we alone read says which names were one weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.errors import CannotSave, CheckpointError
from trimtab.nn.tied import can_part, groups_of, owners_of

if TYPE_CHECKING:
    from trimtab.methods.folder import SavedAdapter
    from trimtab.methods.frozen import FrozenBaseAdapter

#: The key of ours in the tensor file's metadata: of each trained weight that was tied, its names.
TIED = "tied"


def refuse_parted(adapter: FrozenBaseAdapter, trained: Iterable[str]) -> None:
    """Refuse to write tied weights into a file that PEFT reads.

    Args:
        adapter: that is to be saved.
        trained: names of the base's tensors that train.

    Raises:
        CannotSave: one of them is a tied weight.
    """
    for name in trained:
        shared = owners_of(adapter.model, adapter._residence.parameters[name])
        if len(shared) < 2:
            continue
        ways = [
            "leave it out of train_also" if adapter.no_merge else "call merge() and model.save_pretrained() instead"
        ]
        if can_part(adapter.model, shared):
            own = "untie" in type(adapter.config).model_fields
            ways.append(
                "attach with untie=True" if own else "call trimtab.untie(model) before attach, and before load_adapter"
            )
        raise CannotSave(
            f"{' = '.join(shared)} is one weight and was trained, and an adapter's file would part its users: "
            f"{', or '.join(ways)}"
        )


def tied_names(model: nn.Module, trained: Iterable[str]) -> list[list[str]]:
    """The names of each trained weight that is tied, as a file keeps them."""
    groups = groups_of(model)
    return [groups[name] for name in trained if name in groups]


def trained_alike(saved: SavedAdapter) -> bool:
    """Whether what a file holds under one name of a tied weight is meant for all of them.

    Raises:
        CheckpointError: what the file says of it is damaged.
    """
    if not saved.extra or saved.extra.get("untie"):
        return False
    if TIED in saved.extra:
        return bool(_stored(saved.extra))
    # A file from before this was noted: LoRA saved no tied weight, and other methods seldom anything else.
    return saved.config.get("peft_type") != "LORA"


def fitting(saved: SavedAdapter, model: nn.Module) -> dict[str, Tensor]:
    """A file's tensors, without copies of tied weights under names that a model does not list.

    Raises:
        CheckpointError: the file and the model tie different weights.
    """
    groups, tensors = groups_of(model), dict(saved.tensors)
    then = {name: group for group in _stored(saved.extra) for name in group}
    known = trained_alike(saved) and TIED not in saved.extra
    parameters: Mapping[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in saved.tensors.items():
        here, there = groups.get(name, [name]), then.get(name, [name])
        if set(here) == set(there) or (known and len(here) > 1):
            continue
        if len(there) > 1:
            raise CheckpointError(
                f"the adapter was trained on a model in which {' = '.join(there)} is one weight, and in this one it is "
                "not; load it on a model that ties them, as its base does"
            )
        own = parameters[name]
        if own.shape == tensor.shape and own.device.type != "meta" and torch.equal(own.cpu(), tensor.to(own.dtype)):
            if name != here[0]:
                del tensors[name]
            continue
        way = "call trimtab.untie(model) first" if can_part(model, here) else "this model cannot part them: use PEFT"
        raise CheckpointError(
            f"the adapter trained {name} alone, and in this model {' = '.join(here)} is one weight; {way}"
        )
    return tensors


def _stored(extra: Mapping[str, Any]) -> list[list[str]]:
    groups = extra.get(TIED, [])
    if not isinstance(groups, list) or not all(
        isinstance(group, list) and all(isinstance(name, str) for name in group) for group in groups
    ):
        raise CheckpointError(f"the adapter's {TIED} = {groups!r} in its file is damaged; restore it as it was saved")
    return groups
