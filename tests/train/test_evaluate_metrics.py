"""Evaluation is the mean per token, exactly; metrics.jsonl is valid JSON without doubles; the progress line."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from loop_parts import RandomTokens, build, objective
from rich.console import Console

from trimtab.errors import CheckpointError, ConfigError, DataError
from trimtab.train.evaluate import evaluate
from trimtab.train.metrics import MetricsFile, RunLog, require_tensorboard, tensorboard_writer, truncate
from trimtab.train.progress import ProgressLine, bar, clock


def test_evaluation_is_the_mean_per_token(tmp_path: Path) -> None:
    """Over batches of unlike sizes: the sum over all scored tokens in float64, over their number and their bytes."""
    run = build(tmp_path, dtype=torch.float32)
    batches = [*RandomTokens().batch(0).split(3), *RandomTokens().batch(1).split(1)]
    run.model.train()
    run.model.get_input_embeddings().eval()
    modes = [module.training for module in run.model.modules()]
    result = evaluate(run.model, objective(run.model), [(batch, 7) for batch in batches])
    assert [module.training for module in run.model.modules()] == modes
    run.model.eval()
    losses = []
    for batch in batches:
        with torch.no_grad():
            logits = run.model(input_ids=batch.input_ids).logits.double()
        token = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        losses += token[batch.labels.flatten() != -100].tolist()
    mean = math.fsum(losses) / len(losses)
    assert result.tokens == len(losses) == 60
    assert result.bytes == 7 * len(batches)
    assert result.loss == pytest.approx(mean, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.fsum(losses) / math.log(2) / result.bytes, rel=1e-6)


def test_evaluation_sums_in_float64(tmp_path: Path) -> None:
    """Batch sums of which fp32 would lose the small ones add up exactly, and no gradient is recorded."""
    run = build(tmp_path)
    sums = iter([torch.tensor(2.0**24)] + [torch.tensor(1.0)] * 9)

    def one(batch: object) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert not run.model.training
        return next(sums)

    batch = RandomTokens().batch(0)
    result = evaluate(run.model, one, [(batch, 1)] * 10)
    assert result.loss == (2**24 + 9) / (10 * batch.n_valid)


def test_an_empty_validation_part_is_an_error(tmp_path: Path) -> None:
    """No scored token: a line that names the settings, not a division by zero."""
    run = build(tmp_path)
    with pytest.raises(DataError, match=r"data\.validation_share"):
        evaluate(run.model, objective(run.model), [])


def records(path: Path) -> list[dict[str, object]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_metrics_are_always_valid_json(tmp_path: Path) -> None:
    """NaN and infinity become null, at any depth; each line is on the disk at once."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"event": "eval", "step": 3, "perplexity": math.inf, "more": {"x": [math.nan, 1.0]}})
    found = records(tmp_path / "metrics.jsonl")
    assert found[0]["perplexity"] is None
    assert found[0]["more"] == {"x": [None, 1.0]}
    assert isinstance(found[0]["time"], float)
    file.close()


def test_truncation_leaves_no_doubles(tmp_path: Path) -> None:
    """After the resumed step everything goes: later records, the end's evaluation, and a torn last line."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 7):
        file.write({"event": "step", "step": step})
    file.write({"event": "eval", "step": 4, "final": True})
    file.close()
    with open(path, "a") as torn:
        torn.write('{"event": "step", "st')
    assert truncate(path, 4) == 4
    assert [r["step"] for r in records(path)] == [1, 2, 3, 4]
    again = MetricsFile(path)
    again.write({"event": "resume", "step": 4})
    again.close()
    assert [r["event"] for r in records(path)][-2:] == ["step", "resume"]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert truncate(tmp_path / "none.jsonl", 4) == 0


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """Metrics that the disk does not take stop the run with a line that names the file."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(CheckpointError, match="/dev/full could not be written: No space left"):
        MetricsFile(Path("/dev/full")).write({"event": "step", "step": 1})


def logged(path: Path, console: Console, every: int, last: int) -> list[dict[str, object]]:
    line = ProgressLine(console, 10, 0, last, (4, 8))
    log = RunLog(MetricsFile(path), line, None, every=every, last=last)
    with line:
        for step in range(1, last + 1):
            log.step(
                {
                    "event": "step",
                    "step": step,
                    "loss": 2.0,
                    "lr": 1e-3,
                    "batch_tokens": 100,
                    "tokens": step * 100,
                    "seconds": 0.5,
                    "epoch": 0.0,
                }
            )
            if step == 4:
                log.event({"event": "restart", "step": 4, "restart": 1})
    log.close()
    return records(path)


def test_step_records(tmp_path: Path) -> None:
    """One record every N steps and one for the last; tokens so far, and the speed of the interval."""
    found = [r for r in logged(tmp_path / "m", Console(file=io.StringIO()), 3, 7) if r["event"] == "step"]
    assert [r["step"] for r in found] == [3, 6, 7]
    assert [r["tokens"] for r in found] == [300, 600, 700]
    assert [r["tokens_per_second"] for r in found] == [200.0] * 3
    assert set(found[0]) == {"event", "step", "time", "loss", "lr", "epoch", "tokens", "tokens_per_second"}


def test_a_pipe_gets_plain_lines(tmp_path: Path) -> None:
    """Away from a terminal: a line for each logged step and each restart, no control characters."""
    out = io.StringIO()
    logged(tmp_path / "m", Console(file=out, width=40), 5, 10)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert "\x1b" not in out.getvalue()
    assert lines[0] == "step 4  restart  restart 1"
    assert lines[2].startswith("step 10/10  loss 2.0000  lr 1.00e-03  200 tokens/s  0:00 left  restarts 2/2")


def test_a_terminal_gets_one_live_line(tmp_path: Path) -> None:
    """On a terminal the line is redrawn, with the restarts as marks in its bar."""
    out = io.StringIO()
    logged(tmp_path / "m", Console(file=out, force_terminal=True, width=200), 100, 10)
    assert bar(10, 10, (4, 8)) in out.getvalue()
    assert "\x1b" in out.getvalue()


def test_the_bar_marks_restarts() -> None:
    """Restarts behind and ahead, also one in the last cell."""
    assert bar(5, 10, (2, 9), width=10) == "━━╋━━────┼"
    assert bar(10, 10, (10,), width=10) == "━━━━━━━━━╋"
    assert clock(3725) == "1:02:05"
    assert clock(59.6) == "1:00"


def test_tensorboard_is_asked_for_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package: an error that names the extra."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"trimtab\[tensorboard\]"):
        require_tensorboard()


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    """With the package: events on the disk, and none for words."""
    pytest.importorskip("tensorboard")
    line = ProgressLine(Console(file=io.StringIO()), 10, 0, 10, ())
    log = RunLog(MetricsFile(tmp_path / "m"), line, tensorboard_writer(tmp_path / "tb", 0), every=1, last=10)
    log.event({"event": "switch", "step": 1, "seconds": 1.5, "label": "x"})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert events.Tags()["scalars"] == ["switch/seconds"]
    assert events.Scalars("switch/seconds")[0].value == 1.5
