"""FLOPs and live bytes of a run, counted without running it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compare_parts import write_project

import trimtab
from trimtab.bench.meters import count_flops
from trimtab.compare.costs import costs
from trimtab.finetuneconfig import FinetuneConfig
from trimtab.loadconfig import load_tree
from trimtab.train.material import prepare


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("costs"))


def config(project: Path, method: str, *words: str) -> FinetuneConfig:
    return load_tree(FinetuneConfig, project, [f"method={method}", *words])


@pytest.mark.parametrize("method", ["{name: full}", "{name: lora, rank: 2}", "{name: read}"])
def test_flops_are_those_of_all_steps(project: Path, method: str) -> None:
    """Against each of the run's steps, counted one by one; and nothing is written."""
    wanted = config(project, method, "train.steps=9")
    found = costs(wanted)
    assert costs(wanted) == found  # before there is any other tensor
    material = prepare(wanted)
    model = material.model()
    trimtab.attach(model, material.method, dtype=torch.float32)
    objective = material.objective(model)

    def steps() -> None:
        for step in range(9):
            (part,) = material.batches.batch(step).split(4)
            objective(part).backward()

    assert found["steps"] == 9
    assert found["flops"] == pytest.approx(count_flops(steps), rel=0.02)
    assert not (project.parent / "runs").exists()


def test_live_bytes_hold_what_training_holds_and_the_activations(project: Path) -> None:
    """At least weights, gradients and both moments; activations shrink with the micro-batch."""
    full = costs(config(project, "{name: full}", "train.batch=16"))["peak_live"]
    parts = costs(config(project, "{name: full}", "train.batch=16", "train.micro_batch=4"))["peak_live"]
    held = 4 * 4 * sum(p.numel() for p in prepare(config(project, "{name: full}")).model().parameters())
    assert held < parts < full


def test_a_phase_in_which_all_trains_counts_as_long_as_it_is(project: Path) -> None:
    """ReLoRA with a warm start of 3 of 9 steps costs a third of full training, and two thirds of the rest."""
    words = "train.steps=9"
    full = costs(config(project, "{name: full}", words))
    later = costs(config(project, "{name: relora, rank: 2, restart_every: 5}", words))
    both = costs(config(project, "{name: relora, rank: 2, warm_start_steps: 3, restart_every: 5}", words))
    assert both["flops"] == pytest.approx((3 * full["flops"] + 6 * later["flops"]) / 9, rel=0.03)
    assert both["peak_live"] > later["peak_live"]
