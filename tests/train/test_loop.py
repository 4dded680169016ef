"""The loop: what a step computes, when it refuses, and what it does between steps."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_parts import LENGTH, METHOD, RandomTokens, Record, Tokens, build, go, objective
from models_for_tests import VOCAB
from test_checkpoint import child, names, wait_for

import trimtab
from trimtab.errors import NonFiniteError
from trimtab.train.checkpoint import load
from trimtab.train.evaluate import EvalResult
from trimtab.train.loop import forward_backward, train
from trimtab.train.signals import StopSignals


def gradients(tmp_path: Path, micro: int | None, extra: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    run = build(
        tmp_path, method=trimtab.LoRA(rank=4, train_also=("norms", "head")), dtype=torch.float32, micro_batch=micro
    )
    if extra:
        run.adapter.extra_loss = lambda: sum(  # type: ignore[method-assign]
            entry.parameter.square().sum() for entry in run.adapter.trainable()
        )
    nats = forward_backward(run, RandomTokens().batch(0))
    return float(nats), {entry.name: entry.parameter.grad for entry in run.adapter.trainable()}


@pytest.mark.parametrize("extra", [False, True], ids=["plain", "extra loss"])
def test_accumulation_does_not_change_the_gradient(tmp_path: Path, extra: bool) -> None:
    """Micro-batches of 1, 3 and 4 with 12, 9, 6 and 3 scored tokens give one gradient, with the extra term once."""
    nats, whole = gradients(tmp_path, 4, extra)
    for micro in (1, 3, None):
        other_nats, other = gradients(tmp_path, micro, extra)
        assert other_nats == pytest.approx(nats, rel=1e-6)
        for name, gradient in whole.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_gradient_is_that_of_the_mean_token_loss(tmp_path: Path) -> None:
    """The loop's gradient is autograd's of (sum of token losses) / (scored tokens) + the extra term."""
    run = build(tmp_path, method=trimtab.Full(), dtype=torch.float32, micro_batch=1)
    batch = RandomTokens().batch(0)
    forward_backward(run, batch)
    found = {e.name: e.parameter.grad.clone() for e in run.adapter.trainable()}
    run.optimizer.zero_grad()
    logits = run.model(input_ids=batch.input_ids).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
    for entry in run.adapter.trainable():
        torch.testing.assert_close(found[entry.name], entry.parameter.grad, rtol=1e-4, atol=1e-6)


def test_rates_follow_the_schedule_and_both_peaks(tmp_path: Path) -> None:
    """Before the switch the peak is warm_start_lr, after it lr; every group has the rate of its step."""
    run = build(tmp_path, total=12)
    seen = []
    run.optimizer.register_step_pre_hook(lambda opt, *_: seen.append({g["lr"] for g in opt.param_groups}))
    go(run)
    wanted = [(5e-3 if t < 3 else 1e-2) * run.schedule(t) for t in range(12)]
    assert seen == [{rate} for rate in wanted]
    assert [r["lr"] for r in run.log.steps] == wanted


def test_clipping_bounds_the_norm(tmp_path: Path) -> None:
    """The norm over all trained tensors is at most `clip` when the optimizer steps; the log has the one before."""
    run = build(tmp_path, clip=0.05, stop_at=4)
    norms = []

    def norm(opt: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for g in opt.param_groups for p in g["params"] if p.grad is not None]
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads)))

    run.optimizer.register_step_pre_hook(norm)
    go(run)
    assert all(value == pytest.approx(0.05, rel=1e-3) for value in norms)
    assert all(r["grad_norm"] > 0.05 for r in run.log.steps)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_before_the_step(tmp_path: Path, where: str) -> None:
    """NaN in step 5: the message names the step and the checkpoint of step 4, and no weight has moved since."""
    run = build(tmp_path, checkpoint_every=2)
    plain = objective(run.model)

    def poisoned(batch: Any) -> torch.Tensor:
        value = plain(batch)
        if len(run.log.steps) == 4:
            if where == "loss":
                return value * math.nan
            value.register_hook(lambda g: g * math.inf)
        return value

    run.objective = poisoned
    with pytest.raises(NonFiniteError, match=r"^step 5: the .* is (nan|inf).*step-00000004") as caught:
        go(run)
    assert where in str(caught.value)
    saved = load(run.saver.last)
    assert saved.step == 4
    before = build(tmp_path, checkpoint=saved)
    for (name, now), (_, then) in zip(run.model.state_dict().items(), before.model.state_dict().items(), strict=True):
        assert torch.equal(now, then), name


def test_without_a_checkpoint_the_message_says_so(tmp_path: Path) -> None:
    """A first step that is not finite names no checkpoint that does not exist."""
    run = build(tmp_path, objective=lambda batch: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(NonFiniteError, match=r"^step 1: .*no checkpoint"):
        go(run)
    assert not (tmp_path / "checkpoints").exists()


def test_events_come_through_as_they_are(tmp_path: Path) -> None:
    """The method's events, evaluations and checkpoints, in the order in which they happen."""
    result = EvalResult(1.0, 2.0, 3.0, 4, 5)
    changed: list[int] = []
    run = build(
        tmp_path, eval_every=6, checkpoint_every=5, evaluate=lambda step: result, trainable_changed=changed.append
    )
    go(run)
    found = [f"{e['event']} {e['step']}" for e in run.log.events]
    wanted = "switch 3, checkpoint 5, restart 6, eval 6, restart 9, checkpoint 10, checkpoint 12"
    assert found == wanted.split(", ")
    assert all(e["reset_elements"] > 0 for e in run.log.events if e["event"] == "restart")
    assert changed == [3]


class Interrupting(Record):
    """A log that sends this process a signal when a step was logged."""

    def __init__(self, number: int, at: int) -> None:
        super().__init__()
        self.number, self.at = number, at

    def step(self, record: dict[str, Any]) -> None:
        super().step(record)
        if record["step"] == self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_between_two_steps(tmp_path: Path, number: int, status: int) -> None:
    """The step is finished, its checkpoint written, and the handlers are the old ones again."""
    old = signal.getsignal(number)
    run = build(tmp_path, log=Interrupting(number, 4))
    assert go(run) == 4
    assert run.signals.status == status
    assert load(run.saver.last).step == 4
    assert signal.getsignal(number) is old


def test_signals_are_left_alone_off_the_main_thread(tmp_path: Path) -> None:
    """In another thread the loop runs without handlers."""
    run = build(tmp_path, stop_at=2)
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(go(run)))
    thread.start()
    thread.join()
    assert done == [2]


SLOW = """
import sys, time
from pathlib import Path
from loop_parts import Record, build, train
class Slow(Record):
    def step(self, record):
        Path(sys.argv[1], "ready").touch()
        time.sleep(float(sys.argv[2]))
run = build(Path(sys.argv[1]), log=Slow(), total=500)
try:
    with run.signals:
        train(run)
except KeyboardInterrupt:  # what Python itself leaves with depends on what libraries do at its end
    sys.exit("KeyboardInterrupt")
sys.exit(run.signals.status)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_ends_with_the_status_of_its_signal(tmp_path: Path, number: int, status: int) -> None:
    """SIGINT ends with 130, SIGTERM with 143, each after a whole checkpoint."""
    process = child(SLOW, str(tmp_path), "0.01")
    wait_for(tmp_path / "ready", process)
    process.send_signal(number)
    errors = process.communicate()[1].decode()
    assert process.returncode == status, errors
    assert len(names(tmp_path)) == 1
    assert load(tmp_path / "checkpoints" / names(tmp_path)[0]).step >= 1


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once(tmp_path: Path, first: int) -> None:
    """Ctrl-C after a first signal does not wait for the step, nor for a checkpoint."""
    process = child(SLOW, str(tmp_path), "600")
    wait_for(tmp_path / "ready", process)
    process.send_signal(first)
    assert process.stderr is not None
    while b"Ctrl-C now" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert b"KeyboardInterrupt" in said
    assert process.returncode == 1, said
    assert not (tmp_path / "checkpoints").exists()


def test_a_signal_before_the_first_step_leaves_a_checkpoint(tmp_path: Path) -> None:
    """Nothing trained is a state, too: it can be resumed from step 0."""
    run = build(tmp_path)
    run.signals = StopSignals()
    run.signals.name = "SIGTERM"
    assert train(run) == 0
    assert load(run.saver.last).step == 0


def test_one_screen() -> None:
    """The loop knows no method, and stays under 300 lines."""
    from trimtab.methods import registry
    from trimtab.train import loop

    text = Path(loop.__file__).read_text()
    assert len(text.splitlines()) < 300
    assert not [name for name in registry() if f"{name!r}" in text or f'"{name}"' in text]


def test_batches_of_the_tests_are_uneven() -> None:
    """The accumulation test stands on rows with different numbers of scored tokens."""

    def counts() -> Iterator[int]:
        for row in RandomTokens().batch(0).split(1):
            assert isinstance(row, Tokens)
            yield row.n_valid

    assert list(counts()) == [LENGTH, LENGTH - 3, LENGTH - 6, LENGTH - 9]
    assert METHOD.switch_step == 3
    assert VOCAB == 97
