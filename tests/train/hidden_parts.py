"""Models with READ, examples of several lengths, and what happens when they are visited."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families_for_tests import DECODERS, FAMILIES, PAIRS, Batch
from models_for_tests import VOCAB
from torch import Tensor, nn

import trimtab

FIVE = ("llama", "bert", "vit", "t5", "bart")


def with_read(family: str, *, dtype: torch.dtype | None = None, **settings: Any) -> tuple[nn.Module, trimtab.Adapter]:
    """A model in training mode, whose READ does not start at zero, and whose head has no dropout."""
    model = FAMILIES[family]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if dtype is not None:
        model.to(dtype)
    settings = {"size": 8, "init": "drawn", **settings}
    adapter = trimtab.attach(model, trimtab.READ(**settings))
    return model.train(), adapter


def open_cache(adapter: trimtab.Adapter, folder: Path, storage: Any = "bf16", **settings: Any) -> trimtab.HiddenCache:
    """A cache, without the word about rounding, which has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="storage=")
        return trimtab.HiddenCache(adapter, folder, storage, **settings)


Example = dict[str, Tensor]


def examples(family: str, count: int = 6, *, seed: int = 3) -> list[Example]:
    """Rows of several lengths, without padding."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> Tensor:
        return torch.randint(3, VOCAB, (length,), generator=generator)

    found = []
    for number in range(count):
        if family == "vit":
            images = torch.randn(3, 16, 16, generator=generator)
            found.append({"pixel_values": images, "labels": torch.tensor(number % 3)})
            continue
        example = {"input_ids": ids(5 + number % 4)}
        if family in PAIRS:
            example["labels"] = ids(3 + number % 3)
        else:
            example["labels"] = example["input_ids"] if family in DECODERS else torch.tensor(number % 2)
        found.append(example)
    return found


def collate(rows: Sequence[Example], *, more: int = 0) -> Batch:
    """A batch, padded on the right to its longest row and by `more` beyond it."""
    batch: Batch = {}
    for name in rows[0]:
        tensors = [row[name] for row in rows]
        if name == "pixel_values" or tensors[0].dim() == 0:
            batch[name] = torch.stack(tensors)
            continue
        length = max(map(len, tensors)) + more
        filler = -100 if name == "labels" else 0
        batch[name] = torch.full((len(rows), length), filler)
        for row, tensor in enumerate(tensors):
            batch[name][row, : len(tensor)] = tensor
        if name == "input_ids":
            batch["attention_mask"] = torch.zeros(len(rows), length, dtype=torch.long)
            for row, tensor in enumerate(tensors):
                batch["attention_mask"][row, : len(tensor)] = 1
    return batch


def weight_of(batch: Batch) -> int:
    """How many labels a batch's mean loss is of."""
    labels = batch["labels"]
    return int((labels != -100).sum()) - (len(labels) if "input_ids" in batch and _shifts(batch) else 0)


def _shifts(batch: Batch) -> bool:
    """Whether a language model predicts the next token of the very row."""
    return batch["labels"].shape == batch["input_ids"].shape


Gradients = dict[str, Tensor]


def visit(
    model: nn.Module, adapter: trimtab.Adapter, cache: trimtab.HiddenCache | None, batch: Batch
) -> tuple[Tensor, Gradients]:
    """Loss and gradients of a batch; without a cache those of the model itself."""
    with quiet():
        if cache is None:
            loss = model(**batch).loss
        else:
            with cache.batch(batch):
                loss = model(**batch).loss
    loss.backward()
    gradients = {}
    for entry in adapter.trainable():
        assert entry.parameter.grad is not None, entry.name
        gradients[entry.name] = entry.parameter.grad
        entry.parameter.grad = None
    return loss.detach(), gradients


@contextmanager
def quiet() -> Iterator[None]:
    """No word about rounding."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="storage=")
        yield


def assert_same(one: tuple[Tensor, Gradients], other: tuple[Tensor, Gradients]) -> None:
    """Loss and gradients are the same bits."""
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        assert torch.equal(one[1][name], other[1][name]), name


@contextmanager
def hearing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, Tensor, Tensor | None]]]:
    """What READ's networks read meanwhile: number of the block, its hidden states, and what the joiner gave."""
    from trimtab.nn.sidenet import DepthRun

    heard: list[tuple[int, Tensor, Tensor | None]] = []
    advance = DepthRun.advance

    def listen(self: DepthRun, number: int, phi: Tensor, joined: Tensor | None) -> Tensor | None:
        heard.append((number, phi.clone(), None if joined is None else joined.detach().clone()))
        return advance(self, number, phi, joined)

    with monkeypatch.context() as patch:
        patch.setattr(DepthRun, "advance", listen)
        yield heard


@contextmanager
def counting(modules: Sequence[nn.Module]) -> Iterator[list[int]]:
    """How often modules are called meanwhile."""
    calls: list[int] = []
    handles = [module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in modules]
    yield calls
    for handle in handles:
        handle.remove()


def inside_blocks(adapter: trimtab.Adapter) -> list[nn.Module]:
    """All that has no parts of its own in the blocks."""
    reading = adapter.reading()  # type: ignore[attr-defined]
    blocks = [block for hooks in reading.hooks for block in hooks.stack.blocks]
    return [module for block in blocks for module in block.modules() if not list(module.children())]
