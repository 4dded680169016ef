"""What a Trainer's checkpoint says of the run that it was written in, whatever form it has."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import MODELS
from trainer_parts import arguments, build, equal, rates, relora, snapshot
from transformers import Trainer

import trimtab
from trimtab.interop.modelstate import META, ModelState
from trimtab.interop.transformers import TrimtabCallback


def run(
    out: Path, config: trimtab.Method, resume: str | None = None, *, family: str = "llama", shards: str = "", **how: Any
) -> tuple[Trainer, TrimtabCallback]:
    """Twelve steps, saved after six, in shards of a size that is given."""
    callback = TrimtabCallback(config, merge_at_end=False)
    model = MODELS[family]()
    if shards:
        model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size=shards)
    args = arguments(out, **({"save_strategy": "steps", "save_steps": 6} | how))
    trainer = build(args, callback, model, own_groups=config.switch_step > 0)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 99},
        {"dropout": 0.25},
        {"restart_every": 5},
        {"reset": "magnitude", "reset_ratio": 0.5},
        {"seed": 7},
    ],
)
def test_changed_settings_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """A run goes on with the settings that it began with; the message has the setting and both values."""
    config = relora(dropout=0.125)
    run(tmp_path, config)
    key = next(iter(change))
    said = f"written with {key} = {getattr(config, key)!r}, and the method has {key} = {change[key]!r}"
    with pytest.raises(trimtab.CheckpointError, match=said):
        run(tmp_path, config.model_copy(update=change), str(tmp_path / "checkpoint-6"))


def test_changed_phases_are_refused(tmp_path: Path) -> None:
    """AdaLoRA's phases are settings, too."""
    phases = {"rank": 2, "init_rank": 3, "total_steps": 12, "initial_steps": 2, "allocate_every": 2}
    run(tmp_path, trimtab.AdaLoRA(**phases, final_steps=4))
    with pytest.raises(trimtab.CheckpointError, match="final_steps = 4, and the method has final_steps = 6"):
        run(tmp_path, trimtab.AdaLoRA(**phases, final_steps=6), str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("config", [relora(), trimtab.LoRA(rank=2)], ids=["relora", "lora"])
def test_a_checkpoint_without_its_scheduler(tmp_path: Path, config: trimtab.Method) -> None:
    """With save_only_model the rate would begin anew, while the restarts go on."""
    run(tmp_path, config, save_only_model=True)
    with pytest.raises(trimtab.CheckpointError, match=r"after 6 steps .* begins at step 0: .*save_only_model=True"):
        run(tmp_path, config, str(tmp_path / "checkpoint-6"))


SHARDED = {
    "relora": ("llama", relora()),
    "tied": ("gpt2", relora()),
    "warm start": ("llama", relora(warm_start_steps=3)),
    "adalora": ("llama", trimtab.AdaLoRA(rank=2, init_rank=3, total_steps=12, allocate_every=2)),
    "full": ("llama", trimtab.Full()),
    "prompt": ("llama", trimtab.PromptTuning(length=3)),
}


@pytest.mark.parametrize("case", SHARDED)
def test_shards_resume_exactly(tmp_path: Path, case: str) -> None:
    """A checkpoint in many files, read in whatever order, continues as one in a single file does."""
    family, config = SHARDED[case]
    whole, _ = run(tmp_path, config, family=family, shards="20KB")
    folder = tmp_path / "checkpoint-6"
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    resumed, callback = run(tmp_path, config, str(folder), family=family, shards="20KB")
    assert equal(snapshot(whole.model), snapshot(resumed.model)) and rates(whole) == rates(resumed)
    assert callback._state is not None and not callback._state._gathered  # nothing of the file is held on to


def test_every_order_of_shards_is_taken(tmp_path: Path) -> None:
    """One tensor a shard, from first to last, from last to first, and with one left out."""
    trained, callback = run(tmp_path, relora())
    stored = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    for names in (list(stored), list(stored)[::-1]):
        other = TrimtabCallback(relora())
        model = MODELS["llama"]()
        adapter = other.attach(model)
        for name in names:
            model.load_state_dict({name: stored[name]}, strict=False)
        assert adapter.state_dict().meta == callback.adapter.state_dict().meta
        assert equal(snapshot(model), snapshot(trained.model))
    for lost in (("layers.0.self_attn.q_proj.lora_A",), ("layers.0.self_attn.q_proj.lora_A", META)):
        trainer = build(arguments(tmp_path), TrimtabCallback(relora()))
        for name in names:
            if not name.endswith(lost):
                trainer.model.load_state_dict({name: stored[name]}, strict=False)
        with pytest.raises(trimtab.CheckpointError, match=r"lacks model.layers.0.self_attn.q_proj.lora_A"):
            trainer.train()


def test_a_copy_has_counters_of_its_own(tmp_path: Path) -> None:
    """An average of the weights, say, keeps the adapter's state of the moment when it was copied."""
    callback = TrimtabCallback(relora(), merge_at_end=False)
    trainer = build(arguments(tmp_path), callback)
    twin = copy.deepcopy(trainer.model)
    before = twin.state_dict()[META]
    trainer.train()
    assert torch.equal(twin.state_dict()[META], before)
    assert not torch.equal(trainer.model.state_dict()[META], before)
    hook = ModelState.of(twin)
    assert hook is not None and hook.adapter.model is twin
