"""AdaLoRA against peft's RankAllocator, its phases, its state, and its files in both directions."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import MODELS, logits, loss_of, tiny_gpt2, tiny_llama, token_ids, train
from torch import nn

import trimtab
from trimtab.methods.adalora import AdaLoRAAdapter

SMALL: dict[str, Any] = {"rank": 2, "init_rank": 4, "initial_steps": 2, "final_steps": 4, "allocate_every": 2}
TARGETS = ("q_proj", "v_proj", "down_proj")


def attached(model: nn.Module, **settings: Any) -> AdaLoRAAdapter:
    adapter = trimtab.attach(model, trimtab.AdaLoRA(**(SMALL | settings)))
    assert isinstance(adapter, AdaLoRAAdapter)
    return adapter


def trained(model: nn.Module, steps: int = 12, **settings: Any) -> AdaLoRAAdapter:
    adapter = attached(model, total_steps=12, **settings)
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, steps + 1))
    return adapter


def peft_config(**changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = {
        "target_r": 2,
        "init_r": 4,
        "tinit": 2,
        "tfinal": 4,
        "deltaT": 2,
        "total_step": 12,
        "lora_alpha": 12,
        "target_modules": list(TARGETS),
        "orth_reg_weight": 0.3,
    }
    return peft.AdaLoraConfig(**(settings | changes))


def double_gpt2() -> nn.Module:
    """In float64 up to and including the loss, which transformers computes in fp32 (as it does LLaMA's norms)."""

    def loss(logits: torch.Tensor, labels: torch.Tensor, **_: object) -> torch.Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model = tiny_gpt2().double()
    model.loss_function = loss
    return model


def test_a_run_is_pefts_step_by_step() -> None:
    """In float64 from the same start: the same budgets, masks, losses and weights as peft's allocator, each step."""
    peft = pytest.importorskip("peft")
    targets = ("c_attn", "c_proj", "c_fc")
    config = peft_config(
        target_modules=list(targets), task_type="CAUSAL_LM"
    )  # without it peft's model leaves the orthogonality term out
    theirs = peft.get_peft_model(double_gpt2(), config, autocast_adapter_dtype=False).double()
    model = double_gpt2()
    adapter = attached(model, targets=targets, alpha=12, total_steps=12, orthogonality=0.3)
    other = dict(theirs.named_parameters())
    pairs = [(p, other[f"base_model.model.{name}.default"]) for name, p in adapter.own().items()]
    with torch.no_grad():
        for ours, peers in pairs:
            peers.copy_(ours)
    lambdas = [pair for pair in pairs if pair[0].shape[1] == 1]
    one = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    # On a base that is not fp32 peft lets `ranknum`, a constant of the scale, train (and does not save it).
    trains = [p for name, p in other.items() if p.requires_grad and "ranknum" not in name]
    two = torch.optim.AdamW(trains, lr=1e-2, weight_decay=0.0)
    budgets = []
    for step in range(1, 13):
        ids = token_ids(seed=step)
        extra = adapter.extra_loss()
        assert extra is not None
        loss = model(input_ids=ids, labels=ids).loss + extra
        loss.backward()
        peers_loss = theirs(input_ids=ids, labels=ids).loss
        peers_loss.backward()
        assert torch.allclose(loss, peers_loss, rtol=1e-10)
        one.step()
        report = adapter.after_step(step, one)
        two.step()
        theirs.base_model.update_and_allocate(step)
        one.zero_grad()
        two.zero_grad()
        for ours, peers in pairs:
            assert torch.allclose(ours, peers, rtol=1e-6, atol=1e-10), step
        for ours, peers in lambdas:
            assert torch.equal(ours == 0, peers == 0), step
        budgets += [(event["step"], event["budget"]) for event in report.events]
    allocator = theirs.base_model.rankallocator
    assert budgets == [(s, allocator.budget_schedule(s)[0]) for s in (4, 6)] + [(8, 16)]
    assert adapter.pattern is not None and sum(map(sum, adapter.pattern.values())) == 16
    given = theirs.peft_config["default"].rank_pattern
    assert {f"{name}.lora_E.default": kept for name, kept in adapter.pattern.items()} == given


def test_a_dropped_triplet_can_come_back_before_the_last_phase_and_not_in_it() -> None:
    """Lambda of what is left out is 0 right after a reallocation, trains on, and stays 0 once the choice stands."""
    model = tiny_llama()
    adapter = attached(model, total_steps=12)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    zeros = []
    for step in range(1, 13):
        train(model, adapter, optimizer, range(step, step + 1))
        zeros.append(sum(int((p == 0).sum()) for name, p in adapter.own().items() if name.endswith("lora_E")))
    size = 4 * 14
    budgets = [size - adapter.config.budget(step, 12, 14) for step in (4, 6)]
    assert zeros == [0, 0, 0, budgets[0], 0, budgets[1], 0, 28, 28, 28, 28, 28]
    assert not adapter.importance.averages  # their memory is free again


def test_the_budget_falls_as_a_cube_from_start_to_end() -> None:
    """b0 at t_i, bT at T - t_f, monotone; a quarter of the way down at the middle of the fall is an eighth left."""
    config = trimtab.AdaLoRA(rank=2, init_rank=10, initial_steps=10, final_steps=30)
    budgets = [config.budget(step, 100, 6) for step in range(10, 71)]
    assert budgets[0] == 60 and budgets[-1] == 12 and budgets == sorted(budgets, reverse=True)
    assert budgets[30] == 12 + 48 // 8
    assert trimtab.AdaLoRA().phases(1000) == (100, 500)


@pytest.mark.parametrize("at", [5, 9])
def test_a_resumed_run_is_the_same_bit_for_bit(at: int) -> None:
    """2N = N + save + resume + N, before and after the choice stands, optimizer state included."""
    whole = tiny_llama()
    straight = trained(whole)
    model = tiny_llama()
    first = attached(model, total_steps=12)
    optimizer = torch.optim.AdamW(first.parameter_groups(lr=1e-2))
    train(model, first, optimizer, range(1, at + 1))
    state, moments = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())
    json.dumps(state.meta)
    again = tiny_llama()
    second = attached(again, total_steps=12)
    second.load_state_dict(state)
    optimizer = torch.optim.AdamW(second.parameter_groups(lr=1e-2))
    optimizer.load_state_dict(moments)
    train(again, second, optimizer, range(at + 1, 13))
    for (name, ours), expected in zip(second.own().items(), straight.own().values(), strict=True):
        assert torch.equal(ours, expected), name
    assert second.pattern == straight.pattern


def test_a_state_that_lacks_an_average_is_refused() -> None:
    """A checkpoint without one of the averages is an error, not a fresh start of it."""
    adapter = trained(tiny_llama(), steps=3)
    state = adapter.state_dict()
    del state.tensors[next(name for name in state.tensors if name.startswith("uncertainty:"))]
    with pytest.raises(trimtab.CheckpointError, match="lacks uncertainty:"):
        attached(tiny_llama(), total_steps=12).load_state_dict(state)


def test_after_step_says_when_its_gradients_are_gone() -> None:
    """zero_grad before after_step is an error at once, or, where it leaves zeros, at the first reallocation."""
    model = tiny_llama()
    adapter = attached(model, total_steps=12)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    loss_of(model, token_ids()).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(trimtab.TrimtabError, match=r"gradients are gone.*zero_grad"):
        adapter.after_step(1, optimizer)
    for step in range(1, 4):
        loss_of(model, token_ids()).backward()
        optimizer.zero_grad(set_to_none=False)
        adapter.after_step(step, optimizer)
    with pytest.raises(trimtab.TrimtabError, match="all gradients were zero"):
        adapter.after_step(4, optimizer)


def test_a_step_left_out_is_an_error() -> None:
    """Importance is an average over all steps."""
    model = tiny_llama()
    adapter = attached(model, total_steps=12)
    with pytest.raises(ValueError, match=r"after_step\(2\) follows after_step\(0\)"):
        train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(2, 3))


def test_a_step_that_a_scaler_leaves_out_spoils_no_average() -> None:
    """An infinite gradient changes no average; the run goes on."""
    model = tiny_llama()
    adapter = attached(model, total_steps=12)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    train(model, adapter, optimizer, range(1, 3))
    before = copy.deepcopy(adapter.importance.tensors())
    loss_of(model, token_ids()).backward()
    next(iter(adapter.own().values())).grad.fill_(float("inf"))  # type: ignore[union-attr]
    adapter.after_step(3, optimizer)
    optimizer.zero_grad()
    assert all(torch.equal(t, before[name]) for name, t in adapter.importance.tensors().items())
    train(model, adapter, optimizer, range(4, 9))
    assert adapter.pattern is not None


def test_the_length_of_the_run_must_be_known_and_fit() -> None:
    """Not told, told twice, or too short for its phases: one line that says what to do."""
    model = tiny_llama()
    adapter = attached(model)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    with pytest.raises(trimtab.ConfigError, match=r"adapter\.restarts\(total_steps\)"):
        train(model, adapter, optimizer, range(1, 2))
    optimizer.zero_grad()
    adapter.restarts(12)
    train(model, adapter, optimizer, range(1, 2))
    with pytest.raises(trimtab.ConfigError, match="total_steps = 12 is not the length of the run, 20"):
        attached(tiny_llama(), total_steps=12).restarts(20)
    with pytest.raises(trimtab.ConfigError, match="final_steps = 5 leaves no step of 6"):
        attached(tiny_llama(), total_steps=6, final_steps=5)
    with pytest.raises(trimtab.ConfigError, match="initial_steps = 9 leaves no step of 12"):
        attached(tiny_llama(), total_steps=12, initial_steps=9)
    with pytest.raises(trimtab.ConfigError, match="final_steps = 1 leaves no step of 2"):
        trimtab.attach(tiny_llama(), trimtab.AdaLoRA(rank=2, init_rank=4, total_steps=2))


def test_wrong_settings_are_refused() -> None:
    """A first rank below the last, or above a layer's size; the model is left as it was."""
    with pytest.raises(trimtab.ConfigError, match="AdaLoRA: init_rank = 4: is below rank = 8"):
        trimtab.AdaLoRA(rank=8, init_rank=4)
    model = tiny_llama()
    with pytest.raises(trimtab.ConfigError, match=r"init_rank = 20 is above the size of .*k_proj, \(16, 32\)"):
        attached(model, init_rank=20)
    assert not trimtab.adapters(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("steps", [6, 12])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_peft_reads_our_folder(family: str, steps: int, tmp_path: Path) -> None:
    """Before and after the choice stands, peft's logits and those of a reload are ours; the pattern goes along."""
    peft = pytest.importorskip("peft")
    model = MODELS[family]()
    adapter = trained(model, steps, alpha=40)
    out = logits(model, token_ids())
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(MODELS[family](), str(tmp_path))
    assert torch.allclose(logits(theirs.get_base_model(), token_ids()), out, atol=1e-5)
    fresh = MODELS[family]()
    base = logits(fresh, token_ids())
    loaded = trimtab.load_adapter(fresh, tmp_path)
    assert isinstance(loaded, AdaLoRAAdapter)
    assert torch.equal(logits(fresh, token_ids()), out) and not torch.allclose(base, out, atol=1e-3)
    assert loaded.pattern == adapter.pattern and (steps == 6) == (loaded.pattern is None)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    loaded.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text()) == saved


@pytest.mark.parametrize("steps", [0, 6, 12])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_we_read_a_peft_folder(family: str, steps: int, tmp_path: Path) -> None:
    """What peft trained with its allocator and saved answers the same here, layers of rank 0 among it."""
    peft = pytest.importorskip("peft")
    targets = list(TARGETS) if family == "llama" else ["c_attn", "c_proj"]
    config = peft_config(target_r=1, target_modules=targets, exclude_modules=None)
    theirs = peft.get_peft_model(MODELS[family](), config)
    if not steps:
        for name, parameter in theirs.named_parameters():
            if "lora_E" in name:
                nn.init.normal_(parameter)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=3e-2)
    for step in range(1, steps + 1):
        ids = token_ids(seed=step)
        theirs(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    expected = logits(theirs, token_ids())
    if steps == 6:  # peft drops in the file what came back since the last reallocation
        pattern = theirs.peft_config["default"].rank_pattern
        theirs.base_model.rankallocator.mask_using_rank_pattern(theirs.base_model.model, pattern)
        expected = logits(theirs, token_ids())
    theirs.save_pretrained(str(tmp_path))
    ours = MODELS[family]()
    adapter = trimtab.load_adapter(ours, tmp_path)
    assert isinstance(adapter, AdaLoRAAdapter)
    assert torch.allclose(logits(ours, token_ids()), expected, atol=1e-5)
    if steps == 12:
        assert adapter.pattern is not None
        assert min(sum(kept) for kept in adapter.pattern.values()) == 0
        adapter.restarts(2)  # any length will do: the budget has been dealt out
        train(ours, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 3))
        at_work = sum(int(p.count_nonzero()) for n, p in adapter.own().items() if n.endswith("lora_E"))
        assert at_work == sum(map(sum, adapter.pattern.values()))


def test_a_damaged_pattern_is_refused(tmp_path: Path) -> None:
    """A pattern that lacks a layer, or does not go with the tensors, and options of peft that we have not."""
    trained(tiny_llama()).save(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    name = next(name for name, kept in saved["rank_pattern"].items() if not all(kept))
    for change, message in [
        ({"rank_pattern": {k: v for k, v in saved["rank_pattern"].items() if k != name}}, "0 entries"),
        ({"rank_pattern": saved["rank_pattern"] | {name: [True] * 4}}, "rank_pattern keeps 4 of 4"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"exclude_modules": "a.*"}, "exclude_modules"),
        ({"target_modules": None}, "target_modules"),
        ({"init_r": 0}, "init_rank|rank = 0"),
    ]:
        file.write_text(json.dumps(saved | change))
        model = tiny_llama()
        with pytest.raises(trimtab.CheckpointError, match=message):
            trimtab.load_adapter(model, tmp_path)
        assert not trimtab.adapters(model)
    file.write_text(json.dumps({k: v for k, v in saved.items() if k != "total_step"}))
    with pytest.raises(trimtab.CheckpointError, match="lacks total_step"):
        trimtab.load_adapter(tiny_llama(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_merged_and_unmerged_are_one_function(family: str, dtype: torch.dtype) -> None:
    """merge() leaves plain modules that answer as the adapter did, up to the dtype's rounding."""
    model = MODELS[family]()
    adapter = trimtab.attach(model, trimtab.AdaLoRA(**SMALL, alpha=40, total_steps=12), dtype=dtype)
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 13))
    before = logits(model, token_ids()).double()
    assert before.isfinite().all()
    adapter.merge()
    assert {p.dtype for p in model.parameters()} == {dtype}
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert (logits(model, token_ids()).double() - before).norm() < tolerance * before.norm()


def test_the_loop_adds_the_term_once_however_many_micro_batches() -> None:
    """Without a weight there is no term; with one it is that of peft's model at a random start."""
    assert attached(tiny_gpt2(), orthogonality=0.0).extra_loss() is None
    adapter = attached(tiny_gpt2(), orthogonality=0.5)
    extra = adapter.extra_loss()
    assert extra is not None
    rows = [p if n.endswith("lora_A") else p.t() for n, p in adapter.own().items() if not n.endswith("lora_E")]
    norms = [torch.linalg.matrix_norm(v @ v.t() - torch.eye(4)) for v in rows]
    assert torch.allclose(extra, 0.5 * torch.stack(norms).mean())
