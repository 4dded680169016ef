"""The hand-written LoRA function: gradients, dropout from a seed, what it saves, and autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.nn.dropping import dropped, gain
from trimtab.nn.lowrank import _LoRAFunction, lora_linear
from trimtab.nn.precision import _CastLinearFunction
from trimtab.nn.weights import Dense


def parts(
    dtype: torch.dtype = torch.float64, transposed: bool = False, tokens: int = 6
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    weight = draw(5, 7)
    return draw(tokens, 7), (weight.t() if transposed else weight).detach(), draw(5), draw(3, 7), draw(5, 3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("train_base", [False, True])
def test_gradcheck(transposed: bool, bias: bool, train_base: bool) -> None:
    """Every gradient of the function equals finite differences in float64."""
    x, weight, b, lora_a, lora_b = parts(transposed=transposed)
    weight = weight.clone().requires_grad_(train_base)

    def run(x: Tensor, weight: Tensor, b: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        base = Dense(transposed=transposed)
        return lora_linear(x, weight, b if bias else None, lora_a, lora_b, base=base, scale=0.7)

    assert torch.autograd.gradcheck(run, (x, weight, b, lora_a, lora_b))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck_with_dropout(transposed: bool) -> None:
    """With the global generator fixed, the regenerated mask makes forward and backward one function."""
    x, weight, b, lora_a, lora_b = parts(transposed=transposed)

    def run(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        torch.manual_seed(3)
        base = Dense(transposed=transposed)
        return lora_linear(x, weight, b, lora_a, lora_b, base=base, scale=0.7, dropout=0.4)

    assert torch.autograd.gradcheck(run, (x, lora_a, lora_b))
    torch.manual_seed(4)
    other = lora_linear(x, weight, b, lora_a, lora_b, base=Dense(transposed=transposed), scale=0.7, dropout=0.4)
    assert not torch.equal(other, run(x, lora_a, lora_b))


def test_gradcheck_of_the_cast_linear() -> None:
    """The linear layer of a held weight, with and without a bias."""
    x, weight, b, _, _ = parts()
    assert torch.autograd.gradcheck(_CastLinearFunction.apply, (x, weight.clone().requires_grad_(), b))
    assert torch.autograd.gradcheck(_CastLinearFunction.apply, (x, weight.clone().requires_grad_(), None))


def test_a_mask_drops_its_share_and_keeps_the_mean() -> None:
    """A mask has the wanted share of dropped entries, what is kept makes up for them, and the seed alone decides."""
    x = torch.zeros(401, 251)  # no multiple of the four entries that share a draw
    mask = dropped(x, 0.3, torch.tensor(5))
    assert mask.shape == x.shape
    for part in (mask, mask[:, ::2], mask[::3], mask[-40:]):
        assert part.double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert (1 - mask.double().mean().item()) * gain(0.3) == pytest.approx(1.0, abs=0.01)
    assert gain(0.3) == pytest.approx(1 / 0.7, rel=1e-4)
    assert torch.equal(mask, dropped(x, 0.3, torch.tensor(5)))
    assert not torch.equal(mask, dropped(x, 0.3, torch.tensor(6)))
    assert not dropped(x, 0.0, torch.tensor(5)).any() and gain(0.0) == 1.0


def test_neighbours_fall_independently() -> None:
    """The four entries of one draw are as independent as any others."""
    mask = dropped(torch.zeros(100_000, 4), 0.5, torch.tensor(1)).double() - 0.5
    covariance = mask.t() @ mask / mask.shape[0]
    assert torch.allclose(covariance, 0.25 * torch.eye(4, dtype=torch.float64), atol=0.005)


def saved_bytes_per_token(dropout: float, tokens: int = 64, width: int = 1024) -> float:
    """Bytes that a q/k/v group keeps for its backward, parameters left out, tensors shared counted once."""
    x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    layers = [
        (torch.randn(width, width, dtype=torch.bfloat16), torch.randn(16, width), torch.randn(width, 16))
        for _ in range(3)
    ]
    for _, lora_a, lora_b in layers:
        lora_a.requires_grad_()
        lora_b.requires_grad_()
    known = {t.untyped_storage().data_ptr() for layer in layers for t in layer}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outs = [lora_linear(x, w, None, a, b, base=Dense(), scale=1.0, dropout=dropout) for w, a, b in layers]
    assert all(out.requires_grad for out in outs)
    return sum(saved.values()) / tokens


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_qkv_group_saves_its_input_alone(dropout: float) -> None:
    """2,048 bytes a token at d = 1024 in bf16: x once, no mask, nothing of rank or output width."""
    assert saved_bytes_per_token(dropout) == 2048


def test_no_output_wide_temporary_in_the_low_rank_part() -> None:
    """s is folded into the small matrix and the product is added into y: one output-wide tensor is made."""
    x, weight, b, lora_a, lora_b = parts(torch.float32, tokens=1000)
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape == (1000, 5):
                made.append(out.untyped_storage().data_ptr())
            return out

    with torch.no_grad(), Watch():
        lora_linear(x, weight, b, lora_a, lora_b, base=Dense(), scale=0.5)
    assert len(set(made)) == 1


def test_bf16_results_are_near_float64() -> None:
    """In bf16 with fp32 adapters, output and gradients are within bf16's rounding of a float64 oracle."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (50, 256), "w": (192, 256), "a": (8, 256), "b": (192, 8)}
    draws = {key: torch.randn(shape, generator=generator) / 16 for key, shape in shapes.items()}
    x, w = draws["x"].bfloat16().requires_grad_(), draws["w"].bfloat16()
    lora_a, lora_b = draws["a"].requires_grad_(), draws["b"].requires_grad_()
    y = lora_linear(x, w, None, lora_a, lora_b, base=Dense(), scale=2.0)
    y.float().pow(2).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (x, lora_a, lora_b)]
    truth = F.linear(wide[0], w.double()) + 2.0 * wide[0] @ wide[1].t() @ wide[2].t()
    truth.pow(2).sum().backward()
    for ours, exact in zip((y, x.grad, lora_a.grad, lora_b.grad), (truth, *(t.grad for t in wide)), strict=True):
        assert ours is not None and exact is not None
        assert (ours.double() - exact).norm() < 0.01 * exact.norm()
    assert y.dtype == x.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert lora_a.grad.dtype == lora_b.grad.dtype == torch.float32  # type: ignore[union-attr]


def test_autocast_decides_the_dtype() -> None:
    """Under autocast an fp32 input is computed in bf16, as a plain nn.Linear would be."""
    x, weight, b, lora_a, lora_b = parts(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, weight, b, lora_a, lora_b, base=Dense(), scale=1.0)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert lora_b.grad is not None and lora_b.grad.dtype == torch.float32


def test_nothing_is_computed_that_nobody_needs() -> None:
    """An input without gradient gets none, and frozen factors get none."""
    x, weight, b, lora_a, lora_b = parts()
    y = lora_linear(x.detach(), weight, b.detach(), lora_a.detach(), lora_b, base=Dense(), scale=1.0)
    assert isinstance(y.grad_fn, torch.autograd.graph.Node)
    y.sum().backward()
    assert x.grad is None and lora_a.grad is None and lora_b.grad is not None
    alone = _LoRAFunction.apply(x.detach(), weight, None, lora_a.detach(), lora_b.detach(), Dense(), 1.0, 0.0, None)
    assert alone.shape == (6, 5) and not alone.requires_grad
