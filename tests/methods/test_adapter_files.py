"""Adapter folders: what save writes, load_adapter and PEFT read, with the same logits, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models_for_tests import MODELS, logits, tiny_llama, token_ids, train

import trimtab
from trimtab.methods.lora import LoRAAdapter


def trained(family: str, config: trimtab.LoRA, steps: int = 3) -> tuple[torch.nn.Module, LoRAAdapter]:
    model = MODELS[family]()
    adapter = trimtab.attach(model, config)
    assert isinstance(adapter, LoRAAdapter)
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, steps + 1))
    return model, adapter


CONFIGS = {
    "plain": trimtab.LoRA(rank=4, alpha=16),
    "rslora": trimtab.LoRA(rank=4, alpha=4, rslora=True),
    "also": trimtab.LoRA(rank=2, train_also=("norms", "head")),
}

#: A tied head cannot be stored as a module of its own, so GPT-2 trains none beside the adapter.
PAIRS = [(f, c) for f in ("llama", "gpt2", "bert") for c in CONFIGS if (f, c) != ("gpt2", "also")]


@pytest.mark.parametrize(("family", "config"), PAIRS)
def test_an_adapter_is_the_same_after_save_and_load(family: str, config: str, tmp_path: Path) -> None:
    """Logits of a fresh base with the loaded adapter are bit-equal to those of the trained model."""
    model, adapter = trained(family, CONFIGS[config])
    adapter.save(tmp_path / "adapter")
    fresh = MODELS[family]()
    before = logits(fresh, token_ids())
    trimtab.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh, token_ids()), logits(model, token_ids()))
    assert not torch.equal(before, logits(fresh, token_ids()))


@pytest.mark.parametrize(("family", "config"), PAIRS)
def test_peft_reads_our_folder(family: str, config: str, tmp_path: Path) -> None:
    """peft.PeftModel gives the logits that ours gives."""
    peft = pytest.importorskip("peft")
    model, adapter = trained(family, CONFIGS[config])
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(MODELS[family](), str(tmp_path))
    assert torch.allclose(logits(theirs, token_ids()), logits(model, token_ids()), atol=1e-5)


def test_the_order_of_patterns_is_kept(tmp_path: Path) -> None:
    """The first that matches counts, so a file that put them in order of their names would be another adapter."""
    patterns = {"self_attn.q_proj": 64.0, ".*_proj": 4.0}
    model, adapter = trained("llama", trimtab.LoRA(rank=4, alpha_pattern=patterns))
    adapter.save(tmp_path)
    fresh = MODELS["llama"]()
    trimtab.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, token_ids()), logits(model, token_ids()))


@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_a_peft_folder(rslora: bool, tmp_path: Path) -> None:
    """A LoRA that peft made and saved gives the same logits here."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules="all-linear",
        use_rslora=rslora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(tiny_llama(), config)
    theirs.save_pretrained(str(tmp_path))
    ours = tiny_llama()
    trimtab.load_adapter(ours, tmp_path)
    assert torch.allclose(logits(ours, token_ids()), logits(theirs, token_ids()), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_and_unmerged_are_one_function(family: str, dtype: torch.dtype) -> None:
    """merge() leaves plain modules of the compute dtype that answer as the adapter did, up to rounding."""
    model = MODELS[family]().to(dtype)
    classes = {name: type(module) for name, module in model.named_modules()}
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4, train_also=("norms",)))
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 4))
    before = logits(model, token_ids()).double()
    adapter.merge()
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {p.dtype for p in model.parameters()} == {dtype}
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (logits(model, token_ids()).double() - before).norm() < tolerance * before.norm()


def test_an_adapter_that_is_not_the_whole_story_is_not_saved(tmp_path: Path) -> None:
    """After a restart or a warm start the base has changed, so save refuses and names merge()."""
    _, adapter = trained("llama", trimtab.ReLoRA(rank=2, restart_every=2))
    with pytest.raises(trimtab.CannotSave, match=r"merge\(\)"):
        adapter.save(tmp_path / "a")
    _, adapter = trained("llama", trimtab.LoRA(rank=2, warm_start_steps=2))
    with pytest.raises(trimtab.CannotSave, match="warm start"):
        adapter.save(tmp_path / "b")
    with pytest.raises(trimtab.CannotSave, match="save_pretrained"):
        trimtab.attach(tiny_llama(), trimtab.Full()).save(tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_wrong_folders_are_refused_and_leave_the_model_free(tmp_path: Path) -> None:
    """Missing, truncated, of another base, of another method: one line each, and the model stays usable."""
    _, adapter = trained("llama", trimtab.LoRA(rank=2))
    adapter.save(tmp_path)
    tensors, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole, settings = tensors.read_bytes(), json.loads(config.read_text())
    model = tiny_llama(hidden_size=48)
    with pytest.raises(trimtab.CheckpointError, match="of another base"):
        trimtab.load_adapter(model, tmp_path)
    trimtab.attach(model, trimtab.LoRA(rank=2)).detach()
    model = tiny_llama()
    tensors.write_bytes(whole[:-50])
    with pytest.raises(trimtab.CheckpointError, match="damaged"):
        trimtab.load_adapter(model, tmp_path)
    tensors.write_bytes(whole)
    for change, message in [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "lacks .*lora_magnitude_vector"),
        ({"rank_pattern": {"q_proj": 3}}, r"q_proj.lora_A is \(2, 32\) in the file and \(3, 32\)"),
        ({"r": 0}, "rank = 0"),
        ({"target_modules": None}, "target_modules"),
    ]:
        config.write_text(json.dumps(settings | change))
        with pytest.raises(trimtab.CheckpointError, match=message):
            trimtab.load_adapter(model, tmp_path)
    config.write_text(json.dumps({k: v for k, v in settings.items() if k != "r"}))
    with pytest.raises(trimtab.CheckpointError, match="lacks r"):
        trimtab.load_adapter(model, tmp_path)
    config.write_text(json.dumps(settings | {"target_modules": "all-linear"}))
    trimtab.load_adapter(model, tmp_path).merge()
    tensors.unlink()
    with pytest.raises(trimtab.CheckpointError, match=r"adapter_model\.safetensors is missing"):
        trimtab.load_adapter(model, tmp_path)
    trimtab.attach(model, trimtab.LoRA(rank=2)).detach()


def test_a_config_comes_from_a_mapping() -> None:
    """A dict with a name is as good as a config; a wrong name lists the known ones; a wrong key is refused."""
    adapter = trimtab.attach(tiny_llama(), {"name": "relora", "rank": 4, "restart_every": 10})
    assert adapter.config == trimtab.ReLoRA(rank=4, restart_every=10)
    with pytest.raises(trimtab.ConfigError, match=r"the methods are .*full, .*lora, .*relora"):
        trimtab.attach(tiny_llama(), {"name": "lorra"})
    with pytest.raises(trimtab.ConfigError, match="LoRA: rnak is no setting of it; did you mean rank"):
        trimtab.attach(tiny_llama(), {"name": "lora", "rnak": 4})
    with pytest.raises(trimtab.ConfigError, match="ReLoRA: restart_every is missing"):
        trimtab.ReLoRA(rank=4)  # type: ignore[call-arg]
    for wrong in ({"rank": 0}, {"alpha": -1}, {"dropout": 1.0}, {"warm_start_steps": -1}):
        key, value = next(iter(wrong.items()))
        with pytest.raises(trimtab.ConfigError, match=f"LoRA: {key} = {value}: input should be") as said:
            trimtab.LoRA(**wrong)  # type: ignore[arg-type]
        assert "\n" not in str(said.value)


def test_an_adapter_says_what_it_is() -> None:
    """repr names method, settings, model and state."""
    adapter = trimtab.attach(tiny_llama(), trimtab.LoRA(rank=4))
    assert "LoRAAdapter on LlamaForCausalLM" in repr(adapter)
    assert "rank=4" in repr(adapter)
    adapter.detach()
    assert "detached" in repr(adapter)
