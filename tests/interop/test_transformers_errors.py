"""What a Trainer can be set to, and would not do as it says, is refused when the training begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import tiny_llama
from torch import nn
from trainer_parts import Tokens, arguments, build, relora
from transformers import Trainer, TrainerCallback

import trimtab
from trimtab.interop.transformers import TrimtabCallback, lr_scheduler


def refused(match: str, trainer: Trainer, **how: Any) -> None:
    with pytest.raises(trimtab.TrimtabError, match=match):
        trainer.train(**how)


def test_an_optimizer_built_before_the_method(tmp_path: Path) -> None:
    """An optimizer over the plain model's parameters knows no A and no B."""
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    refused(
        r"does not train model.layers.0.self_attn.q_proj.lora_A and 27 more.*callback.optimizers",
        build(arguments(tmp_path), TrimtabCallback(relora()), model, optimizers=(optimizer, None)),
    )


def test_a_warm_start_without_its_groups(tmp_path: Path) -> None:
    """The Trainer's own groups cannot be rewritten at the end of a warm start."""
    callback = TrimtabCallback(relora(warm_start_steps=3))
    refused("warm_start_steps = 3.*callback.optimizers", build(arguments(tmp_path), callback))


class Faster(trimtab.ReLoRA):
    """A method with a rate of its own for its adapters, as LoRA+ has."""

    abstract = True

    def _attach(self, model: nn.Module, residence: Any) -> trimtab.Adapter:
        adapter = super()._attach(model, residence)
        plain = adapter.parameter_groups

        def groups(lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
            return [g | {"lr": lr * (4.0 if g["group"] == "adapter" else 1.0)} for g in plain(lr, weight_decay)]

        adapter.parameter_groups = groups  # type: ignore[method-assign]
        return adapter


def test_rates_of_the_methods_own(tmp_path: Path) -> None:
    """A learning-rate ratio is never dropped: refused with the Trainer's optimizer, kept with the method's groups."""
    config = Faster(rank=3, restart_every=4)
    refused("learning rates of its own.*callback.optimizers", build(arguments(tmp_path), TrimtabCallback(config)))

    class Look(TrainerCallback):
        rates: tuple[float, ...] = ()

        def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
            Look.rates = tuple(group["lr"] for group in optimizer.param_groups)

    trainer = build(arguments(tmp_path), TrimtabCallback(config), own_groups=True)
    trainer.add_callback(Look())
    trainer.train()
    assert Look.rates[0] == pytest.approx(4 * Look.rates[1]) and Look.rates[1] > 0


def test_lengths_that_disagree(tmp_path: Path) -> None:
    """The schedule's length and restarts are those of the run, or it does not begin."""
    schedule = trimtab.Schedule(20, restarts=(4, 8, 12, 16))
    refused(
        "total_steps = 20.*trains for 12 steps",
        build(arguments(tmp_path), TrimtabCallback(relora(), schedule=schedule)),
    )
    schedule = trimtab.Schedule(12, restarts=(5, 10))
    refused(r"restarts = \(5, 10\).*\(4, 8\)", build(arguments(tmp_path), TrimtabCallback(relora(), schedule=schedule)))
    callback, model = TrimtabCallback(relora()), tiny_llama()
    optimizer, _ = callback.optimizers(model, arguments(tmp_path))
    given = (optimizer, lr_scheduler(optimizer, trimtab.Schedule(30, restarts=(4, 8))))
    refused("total_steps = 30", build(arguments(tmp_path), callback, model, optimizers=given))
    with pytest.raises(trimtab.ConfigError, match="rewarm_steps = 3"):
        TrimtabCallback(relora(), schedule=schedule, rewarm_steps=3)
    refused("restart_every = 50 is longer", build(arguments(tmp_path), TrimtabCallback(relora(restart_every=50))))


def test_schedulers_that_know_no_restarts(tmp_path: Path) -> None:
    """A kind that has no jagged form, a plateau, and a scheduler of the user's own are refused."""
    other = arguments(tmp_path, lr_scheduler_type="polynomial")
    refused("lr_scheduler_type='polynomial'", build(other, TrimtabCallback(relora())))
    waves = arguments(tmp_path, lr_scheduler_kwargs={"num_cycles": 2})
    refused(r"lr_scheduler_kwargs \['num_cycles'\]", build(waves, TrimtabCallback(relora())))
    callback, model = TrimtabCallback(relora()), tiny_llama()
    optimizer, _ = callback.optimizers(model, arguments(tmp_path))
    given = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    refused("scheduler of its own", build(arguments(tmp_path), callback, model, optimizers=given))
    schedule = trimtab.Schedule(12, restarts=(4, 8))
    plateau = arguments(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=2)
    callback = TrimtabCallback(relora(), schedule=schedule)
    refused("ReduceLROnPlateau", build(plateau, callback, eval_dataset=Tokens(2)))


def test_settings_that_would_not_do_as_they_say(tmp_path: Path) -> None:
    """load_best_model_at_end across a warm start, an optimizer without moments, several GPUs in a process."""
    best = arguments(
        tmp_path,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=4,
        eval_steps=4,
        load_best_model_at_end=True,
    )
    callback = TrimtabCallback(relora(warm_start_steps=3))
    refused("load_best_model_at_end", build(best, callback, own_groups=True, eval_dataset=Tokens(2)))
    refused("Adam's two moments, and SGD", build(arguments(tmp_path, optim="sgd"), TrimtabCallback(relora())))
    args = arguments(tmp_path)
    args._n_gpu = 2
    trainer = build(arguments(tmp_path), TrimtabCallback(relora()))
    trainer.args._n_gpu = 2
    refused("2 GPUs in one process", trainer)


def test_callbacks_that_come_too_late_or_twice(tmp_path: Path) -> None:
    """A callback given after the Trainer was built, and a model that already has an adapter."""
    trainer = Trainer(model=tiny_llama(), args=arguments(tmp_path), train_dataset=Tokens())
    trainer.add_callback(TrimtabCallback(relora()))
    refused("came too late", trainer)
    model = tiny_llama()
    trimtab.attach(model, relora())
    with pytest.raises(trimtab.ConfigError, match="already has an adapter"):
        build(arguments(tmp_path), TrimtabCallback(relora()), model)
    adapter = trimtab.attach(tiny_llama(), relora())
    with pytest.raises(trimtab.ConfigError, match="another model than the Trainer's"):
        build(arguments(tmp_path), TrimtabCallback(adapter))
    factory = Trainer(
        model_init=lambda: tiny_llama(),
        args=arguments(tmp_path),
        train_dataset=Tokens(),
        callbacks=[TrimtabCallback(relora())],
    )
    refused("do not use model_init", factory)


def test_an_adapter_that_is_not_active_or_closed(tmp_path: Path) -> None:
    """The adapter that trains is the one that the model runs, and is still on it."""
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2), name="first")
    trimtab.attach(model, trimtab.LoRA(rank=2), name="second")
    trimtab.activate(model, "second")
    refused("adapter 'first' is not the active one", build(arguments(tmp_path), TrimtabCallback(adapter), model))
    model = tiny_llama()
    adapter = trimtab.attach(model, relora())
    trainer = build(arguments(tmp_path), TrimtabCallback(adapter), model)
    adapter.merge()
    with pytest.raises(ValueError, match="merged"):
        trainer.train()
    with pytest.raises(trimtab.ConfigError, match="keep_base goes with a method's config"):
        TrimtabCallback(adapter, keep_base="host")


def test_a_checkpoint_without_our_state(tmp_path: Path) -> None:
    """A Trainer that ran without the callback left nothing to resume restarts from."""
    Trainer(
        model=tiny_llama(),
        args=arguments(tmp_path, 6, save_strategy="steps", save_steps=6),
        train_dataset=Tokens(),
    ).train()
    trainer = build(arguments(tmp_path), TrimtabCallback(relora()))
    path = str(tmp_path / "checkpoint-6")
    refused("holds no state of trimtab and lacks .*lora_A", trainer, resume_from_checkpoint=path)
    full = build(arguments(tmp_path), TrimtabCallback(trimtab.Full()))
    refused("resumes at step 6, and the adapter is at step 0", full, resume_from_checkpoint=path)


def test_a_checkpoint_of_other_settings(tmp_path: Path) -> None:
    """Another rank, another method, and a damaged text are named."""
    saving = arguments(tmp_path, save_strategy="steps", save_steps=6)
    build(saving, TrimtabCallback(relora(), merge_at_end=False)).train()
    path = str(tmp_path / "checkpoint-6")
    refused(
        "written with rank = 3, and the method has rank = 4",
        build(arguments(tmp_path), TrimtabCallback(relora(rank=4))),
        resume_from_checkpoint=path,
    )
    lora = TrimtabCallback(trimtab.LoRA(rank=3, alpha=12))
    refused("method relora", build(arguments(tmp_path), lora), resume_from_checkpoint=path)
    callback = TrimtabCallback(relora(), merge_at_end=False)
    trainer = build(arguments(tmp_path), callback)
    state = trainer.model.state_dict()
    state["trimtab_state.meta"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(trimtab.CheckpointError, match="damaged or of another version"):
        trainer.model.load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewarm_step": 3}, r"rewarm_step is no setting of it; did you mean rewarm_steps\?"),
        ({"zebra": 3}, "zebra is no setting of it; there are rewarm_steps, schedule"),
        ({"rewarm_steps": "3"}, "rewarm_steps = '3': give a whole number"),
        ({"rewarm_steps": -1}, "rewarm_steps = -1: give a whole number"),
        ({"schedule": "cosine"}, r"schedule='cosine': give a trimtab\.Schedule"),
        ({"merge_at_end": "no"}, "merge_at_end='no': give True, False or None"),
        ({"resume_from_checkpoint": True}, "resume_from_checkpoint=True: give the folder"),
        ({"dtype": "bf16"}, "dtype='bf16': nothing can compute in it"),
        ({"pure": 1}, "pure=1: give True or False"),
    ],
)
def test_settings_of_the_callback_are_checked_when_it_is_made(settings: dict[str, Any], message: str) -> None:
    """Not in the middle of a run's construction; a method's name and settings, too."""
    with pytest.raises(trimtab.ConfigError, match=message):
        TrimtabCallback(relora(), **settings)
    with pytest.raises(trimtab.ConfigError, match="no method is called 'zebra'"):
        TrimtabCallback({"name": "zebra"})


def test_a_rewarm_without_restarts_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A method without restarts has no use for rewarm_steps, and says so once; one with restarts is silent."""
    for method, told in ((trimtab.LoRA(rank=2), 1), (relora(), 0)):
        caplog.clear()
        build(arguments(tmp_path), TrimtabCallback(method, rewarm_steps=2)).train()
        notes = [record.getMessage() for record in caplog.records if "rewarm_steps" in record.getMessage()]
        assert notes == ["rewarm_steps = 2 has no effect: the method has no restarts"] * told
