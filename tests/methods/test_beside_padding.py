"""Networks beside a backbone: what a sequence gives depends neither on padding nor on its neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside_parts import config_for
from families_for_tests import ENCODERS, FAMILIES, PAIRS, Batch, batch_for
from models_for_tests import token_ids
from torch import Tensor, nn

import trimtab

SHORT, LONG = 7, 12
WORDS = [name for name in ENCODERS if name != "vit"]
TEXT_PAIRS = [name for name in PAIRS if name != "whisper"]
#: Decoders whose position_ids tell where a packed document begins.
PACKING = ["llama", "qwen2", "gpt2", "gpt_neox"]


def beside(family: str, method: str) -> nn.Module:
    """A model whose network beside it says something of its own, of all tensors of which nothing is zero."""
    model = FAMILIES[family]()
    adapter = trimtab.attach(model, config_for(method, family))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for entry in adapter.trainable():
            entry.parameter.add_(0.3 * torch.randn(entry.parameter.shape, generator=generator))
    return model.eval()


def logits(model: nn.Module, **batch: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**batch).logits
    return out


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def pairs(families: list[str]) -> list[tuple[str, str]]:
    """Families with READ, and with Ladder where it takes them as small as they are here."""
    read = [(family, "read") for family in families]
    return read + [(family, "ladder") for family in families if family not in ("albert", "gpt_neox")]


def padded(rows: int = 3) -> Batch:
    """Sequences of 12 tokens of which the first has 7, padded on the right."""
    ids = token_ids(rows=rows, length=LONG)
    mask = torch.ones_like(ids)
    ids[0, SHORT:], mask[0, SHORT:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("family", "method"), pairs(["llama", "gpt2", "opt", "gpt_neox", "qwen2"]))
def test_padding_on_the_left_of_a_decoder(family: str, method: str) -> None:
    """The logits of a padded sequence are those that it has alone, and not those of an attention to the padding."""
    model = beside(family, method)
    batch = padded()
    ids = batch["input_ids"].clone()
    ids[0] = torch.cat((torch.zeros(LONG - SHORT, dtype=torch.long), ids[0, :SHORT]))
    mask = batch["attention_mask"].flip(1)
    places = {} if family == "opt" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}  # OPT counts itself
    alone = logits(model, input_ids=ids[:1, -SHORT:], attention_mask=mask[:1, -SHORT:])
    beside_others = logits(model, input_ids=ids, attention_mask=mask, **places)[:1, -SHORT:]
    assert close(beside_others, alone)
    seen = logits(model, input_ids=ids, attention_mask=torch.ones_like(mask), **places)[:1, -SHORT:]
    assert not close(seen, alone)


@pytest.mark.parametrize(("family", "method"), pairs(WORDS))
def test_padding_of_an_encoder(family: str, method: str) -> None:
    """The same, in an encoder with a classifier."""
    model, batch = beside(family, method), padded()
    alone = logits(model, **{name: value[:1, :SHORT] for name, value in batch.items()})
    assert close(logits(model, **batch)[:1], alone)
    assert not close(logits(model, input_ids=batch["input_ids"], attention_mask=torch.ones(3, LONG))[:1], alone)


@pytest.mark.parametrize(("family", "method"), pairs(TEXT_PAIRS))
def test_padding_of_an_encoder_and_its_decoder(family: str, method: str) -> None:
    """A padded source, and a target that is padded on the right."""
    model, batch = beside(family, method), padded()
    targets = batch_for(family)["labels"]
    given = {"decoder_input_ids": targets, "decoder_attention_mask": torch.ones_like(targets)}
    given["decoder_attention_mask"][0, 4:] = 0
    one = {name: value[:1, :4] for name, value in given.items()}
    alone = logits(model, **{name: value[:1, :SHORT] for name, value in batch.items()}, **one)
    assert close(logits(model, **batch, **given)[:1, :4], alone)
    seen = logits(model, input_ids=batch["input_ids"], attention_mask=torch.ones(3, LONG), **given)[:1, :4]
    assert not close(seen, alone)


@pytest.mark.parametrize(("family", "method"), pairs(PACKING))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_neighbour_does_not_matter(family: str, method: str, attention: str) -> None:
    """The second of two documents in a row has the logits that it has alone; without positions it has not."""
    model = beside(family, method)
    model.set_attn_implementation(attention)
    first, second = token_ids(rows=1, length=5), token_ids(seed=9, rows=1, length=8)
    alone = logits(model, input_ids=second, use_cache=False)
    both = torch.cat((first, second), dim=1)
    places = torch.cat((torch.arange(5), torch.arange(8)))[None]
    assert close(logits(model, input_ids=both, position_ids=places, use_cache=False)[:, 5:], alone)
    assert not close(logits(model, input_ids=both, use_cache=False)[:, 5:], alone)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", [*TEXT_PAIRS])
def test_a_padded_source_is_translated_as_alone(family: str, beams: int) -> None:
    """With READ, whose encoder's network reaches the decoder's by the cross-attention."""
    model, batch = beside(family, "read"), padded()
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}

    def written(given: Batch, **more: bool) -> tuple[Tensor, Tensor]:
        """The first row's tokens, and how likely they were."""
        out = model.generate(**given, **settings, **more, return_dict_in_generate=True, output_scores=True)
        scores = model.compute_transition_scores(
            out.sequences, out.scores, getattr(out, "beam_indices", None), normalize_logits=beams == 1
        )
        return out.sequences[0], scores[0]

    tokens, scores = written({name: value[:1, :SHORT] for name, value in batch.items()})
    for cache in (True, False):
        others = written(batch, use_cache=cache)
        assert torch.equal(others[0], tokens)
        assert close(others[1], scores)
    seen = written({**batch, "attention_mask": torch.ones(3, LONG, dtype=torch.long)})
    assert not close(seen[1], scores)
