"""Runs of LoRA's variants in the loop: rates by group, and a continuation that is the same bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loop_parts import adamw, build, differences, everything, go

import trimtab
from trimtab.train.checkpoint import load

METHODS = {
    "plus": trimtab.LoRA(rank=4, lora_plus=8, dropout=0.1),
    "plus-warm": trimtab.LoRA(rank=4, lora_plus=8, warm_start_steps=5),
    "plus-restarts": trimtab.ReLoRA(
        rank=4, lora_plus=4, restart_every=3, init="orthogonal", rank_pattern={"q_proj": 2}
    ),
    "dora": trimtab.LoRA(rank=4, dora=True, lora_plus=2, dropout=0.1),
    "dora-warm": trimtab.LoRA(rank=4, dora=True, warm_start_steps=3),
    "pissa": trimtab.LoRA(rank=4, init="pissa", train_also=("norms",)),
    "pissa-warm": trimtab.LoRA(rank=4, init="pissa", dora=True, warm_start_steps=3),
    "embedding": trimtab.LoRA(rank=4, targets=("embed_tokens", "q_proj")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_2n_steps_are_n_and_n(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights, adapter, optimizer, random states: a run that was stopped and taken up ends as one that was not."""
    settings = {"method": METHODS[method], "dtype": dtype, "make_optimizer": adamw(weight_decay=0.1)}
    whole = build(tmp_path / "whole", **settings)  # type: ignore[arg-type]
    go(whole)
    half = build(tmp_path / "half", stop_at=4, **settings)  # type: ignore[arg-type]
    go(half)
    checkpoint = load(half.saver.path(4))
    resumed = build(tmp_path / "half", checkpoint=checkpoint, **settings)  # type: ignore[arg-type]
    assert differences(everything(half), everything(resumed)) == []
    go(resumed, 4)
    assert differences(everything(whole), everything(resumed)) == []
    assert resumed.log.losses() == whole.log.losses()[4:]  # type: ignore[attr-defined]
    assert len({r["loss"] for r in whole.log.steps}) == 12  # type: ignore[attr-defined]


def test_the_fast_group_has_its_multiple_of_every_rate(tmp_path: Path) -> None:
    """At each step adapter_fast has the ratio times the rate of the others, in a resumed run, too."""
    method = trimtab.LoRA(rank=4, lora_plus=8, warm_start_steps=3)
    seen: list[dict[str, float]] = []

    def watch(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.append({group["group"]: group["lr"] for group in optimizer.param_groups})

    run = build(tmp_path, method=method, stop_at=6)
    run.optimizer.register_step_pre_hook(watch)
    go(run)
    run = build(tmp_path, method=method, checkpoint=load(run.saver.path(6)))
    run.optimizer.register_step_pre_hook(watch)
    go(run, 6)
    assert len(seen) == 12
    for step, rates in enumerate(seen):
        assert rates["adapter_fast"] == run.rate(step) * 8
        assert {rate for group, rate in rates.items() if group != "adapter_fast"} == {run.rate(step)}


def test_another_ratio_does_not_fit_the_state(tmp_path: Path) -> None:
    """A state with a fast group is refused by an optimizer without one."""
    run = build(tmp_path, method=trimtab.LoRA(rank=4, lora_plus=8), stop_at=2)
    go(run)
    with pytest.raises(trimtab.CheckpointError, match="grouped or ordered otherwise"):
        build(tmp_path, method=trimtab.LoRA(rank=4), checkpoint=load(run.saver.path(2)))
