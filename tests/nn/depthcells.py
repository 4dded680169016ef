"""Cells over depth and their inputs for the tests, and the oracle: torch's own norm and cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.nn.recurrence import Cell, DepthCell, State

TORCH_CELLS: dict[str, type[nn.Module]] = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
Inputs = list[tuple[Tensor, Tensor | None]]


def some_cell(
    kind: Cell, width: int = 7, size: int = 3, joined: int = 0, dtype: torch.dtype = torch.float64
) -> DepthCell:
    """A cell whose norm and biases are away from where they start."""
    generator = torch.Generator().manual_seed(0)
    cell = DepthCell(width, size, kind=kind, joined=joined, generator=generator, dtype=dtype)
    with torch.no_grad():
        for p in (cell.norm_weight, cell.bias_ih, cell.bias_hh):
            p.add_(torch.randn(p.shape, generator=generator) / 4)
    return cell


def some_inputs(
    steps: int, shape: Sequence[int], width: int, joined: int = 0, dtype: torch.dtype = torch.float64
) -> Inputs:
    """phi and, if `joined`, a c that requires a gradient, for each step; rms differs from token to token."""
    generator = torch.Generator().manual_seed(1)

    def draw(last: int) -> Tensor:
        scale = torch.rand((*shape, 1), generator=generator) + 0.3
        return (torch.randn((*shape, last), generator=generator) * scale).to(dtype)

    return [(draw(width), draw(joined).requires_grad_() if joined else None) for _ in range(steps)]


def run(cell: DepthCell, inputs: Inputs, dtype: torch.dtype = torch.float64) -> list[State]:
    """The states after each step."""
    prepared, state, states = cell.prepare(dtype), None, []
    for phi, joined in inputs:
        state = cell(phi, joined, state, prepared)
        states.append(state)
    return states


def by_torch(cell: DepthCell, inputs: Inputs) -> list[State]:
    """The same by torch's own norm and cell, in the parameters' dtype, differentiable in the parameters of `cell`."""
    other = TORCH_CELLS[cell.kind](cell.width + cell.joined, cell.size, dtype=cell.weight_ih.dtype)
    own = {name: p for name, p in cell.named_parameters() if name != "norm_weight"}
    state: Any = None
    states: list[State] = []
    for phi, joined in inputs:
        x = phi if joined is None else torch.cat([phi, joined], -1)
        x = F.rms_norm(x, x.shape[-1:], cell.norm_weight, cell.eps).flatten(0, -2)
        state = functional_call(other, own, (x, state))
        split = state if cell.kind == "lstm" else (state,)
        states.append(tuple(part.view(*phi.shape[:-1], cell.size) for part in split))
    return states


def aggregate(states: list[State], how: str) -> Tensor:
    """The last h, or a running sum of all, divided."""
    total = states[0][0]
    for state in states[1:]:
        total = state[0] if how == "last" else total + state[0]
    return total if how == "last" else total / len(states)


def gradients(loss: Tensor, cell: DepthCell, inputs: Inputs) -> dict[str, Tensor]:
    wanted = dict(cell.named_parameters()) | {f"c{i}": c for i, (_, c) in enumerate(inputs) if c is not None}
    found = torch.autograd.grad(loss, list(wanted.values()))
    return dict(zip(wanted, found, strict=True))


def error(ours: Tensor, exact: Tensor) -> float:
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm())
