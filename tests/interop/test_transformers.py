"""A transformers Trainer with one callback does what a plain loop around the adapter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import MODELS, logits, tiny_llama, token_ids
from safetensors.torch import load_file
from torch import Tensor, nn
from trainer_parts import Tokens, arguments, build, equal, rates, relora, snapshot
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

import trimtab
from trimtab.interop.modelstate import META
from trimtab.interop.transformers import TrimtabCallback, lr_scheduler


def ours(
    model: nn.Module, config: trimtab.Method, schedule: trimtab.Schedule, batches: list[Tensor]
) -> trimtab.Adapter:
    """The same training in a plain loop: AdamW, clipping at one, the pure schedule."""
    adapter = trimtab.attach(model, config)
    groups = adapter.parameter_groups(lr=1e-2)
    optimizer = torch.optim.AdamW(groups, fused=True)
    adapter.restarts(schedule.total_steps, schedule.rewarm_steps)
    model.train()
    for step, ids in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * schedule(step)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        adapter.after_step(step + 1, optimizer)
        optimizer.zero_grad()
    return adapter


class Recorder(TrainerCallback):
    """The batches in the order in which the Trainer's model saw them."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: list[Tensor] = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.batches.append(kwargs["input_ids"].clone())


@pytest.mark.parametrize("own_groups", [False, True])
def test_a_trainer_does_what_the_loop_does(tmp_path: Path, own_groups: bool) -> None:
    """Restarts, rates and weights are those of a plain loop over the same batches."""
    args = arguments(tmp_path, warmup_steps=2, optim="adamw_torch_fused")
    callback = TrimtabCallback(relora(), rewarm_steps=2, merge_at_end=False)
    model = tiny_llama()
    recorder = Recorder(model)
    trainer = build(args, callback, model, own_groups=own_groups)
    trainer.train()
    assert [(e["event"], e["step"]) for e in callback.events] == [("restart", 4), ("restart", 8)]
    assert [(e["event"], e["step"]) for e in trainer.state.log_history if "event" in e] == [
        ("restart", 4),
        ("restart", 8),
    ]
    schedule = trimtab.Schedule(12, warmup_steps=2, floor=0.0, restarts=(4, 8), rewarm_steps=2)
    assert rates(trainer) == pytest.approx([1e-2 * schedule(t) for t in range(12)], rel=1e-12)
    assert rates(trainer)[4] < 0.6 * rates(trainer)[3]  # the re-warm is there at all
    other = tiny_llama()
    adapter = ours(other, relora(), schedule, recorder.batches)
    left, right = snapshot(model), snapshot(other)
    assert left.keys() == right.keys()
    assert all((left[n] - right[n]).abs().max() <= 1e-6 for n in left)
    assert isinstance(callback.adapter, trimtab.Adapter)
    assert adapter.state_dict().meta == callback.adapter.state_dict().meta


def test_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    """With three micro-batches a step, restarts lie after four and eight optimizer steps, also across epochs."""
    callback = TrimtabCallback(relora())
    trainer = build(arguments(tmp_path, gradient_accumulation_steps=3), callback)
    trainer.train()
    assert [e["step"] for e in callback.events] == [4, 8]
    assert trainer.state.global_step == 12 and trainer.state.epoch > 1


def test_the_end_leaves_a_plain_model(tmp_path: Path) -> None:
    """After the training save_model writes a plain checkpoint with the function of the trained model."""
    callback = TrimtabCallback(relora())
    model = tiny_llama()
    trainer = build(arguments(tmp_path), callback, model)
    trainer.train()
    ids = token_ids()
    trainer.save_model(str(tmp_path / "out"))
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not [name for name in names if "lora" in name or "trimtab" in name]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, ids), logits(model, ids))
    control = tiny_llama()
    assert not torch.allclose(logits(control, ids), logits(model, ids), atol=1e-3)
    with pytest.raises(trimtab.ConfigError, match="has gone 12 steps already"):
        trainer.train()


def test_a_live_adapter_is_not_merged(tmp_path: Path) -> None:
    """Who attached the adapter merges it; until then the checkpoint holds it."""
    model = tiny_llama()
    adapter = trimtab.attach(model, relora())
    trainer = build(arguments(tmp_path), TrimtabCallback(adapter), model)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert META in names and any(name.endswith("lora_A") for name in names)
    before = logits(model, token_ids())
    adapter.merge()
    assert (logits(model, token_ids()) - before).norm() <= 1e-5 * before.norm()
    assert META not in model.state_dict()


CASES = {
    "relora": {},
    "dropout": {"dropout": 0.3},
    "warm start": {"warm_start_steps": 3},
    "magnitude": {"reset": "magnitude", "reset_ratio": 0.5},
    "lora only": {"train_also": None},
}


#: Beside the cases on LLaMA, tied weights and Conv1D where they matter.
RESUMED = [("llama", case) for case in CASES] + [("gpt2", "relora"), ("gpt2", "warm start")]


@pytest.mark.parametrize(("family", "case"), RESUMED)
@pytest.mark.parametrize("saved", [4, 6])
def test_resuming_is_exact(tmp_path: Path, saved: int, case: str, family: str) -> None:
    """2N steps equal N steps, save, resume, N steps, bit for bit; a restart lies before, at, or after the cut."""
    config = relora(restart_every=4 if case != "warm start" else 3, **CASES[case])

    def run(steps_saved: int | None, resume: str | None = None) -> tuple[Trainer, TrimtabCallback]:
        saving = {"save_strategy": "steps", "save_steps": steps_saved} if steps_saved else {}
        args = arguments(tmp_path, warmup_steps=1, gradient_accumulation_steps=2, **saving)
        callback = TrimtabCallback(config, rewarm_steps=2, merge_at_end=False)
        trainer = build(args, callback, MODELS[family](), own_groups=case == "warm start")
        trainer.train(resume_from_checkpoint=resume)
        return trainer, callback

    whole, _ = run(saved)
    moved = tmp_path / "elsewhere"
    (tmp_path / f"checkpoint-{saved}").rename(moved)
    resumed, callback = run(None, str(moved))
    assert [e["step"] for e in callback.events] == [n for n in config.restarts(12) if n > saved]
    assert len(callback.events) >= 1
    assert equal(snapshot(whole.model), snapshot(resumed.model))
    assert rates(whole) == rates(resumed)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert losses[0] == losses[1]


def test_resuming_in_bf16_keeps_the_carries(tmp_path: Path) -> None:
    """What a restart lost to bf16 is in the checkpoint, and comes back."""
    results = []
    for resume in (None, str(tmp_path / "checkpoint-6")):
        callback = TrimtabCallback(relora(), dtype=torch.bfloat16, merge_at_end=False)
        saving = {"save_strategy": "steps", "save_steps": 6} if resume is None else {}
        trainer = build(arguments(tmp_path, **saving), callback)
        trainer.train(resume_from_checkpoint=resume)
        assert isinstance(callback.adapter, trimtab.Adapter)
        results.append((snapshot(trainer.model), dict(callback.adapter.state_dict().tensors)))
    carries = [name for name in results[0][1] if name.startswith("carry:")]
    assert carries and any(results[0][1][name].any() for name in carries)
    assert equal(results[0][0], results[1][0]) and equal(results[0][1], results[1][1])


def test_a_run_that_ended_on_a_cycle_can_be_prolonged(tmp_path: Path) -> None:
    """Eight steps end where a cycle does; going on to twelve makes up for that restart."""
    steady = {"lr_scheduler_type": "constant"}
    build(arguments(tmp_path, 8, save_strategy="steps", save_steps=8, **steady), TrimtabCallback(relora())).train()
    longer = TrimtabCallback(relora(), merge_at_end=False)
    trainer = build(arguments(tmp_path, **steady), longer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    whole = build(arguments(tmp_path, **steady), TrimtabCallback(relora(), merge_at_end=False))
    whole.train()
    assert [e["step"] for e in longer.events] == [8]
    assert equal(snapshot(trainer.model), snapshot(whole.model))


def test_the_best_model_is_loaded_with_its_state(tmp_path: Path) -> None:
    """load_best_model_at_end gives the function of the best checkpoint, base, adapter and carries."""
    seen: dict[int, Tensor] = {}

    class Look(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, model: nn.Module, metrics: Any, **_: Any) -> None:
            metrics["eval_score"] = {3: 1.0, 6: 5.0, 9: 2.0, 12: 3.0}[state.global_step]
            seen[state.global_step] = logits(model, token_ids())

    model = tiny_llama()
    callback = TrimtabCallback(relora(), merge_at_end=False)
    args = arguments(
        tmp_path,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=3,
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=Tokens(), eval_dataset=Tokens(4), callbacks=[Look(), callback]
    )
    trainer.train()
    assert torch.equal(logits(model, token_ids()), seen[6])
    assert not torch.equal(seen[6], seen[12])
    assert isinstance(callback.adapter, trimtab.Adapter)
    assert callback.adapter.state_dict().meta["restarts"] == 1


def test_a_skipped_step_counts_nowhere(tmp_path: Path) -> None:
    """When the gradient scaler skips steps, restarts and rates stay together, and are that many steps late."""

    class Skips(TrainerCallback):
        """Says of the second and fifth step that they were skipped, as accelerate does."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            parts["optimizer"]._is_overflow = state.global_step in (1, 4)

    callback = TrimtabCallback(relora(), rewarm_steps=2)
    trainer = Trainer(
        model=tiny_llama(), args=arguments(tmp_path), train_dataset=Tokens(), callbacks=[Skips(), callback]
    )
    trainer.train()
    schedule = trimtab.Schedule(12, floor=0.0, restarts=(4, 8), rewarm_steps=2)
    taken = [0, 1, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    assert callback.skipped == 2
    assert [e["step"] for e in callback.events] == [4, 8]
    assert rates(trainer) == pytest.approx([1e-2 * schedule(t) for t in taken], rel=1e-12)


class Tilted(trimtab.ReLoRA):
    """A method with an extra term, as AdaLoRA has one."""

    abstract = True

    def _attach(self, model: nn.Module, residence: Any) -> trimtab.Adapter:
        adapter = super()._attach(model, residence)
        adapter.extra_loss = lambda: sum(  # type: ignore[method-assign]
            (layer.lora_A @ layer.lora_A.t()).pow(2).sum() for layer in adapter.layers.values()
        )
        return adapter


@pytest.mark.parametrize("changes", [{}, {"label_smoothing_factor": 0.1}, {"gradient_accumulation_steps": 3}])
def test_the_extra_term_has_weight_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Gradients before clipping are those of the loss plus once the term, however the Trainer makes its loss."""
    grads: dict[type, dict[str, Tensor]] = {}

    class Look(TrainerCallback):
        def __init__(self, kind: type) -> None:
            self.kind = kind

        def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
            found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            grads.setdefault(self.kind, found)

    for config in (relora(), Tilted(rank=3, alpha=12, restart_every=4)):
        callbacks = [TrimtabCallback(config, merge_at_end=False), Look(type(config))]
        args = arguments(tmp_path, max_grad_norm=0.0, **changes)
        Trainer(model=tiny_llama(), args=args, train_dataset=Tokens(), callbacks=callbacks).train()
    fresh = tiny_llama()
    adapter = trimtab.attach(fresh, Tilted(rank=3, alpha=12, restart_every=4))
    extra = adapter.extra_loss()
    assert extra is not None
    extra.backward()
    for name, parameter in fresh.named_parameters():
        if name in grads[trimtab.ReLoRA]:
            expected = grads[trimtab.ReLoRA][name] + (0 if parameter.grad is None else parameter.grad)
            assert torch.allclose(grads[Tilted][name], expected, rtol=1e-5, atol=1e-7), name
    assert any(p.grad is not None and p.grad.any() for n, p in fresh.named_parameters() if "lora_A" in n)


def test_other_methods_keep_the_trainers_schedule(tmp_path: Path) -> None:
    """LoRA has no restarts, so the rates are the Trainer's own."""
    with_it, without = (
        build(arguments(tmp_path, lr_scheduler_type="polynomial", warmup_steps=3), callback)
        for callback in (TrimtabCallback(trimtab.LoRA(rank=3)), TrainerCallback())
    )
    with_it.train()
    without.train()
    assert rates(with_it) == rates(without)


def test_a_schedule_of_ones_own(tmp_path: Path) -> None:
    """A Schedule is followed, given to the callback or as the Trainer's scheduler."""
    schedule = trimtab.Schedule(12, shape="linear", floor=0.3, warmup_steps=3, restarts=(4, 8), rewarm_steps=3)
    expected = pytest.approx([1e-2 * schedule(t) for t in range(12)], rel=1e-12)
    trainer = build(arguments(tmp_path), TrimtabCallback(relora(), schedule=schedule))
    trainer.train()
    assert rates(trainer) == expected
    callback, model = TrimtabCallback(relora(), rewarm_steps=3), tiny_llama()
    optimizer, _ = callback.optimizers(model, arguments(tmp_path))
    given = (optimizer, lr_scheduler(optimizer, schedule))
    trainer = build(arguments(tmp_path), callback, model, optimizers=given)
    trainer.train()
    assert rates(trainer) == expected


@pytest.mark.parametrize(("kind", "options", "floor"), [
    ("linear", {}, 0.0),
    ("cosine_with_min_lr", {"min_lr_rate": 0.2}, 0.2),
    ("cosine_with_min_lr", {"min_lr": 3e-3}, 0.3),
    ("constant_with_warmup", {}, 0.0),
])  # fmt: skip
def test_the_arguments_schedule_is_the_curve(tmp_path: Path, kind: str, options: dict[str, Any], floor: float) -> None:
    """lr_scheduler_type, its options and warmup_steps make the curve that the restarts are cut into."""
    args = arguments(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=options, warmup_steps=2)
    trainer = build(args, TrimtabCallback(relora(), rewarm_steps=2))
    trainer.train()
    shape: Any = {"linear": "linear", "constant_with_warmup": "constant"}.get(kind, "cosine")
    schedule = trimtab.Schedule(12, shape=shape, floor=floor, warmup_steps=2, restarts=(4, 8), rewarm_steps=2)
    assert rates(trainer) == pytest.approx([1e-2 * schedule(t) for t in range(12)], rel=1e-12)
