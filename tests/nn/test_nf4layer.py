"""The NF4 layer: what it computes, what it survives, and how it becomes a plain layer again."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab.errors import CheckpointError, ConfigError
from trimtab.nn import nf4, nf4layer
from trimtab.nn.nf4layer import NF4Linear
from trimtab.nn.packing import dequantize_layer, new_master, pack
from trimtab.nn.precision import hold
from trimtab.nn.weights import holder_of, shape_of

IN, OUT = 200, 96


def layer(
    *, double: bool = False, conv: bool = False, bias: bool = True, seed: int = 0, **options: object
) -> nn.Module:
    torch.manual_seed(seed)
    module = Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT, bias=bias)
    if conv:
        nn.init.normal_(module.weight, std=0.3)
        nn.init.normal_(module.bias)
    pack(module, double=double, **options)  # type: ignore[arg-type]
    return module


def dense(module: NF4Linear, dtype: torch.dtype = torch.float32) -> Tensor:
    return nf4.dequantize(module.weight, module.scales(), module.in_features, dtype, plain=True)


@pytest.mark.parametrize("small_pieces", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("conv", [False, True])
def test_it_computes_with_the_decoded_weight(
    double: bool, conv: bool, dtype: torch.dtype, small_pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients are those of a linear layer with the decoded weight, however small the pieces."""
    if small_pieces:
        monkeypatch.setattr(nf4layer, "_PIECE_CPU", 70 * OUT)
    module = layer(double=double, conv=conv)
    assert isinstance(module, NF4Linear) and isinstance(module, nn.Linear)
    x = torch.randn(2, 5, IN).to(dtype).requires_grad_()
    g = torch.randn(2, 5, OUT).to(dtype)
    y = module(x)
    y.backward(g)
    weight = dense(module, dtype)
    expected = F.linear(x, weight, module.bias.to(dtype))
    assert y.dtype == dtype and torch.equal(y, expected)
    flat = g.reshape(-1, OUT)
    torch.testing.assert_close(x.grad.reshape(-1, IN), flat @ weight)
    torch.testing.assert_close(module.bias.grad, flat.sum(0, dtype=torch.float32), rtol=1e-2, atol=1e-2)
    assert module.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [(192, 96), (4096, 11008)])
def test_a_piece_may_be_one_block_of_columns(
    size: tuple[int, int], double: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The input's gradient is right where a piece of columns is one block wide, as the last of 4096 x 11008 is."""
    columns, rows = size
    if columns == 192:
        monkeypatch.setattr(nf4layer, "_PIECE_CPU", nf4.BLOCK * rows)
    module = nn.Linear(columns, rows, bias=False)
    pack(module, double=double)
    pieces = list(nf4layer._pieces(columns, rows, nf4.BLOCK, torch.device("cpu")))
    assert len(pieces) > 1 and pieces[-1].stop - pieces[-1].start == nf4.BLOCK
    g = torch.randn(3, rows).to(dtype)
    found, expected = module.holder.grad_input(module.weight, g), g @ dense(module, dtype)
    assert (found - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.abs().max()


@pytest.mark.parametrize("double", [False, True])
def test_gradcheck(double: bool) -> None:
    """The hand-written backward is the derivative, in float64."""
    module = layer(double=double)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(OUT, dtype=torch.float64, requires_grad=True)
    function = nf4layer._NF4Function.apply
    assert torch.autograd.gradcheck(lambda x, b: function(x, module.weight, b, module.holder), (x, bias))


def test_the_backward_keeps_no_dense_weight() -> None:
    """Between forward and backward nothing is kept but the packed weight, which is there anyway."""
    module = layer(double=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        module(torch.randn(4, IN, requires_grad=True))
    assert [t.data_ptr() for t in saved] == [module.weight.data_ptr()]


def test_a_compute_dtype_holds_whatever_the_input_is() -> None:
    """With compute=bf16 an fp32 input is multiplied in bf16, and the output is fp32 again."""
    module = layer(compute=torch.bfloat16, bias=False)
    x = torch.randn(4, IN)
    assert torch.equal(module(x), F.linear(x.bfloat16(), dense(module, torch.bfloat16)).float())
    assert module.compute_dtype == torch.bfloat16


def test_autocast_is_obeyed() -> None:
    """Under autocast the layer computes in its dtype, like nn.Linear."""
    module = layer(bias=False)
    x = torch.randn(4, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert torch.equal(y, F.linear(x.bfloat16(), dense(module, torch.bfloat16)))


@pytest.mark.parametrize("double", [False, True])
def test_casts_leave_codes_and_scales_alone(double: bool) -> None:
    """`.half()`, `.to(bf16)` and `.double()` of a model change biases, not one bit of a quantised weight."""
    module = layer(double=double)
    before = {name: value.clone() for name, value in module.state_dict().items() if name != "bias"}
    model = nn.Sequential(module)
    model.half().to(torch.bfloat16)
    assert module.bias.dtype == module.compute_dtype == torch.bfloat16
    after = module.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert model.double()(torch.randn(2, IN, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("double", [False, True])
def test_all_there_is_travels_in_the_state(double: bool) -> None:
    """A state dict, a copy and a pickle give the same outputs; the copy's holder reads the copy's scales."""
    module = layer(double=double)
    x = torch.randn(4, IN)
    other = layer(double=double, seed=1)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict())
    copied, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for twin in (other, copied, pickled):
        assert torch.equal(twin(x), module(x))
        assert twin.holder.layer is twin and twin.holder is not module.holder
    expected = {"weight", "bias"} | ({"absmax_codes", "absmax_scale", "absmax_offset"} if double else {"absmax"})
    assert set(module.state_dict()) == expected


def test_names_and_shapes() -> None:
    """The packed weight is int8 with half a byte an entry; shape_of and holder_of know the layer."""
    module = layer(conv=True)
    assert module.weight.dtype == torch.int8 and tuple(module.weight.shape) == (OUT, nf4.padded(IN) // 2)
    assert not module.weight.requires_grad
    assert shape_of(module) == (OUT, IN) and holder_of(module) is module.holder
    assert "bits a weight" in repr(module)


@pytest.mark.parametrize("conv", [False, True])
def test_it_becomes_a_plain_layer_and_back(conv: bool) -> None:
    """dequantize_layer gives the plain class and layout back; undoing it restores every bit."""
    module = layer(double=True, conv=conv)
    x = torch.randn(4, IN)
    y, values = module(x), dense(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    undo = dequantize_layer(module, torch.bfloat16)
    assert type(module) is (Conv1D if conv else nn.Linear)
    assert torch.equal(module.weight.t() if conv else module.weight, values.bfloat16())
    assert set(module.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(module.float()(x), y, rtol=0.02, atol=0.02)
    undo()
    assert isinstance(module, NF4Linear) and torch.equal(module(x), y)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("conv", [False, True])
def test_widening_a_held_layer_leaves_nothing_behind(conv: bool) -> None:
    """A layer whose bias trains in fp32 widens to a plain one without a trace; undone, it is held again."""
    module = layer(conv=conv).to(torch.bfloat16)
    plain = (Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT)).__dict__.keys()
    module.bias.data = module.bias.data.float()
    hold(module, torch.bfloat16)
    x = torch.randn(4, IN, dtype=torch.bfloat16)
    y, kind = module(x), type(module)
    undo = dequantize_layer(module)
    assert type(module) is (Conv1D if conv else nn.Linear) and module.__dict__.keys() == plain
    undo()
    assert type(module) is kind and module.trimtab_dtype == torch.bfloat16 and torch.equal(module(x), y)


def test_folding_happens_before_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fold` sees float64 rows, block by block, and what it returns is rounded once."""
    monkeypatch.setattr(nf4layer, "MERGE_CHUNK", 7 * IN)
    module = layer()
    values = dense(module).double()
    delta = 1e-3 * torch.randn(OUT, IN, dtype=torch.float64)
    dequantize_layer(module, torch.bfloat16, fold=lambda rows, block: rows + delta[block])
    assert torch.equal(module.weight, (values + delta).bfloat16())


@pytest.mark.parametrize("double", [False, True])
def test_written_rows_are_quantised_and_others_stay(double: bool) -> None:
    """write_rows stores the codes of the new rows with the offset of the first time; other rows keep their bits."""
    module = layer(double=double)
    holder = module.holder
    offset = module.absmax_offset.clone() if double else None
    before = holder.rows(module.weight, slice(None))
    value = torch.randn(10, IN)
    holder.write_rows(module.weight, slice(20, 30), value)
    after = holder.rows(module.weight, slice(None))
    changed = torch.zeros(OUT, dtype=torch.bool)
    changed[20:30] = True
    assert torch.equal(after[~changed], before[~changed])
    packed, absmax = nf4.quantize(value)
    assert torch.equal(module.weight[20:30].view(torch.uint8), packed)
    if double:
        assert torch.equal(module.absmax_offset, offset)
        absmax = nf4.dequantize_scales(*nf4.quantize_scales(absmax, offset), offset)
    assert torch.equal(after[20:30], nf4.dequantize(packed, absmax, IN, torch.float32))


@pytest.mark.parametrize("where", ["host", "file"])
def test_a_master_is_what_the_weight_stands_for(where: str, tmp_path: Path) -> None:
    """rows() gives the master, exactly; small writes add up in it and the codes are its nearest."""
    torch.manual_seed(0)
    module = nn.Linear(IN, OUT).to(torch.bfloat16)
    start = module.weight.detach().clone()
    place = "host" if where == "host" else tmp_path / "masters"
    pack(module, double=True, master=new_master(place, "a.b", (OUT, IN)))
    holder, whole = module.holder, slice(None)
    assert torch.equal(holder.rows(module.weight, whole), start.float())
    step = 1e-4 * torch.randn(OUT, IN)
    total = start.double()
    for _ in range(50):
        holder.write_rows(module.weight, whole, holder.rows(module.weight, whole).double() + step.double())
        total += step.double()
    kept = holder.rows(module.weight, whole)
    assert ((kept.double() - total).abs() <= 2.0**-15 * start.double().abs().maximum(total.abs())).all()
    packed, _ = nf4.quantize(kept)
    assert torch.equal(module.weight.view(torch.uint8), packed)
    change = float(step.square().sum())
    assert not holder.lossy
    assert holder.survival(module.weight, whole, kept + step) == pytest.approx((change, change), rel=1e-2)
    if where == "file":
        stored = torch.from_file(str(tmp_path / "masters" / "a.b.fp32"), size=OUT * IN, dtype=torch.float32)
        assert torch.equal(stored.view(OUT, IN), kept)
        with pytest.raises(ConfigError, match=r"a\.b\.fp32 is there already"):
            new_master(place, "a.b", (OUT, IN))


def test_a_merge_without_a_master_says_what_is_left_of_it() -> None:
    """The surviving share is that of the written weight: little of a small update, nearly all of a large one."""
    shares = []
    for size in (0.01, 0.3):
        module = layer()
        holder, whole = module.holder, slice(None)
        before = holder.rows(module.weight, whole)
        delta = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
        delta *= size * before.norm() / delta.norm()
        kept, total = holder.survival(module.weight, whole, before + delta)
        holder.write_rows(module.weight, whole, before + delta)
        left = holder.rows(module.weight, whole) - before
        assert kept == pytest.approx(float((left.double() * delta.double()).sum()), rel=1e-3, abs=1e-3)
        shares.append(kept / total)
    assert shares[0] < 0.1 and shares[1] > 0.9


def test_a_stored_master_goes_only_where_there_is_one() -> None:
    """Loading a state with a master into a layer without one, or the other way round, is an error, not a wrong sum."""
    bare, full = layer(), layer(master=new_master("host", "x", (OUT, IN)))
    assert bare.holder.carry is None
    with pytest.raises(CheckpointError, match="quantised without one"):
        bare.holder.carry = full.holder.carry
    with pytest.raises(CheckpointError, match="stored master is"):
        full.holder.carry = torch.zeros(3, 3)
    replacement = torch.randn(OUT, IN)
    master = full.holder.carry
    full.holder.carry = None
    with pytest.raises(CheckpointError, match="no master"):
        full.holder.rows(full.weight, slice(None))
    full.holder.carry = replacement
    assert full.holder.carry is master and torch.equal(full.holder.rows(full.weight, slice(None)), replacement)


@pytest.mark.parametrize("double", [False, True])
def test_a_master_follows_codes_that_are_loaded(double: bool) -> None:
    """Loading another layer's codes restarts the master from them; loading its own leaves it alone, bit for bit."""
    whole = slice(None)
    module, other = (layer(double=double, seed=seed, master=new_master("host", "x", (OUT, IN))) for seed in (0, 1))
    own = module.holder.carry.clone()
    module.load_state_dict(module.state_dict())
    assert torch.equal(module.holder.rows(module.weight, whole), own)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module.holder.rows(module.weight, whole), dense(other))


@pytest.mark.parametrize("double", [False, True])
def test_a_master_in_place_before_its_codes_stays(double: bool) -> None:
    """As in a Trainer's checkpoint: the adapter's state brings the masters, and then the codes are loaded."""
    module, other = (layer(double=double, seed=seed, master=new_master("host", "x", (OUT, IN))) for seed in (0, 1))
    module.holder.carry = other.holder.carry
    module.load_state_dict(other.state_dict())
    assert torch.equal(module.holder.carry, other.holder.carry)


def test_it_compiles_without_a_graph_break() -> None:
    """Forward and backward of a layer trace as one graph."""
    module = layer(double=True)
    x = torch.randn(4, IN, requires_grad=True)
    expected = module(x)
    expected.sum().backward()
    grad, x.grad = x.grad, None
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, grad)


def test_a_shard_of_rows_is_a_layer() -> None:
    """Rows of weight and scales, put into a smaller layer, compute those rows of the output."""
    whole = layer(double=True, bias=False)
    half = nn.Linear(IN, OUT // 2, bias=False)
    pack(half, double=True)
    with torch.no_grad():
        half.weight.copy_(whole.weight[: OUT // 2])
        half.absmax_codes.copy_(whole.absmax_codes[: OUT // 2])
        half.absmax_scale.copy_(whole.absmax_scale[: OUT // 2])
        half.absmax_offset.copy_(whole.absmax_offset)
    x = torch.randn(3, IN)
    assert torch.equal(half(x), whole(x)[:, : OUT // 2])


def test_a_packed_weight_has_no_gradient() -> None:
    """Asking for the weight's gradient is an error."""
    with pytest.raises(TypeError, match="no gradient"):
        layer().holder.grad_weight(torch.zeros(1, IN), torch.zeros(1, OUT))
