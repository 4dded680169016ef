"""`trimtab export` of what has no place in its result, and names in the way of its temporary files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import save
from models_for_tests import MODELS, tiny_llama

import trimtab
from trimtab.export.gguffile import write_gguf
from trimtab.export.gguflora import export_lora
from trimtab.export.sources import find_update, refuse_unmerged


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (trimtab.PromptTuning(length=3), "no part of any weight"),
        (trimtab.PrefixTuning(length=3), "no part of any weight"),
        (trimtab.Bottleneck(size=4), "an activation"),
        (trimtab.BitFit(add_bias=True), "add_bias"),
        (trimtab.VeRA(rank=4), "merge it with trimtab merge"),
    ],
    ids=["prompt", "prefix", "bottleneck", "bitfit", "vera"],
)
def test_the_advice_is_one_that_can_be_followed(config: trimtab.Method, reason: str, tmp_path: Path) -> None:
    """A merge is advised only for methods that have a merged form."""
    trimtab.attach(tiny_llama(), config).save(tmp_path / "a")
    with pytest.raises(trimtab.CheckpointError, match=reason) as said:
        export_lora(tmp_path / "a", tmp_path / "x.gguf")
    assert ("trimtab merge" in str(said.value)) == (config.name == "vera")


def test_a_broken_pattern_is_named(tmp_path: Path) -> None:
    """alpha_pattern is read as regular expressions."""
    save(tiny_llama(), tmp_path / "base")
    trimtab.attach(tiny_llama(), trimtab.LoRA(rank=2)).save(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {"[": 3}}))
    with pytest.raises(trimtab.CheckpointError, match=r"alpha_pattern: .* is no regular expression"):
        export_lora(tmp_path / "a", tmp_path / "x.gguf", str(tmp_path / "base"))


def test_a_link_where_the_temporary_file_was_is_not_followed(tmp_path: Path) -> None:
    """The file is made under a name that nobody could foresee; what others put beside it stays as it is."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".x.gguf.tmp").symlink_to(victim)
    write_gguf(tmp_path / "x.gguf", "llama", lambda _: None, {"a": (torch.float32, (2,))}, lambda _: torch.ones(2))
    assert victim.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.gguf.tmp", "victim", "x.gguf"]
    assert (tmp_path / "x.gguf").stat().st_mode == victim.stat().st_mode


def test_a_run_without_a_merged_form_is_not_exported_without_its_adapter(tmp_path: Path) -> None:
    """model/ beside adapter/ is the base: neither a GGUF file nor a LoRA of it would be the run's result."""
    run = tmp_path / "run"
    save(tiny_llama(), run / "model")
    trimtab.attach(tiny_llama(), trimtab.PromptTuning(length=3)).save(run / "adapter")
    (run / "config.yaml").write_text(
        "{name: run, model: {name: llama-9m}, data: {sources: [a.txt], tokenizer: {bpe_vocab_size: 300}, seq_len: 16}, "
        "method: {name: prompt}, train: {steps: 2, batch_tokens: 64}}\n"
    )
    with pytest.raises(trimtab.ConfigError, match=r"has no merged form, so model/ lacks it.*load_adapter"):
        find_update(str(run), None)
    with pytest.raises(trimtab.ConfigError, match="no merged form, so it is left out"):
        refuse_unmerged(run, "it is left out")
    from trimtab.cliexport import _gguf

    with pytest.raises(trimtab.ConfigError, match="no merged form, so a file for llama"):
        _gguf(run, str(run), tmp_path / "x.gguf", None, None)
    shutil.rmtree(run / "adapter")
    refuse_unmerged(run, "")


def test_old_names_of_layer_norms_are_explained(tmp_path: Path) -> None:
    """gamma and beta, which transformers renames when it loads."""
    from safetensors.torch import load_file, save_file

    save(MODELS["bert"](), tmp_path / "base")
    trimtab.attach(MODELS["bert"](), trimtab.LoRA(rank=2)).save(tmp_path / "a")
    file = tmp_path / "base" / "model.safetensors"
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in load_file(file).items()}
    save_file({n.replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in old.items()}, file)
    from trimtab.export.merge import merge_checkpoint

    with pytest.raises(trimtab.CheckpointError, match=r"LayerNorm\.(beta|gamma) is an old name.*save_pretrained first"):
        merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")


def test_another_base_of_the_same_shape_is_refused(tmp_path: Path) -> None:
    """The base's weights are compared with the adapter's sample, where they are there; a config alone will do."""
    for seed, name in enumerate(("base", "other")):
        save(tiny_llama(seed), tmp_path / name)
    save(tiny_llama(1), tmp_path / "sharded", max_shard_size="20KB")
    trimtab.attach(tiny_llama(), trimtab.LoRA(rank=2)).save(tmp_path / "a")
    for other in ("other", "sharded"):
        with pytest.raises(trimtab.CheckpointError, match=r"a: the adapter is of another base: sampled weights agree"):
            export_lora(tmp_path / "a", tmp_path / "x.gguf", str(tmp_path / other))
    assert not (tmp_path / "x.gguf").exists()
    assert export_lora(tmp_path / "a", tmp_path / "x.gguf", str(tmp_path / "base")) == 14
    (tmp_path / "other" / "model.safetensors").unlink()
    assert export_lora(tmp_path / "a", tmp_path / "y.gguf", str(tmp_path / "other")) == 14
