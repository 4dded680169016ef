"""A stack of the same kind with all widths divided by r: what Ladder Side-Tuning runs beside a frozen one.

No family is named here. Widths are found in a model's config by the names that configs give them, and the smaller
stack is what the class that holds the blocks makes of the smaller config. The number of heads stays and heads become
narrower, as in the authors' code: masks, and biases of attention that are one per head, then fit both stacks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trimtab.errors import ConfigError
from trimtab.nn.inject import is_linear
from trimtab.nn.stacks import Stack
from trimtab.nn.swap import Swapped
from trimtab.nn.weights import shape_of

#: Names of the width of the hidden states, of a head, and of what lies within a feed-forward network.
STREAM = ("hidden_size", "d_model", "n_embd")
HEAD = ("head_dim", "d_kv")
INNER = (
    "intermediate_size",
    "d_ff",
    "ffn_dim",
    "n_inner",
    "hidden_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
_HEADS = ("num_attention_heads", "num_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads")


def config_of(stack: Stack, model: nn.Module) -> Any:
    """The config of the model, or of its part, that holds a stack.

    Raises:
        ConfigError: it does not say how wide the hidden states are, and how many heads share them.
    """
    config: Any = getattr(stack.owner, "config", None) or getattr(model, "config", None)
    for name in ("hidden_size", "num_attention_heads"):
        if not isinstance(getattr(config, name, None), int):
            raise ConfigError(
                f"{type(model).__name__} has no config with a {name}, from which a narrower stack could be made; use a "
                "Transformer of Hugging Face's, or another method"
            )
    return config


def _named(config: Any, names: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """The settings among `names` that a config stores, under the names that it stores them by."""
    alias = getattr(config, "attribute_map", {})
    for name in dict.fromkeys(alias.get(name, name) for name in names):
        value, computed = getattr(config, name, None), isinstance(getattr(type(config), name, None), property)
        if isinstance(value, int) and not isinstance(value, bool) and not computed:
            yield name, value


def reduced_config(config: Any, reduction: int) -> Any:
    """A copy of a config with all widths divided by `reduction`, for stacks without embeddings.

    Widths within feed-forward networks, and those of heads that have one of their own, are rounded down, but not below
    what the family allows: one, and for heads that are rotated a pair.

    Raises:
        ConfigError: the hidden states, or the heads that share them, cannot be divided.
    """
    small = copy.deepcopy(config)
    kind = type(config).__name__
    ((stream, width), *_) = _named(config, STREAM)
    if width % reduction:
        raise ConfigError(
            f"reduction={reduction}: {stream} = {width} of {kind} is no multiple of it; use a divisor of {width}"
        )
    for name, value in _named(config, STREAM):
        setattr(small, name, value // reduction)
    for name, value in _named(config, INNER):
        setattr(small, name, max(1, value // reduction))
    rotated = _rotated_share(config)
    heads = list(_named(config, HEAD))
    for name, value in heads:
        head = max(1, value // reduction)
        while not _rotates(head, rotated):
            head += 1
        setattr(small, name, head)
    for name, count in () if heads else _named(config, _HEADS):
        share = width // reduction
        if share % count or not _rotates(share // count, rotated):
            even = " that can be rotated" if rotated else ""
            raise ConfigError(
                f"reduction={reduction}: {stream} = {width} of {kind} divided by it is {share}, which {name} = {count} "
                f"heads{even} cannot share; use a smaller reduction"
            )
    # No table of embeddings is needed: the stack reads hidden states.
    small.vocab_size = 1
    if getattr(small, "pad_token_id", None) is not None:
        small.pad_token_id = 0
    return small


def _rotated_share(config: Any) -> float:
    """Which part of a head is rotated; 0 where positions come in another way."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or not rope:
        return 0.0
    kinds = [one for one in rope.values() if isinstance(one, dict)]  # one for each type of layer, or one for all
    own = (kinds or [rope])[0].get("partial_rotary_factor")
    return float(own or getattr(config, "partial_rotary_factor", None) or 1.0)


def _rotates(head: int, share: float) -> bool:
    """Whether a head of this width has pairs to rotate, if that is asked of it."""
    rotated = int(head * share)
    return not share or (rotated > 0 and rotated % 2 == 0)


def head_width(config: Any, kind: str = "") -> int:
    """The width of a head; in an encoder-decoder model of the part `kind`."""
    own = next((value for _, value in _named(config, HEAD)), None)
    heads = getattr(config, f"{kind}_attention_heads", None) or config.num_attention_heads
    return own or config.hidden_size // heads


def reduced_owner(stack: Stack, config: Any, model: nn.Module, generator: torch.Generator) -> nn.Module:
    """The module that would hold a stack if the model were made from `config`, on the CPU.

    Args:
        stack: whose like is made.
        config: the smaller config.
        model: that the stack is of; it draws the weights where the module does not do that itself.
        generator: whose seed they are drawn from.

    Raises:
        ConfigError: its class cannot be made from a config, or makes other blocks of it.
    """
    plain: Any = type(stack.owner)
    while issubclass(plain, Swapped):
        plain = plain.swap_plain
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(generator.initial_seed())
            made: nn.Module = plain(config)
            draw: Any = getattr(model, "_init_weights", None)
            if not hasattr(made, "_init_weights") and callable(draw):
                made.apply(draw)
            blocks = tuple(made.get_submodule(stack.name.rpartition(".")[2]).children())
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"{plain.__name__}, which holds {stack.name}, cannot be made narrower from a config of "
            f"{type(config).__name__}: {error}"
        ) from None
    if len(blocks) != len(stack.blocks):
        raise ConfigError(
            f"{plain.__name__} made from its config has {len(blocks)} blocks, and {stack.name} has {len(stack.blocks)}"
        )
    narrower = config.hidden_size < config_of(stack, model).hidden_size
    for block, small in zip(stack.blocks, blocks, strict=True) if narrower else ():
        _check_narrower(stack.name, block, small)
    return made


def _check_narrower(name: str, block: nn.Module, small: nn.Module) -> None:
    """Whether every matrix of a block lost width, so that no width was overlooked in the config.

    Raises:
        ConfigError: one did not.
    """
    for key, module in small.named_modules():
        if not is_linear(module):
            continue
        here, there = shape_of(module), shape_of(block.get_submodule(key))
        if here == there != (1, 1):
            raise ConfigError(
                f"{name}: {key} is {there[0]} x {there[1]} in the narrower stack, too, so the config has a width under "
                "a name that is not known; Ladder cannot be used on this family"
            )
