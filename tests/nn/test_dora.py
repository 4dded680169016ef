"""DoRA's function: gradients, PEFT's outputs and gradients, what it saves, its norms, and its merge."""

from __future__ import annotations

import copy

import pytest
import torch
from models_for_tests import logits, tiny_llama, token_ids, train
from torch import Tensor, nn

import trimtab
from trimtab.nn.adapted import dress, undress
from trimtab.nn.dora import DoRAMixin, _DoRAFunction, dora_linear, row_norms, row_squares
from trimtab.nn.weights import Dense

WIDE = torch.float64


def parts(transposed: bool = False) -> tuple[Tensor, ...]:
    """x, weight, bias, A, B, m of a layer with 7 inputs and 5 outputs, rank 3."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, a, b, m = (
        torch.randn(shape, generator=generator, dtype=WIDE) for shape in ((6, 7), (5, 7), (5,), (3, 7), (5, 3), (5,))
    )
    return x, weight.t() if transposed else weight, bias, a, b, m


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("train_base", [False, True])
def test_gradcheck(train_base: bool, bias: bool, transposed: bool, dropout: float) -> None:
    """With the norms held, every gradient equals finite differences in float64; they are a constant of the method."""
    x, weight, b, lora_a, lora_b, m = (t.clone().requires_grad_() for t in parts(transposed))
    weight.requires_grad_(train_base)
    norms = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0], dtype=WIDE)  # a row of zeros has no direction: c = 1
    m.requires_grad_()

    def run(x: Tensor, weight: Tensor, b: Tensor, lora_a: Tensor, lora_b: Tensor, m: Tensor) -> Tensor:
        seed = torch.tensor(3) if dropout else None
        base = Dense(transposed=transposed)
        out: Tensor = _DoRAFunction.apply(
            x, weight, b if bias else None, lora_a, lora_b, m, norms, base, 0.7, dropout, seed
        )
        return out

    assert torch.autograd.gradcheck(run, (x, weight, b, lora_a, lora_b, m))


def test_norms_are_those_of_the_sum() -> None:
    """Three skinny products give the row norms of W + s B A, which is never formed."""
    _, weight, _, a, b, _ = parts()
    base = Dense()
    norms = row_norms(base, weight, a, b, 0.7, row_squares(base, weight), WIDE)
    assert torch.allclose(norms, (weight + 0.7 * b @ a).norm(dim=1), rtol=1e-12)
    exact = row_norms(base, weight, a, 0 * b, 0.7, row_squares(base, weight), WIDE)
    assert torch.equal(exact, row_squares(base, weight).sqrt())


def peft_layer(layer: nn.Module, rank: int, dropout: float, alpha: float) -> nn.Module:
    """PEFT's DoRA around a layer, with B and m moved off their start."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["0"], use_dora=True, lora_dropout=dropout, init_lora_weights=False
    )
    made: nn.Module = peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    with torch.no_grad():
        made.lora_magnitude_vector["default"].weight.mul_(1.3)  # type: ignore[index, union-attr]
    return made


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_peft(bias: bool, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, given the same dropout mask: y, and the gradients of x, A, B and m."""
    torch.manual_seed(0)
    plain = nn.Linear(7, 5, bias=bias).to(WIDE)
    theirs = peft_layer(plain, 3, dropout, 6.0).to(WIDE)
    x = torch.randn(2, 6, 7, dtype=WIDE, requires_grad=True)
    mask = torch.empty(12, 7, dtype=WIDE).bernoulli_(1 - dropout) / (1 - dropout)
    if dropout:

        class Fixed(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * mask.view(x.shape)

        theirs.lora_dropout["default"] = Fixed()  # type: ignore[index, operator]
        monkeypatch.setattr("trimtab.nn.dora.dropped", lambda x, p, seed: mask == 0)
    a, b = (getattr(theirs, key)["default"].weight for key in ("lora_A", "lora_B"))
    m = theirs.lora_magnitude_vector["default"].weight  # type: ignore[index, union-attr]
    y = theirs(x)
    g = torch.randn_like(y)
    expected = torch.autograd.grad((y * g).sum(), (x, a, b, m))
    base, weight = Dense(), plain.weight.detach()
    ours = dora_linear(
        x, weight, plain.bias, a, b, m, base=base, scale=2.0, squares=row_squares(base, weight), dropout=dropout
    )
    assert torch.allclose(ours, y, rtol=1e-10, atol=1e-12)
    for ours_, theirs_ in zip(torch.autograd.grad((ours * g).sum(), (x, a, b, m)), expected, strict=True):
        assert torch.allclose(ours_, theirs_, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_qkv_group_saves_its_input_and_two_vectors(dropout: float) -> None:
    """2,048 bytes a token at d = 1024 in bf16, and beside it the norms: 4 bytes an output of a layer."""
    tokens, width = 64, 1024
    x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    base, weight = Dense(), torch.randn(width, width, dtype=torch.bfloat16)
    a, b, m = (torch.randn(s, requires_grad=True) for s in ((16, width), (width, 16), (width,)))
    squares = row_squares(base, weight)
    known = {t.untyped_storage().data_ptr() for t in (weight, a, b, m)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outs = [
            dora_linear(x, weight, None, a, b, m, base=base, scale=1.0, squares=squares, dropout=dropout)
            for _ in range(3)
        ]
    assert all(out.requires_grad for out in outs)
    assert sum(saved.values()) == 2048 * tokens + 3 * 4 * width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_new_layer_changes_no_bit(bias: bool, dtype: torch.dtype) -> None:
    """With B = 0 and m the rows' lengths, c is exactly one, and the layer answers as the plain one, a zero row too."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 16, bias=bias).to(dtype).requires_grad_(False)
    layer.weight[3] = 0
    x = torch.randn(40, 24, dtype=dtype)
    before = layer(x)
    own = {"lora_A": nn.Parameter(torch.randn(4, 24)), "lora_B": nn.Parameter(torch.zeros(16, 4))}
    own["lora_magnitude_vector"] = nn.Parameter(torch.zeros(16))
    dress(layer, DoRAMixin, parameters=own, scale=2.0, dropout=0.0, squares=None)
    layer.set_magnitude()  # type: ignore[operator]
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.effective_weight(), layer.weight.float())  # type: ignore[operator]
    with torch.no_grad():
        own["lora_B"].normal_()
        own["lora_magnitude_vector"].mul_(0.8)
    now = layer(x).double()
    layer.merge_()  # type: ignore[operator]
    undress(layer)
    assert (layer(x).double() - now).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * now.norm()
    assert (now - before.double()).norm() > 0.1 * now.norm()


def test_bf16_results_are_near_float64() -> None:
    """In bf16 with fp32 parameters, outputs and gradients are within bf16's rounding of a float64 oracle."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((50, 256), (192, 256), (8, 256), (192, 8), (192,))
    x, w, a, b, m = (torch.randn(shape, generator=generator) / 16 for shape in shapes)
    x, w = x.bfloat16(), w.bfloat16()
    leaves = [t.requires_grad_() for t in (x, a, b, m)]
    y = dora_linear(x, w, None, a, b, m, base=Dense(), scale=2.0, squares=row_squares(Dense(), w))
    y.float().pow(2).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in leaves]
    v = w.double() + 2.0 * wide[2] @ wide[1]
    truth = wide[0] @ (v * (wide[3] / v.norm(dim=1).detach())[:, None]).t()
    truth.pow(2).sum().backward()
    for ours, exact in zip((y, *(t.grad for t in leaves)), (truth, *(t.grad for t in wide)), strict=True):
        assert ours is not None and exact is not None
        assert (ours.double() - exact).norm() < 0.01 * exact.norm()


def replaced(model: nn.Module, other: nn.Module, how: str) -> None:
    """Let `model` have the base weights of `other`."""
    new, named = other.state_dict(), dict(model.named_parameters())
    if how == "load":
        model.load_state_dict(new, strict=False)
    elif how == "assign":
        model.load_state_dict({k: v.clone() for k, v in new.items()}, strict=False, assign=True)
    for name, value in new.items() if how in ("data", "copy") else ():
        if how == "data":
            named[name].data = value.clone()
        else:
            with torch.no_grad():
                named[name].copy_(value)


@pytest.mark.parametrize("how", ["load", "assign", "data", "copy"])
def test_another_base_has_other_row_norms(how: str) -> None:
    """Whichever way the base is replaced, the layers give what freshly dressed ones give on that base."""
    model, other, ids = tiny_llama(), tiny_llama(seed=1), token_ids()
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4, dora=True))
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 4))
    logits(model, ids)
    state = adapter.state_dict()
    wanted = trimtab.attach(copy.deepcopy(other), trimtab.LoRA(rank=4, dora=True))
    wanted.load_state_dict(state)
    replaced(model, other, how)
    assert torch.equal(logits(model, ids), logits(wanted.model, ids))


@pytest.mark.parametrize("how", ["load", "codes"])
def test_other_codes_have_other_row_norms(how: str) -> None:
    """Of a 4-bit base, too, whose values are codes and scales."""
    models, ids = [tiny_llama(), tiny_llama(seed=1)], token_ids()
    for model in models:
        trimtab.quantize(model, "nf4")
    plain = copy.deepcopy(models[1].state_dict())
    adapters = [trimtab.attach(model, trimtab.LoRA(rank=4, dora=True)) for model in models]
    adapters[1].load_state_dict(adapters[0].state_dict())
    logits(models[0], ids)
    if how == "load":
        models[0].load_state_dict(plain, strict=False)
    else:
        held = {**dict(models[0].named_parameters()), **dict(models[0].named_buffers())}
        for name, value in plain.items():
            held[name].data.copy_(value) if value.dtype.is_floating_point else held[name].copy_(value)
    assert torch.equal(logits(models[0], ids), logits(models[1], ids))
