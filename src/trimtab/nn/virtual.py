"""Virtual tokens before a batch: what they mean for a model's attention mask, positions and cache.

Legend: B sequences, S tokens of a call, p virtual tokens, K tokens that a call's mask speaks of (S, and before it
what the cache holds, without the virtual ones).

The caller's batch never speaks of the virtual tokens. A backbone's arguments are changed on their way in, whether
the call comes from `model(**batch)`, from `generate()` or from a loop that calls the backbone itself.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError

#: Arguments of attention over sequences laid end to end, which have no place for a prompt of each.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """A model's table of token embeddings, or None."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


def backbone(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the part of a model that turns token ids into hidden states: no head, no wrapper.

    It is the innermost module that has a config and holds the table of token embeddings.

    Raises:
        ConfigError: the model has no such part.
    """
    table = input_embeddings(model)
    if table is None:
        raise ConfigError(
            f"{type(model).__name__} has no input embeddings (get_input_embeddings()), so nothing can stand before "
            "its tokens; use a Hugging Face model, or another method"
        )
    holders = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "config") and hasattr(module, "get_input_embeddings") and table in module.modules()
    ]
    if not holders:
        raise ConfigError(f"{type(model).__name__} has no part with a config and input embeddings")
    return max(holders, key=lambda holder: len(holder[0]))


def name_of(model: nn.Module, wanted: Any) -> str:
    """The qualified name of a module of `model`."""
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def qualified(owner: str, leaf: str) -> str:
    """The name of a parameter `leaf` of the module `owner`, which may be the root."""
    return f"{owner}.{leaf}" if owner else leaf


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def read_shape(call: Mapping[str, Any]) -> torch.Size | None:
    """(B, S) of a call's tokens or embeddings; None if it has neither or both, which the model itself refuses."""
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return None if isinstance(embeds, Tensor) else ids.shape
    return embeds.shape[:2] if isinstance(embeds, Tensor) else None


def position_limit(model: nn.Module) -> int | None:
    """How many positions a model was made for; None if its config does not say."""
    config: Any = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa counts from behind its padding
    return limit if isinstance(limit, int) else None


class VirtualTokens:
    """What `p` virtual tokens before each sequence do to the arguments of a backbone.

    Args:
        length: p.
        limit: the model's positions, or None.
        causal: rows of virtual tokens that a mask gets see only virtual ones.
    """

    def __init__(self, length: int, limit: int | None, causal: bool) -> None:
        self.length = length
        self.limit = limit
        self.causal = causal
        # A string, so that copies and pickles of the model and of its caches still know each other.
        self._mark = uuid.uuid4().hex

    def begin(self, cache: Any) -> None:
        """Mark a cache that begins with these virtual tokens; its length alone would not tell it from another."""
        if cache is not None:
            cache.trimtab_virtual_tokens = self._mark

    def cached(self, call: Mapping[str, Any], tokens: int) -> int:
        """Positions that the call's cache holds, virtual ones among them.

        Raises:
            ConfigError: the cache is of a fixed length, or was not made with these virtual tokens before its tokens.
        """
        cache = call.get("past_key_values")
        if cache is None:
            return 0
        if getattr(cache, "is_compileable", False) or not hasattr(cache, "get_seq_length"):
            raise ConfigError(
                f"past_key_values is a {type(cache).__name__}, whose length is that of the tokens alone, without the "
                f"{self.length} virtual ones; use a DynamicCache (in generate(), the default cache_implementation)"
            )
        held = int(cache.get_seq_length())
        mask = call.get("attention_mask")
        spoken = mask.shape[-1] if isinstance(mask, Tensor) else None
        ours = getattr(cache, "trimtab_virtual_tokens", None) == self._mark and held >= self.length
        if held and (not ours or (spoken is not None and spoken + self.length != held + tokens)):
            raise ConfigError(
                f"past_key_values holds {held} positions and the call brings {tokens} tokens with "
                f"{'no mask' if spoken is None else f'a mask of {spoken}'}: "
                f"the cache was not made with the {self.length} virtual tokens of this adapter before its tokens; "
                "begin with an empty cache while the adapter is on"
            )
        return held

    def check_length(self, positions: int) -> None:
        """Refuse `positions`, virtual ones among them, where the batch alone would have fitted and they do not.

        Raises:
            ConfigError: as said.
        """
        if self.limit is not None and positions - self.length <= self.limit < positions:
            raise ConfigError(
                f"{positions - self.length} tokens and {self.length} virtual ones are {positions} positions, and the "
                f"model has {self.limit}; shorten the batch to at most {self.limit - self.length} tokens"
            )

    def check_call(self, call: Mapping[str, Any]) -> None:
        """Refuse batches in which several sequences lie end to end without a mask.

        Raises:
            ConfigError: as said.
        """
        packed = [name for name in _PACKED if call.get(name) is not None]
        positions: Any = call.get("position_ids")
        unmasked = call.get("attention_mask") is None and not torch.compiler.is_compiling()
        if not packed and unmasked and positions is not None and (positions.diff(dim=-1) != 1).any():
            packed = ["position_ids"]
        if packed:
            raise ConfigError(
                f"{packed[0]} packs several sequences into one row, and the virtual tokens would stand before the "
                "first alone; pad instead of packing, or give an attention_mask of (B, 1, S, S)"
            )

    def mask(self, mask: Any, *, rows: bool) -> Any:
        """A mask with the virtual tokens, which every token sees.

        Args:
            mask: None, (B, K), or (B, 1, S, K) of bool or added to the scores.
            rows: the virtual tokens are among the queries, too.
        """
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ConfigError(f"attention_mask is {shape}, and must be a tensor of (B, S) or (B, 1, S, S)")
        p = self.length
        if mask.dim() == 2:
            return torch.cat((mask.new_ones(mask.shape[0], p), mask), dim=1)
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ConfigError(f"attention_mask of {mask.dtype}: one of (B, 1, S, S) must be bool or floating point")
        shown = 1 if mask.dtype == torch.bool else 0
        hidden = 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        wide = torch.cat((mask.new_full((*mask.shape[:-1], p), shown), mask), dim=-1)
        if not rows:
            return wide
        own = mask.new_full((p, p), shown)
        others = mask.amax(dim=-2, keepdim=True).expand(*mask.shape[:2], p, mask.shape[-1])
        if self.causal:
            own.masked_fill_(torch.ones_like(own, dtype=torch.bool).triu_(1), hidden)
            others = torch.full_like(others, hidden)
        return torch.cat((torch.cat((own.expand(*mask.shape[:2], p, p), others), dim=-1), wide), dim=-2)

    def positions(self, positions: Tensor | None, *, rows: bool) -> Tensor | None:
        """Position ids (..., S) moved behind the virtual tokens, with (`rows`) or without theirs before them."""
        if positions is None:
            return None
        moved = positions + self.length
        if not rows:
            return moved
        first = torch.arange(self.length, device=moved.device, dtype=moved.dtype)
        return torch.cat((first.expand(*moved.shape[:-1], -1), moved), dim=-1)
