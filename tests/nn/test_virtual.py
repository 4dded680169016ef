"""Masks and positions with virtual tokens, and where a model's backbone is."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import tiny_bert, tiny_gpt2, tiny_llama, tiny_mlp
from torch import nn

import trimtab
from trimtab.nn.virtual import VirtualTokens, backbone, input_embeddings, position_limit, qualified, read_shape

CAUSAL, BOTH = VirtualTokens(2, 10, True), VirtualTokens(2, 10, False)


def test_a_flat_mask_gets_ones() -> None:
    """(B, K) of any dtype: p ones before it."""
    for dtype in (torch.bool, torch.long, torch.float32):
        mask = torch.tensor([[0, 1, 1]]).to(dtype)
        out = CAUSAL.mask(mask, rows=True)
        assert out.dtype == dtype and out.tolist() == torch.tensor([[1, 1, 0, 1, 1]]).to(dtype).tolist()
    assert CAUSAL.mask(None, rows=True) is None


def test_a_square_mask_shows_the_prompt_to_every_token() -> None:
    """Causal: virtual tokens see those before them; otherwise all that any token sees."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]]).bool()[None, None]
    seen = CAUSAL.mask(mask, rows=True)[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    padded = torch.tensor([[1, 1, 0]] * 3).bool()[None, None]
    assert BOTH.mask(padded, rows=True)[0, 0].int().tolist() == [[1, 1, 1, 1, 0]] * 5
    assert CAUSAL.mask(mask, rows=False)[0, 0].int().tolist() == [r[:2] + r[2:] for r in seen[2:]]


@pytest.mark.parametrize("virtual", [CAUSAL, BOTH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_added_mask_is_the_boolean_one(virtual: VirtualTokens, dtype: torch.dtype) -> None:
    """0 where seen, the dtype's least number where not, in the same places."""
    mask = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    added = torch.zeros(2, 1, 4, 4, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    for rows in (True, False):
        out = virtual.mask(added, rows=rows)
        assert out.dtype == dtype and torch.equal(out == 0, virtual.mask(mask, rows=rows))
        assert set(out.unique().tolist()) == {0.0, torch.finfo(dtype).min}


def test_masks_of_other_kinds_are_refused() -> None:
    """Three dimensions, whole numbers in four, and what is no tensor."""
    for mask, message in (
        (torch.ones(1, 2, 3), r"attention_mask is \(1, 2, 3\)"),
        (torch.ones(1, 1, 3, 3, dtype=torch.long), r"torch.int64"),
        ([1, 1], "attention_mask is list"),
    ):
        with pytest.raises(trimtab.ConfigError, match=message):
            CAUSAL.mask(mask, rows=True)


def test_positions_move_behind_the_prompt() -> None:
    """With rows the prompt's own come first, in two and in three dimensions."""
    at = torch.tensor([[0, 1, 2], [0, 0, 1]])
    assert CAUSAL.positions(at, rows=False).tolist() == [[2, 3, 4], [2, 2, 3]]  # type: ignore[union-attr]
    assert CAUSAL.positions(at, rows=True).tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 2, 3]]  # type: ignore[union-attr]
    assert CAUSAL.positions(at.expand(3, 2, 3), rows=True).shape == (3, 2, 5)  # type: ignore[union-attr]
    assert CAUSAL.positions(None, rows=True) is None


def test_lengths() -> None:
    """Refused only where the batch alone would have fitted."""
    CAUSAL.check_length(10)
    CAUSAL.check_length(13)  # 11 tokens are too many without a prompt: the model's own affair
    VirtualTokens(2, None, True).check_length(10**6)
    with pytest.raises(trimtab.ConfigError, match="9 tokens and 2 virtual ones are 11 positions"):
        CAUSAL.check_length(11)


def test_the_backbone_is_the_innermost_part_with_embeddings() -> None:
    """Below every head; the model itself where it has none; an error where there are no embeddings."""
    assert backbone(tiny_llama())[0] == "model"
    assert backbone(tiny_gpt2())[0] == "transformer"
    bert = tiny_bert()
    assert backbone(bert) == ("bert", bert.bert) and backbone(bert.bert) == ("", bert.bert)
    assert qualified("", "x") == "x" and qualified("a.b", "x") == "a.b.x"
    with pytest.raises(trimtab.ConfigError, match="Mlp has no input embeddings"):
        backbone(tiny_mlp())
    bare = tiny_mlp()
    bare.get_input_embeddings = lambda: nn.Embedding(3, 4)  # type: ignore[assignment]
    with pytest.raises(trimtab.ConfigError, match="no part with a config"):
        backbone(bare)
    assert position_limit(tiny_llama()) == 64 and position_limit(bare) is None
    assert input_embeddings(bare) is not None


def test_a_call_has_ids_or_embeddings() -> None:
    """Both or neither is the model's own affair."""
    ids, embeds = torch.zeros(2, 3), torch.zeros(2, 4, 5)
    assert read_shape({"input_ids": ids}) == (2, 3)
    assert read_shape({"inputs_embeds": embeds, "input_ids": None}) == (2, 4)
    assert read_shape({}) is None and read_shape({"input_ids": ids, "inputs_embeds": embeds}) is None
