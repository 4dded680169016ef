"""The benchmark of fine-tuning: both programs train alike, and its tables have their rows."""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("peft", "accelerate")),
    reason="its other side needs peft and accelerate",
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark as a module; what it measures in processes of their own is measured in this one."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("finetune")

    def apart(file: Path, arguments: list[str], known: Path | None = None) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            module.main(arguments)
        return json.loads(printed.getvalue().splitlines()[-1])

    monkeypatch.setattr(module, "apart", apart)
    yield module
    for name in ("finetune", "finetune_sides", "finetune_data"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


def rows_of(printed: str, column: str) -> dict[str, dict[str, str]]:
    """The lines of the table that has this column, by their first cell."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line[:2] == "| "]
    start = next(n for n, line in enumerate(lines) if column in line)
    table = [line for line in lines[start + 1 :] if len(line) == len(lines[start])]
    return {line[0]: dict(zip(lines[start], line, strict=True)) for line in table}


@pytest.mark.parametrize("task", ["chat", "pairs"])
def test_all_rows_train_alike(script: ModuleType, out: Path, task: str) -> None:
    """The same trained values at the start, the same tokens, and on the same batches the same losses."""
    sides = script.sides
    options = script.parse(["--quick", "--out", str(out)])
    setup = script.setup_of(task, options)
    made = {row: sides.make(setup, row) for row in sides.ROWS[task]}
    assert len({program.trainable for program in made.values()}) == 1
    assert len({program.tokens for program in made.values()}) == 1
    assert made[sides.GROUPED].padding < made[sides.THEIRS].padding
    for program in made.values():
        program.model.eval()  # no dropout: losses are the model's alone
    for program in (made[row] for row in sides.ROWS[task]):
        program.model.train = lambda *_, model=program.model: model
    losses = {row: program.run() for row, program in made.items()}
    assert max(losses.values()) - min(losses.values()) < 5e-3
    alike = (sides.THEIRS, sides.OURS) if task == "chat" else (sides.GROUPED, sides.OURS)
    # Over as few steps little is learned; what both have learned is alike.
    assert losses[alike[0]] == pytest.approx(losses[alike[1]], abs=1e-3)


def test_both_programs_step_as_far(script: ModuleType, out: Path) -> None:
    """After the run the trained values are nearly equal: same rates, same clipping, same optimizer."""
    sides = script.sides
    setup = script.setup_of("chat", script.parse(["--quick", "--out", str(out)]))
    ours, theirs = sides.make(setup, sides.PADDED), sides.make(setup, sides.THEIRS)
    ours.run(), theirs.run()
    own = {name: p for name, p in theirs.model.named_parameters() if p.requires_grad}
    moved = off = 0.0
    for entry in ours.adapter.trainable():
        if not entry.name.endswith("lora_B"):
            continue
        (other,) = (p for name, p in own.items() if name.endswith(f"{entry.name}.default.weight"))
        moved += float(entry.parameter.detach().square().sum())
        off += float((entry.parameter - other).detach().square().sum())
    assert moved > 0.0
    assert off < 0.05 * moved


def test_costs_and_times_are_printed(
    script: ModuleType, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line for each row; packed chats and grouped ones have less padding; what is a stand-in is said to be."""
    sides = script.sides
    rows = (sides.THEIRS, sides.GROUPED, sides.OURS)
    monkeypatch.setitem(sides.ROWS, "chat", rows)
    script.main(["--quick", "--steps", "2", "--out", str(out), "--tables", "costs", "time", "--tasks", "chat"])
    printed = capsys.readouterr().out
    assert "smollm2: a stand-in" in printed
    costs, times = rows_of(printed, "peak live MiB"), rows_of(printed, "mean loss")
    assert tuple(costs) == tuple(times) == rows
    assert float(costs[sides.OURS]["peak live MiB"]) < 0.8 * float(costs[sides.THEIRS]["peak live MiB"])
    padding = [float(costs[row]["padding, %"]) for row in rows]
    assert max(padding[1:]) < padding[0]
    assert len({line["trained, K"] for line in costs.values()}) == 1
    assert len({line["mean loss"][:4] for line in times.values()}) == 1


def test_a_sample_has_whole_rows(script: ModuleType, out: Path, tmp_path: Path) -> None:
    """A row of a table may have several lines."""
    real = script.parts("pairs", out, True)
    rows = [(f"one,\n{n}", f'"two"\r\n{n}', ("same", "other")[n % 2]) for n in range(40)]
    with open(tmp_path / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "pair", "label"), *rows])
    sampled = script.sample(replace(real, train=tmp_path / "train.csv"), 2, 4, tmp_path / "some").train
    with open(sampled, newline="") as file:
        head, *found = map(tuple, csv.reader(file))
    assert head == ("text", "pair", "label")
    assert len(set(found)) == 8
    assert set(found) <= set(rows)


def test_every_program_makes_the_same_tokens(script: ModuleType, out: Path) -> None:
    """Ours and those of `datasets`; the flags of both mark the same tokens."""
    import datasets
    from transformers import AutoTokenizer

    from trimtab.tasks import Chat, Message
    from trimtab.tasks.encode import Encoder

    real = script.parts("chat", out, True)
    path = script.chat_file(real.train, out, 0.02)
    found = {name: script.encode(name, path, real.model, real.validation) for name in (script.ENCODE, script.MAP)}
    assert found[script.ENCODE]["tokens"] == found[script.MAP]["tokens"] > 1000
    tokenizer = AutoTokenizer.from_pretrained(real.model)
    kept: list[Any] = []
    original = datasets.Dataset.map

    def keep(self: Any, *arguments: Any, **settings: Any) -> Any:
        kept.append(original(self, *arguments, **{**settings, "num_proc": None}))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.Dataset, "map", keep)
        script._mapped(tokenizer, path, flags=True)
        theirs = [(row["input_ids"], [bool(flag) for flag in row["learned"]]) for row in kept[0]]
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    chats = [Chat(tuple(Message(**turn) for turn in row)) for row in rows]
    ours = Encoder(tokenizer, "causal", script.sides.SEQ_LEN["chat"])(chats, "train")
    assert ours.learned is not None
    assert [row.tolist() for row in ours.ids] == [ids for ids, _ in theirs]
    for mine, (ids, flags) in zip(ours.learned, theirs, strict=True):
        # Theirs ends an answer behind the line break that follows its turn.
        before = [None, *ids[:-1]]
        assert mine.tolist() == [f and i != tokenizer.eos_token_id for f, i in zip(flags, before, strict=True)]
