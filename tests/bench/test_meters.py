"""The meters give known numbers on known cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.bench.meters import (
    LiveMeter,
    count_flops,
    live_bytes,
    own_peak_resident,
    peak_resident,
    reachable_tensors,
    saved_bytes,
)

KIB = 1024


def test_live_bytes_of_temporaries() -> None:
    """Two temporaries alive together count, one that died before does not."""

    def run() -> None:
        first = torch.zeros(KIB, dtype=torch.uint8)
        del first
        second = torch.zeros(2 * KIB, dtype=torch.uint8)
        third = second + 1
        del second, third

    live = live_bytes(run, existing=[])
    assert (live.before, live.peak, live.after, live.above) == (0, 4 * KIB, 0, 4 * KIB)


def test_views_and_in_place_operations_cost_nothing() -> None:
    """A storage counts once, however many tensors look at it."""

    def run() -> Tensor:
        x = torch.zeros(KIB, dtype=torch.uint8)
        return x.view(32, 32).t()[1:].add_(1)

    live = live_bytes(run, existing=[])
    assert (live.peak, live.after) == (KIB, KIB)


def test_what_existed_before_counts_and_may_be_freed() -> None:
    """Existing tensors are in `before`; freeing one makes room below the baseline."""
    holder = [torch.zeros(4 * KIB, dtype=torch.uint8)]

    def run() -> Tensor:
        holder.clear()
        return torch.zeros(KIB, dtype=torch.uint8)

    live = live_bytes(run, existing=holder)
    assert (live.before, live.peak, live.after, live.above) == (4 * KIB, 4 * KIB, KIB, 0)


def test_resized_storage_is_recounted() -> None:
    """A storage that grows in place counts at its new size."""

    def run() -> Tensor:
        return torch.zeros(KIB, dtype=torch.uint8).resize_(3 * KIB)

    assert live_bytes(run, existing=[]).after == 3 * KIB


def test_everything_reachable_is_found_with_its_gradients() -> None:
    """Without a list, parameters, gradients and optimizer state count as existing, each once."""
    model = nn.Linear(100, 100, bias=False)
    model(torch.ones(1, 100)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    weight = model.weight
    state = optimizer.state[weight]
    found = [t for t in reachable_tensors() if any(t is own for own in (weight, weight.grad, *state.values()))]
    assert {id(t) for t in found} == {id(t) for t in (weight, weight.grad, *state.values())}
    # Found twice (the gradient hangs on its parameter, too), counted once.
    assert live_bytes(lambda: None, [*found, *found]).before == 4 * 40_000 + 4  # two moments and the step
    assert live_bytes(lambda: None).before >= 4 * 40_000 + 4


def test_backward_is_measured() -> None:
    """Tensors that only the autograd graph holds are alive, and the gradients are in `after`."""
    weight = nn.Parameter(torch.ones(10, 10))
    x = torch.ones(20, 10)

    def run() -> None:
        (x @ weight).exp().sum().backward()

    live = live_bytes(run, existing=[weight, x])
    assert live.after - live.before == weight.nbytes
    assert live.above >= 20 * 10 * 4 + weight.nbytes


class Squares(torch.autograd.Function):
    """x -> (x w)^2 by hand, with in-place products in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        ctx.save_for_backward(x, w, y)
        return y.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w, y = ctx.saved_tensors
        g = 2 * g * y
        return torch.zeros_like(x).addmm_(g, w.t()), torch.zeros_like(w).addmm_(x.t(), g)


def test_saved_bytes_count_unique_storages_without_parameters() -> None:
    """Only what the graph itself keeps counts: not parameters, not excluded inputs, and nothing twice."""
    weight = nn.Parameter(torch.ones(10, 30))
    x = torch.ones(20, 10, requires_grad=True)
    assert saved_bytes(lambda: Squares.apply(x, weight), exclude=[x]) == 20 * 30 * 4
    assert saved_bytes(lambda: Squares.apply(x, weight)) == 20 * 30 * 4 + x.nbytes
    assert saved_bytes(lambda: x.sin() * x.cos(), exclude=[x]) == 2 * x.nbytes
    assert saved_bytes(lambda: x.view(-1) * weight.view(-1)[:200], exclude=[x]) == 0
    with torch.no_grad():
        assert saved_bytes(lambda: Squares.apply(x, weight)) == 0


def test_flops_of_hand_written_functions_count() -> None:
    """Forward and backward of a custom function count, in-place products too; a multiply-add is two."""
    x = torch.ones(20, 10, requires_grad=True)
    weight = nn.Parameter(torch.ones(10, 30))
    assert count_flops(lambda: Squares.apply(x, weight).sum().backward()) == 3 * 2 * 20 * 10 * 30


@pytest.mark.parametrize(
    ("run", "flops"),
    [
        (lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 4), out=torch.empty(2, 4)), 48),
        (lambda: torch.ones(5, 2, 4).baddbmm_(torch.ones(5, 2, 3), torch.ones(5, 3, 4)), 240),
        (lambda: torch.ones(2, 3) @ torch.ones(3), 12),
        (lambda: torch.ones(2).addmv_(torch.ones(2, 3), torch.ones(3)), 12),
        (lambda: torch.addmv(torch.ones(2), torch.ones(2, 3), torch.ones(3)), 12),
    ],
)
def test_flops_of_each_kind_of_product(run: Any, flops: int) -> None:
    """Every form of matrix product is in the count."""
    assert count_flops(run) == flops


@pytest.mark.parametrize("heads", [4, 2])
def test_flops_of_fused_attention(heads: int) -> None:
    """The CPU's fused attention counts as those of CUDA do: two products forward, five backward."""
    q = torch.ones(2, 4, 16, 8, requires_grad=True)
    k, v = (torch.ones(2, heads, 32, 8, requires_grad=True) for _ in range(2))
    product = 2 * 2 * 4 * 16 * 32 * 8

    def attend() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=heads != 4)

    assert count_flops(attend) == 2 * product
    assert count_flops(lambda: attend().sum().backward()) == 7 * product


def test_peak_resident_memory_of_a_script(tmp_path: Path) -> None:
    """A script that touches 64 MiB peaks 64 MiB above one that does not, and its output comes back."""
    script = tmp_path / "script.py"
    script.write_text("import sys\nkept = bytes([1]) * (int(sys.argv[1]) << 20)\nprint(len(kept) >> 20)\n")
    small, said_small = peak_resident([script, "1"])
    large, said_large = peak_resident([script, "65"])
    assert (said_small, said_large) == ("1\n", "65\n")
    assert 60 << 20 < large - small < 68 << 20
    assert own_peak_resident() > 0


def test_a_script_finds_the_modules_beside_it(tmp_path: Path) -> None:
    """As when Python runs it."""
    (tmp_path / "beside.py").write_text("WORD = 'found'\n")
    (tmp_path / "script.py").write_text("import beside\nprint(beside.WORD)\n")
    assert peak_resident([tmp_path / "script.py"])[1] == "found\n"


def test_failing_script_is_an_error(tmp_path: Path) -> None:
    """A script that fails gives no number, and its last words."""
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no luck')\n")
    with pytest.raises(RuntimeError, match=r"status 1: no luck"):
        peak_resident([script])


def test_saved_bytes_leaves_nothing_behind() -> None:
    """An activation that its own node saves is gone after the count, and backward passes within it are right."""
    weight = nn.Parameter(torch.full((1000,), 0.5))
    with LiveMeter() as meter:
        assert saved_bytes(lambda: weight.tanh().sum()) == 4000
        assert meter.peak >= 4000
        assert meter.live == 0
    assert saved_bytes(lambda: weight.tanh().sum().backward()) == 4000
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 1 - torch.full((1000,), 0.5).tanh().square())
