"""LoRA on an embedding: gradients, the padding entry, what it saves, its merge, and which embeddings it takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.nn.adapted import dress
from trimtab.nn.lora_embedding import LoRAEmbeddingMixin, embedding_fault, lora_embedding

IDS = torch.tensor([[3, 0, 3, 1], [5, 2, 1, 3]])


def parts(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """A table of 6 entries, 5 wide, and factors of rank 3."""
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(s, generator=generator, dtype=dtype) for s in ((6, 5), (3, 6), (5, 3)))
    return weight, a.requires_grad_(), b.requires_grad_()


def test_gradcheck() -> None:
    """Gradients of A and B equal finite differences, with entries that come more than once."""
    weight, a, b = parts()
    assert torch.autograd.gradcheck(lambda a, b: lora_embedding(IDS, weight, a, b, scale=0.7), (a, b))


@pytest.mark.parametrize("padding", [None, 1])
def test_it_is_the_plain_formula(padding: int | None) -> None:
    """Output and gradients are those of autograd on F.embedding, of which the padding entry gets none."""
    weight, a, b = parts()
    ours = lora_embedding(IDS, weight, a, b, scale=0.7, padding=padding)
    plain = F.embedding(IDS, weight) + 0.7 * F.embedding(IDS, a.t(), padding_idx=padding) @ b.t()
    assert torch.allclose(ours, plain)
    g = torch.randn_like(plain)
    grads = torch.autograd.grad((ours * g).sum(), (a, b))
    for x, y in zip(grads, torch.autograd.grad((plain * g).sum(), (a, b)), strict=True):
        assert torch.allclose(x, y)
    assert bool(grads[0][:, 1].any()) == (padding is None)


def test_only_ids_are_saved() -> None:
    """Beside the factors the backward keeps 8 bytes a token, and the table gets no gradient."""
    weight, a, b = parts(torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        out = lora_embedding(IDS, weight, a, b, scale=1.0)
    kept = [t for t in saved if t.data_ptr() not in (a.data_ptr(), b.data_ptr())]
    assert sum(t.numel() * t.element_size() for t in kept) == 8 * IDS.numel()
    out.sum().backward()
    assert weight.grad is None and a.grad is not None and b.grad is not None


def test_a_dressed_embedding_starts_as_it_was_and_merges() -> None:
    """A = 0 changes no bit; the merged table answers as the adapter did."""
    torch.manual_seed(0)
    layer = nn.Embedding(6, 5, padding_idx=1).requires_grad_(False)
    before = layer(IDS)
    own = {"lora_embedding_A": nn.Parameter(torch.ones(3, 6)), "lora_embedding_B": nn.Parameter(torch.ones(5, 3))}
    dress(layer, LoRAEmbeddingMixin, parameters=own, scale=2.0, dropout=0.0)
    layer.draw(0, "key")  # type: ignore[operator]
    assert torch.equal(layer(IDS), before) and own["lora_embedding_B"].std() > 0.5
    with torch.no_grad():
        own["lora_embedding_A"].normal_()
    now = layer(IDS)
    assert torch.allclose(layer.effective_weight()[IDS], now, atol=1e-5)  # type: ignore[operator]
    layer.merge_()  # type: ignore[operator]
    assert torch.allclose(F.embedding(IDS, layer.weight), now, atol=1e-5)


def test_embeddings_that_do_more_than_look_up_are_named() -> None:
    """A subclass, max_norm and sparse gradients are faults; a plain table, padded or not, has none."""

    class Scaled(nn.Embedding):
        pass

    assert "Scaled" in embedding_fault(Scaled(3, 2))
    assert "max_norm" in embedding_fault(nn.Embedding(3, 2, max_norm=1.0))
    assert "sparse" in embedding_fault(nn.Embedding(3, 2, sparse=True))
    assert not embedding_fault(nn.Embedding(3, 2, padding_idx=0))
