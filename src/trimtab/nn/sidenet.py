"""The side network of READ, fed block by block as a frozen stack runs.

Legend: B sequences, S tokens of each, d width of the hidden states, k size of the recurrence, N calls of blocks.

    h_j = R(RMSNorm([phi_j ; c_j]), h_{j-1})        j = 1..N, for each token alone
    phi_N' = phi_N + s (agg(h) W_o' + b_o)

phi_j are the hidden states that block j gives; c_j is what a joiner hands over for the block, if there is one. The
recurrence advances while the stack runs, so no hidden state is collected; what autograd keeps is phi_j, h_j (an LSTM's
cell state, too), and c_j where there is one.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.nn.precision import cast_linear, compute_dtype_of
from trimtab.nn.recurrence import Cell, DepthCell, Prepared

Aggregate = Literal["last", "mean"]


class SideNetwork(nn.Module):
    """The trained networks beside one stack.

    Args:
        width: d.
        size: k.
        calls: N; matters only without recurrence.
        cell: the recurrence; "none" gives each call of a block a network of its own.
        joined: width of c_j, or 0.
        source: width of the encoder's h (k), which the joiner maps to `values`; or 0.
        values: width of the values of the cross-attention.
        correct: whether there is a W_o.
        drawn: draw W_o and b_o as torch's nn.Linear does, instead of starting at zero.
        generator: of the initial values, on the CPU.
        device: of the parameters.
        dtype: in which they are held.
    """

    output_weight: nn.Parameter | None
    output_bias: nn.Parameter | None
    joiner_weight: nn.Parameter | None

    def __init__(
        self,
        width: int,
        size: int,
        *,
        calls: int,
        cell: Cell | Literal["none"],
        joined: int,
        source: int,
        values: int,
        correct: bool,
        drawn: bool,
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        recurrent = cell != "none"
        kind: Cell = "rnn" if cell == "none" else cell

        self.width = width
        self.recurrent = recurrent
        self.cells = nn.ModuleList(
            DepthCell(width, size, kind=kind, joined=joined, generator=generator, device=device, dtype=dtype)
            for _ in range(1 if recurrent else calls)
        )
        if not recurrent:
            for one in self.cells:
                _let_stand_alone(one)

        def matrix(rows: int, columns: int, *, zero: bool = False) -> nn.Parameter:
            bound = 1.0 / math.sqrt(columns or 1)
            value = torch.zeros(rows, columns, device=device, dtype=dtype)
            if not zero and device.type != "meta":
                value.copy_(torch.empty(rows, columns, device="cpu").uniform_(-bound, bound, generator=generator))
            return nn.Parameter(value)

        zero = not drawn
        self.output_weight = matrix(width, size, zero=zero) if correct else None
        self.output_bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype)) if correct else None
        self.joiner_weight = matrix(values, source) if source else None
        if drawn and self.output_bias is not None and device.type != "meta":
            bias, bound = torch.empty(width), 1.0 / math.sqrt(size)
            self.output_bias.data.copy_(bias.uniform_(-bound, bound, generator=generator))

    def prepare(self, dtype: torch.dtype) -> list[Prepared]:
        """What a forward of the model needs of each cell, formed once."""
        return [self.cell(number).prepare(dtype) for number in range(len(self.cells))]

    def cell(self, number: int) -> DepthCell:
        """The cell of a call of a block: the one there is, or each its own."""
        found = self.cells[0 if self.recurrent else number]
        assert isinstance(found, DepthCell)
        return found

    def values(self, h: Tensor) -> Tensor:
        """The encoder's h (B, S, k) as values (B, S, `values`) of a cross-attention."""
        assert self.joiner_weight is not None
        return cast_linear(h, self.joiner_weight, None, h.dtype)


def _let_stand_alone(cell: nn.Module) -> None:
    """What a cell would do with the state before is no parameter: there is none."""
    for name in ("weight_hh", "bias_hh"):
        value = torch.zeros_like(cell.get_parameter(name).detach())
        delattr(cell, name)
        cell.register_buffer(name, value, persistent=False)


class DepthRun:
    """A side network in a forward of its stack.

    Args:
        side: the network.
        aggregate: "last" reads h_N, "mean" the mean of all h_j.
        scale: s.
        calls: N.
    """

    def __init__(self, side: SideNetwork, aggregate: Aggregate, scale: float, calls: int) -> None:
        self.side = side
        self.aggregate = aggregate
        self.scale = scale
        self.calls = calls
        self.begin()

    def begin(self) -> None:
        """Forget what an earlier forward left."""
        self._state: tuple[Tensor, ...] | None = None
        self._sum: Tensor | None = None
        self._prepared: list[Prepared] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> DepthRun:
        """A copy for a copied side network: what a forward left behind is no part of it."""
        return DepthRun(copy.deepcopy(self.side, memo), self.aggregate, self.scale, self.calls)

    def advance(self, number: int, phi: Tensor, joined: Tensor | None) -> Tensor | None:
        """Take the hidden states of call `number`.

        Args:
            number: of the call, from 0.
            phi: (B, S, d).
            joined: c_j (B, S, joined), or None.

        Returns:
            After the last call agg(h) (B, S, k); before it None.

        Raises:
            ConfigError: phi is of another width than the network was made for.
        """
        if phi.shape[-1] != self.side.width:
            raise ConfigError(
                f"width: block {number} gives hidden states {phi.shape[-1]} wide, and the network beside it reads "
                f"{self.side.width}; give width=, or, where a model's blocks differ in width, name the last ones of "
                "one width with blocks="
            )
        dtype = compute_dtype_of(phi)
        if not self._prepared:
            self._prepared = self.side.prepare(dtype)
        cell, prepared = self.side.cell(number), self._prepared[number if len(self._prepared) > 1 else 0]
        own = cell.weight_ih.device
        joined = None if joined is None else joined.to(own, dtype)
        state = cell(phi.detach().to(own, dtype), joined, self._state if self.side.recurrent else None, prepared)
        last = number == self.calls - 1
        if self.aggregate == "mean":
            self._sum = state[0] if self._sum is None else self._sum + state[0]
        self._state = state
        if not last:
            return None
        h: Tensor = state[0] if self._sum is None else self._sum / self.calls
        self.begin()
        return h

    def corrected(self, phi: Tensor, h: Tensor) -> Tensor:
        """phi + s (h W_o' + b_o), of phi's shape and dtype."""
        assert self.side.output_weight is not None
        delta = cast_linear(h, self.side.output_weight, self.side.output_bias, h.dtype)
        return torch.add(phi.detach(), delta.to(phi.device, phi.dtype), alpha=self.scale)
