"""The benchmark scripts run, and their rows compute the same thing before they train."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the rows of peft need peft")


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark as a module."""
    name = f"benchmark_{request.param}"
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{request.param}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", ["loss"], indirect=True)
def test_loss_benchmark_prints_a_row_for_each_loss(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """The table names each loss, and the chunked ones hold less than the plain one."""
    script.main(["--quick"])
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ")
    }
    assert rows["F.cross_entropy(logits.float())"][3] == "1.000"
    for kind in ("bf16 head", "fp32 head", "frozen bf16 head"):
        _, _, _, peak, error = rows[f"trimtab, {kind}"]
        assert float(peak) < 1.0
        assert float(error) < 1e-3


@needs_peft
@pytest.mark.parametrize("script", ["step"], indirect=True)
def test_every_row_of_the_step_benchmark_starts_from_the_same_loss(script: ModuleType) -> None:
    """Before the first update all methods compute the base model's loss, and each then trains."""
    for name in script.ROWS:
        row = script.Row(name, script.QUICK)
        first = row.step()
        if name == script.FULL:
            base = first
        assert first == pytest.approx(base, rel=2e-3), name
        trains = (script.FULL, script.FULL_CHUNKED, script.TRIMTAB_FULL, script.RELORA)
        assert row.head_trains == (name in trains), name
        if name == script.RELORA:
            row.restart()
        assert row.step() < first, name


@pytest.mark.parametrize("script", ["step"], indirect=True)
def test_step_benchmark_prints_its_table(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Costs come from a process a row, times from this one, and the cost of a restart is named."""
    script.main(["--quick", "--rows", script.RELORA])
    printed = capsys.readouterr().out
    assert "| trimtab ReLoRA r=128 " in printed
    assert "One restart of ReLoRA takes" in printed


@needs_peft
@pytest.mark.parametrize("script", ["methods"], indirect=True)
def test_saved_bytes_stay_within_what_the_docs_say(script: ModuleType) -> None:
    """At the shapes of the table: LoRA 0.20 and 0.65 of peft's bytes, VeRA 0.05 and 0.42; with GQA 0.42 is missed."""
    aims = (("LoRA r=8", 1, 0.20, 0.65), ("VeRA r=256", 1, 0.05, 0.42), ("VeRA r=256", 4, 0.06, 0.431))
    for row, shared, group, block in aims:
        for measure, bound in ((script.group_bytes, group), (script.block_bytes, block)):
            mine, other = (measure(row, side, 1024, 256, tokens=256, shared=shared) for side in (False, True))
            assert mine <= bound * other, (row, measure)


@needs_peft
@pytest.mark.parametrize("script", ["methods"], indirect=True)
def test_what_is_there_anyway_counts_on_neither_side(script: ModuleType) -> None:
    """Of VeRA's group in bf16: ours u alone; of peft in each layer u and its product with B, fp32; no buffer."""
    for tokens in (64, 128):
        assert script.group_bytes("VeRA r=256", False, 256, 32, tokens=tokens) == 2 * 32
        assert script.group_bytes("VeRA r=256", True, 256, 32, tokens=tokens) == 3 * 4 * (256 + 32)


@needs_peft
@pytest.mark.parametrize("script", ["methods"], indirect=True)
def test_the_table_of_saved_bytes_has_every_row(script: ModuleType) -> None:
    """Each method on layers, and VeRA under grouped-query attention; FLOPs where the group was counted."""
    table = script.saved_table(quick=True).splitlines()
    rows = [line.split("|")[1].strip() for line in table[2:]]
    assert rows == ["frozen base alone", *script.LAYERED, "VeRA r=256, GQA"]
    assert {line.count("|") for line in table} == {10}


@needs_peft
@pytest.mark.parametrize("script", ["step"], indirect=True)
def test_the_profile_adds_up_to_the_step(script: ModuleType) -> None:
    """The parts and what is left unaccounted are the whole step."""
    (line,) = script.profile_table([script.LORA[8]], script.QUICK).splitlines()[2:]
    *parts, whole = (float(cell) for cell in line.split("|")[2:-1])
    assert len(parts) == len(script.KINDS) + 2
    assert sum(parts) == pytest.approx(whole, abs=0.005 * len(parts) + 0.005)


@needs_peft
@pytest.mark.parametrize("script", ["methods"], indirect=True)
def test_every_row_of_the_method_benchmark_trains(script: ModuleType) -> None:
    """Each row, ours and peft's, steps twice to finite losses; those that start at the base start at one loss."""
    elsewhere = ("prompt", "prefix")
    names = [name for name, _ in script.rows_of_steps([*script.PAIRS, *script.ALONE])]
    first = {name: script.Row(name, script.QUICK, 32) for name in names}
    losses = {name: (row.step(), row.step()) for name, row in first.items()}
    assert all(loss == loss and loss < 100 for pair in losses.values() for loss in pair)
    starts = [pair[0] for name, pair in losses.items() if not any(word in name for word in elsewhere)]
    assert max(starts) - min(starts) < 2e-2


@pytest.mark.parametrize("script", ["grouped"], indirect=True)
def test_grouped_layers_compute_what_separate_ones_do(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of the three programs agree to bf16's rounding, and the table has a row for each group."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    group = script.Group(64, (64, 32, 32), 40)
    outs, grads = group.outputs("separate"), group.gradients("separate")
    for program in script.PROGRAMS[1:]:
        found = [*group.outputs(program), *group.gradients(program)]
        for ours, theirs in zip(found, [*outs, *grads], strict=True):
            assert (ours - theirs).float().norm() < 0.02 * theirs.float().norm()
    assert len(script.table(script.QUICK, 32, 1).splitlines()) == 3
