"""READ on a backbone of 8 or 4 bits: it starts as the backbone, learns, and unpacks no weight in the backward pass."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import logits, tiny_llama, token_ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trimtab
from trimtab.bench.meters import saved_bytes

needs_bitsandbytes = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("bitsandbytes", "accelerate"))
    or importlib.util.find_spec("kernels") is not None,
    reason="bitsandbytes or accelerate is absent, or bitsandbytes refused beside kernels",
)


def in_8_bits(folder: Path, **changes: Any) -> nn.Module:
    """As transformers loads a checkpoint with `load_in_8bit`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(**changes).save_pretrained(folder)
    bits = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits, device_map="cpu", dtype=torch.float32)


def in_nf4(folder: Path, **changes: Any) -> nn.Module:
    model = tiny_llama(**changes)
    trimtab.quantize(model, "nf4")
    return model


Load = Callable[..., nn.Module]
KINDS = [pytest.param(in_8_bits, marks=needs_bitsandbytes, id="8 bits"), pytest.param(in_nf4, id="nf4")]


def codes(model: nn.Module) -> dict[str, Tensor]:
    """The packed weights: of every linear layer of the blocks."""
    found = {name: p for name, p in model.named_parameters() if p.dtype == torch.int8}
    assert len(found) == 7 * len(model.model.layers)
    return found


class Unpackings(TorchDispatchMode):
    """Counts the operations on packed weights: those with a tensor of bytes, and bitsandbytes' own."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        packed = any(tensor.dtype in (torch.int8, torch.uint8) for tensor in given)
        self.count += packed or function.namespace == "bitsandbytes"
        return function(*args, **(kwargs or {}))


def unpackings(backward: Callable[[], object]) -> int:
    with Unpackings() as mode:
        backward()
    return mode.count


def graph(loss: Tensor) -> Iterator[str]:
    """The names of the functions behind a loss."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node.name()
            left += [function for function, _ in node.next_functions]


@pytest.mark.parametrize("load", KINDS)
def test_it_starts_as_the_backbone_and_learns(load: Load, tmp_path: Path) -> None:
    """To the bit; the loss falls, codes and answers of the backbone stay what they are."""
    model, ids = load(tmp_path).train(), token_ids()
    first, before = logits(model, ids), {name: code.clone() for name, code in codes(model).items()}
    adapter = trimtab.attach(model, trimtab.READ(size=8))
    assert torch.equal(logits(model, ids), first)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=3e-2))
    losses = []
    for step in range(1, 11):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        adapter.after_step(step, optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(entry.parameter.dtype == torch.float32 for entry in adapter.trainable())
    assert all(torch.equal(code, before[name]) for name, code in codes(model).items())
    with adapter.disabled():
        assert torch.equal(logits(model, ids), first)


@pytest.mark.parametrize("load", KINDS)
def test_nothing_of_the_backbone_is_kept_for_the_backward(load: Load, tmp_path: Path) -> None:
    """A block more keeps phi_j and h_j, and no function of a packed layer is in the graph, whoever asks for one."""
    ids = token_ids(rows=4, length=16)

    def kept(blocks: int) -> int:
        model = load(tmp_path / str(blocks), num_hidden_layers=blocks).train()
        model.enable_input_require_grads()
        trimtab.attach(model, trimtab.READ(size=8))
        names = set(graph(model(input_ids=ids, labels=ids).loss))
        assert not {name for name in names if "8bit" in name or "NF4" in name} and len(names) > 5
        return saved_bytes(lambda: model(input_ids=ids).logits)

    assert kept(4) - kept(3) == ids.numel() * (32 + 8) * 4


@pytest.mark.parametrize("load", KINDS)
def test_no_weight_is_unpacked_in_the_backward(load: Load, tmp_path: Path) -> None:
    """Where gradients flow through the backbone, each of its layers is; with READ none, and the forward needs each."""
    model, ids = load(tmp_path).train(), token_ids()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    loss = model(inputs_embeds=embedded, labels=ids).loss
    names = [name for name in graph(loss) if "8bit" in name or "NF4" in name]
    layers = len(codes(model))
    assert len(names) == layers and unpackings(loss.backward) >= layers

    adapter = trimtab.attach(model, trimtab.READ(size=8, init="drawn"))
    losses = []
    assert unpackings(lambda: losses.append(model(inputs_embeds=embedded, labels=ids).loss)) >= layers
    assert unpackings(losses[0].backward) == 0
    assert all(entry.parameter.grad is not None and entry.parameter.grad.any() for entry in adapter.trainable())


@pytest.mark.parametrize("load", KINDS)
def test_its_hidden_states_are_kept_from_load_to_load(load: Load, tmp_path: Path) -> None:
    """Another load of the same backbone, used or not, reads what the first one stored: no block runs for it."""
    batch = {"input_ids": token_ids(), "labels": token_ids()}
    losses, calls = [], [0]
    for used in (False, False, True):
        model = load(tmp_path / "model").train()
        adapter = trimtab.attach(model, trimtab.READ(size=8, init="drawn"))
        if used:
            model(**batch)
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
        with trimtab.HiddenCache(adapter, tmp_path / "hidden", "exact") as cache:
            for _ in range(2):
                with cache.batch(batch):
                    losses.append(model(**batch).loss.item())
            assert len(cache) == 3
    assert len(set(losses)) == 1
    assert calls == [1]
