"""DoRA on a base that somebody wrote into: the row norms are those of the weight as it is, however it was written.

A write that raises no version counter leaves no trace on the tensor: fused optimizers, `.data`, compiled forwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models_for_tests import logits, loss_of, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn

import trimtab
from trimtab.nn.dora import DoRAMixin


def with_dora(model: nn.Module, **settings: object) -> trimtab.Adapter:
    """A DoRA off its start."""
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4, dora=True), **settings)  # type: ignore[arg-type]
    torch.manual_seed(2)
    with torch.no_grad():
        for entry in adapter.trainable():
            entry.parameter.add_(0.1 * torch.randn_like(entry.parameter))
    return adapter


def anew(model: nn.Module, ids: Tensor) -> Tensor:
    """What the model answers when nothing is remembered."""
    fresh = copy.deepcopy(model)
    for module in fresh.modules():
        if isinstance(module, DoRAMixin):
            module.squares = None
    return logits(fresh, ids)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() < 2e-6 * b.norm())


@pytest.mark.parametrize("fused", [False, True])
def test_a_base_that_trains_has_the_norms_of_now(fused: bool) -> None:
    """Steps of AdamW on the base's weights, fused or not, while they train and after they are frozen again."""
    model, ids = tiny_llama(), token_ids()
    adapter = with_dora(model)
    weights = [layer.weight.requires_grad_(True) for layer in adapter.layers.values()]  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(weights, lr=1e-1, fused=fused)
    before = logits(model, ids)
    for step in range(3):
        loss_of(model, token_ids(seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert close(logits(model, ids), anew(model, ids))
    for weight in weights:
        weight.requires_grad_(False)
    assert close(logits(model, ids), anew(model, ids))
    assert not torch.allclose(logits(model, ids), before, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "nf4"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_write_past_the_version_is_seen(make: Callable[..., nn.Module], dtype: torch.dtype | str) -> None:
    """`p.data.copy_(new)` in evaluation, between two forwards that nothing else parts."""
    models, ids = [make(), make(seed=1)], token_ids()
    for model in models:
        model.eval()
        trimtab.quantize(model, "nf4") if isinstance(dtype, str) else model.to(dtype)
    other = {**dict(models[1].named_parameters()), **dict(models[1].named_buffers())}
    with_dora(models[0])
    held = {**dict(models[0].named_parameters()), **dict(models[0].named_buffers())}
    before = logits(models[0], ids)
    for name, value in other.items():
        held[name].data.copy_(3 * value.data if value.is_floating_point() else value.data)
    now = logits(models[0], ids).float()
    assert (now - anew(models[0], ids).float()).norm() < (2e-2 if dtype == torch.bfloat16 else 2e-6) * now.norm()
    assert not torch.allclose(now, before.float(), atol=0.1)


def test_a_compiled_forward_sees_a_write() -> None:
    """One graph, no recompilation: in-place writes of either kind, and a load, have the norms that eager mode has."""
    torch._dynamo.reset()
    model, other, ids = tiny_llama(), tiny_llama(seed=1), token_ids()
    with_dora(model)
    model.eval()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    layers = [module for module in model.modules() if isinstance(module, DoRAMixin)]
    plain = {id(layer): layer.forward for layer in layers}
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True)  # type: ignore[method-assign]

    def eager() -> Tensor:
        compiled = {id(layer): layer.__dict__.pop("forward") for layer in layers}
        out = anew(model, ids)
        for layer in layers:
            layer.__dict__["forward"] = compiled[id(layer)]
        return out

    assert plain and close(logits(model, ids), eager())
    known = dict(model.named_parameters())
    logits(model, ids)
    after_warm_up = graphs
    for write in ("data", "copy", "load"):
        with torch.no_grad():
            for name, value in other.named_parameters():
                value.mul_(1.5)
                if write == "data":
                    known[name].data.copy_(value)
                elif write == "copy":
                    known[name].copy_(value)
        if write == "load":
            model.load_state_dict(other.state_dict(), strict=False)
        assert close(logits(model, ids), eager()), write
    assert graphs == after_warm_up
    torch._dynamo.reset()


def test_what_is_written_keeps_the_rows_that_stay() -> None:
    """Rows that nobody wrote into keep c = 1 to the bit, beside one that was."""
    model = nn.Sequential(nn.Linear(48, 32, bias=False))
    x = torch.randn(5, 48)
    trimtab.attach(model, trimtab.LoRA(rank=4, dora=True, targets="0"))
    before = model(x)
    model[0].weight.data[3].mul_(2)
    now = model(x)
    same = torch.arange(32) != 3
    assert torch.equal(now[:, same], before[:, same])
    assert torch.allclose(
        now[:, 3], before[:, 3], rtol=1e-5, atol=1e-6
    )  # m is the length, so twice the row is the same row
