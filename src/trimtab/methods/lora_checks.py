"""What LoRA's settings ask for, and a model's layers cannot give. Everything is found before anything is edited."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from typing import TYPE_CHECKING

from torch import nn

from trimtab.errors import ConfigError, TargetError
from trimtab.nn.lora_embedding import embedding_fault
from trimtab.nn.weights import holder_of, shape_of

if TYPE_CHECKING:
    from trimtab.methods.lora import LoRA


def pattern_of(patterns: Iterable[str], name: str) -> str:
    """The first pattern that the end of a layer's name matches, as PEFT finds it; empty if none does."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), "")


def check(config: LoRA, targets: Mapping[str, nn.Module], trained: Set[str]) -> None:
    """Refuse settings that do not go with the layers that they are for.

    Args:
        config: the settings.
        targets: the layers to adapt, by name.
        trained: names of the base's tensors that train in full.

    Raises:
        ConfigError, TargetError: which setting, its value, and the way out.
    """
    for name, module in targets.items():
        _check_rank(config, name, shape_of(module))
        if f"{name}.weight" in trained:
            raise ConfigError(
                f"train_also = {list(config.train_also or ())} trains {name}.weight in full, and targets puts an "
                "adapter on it; leave it out of one of them"
            )
        _check_kind(config, name, module)
    for key in ("rank_pattern", "alpha_pattern"):
        used = {pattern_of(getattr(config, key), name) for name in targets}
        idle = [pattern for pattern in getattr(config, key) if pattern not in used]
        if idle:
            raise ConfigError(
                f"{key}: {idle[0]!r} decides about no adapted layer; a pattern is a regular expression for the end "
                f"of a name such as {next(iter(targets))}, and the first that matches counts"
            )


def _check_rank(config: LoRA, name: str, shape: tuple[int, int]) -> None:
    rank, pattern = config.rank_of(name), pattern_of(config.rank_pattern, name)
    if rank > min(shape):
        key = f"rank_pattern = {{{pattern!r}: {rank}}}" if pattern else f"rank = {rank}"
        raise ConfigError(
            f"{key} is above the size of {name}, {shape}: no low-rank update is "
            f"left; use a rank of at most {min(shape)} or exclude=['{name}']"
        )
    if config.init == "orthogonal" and rank % 2:
        raise ConfigError(f"init = 'orthogonal' pairs the rows of A, and the rank of {name} is odd: {rank}")


def _check_kind(config: LoRA, name: str, module: nn.Module) -> None:
    """Refuse settings that do not go with a layer of this kind."""
    if isinstance(module, nn.Embedding):
        if fault := embedding_fault(module):
            raise TargetError(f"targets: {name} is {fault}; leave it out")
        if config.dora or config.init in ("orthogonal", "pissa"):
            key = "dora = True" if config.dora else f"init = {config.init!r}"
            raise ConfigError(f"{key} is for linear layers, and {name} is an embedding; exclude=['{name}']")
    elif config.init == "pissa" and holder_of(module).quantized:
        raise ConfigError(
            f"init = 'pissa': {name} is held in 4 bits, and writing the rest of it back would round it anew; use "
            "another init"
        )
