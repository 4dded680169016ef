"""AdaLoRA in a transformers Trainer: the callback alone deals the budget out, and resuming is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models_for_tests import tiny_llama
from torch import Tensor, nn
from trainer_parts import arguments, build, equal, snapshot
from transformers import TrainerCallback

import trimtab
from trimtab.interop.transformers import TrimtabCallback


def adalora() -> trimtab.AdaLoRA:
    return trimtab.AdaLoRA(rank=2, init_rank=4, initial_steps=2, final_steps=4, allocate_every=2)


class Recorder(TrainerCallback):
    """The batches in the order in which the Trainer's model saw them."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: list[Tensor] = []
        model.register_forward_pre_hook(lambda *a: self.batches.append(a[2]["input_ids"].clone()), with_kwargs=True)


def test_a_trainer_does_what_the_loop_does(tmp_path: Path) -> None:
    """Budgets, masks and weights are those of a plain loop with the extra term over the same batches."""
    model = tiny_llama()
    recorder = Recorder(model)
    callback = TrimtabCallback(adalora(), merge_at_end=False)
    trainer = build(
        arguments(tmp_path, lr_scheduler_type="constant", optim="adamw_torch_fused", max_grad_norm=0.0), callback, model
    )
    trainer.train()
    assert [(e["event"], e["step"]) for e in callback.events] == [("budget", 4), ("budget", 6), ("budget", 8)]
    other = tiny_llama()
    adapter = trimtab.attach(other, adalora())
    adapter.restarts(12)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2), fused=True)
    for step, ids in enumerate(recorder.batches, start=1):
        extra = adapter.extra_loss()
        assert extra is not None
        (other(input_ids=ids, labels=ids).loss + extra).backward()
        optimizer.step()
        adapter.after_step(step, optimizer)
        optimizer.zero_grad()
    left, right = snapshot(model), snapshot(other)
    assert left.keys() == right.keys()
    assert all((left[name] - right[name]).abs().max() <= 1e-5 for name in left)
    assert callback.adapter is not None and callback.adapter.pattern == adapter.pattern  # type: ignore[attr-defined]


@pytest.mark.parametrize("saved", [5, 9])
def test_resuming_is_exact(tmp_path: Path, saved: int) -> None:
    """2N = N + save + resume + N, bit for bit, with the averages or with the choice in the checkpoint."""
    ends = []
    for resume in (None, str(tmp_path / f"checkpoint-{saved}")):
        saving = {"save_strategy": "steps", "save_steps": saved} if resume is None else {}
        model = tiny_llama()
        callback = TrimtabCallback(adalora(), merge_at_end=False)
        trainer = build(arguments(tmp_path, **saving), callback, model)
        trainer.train(resume_from_checkpoint=resume)
        ends.append(snapshot(model))
    assert equal(*ends)
