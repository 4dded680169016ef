"""Which examples a batch holds, told by their content, and where their tokens are.

An example is what its row brings to the blocks: all tensors of the row, without the padding that a mask tells. So the
same example has the same key in another order, another batch size and other padding. What changes the hidden states
and is not told by the mask (positions before left padding, without position_ids) is part of the key.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.errors import ConfigError

Side = Literal["encoder", "decoder", "only"]

#: Tensors (B, S, ...) that the attention mask applies to, and those of a decoder.
_TOKENS = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "attention_mask")
_DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_position_ids", "decoder_attention_mask", "labels")
#: What a model reads, by which the rows of a batch are counted.
_MAIN = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "decoder_input_ids")
#: Further tensors with a row for each example, by what models call them. Others may hold something for all rows, or
#: images of which a row has several, though they be as long as the batch.
_ROWS = {*_TOKENS, *_DECODER, "bbox", "bool_masked_pos", "global_attention_mask", "langs"}
#: What says nothing about the hidden states.
_FLAGS = frozenset(
    {"use_cache", "return_dict", "output_attentions", "output_hidden_states", "num_items_in_batch", "return_loss"}
)
_LABELS = frozenset({"labels", "label", "label_ids", "start_positions", "end_positions", "next_sentence_label"})
#: What lets a model run on less than its whole input.
_PARTIAL = ("past_key_values", "encoder_outputs", "cache_params")
#: Labels of this value are no part of the loss.
IGNORED_LABEL = -100


class Tokens:
    """Which positions of a batch hold tokens, in one stack.

    Args:
        mask: (B, S) bool on the CPU; None: all positions, however many there are.

    Attributes:
        mask: the same.
    """

    def __init__(self, mask: Tensor | None) -> None:
        self.mask = mask
        self._index = None if mask is None or bool(mask.all()) else mask.flatten().nonzero()[:, 0]

    def counts(self, x: Tensor) -> list[int]:
        """How many tokens each row of x (B, S, ...) has."""
        return [x.shape[1]] * x.shape[0] if self.mask is None else self.mask.sum(1).tolist()

    def expected(self, counts: list[int]) -> list[int]:
        """What such counts of stored tokens must be."""
        return counts[:1] * len(counts) if self.mask is None else self.mask.sum(1).tolist()

    def gather(self, x: Tensor, what: str) -> Tensor:
        """(T, D): those of (B, S, D), row after row.

        Raises:
            ConfigError: the mask is of other positions.
        """
        if self.mask is not None and x.shape[:2] != self.mask.shape:
            raise ConfigError(
                f"{what} has {x.shape[1]} positions, and the batch's mask tells of {self.mask.shape[1]}; the cache "
                "needs a mask of the positions that the blocks see, or a batch without padding and mask"
            )
        flat = x.flatten(0, 1)
        return flat if self._index is None else flat[self._on(x.device)]

    def spread(self, x_TD: Tensor, rows: int) -> Tensor:
        """(B, S, D): the inverse of `gather`, with zeros where there is no token."""
        if self._index is None:
            return x_TD.reshape(rows, -1 if rows else 0, x_TD.shape[1])
        assert self.mask is not None
        out = x_TD.new_zeros(self.mask.numel(), x_TD.shape[1])
        return out.index_copy_(0, self._on(x_TD.device), x_TD).view(*self.mask.shape, x_TD.shape[1])

    def _on(self, device: torch.device) -> Tensor:
        assert self._index is not None
        self._index = self._index.to(device)
        return self._index


@dataclass(frozen=True)
class Examples:
    """The rows of a batch.

    Attributes:
        keys: of each row, as hex.
        tokens: where the tokens of each stack are.
        given: what of the batch they were told by.
    """

    keys: list[str]
    tokens: tuple[Tokens, ...]
    given: Mapping[str, Any]

    def check_call(self, call: Mapping[str, Any], *, pair: bool) -> None:
        """Whether a model is called with the batch that the examples are of.

        Raises:
            ConfigError: it is not.
        """
        refuse_partial(call)
        if call.get("output_attentions"):
            raise ConfigError("output_attentions=True: a cached forward runs no attention; call it outside of batch()")
        called = _telling(call, pair=pair)
        odd = sorted(called.keys() ^ self.given.keys())
        odd += [name for name, value in called.items() if name in self.given and not _same(value, self.given[name])]
        if odd:
            raise ConfigError(
                f"cache.batch(batch): the model is called with another {odd[0]} than that of the batch; give batch() "
                "the very mapping that the model is called with"
            )


def refuse_partial(call: Mapping[str, Any]) -> None:
    """Raise ConfigError for a call that is not of whole inputs."""
    for name in _PARTIAL:
        if call.get(name) is not None:
            raise ConfigError(
                f"{name}: hidden states are kept for whole inputs, and this call is of a part of one; "
                "call the model, or generate(), outside of cache.batch()"
            )


def examples_of(batch: Mapping[str, Any], sides: Sequence[Side]) -> Examples:
    """The examples of a batch.

    Args:
        batch: what the model is called with.
        sides: what each stack is.

    Raises:
        ConfigError: the batch holds no tensor, or something that cannot be told.
    """
    refuse_partial(batch)
    pair = "only" not in sides
    given = _telling(batch, pair=pair)
    names = [name for name in (*_MAIN, *given) if isinstance(v := given.get(name), Tensor) and v.dim() > 1]
    if not names:
        raise ConfigError(f"cache.batch(batch): no tensor with a row for each example among {sorted(batch)}")
    values = {name: v.detach().cpu() if isinstance(v, Tensor) else v for name, v in given.items()}
    masks = {"encoder" if pair else "only": _mask(values)}
    if pair:
        masks["decoder"] = _decoder_mask(values, batch.get("labels"))
    rows = len(values[names[0]])
    found = {name: _by_row(name, value, values[names[0]]) for name, value in values.items()}
    by_row = {name: tensor for name, tensor in found.items() if tensor is not None}
    fixed = hashlib.sha256()
    for name, value in sorted(values.items()):
        if name not in by_row:
            fixed.update(_header(name, value) + (_content(value) if isinstance(value, Tensor) else b""))
    if (
        pair
        and masks["encoder"] is not None
        and masks["decoder"] is None
        and not any(n in values for n in _DECODER[:2])
    ):
        # The decoder's inputs are made of the encoder's, padding and all.
        fixed.update(_header("length", masks["encoder"].shape[1]))
    shared = any(isinstance(value, Tensor) and value.dim() > 0 and name not in by_row for name, value in values.items())
    keys = []
    for row in range(rows):
        digest = fixed.copy()
        for part in _parts(by_row, masks, row, shared=shared):
            digest.update(part)
        keys.append(digest.hexdigest()[:32])
    return Examples(keys, tuple(Tokens(masks[side]) for side in sides), given)


def _telling(call: Mapping[str, Any], *, pair: bool) -> dict[str, Any]:
    """What of a call tells its hidden states; labels do where the decoder's inputs are made from them."""
    told = {name: v for name, v in call.items() if v is not None and name not in _FLAGS}
    if not pair or any(name in told for name in _DECODER[:2]):
        told = {name: v for name, v in told.items() if name not in _LABELS}
    for name, value in told.items():
        if not isinstance(value, Tensor | bool | int | float | str):
            raise ConfigError(
                f"{name}: a {type(value).__name__} cannot be told from another, so its hidden states cannot be kept; "
                "the cache takes tensors, numbers and words"
            )
    return told


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one.to(other.device, other.dtype), other))
    return type(one) is type(other) and bool(one == other)


def _by_row(name: str, value: Any, main: Tensor) -> Tensor | None:
    """A tensor with a row for each example (B, ...); None for what is for all of them, or may be.

    Args:
        name: of the argument.
        value: of the argument.
        main: (B, S, ...), by which the rows are counted.
    """
    if not isinstance(value, Tensor) or value.dim() == 0:
        return None
    if value is main:
        return main
    if value.dim() == 3 and name in ("position_ids", "decoder_position_ids"):
        # (axes, B, S); with as many axes as rows it might be the other way, and counts for all rows.
        return value.permute(1, 2, 0) if value.shape[1:] == main.shape[:2] and len(value) != len(main) else None
    if len(value) != len(main):
        return None
    if name in _LABELS or (name in _ROWS and value.dim() > 1):
        return value
    warnings.warn(
        f"cache.batch(batch): {name} is not known to have a row for each example, so all of it is part of each "
        "example's key: hidden states are found again in batches with the same one alone",
        stacklevel=2,
    )
    return None


def _mask(values: Mapping[str, Any]) -> Tensor | None:
    """Which positions of (B, S) hold tokens, if the attention mask says it."""
    mask = values.get("attention_mask")
    tokens = next((values[name] for name in _TOKENS[:2] if name in values), None)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or tokens is None or tokens.shape[:2] != mask.shape:
        return None
    return mask != 0


def _decoder_mask(values: Mapping[str, Any], labels: Any) -> Tensor | None:
    """Which positions of a decoder hold tokens: told by its mask, else those up to a row's last label.

    A decoder is causal, so that what follows the last label changes nothing before it.
    """
    mask = values.get("decoder_attention_mask")
    tokens = next((values[name] for name in _DECODER[:2] if name in values), labels)
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return None
    if isinstance(mask, Tensor):
        return mask != 0 if mask.shape == tokens.shape[:2] else None
    if not isinstance(labels, Tensor) or labels.shape != tokens.shape[:2]:
        return None
    told = labels.cpu() != IGNORED_LABEL
    return told.flip(1).cumsum(1).flip(1) > 0


def _parts(
    by_row: Mapping[str, Tensor], masks: Mapping[str, Tensor | None], row: int, *, shared: bool
) -> Iterator[bytes]:
    """What a row's key is made of.

    Args:
        by_row: tensors (B, ...).
        masks: of tokens.
        row: which.
        shared: whether the batch holds a tensor for all rows, which may mean another thing at another place.
    """
    mask, decoder_mask = masks.get("encoder", masks.get("only")), masks.get("decoder")
    for which, name in ((mask, "position_ids"), (decoder_mask, "decoder_position_ids")):
        if which is not None:
            at = which[row].nonzero()[:, 0]
            # Positions that are given say where the tokens are; else their places do.
            if len(at) and name in by_row and not shared:
                at = at - at[0]
            yield _header(name, at) + _content(at)
    for name, value in sorted(by_row.items()):
        which = mask if name in _TOKENS else decoder_mask if name in _DECODER else None
        part = value[row]
        if which is not None and value.shape[:2] == which.shape:
            part = part[which[row]]
        yield _header(name, part) + _content(part)


def _header(name: str, value: Any) -> bytes:
    told = [str(value.dtype), list(value.shape)] if isinstance(value, Tensor) else value
    return json.dumps([name, told]).encode()


def _content(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
