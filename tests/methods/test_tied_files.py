"""Trained tied weights in adapter folders: PEFT never gets one, and what we alone read says what was tied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from models_for_tests import logits, tiny_gpt2, tiny_llama, tiny_t5, token_ids, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import trimtab
from trimtab.export.merge import merge_checkpoint


def tied_llama() -> nn.Module:
    return tiny_llama(tie_word_embeddings=True)


TIED: dict[str, Callable[[], nn.Module]] = {"llama": tied_llama, "gpt2": tiny_gpt2, "t5": tiny_t5}
FOR_PEFT: dict[str, trimtab.Method] = {
    "lora": trimtab.LoRA(rank=2, train_also=("head",)),
    "vera": trimtab.VeRA(rank=4, pair="peft", train_also=("head",)),
    "adalora": trimtab.AdaLoRA(rank=2, init_rank=3, total_steps=30, train_also=("embeddings",)),
    "ia3": trimtab.IA3(train_also=("head",)),
    "prompt": trimtab.PromptTuning(length=3, train_also=("head",)),
    "prefix": trimtab.PrefixTuning(length=3, train_also=("embeddings",)),
}
OURS: dict[str, trimtab.Method] = {
    "vera": trimtab.VeRA(rank=4, train_also=("head",)),
    "bitfit": trimtab.BitFit(train_also=("head",)),
    "added biases": trimtab.BitFit(add_bias=True, train_also=("head",)),
    "bottleneck": trimtab.Bottleneck(size=4, train_also=("embeddings",)),
}


def trained(model: nn.Module, config: trimtab.Method) -> trimtab.Adapter:
    adapter = trimtab.attach(model, config)
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 4))
    return adapter


@pytest.mark.parametrize("method", FOR_PEFT)
@pytest.mark.parametrize("family", TIED)
def test_peft_never_gets_one(family: str, method: str, tmp_path: Path) -> None:
    """Saving is refused, with ways out that can be followed: T5's table has too many users for untie."""
    adapter = trimtab.attach(TIED[family](), FOR_PEFT[method])
    with pytest.raises(trimtab.CannotSave, match="is one weight and was trained") as said:
        adapter.save(tmp_path / "a")
    ways = str(said.value).partition("part its users: ")[2]
    assert ("untie" in ways) == (family != "t5")
    assert ("untie=True" in ways) == (family != "t5" and method == "lora")
    assert ("merge()" in ways) == (method not in ("prompt", "prefix"))
    assert ("leave it out of train_also" in ways) == (method in ("prompt", "prefix"))
    assert not (tmp_path / "a").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["vera", "ia3", "adalora", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_parted_one_is_exchanged(family: str, method: str, tmp_path: Path) -> None:
    """The way out works: with trimtab.untie(model) the file gives the same here and in PEFT, and says what it needs."""
    model, ids = TIED[family](), token_ids()
    trimtab.untie(model)
    config = FOR_PEFT[method]
    if method == "vera" and family == "gpt2":
        config = config.model_copy(update={"targets": ("c_attn",)})
    trained(model, config).save(tmp_path / "a")
    wanted = logits(model, ids)
    theirs = peft.PeftModel.from_pretrained(TIED[family](), str(tmp_path / "a")).eval()
    with torch.no_grad():
        answer = theirs(input_ids=ids).logits
    assert torch.allclose(answer[:, -wanted.shape[1] :], wanted, atol=1e-5)
    with pytest.raises(trimtab.CheckpointError, match=r"is one weight; call trimtab\.untie\(model\) first"):
        trimtab.load_adapter(TIED[family](), tmp_path / "a")
    again = TIED[family]()
    trimtab.untie(again)
    trimtab.load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again, ids), wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", ["wte", "lm_head"])
def test_one_side_that_peft_trained_is_not_taken_for_both(module: str, tmp_path: Path) -> None:
    """PEFT trains a copy of one of two tied modules; here that needs a model with parted weights."""
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=[module], init_lora_weights=False)
    theirs = peft.get_peft_model(tiny_gpt2(), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(torch.linspace(0.5, 2.0, 32))
    theirs.save_pretrained(str(tmp_path / "a"))
    model, ids = tiny_gpt2(), token_ids()
    before = logits(model, ids)
    with pytest.raises(trimtab.CheckpointError, match=rf"{module}.weight alone.*trimtab\.untie\(model\) first"):
        trimtab.load_adapter(model, tmp_path / "a")
    assert torch.equal(logits(model, ids), before)
    trimtab.untie(model)
    trimtab.load_adapter(model, tmp_path / "a")
    assert torch.allclose(logits(model, ids), logits(theirs, ids), atol=1e-5)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("family", TIED)
def test_what_we_alone_read_is_exact(family: str, method: str, tmp_path: Path) -> None:
    """Saved, loaded, and merged in files with the bits of the merge in memory; refused where the ties are others."""
    config = OURS[method]
    if method == "bitfit" and family != "gpt2":
        pytest.skip("LLaMA and T5 have no biases")
    TIED[family]().save_pretrained(tmp_path / "base")
    kind, ids = type(TIED[family]()), token_ids()
    model = kind.from_pretrained(tmp_path / "base")
    trained(model, config).save(tmp_path / "a")
    again = kind.from_pretrained(tmp_path / "base")
    adapter = trimtab.load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again, ids), logits(model, ids))
    if adapter.no_merge:
        with pytest.raises(trimtab.CannotMerge):
            merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    else:
        assert merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out", untie=True).untied == []
        adapter.merge()
        again.save_pretrained(tmp_path / "wanted")
        found, wanted = (load_file(tmp_path / place / "model.safetensors") for place in ("out", "wanted"))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    if family != "t5":
        parted = kind.from_pretrained(tmp_path / "base")
        trimtab.untie(parted)
        with pytest.raises(trimtab.CheckpointError):
            trimtab.load_adapter(parted, tmp_path / "a")


@pytest.mark.parametrize("method", ["ia3", "vera"])
def test_files_from_before_ties_were_noted(method: str, tmp_path: Path) -> None:
    """They trained the one weight: loading and merging take it so."""
    model, ids = tied_llama(), token_ids()
    model.save_pretrained(tmp_path / "base")
    trained(model, OURS["vera"]).save(tmp_path / "a")
    if method == "ia3":  # as it was written, with the head for PEFT to part
        model = tied_llama()
        adapter = trained(model, trimtab.IA3())
        adapter.save(tmp_path / "a")
        moved = model.model.embed_tokens.weight.detach() * 1.5
        model.model.embed_tokens.weight.data.copy_(moved)
        tensors = load_file(tmp_path / "a/adapter_model.safetensors")
        tensors["base_model.model.model.embed_tokens.weight"] = moved
        config = json.loads((tmp_path / "a/adapter_config.json").read_text()) | {"modules_to_save": ["embed_tokens"]}
        (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    else:
        tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    file = tmp_path / "a/adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        extra = json.loads(opened.metadata()["trimtab"])
    extra.pop("tied", None)
    save_file(tensors, file, metadata={"format": "pt", "trimtab": json.dumps(extra)})
    again = tied_llama()
    adapter = trimtab.load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again, ids), logits(model, ids))
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    adapter.merge()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], p) for name, p in again.named_parameters())


def test_a_damaged_note_is_refused(tmp_path: Path) -> None:
    """What a file says of ties is a list of lists of names."""
    trained(tied_llama(), OURS["bottleneck"]).save(tmp_path / "a")
    file = tmp_path / "a/adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        extra = json.loads(opened.metadata()["trimtab"])
    for wrong in ("all", [["a"], 3], {"a": 1}):
        metadata = {"format": "pt", "trimtab": json.dumps(extra | {"tied": wrong})}
        save_file(load_file(file), file, metadata=metadata)
        with pytest.raises(trimtab.CheckpointError, match=r"tied = .*damaged"):
            trimtab.load_adapter(tied_llama(), tmp_path / "a")
