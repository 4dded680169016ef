"""Optimizer state by name: what a resumed optimizer holds, and in which memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.train import optimstate


def test_a_paged_optimizer_gets_its_moments_back_in_paged_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded moments lie in buffers that the optimizer took itself, and the next step is the same, bit for bit."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    taken: list[torch.Tensor] = []

    def paged(self: object, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        taken.append(torch.zeros_like(p, dtype=dtype))
        return taken[-1]

    monkeypatch.setattr(bitsandbytes.optim.optimizer.Optimizer8bit, "get_state_buffer", paged)

    def make(value: torch.Tensor) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(value.clone())
        group = {"params": [parameter], "names": ["w"], "group": "adapter"}
        return parameter, bitsandbytes.optim.PagedAdamW8bit([group], lr=1e-2)

    start = torch.randn(80, 64, generator=torch.Generator().manual_seed(0))
    first, old = make(start)
    for _ in range(3):
        first.grad = first.detach() - 1.0
        old.step()
    tensors, packed = optimstate.pack(old)
    second, new = make(first.detach())
    taken.clear()
    optimstate.unpack(new, tensors, packed)
    assert new.state[second]["state1"] is taken[0] and new.state[second]["state2"] is taken[1]
    for parameter, optimizer in ((first, old), (second, new)):
        parameter.grad = start - 1.0
        optimizer.step()
    assert torch.equal(first, second)
