"""The hand-written VeRA function: gradients, what it saves, its layers' shared pair, compilers and checkpoints."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.bench.meters import live_bytes, saved_bytes
from trimtab.nn.adapted import dress, undress
from trimtab.nn.pairs import Pairs
from trimtab.nn.vera import VeRAMixin, vera_linear
from trimtab.nn.weights import Dense


def parts(dtype: torch.dtype = torch.float64, transposed: bool = False, tokens: int = 6) -> dict[str, Tensor]:
    """A layer of 7 in, 5 out and rank 3; what is trained and the input require gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weight = draw(5, 7)
    values = {"x": draw(tokens, 7), "bias": draw(5), "d": draw(3), "b": draw(5)}
    values = {name: value.requires_grad_() for name, value in values.items()}
    return values | {"weight": weight.t() if transposed else weight, "A": draw(3, 7), "B": draw(5, 3)}


def oracle(p: dict[str, Tensor]) -> Tensor:
    """The equation as the paper has it, in float64, for autograd to differentiate."""
    return F.linear(p["x"], p["weight"], p["bias"]) + p["b"] * F.linear(p["d"] * F.linear(p["x"], p["A"]), p["B"])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [6, 2])
@pytest.mark.parametrize("train_base", [False, True])
def test_gradcheck(transposed: bool, tokens: int, train_base: bool) -> None:
    """Every gradient equals finite differences in float64, with b folded into B or (a few tokens) not."""
    p = parts(transposed=transposed, tokens=tokens)
    p["weight"].requires_grad_(train_base)

    def run(x: Tensor, weight: Tensor, bias: Tensor, d: Tensor, b: Tensor) -> Tensor:
        return vera_linear(x, weight, bias, d, b, p["A"], p["B"], base=Dense(transposed=transposed))

    assert torch.autograd.gradcheck(run, (p["x"], p["weight"], p["bias"], p["d"], p["b"]))
    if not transposed:
        assert torch.allclose(run(p["x"], p["weight"], p["bias"], p["d"], p["b"]), oracle(p), atol=1e-12)


def test_gradcheck_with_dropout() -> None:
    """With the global generator fixed, the regenerated mask makes forward and backward one function."""
    p = parts()

    def run(x: Tensor, d: Tensor, b: Tensor, seed: int = 3) -> Tensor:
        torch.manual_seed(seed)
        return vera_linear(x, p["weight"], None, d, b, p["A"], p["B"], base=Dense(), dropout=0.4)

    assert torch.autograd.gradcheck(run, (p["x"], p["d"], p["b"]))
    assert not torch.equal(run(p["x"], p["d"], p["b"]), run(p["x"], p["d"], p["b"], seed=4))


def test_gradcheck_of_layers_that_share_u() -> None:
    """Three layers on one input, u made once: all gradients are right, x's sum among them."""
    p = parts()
    scales = torch.randn(3, 5, dtype=torch.float64)

    def run(x: Tensor, d: Tensor, b: Tensor) -> Tensor:
        followers: dict[str, set[str]] = {}
        x = x * 1.0
        outs = [
            vera_linear(
                x, p["weight"], None, d * (i + 1), b, p["A"], p["B"], base=Dense(), reader=str(i), followers=followers
            )
            for i in range(3)
        ]
        assert followers == {"0": {"1", "2"}}
        return torch.stack([out * scale for out, scale in zip(outs, scales, strict=True)])

    assert torch.autograd.gradcheck(run, (p["x"], p["d"], p["b"]))


def test_nothing_is_computed_that_nobody_needs() -> None:
    """An input and vectors without gradients get none; there is no second derivative to get wrong."""
    p = parts()
    y = vera_linear(p["x"].detach(), p["weight"], None, p["d"].detach(), p["b"], p["A"], p["B"], base=Dense())
    y.sum().backward()
    assert p["x"].grad is None and p["d"].grad is None and p["b"].grad is not None
    y = vera_linear(p["x"], p["weight"], None, p["d"].detach(), p["b"].detach(), p["A"], p["B"], base=Dense())
    (g,) = torch.autograd.grad(y.square().sum(), p["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@pytest.mark.parametrize("tokens", [4096, 40])
def test_bf16_gradients_are_near_float64(tokens: int) -> None:
    """Output and gradients are within bf16's rounding of an oracle in float64, sums over many tokens too."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (tokens, 256),
        "weight": (192, 256),
        "bias": (192,),
        "d": (64,),
        "b": (192,),
        "A": (64, 256),
        "B": (192, 64),
    }
    p = {name: torch.randn(shape, generator=generator) / 16 for name, shape in shapes.items()}
    p |= {name: p[name].bfloat16() for name in ("x", "weight", "bias", "A", "B")}
    for name in ("x", "d", "b"):
        p[name] = (p[name] + (0.3 if name == "x" else 0)).requires_grad_()
    y = vera_linear(p["x"], p["weight"], p["bias"], p["d"], p["b"], p["A"], p["B"], base=Dense())
    y.float().pow(2).sum().backward()
    wide = {name: value.detach().double().requires_grad_() for name, value in p.items()}
    truth = oracle(wide)
    truth.pow(2).sum().backward()
    assert (y.double() - truth).norm() < 0.005 * truth.norm()
    for name in ("x", "d", "b"):
        ours, exact = p[name].grad, wide[name].grad
        assert ours is not None and exact is not None
        assert (ours.double() - exact).norm() < 0.01 * exact.norm()
        assert ours.dtype == p[name].dtype
    assert y.dtype == torch.bfloat16


def test_autocast_decides_the_dtype() -> None:
    """Under autocast an fp32 input is computed in bf16, as a plain nn.Linear would be."""
    p = parts(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = vera_linear(p["x"], p["weight"], p["bias"], p["d"], p["b"], p["A"], p["B"], base=Dense())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    for name in ("x", "d", "b", "bias"):
        grad = p[name].grad
        assert grad is not None and grad.dtype == torch.float32


class Group(nn.Module):
    """Layers that read one input, adapted as a method does it."""

    def __init__(
        self, outs: tuple[int, ...], width: int, rank: int, dtype: torch.dtype = torch.float32, *, sliced: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(width, out, bias=False, dtype=dtype).requires_grad_(False) for out in outs
        )
        shared = Pairs([(out, width) for out in outs], rank=rank, seed=0, sliced=sliced)
        generator = torch.Generator().manual_seed(1)
        for i, layer in enumerate(self.layers):
            dress(
                layer,
                VeRAMixin,
                parameters={
                    "vera_lambda_d": nn.Parameter(torch.rand(rank, generator=generator)),
                    "vera_lambda_b": nn.Parameter(torch.rand(outs[i], generator=generator)),
                },
                vera_A=shared.get("A", width, torch.device("cpu"), dtype),
                vera_B=shared.get("B", outs[i], torch.device("cpu"), dtype),
                pairs=shared,
                name=str(i),
                dropout=0.0,
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


@pytest.mark.parametrize("outs", [(1024, 1024, 1024), (1024, 256, 256), (1024,)])
@pytest.mark.parametrize("sliced", [False, True])
def test_a_group_saves_u_once(outs: tuple[int, ...], sliced: bool) -> None:
    """512 bytes a token at r = 256 in bf16 for q/k/v at d = 1024, in the first forward as in later ones, and
    with narrower k and v (grouped-query attention) just the same."""
    group = Group(outs, 1024, 256, torch.bfloat16, sliced=sliced)
    tokens = 320
    for _ in range(3):
        x = torch.randn(1, tokens, 1024, dtype=torch.bfloat16, requires_grad=True)
        assert saved_bytes(lambda x=x: group(x)) == 512 * tokens  # type: ignore[misc]


@pytest.mark.parametrize("maker", [F.relu, torch.tanh, torch.sigmoid, lambda x: F.softmax(x, -1)])
def test_an_input_that_is_kept_anyway_costs_no_u(maker: Callable[[Tensor], Tensor]) -> None:
    """What made x keeps x: the layer adds nothing to it, and the gradients are the same to the last bit."""
    layer = Group((24,), 32, 8).layers[0]
    x = torch.randn(2, 50, 4, 8, requires_grad=True)

    def run(known: bool) -> Tensor:
        made = maker(x).transpose(1, 2).transpose(1, 2).reshape(2, 50, 32)
        return layer(made if known else made.clone())

    alone = saved_bytes(lambda: maker(x))
    assert saved_bytes(lambda: run(True)) == alone == 4 * 2 * 50 * 32
    assert saved_bytes(lambda: run(False)) == alone + 4 * 2 * 50 * 8
    grads = []
    for known in (True, False):
        layer.zero_grad()
        x.grad = None
        run(known).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert len(grads[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))  # type: ignore[arg-type]


def test_dropout_saves_a_u_for_each_layer_and_no_mask() -> None:
    """Each layer drops others, so each has its u; neither x nor a mask is kept."""
    group = Group((64, 64, 64), 64, 16)
    for layer in group.layers:
        layer.dropout = 0.1
    x = torch.randn(50, 64, requires_grad=True)
    assert saved_bytes(lambda: group(x)) == 3 * 16 * 4 * 50
    assert not torch.equal(group(x)[0], group(x)[0])
    assert torch.equal(group.eval()(x)[0], group(x)[0])


def test_nothing_wide_is_made_but_the_results() -> None:
    """b and d are folded into the small matrix: forward makes y and u, backward dx and h, each once."""
    tokens, width, rank = 4000, 40, 8
    layer = Group((width,), width, rank).layers[0]
    x, g = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    wide, skinny, small = 4 * tokens * width, 4 * tokens * rank, 5 * 4 * width * rank
    result: list[Tensor] = []
    assert live_bytes(lambda: result.append(layer(x))).above <= wide + skinny + small
    assert live_bytes(lambda: result.pop().backward(g)).above <= wide + skinny + small


def test_one_token_does_not_pay_for_folding() -> None:
    """In generation nothing of the size of B is made."""
    layer = Group((400,), 16, 100).layers[0]
    with torch.no_grad():
        assert live_bytes(lambda: layer(torch.randn(1, 16))).above < 4 * 400 * 100 / 4


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_without_graph_breaks_and_shares_u(dropout: float) -> None:
    """One graph; where nothing is random the same numbers, and common-subexpression elimination shares u."""
    torch._dynamo.reset()
    group = Group((8, 8, 8), 16, 4)
    for layer in group.layers:
        layer.dropout = dropout
    compiled = torch.compile(group, fullgraph=True, backend="aot_eager")
    x = torch.randn(40, 16, requires_grad=True)
    sum(y.square().sum() for y in compiled(F.silu(x))).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in group.parameters() if p.requires_grad)
    if dropout:
        return
    ours, x.grad = x.grad, None
    assert group.layers[0].pairs.followers == {}  # the sharing code did not run
    sum(y.square().sum() for y in group(F.silu(x))).backward()  # type: ignore[union-attr]
    assert torch.allclose(ours, x.grad, atol=1e-6)  # type: ignore[arg-type]
    frozen = [layer.vera_A for layer in group.layers] + [layer.vera_B for layer in group.layers]
    still = torch.randn(40, 16)
    assert saved_bytes(lambda: compiled(still), exclude=[still, *frozen]) == 4 * 4 * 40
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_gives_the_same_gradients(reentrant: bool, dropout: float) -> None:
    """Recomputation finds the same u and the same masks, over several steps, while sharing is being learnt."""
    group = Group((8, 4, 4), 16, 4)
    for layer in group.layers:
        layer.dropout = dropout

    def gradients(checkpointed: bool, step: int) -> list[Tensor]:
        torch.manual_seed(step)
        x = torch.randn(20, 16, requires_grad=True)

        def block(x: Tensor) -> Tensor:
            return torch.cat(group(F.silu(x)), dim=-1)

        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
        group.zero_grad()
        y.square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in group.parameters() if p.grad is not None)]  # type: ignore[list-item]

    for step in range(3):
        plain, other = gradients(False, step), gradients(True, step)
        assert len(plain) == 1 + 6
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_separate_backwards_of_a_group() -> None:
    """Outputs of a group can be differentiated one after the other: no graph is shared, only a value."""
    group = Group((8, 8), 16, 4)
    x = torch.randn(20, 16, requires_grad=True)
    first, second = group(x)
    first.sum().backward()
    second.sum().backward()
    both, x.grad = x.grad, None
    sum(y.sum() for y in group(x)).backward()  # type: ignore[union-attr]
    assert torch.allclose(both, x.grad)  # type: ignore[arg-type]


def test_the_pair_follows_the_model_and_stays_shared() -> None:
    """`.to()` moves each matrix once; a change of dtype rounds what was drawn, not what was rounded before."""
    group = Group((8, 8, 4), 16, 4, torch.bfloat16)
    exact = Group((8, 8, 4), 16, 4)
    for change in (lambda m: m.float(), lambda m: m.bfloat16(), lambda m: m.double()):
        change(group)
        change(exact)
        assert torch.equal(group.layers[0].vera_A, exact.layers[0].vera_A)
        assert len({id(layer.vera_A) for layer in group.layers}) == 1
        assert group.layers[0].vera_B is group.layers[1].vera_B
        assert group(torch.randn(5, 16, dtype=group.layers[0].weight.dtype))[0].isfinite().all()
    group.to("meta")
    assert all(layer.vera_A.is_meta and layer.vera_B.is_meta for layer in group.layers)
    assert group(torch.randn(5, 16, device="meta", dtype=torch.float64))[0].is_meta
    group.to_empty(device="cpu")
    assert torch.equal(group.layers[0].vera_A, exact.layers[0].vera_A)
    assert len({id(layer.vera_A) for layer in group.layers}) == 1


def test_the_pair_is_found_where_the_input_is() -> None:
    """Tensors moved past Module.to (as sharding and offloading do it) still meet A and B on their device."""
    group = Group((8, 8), 16, 4)
    for layer in group.layers:
        for name, parameter in layer._parameters.items():
            layer._parameters[name] = None if parameter is None else nn.Parameter(parameter.to("meta"))
    assert group(torch.randn(5, 16, device="meta"))[1].is_meta
    assert group.layers[0].vera_A is group.layers[1].vera_A


@pytest.mark.parametrize("sliced", [False, True])
def test_copies_carry_a_shared_pair(sliced: bool) -> None:
    """A deep copy and a pickle compute the same, share among their own layers, and come off."""
    group = Group((8, 8, 4), 16, 4, sliced=sliced)
    x = torch.randn(5, 16)
    before = group(x)
    for other in (copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
        assert all(torch.equal(a, b) for a, b in zip(before, other(x), strict=True))
        assert other.layers[0].vera_A is other.layers[2].vera_A
        assert other.layers[0].pairs is other.layers[1].pairs is not group.layers[0].pairs
        other.double()
        assert other.layers[0].vera_A is other.layers[2].vera_A
        undress(other.layers[0])
        assert type(other.layers[0]) is nn.Linear
        assert not set(other.layers[0].__dict__) ^ set(nn.Linear(1, 1).__dict__)


def test_state_dicts_and_wrappers_do_not_see_the_pair() -> None:
    """A and B are no parameters and no buffers: nothing saves, averages, shards or broadcasts them."""
    group = Group((8, 8), 16, 4)
    names = {name.rpartition(".")[2] for name in group.state_dict()}
    assert names == {"weight", "vera_lambda_d", "vera_lambda_b"}
    assert not list(group.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_weight_is_the_layers_function(dtype: torch.dtype) -> None:
    """W + (b B) (d A), with A and B as the forward has them, to float64's precision, also from the meta device."""
    layer = Group((48,), 32, 8, dtype).layers[0]
    d, b = layer.vera_lambda_d.double(), layer.vera_lambda_b.double()
    exact = layer.weight.double() + (b[:, None] * layer.vera_B.double()) @ (d[:, None] * layer.vera_A.double())
    assert torch.equal(layer.effective_weight(), exact.float())
    assert torch.equal(layer.merged(layer.weight), exact.to(dtype))
    weight = layer.weight.detach().clone()
    layer.vera_A, layer.vera_B = layer.vera_A.to("meta"), layer.vera_B.to("meta")
    assert torch.equal(layer.merged(weight), exact.to(dtype))
