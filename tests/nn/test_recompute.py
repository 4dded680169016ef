"""Selective recomputation: the same numbers, less kept, and nothing mistaken for something else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import MODELS, loss_of, tiny_llama, token_ids
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trimtab
from trimtab.bench.meters import live_bytes
from trimtab.nn import recompute
from trimtab.nn.dropping import gain
from trimtab.nn.recompute import recomputing

NOTHING = nn.Module()


@pytest.fixture(autouse=True)
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of these tests are smaller than what is worth it."""
    monkeypatch.setattr(recompute, "_SMALL", 0)


def drawn(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_(grad)


def kept_by(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[int, list[Tensor]]:
    """Bytes that the graph of a function holds beyond its inputs and its result, and the gradients."""
    with recomputing(NOTHING):
        held: list[Tensor] = []
        kept = live_bytes(lambda: held.append(function(*tensors)))
    result = held.pop()
    grads = torch.autograd.grad(result.sum(), [t for t in tensors if t.requires_grad])
    return kept.after - kept.before - result.untyped_storage().nbytes(), list(grads)


def plain(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(function(*tensors).sum(), [t for t in tensors if t.requires_grad]))


WIDE = 64 * 128 * 4  # bytes of an fp32 tensor of the cases below


def norm_of(x: Tensor) -> Tensor:
    """RMSNorm as models write it: through fp32."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return wide.to(x.dtype)


CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {
    "a gelu": (lambda x, w: F.gelu(x) @ w, (drawn(64, 128), drawn(128, 4)), 0),
    "a product of two": (lambda x, y, w: (F.silu(x) * y) @ w, (drawn(64, 128), drawn(64, 128), drawn(128, 4)), 0),
    "a gelu, written out": (
        lambda x, w: (0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.04 * torch.pow(x, 3.0))))) @ w,
        (drawn(64, 128), drawn(128, 4)),
        WIDE,  # tanh keeps its result itself
    ),
    "a gelu in another shape": (
        lambda x, w: (F.silu(F.gelu(x).view(32, 256)[:, 128:]) * 2.0) @ w,
        (drawn(64, 128), drawn(128, 4)),
        0,
    ),
    "a gelu in other bits": (
        lambda x, w: (F.gelu(x).view(torch.int32).view(torch.float32) * F.silu(x)) @ w,
        (drawn(64, 128), drawn(128, 4)),
        2 * WIDE,
    ),
    "a layer norm": (lambda x, w: F.layer_norm(x, (128,)) @ w, (drawn(64, 128), drawn(128, 4)), 2 * 64 * 4),
    "a norm through fp32": (
        lambda x, w: norm_of(x) @ w,
        (drawn(64, 128).detach().bfloat16().requires_grad_(), drawn(128, 4).detach().bfloat16().requires_grad_()),
        4 * 64 * 4,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_kept_that_can_be_computed_again(case: str) -> None:
    """Beyond the inputs and small statistics a row the graph holds nothing, and its gradients are the same."""
    function, tensors, allowed = CASES[case]
    kept, grads = kept_by(function, *tensors)
    expected = plain(function, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert kept <= allowed


@pytest.mark.parametrize(
    ("family", "dropout", "share"),
    [("llama", 0.0, 0.72), ("gpt2", 0.0, 0.6), ("bert", 0.0, 0.76), ("bert", 0.1, 0.35), ("t5", 0.0, 0.86)],
)
def test_the_graph_of_a_model_is_smaller(family: str, dropout: float, share: float) -> None:
    """What is left: inputs of norms and activations, queries, keys, values, and what attention gives."""
    kept = []
    for within in (False, True):
        model = MODELS[family]()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        trimtab.attach(model, {"name": "lora", "rank": 2})
        model.train()
        ids, losses = token_ids(rows=16, length=32), []
        with recomputing(model) if within else nullcontext():
            found = live_bytes(lambda model=model, ids=ids, losses=losses: losses.append(loss_of(model, ids)))
        kept.append(found.after - found.before)
    assert kept[1] < share * kept[0]


def test_a_storage_at_the_address_of_another_is_not_taken_for_it() -> None:
    """A result that was freed leaves an address that the next tensor of its size may get."""
    x, weight = drawn(64, 128), drawn(64, 128, seed=1)
    with recomputing(NOTHING):
        total = torch.zeros(())
        others = []
        for seed in range(50):
            F.gelu(x).detach()
            other = drawn(64, 128, seed=seed, grad=False)
            total = total + (weight * other).sum()
            others.append(other.clone())
            del other
    (grad,) = torch.autograd.grad(total, [weight])
    torch.testing.assert_close(grad, sum(others, torch.zeros(64, 128)))


def test_what_comes_of_something_that_is_gone_is_kept_itself() -> None:
    """The product of the matrices is held by nobody when its double is needed."""
    tensors = (drawn(8, 16), drawn(16, 4))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return (2.0 * (x @ w)).sin()

    assert all(map(torch.equal, kept_by(function, *tensors)[1], plain(function, *tensors)))


def test_the_smaller_one_is_kept() -> None:
    """A bf16 copy of an fp32 tensor that is alive, but that nothing else needs."""
    x = drawn(64, 128)
    with recomputing(NOTHING):
        wide = x + 1.0
        results: list[Tensor] = []
        kept = live_bytes(lambda wide=wide: results.append(wide.to(torch.bfloat16).sin()))
        del wide
    assert kept.after - kept.before == WIDE  # the copy and its sine, half as wide each
    assert live_bytes(results.clear).after < kept.after - WIDE


def test_a_result_that_is_changed_in_place_is_kept_as_it_is_then() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = F.gelu(x)
        y.add_(1.0)
        return y @ w

    tensors = (drawn(8, 16), drawn(16, 4))
    assert all(
        torch.equal(a, b) for a, b in zip(kept_by(function, *tensors)[1], plain(function, *tensors), strict=True)
    )


@pytest.mark.parametrize("of", ["what is kept", "what a recipe starts from"])
def test_a_change_in_place_after_the_forward_pass_is_an_error(of: str) -> None:
    """Autograd checks this itself, but not of tensors that went through hooks."""
    x, w = drawn(8, 16), drawn(16, 4)
    with recomputing(NOTHING):
        start = x * 1.0
        result = start.sin() if of == "what is kept" else F.gelu(start) @ w
        start.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        result.sum().backward()


def test_backward_twice_and_gradients_of_gradients() -> None:
    x, w = drawn(6, 8).double().detach().requires_grad_(), drawn(8, 3).double().detach().requires_grad_()

    def function(x: Tensor, w: Tensor) -> Tensor:
        with recomputing(NOTHING):
            return (F.gelu(x) * F.layer_norm(x, (8,))) @ w

    result = function(x, w).sum()
    first = torch.autograd.grad(result, [x, w], retain_graph=True)
    second = torch.autograd.grad(result, [x, w])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.autograd.gradgradcheck(function, (x, w))


def test_a_result_for_several_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key and value read the same norm: the backward pass computes it once, and again for another."""
    runs = []
    computed = recompute._Recipe.value
    monkeypatch.setattr(recompute._Recipe, "value", lambda recipe: runs.append(recipe.function) or computed(recipe))
    x, weights = drawn(8, 16), [drawn(16, 4, seed=s) for s in range(3)]
    with recomputing(NOTHING):
        y = F.gelu(x)
        result = torch.stack([(y @ w).sum() for w in weights]).sum()
        del y
    result.backward(retain_graph=True)
    assert runs == [F.gelu]
    result.backward()
    assert set(runs) == {F.gelu}


def test_no_recipe_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A square of a square, and so on: its recipe from the start would compute each part once more than the last."""
    runs = []
    computed = recompute._Recipe.value
    monkeypatch.setattr(recompute._Recipe, "value", lambda recipe: runs.append(recipe.function) or computed(recipe))
    x = drawn(64, 128)

    def function(x: Tensor) -> Tensor:
        for _ in range(20):
            x = (0.5 * x) * (0.5 * x)
        return x

    with recomputing(NOTHING):
        result = function(x)
    (grad,) = torch.autograd.grad(result.sum(), [x])
    assert torch.equal(grad, plain(function, x)[0])
    assert len(runs) < 40 * recompute._OPERATIONS


def test_no_recipe_under_autocast() -> None:
    """Functions may compute otherwise in the forward pass there than they would in the backward pass."""
    tensors = CASES["a gelu"][1]
    with torch.autocast("cpu", torch.bfloat16):
        kept, grads = kept_by(lambda x, w: F.gelu(x).sin() @ w, *tensors)
    assert kept >= WIDE
    assert all(grad is not None for grad in grads)


def test_dropout_keeps_no_mask_and_its_gradient_falls_where_it_fell() -> None:
    torch.manual_seed(0)
    x = drawn(400, 500)
    with recomputing(NOTHING):
        held: list[Tensor] = []
        kept = live_bytes(lambda: held.append(F.dropout(x, 0.3, training=True)))
    (y,) = held
    assert kept.after - kept.before < y.untyped_storage().nbytes() + 64
    (grad,) = torch.autograd.grad(y.sum(), [x])
    fell = y == 0.0
    assert torch.equal(grad == 0.0, fell)
    torch.testing.assert_close(y[~fell], x[~fell] * gain(0.3))
    assert abs(fell.float().mean().item() - 0.3) < 0.005  # 200,000 draws: five standard deviations
    with recomputing(NOTHING):
        assert not torch.equal(F.dropout(x, 0.3, training=True) == 0.0, fell)


def test_what_does_not_go_with_it_is_refused() -> None:
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    with pytest.raises(trimtab.ConfigError, match="does not go with activation checkpointing"), recomputing(model):
        pass
    model.gradient_checkpointing_disable()
    with (
        pytest.raises(trimtab.ConfigError, match="does not go with a compiled model"),
        recomputing(torch.compile(model)),
    ):  # type: ignore[arg-type]
        pass
    model.compile()
    with pytest.raises(trimtab.ConfigError, match="does not go with a compiled model"), recomputing(model):
        pass


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_with_dropout_recipes_change_no_gradient(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same dropout with everything kept, and against differences of the loss in fp64."""
    model = MODELS[family]().double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
        for name in ("attention_dropout", "dropout"):  # what some attention reads of itself
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.2)
    adapter = trimtab.attach(model, {"name": "lora", "rank": 3, "dropout": 0.1})
    model.train()
    trained = [entry.parameter for entry in adapter.trainable()]
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(0.1 * drawn(*parameter.shape, grad=False))

    def loss() -> Tensor:
        torch.manual_seed(5)
        with recomputing(model):
            return loss_of(model, token_ids())

    grads = torch.autograd.grad(loss(), trained)
    with monkeypatch.context() as patch:
        patch.setattr(recompute._Memory, "pack", lambda memory, tensor: recompute._Kept(tensor))
        kept = torch.autograd.grad(loss(), trained)
    assert all(map(torch.equal, grads, kept))
    steps = [drawn(*parameter.shape, seed=9, grad=False).to(parameter.dtype) for parameter in trained]
    slope = sum((grad * step).sum() for grad, step in zip(grads, steps, strict=True))
    ends = []
    with torch.no_grad():
        for sign in (1.0, -2.0):
            for parameter, step in zip(trained, steps, strict=True):
                parameter.add_(step, alpha=sign * 1e-5)
            with torch.enable_grad():
                ends.append(loss().detach().double())
    # The loss is in fp32, whose last digit over this step is 0.02; a step ten times as long sees curvature.
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, torch.as_tensor(slope).double(), rtol=0.05, atol=0.05)


# -- what goes on around it --------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A block that torch's own activation checkpointing runs again."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.linear, self.reentrant = nn.Linear(16, 16), reentrant

    def inner(self, x: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(*[x.view(2, 2, 4, 16)] * 3, dropout_p=0.5).view(16, 16)
        return F.silu(F.dropout(self.linear(F.gelu(attended)), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return result


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_under_checkpoint_draws_the_same_dropout_twice(reentrant: bool, inside: bool) -> None:
    """Its own hooks are in force in the forward pass, and the second pass may be outside the context."""
    torch.manual_seed(0)
    block, x = Checkpointed(reentrant), drawn(16, 16)

    def gradients(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return torch.autograd.grad(function(x).sum(), [x, *block.parameters()])

    def grads_of(loss: Tensor) -> list[Tensor]:
        block.zero_grad()
        x.grad = None
        torch.autograd.backward(loss)
        assert x.grad is not None
        return [x.grad, *(p.grad.clone() for p in block.parameters() if p.grad is not None)]

    expected = gradients(block.inner)
    torch.manual_seed(1)
    with recomputing(block):
        loss = block(x).sum()
        if inside:
            found = grads_of(loss)
    found = found if inside else grads_of(loss)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_tensor_that_was_given_other_memory_is_not_taken_for_what_it_was() -> None:
    x, w = drawn(8, 16), drawn(16, 4)

    def function(x: Tensor, w: Tensor) -> Tensor:
        half = (x @ w).bfloat16()
        wide = half.float()
        half.data = torch.zeros_like(half)
        return wide.sin()

    assert all(map(torch.equal, kept_by(function, x, w)[1], plain(function, x, w)))


def test_a_context_of_many_steps_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_NOTES", 50)
    memories: list[recompute._Memory] = []
    made = recompute._Memory.__init__
    monkeypatch.setattr(recompute._Memory, "__init__", lambda memory: (memories.append(memory), made(memory))[1])
    x, w = drawn(8, 16), drawn(16, 16)
    with recomputing(NOTHING):
        for _ in range(300):
            y = x
            for _ in range(3):
                y = (F.silu(y @ w) * y) @ w
            grads = torch.autograd.grad(y.sum(), [x, w])
    (memory,) = memories
    assert len(memory.notes) < 150
    assert len(memory.held) < 150
    y = x
    for _ in range(3):
        y = (F.silu(y @ w) * y) @ w
    assert all(map(torch.equal, grads, torch.autograd.grad(y.sum(), [x, w])))


@pytest.mark.parametrize("p", [1e-6, 0.999999])
def test_a_dropout_that_is_hardly_one_is_torchs(p: float) -> None:
    x = drawn(64, 128)
    torch.manual_seed(0)
    expected = F.dropout(x, p, training=True)
    torch.manual_seed(0)
    with recomputing(NOTHING):
        assert torch.equal(F.dropout(x, p, training=True), expected)


def test_tensors_of_inference_and_nested_ones() -> None:
    with torch.inference_mode():
        fixed = torch.ones(8, 16)
    x = drawn(8, 16)
    with recomputing(NOTHING):
        result = F.gelu(x + fixed[:1]).sum()
        rows = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]).requires_grad_()
        F.gelu(rows)
    result.backward()
    assert x.grad is not None


def test_small_results_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_SMALL", WIDE + 1)
    function, tensors, _ = CASES["a gelu"]
    assert kept_by(function, *tensors)[0] == WIDE


def test_a_context_in_a_context() -> None:
    function, tensors, allowed = CASES["a product of two"]
    with recomputing(NOTHING):
        kept, grads = kept_by(function, *tensors)
    assert kept <= allowed
    assert all(map(torch.equal, grads, plain(function, *tensors)))
