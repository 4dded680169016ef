"""Cached hidden states of one backbone, and those of another, or of the same after it was written into."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families_for_tests import batch_for
from hidden_parts import assert_same, collate, counting, examples, inside_blocks, open_cache, visit, with_read
from models_for_tests import tiny_bert, tiny_llama, tiny_t5
from torch import nn

import trimtab
from trimtab.train.hidden.backbone import Backbone


def theta() -> nn.Module:
    model = tiny_llama()
    model.config.rope_parameters["rope_theta"] = 5.0
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str, str]] = {
    "weights": (lambda: tiny_llama(seed=5), {}, "bf16", r"of another backbone: lm_head.weight .* and \d+ more"),
    "dtype": (lambda: tiny_llama().bfloat16(), {}, "bf16", "of another backbone"),
    "settings": (theta, {}, "bf16", "of a backbone with other settings: rope_parameters"),
    "depth": (lambda: tiny_llama(num_hidden_layers=3), {}, "bf16", "of other stacks of blocks"),
    "family": (tiny_bert, {}, "bf16", "of other stacks of blocks"),
    "storage": (tiny_llama, {}, "int8", "stored in another form: storage 'bf16' there, 'int8' here"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_backbone_is_refused_and_named(other: str, tmp_path: Path) -> None:
    model, adapter = with_read("llama")
    with open_cache(adapter, tmp_path) as cache:
        visit(model, adapter, cache, collate(examples("llama")))
    make, settings, storage, message = OTHERS[other]
    with pytest.raises(trimtab.CheckpointError, match=f"{message}.*; give another folder, or delete this one"):
        open_cache(trimtab.attach(make(), trimtab.READ(size=8, **settings)), tmp_path, storage)


def test_what_stands_behind_or_beside_the_backbone_is_no_part_of_it(tmp_path: Path) -> None:
    """Another READ of another size, a trained head and another number of labels leave the cache as it is."""
    model, adapter = with_read("bert")
    batch = collate(examples("bert"))
    with open_cache(adapter, tmp_path) as cache:
        visit(model, adapter, cache, batch)
    other = tiny_bert()
    other.config.id2label = {0: "no", 1: "yes"}
    with torch.no_grad():
        other.classifier.weight.add_(1)
    again = trimtab.attach(other, trimtab.READ(size=4, cell="gru", init="drawn"))
    with open_cache(again, tmp_path) as cache, counting(inside_blocks(again)) as calls:
        visit(other, again, cache, batch)
    assert not calls
    pair = trimtab.attach(tiny_t5(), trimtab.READ(size=8))
    with open_cache(pair, tmp_path / "t5") as cache:
        visit(pair.model, pair, cache, collate(examples("t5")))
    with pytest.raises(trimtab.CheckpointError, match="of other stacks of blocks"):
        open_cache(trimtab.attach(tiny_t5(), trimtab.READ(size=8, joiner="none")), tmp_path / "t5")


def esm(**settings: Any) -> trimtab.Adapter:
    from transformers import EsmConfig, EsmForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = EsmConfig(vocab_size=33, mask_token_id=32, pad_token_id=1, position_embedding_type="rotary", **sizes)
    for name, value in settings.items():
        setattr(config, name, value)
    return trimtab.attach(EsmForSequenceClassification(config), trimtab.READ(size=8, init="drawn"))


def stored(adapter: trimtab.Adapter, folder: Path) -> trimtab.HiddenCache:
    """Of a batch, which is new to the folder or not."""
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(4, 31, (2, 8), generator=generator), "labels": torch.tensor([0, 1])}
    with open_cache(adapter, folder) as cache:
        visit(adapter.model, adapter, cache, batch | {"attention_mask": torch.ones(2, 8)})
    return cache


def test_a_dropout_that_acts_without_training_counts(tmp_path: Path) -> None:
    """ESM's token_dropout scales what an evaluated model reads; dropout itself does not act in a frozen backbone."""
    stored(esm(token_dropout=True), tmp_path)
    again = esm(token_dropout=True, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.4)
    with counting(inside_blocks(again)) as calls:
        stored(again, tmp_path)
    assert not calls
    with pytest.raises(trimtab.CheckpointError, match=r"other settings: token_dropout \(True there, False here\)"):
        stored(esm(token_dropout=False), tmp_path)


def test_settings_of_generation_do_not_count_and_words_that_make_inputs_do(tmp_path: Path) -> None:
    stored(esm(), tmp_path)
    stored(esm(begin_suppress_tokens=[1, 2], num_beams=4, forced_eos_token_id=2), tmp_path)
    with pytest.raises(trimtab.CheckpointError, match=r"other settings: decoder_start_token_id \(.*, 3 here\)"):
        stored(esm(decoder_start_token_id=3), tmp_path)


def test_settings_of_a_models_parts_are_looked_at_alike() -> None:
    from transformers import CLIPConfig, PreTrainedModel

    class Whole(PreTrainedModel):
        config_class = CLIPConfig

    def settings(**text: Any) -> dict[str, Any]:
        return Backbone(Whole(CLIPConfig(text_config=text)), [], []).settings()

    assert settings() == settings(attention_dropout=0.5, num_beams=3, use_cache=False)
    assert settings() != settings(hidden_act="relu")


@pytest.mark.parametrize(("family", "words"), [("bert", "sdpa"), ("t5", "sdpa, sdpa"), ("albert", "sdpa")])
def test_another_implementation_of_attention_is_refused(family: str, words: str, tmp_path: Path) -> None:
    """Before anything is read, and also while the cache is open; back at the first one all is as it was."""
    settings = {"blocks": ("albert_layer_groups",)} if family == "albert" else {}
    model, adapter = with_read(family, **settings)
    batch = batch_for(family)
    new = {name: value.flip(1) if value.dim() > 1 else value for name, value in batch.items()}
    other, again = with_read(family, **settings)
    other.set_attn_implementation("eager")
    message = f"computed with attention {words}, and it is {words.replace('sdpa', 'eager')} now; call the model as"
    with open_cache(adapter, tmp_path) as cache:
        first = visit(model, adapter, cache, batch)
        model.set_attn_implementation("eager")
        for asked in (batch, new):
            with pytest.raises(trimtab.CheckpointError, match=message):
                visit(model, adapter, cache, asked)
        model.set_attn_implementation("sdpa")
        assert_same(visit(model, adapter, cache, batch), first)
    with open_cache(again, tmp_path) as cache, pytest.raises(trimtab.CheckpointError, match=message):
        visit(other, again, cache, batch)


def test_what_another_began_meanwhile_is_looked_at_as_well(tmp_path: Path) -> None:
    """The folder was empty when this cache was opened, so that nothing was known of how it would be filled."""
    model, adapter = with_read("bert")
    other, again = with_read("bert")
    other.set_attn_implementation("eager")
    batch = batch_for("bert")
    cache = open_cache(adapter, tmp_path)
    with open_cache(again, tmp_path) as filled:
        visit(other, again, filled, batch)
    with pytest.raises(trimtab.CheckpointError, match="computed with attention eager, and it is sdpa now"):
        visit(model, adapter, cache, batch)


def test_a_folder_of_an_older_version_is_refused(tmp_path: Path) -> None:
    stored(esm(), tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "format": 1}))
    with pytest.raises(
        trimtab.CheckpointError, match="of format 1, and this version has format 2; give another folder, or delete"
    ):
        stored(esm(), tmp_path)


def test_a_cache_without_examples_is_one(tmp_path: Path) -> None:
    with open_cache(esm(), tmp_path) as cache:
        assert len(cache) == 0 and cache


def test_a_backbone_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    model, adapter = with_read("llama")
    batch = collate(examples("llama"))
    cache = open_cache(adapter, tmp_path)
    first = visit(model, adapter, cache, batch)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(trimtab.CheckpointError, match=r"has changed since .*: model\.layers\.0\.mlp\.up_proj\.weight"):
        visit(model, adapter, cache, batch)
    with torch.no_grad():
        weight.sub_(1)
    weight.data = tiny_llama().model.layers[0].mlp.up_proj.weight.data.clone()  # moved, but the same
    assert_same(visit(model, adapter, cache, batch), first)


def through_data(weight: nn.Parameter) -> None:
    weight.data.mul_(3.0)


def by_a_fused_step(weight: nn.Parameter) -> None:
    """Of an optimizer that somebody else put on a frozen weight."""
    weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.requires_grad_(False)
    weight.grad = None


@pytest.mark.parametrize("write", [through_data, by_a_fused_step])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_write_that_torch_does_not_count_is_noticed(
    dtype: torch.dtype, name: str, write: Callable[[nn.Parameter], None], tmp_path: Path
) -> None:
    model, adapter = with_read("llama", dtype=dtype, train_also=())
    batch = collate(examples("llama"))
    cache = open_cache(adapter, tmp_path)
    first = visit(model, adapter, cache, batch)
    weight = model.get_parameter(name)
    version, before = weight._version, weight.detach().clone()
    write(weight)
    assert weight._version == version and not torch.equal(weight, before)
    with pytest.raises(trimtab.CheckpointError, match=rf"has changed since the cache was opened: {re.escape(name)} "):
        visit(model, adapter, cache, batch)
    weight.data.copy_(before)
    assert_same(visit(model, adapter, cache, batch), first)


def test_the_sample_of_a_backbone_is_of_all_rows_and_columns_in_whatever_order_they_lie() -> None:
    """A write into any sixteenth of the rows or columns of a matrix is seen, and one into one number may not be."""
    linear = nn.Linear(512, 768)
    linear.register_buffer("turned", torch.randn(768, 512).t())
    linear.register_buffer("nothing", torch.tensor(float("nan")))
    linear.register_buffer("empty", torch.zeros(3, 0))
    backbone = Backbone(linear, [], [])
    before, digests = backbone.state(), backbone.digests()
    assert backbone.state() == before
    for tensor in (linear.weight.data, linear.get_buffer("turned").data):
        for part in (*tensor.chunk(16), *tensor.chunk(16, 1)):
            kept = part.clone()
            part.add_(1)
            assert backbone.state() != before
            part.copy_(kept)
    linear.weight.data[300, 300] += 1
    assert backbone.state() == before and backbone.digests() != digests
