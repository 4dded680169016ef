"""The recurrent cell over depth: what it keeps, makes and computes, and the modes, devices and wrappers it runs in."""

from __future__ import annotations

import pytest
import torch
from depthcells import aggregate, by_torch, gradients, run, some_cell, some_inputs
from torch import Tensor, nn

from trimtab.bench.meters import count_flops, live_bytes, saved_bytes
from trimtab.nn.recurrence import CELLS, GATES, Cell, DepthCell, State


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("joined", [0, 24])
@pytest.mark.parametrize("how", ["last", "mean"])
def test_saved_bytes_a_token(kind: Cell, joined: int, how: str) -> None:
    """(D + J + K) numbers of 2 bytes a token and block: a state is kept once, by whichever of its readers.

    The projection keeps the aggregate: the last h, kept anyway by the RNN and else by nobody, or the mean, which is
    one more. An LSTM keeps its cell state too, but for the last one, which nobody reads.
    """
    width, size, steps, tokens = 96, 16, 5, 40
    cell = some_cell(kind, width, size, joined, torch.float32)
    projection = nn.Linear(size, width, dtype=torch.bfloat16)
    inputs = some_inputs(steps, (4, tokens // 4), width, joined, torch.bfloat16)
    numbers = steps * (width + joined + size)
    numbers += size if how == "mean" and kind == "rnn" else 0
    numbers += (steps - 1) * size if kind == "lstm" else 0

    def forward() -> Tensor:
        return projection(aggregate(run(cell, inputs, torch.bfloat16), how))

    assert saved_bytes(forward) == 2 * numbers * tokens
    with torch.no_grad():
        assert saved_bytes(forward) == 0


@pytest.mark.parametrize("kind", CELLS)
def test_autograd_would_keep_more_than_twice_as_much(kind: Cell) -> None:
    """Against torch's own norm and cell in the same dtype."""
    cell = some_cell(kind, 96, 16, dtype=torch.bfloat16)
    inputs = some_inputs(5, (40,), 96, dtype=torch.bfloat16)
    ours, theirs = (saved_bytes(lambda f=f: f(cell, inputs)) for f in (lambda *a: run(*a, torch.bfloat16), by_torch))  # type: ignore[misc]
    assert theirs > 2 * ours


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_of_the_hidden_width_is_made(kind: Cell, dtype: torch.dtype) -> None:
    """Neither a normalised phi in the forward nor a gradient of it in the backward: far less than one is made."""
    tokens, width, size = 3000, 1024, 4
    cell = some_cell(kind, width, size, dtype=torch.float32)
    [(phi, _)] = some_inputs(1, (tokens,), width, dtype=dtype)
    prepared, state = cell.prepare(dtype), tuple(torch.zeros(tokens, size, dtype=dtype) for _ in range(2))
    state = state[: (kind == "lstm") + 1]
    results: list[State] = []
    wide_copy = tokens * width * dtype.itemsize
    assert live_bytes(lambda: results.append(cell(phi, None, state, prepared))).above < wide_copy / 2
    loss = results.pop()[0].sum()
    assert live_bytes(lambda: loss.backward()).above < wide_copy / 2


@pytest.mark.parametrize(("kind", "joined"), [("rnn", 0), ("rnn", 32), ("gru", 0), ("gru", 32), ("lstm", 32)])
def test_flops(kind: Cell, joined: int) -> None:
    """Forward: the input's and the state's product. Backward: theirs for the weights, for c and for the state; and
    the forward's again for GRU and LSTM, the state's alone for an RNN whose c needs a gradient."""
    tokens, width, size = 10, 64, 8
    cell = some_cell(kind, width, size, joined, torch.float32)
    [(phi, c)] = some_inputs(1, (tokens,), width, joined, torch.float32)
    state = tuple(torch.zeros(tokens, size, requires_grad=True) for _ in range((kind == "lstm") + 1))
    prepared = cell.prepare(torch.float32)
    results: list[State] = []
    one = 2 * tokens * GATES[kind] * size
    forward = one * (width + joined + size)
    assert count_flops(lambda: results.append(cell(phi, c, state, prepared))) == forward
    again = forward if kind != "rnn" else one * size if joined else 0
    backward = one * (width + joined + joined + 2 * size) + again
    assert count_flops(lambda: results[0][0].sum().backward()) == backward


@pytest.mark.parametrize("kind", CELLS)
def test_no_state_is_a_state_of_zeros(kind: Cell) -> None:
    """The same values and gradients, without the product with weight_hh, which gets none."""
    cell = some_cell(kind, joined=4)
    inputs = some_inputs(1, (6,), 7, 4)
    zeros = tuple(torch.zeros(6, 3, dtype=torch.float64) for _ in range((kind == "lstm") + 1))
    found = []
    for state in (None, zeros):
        cell.zero_grad()
        flops = count_flops(lambda state=state: found.append(cell(*inputs[0], state, cell.prepare(torch.float64))))  # type: ignore[misc]
        assert flops == 2 * 6 * GATES[kind] * 3 * (7 + 4 + (0 if state is None else 3))
        found[-1][0].square().sum().backward()
        found.append({name: p.grad for name, p in cell.named_parameters()})
    mine, grads, theirs, expected = found
    assert all(torch.allclose(a, b, atol=1e-15) for a, b in zip(mine, theirs, strict=True))
    assert grads.pop("weight_hh") is None and not expected.pop("weight_hh").any()
    assert all(torch.allclose(grads[name], expected[name], atol=1e-14) for name in expected)


# -- modes, devices and wrappers ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CELLS)
def test_only_what_is_needed_gets_a_gradient(kind: Cell) -> None:
    """phi is frozen and gets none; each parameter can be frozen alone, and the others' gradients stay."""
    cell = some_cell(kind, joined=4)
    inputs = some_inputs(3, (6,), 7, 4)
    run(cell, inputs)[-1][0].sum().backward()
    whole = {name: p.grad for name, p in cell.named_parameters()}
    assert all(phi.grad is None and c is not None and c.grad is not None for phi, c in inputs)
    for frozen in whole:
        cell.zero_grad()
        cell.requires_grad_(True).get_parameter(frozen).requires_grad_(False)
        run(cell, inputs)[-1][0].sum().backward()
        for name, p in cell.named_parameters():
            assert p.grad is None if name == frozen else torch.equal(p.grad, whole[name])  # type: ignore[arg-type]


def test_no_second_derivative() -> None:
    """It raises, rather than be wrong."""
    cell = some_cell("gru")
    h = run(cell, some_inputs(1, (6,), 7))[-1][0]
    (g,) = torch.autograd.grad(h.square().sum(), cell.bias_ih, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@pytest.mark.parametrize("kind", CELLS)
def test_backward_can_run_twice(kind: Cell) -> None:
    """Nothing that was saved is written into."""
    cell = some_cell(kind, joined=4)
    inputs = some_inputs(3, (6,), 7, 4)
    loss = run(cell, inputs)[-1][0].square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in cell.parameters() if p.grad is not None]
    cell.zero_grad()
    loss.backward()
    assert len(first) == 5
    assert all(torch.equal(a, p.grad) for a, p in zip(first, cell.parameters(), strict=True))  # type: ignore[arg-type]


def test_autocast_does_not_decide() -> None:
    """The prepared dtype does, in the forward and in a backward that is called under autocast."""
    cell = some_cell("gru", joined=4, dtype=torch.float32)
    inputs = some_inputs(3, (6,), 7, 4, torch.float32)
    plain = run(cell, inputs, torch.float32)[-1][0]
    expected = gradients(plain.sum(), cell, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = run(cell, inputs, torch.float32)[-1][0]
        grads = gradients(h.sum(), cell, inputs)
    assert torch.equal(h, plain)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


def test_inputs_are_cast_to_the_prepared_dtype() -> None:
    """An fp32 phi beside a bf16 cell, as T5 gives it, is kept in bf16."""
    cell = some_cell("rnn", joined=4, dtype=torch.float32)
    inputs = some_inputs(2, (6,), 7, 4, torch.float32)
    narrow = [(phi.bfloat16(), c.detach().bfloat16()) for phi, c in inputs if c is not None]
    h = run(cell, inputs, torch.bfloat16)[-1][0]
    assert h.dtype == torch.bfloat16 and torch.equal(h, run(cell, narrow, torch.bfloat16)[-1][0])
    h.sum().backward()
    assert all(c is not None and c.grad is not None and c.grad.dtype == torch.float32 for _, c in inputs)


@pytest.mark.parametrize("kind", CELLS)
def test_meta_device(kind: Cell) -> None:
    """Forward and backward give shapes, and nothing is drawn."""
    before = torch.get_rng_state()
    cell = DepthCell(7, 3, kind=kind, joined=4, device="meta")
    assert torch.equal(torch.get_rng_state(), before)
    inputs = [
        (phi.to("meta"), c.detach().to("meta").requires_grad_())
        for phi, c in some_inputs(2, (2, 5), 7, 4, torch.bfloat16)
        if c is not None
    ]
    h = run(cell, inputs, torch.bfloat16)[-1][0]
    assert h.is_meta and h.shape == (2, 5, 3) and h.dtype == torch.bfloat16
    h.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in cell.parameters())
    assert all(c is not None and c.grad is not None and c.grad.is_meta for _, c in inputs)


@pytest.mark.parametrize("kind", CELLS)
def test_compiles_without_graph_breaks(kind: Cell) -> None:
    """Two steps in one graph, the folding among them: the same values and gradients."""
    torch._dynamo.reset()
    cell = some_cell(kind, joined=4, dtype=torch.float32)
    inputs = some_inputs(2, (2, 5), 7, 4, torch.bfloat16)

    def both(first: Tensor, c_first: Tensor, second: Tensor, c_second: Tensor) -> Tensor:
        prepared = cell.prepare(torch.bfloat16)
        return cell(second, c_second, cell(first, c_first, None, prepared), prepared)[0]

    flat = [x for pair in inputs for x in pair]
    plain = both(*flat)  # type: ignore[arg-type]
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(*flat)
    assert torch.equal(plain, compiled)
    expected, grads = (gradients(h.float().square().sum(), cell, inputs) for h in (plain, compiled))
    assert all(torch.allclose(grads[name], expected[name], rtol=1e-2, atol=1e-4) for name in expected)
    torch._dynamo.reset()


def test_any_strides() -> None:
    """A phi that is a transposed view, and a gradient that is one number spread out."""
    cell = some_cell("lstm")
    [(phi, _)] = some_inputs(1, (4, 5), 7)
    turned = phi.transpose(0, 1)
    prepared = cell.prepare(torch.float64)
    whole, part = cell(turned, None, None, prepared), cell(turned.contiguous(), None, None, prepared)
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))
    (a,), (b,) = (
        torch.autograd.grad(h[0], cell.weight_ih, g)
        for h, g in ((whole, torch.ones((), dtype=torch.float64).expand(5, 4, 3)), (part, torch.ones_like(part[0])))
    )
    assert torch.equal(a, b)
