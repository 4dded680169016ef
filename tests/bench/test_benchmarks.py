"""The benchmark scripts run, and their rows compute the same thing before they train."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import trimtab
from trimtab.bench.meters import count_flops
from trimtab.bench.synthetic import FAMILIES

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


@pytest.fixture
def at_once(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are measured in this process."""

    def apart(file: Path, arguments: list[str], known: Path | None) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            script.main(arguments)
        return json.loads(printed.getvalue())

    monkeypatch.setattr(script, "apart", apart)


@needs_peft
@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("script", ["read"], indirect=True)
def test_every_row_of_the_read_benchmark_trains(script: ModuleType, family: str) -> None:
    """Each row steps to a smaller loss, and those that start at the base start at one loss."""
    elsewhere = ("prompt, 16", script.AUTHORS)
    starts = {}
    for name in script.ROWS:
        row = script.Row(FAMILIES[family], name, script.QUICK, "cpu")
        row.infer()
        starts[name] = row.step()
        losses = [row.step() for _ in range(4)]
        in_bf16 = family == "t5" and name in (script.PEFT, script.PLAIN)  # T5's own loss, too coarse to see it move
        assert losses[-1] < starts[name] or in_bf16, name
        assert all(parameter.grad is not None for parameter in row.parameters), name
    kept = [start for name, start in starts.items() if name not in elsewhere]
    assert max(kept) - min(kept) < 4e-2, starts


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("script", ["read"], indirect=True)
def test_read_benchmark_prints_its_tables(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Costs, times, aims and growth; READ's parameters do not grow with the depth."""
    script.main(["--quick", "--families", "t5", "--rows", script.FULL, script.READ, "--tables", "costs", "growth"])
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ")
    ]
    costs, times = (line for line in lines if line[0] == script.READ and line[1] != "trained, K" and len(line) > 4)
    assert 0.0 < float(costs[3]) < 0.3  # of full training's saved bytes
    assert costs[4] == "-"  # no row of peft's to compare with
    assert float(times[1]) > 0.0
    assert [line[-1] in ("yes", "no") for line in lines if line[0].endswith(" / full")] == [True] * 3
    grown = next(line for line in lines if line[:2] == [script.READ, "trained, K"])
    assert grown[2] == grown[3] == grown[4]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("script", ["read"], indirect=True)
def test_read_benchmark_prints_what_a_later_epoch_costs(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """For each model fewer FLOPs than the first epoch, from stored hidden states."""
    script.main(["--quick", "--tables", "later", "--costs-alone"])
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ")
    ]
    for family in FAMILIES.values():
        first, later = (
            next(line for line in lines if line[0] == f"{family.describe}: {row}")
            for row in (script.READ, script.LATER)
        )
        assert float(later[2]) < 0.5 * float(first[2])  # of full training's FLOPs
        assert first[5] == "-"
        assert int(later[5].replace(",", "")) >= 2 * 2 * script.QUICK.hidden  # two layers in bf16


#: LLaMA-130M's and T5-base's shapes with every width and the length an eighth as large: the ratios of FLOPs and of
#: saved bytes stay what they are.
EIGHTH = {"hidden": 96, "length": 32}


@pytest.mark.parametrize(("family", "flops"), [("llama", 0.44), ("t5", 0.40)])
@pytest.mark.parametrize("script", ["read"], indirect=True)
def test_costs_of_read_stay_within_what_the_docs_say(
    script: ModuleType, family: str, flops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved bytes at most 0.10 of full training's and 0.25 of LoRA's; FLOPs of a step 0.44 and 0.40 of full's."""
    whole = FAMILIES[family]
    smaller = replace(whole.shape, **EIGHTH, intermediate=whole.shape.intermediate // 8, words=whole.shape.words // 8)
    methods: dict[str, Callable[[Any], trimtab.Method]] = {
        script.LORA: lambda targets: trimtab.LoRA(rank=1, alpha=1, targets=targets),
        script.READ: lambda _: trimtab.READ(size=16),
    }
    for name, method in methods.items():
        monkeypatch.setitem(script.METHODS, name, method)
    rows = {name: script.Row(whole, name, smaller, "cpu") for name in (script.FULL, script.LORA, script.READ)}
    saved = {name: row.saved() for name, row in rows.items()}
    assert saved[script.READ] <= 0.10 * saved[script.FULL]
    assert saved[script.READ] <= 0.25 * saved[script.LORA]
    assert count_flops(rows[script.READ].step) <= flops * count_flops(rows[script.FULL].step)
