"""trimtab.quantize: which layers it takes, what it refuses, and what methods do on its result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models_for_tests import MODELS, logits, loss_of, tiny_gpt2, tiny_llama, tiny_t5, token_ids, train
from torch import Tensor, nn

import trimtab
from trimtab.errors import CannotMerge, ConfigError, TargetError
from trimtab.nn import nf4
from trimtab.nn.nf4layer import NF4Linear
from trimtab.nn.weights import is_conv1d

FAMILIES = ["llama", "gpt2", "bert", "t5"]
HEADS = {"llama": "lm_head", "gpt2": "lm_head", "bert": "classifier", "t5": "lm_head"}


def packed(model: nn.Module) -> dict[str, NF4Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def everything(model: nn.Module) -> dict[str, tuple[Tensor, type, bool]]:
    classes = {name: type(module) for name, module in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    return {
        name: (value.clone(), classes[name.rpartition(".")[0]], trained.get(name, False))
        for name, value in model.state_dict().items()
    }


def same(a: dict[str, tuple[Tensor, type, bool]], b: dict[str, tuple[Tensor, type, bool]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n][0], b[n][0]) and a[n][1:] == b[n][1:] for n in a)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_takes_the_linears_of_the_blocks(family: str, double: bool) -> None:
    """All linears but heads and tied ones; the model then computes with the decoded weights, as a plain model would."""
    model, oracle = MODELS[family](), MODELS[family]()
    plain = dict(oracle.named_modules())
    names = trimtab.quantize(model, "nf4", double=double)
    assert names == list(packed(model)) and HEADS[family] not in names
    left = [n for n, m in plain.items() if (type(m) is nn.Linear or is_conv1d(m)) and n not in names]
    assert all(name.startswith((HEADS[family], "bert.pooler")) for name in left), left
    with torch.no_grad():
        for name, layer in packed(model).items():
            value = layer.holder.rows(layer.weight, slice(None))
            own = plain[name].weight
            assert not layer.weight.requires_grad
            assert (value - (own.t() if is_conv1d(plain[name]) else own)).norm() < 0.12 * own.norm()
            own.copy_(value.t() if is_conv1d(plain[name]) else value)
    ids = token_ids()
    torch.testing.assert_close(logits(model, ids), logits(oracle, ids), rtol=1e-4, atol=1e-5)


def test_a_fused_encoder_sees_the_packed_weights() -> None:
    """torch's encoder, whose eval mode reads weights past the layers, computes the same in eval and training mode."""
    model = MODELS["encoder"]()
    trimtab.quantize(model)
    ids = token_ids()
    torch.testing.assert_close(logits(model, ids), model(ids).detach(), rtol=1e-4, atol=1e-5)


def test_skip_takes_name_endings() -> None:
    """Skipped layers stay as they are; an ending that matches nothing lists the closest names."""
    model = tiny_llama()
    names = trimtab.quantize(model, skip=["mlp.down_proj", "layers.0.self_attn.q_proj"])
    assert len(names) == 14 - 2 - 1 and not any(name.endswith("down_proj") for name in names)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def nan(model: nn.Module) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")


def beyond_fp32(model: nn.Module) -> None:
    with torch.no_grad():
        model.double().model.layers[1].mlp.up_proj.weight[0, 0] = 1e300


def in_training(model: nn.Module) -> None:
    loss_of(model, token_ids()).backward()


def frozen_part(model: nn.Module) -> None:
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)


def half_done(model: nn.Module) -> None:
    trimtab.quantize(model)


@pytest.mark.parametrize(
    ("prepare", "options", "error", "says"),
    [
        (None, {"kind": "fp4"}, ConfigError, "kind = 'fp4'.*'nf4'"),
        (None, {"compute_dtype": torch.int8}, ConfigError, "compute_dtype"),
        (None, {"min_kept": 1.5}, ConfigError, "min_kept = 1.5"),
        (None, {"skip": ["q_porj"]}, TargetError, "q_porj.*closest names are.*q_proj"),
        (None, {"skip": "q_proj"}, TargetError, "give a list"),
        (None, {"skip": ["mlp.gate_proj", "proj"]}, TargetError, "'proj' matches no"),
        (nan, {}, ConfigError, "layers.1.mlp.up_proj.weight has an entry that is not finite"),
        (beyond_fp32, {}, ConfigError, r"layers.1.mlp.up_proj.weight .* not finite in fp32 \(1e\+300\).*skip="),
        (in_training, {}, ConfigError, "layers.0.self_attn.q_proj.weight trains .it has a gradient.*zero_grad"),
        (frozen_part, {}, ConfigError, "layers.1.self_attn.q_proj.weight trains while other layers are frozen"),
        (half_done, {}, TargetError, "quantised already"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_stays(
    prepare: Callable[[nn.Module], None] | None,
    options: dict[str, object],
    error: type[Exception],
    says: str,
    tmp_path: Path,
) -> None:
    """Each wrong call is one clear error, and leaves tensors, classes, requires_grad and the disk as they were."""
    model = tiny_llama()
    if prepare is not None:
        prepare(model)
    before = everything(model)
    with pytest.raises(error, match=says):
        trimtab.quantize(model, master=tmp_path / "masters", **options)  # type: ignore[arg-type]
    after = everything(model)
    assert not list(tmp_path.rglob("*.fp32"))
    if prepare is nan:
        name = "model.layers.1.mlp.up_proj.weight"
        assert before.pop(name)[1:] == after.pop(name)[1:]
    assert same(before, after)


@pytest.mark.parametrize("method", [trimtab.LoRA(rank=2), trimtab.Full()])
def test_under_an_adapter_nothing_is_quantised(method: trimtab.Method) -> None:
    """A weight that an adapter stands on or trains is refused; after merge() the model can be quantised."""
    model = tiny_llama()
    adapter = trimtab.attach(model, method)
    before = everything(model)
    with pytest.raises(ConfigError, match="adapter"):
        trimtab.quantize(model)
    assert same(before, everything(model))
    adapter.merge()
    assert len(trimtab.quantize(model)) == 14


@pytest.mark.parametrize("method", [trimtab.Full(), trimtab.LoRA(rank=2, warm_start_steps=3)])
def test_full_training_of_4_bits_is_refused(method: trimtab.Method) -> None:
    """What trains every weight cannot be attached to a quantised model, which stays as it was."""
    model = tiny_llama()
    trimtab.quantize(model)
    before = everything(model)
    with pytest.raises(ConfigError, match="is held in 4 bits and cannot train"):
        trimtab.attach(model, method)
    assert same(before, everything(model))


@pytest.mark.parametrize("master", [None, "host"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dequantising_gives_plain_layers(family: str, master: str | None) -> None:
    """dequantize() leaves a plain model with decoded weights; with masters, the first model, bit for bit."""
    model = MODELS[family]()
    before, ids = everything(model), token_ids()
    names = trimtab.quantize(model, master=master)
    outputs = logits(model, ids)
    assert trimtab.dequantize(model) == names
    after = everything(model)
    assert {n: v[1] for n, v in after.items()} == {n: v[1] for n, v in before.items()}
    if master:
        assert all(torch.equal(after[name][0], value[0]) for name, value in before.items())
    else:
        torch.testing.assert_close(logits(model, ids), outputs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="no quantised layer"):
        trimtab.dequantize(model)


def test_after_training_a_model_can_be_quantised() -> None:
    """A weight whose gradient is gone, or that was frozen since, is taken."""
    for end in (lambda model: model.zero_grad(), lambda model: model.requires_grad_(False)):
        model = tiny_llama()
        in_training(model)
        end(model)
        assert len(trimtab.quantize(model)) == 14


def test_the_largest_weights_of_fp32_have_finite_scales() -> None:
    """The mean of scales is taken even where their sum is beyond fp32."""
    model = nn.Sequential(nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight.sign_().mul_(3e38)
    weight = model[0].weight.detach().clone()
    trimtab.quantize(model, double=True)
    layer = packed(model)["0"]
    torch.testing.assert_close(layer.holder.rows(layer.weight, slice(None)), weight)


def test_a_model_without_linears_is_refused() -> None:
    """Nothing to quantise is an error, not a quiet no."""
    with pytest.raises(TargetError, match="no linear layers"):
        trimtab.quantize(nn.Sequential(nn.LayerNorm(4)))


def test_tied_weights_are_left_alone() -> None:
    """A linear that shares its weight with an embedding is no candidate, whatever its name."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 64)
            self.inner = nn.Linear(64, 64)
            self.out = nn.Linear(64, 10, bias=False)
            self.out.weight = self.embed.weight

    model = Tied()
    assert trimtab.quantize(model) == ["inner"]
    assert model.out.weight is model.embed.weight


def test_a_shadow_model_can_be_quantised() -> None:
    """On the meta device shapes and dtypes are those of the real thing, so that bytes can be counted."""
    with torch.device("meta"):
        shadow = tiny_llama()
    trimtab.quantize(shadow)
    real = tiny_llama()
    trimtab.quantize(real)
    there = {name: (value.shape, value.dtype) for name, value in shadow.state_dict().items()}
    assert there == {name: (value.shape, value.dtype) for name, value in real.state_dict().items()}


def test_t5_keeps_its_activations_dtype() -> None:
    """T5 casts to the dtype of `wo` unless that is int8; the packed weight is int8, so bf16 stays bf16."""
    model = tiny_t5().to(torch.bfloat16)
    trimtab.quantize(model)
    assert logits(model, token_ids()).dtype == torch.bfloat16


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_on_it_and_gives_it_back(family: str, dtype: torch.dtype, double: bool) -> None:
    """QLoRA: f is unchanged at attach, training lowers the loss, only the adapter moves, detach restores every bit."""
    model = MODELS[family]().to(dtype)
    trimtab.quantize(model, double=double)
    before, ids = everything(model), token_ids()
    start = logits(model, ids)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4))
    assert torch.equal(logits(model, ids), start)
    losses = []
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=2e-2))
    for step in range(1, 16):
        loss = loss_of(model, token_ids(seed=3))
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        adapter.after_step(step, optimizer)
    assert losses[-1] < losses[0] - 0.05
    assert {e.name.rpartition(".")[2] for e in adapter.trainable()} == {"lora_A", "lora_B"}
    adapter.detach()
    assert same(before, everything(model))
    assert torch.equal(logits(model, ids), start)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_gives_a_dense_model(family: str) -> None:
    """merge() leaves plain layers of the compute dtype, decoded weight plus s B A rounded once, and the same f."""
    model = MODELS[family]()
    plain = {name: type(module) for name, module in model.named_modules()}
    trimtab.quantize(model)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4))
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 6))
    ids = token_ids()
    before, expected = logits(model, ids), dict(adapter.effective_weights())
    adapter.merge()
    assert {name: type(module) for name, module in model.named_modules()} == plain
    assert (logits(model, ids) - before).norm() <= 1e-5 * before.norm()
    named = dict(model.named_parameters())
    for name, value in expected.items():
        conv = is_conv1d(model.get_submodule(name.removesuffix(".weight")))
        assert named[name].dtype == torch.float32
        assert torch.equal(named[name].t() if conv else named[name], value)


def test_a_quantised_bf16_model_merges_to_bf16() -> None:
    """Merging into 4 bits goes to 16 bits by default."""
    model = tiny_gpt2().to(torch.bfloat16)
    trimtab.quantize(model)
    trimtab.attach(model, trimtab.LoRA(rank=4)).merge()
    assert not packed(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_merging_trained_biases_leaves_plain_layers(family: str) -> None:
    """Biases that train on a 4-bit bf16 base: after merge() the layers have what plain ones have, and no more."""
    model = MODELS[family]().to(torch.bfloat16)
    plain = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
    names = trimtab.quantize(model)
    adapter = trimtab.attach(model, trimtab.BitFit())
    assert any(model.get_submodule(name).bias.dtype == torch.float32 for name in names)
    adapter.merge()
    found = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules() if name in names}
    assert found == {name: plain[name] for name in names}


@pytest.mark.parametrize("where", ["host", "file"])
def test_a_merge_after_loading_other_codes_is_a_merge_into_them(where: str, tmp_path: Path) -> None:
    """load_state_dict of another quantised model, then merge(): the dense weights are the loaded ones."""
    model, other = (tiny_llama() for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5).add_(0.01)
    trimtab.quantize(model, master="host" if where == "host" else tmp_path / "m")
    trimtab.quantize(other)
    model.load_state_dict(other.state_dict())
    expected = logits(other, token_ids())
    trimtab.attach(model, trimtab.LoRA(rank=2)).merge()
    torch.testing.assert_close(logits(model, token_ids()), expected, rtol=1e-4, atol=1e-5)


def test_merging_into_4_bits_is_refused_where_it_would_be_lost() -> None:
    """merge(quantized=True) of a tiny update raises and writes nothing; of a large one it stays in 4 bits."""
    model = tiny_llama()
    trimtab.quantize(model)
    before = everything(model)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4))
    for layer in adapter.layers.values():
        with torch.no_grad():
            layer.lora_B.normal_(std=1e-3)
    packed_before = {name: layer.weight.clone() for name, layer in packed(model).items()}
    with pytest.raises(CannotMerge, match=r"would leave .* % of this merge.*master"):
        adapter.merge(quantized=True)  # type: ignore[call-arg]
    assert all(torch.equal(layer.weight, packed_before[name]) for name, layer in packed(model).items())
    for layer in adapter.layers.values():
        with torch.no_grad():
            layer.lora_B.normal_(std=1.0)
    adapter.merge(quantized=True)  # type: ignore[call-arg]
    assert len(packed(model)) == 14 and before.keys() == everything(model).keys()


def test_a_copy_of_a_quantised_model_with_an_adapter_is_its_own() -> None:
    """deepcopy of model and adapter together: training the copy moves nothing of the original."""
    model = tiny_llama()
    trimtab.quantize(model)
    trimtab.attach(model, trimtab.LoRA(rank=4))
    before, twin = everything(model), copy.deepcopy(model)
    ids = token_ids()
    assert torch.equal(logits(twin, ids), logits(model, ids))
    with torch.no_grad():
        for layer in packed(twin).values():
            layer.holder.write_rows(layer.weight, slice(None), torch.randn(layer.out_features, layer.in_features))
    assert same(before, everything(model))
    assert not torch.equal(logits(twin, ids), logits(model, ids))


def test_master_files_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    """Masters in files: one a layer, 4 bytes a weight; a folder that has them is refused before anything happens."""
    model = tiny_llama()
    sizes = {name: module.weight.numel() for name, module in model.named_modules() if type(module) is nn.Linear}
    names = trimtab.quantize(model, master=tmp_path / "m")
    files = {file.name.removesuffix(".fp32"): file.stat().st_size for file in (tmp_path / "m").iterdir()}
    assert files == {name: 4 * sizes[name] for name in names}
    other = tiny_llama()
    before = everything(other)
    (tmp_path / "m" / f"{names[0]}.fp32").unlink()
    with pytest.raises(ConfigError, match="is there already"):
        trimtab.quantize(other, master=tmp_path / "m")
    assert same(before, everything(other))
    assert not (tmp_path / "m" / f"{names[0]}.fp32").exists()


def test_methods_without_bitsandbytes_give_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model computes the same with plain torch as with bitsandbytes' kernels, bit for bit."""
    model = tiny_llama().to(torch.bfloat16)
    trimtab.quantize(model)
    ids = token_ids()
    with_kernels = logits(model, ids)
    monkeypatch.setattr(nf4, "_kernels", {})
    assert torch.equal(logits(model, ids), with_kernels)
