"""LoRA's settings: what each does on a model, what does not go together, and what restarts allow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from models_for_tests import MODELS, logits, tiny_bert, tiny_gpt2, tiny_llama, token_ids, train
from torch import Tensor, nn

import trimtab
from trimtab.config import OptimConfig
from trimtab.methods.lora import LoRAAdapter
from trimtab.train.memory import phase_row, predict_phases

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: Starts that change the function within rounding.
NEAR = {
    "pissa": trimtab.LoRA(rank=4, alpha=4, init="pissa"),
    "pissa-dora": trimtab.LoRA(rank=4, alpha=3, init="pissa", dora=True),
    "orthogonal": trimtab.LoRA(rank=4, init="orthogonal"),
}


def attached(model: nn.Module, config: trimtab.LoRA, **settings: object) -> LoRAAdapter:
    adapter = trimtab.attach(model, config, **settings)  # type: ignore[arg-type]
    assert isinstance(adapter, LoRAAdapter)
    return adapter


def same(a: nn.Module, b: nn.Module) -> bool:
    now, then = a.state_dict(), b.state_dict()
    return list(now) == list(then) and all(torch.equal(now[k], then[k]) and now[k].dtype == then[k].dtype for k in now)


def optimizer_of(adapter: trimtab.Adapter) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", NEAR)
@pytest.mark.parametrize("family", MODELS)
def test_a_start_within_rounding(family: str, config: str, dtype: str) -> None:
    """In fp32 the function stays within 1e-6; in bf16 it is as far from float64 as before, within a factor of two.

    Trained and detached without keep_base, the base is back bit for bit: PiSSA keeps what it replaced.
    """
    model = MODELS[family]().to(DTYPES[dtype])
    before, ids = copy.deepcopy(model), token_ids()
    exact, base = logits(copy.deepcopy(model).double(), ids), logits(model, ids).double()
    adapter = attached(model, NEAR[config])
    now = logits(model, ids).double()
    if dtype == "fp32":
        assert (now - base).norm() < 1e-6 * base.norm()
    else:
        assert (now - exact).norm() < 2 * (base - exact).norm()
    train(model, adapter, optimizer_of(adapter), range(1, 4))
    assert (logits(model, ids).double() - base).norm() > 0.05 * base.norm()
    with adapter.disabled():
        assert torch.equal(logits(model, ids).double(), base)
    adapter.detach()
    assert same(model, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pissa_moves_the_largest_components(dtype: str) -> None:
    """W keeps the components after the r-th, s B A has the others, and the sum is what W was (carry included)."""
    model = tiny_llama().to(DTYPES[dtype])
    before = {name: p.detach().double() for name, p in copy.deepcopy(model).named_parameters()}
    adapter = attached(model, trimtab.LoRA(rank=4, alpha=2, init="pissa"))
    for name, value in adapter.effective_weights():
        weight = before[name]
        assert (value.double() - weight).abs().max() < 2.0**-22 * weight.abs().max()
        left = torch.linalg.svdvals(dict(model.named_parameters())[name].double())
        spectrum = torch.linalg.svdvals(weight)
        assert torch.allclose(left[: len(spectrum) - 4], spectrum[4:], rtol=0.02)
    ids = token_ids()
    plain = logits(tiny_llama().to(DTYPES[dtype]), ids)
    adapter.merge()
    assert torch.allclose(logits(model, ids).float(), plain.float(), atol=1e-5 if dtype == "fp32" else 0.0)


def test_pissa_of_a_narrowed_model_gives_its_own_bits_back_or_says_why_not() -> None:
    """With dtype=bf16 on an fp32 model the embeddings are narrowed, so detach refuses; with keep_base it does not."""
    adapter = attached(tiny_llama(), NEAR["pissa"], dtype=torch.bfloat16)
    with pytest.raises(trimtab.CannotDetach, match="fewer bits"):
        adapter.detach()
    model = tiny_llama()
    before = copy.deepcopy(model)
    adapter = attached(model, NEAR["pissa"], dtype=torch.bfloat16, keep_base="host")
    train(model, adapter, optimizer_of(adapter), range(1, 3))
    adapter.detach()
    assert same(model, before)


def test_pissa_of_a_broken_weight_is_refused_before_anything_changes() -> None:
    """A weight with a NaN has no singular values; the model stays as it was, and free."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(trimtab.ConfigError, match="has no singular values"):
        attached(model, NEAR["pissa"])
    assert all(torch.equal(v, before[k]) or "down_proj" in k for k, v in model.state_dict().items())
    attached(model, trimtab.LoRA(rank=4)).detach()


@pytest.mark.parametrize("dora", [False, True])
def test_pissa_whose_base_cannot_be_kept_leaves_the_model_free(dora: bool, tmp_path: Path) -> None:
    """A folder that cannot be made stops it before a layer is adapted, and another adapter can come."""
    (tmp_path / "file").write_text("")
    model = tiny_llama()
    before, ids = copy.deepcopy(model), token_ids()
    with pytest.raises(trimtab.CheckpointError, match=r"keep_base.* cannot be written"):
        attached(model, trimtab.LoRA(rank=4, init="pissa", dora=dora), keep_base=tmp_path / "file" / "folder")
    assert same(model, before) and [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert not trimtab.adapters(model) and all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model, ids), logits(before, ids))
    attached(model, NEAR["pissa"], keep_base=tmp_path / "folder").detach()
    assert same(model, before)


def test_dora_trains_one_length_a_row() -> None:
    """The lengths start as the rows' norms, train, and are what the merged rows have."""
    model = tiny_gpt2()
    weight = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    adapter = attached(model, trimtab.LoRA(rank=4, dora=True))
    m = adapter.own()["transformer.h.0.attn.c_attn.lora_magnitude_vector"]
    assert torch.allclose(m, weight.norm(dim=0))
    train(model, adapter, optimizer_of(adapter), range(1, 4))
    assert not torch.allclose(m, weight.norm(dim=0), rtol=1e-3)
    lengths = m.detach().clone()
    adapter.merge()
    assert torch.allclose(model.transformer.h[0].attn.c_attn.weight.norm(dim=0), lengths, rtol=1e-5)
    assert trimtab.LoRA(dora=True).update_rank is None


def groups_by_name(adapter: trimtab.Adapter) -> dict[str, dict[str, object]]:
    return {group["group"]: group for group in adapter.parameter_groups(lr=1e-3, weight_decay=0.1)}


def test_lora_plus_groups() -> None:
    """Five groups as ever and `adapter_fast`, whose rate is the ratio times higher; embeddings stay slow."""
    adapter = attached(tiny_llama(), trimtab.LoRA(rank=4, lora_plus=8, targets=["q_proj", "embed_tokens"]))
    groups = groups_by_name(adapter)
    assert list(groups) == ["adapter", "embedding", "norm", "head", "base", "adapter_fast"]
    fast, slow = groups["adapter_fast"], groups["adapter"]
    assert fast["lr"] == 8e-3 and fast["lr_ratio"] == 8 and fast["weight_decay"] == 0.1
    assert slow["lr"] == 1e-3 and "lr_ratio" not in slow
    assert all(name.endswith("q_proj.lora_B") for name in fast["names"]) and len(fast["names"]) == 2  # type: ignore[arg-type, attr-defined]
    assert {name.rpartition(".")[2] for name in slow["names"]} == {"lora_A", "lora_embedding_A", "lora_embedding_B"}  # type: ignore[attr-defined]
    both = [id(p) for group in groups.values() for p in group["params"]]  # type: ignore[attr-defined]
    assert sorted(both) == sorted(id(entry.parameter) for entry in adapter.trainable())
    dora = groups_by_name(attached(tiny_llama(), trimtab.LoRA(rank=4, lora_plus=2, dora=True)))["adapter_fast"]
    assert {name.rpartition(".")[2] for name in dora["names"]} == {"lora_B", "lora_magnitude_vector"}  # type: ignore[attr-defined]


def test_the_end_of_a_warm_start_fills_the_fast_group() -> None:
    """B is put into its group in place; an optimizer without that group is refused."""
    config = trimtab.LoRA(rank=4, lora_plus=4, warm_start_steps=2)
    model = tiny_llama()
    adapter = attached(model, config)
    optimizer = optimizer_of(adapter)
    fast = optimizer.param_groups[5]
    assert fast["group"] == "adapter_fast" and not fast["params"]
    train(model, adapter, optimizer, range(1, 5))
    assert len(fast["params"]) == 14 == len(optimizer.param_groups[0]["params"])
    assert all(name.endswith(".lora_B") for name in fast["names"]) and fast["lr"] == 4e-2
    adapter = attached(tiny_llama(), config)
    with pytest.raises(trimtab.ConfigError, match="parameter_groups"):
        adapter.after_step(2, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)[:5]))


@pytest.mark.parametrize(("bias", "count"), [("all", 2 * 6 + 2 + 2 + 2 + 2), ("lora_only", 2)])
def test_biases_train_beside_the_adapter(bias: str, count: int) -> None:
    """ "lora_only": those of the adapted layers; "all": every one of the model. The base changes, so detach refuses."""
    model = tiny_bert()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = trimtab.LoRA(rank=2, bias=bias, targets=["attention.self.query"])  # type: ignore[arg-type]
    adapter = attached(model, config)
    wanted = [n for n in before if n.endswith(".bias") and (bias == "all" or "self.query" in n)]
    own = adapter.own()
    assert [entry.name for entry in adapter.trainable() if entry.name not in own] == wanted
    assert len(wanted) == (count if bias == "lora_only" else sum(n.endswith(".bias") for n in before))
    train(model, adapter, optimizer_of(adapter), range(1, 4))
    moved = [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert set(moved) <= set(wanted) and len(moved) > len(wanted) // 2
    with pytest.raises(trimtab.CannotDetach, match=f"bias='{bias}'"):
        adapter.detach()
    with pytest.raises(trimtab.ConfigError, match=f"bias='{bias}'"):
        trimtab.attach(model, trimtab.LoRA(rank=2), name="second")


def test_patterns_give_layers_their_own_rank_and_alpha() -> None:
    """A pattern is for the end of a name, the first that matches counts, and the scale follows both."""
    config = trimtab.LoRA(
        rank=8,
        alpha=16,
        rank_pattern={r"layers\.1\..*q_proj": 2, "q_proj": 4},
        alpha_pattern={"up_proj": 1.0, "self_attn.q_proj": 32},
    )
    layers = attached(tiny_llama(), config).layers
    ranks = {name: len(layer.lora_A) for name, layer in layers.items()}
    scales = {name: layer.scale for name, layer in layers.items()}
    first, second = (f"model.layers.{n}.self_attn.q_proj" for n in (0, 1))
    assert (ranks[first], ranks[second]) == (4, 2) and (scales[first], scales[second]) == (8.0, 16.0)
    assert ranks["model.layers.0.mlp.up_proj"] == 8 and scales["model.layers.0.mlp.up_proj"] == 1 / 8
    assert scales["model.layers.0.mlp.down_proj"] == 2.0 and config.update_rank == 8
    assert trimtab.LoRA(rank=2, rank_pattern={"q_proj": 9}).update_rank == 9
    root = attached(tiny_llama(), config.model_copy(update={"rslora": True})).layers
    assert root[first].scale == 16.0


@pytest.mark.parametrize("method", [trimtab.LoRA, partial(trimtab.ReLoRA, restart_every=2)])
def test_configs_are_hashable(method: Callable[..., trimtab.LoRA]) -> None:
    """Equal ones, patterns in another order among them, have one hash."""
    patterns = {"q_proj": 2, "k_proj": 4}
    a, b = method(rank_pattern=patterns), method(rank_pattern=dict(reversed(patterns.items())))
    assert a == b and hash(a) == hash(b) and len({a, b, method(), method(alpha_pattern={"q": 1.0})}) == 3


EMBED = ("embed_tokens", "q_proj")

WRONG = {
    "rank_pattern = {'q_proj': 33} is above the size": trimtab.LoRA(rank=4, rank_pattern={"q_proj": 33}),
    "rank_pattern: 'nope' decides about no": trimtab.LoRA(rank=4, rank_pattern={"nope": 2}),
    "rank_pattern: 'layers.0.*q_proj' decides": trimtab.LoRA(rank=4, rank_pattern={"q_proj": 2, "layers.0.*q_proj": 3}),
    "alpha_pattern: '_proj.' decides about no": trimtab.LoRA(rank=4, alpha_pattern={"_proj.": 2.0}),
    "the rank of model.layers.0.* is odd: 3": trimtab.LoRA(rank=3, init="orthogonal"),
    "is odd: 5": trimtab.LoRA(rank=4, init="orthogonal", rank_pattern={"k_proj": 5}),
    "dora = True is for linear layers": trimtab.LoRA(rank=4, dora=True, targets=EMBED),
    "init = 'pissa' is for linear layers": trimtab.LoRA(rank=4, init="pissa", targets=EMBED),
    "init = 'orthogonal' is for linear layers": trimtab.LoRA(rank=4, init="orthogonal", targets=EMBED),
    "trains model.embed_tokens.weight in full": trimtab.LoRA(rank=4, targets=EMBED, train_also=("embeddings",)),
    "bias = 'all': there is no such bias in Llama": trimtab.LoRA(rank=4, bias="all"),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_the_model_is_refused_before_anything_changes(message: str) -> None:
    """One line that names the setting; the model is as it was, and free."""
    model = tiny_llama()
    before, ids = copy.deepcopy(model), token_ids()
    with pytest.raises((trimtab.ConfigError, trimtab.TargetError), match=message) as said:
        trimtab.attach(model, WRONG[message])
    assert "\n" not in str(said.value)
    assert same(model, before) and {type(m) for m in model.modules()} == {type(m) for m in before.modules()}
    assert torch.equal(logits(model, ids), logits(before, ids)) and not trimtab.adapters(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"(q": 4}}, r"LoRA: rank_pattern = .*'\(q' is not a regular expression"),
        ({"rank_pattern": {"q": 0}}, "LoRA: rank_pattern = 0: input should be greater"),
        ({"alpha_pattern": {"q": -1.0}}, "LoRA: alpha_pattern = -1.0: input should be greater"),
        ({"lora_plus": 0.5}, "LoRA: lora_plus = 0.5: input should be greater"),
        ({"init": "olora"}, "LoRA: init = 'olora'"),
        ({"bias": "some"}, "LoRA: bias = 'some'"),
    ],
)
def test_a_wrong_setting_is_one_line(settings: dict[str, object], message: str) -> None:
    """Before any model is there."""
    with pytest.raises(trimtab.ConfigError, match=message) as said:
        trimtab.LoRA(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("settings", "message"), [({"dora": True}, "the lengths of DoRA"), ({"init": "pissa"}, "again")]
)
def test_restarts_refuse_what_has_no_sum(settings: dict[str, object], message: str) -> None:
    """ReLoRA takes neither DoRA nor PiSSA, and says why."""
    with pytest.raises(trimtab.ConfigError, match=f"ReLoRA: {next(iter(settings))} = .*{message}"):
        trimtab.ReLoRA(restart_every=2, **settings)  # type: ignore[arg-type]


RESTARTED = {
    "rslora": {"rslora": True},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3.0}},
    "plus": {"lora_plus": 4.0},
    "embedding": {"targets": ("embed_tokens", "q_proj"), "train_also": ("norms",)},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", RESTARTED)
def test_restarts_keep_the_sum_with_these_settings(settings: str, dtype: str) -> None:
    """W + carry + s B A is the same before and after a restart, B A starts at zero again, and B learns at once."""
    model = tiny_llama().to(DTYPES[dtype])
    config = trimtab.ReLoRA(rank=4, alpha=8, restart_every=4, **RESTARTED[settings])  # type: ignore[arg-type]
    adapter = attached(model, config)
    optimizer = optimizer_of(adapter)
    train(model, adapter, optimizer, range(1, 4))
    wide: dict[str, Tensor] = {}

    def remember(*_: object) -> None:
        wide.update({name: value.clone() for name, value in adapter.effective_weights()})

    optimizer.register_step_post_hook(remember)
    train(model, adapter, optimizer, range(4, 5))
    assert adapter._meta()["restarts"] == 1
    for name, value in adapter.effective_weights():
        assert (value - wide[name]).abs().max() <= 2.0**-15 * wide[name].abs().max(), name
    for name, layer in adapter.layers.items():
        a, b = (getattr(layer, part) for part in layer.parts)
        assert not (b.double() @ a.double()).any(), name
        assert not any(p in optimizer.state for p in (a, b))
    train(model, adapter, optimizer, range(5, 9))
    assert all(getattr(layer, layer.starts_at_zero).abs().sum() == 0 for layer in adapter.layers.values()) == (
        settings != "orthogonal"
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("config", ["dora", *NEAR])
def test_a_tensor_merged_from_outside_is_that_of_merge(config: str, family: str) -> None:
    """merged_tensor takes values of the base as it came, PiSSA's too, and gives what merge writes."""
    base, model = MODELS[family](), MODELS[family]()
    adapter = attached(model, NEAR.get(config, trimtab.LoRA(rank=4, dora=True)))
    train(model, adapter, optimizer_of(adapter), range(1, 4))
    found = {name: adapter.merged_tensor(name, p.detach()) for name, p in base.named_parameters()}
    adapter.merge()
    for name, value in model.named_parameters():
        assert torch.allclose(found[name], value, atol=1e-6), name
    moved = [name for name, p in base.named_parameters() if not torch.allclose(found[name], p, atol=1e-4)]
    assert len(moved) >= 8


SHADOWED = NEAR | {
    "dora": trimtab.LoRA(rank=4, dora=True, lora_plus=2),
    "embedding": trimtab.LoRA(rank=4, targets=("embed_tokens", "q_proj"), rank_pattern={"q_proj": 2}),
    "warm": trimtab.LoRA(rank=4, dora=True, init="pissa", warm_start_steps=2),
}


@pytest.mark.parametrize("config", SHADOWED)
def test_memory_is_foretold(config: str) -> None:
    """The row that a shadow on the meta device gives is the row of the real model."""
    optim = OptimConfig()
    shadow = predict_phases(tiny_llama(), SHADOWED[config], optim, dtype=torch.bfloat16, pure=False)
    model = tiny_llama()
    adapter = attached(model, SHADOWED[config], dtype=torch.bfloat16)
    rows = []
    if switch := SHADOWED[config].switch_step:
        rows.append(phase_row(adapter, optim, "warm start", 0))
        train(model, adapter, optimizer_of(adapter), range(1, switch + 1))
    rows.append(phase_row(adapter, optim, "adapter" if switch else "training", switch))
    assert shadow == rows
