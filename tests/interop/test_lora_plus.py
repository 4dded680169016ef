"""LoRA+ inside transformers.Trainer: B's group has its multiple of every rate, also after a warm start and a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models_for_tests import tiny_llama
from trainer_parts import arguments, build, equal, snapshot

import trimtab
from trimtab.interop.transformers import TrimtabCallback

METHODS = {
    "plain": trimtab.LoRA(rank=3, lora_plus=8),
    "warm": trimtab.LoRA(rank=3, lora_plus=8, warm_start_steps=4),
    "restarts": trimtab.ReLoRA(rank=3, lora_plus=8, restart_every=4, train_also=()),
}


def run(out: Path, method: str, resume: bool = False) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Twelve steps, a checkpoint after the sixth; the trained tensors, and each step's rate by group."""
    args = arguments(out, save_strategy="steps", save_steps=6)
    model = tiny_llama()
    adapter = trimtab.attach(model, METHODS[method])
    trainer = build(args, TrimtabCallback(adapter), model, own_groups=True)
    seen: list[dict[str, float]] = []
    trainer.optimizer.register_step_pre_hook(  # type: ignore[union-attr]
        lambda optimizer, *_: seen.append({group["group"]: group["lr"] for group in optimizer.param_groups})
    )
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-6") if resume else None)
    return snapshot(model), seen


@pytest.mark.parametrize("method", METHODS)
def test_the_ratio_holds_at_every_step(method: str, tmp_path: Path) -> None:
    """A run and its continuation from a checkpoint: the same rates, the ratio in each, and the same weights."""
    whole, rates = run(tmp_path, method)
    again, later = run(tmp_path, method, resume=True)
    assert len(rates) == 12 and later == rates[6:]
    for step in rates:
        assert step["adapter_fast"] == pytest.approx(8 * step["adapter"], rel=1e-12)
    assert len({step["adapter"] for step in rates}) > 6
    assert equal(whole, again)
