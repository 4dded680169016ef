"""torch.compile of each block: whole graphs, one compilation for all blocks of a shape, and the same numbers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models_for_tests import loss_of, tiny_llama, token_ids
from torch import Tensor, nn
from torch._dynamo.utils import counters

import trimtab
from trimtab.nn.lowrank import LoRAMixin

DEPTH = 12

#: In place of a dtype: the linears of the blocks in 4 bits.
NF4 = "nf4"

#: Method configs, and the dtype of the base. One line adds a method.
METHODS: dict[str, tuple[dict[str, Any], torch.dtype | str]] = {
    "adalora": ({"name": "adalora", "rank": 2, "init_rank": 3, "total_steps": 8, "allocate_every": 1}, torch.float32),
    "adalora, dropout": (
        {"name": "adalora", "rank": 2, "init_rank": 3, "total_steps": 8, "dropout": 0.3},
        torch.bfloat16,
    ),
    "bitfit": ({"name": "bitfit", "add_bias": True}, torch.bfloat16),
    "full": ({"name": "full"}, torch.float32),
    "lora": ({"name": "lora", "rank": 3}, torch.float32),
    "lora, dropout": ({"name": "lora", "rank": 3, "dropout": 0.3}, torch.float32),
    "relora": ({"name": "relora", "rank": 3, "restart_every": 2}, torch.float32),
    "lora, nf4": ({"name": "lora", "rank": 3, "dropout": 0.3}, NF4),
    "dora": ({"name": "lora", "rank": 3, "dora": True, "dropout": 0.3}, torch.float32),
    "vera": ({"name": "vera", "rank": 16}, torch.float32),
    "vera, dropout": ({"name": "vera", "rank": 16, "dropout": 0.3}, torch.float32),
    "bottleneck": ({"name": "bottleneck", "size": 8}, torch.float32),
    "prompt": ({"name": "prompt"}, torch.float32),
    "ia3": ({"name": "ia3"}, torch.float32),
    "ladder": ({"name": "ladder", "reduction": 4}, torch.bfloat16),
    "prefix": ({"name": "prefix"}, torch.float32),
    "read": ({"name": "read", "size": 8}, torch.float32),
    "relora, dropout, bf16": ({"name": "relora", "rank": 3, "restart_every": 2, "dropout": 0.3}, torch.bfloat16),
}

#: Their hooks do other things on each block.
HOOKED = ("prefix", "read", "ladder")
#: Their blocks run without gradients, the first as any other.
BESIDE = ("read", "ladder")

#: What the compiler rounds otherwise than eager mode does, as a share.
ROUNDED = {"dora": 1e-5}

HOW = ("block.forward", "block.compile")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def attached(method: str, **changes: Any) -> tuple[nn.Module, trimtab.Adapter]:
    """A model with the method on it, and values in what starts at zero."""
    config, dtype = METHODS[method]
    model: nn.Module = tiny_llama(num_hidden_layers=DEPTH)
    if isinstance(dtype, torch.dtype):
        model.to(dtype)
    else:
        trimtab.quantize(model, dtype)
    adapter = trimtab.attach(model, config | changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for entry in adapter.trainable():
            if entry.group == "adapter" and not entry.parameter.any():
                entry.parameter.copy_(0.1 * torch.randn(entry.parameter.shape, generator=generator))
    model.config.use_cache = False
    return model, adapter


def graphs_of(model: nn.Module, method: str) -> int:
    """One graph for all blocks; with frozen embeddings the first has one of its own: its input needs no gradient."""
    if method == "prompt" or method in BESIDE:
        return 1
    return 1 if model.get_input_embeddings().weight.requires_grad else 2  # type: ignore[operator]


def close(ours: Tensor, theirs: Tensor, method: str) -> bool:
    """Equal bit for bit, or within what the compiler rounds otherwise."""
    return bool((ours - theirs).norm() <= ROUNDED.get(method, 0.0) * theirs.norm())


def compile_blocks(model: nn.Module, how: str = "block.forward", backend: str = "aot_eager") -> None:
    for block in model.model.layers:  # type: ignore[union-attr]
        if how == "block.forward":
            block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
        else:
            block.compile(fullgraph=True, backend=backend)


def forward_backward(model: nn.Module, seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits without a cache, and the gradients of a loss on them."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(input_ids=token_ids(seed)).logits
    out.float().square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


#: `block.compile` compiles a block's hooks with it.
NUMBERS = [(method, how) for method in METHODS for how in HOW if how != "block.compile" or method not in HOOKED]


@pytest.mark.parametrize(("method", "how"), NUMBERS)
def test_compiled_blocks_give_the_same_numbers(method: str, how: str) -> None:
    """Outputs and gradients are those of eager mode; twelve blocks and the next step need no further compilation."""
    out, grads = forward_backward(attached(method)[0])
    model, _ = attached(method)
    compile_blocks(model, how)
    compiled, compiled_grads = forward_backward(model)
    assert close(compiled, out, method)
    assert grads and grads.keys() == compiled_grads.keys()
    assert all(close(compiled_grads[name], grads[name], method) for name in grads)
    assert graphs() == graphs_of(model, method) and not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        forward_backward(model, seed=2)
    assert graphs() == graphs_of(model, method)


def test_a_second_rank_is_a_second_graph() -> None:
    """The control of the count: blocks of two shapes are compiled twice."""
    model, _ = attached("relora", targets=r"model\.layers\.[0-5]\..*proj")
    compile_blocks(model)
    forward_backward(model)
    assert graphs() == 2


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_in_compiled_blocks(method: str) -> None:
    """Steps, and restarts between them, need no new compilation and end where eager mode ends."""
    ends = []
    for compiled in (False, True):
        model, adapter = attached(method)
        optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
        if compiled:
            compile_blocks(model)
            forward_backward(model)
        restarts = 0
        with torch._dynamo.config.patch(error_on_recompile=compiled):
            for step in range(1, 6):
                torch.manual_seed(step)
                model.zero_grad()
                out = model(input_ids=token_ids(step)).logits
                out.float().square().mean().backward()
                optimizer.step()
                events = adapter.after_step(step, optimizer).events
                restarts += sum(event["event"] == "restart" for event in events)
        assert restarts == (2 if "relora" in method else 0)
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    # Adam divides by the size of a gradient, so what was rounded in a tiny one shows in full.
    bound = 1e-2 if method in ROUNDED else 0.0
    assert all((ends[1][n] - end).norm() <= bound * end.norm() for n, end in ends[0].items() if end.is_floating_point())


def test_evaluation_and_the_end_of_a_warm_start_compile_once_more() -> None:
    """Eval mode is a second graph; when adapters come into being the blocks are compiled anew, and are right."""
    ends = []
    for compiled in (False, True):
        model = tiny_llama(num_hidden_layers=DEPTH, use_cache=False)
        adapter = trimtab.attach(model, trimtab.ReLoRA(rank=3, restart_every=2, warm_start_steps=2, dropout=0.2))
        optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
        if compiled:
            compile_blocks(model)
        for step in range(1, 7):
            torch.manual_seed(step)
            model.zero_grad()
            model(input_ids=token_ids(step)).logits.square().mean().backward()
            optimizer.step()
            adapter.after_step(step, optimizer)
        model.eval()
        with torch.no_grad():
            ends.append(model(input_ids=token_ids()).logits)
    assert torch.equal(ends[0], ends[1])
    assert graphs() == 3


def test_hooks_on_a_compiled_block_run_outside_it() -> None:
    """A hook registered on a block whose forward is compiled sees the block's output, and breaks no graph."""
    model, _ = attached("relora")
    compile_blocks(model)
    seen: list[Tensor] = []
    for block in model.model.layers:  # type: ignore[union-attr]
        block.register_forward_hook(lambda _, args, out: seen.append(out.detach().clone()))
    out, _ = forward_backward(model)
    assert len(seen) == DEPTH and graphs() == 1 and not counters["graph_break"]
    with torch.no_grad():
        assert torch.allclose(model.lm_head(model.model.norm(seen[-1])), out, atol=1e-6)  # type: ignore[operator, union-attr]


class Probe(nn.Module):
    """A linear layer whose adapter is the identity beside a zero weight: y = drop(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def test_inductor_draws_one_mask_for_both_directions() -> None:
    """Compiled to C++: numbers as in eager mode without dropout; with it forward and backward share a fresh mask."""
    assert shutil.which("g++") or shutil.which("clang++"), "inductor needs a C++ compiler"
    torch.manual_seed(0)
    model, x = Probe(), torch.randn(64, 32)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=32, alpha=32, dropout=0.4, targets=("proj",)))
    layer = model.proj
    assert isinstance(layer, LoRAMixin)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(32))
        layer.lora_B.copy_(torch.eye(32))
    compiled = torch.compile(model, fullgraph=True)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        given = x.clone().requires_grad_()
        out = compiled(given)
        out.sum().backward()
        assert given.grad is not None
        assert torch.allclose(out, x * given.grad, atol=1e-6)
        masks.append(given.grad)
        values = masks[-1].unique()
        assert torch.allclose(values, torch.tensor([0.0, 1 / 0.6]), atol=1e-6)
        assert 0.3 < float((masks[-1] == 0).float().mean()) < 0.5
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    model.eval()
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(1))
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert adapter.trainable()


def test_the_loss_of_a_compiled_model_trains_it() -> None:
    """A sanity check on the whole: a few steps on one batch lower the loss."""
    model, adapter = attached("relora")
    compile_blocks(model, backend="eager")
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    losses = []
    for step in range(1, 6):
        loss = loss_of(model, token_ids())
        loss.backward()
        optimizer.step()
        adapter.after_step(step, optimizer)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
