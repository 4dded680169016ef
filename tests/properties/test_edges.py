"""What goes wrong at the edges: copies, casts, nested switching, shared folders, damaged states."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from models_for_tests import logits, loss_of, tiny_gpt2, tiny_llama, token_ids
from test_several import ALL, UNMERGEABLE, same, trained

import trimtab

ALSO = trimtab.LoRA(rank=4, train_also=("norms",))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("config", ALL | UNMERGEABLE)
def test_a_copy_of_a_model_merges_and_detaches_by_itself(config: str, how: str) -> None:
    """A copied model has a copied adapter: it ends as the original would, which stays as it is."""
    model = tiny_gpt2()
    before = copy.deepcopy(model)
    trained(model, (ALL | UNMERGEABLE)[config], keep_base="host")
    out = logits(model, token_ids())
    for end in ("detach", "merge"):
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        adapter = trimtab.adapters(twin)["default"]
        if end == "merge" and adapter.no_merge:
            continue
        getattr(adapter, end)()
        assert not trimtab.adapters(twin)
        if end == "detach":
            assert same(twin, before)
        else:
            assert torch.allclose(logits(twin, token_ids()), out, atol=1e-4)
        assert torch.equal(logits(model, token_ids()), out)


def test_two_models_may_share_a_folder_for_their_bases(tmp_path: Path) -> None:
    """Each keeps its copies apart, and leaves alone what somebody else has there."""
    (tmp_path / "model.norm.weight.safetensors").write_text("mine")
    models = [tiny_llama(seed=seed) for seed in (0, 1)]
    befores = copy.deepcopy(models)
    adapters = [trained(model, trimtab.Full(), keep_base=tmp_path) for model in models]
    for model, before, adapter in zip(models, befores, adapters, strict=True):
        adapter.detach()
        assert same(model, before)
    assert [path.name for path in tmp_path.iterdir()] == ["model.norm.weight.safetensors"]


@pytest.mark.parametrize("spoil", ["gone", "other"])
def test_a_spoilt_copy_is_noticed_before_anything_changes(spoil: str, tmp_path: Path) -> None:
    """A kept file that is gone or another one: disabled and detach refuse, and the adapter goes on."""
    model = tiny_llama()
    adapter = trained(model, ALSO, keep_base=tmp_path)
    out, file = logits(model, token_ids()), sorted(tmp_path.rglob("*.safetensors"))[-1]
    if spoil == "gone":
        file.unlink()
    else:
        file.write_bytes(sorted(tmp_path.rglob("*.safetensors"))[0].read_bytes()[:-4] + b"abcd")
    with pytest.raises(trimtab.CheckpointError, match="keep_base"), adapter.disabled():
        pass
    with pytest.raises(trimtab.CheckpointError, match="keep_base"):
        adapter.detach()
    assert torch.equal(logits(model, token_ids()), out)


def test_nested_disabling_shows_the_base_to_the_end_of_the_outer_one() -> None:
    """Whoever disables within disabled() gets the base, and gives the base back."""
    model = tiny_llama()
    base = logits(model, token_ids())
    adapter = trained(model, ALSO, keep_base="host")
    out = logits(model, token_ids())
    with adapter.disabled():
        with adapter.disabled():
            assert torch.equal(logits(model, token_ids()), base)
        assert torch.equal(logits(model, token_ids()), base)
    assert torch.equal(logits(model, token_ids()), out)


def test_what_is_done_inside_disabled_stays_done() -> None:
    """Another adapter made active, or this one detached: leaving the context does not undo it."""
    model = tiny_llama()
    before = copy.deepcopy(model)
    one, two = (trained(model, trimtab.LoRA(rank=4, seed=n), name=str(n)) for n in (1, 2))
    outs = [logits(model, token_ids())]
    with one.disabled():
        assert torch.equal(logits(model, token_ids()), logits(before, token_ids()))
        trimtab.activate(model, "1")
        outs.append(logits(model, token_ids()))
    assert not torch.equal(*outs)
    assert torch.equal(logits(model, token_ids()), outs[1])
    with one.disabled():
        one.detach()
        two.detach()
    assert same(model, before)


@pytest.mark.parametrize("also", [(), ("norms",)])
def test_a_state_and_a_file_of_an_adapter_that_is_off(also: tuple[str, ...], tmp_path: Path) -> None:
    """Off the model, state_dict, load_state_dict and save still speak of what was trained."""
    model = tiny_llama()
    adapter = trained(model, trimtab.LoRA(rank=4, train_also=also), keep_base="host")  # type: ignore[arg-type]
    state, out = copy.deepcopy(adapter.state_dict()), logits(model, token_ids())
    trimtab.activate(model, None)
    now = adapter.state_dict()
    assert all(torch.equal(now.tensors[name], tensor) for name, tensor in state.tensors.items())
    adapter.save(tmp_path)
    other = tiny_llama()
    trimtab.load_adapter(other, tmp_path)
    assert torch.equal(logits(other, token_ids()), out)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.tensors.items()}
    adapter.load_state_dict(type(state)(zeros, state.meta))
    adapter.load_state_dict(state)
    with pytest.raises(ValueError, match="not at work"):
        adapter.after_step(9, torch.optim.AdamW(adapter.parameter_groups(lr=1.0)))
    trimtab.activate(model, "default")
    assert torch.equal(logits(model, token_ids()), out)


def test_writing_into_a_base_that_is_shown_does_not_reach_the_copy() -> None:
    """An optimizer's step in the wrong moment spoils nothing that detach gives back."""
    model = tiny_llama()
    before = copy.deepcopy(model)
    adapter = trained(model, ALSO, keep_base="host")
    optimizer = torch.optim.SGD(adapter.parameter_groups(lr=1.0))
    loss_of(model, token_ids()).backward()
    with adapter.disabled():
        optimizer.step()
    adapter.detach()
    assert same(model, before)


@pytest.mark.parametrize("cast", [torch.float32, torch.float16])
def test_a_cast_that_a_carry_does_not_survive_is_said(cast: torch.dtype) -> None:
    """The carry of a bf16 weight says nothing of an fp32 or fp16 one: merge refuses, and writes nothing."""
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4), dtype=torch.bfloat16)
    model.to(cast)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(trimtab.CannotMerge, match=f"cast to {cast}.*cast it back"):
        adapter.merge()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    model.to(torch.bfloat16)
    adapter.merge()


def test_unmerge_refuses_a_base_that_moved_on() -> None:
    """Another adapter was merged meanwhile: taking the first merge back would lose it."""
    model = tiny_llama()
    first = trained(model, trimtab.LoRA(rank=4), keep_base="host")
    first.merge()
    trained(model, trimtab.LoRA(rank=4)).merge()
    with pytest.raises(trimtab.CannotDetach, match="since the merge"):
        first.unmerge()


def test_a_closed_adapter_says_so() -> None:
    """After merge there is nothing to save and no state to take."""
    adapter = trained(tiny_llama(), trimtab.LoRA(rank=4))
    adapter.merge()
    for call in (adapter.state_dict, lambda: adapter.save("nowhere"), adapter.detach):
        with pytest.raises(ValueError, match="was merged"):
            call()


def test_a_damaged_state_changes_nothing() -> None:
    """Wrong shapes, unknown carries and missing counters are refused before anything is written."""
    model = tiny_llama()
    adapter = trained(model, trimtab.ReLoRA(rank=4, restart_every=3), dtype=torch.bfloat16)
    state = adapter.state_dict()
    name = next(name for name in state.tensors if name.endswith("lora_B"))
    carry = next(name for name in state.tensors if name.startswith("carry:"))
    out = logits(model, token_ids())
    for tensors, meta, said in (
        ({name: torch.ones(1, 4)}, {}, f"{name} is \\(1, 4\\)"),
        ({carry: torch.ones(2, 2, dtype=torch.int16)}, {}, "carry:.* is \\(2, 2\\)"),
        ({"carry:nope.weight": torch.ones(2, 2)}, {}, "carry of nope.weight"),
        ({}, {"last_step": None}, "last_step"),
    ):
        with pytest.raises(trimtab.CheckpointError, match=said):
            adapter.load_state_dict(type(state)(state.tensors | tensors, state.meta | meta))
    with pytest.raises(trimtab.CheckpointError, match="restarts"):
        adapter.load_state_dict(type(state)(state.tensors, {"last_step": 3, "adapted": True}))
    assert torch.equal(logits(model, token_ids()), out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": ""}, "name=''"),
        ({"dtype": torch.int32}, "dtype=torch.int32"),
        ({"dtype": "bf16"}, "dtype='bf16'"),
        ({"keep_base": True}, "keep_base=True"),
        ({"keep_base": "Host"}, "keep_base='Host'"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: dict[str, object], said: str) -> None:
    """One line names the argument and its value, and the model is as it was."""
    model = tiny_llama()
    before = copy.deepcopy(model)
    with pytest.raises(trimtab.ConfigError, match=said):
        trimtab.attach(model, trimtab.LoRA(rank=4), **arguments)  # type: ignore[arg-type]
    assert same(model, before)


def test_what_is_no_model_or_no_config_is_refused() -> None:
    """A name instead of a model, a class instead of a config."""
    with pytest.raises(trimtab.ConfigError, match="'gpt2'"):
        trimtab.attach("gpt2", trimtab.LoRA(rank=4))  # type: ignore[arg-type]
    with pytest.raises(trimtab.ConfigError, match=r"LoRA\(\)"):
        trimtab.attach(tiny_llama(), trimtab.LoRA)  # type: ignore[arg-type]
    with pytest.raises(trimtab.ConfigError, match="'gpt2'"):
        trimtab.quantize("gpt2")  # type: ignore[arg-type]
    with pytest.raises(trimtab.ConfigError, match=r"'a': 0\.7"):
        trimtab.combine(tiny_llama(), ["a"], name="sum")  # type: ignore[arg-type]


def test_an_optimizer_of_before_is_noticed_at_the_first_step() -> None:
    """Built before attach, it holds none of what trains, and nothing would ever move."""
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4))
    with pytest.raises(trimtab.ConfigError, match="parameter_groups"):
        adapter.after_step(1, optimizer)
    with pytest.raises(trimtab.ConfigError, match="no torch optimizer"):
        adapter.after_step(1, None)  # type: ignore[arg-type]
    adapter.after_step(1, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)))


def test_a_peft_model_is_refused() -> None:
    """An adapter on peft's own layers would adapt its A and B."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(trimtab.ConfigError, match="Restarts"):
        trimtab.attach(model, trimtab.LoRA(rank=4))


@pytest.mark.parametrize(
    ("made", "cast"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("config", ["lora", "also", "vera", "nf4"])
def test_a_merge_keeps_a_cast_of_after_attach(config: str, made: torch.dtype, cast: torch.dtype) -> None:
    """A model that was cast while it had an adapter is of the new dtype after merge, all of it, and after unmerge."""
    model = tiny_llama().to(made)
    if config == "nf4":
        trimtab.quantize(model)
    method = {"also": trimtab.LoRA(rank=4, train_also=("norms", "head")), "vera": trimtab.VeRA(rank=8)}
    adapter = trained(model, method.get(config, trimtab.LoRA(rank=4)), keep_base="host")
    model.to(cast)
    model.model.rotary_emb.float()
    out = logits(model, token_ids())
    adapter.merge()
    assert {p.dtype for p in model.parameters()} == {cast}
    merged = logits(model, token_ids())
    torch.testing.assert_close(
        merged.float(), out.float(), atol=0.1 if torch.bfloat16 in (made, cast) else 0.02, rtol=0.1
    )
    adapter.unmerge()
    torch.testing.assert_close(logits(model, token_ids()).float(), out.float(), atol=2e-2, rtol=2e-2)
    adapter.merge()
    assert torch.equal(logits(model, token_ids()), merged)


def test_a_merge_ends_in_the_compute_dtype_without_a_cast() -> None:
    """What trained in fp32 beside a bf16 base is rounded to bf16, wherever the model went meanwhile."""
    model = tiny_llama()
    adapter = trained(model, ALSO, dtype=torch.bfloat16)
    model.to("cpu")
    adapter.merge()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
