"""Cached hidden states: labels that would be predicted from positions which are not kept."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hidden_parts import assert_same, collate, examples, open_cache, visit, with_read
from models_for_tests import VOCAB, tiny_bert
from torch import Tensor, nn

import trimtab
from trimtab.train.hidden.examples import examples_of
from trimtab.train.hidden.labels import check_labels

IDS = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))


def batch_of(*, left: int = 0, right: int = 0, ignored: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Three rows of 6 positions, of which row 1 is padded; its labels do not count at `ignored`."""
    mask, labels = torch.ones_like(IDS), IDS.clone()
    mask[1, :left] = 0
    mask[1, 6 - right :] = 0
    labels[1, list(ignored)] = -100
    return {"input_ids": IDS, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (batch_of(left=2, ignored=(0, 1)), "position 2 of row 1 counts and is predicted from position 1, which has no"),
        (batch_of(right=3), "position 4 of row 1 counts and is at a position without a token by the attention_mask"),
    ],
)
def test_the_next_token_is_not_predicted_from_padding(batch: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    adapter = with_read("llama")[1]
    cache = open_cache(adapter, tmp_path, "exact")
    told = rf"labels: the label at {message}.*set that label to -100 \(with padding on the left, that of the first"
    with pytest.raises(trimtab.ConfigError, match=told), cache.batch(batch):
        raise AssertionError
    with pytest.raises(trimtab.ConfigError, match=told):
        cache.fill([batch])
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    with pytest.raises(trimtab.ConfigError, match=told), cache.batch(unlabelled):
        adapter.model(**batch)
    with cache.batch(unlabelled):
        adapter.model(**unlabelled)


@pytest.mark.parametrize(
    "batch", [batch_of(left=2, ignored=(0, 1, 2)), batch_of(right=3, ignored=(3, 4, 5)), batch_of(right=1), batch_of()]
)
def test_what_is_predicted_from_tokens_is_the_same_loss(batch: dict[str, Tensor], tmp_path: Path) -> None:
    model, adapter = with_read("llama")
    cache = open_cache(adapter, tmp_path, "exact")
    plain = visit(model, adapter, None, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            loss, _gradients = visit(model, adapter, cache, batch)
            torch.testing.assert_close(loss, plain[0], rtol=1e-6, atol=0)


def told(model: nn.Module, batch: dict[str, Tensor], *, sides: Any = ("only",)) -> str:
    return check_labels(model, batch["labels"], examples_of(batch, sides), sides)


def bert(kind: str) -> nn.Module:
    config = tf.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model: nn.Module = getattr(tf, kind)(config)
    return model


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForTokenClassification"])
def test_a_loss_that_does_not_shift_is_asked_for_its_own_positions(kind: str) -> None:
    model = bert(kind)
    assert not told(model, batch_of(left=2, ignored=(0, 1)))
    for batch, place in ((batch_of(left=2, ignored=(0,)), 1), (batch_of(right=1), 5)):
        with pytest.raises(trimtab.ConfigError, match=f"position {place} of row 1 counts and is at a position without"):
            told(model, batch)


def test_labels_of_rows_and_numbers_pass() -> None:
    batch = batch_of(left=2)
    for labels in (torch.tensor([0, 1, 0]), torch.rand(3, 6), torch.zeros(3, 4, dtype=torch.long)):
        assert not told(tiny_bert(), batch | {"labels": labels})


class Own(nn.Module):
    """Makes a loss in a way of its own."""

    def forward(self, labels: Tensor) -> Tensor:
        return labels


def test_an_unknown_loss_is_refused_where_it_is_wrong_either_way_and_else_cautioned() -> None:
    assert not told(Own(), batch_of(left=2, ignored=(0, 1, 2)))
    for batch, place in ((batch_of(left=2, ignored=(0, 1)), 2), (batch_of(right=1), 5)):
        assert f"position {place} of row 1 counts, and it or the position before" in told(Own(), batch)
    with pytest.raises(trimtab.ConfigError, match="position 1 of row 1 counts"):
        told(Own(), batch_of(left=2, ignored=(2,)))


def test_a_caution_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = with_read("llama")
    monkeypatch.setattr(model, "_loss_function", lambda logits, labels, **_: logits.sum(), raising=False)
    cache = open_cache(adapter, tmp_path, "exact")
    batch = batch_of(left=2, ignored=(0, 1))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(2):
            with cache.batch(batch):
                model(**batch)
    texts = [str(w.message) for w in heard if "labels" in str(w.message)]
    assert len(texts) == 1 and "whether LlamaForCausalLM predicts it from there is not known" in texts[0]


def test_a_decoders_labels_are_at_its_tokens(tmp_path: Path) -> None:
    model, adapter = with_read("t5")
    cache = open_cache(adapter, tmp_path, "exact")
    batch = collate(examples("t5"))
    plain = visit(model, adapter, cache, batch)
    assert_same(visit(model, adapter, cache, batch), plain)
    masked = batch | {"decoder_attention_mask": (batch["labels"] != -100).long()}
    visit(model, adapter, cache, masked)
    masked["decoder_attention_mask"][2, 1:] = 0
    with pytest.raises(
        trimtab.ConfigError, match=r"position 1 of row 2 .* without a token by the decoder_attention_mask"
    ):
        visit(model, adapter, cache, masked)
