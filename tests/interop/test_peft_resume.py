"""Restarts of a plain PEFT LoRA model, saved and resumed: by hand, and in transformers' Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_parts import DTYPES, adamw, peft_model, train
from trainer_parts import arguments, build, equal, rates, snapshot

import trimtab
from trimtab.interop.peft import Restarts
from trimtab.interop.transformers import TrimtabCallback


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_carries_everything_across_restarts(tmp_path: Path, dtype: str) -> None:
    """2N steps equal N steps, save, N steps, bit for bit: a base, carries, counters and the optimizer."""

    def fresh() -> tuple[PeftModel, Restarts, torch.optim.Optimizer]:
        model = peft_model("llama", dtype)
        return model, Restarts(model, every=4), adamw(model)

    whole, restarts, optimizer = fresh()
    train(whole, restarts, optimizer, range(1, 21))
    model, half, optimizer = fresh()
    train(model, half, optimizer, range(1, 11))
    half.save_state(tmp_path, {"note": 1})
    model.save_pretrained(tmp_path)
    moments = copy.deepcopy(optimizer.state_dict())
    resumed, again, optimizer = fresh()
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    assert again.load_state(tmp_path) == {"note": 1}
    optimizer.load_state_dict(moments)
    train(resumed, again, optimizer, range(11, 21))
    assert equal(snapshot(whole), snapshot(resumed))
    ours, theirs = restarts.state_dict(), again.state_dict()
    assert ours.meta == theirs.meta == {"last_step": 20, "restarts": 5}
    assert equal(ours.tensors, theirs.tensors)
    assert bool([name for name in ours.tensors if name.startswith("carry:")]) == (dtype == "bf16")


def test_states_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    """Another rank, other layers, another checkpoint's adapter, a missing and a damaged file are named."""
    model = peft_model()
    restarts = Restarts(model, every=4)
    train(model, restarts, adamw(model), range(1, 6))
    restarts.save_state(tmp_path)
    for changes, match in (
        ({"r": 4}, "is of another checkpoint|is of another model"),
        ({"target_modules": ["k_proj"]}, "names differ"),
    ):
        other = Restarts(peft_model(**changes), every=4)
        before = snapshot(other.model)
        with pytest.raises(trimtab.CheckpointError, match=match):
            other.load_state_dict(restarts.state_dict())
        assert equal(before, snapshot(other.model))
    with pytest.raises(trimtab.CheckpointError, match="of another checkpoint than the one that the Trainer loaded"):
        Restarts(peft_model(), every=4).load_state(tmp_path)
    with pytest.raises(trimtab.CheckpointError, match="missing or damaged"):
        restarts.load_state(tmp_path / "none")
    file = tmp_path / "trimtab_restarts.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(trimtab.CheckpointError, match="missing or damaged"):
        restarts.load_state(tmp_path)


def test_a_trainer_restarts_a_peft_model_and_resumes(tmp_path: Path) -> None:
    """One callback on PEFT's model: rates, restarts, and 2N steps equal N, save, resume, N."""

    def run(resume: str | None = None, **changes: Any) -> tuple[Any, TrimtabCallback]:
        model = peft_model(lora_dropout=0.2)
        callback = TrimtabCallback(Restarts(model, every=4), rewarm_steps=2, resume_from_checkpoint=resume)
        trainer = build(arguments(tmp_path, **changes), callback, model)
        trainer.train(resume_from_checkpoint=resume or (True if changes.pop("again", False) else None))
        return trainer, callback

    for saved in (4, 6):
        whole, callback = run(save_strategy="steps", save_steps=saved)
        schedule = trimtab.Schedule(12, floor=0.0, restarts=(4, 8), rewarm_steps=2)
        assert rates(whole) == pytest.approx([1e-2 * schedule(t) for t in range(12)], rel=1e-12)
        assert [e["step"] for e in callback.events] == [4, 8]
        moved = tmp_path / f"moved-{saved}"
        (tmp_path / f"checkpoint-{saved}").rename(moved)
        resumed, callback = run(str(moved))
        assert [e["step"] for e in callback.events] == [8]
        assert equal(snapshot(whole.model), snapshot(resumed.model))
        assert rates(whole) == rates(resumed)


def test_resuming_a_peft_model_finds_the_right_state(tmp_path: Path) -> None:
    """Without a folder given it is looked for in output_dir; the state of another checkpoint is refused."""
    saving = {"save_strategy": "steps", "save_steps": 6}
    for seed, out in ((1, tmp_path / "a"), (2, tmp_path / "b")):
        model = peft_model()
        build(arguments(out, seed=seed, **saving), TrimtabCallback(Restarts(model, every=4)), model).train()
    model = peft_model()
    callback = TrimtabCallback(Restarts(model, every=4))
    build(arguments(tmp_path / "a"), callback, model).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert [e["step"] for e in callback.events] == [8]
    model = peft_model()
    wrong = build(arguments(tmp_path / "a"), TrimtabCallback(Restarts(model, every=4)), model)
    with pytest.raises(trimtab.CheckpointError, match=r"of another checkpoint.*resume_from_checkpoint"):
        wrong.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-6"))
    model = peft_model()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 6}
    trainer = build(
        arguments(tmp_path / "c", **saving, **best),
        TrimtabCallback(Restarts(model, every=4)),
        model,
        eval_dataset=build(arguments(tmp_path), TrimtabCallback(trimtab.LoRA(rank=2))).train_dataset,
    )
    with pytest.raises(trimtab.ConfigError, match="load_best_model_at_end=True with Restarts"):
        trainer.train()
    with pytest.raises(trimtab.ConfigError, match=r"PEFT model: use .*Restarts"):
        build(arguments(tmp_path), TrimtabCallback(trimtab.LoRA(rank=2)), peft_model())
