"""The benchmark scripts run, and their rows compute the same thing before they train."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

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
    """At the shapes of the table: LoRA 0.20 and 0.65 of peft's bytes, VeRA 0.05 and 0.42."""
    for row, group, block in (("LoRA r=8", 0.20, 0.65), ("VeRA r=256", 0.05, 0.42)):
        for measure, bound in ((script.group_bytes, group), (script.block_bytes, block)):
            mine, other = (measure(row, peft_row, 1024, 256) for peft_row in (False, True))
            assert mine <= bound * other, (row, measure)


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
