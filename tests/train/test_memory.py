"""What is foretold of a phase is what it then holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loop_parts import METHOD, adamw, adamw8bit, build, go
from models_for_tests import tiny_gpt2, tiny_llama

import trimtab
from trimtab.config import OptimConfig
from trimtab.train.memory import measured_peak, phase_row, phase_table, predict_phases, size_text


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_optimizer_bytes_are_those_of_the_state(tmp_path: Path, name: str) -> None:
    """All state tensors but the counters and the shared code maps, summed."""
    run = build(tmp_path, make_optimizer=adamw8bit if name == "adamw8bit" else adamw(), stop_at=5)
    go(run)
    held = sum(
        value.numel() * value.element_size()
        for state in run.optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.startswith(("step", "qmap"))
    )
    assert phase_row(run.adapter, OptimConfig(name=name), "adapter", 3)["memory"]["optimizer"] == held


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["untied", "tied"])
def test_phases_are_foretold_without_touching_the_model(tmp_path: Path, make: object) -> None:
    """The shadow's rows equal those of the real model before and after the switch; tied weights count once."""
    model = make()  # type: ignore[operator]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = predict_phases(model, METHOD, OptimConfig(), dtype=torch.bfloat16, pure=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    total = sum(p.numel() for p in model.parameters())
    adapter = trimtab.attach(model, METHOD, dtype=torch.bfloat16)
    assert phase_row(adapter, OptimConfig(), "warm start", 0) == rows[0]
    assert rows[0]["total"] == rows[0]["trainable"] == total
    adapter.after_step(3, torch.optim.SGD(adapter.parameter_groups(lr=1.0)))
    assert phase_row(adapter, OptimConfig(), "adapter", 3) == rows[1]
    assert rows[1]["memory"]["carry_host"] > 0


@pytest.mark.parametrize("double", [True, False])
def test_a_base_in_four_bits_is_foretold(double: bool) -> None:
    """Also one whose other weights are in bf16 already; its parameters count as those that it stands for."""
    model = tiny_llama()
    total = sum(p.numel() for p in model.parameters())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    trimtab.quantize(model, double=double)
    (row,) = predict_phases(model, trimtab.LoRA(rank=2), OptimConfig(), dtype=torch.bfloat16, pure=False)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2), dtype=torch.bfloat16)
    assert phase_row(adapter, OptimConfig(), "training", 0) == row
    assert row["total"] == total + row["trainable"]
    assert row["memory"]["carry_host"] == 0


def test_a_method_without_a_warm_start_has_one_phase() -> None:
    """Full training: one row, in which weights, gradients and two moments are fp32."""
    (row,) = predict_phases(tiny_llama(), trimtab.Full(), OptimConfig(), dtype=torch.bfloat16, pure=False)
    memory = row["memory"]
    assert row["phase"] == "training"
    assert memory["gradients"] == 4 * row["total"]
    assert memory["optimizer"] == 2 * memory["gradients"]
    labels = [str(cell) for cell in phase_table([row]).columns[0].cells]
    # Neither an adapter nor what is carried in host memory, of which there is nothing.
    of_groups, of_memory = ["  embedding", "  norm", "  head", "  base"], ["weights", "gradients", "optimizer state"]
    assert labels == [
        "total parameters", "trainable parameters", *of_groups, *of_memory, "together (no activations)",
    ]  # fmt: skip


def test_a_row_stays_that_one_of_the_phases_has() -> None:
    rows = predict_phases(tiny_llama(), METHOD, OptimConfig(), dtype=torch.bfloat16, pure=False)
    cells = {str(label): value for label, *value in zip(*(c.cells for c in phase_table(rows).columns), strict=True)}
    assert cells["  adapter"][0] == "0" != cells["  adapter"][1]
    assert cells["carry (host)"][0] == "0 B" != cells["carry (host)"][1]


def test_peak_and_sizes() -> None:
    """The measured peak is at least what is held now; sizes read well."""
    held = torch.ones(1 << 22)
    assert measured_peak(torch.device("cpu"))["peak_resident"] > held.numel() * 4
    assert [size_text(n) for n in (5, 2048, 3 << 20, 5 << 30)] == ["5 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]
