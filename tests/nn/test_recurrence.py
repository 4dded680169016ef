"""The recurrent cell over depth against torch's cells: values, gradients, precision, parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from depthcells import TORCH_CELLS, Inputs, aggregate, by_torch, error, gradients, run, some_cell, some_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.errors import ConfigError
from trimtab.nn.recurrence import CELLS, GATES, Cell, DepthCell, State


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("joined", [0, 4])
@pytest.mark.parametrize("how", ["last", "mean"])
def test_values_and_gradients_are_those_of_torchs_cells(kind: Cell, joined: int, how: str) -> None:
    """Four steps in float64: every state, every parameter's gradient, and that of what is joined."""
    cell = some_cell(kind, joined=joined)
    inputs = some_inputs(4, (2, 5), 7, joined)
    weights = torch.randn(2, 5, 3, dtype=torch.float64)
    ours, theirs = run(cell, inputs), by_torch(cell, inputs)
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine) == len(other) == (2 if kind == "lstm" else 1)
        assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(mine, other, strict=True))
    got = gradients((aggregate(ours, how) * weights).sum(), cell, inputs)
    expected = gradients((aggregate(theirs, how) * weights).sum(), cell, inputs)
    for name, grad in expected.items():
        assert torch.allclose(got[name], grad, rtol=1e-9, atol=1e-12), name


class Chain(nn.Module):
    """Two steps, so that the parameters can be replaced by what gradcheck disturbs."""

    def __init__(self, cell: DepthCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, phi: Tensor, joined: Tensor | None, state: State | None) -> State:
        prepared = self.cell.prepare(torch.float64)
        return self.cell(phi.flip(0), joined, self.cell(phi, joined, state, prepared), prepared)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("joined", [0, 2])
@pytest.mark.parametrize("stated", [False, True])
def test_gradcheck(kind: Cell, joined: int, stated: bool) -> None:
    """Every gradient equals finite differences: of the parameters, of c, of the state, and of phi if it asks."""
    chain = Chain(some_cell(kind, 5, 2, joined))
    (phi, c), *_ = some_inputs(1, (2, 2), 5, joined)
    state = tuple(torch.randn(2, 2, 2, dtype=torch.float64) for _ in range((kind == "lstm") + 1)) if stated else ()
    names = [name for name, _ in chain.named_parameters()]

    def function(phi: Tensor, *rest: Tensor) -> State:
        rest = list(rest)
        joined_tensor = rest.pop(0) if joined else None
        before = tuple(rest[: len(state)]) or None
        return functional_call(chain, dict(zip(names, rest[len(state) :], strict=True)), (phi, joined_tensor, before))

    inputs = [phi, *([c.detach()] if c is not None else []), *state, *(p.detach() for p in chain.parameters())]
    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in inputs])


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(CELLS),
    lead=st.lists(st.integers(0, 3), max_size=3),
    width=st.integers(1, 5),
    size=st.integers(1, 4),
    joined=st.integers(0, 3),
    steps=st.integers(1, 3),
)
def test_any_shape(kind: Cell, lead: list[int], width: int, size: int, joined: int, steps: int) -> None:
    """No leading dimension, one, several, or none of its tokens: torch's states, and gradients that are finite."""
    cell = some_cell(kind, width, size, joined)
    inputs = some_inputs(steps, lead, width, joined)
    last = run(cell, inputs)[-1]
    assert all(part.shape == (*lead, size) for part in last)
    rows = [(phi.reshape(-1, width), None if c is None else c.reshape(-1, joined)) for phi, c in inputs]
    for mine, other in zip(last, by_torch(cell, rows)[-1], strict=True):
        assert torch.allclose(mine.reshape(-1, size), other, atol=1e-12)
    last[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in cell.parameters())


# -- precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("pure", [False, True])
def test_bf16_is_near_float64(kind: Cell, pure: bool) -> None:
    """Six steps of bf16: values within 1.2 units of rounding (2^-8) and gradients within 1.6, in norm, and nowhere
    worse than torch's norm and cell in bf16 by a tenth. With parameters in bf16, their gradients are in bf16."""
    width, size, joined, steps = 192, 48, 32, 6
    dtype = torch.bfloat16 if pure else torch.float32
    cell = some_cell(kind, width, size, joined, dtype)
    inputs = some_inputs(steps, (900,), width, joined, torch.bfloat16)
    weights = torch.randn(900, size, generator=torch.Generator().manual_seed(2)) + 0.3

    def evaluate(cell: DepthCell, inputs: Inputs, torchs: bool) -> tuple[Tensor, dict[str, Tensor]]:
        states = by_torch(cell, inputs) if torchs else run(cell, inputs, torch.bfloat16)
        h = aggregate(states, "mean")
        return h.detach(), gradients((h * weights.to(h.dtype)).sum(), cell, inputs)

    exact_cell, rival_cell = copy.deepcopy(cell).double(), copy.deepcopy(cell).bfloat16()
    exact_inputs = [(phi.double(), c.detach().double().requires_grad_()) for phi, c in inputs if c is not None]
    h, grads = evaluate(cell, inputs, torchs=False)
    exact_h, exact = evaluate(exact_cell, exact_inputs, torchs=True)
    rival_h, rivals = evaluate(rival_cell, inputs, torchs=True)
    unit, worse = 2.0**-8, 1.1
    assert h.dtype == torch.bfloat16 and error(h, exact_h) < min(1.2 * unit, worse * error(rival_h, exact_h))
    for name, grad in grads.items():
        assert grad.dtype == (torch.bfloat16 if name.startswith("c") else dtype)
        assert error(grad, exact[name]) < min(1.6 * unit, worse * error(rivals[name], exact[name])), name


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_activations(kind: Cell, dtype: torch.dtype) -> None:
    """phi of up to 6e4: its squares and its products with the weight leave fp16, and all is finite and right."""
    cell = some_cell(kind, 256, 8, 4, torch.float32)
    with torch.no_grad():
        cell.weight_ih.abs_().div_(5)  # all parts of a sum have one sign, and the cell is not saturated
    inputs = [
        ((phi.abs() * 1e5).clamp(max=6e4).to(dtype), c) for phi, c in some_inputs(3, (500,), 256, 4, torch.float32)
    ]
    inputs = [(phi, c.detach().to(dtype).requires_grad_()) for phi, c in inputs if c is not None]
    assert (inputs[0][0].double() @ cell.weight_ih[:, :256].double().t()).max() > torch.finfo(torch.float16).max
    h = run(cell, inputs, dtype)[-1][0]
    grads = gradients((h * 1e-2).sum(), cell, inputs)
    exact_cell = copy.deepcopy(cell).double()
    exact_inputs = [(phi.double(), c.detach().double().requires_grad_()) for phi, c in inputs if c is not None]
    exact_h = by_torch(exact_cell, exact_inputs)[-1][0]
    exact = gradients((exact_h * 1e-2).sum(), exact_cell, exact_inputs)
    assert error(h, exact_h) < 0.02
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
        if not name.startswith("c"):  # a gradient of 1e-8 is none in fp16
            assert error(grad, exact[name]) < 0.05, name


def test_saturated_rnn_gives_finite_gradients() -> None:
    """Where h rounds to 1, atanh is not asked for infinity."""
    cell = some_cell("rnn", 16, 4, 8, torch.float32)
    with torch.no_grad():
        cell.bias_hh.fill_(30.0)
    inputs = some_inputs(2, (5,), 16, 8, torch.bfloat16)
    h = run(cell, inputs, torch.bfloat16)[-1][0]
    assert (h == 1).all()
    assert all(grad.isfinite().all() for grad in gradients(h.sum(), cell, inputs).values())


# -- parameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CELLS)
def test_parameters_are_named_shaped_and_drawn_as_torchs(kind: Cell) -> None:
    """torch's names and shapes beside the norm's, uniform weights, biases of 0 and a forget gate of 1."""
    cell = DepthCell(60, 20, kind=kind, joined=4, generator=torch.Generator().manual_seed(3))
    theirs = {name: p.shape for name, p in TORCH_CELLS[kind](64, 20).named_parameters()}
    assert {name: p.shape for name, p in cell.named_parameters()} == theirs | {"norm_weight": (64,)}
    assert cell.weight_hh.shape[0] == GATES[kind] * 20
    assert 0.9 / 8 < cell.weight_ih.abs().max() <= 1 / 8
    assert 0.9 / 20**0.5 < cell.weight_hh.abs().max() <= 1 / 20**0.5
    assert (cell.norm_weight == 1).all() and not cell.bias_hh.any()
    forget = torch.zeros_like(cell.bias_ih)
    forget[20:40] = kind == "lstm"
    assert torch.equal(cell.bias_ih, forget)
    same = DepthCell(60, 20, kind=kind, joined=4, generator=torch.Generator().manual_seed(3), dtype=torch.bfloat16)
    assert torch.equal(same.weight_hh, cell.weight_hh.bfloat16())
    later = DepthCell(60, 20, kind=kind, joined=4, device="meta").to_empty(device="cpu")
    later.reset_parameters(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(later.parameters(), cell.parameters(), strict=True))


def test_preparing_rounds_once() -> None:
    """The folded weight is the exact product rounded to bf16; biases stay wide; nothing asks for a gradient."""
    cell = some_cell("gru", dtype=torch.float32)
    prepared = cell.prepare(torch.bfloat16)
    exact = cell.weight_ih.double() * cell.norm_weight.double()
    assert torch.equal(prepared.weight_ih, exact.float().bfloat16())
    assert prepared.dtype == prepared.weight_hh.dtype == torch.bfloat16
    assert prepared.bias_ih.dtype == prepared.bias_hh.dtype == torch.float32
    assert not any(x.requires_grad for x in prepared)


def test_errors_name_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="cell = 'elman' is not known; use one of rnn, gru, lstm"):
        DepthCell(4, 2, kind="elman")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="size = 0"):
        DepthCell(4, 0)
    cell = some_cell("rnn", joined=4)
    prepared = cell.prepare(torch.float64)
    phi, c = some_inputs(1, (6,), 7, 4)[0]
    assert c is not None
    for wrong, message in (
        ((phi[:, :5], c, None), r"phi is \(6, 5\), where this cell needs \(6, 7\)"),
        ((phi, c[:3], None), r"joined is \(3, 4\), where this cell needs \(6, 4\)"),
        ((phi, None, None), "joined is None, where this cell needs a tensor of 4 numbers a token"),
        ((phi, c, (phi,)), r"h of the state is \(6, 7\)"),
        ((phi, c, (phi[:, :3], phi[:, :3])), r"a state of cell='rnn' is \(h,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            cell(*wrong, prepared)
