"""Weights of a narrower stack cut out of those of the stack that it was made from.

Rows and columns are cut together wherever they stand for the same thing: one set of coordinates of the hidden states
for all blocks (and for encoder and decoder), one of positions within a head for each attention, one of units for each
feed-forward network. Kept are those of the largest importance, which is the sum of the absolute values of all entries
that belong to them. Heads that are rotated keep evenly spaced positions, whose frequencies are those of the narrower
heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.nn.inject import is_linear
from trimtab.nn.sublayers import is_output, says_attention
from trimtab.nn.weights import holder_of, is_conv1d, shape_of


@dataclass(frozen=True)
class Pair:
    """A block and the narrower one beside it.

    Attributes:
        name: of the block, for messages.
        wide: the block.
        narrow: the other.
        heads: the width of a head of either.
    """

    name: str
    wide: nn.Module
    narrow: nn.Module
    heads: tuple[int, int]


def cut_blocks(pairs: list[Pair], width: int, kept: int, *, rotated: bool) -> Tensor:
    """Fill narrower blocks with parts of wider ones.

    Args:
        pairs: of all stacks.
        width: d, of the hidden states.
        kept: how many of its coordinates the narrower blocks have.
        rotated: heads are rotated.

    Returns:
        The coordinates of the hidden states that were kept, in rising order, on the CPU.

    Raises:
        ConfigError: the blocks have a tensor of which it cannot be told what its rows and columns are.
    """
    cuts = [_Cut(pair.name, pair.wide, width, pair.heads[0]) for pair in pairs]
    stream = _largest(sum((cut.stream for cut in cuts), torch.zeros(width)), kept)
    for cut, pair in zip(cuts, pairs, strict=True):
        head, kept_head = pair.heads
        even = torch.arange(kept_head) * head // kept_head
        cut.fill(pair.narrow, stream, dict.fromkeys(cut.heads, even) if rotated else {}, kept_head)
    return stream


def cut_norm(wide: nn.Module, narrow: nn.Module, stream: Tensor) -> None:
    """Fill a norm of the hidden states with the kept coordinates of a wider one."""
    for name, parameter in narrow.named_parameters():
        _put(parameter, wide.get_parameter(name).detach().cpu()[stream])


def _largest(importance: Tensor, count: int) -> Tensor:
    """Where the `count` largest entries are, in rising order."""
    return importance.topk(count).indices.sort().values


def _put(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def _dense(module: nn.Module) -> Iterable[tuple[slice, Tensor]]:
    """The value of a linear layer's weight, some rows (rows, in) at a time, in fp32 or wider, on the CPU."""
    holder, weight = holder_of(module), module.weight
    assert isinstance(weight, Tensor)
    for block in holder.row_blocks(weight):
        yield block, holder.rows(weight, block).detach().cpu()


def _of_heads(key: str) -> bool:
    """Whether a norm within an attention is of its queries or keys, and not of the hidden states."""
    return key.rpartition(".")[0].rpartition(".")[2][:1].lower() in ("q", "k")


class _Cut:
    """What a block is made of, and how important each part is.

    Attributes:
        stream: importance (d) of the coordinates of the hidden states.
        heads: importance (head) of the positions within a head, by attention.
        inner: importance (units) of the units of the feed-forward network.
    """

    def __init__(self, name: str, block: nn.Module, width: int, head: int) -> None:
        self.name, self.block, self.width, self.head = name, block, width, head
        self.linears = {key: module for key, module in block.named_modules() if is_linear(module)}
        ends = [shape_of(module)[1] for key, module in self.linears.items() if self._ends(key) and not self._group(key)]
        self.units = ends[0] if ends else 0
        self.stream = torch.zeros(width)
        self.heads: dict[str, Tensor] = defaultdict(lambda: torch.zeros(head))
        self.inner = torch.zeros(self.units)
        for key, module in self.linears.items():
            self._weigh(key, module)

    @staticmethod
    def _group(key: str) -> str:
        """The name of the attention that a tensor belongs to; empty for all others."""
        parts = key.split(".")
        at = next((number for number, part in enumerate(parts) if says_attention(part)), -1)
        return ".".join(parts[: at + 1])

    @staticmethod
    def _ends(key: str) -> bool:
        """Whether a linear layer ends a sublayer: its rows are coordinates of the hidden states."""
        return is_output(key)

    def _unknown(self, key: str, shape: Iterable[int]) -> ConfigError:
        return ConfigError(
            f"init='pruned': it cannot be told what the rows and columns of {self.name}.{key} "
            f"({' x '.join(map(str, shape))}) are; use init='drawn'"
        )

    def _unit(self, key: str, size: int) -> int:
        """How many entries of an inner axis of a linear layer stand for different things, over and over."""
        unit = self.head if self._group(key) else self.units
        if not unit or size % unit:
            raise self._unknown(key, shape_of(self.linears[key]))
        return unit

    def _weigh(self, key: str, module: nn.Module) -> None:
        """Add a linear layer's entries to the importance of what they belong to."""
        shape = shape_of(module)
        if shape[0 if self._ends(key) else 1] != self.width:
            raise self._unknown(key, shape)
        rows, columns = torch.zeros(shape[0]), torch.zeros(shape[1])
        for block, value in _dense(module):
            rows[block] = value.abs().sum(1)
            columns += value.abs().sum(0)
        outer, inner = (rows, columns) if self._ends(key) else (columns, rows)
        self.stream += outer
        if not self._group(key) and self.units and len(inner) % self.units:
            return  # a router, which has one row for each expert: nothing of it is cut
        folded = inner.view(-1, self._unit(key, len(inner))).sum(0)
        if group := self._group(key):
            self.heads[group] += folded
        else:
            self.inner += folded

    # -- filling -------------------------------------------------------------------------------

    def fill(self, narrow: nn.Module, stream: Tensor, heads: dict[str, Tensor], kept_head: int) -> None:
        """Fill the narrower block.

        Args:
            narrow: the block.
            stream: the coordinates of the hidden states to keep.
            heads: the positions to keep by attention; those of the largest importance where nothing is said.
            kept_head: how many are kept.
        """
        self._kept_stream = stream
        self._kept_heads = {group: _largest(weight, kept_head) for group, weight in self.heads.items()} | heads
        smaller = {key: module for key, module in narrow.named_modules() if key in self.linears}
        ends = [shape_of(module)[1] for key, module in smaller.items() if self._ends(key) and not self._group(key)]
        self._kept_inner = _largest(self.inner, ends[0]) if ends else torch.zeros(0, dtype=torch.long)
        for key, module in smaller.items():
            self._fill_linear(key, module)
        done = {id(p) for module in smaller.values() for p in module.parameters(recurse=False)}
        for key, parameter in narrow.named_parameters():
            if id(parameter) not in done:
                self._fill_other(key, parameter)

    def _inner(self, key: str, size: int, kept: int) -> Tensor:
        """Which entries of an inner axis to keep: the same of every repetition."""
        if size == kept:
            return torch.arange(size)
        unit, group = self._unit(key, size), self._group(key)
        chosen = self._kept_heads[group] if group else self._kept_inner
        if kept * unit != len(chosen) * size:
            raise self._unknown(key, shape_of(self.linears[key]))
        return (torch.arange(size // unit)[:, None] * unit + chosen).flatten()

    def _fill_linear(self, key: str, module: nn.Module) -> None:
        wide = self.linears[key]
        (out, into), (kept_out, kept_in) = shape_of(wide), shape_of(module)
        ends = self._ends(key)
        rows = self._kept_stream if ends else self._inner(key, out, kept_out)
        columns = self._inner(key, into, kept_in) if ends else self._kept_stream
        value = torch.empty(kept_out, kept_in, dtype=torch.float64)
        for block, part in _dense(wide):
            inside = (rows >= block.start) & (rows < block.start + len(part))
            value[inside] = part[rows[inside] - block.start][:, columns].double()
        assert isinstance(module.weight, Tensor)
        _put(module.weight, value.t() if is_conv1d(module) else value)
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            source = wide.bias
            assert isinstance(source, Tensor)
            _put(bias, source.detach().cpu()[rows])

    def _fill_other(self, key: str, parameter: Tensor) -> None:
        """A norm, a scale, or a table of biases that is one per head."""
        value, group = self.block.get_parameter(key).detach().cpu(), self._group(key)
        if value.shape == parameter.shape:
            _put(parameter, value)
        elif value.dim() == 1 and group and _of_heads(key) and not len(value) % self.head:
            positions = torch.arange(len(value) // self.head)[:, None] * self.head + self._kept_heads[group]
            _put(parameter, value[positions.flatten()])
        elif value.dim() == 1 and len(value) == self.width and len(parameter) == len(self._kept_stream):
            _put(parameter, value[self._kept_stream])
        else:
            raise self._unknown(key, value.shape)
