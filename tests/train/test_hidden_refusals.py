"""Cached hidden states: where they are refused, filled ahead, and what they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hidden_parts import assert_same, collate, counting, examples, inside_blocks, open_cache, quiet, visit, with_read
from models_for_tests import tiny_llama, token_ids

import trimtab


def test_methods_and_settings_without_fixed_hidden_states_are_refused(tmp_path: Path) -> None:
    lora = trimtab.attach(tiny_llama(), trimtab.LoRA(rank=2))
    with pytest.raises(trimtab.ConfigError, match="method lora: hidden states cannot be kept for it: it works inside"):
        open_cache(lora, tmp_path)
    with pytest.raises(
        trimtab.ConfigError, match=r"method read: .*backbone_dropout=True they are drawn anew.*\(False keeps"
    ):
        open_cache(with_read("llama", backbone_dropout=True)[1], tmp_path)
    with pytest.raises(trimtab.ConfigError, match=r"storage='fp8' .* use one of bf16, int8, exact"):
        open_cache(with_read("llama")[1], tmp_path, "fp8")
    assert not list(tmp_path.iterdir())


def test_something_that_trains_before_the_blocks_is_refused(tmp_path: Path) -> None:
    adapter = with_read("llama")[1]
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        adapter.model.get_parameter(name).requires_grad_(True)
        with pytest.raises(trimtab.ConfigError, match=f"{name} trains, and the hidden states change with it"):
            open_cache(adapter, tmp_path)
        adapter.model.get_parameter(name).requires_grad_(False)


def test_arguments_of_another_kind_are_named(tmp_path: Path) -> None:
    model, adapter = with_read("llama")
    folder: Any = tmp_path / "cache"
    for args, message in (
        ((model, folder), "adapter is a LlamaForCausalLM; give what trimtab.attach"),
        ((str(folder), adapter), "adapter is a str"),
        ((adapter, None), "folder=None; give the path of a folder"),
        ((adapter, 3), "folder=3"),
        ((adapter, ""), "folder=''"),
        ((adapter, folder, "bf16", "a"), "tokens='a': give a number of tokens"),
        ((adapter, folder, "bf16", 2.5), "tokens=2.5"),
    ):
        with pytest.raises(trimtab.ConfigError, match=message):
            trimtab.HiddenCache(*args)
    cache = open_cache(adapter, folder)
    for batch, kind in (([collate(examples("llama"))], "list"), (token_ids(), "Tensor")):
        wrong: Any = batch
        for call in (cache.add, cache.missing, lambda x: cache.batch(x).__enter__()):
            with pytest.raises(trimtab.ConfigError, match=f"batch is a {kind}; give the mapping that the model"):
                call(wrong)


def test_what_trains_here_and_was_frozen_there_is_named(tmp_path: Path) -> None:
    model, adapter = with_read("llama")
    with open_cache(adapter, tmp_path) as cache:
        visit(model, adapter, cache, collate(examples("llama")))
    with pytest.raises(
        trimtab.CheckpointError, match=r"lm_head.weight trains here \(train_also, say\), and was frozen"
    ):
        open_cache(with_read("llama", train_also=["head"])[1], tmp_path)


def test_a_detached_adapter_is_refused(tmp_path: Path) -> None:
    adapter = with_read("llama")[1]
    cache = open_cache(adapter, tmp_path)
    adapter.detach()
    with (
        pytest.raises(trimtab.ConfigError, match=r"cache.batch\(\): this adapter was detached; attach a new one"),
        cache.batch(collate(examples("llama"))),
    ):
        raise AssertionError


def test_generate_is_refused_within_a_batch(tmp_path: Path) -> None:
    """A call on a part of a text has other hidden states, whether the cache knows the text or not."""
    model, adapter = with_read("llama")
    cache = open_cache(adapter, tmp_path)
    batch = {"input_ids": token_ids()}
    for _ in range(2):
        with (
            pytest.raises(trimtab.ConfigError, match="past_key_values: hidden states are kept for whole inputs"),
            cache.batch(batch),
        ):
            model.generate(**batch, max_new_tokens=3, eos_token_id=None)
        with quiet(), cache.batch(batch):
            model(**batch)


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "other tokens": ({"input_ids": token_ids(seed=9)}, "called with another input_ids"),
    "another length": ({"input_ids": token_ids()[:, :4]}, "called with another input_ids"),
    "more": ({"position_ids": torch.arange(12)[None]}, "called with another position_ids"),
    "less": ({"attention_mask": None}, "called with another attention_mask"),
    "attentions": ({"output_attentions": True}, "output_attentions=True: a cached forward runs no attention"),
}


@pytest.mark.parametrize("change", CALLS)
def test_a_call_with_something_else_than_the_batch_is_refused(change: str, tmp_path: Path) -> None:
    model, adapter = with_read("llama")
    cache = open_cache(adapter, tmp_path)
    batch = {"input_ids": token_ids(), "attention_mask": torch.ones(3, 12, dtype=torch.long), "labels": token_ids()}
    changed, message = CALLS[change]
    for _ in range(2):
        with pytest.raises(trimtab.ConfigError, match=message), cache.batch(batch):
            model(**{**batch, **changed})
        with quiet(), cache.batch(batch):  # equal tensors, other labels, and in order: the same call
            model(batch["input_ids"].clone(), batch["attention_mask"], labels=None, use_cache=False)


def test_a_batch_without_a_call_or_within_another_or_of_a_resting_adapter_is_refused(tmp_path: Path) -> None:
    model, adapter = with_read("llama")
    cache = open_cache(adapter, tmp_path)
    batch = collate(examples("llama"))
    with pytest.raises(trimtab.ConfigError, match="the model was not called"), cache.batch(batch):
        pass
    with pytest.raises(trimtab.ConfigError, match="one batch at a time"), cache.batch(batch), cache.batch(batch):
        pass
    trimtab.activate(model, None)
    with pytest.raises(trimtab.ConfigError, match="the adapter is not at work"), cache.batch(batch):
        pass
    trimtab.activate(model, "default")
    first = visit(model, adapter, cache, batch)
    with counting(inside_blocks(adapter)) as calls:
        assert_same(visit(model, adapter, cache, batch), first)
    assert not calls


def test_padding_without_positions_that_the_blocks_see_is_refused(tmp_path: Path) -> None:
    """A model that puts tokens of its own before the text has more positions than the mask."""
    model, adapter = with_read("llama")
    forward = model.model.layers[0].forward
    model.model.layers[0].forward = lambda hidden, **kwargs: torch.cat((hidden[:, :1], forward(hidden, **kwargs)), 1)
    cache = open_cache(adapter, tmp_path)
    batch = collate(examples("llama"))
    with pytest.raises(trimtab.ConfigError, match="hidden states has 9 positions, and the batch's mask tells of 8"):
        visit(model, adapter, cache, batch)


# -- filling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_fill_runs_the_blocks_alone_and_says_what_it_will_take(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model, adapter = with_read(family)
    rows = examples(family)
    batches = [collate(rows[:3]), collate(rows[3:]), collate(rows[1:5])]
    plain = visit(model, adapter, open_cache(adapter, tmp_path / "other"), batches[0])
    cache = open_cache(adapter, tmp_path / "cache")
    with counting([model.lm_head]) as heads, counting(inside_blocks(adapter)) as calls:
        cache.fill(batches)
    assert len(cache) == 6 and not heads and calls
    output = "".join(capsys.readouterr())
    tokens = [3 * sum(len(row[name]) for row in rows[:3]) for name in ("input_ids", "labels")][: len(cache.token_bytes)]
    size = sum(n * each for n, each in zip(tokens, cache.token_bytes, strict=True)) / 1000
    assert f"about {size:.1f} KB for {sum(tokens)} tokens, {cache.bytes_per_token} bytes a token" in output
    assert "3/3" in output
    with counting(inside_blocks(adapter)) as calls:
        assert_same(visit(model, adapter, cache, batches[0]), plain)
        cache.fill(iter(batches))
    assert not calls
    assert not [w for w in recwarn if "silenced" in str(w.message)]


def test_fill_checks_the_disk_by_its_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    model, adapter = with_read("llama")
    batches = [collate(examples("llama", seed=seed)) for seed in range(50)]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=(1 << 26) + 50_000))
    cache = open_cache(adapter, tmp_path)
    with pytest.raises(trimtab.ConfigError, match="bytes more, and the disk has"), quiet():
        cache.fill(batches)
    assert len(cache) == 6
    visit(model, adapter, cache, batches[0])
