"""NF4's mathematics, against bitsandbytes and against its own formulas."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.nn import nf4

SHAPES = [(3, 64), (5, 128), (7, 72), (4, 48), (16, 1376), (2, 20 * 1024)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bitsandbytes() -> object:
    pytest.importorskip("bitsandbytes")
    nf4.load_kernels()
    if nf4.dequantize_kernel() is None:
        pytest.skip("bitsandbytes is refused beside `kernels`")
    import bitsandbytes.functional

    return bitsandbytes.functional


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows of very different sizes, an all-zero row, and a row of one repeated value."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator) * torch.logspace(-3, 1, shape[0]).unsqueeze(1)
    value[0] = 0.0
    value[1] = -0.7
    return value.to(dtype)


def test_levels_follow_their_formula() -> None:
    """The 16 levels are quantiles of the normal distribution, to six digits (the table rounds in the seventh)."""
    from scipy.stats import norm

    p = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    positive, negative = norm.ppf(np.linspace(p, 0.5, 9)[:8]), -norm.ppf(np.linspace(p, 0.5, 8)[:7])
    levels = np.sort(np.concatenate([positive, negative, [0.0]]))
    assert np.abs(levels / levels.max() - np.array(nf4.LEVELS)).max() < 5e-7
    assert len(nf4.LEVELS) == 16


def test_tables_are_those_of_bitsandbytes() -> None:
    """Levels and dynamic map are bitsandbytes' to the last bit."""
    functional = bitsandbytes()
    assert torch.equal(torch.tensor(nf4.LEVELS), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(torch.tensor(nf4.DYNAMIC_MAP), functional.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """On the matrix padded with zeros to whole blocks, codes, absmax and decoded values are bitsandbytes'."""
    functional = bitsandbytes()
    value = matrix(shape, dtype)
    packed, absmax = nf4.quantize(value)
    wide = F.pad(value, (0, nf4.padded(shape[1]) - shape[1]))
    theirs, state = functional.quantize_4bit(wide, blocksize=64, quant_type="nf4")
    assert torch.equal(packed.view(-1), theirs.view(-1))
    assert torch.equal(absmax.view(-1), state.absmax)
    for kind in DTYPES:
        state.dtype = kind
        decoded = functional.dequantize_4bit(theirs, state)[:, : shape[1]]
        assert torch.equal(nf4.dequantize(packed, absmax, shape[1], kind), decoded)
        assert torch.equal(nf4.dequantize(packed, absmax, shape[1], kind, plain=True), decoded)


def test_a_tie_goes_to_the_lower_level() -> None:
    """A value exactly between two levels takes the lower index, in every gap, as bitsandbytes has it."""
    functional = bitsandbytes()
    levels = torch.tensor(nf4.LEVELS)
    value = torch.zeros(1, 64)
    value[0, :15] = (levels[:-1] + levels[1:]) / 2
    value[0, 15] = 1.0
    packed, _ = nf4.quantize(value)
    assert torch.equal(packed[0, :8], torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF], dtype=torch.uint8))
    assert torch.equal(packed.view(-1), functional.quantize_4bit(value, blocksize=64, quant_type="nf4")[0].view(-1))


@pytest.mark.parametrize("blocks", [1, 3, 16, 255, 256, 257, 600])
def test_double_quantisation_is_that_of_bitsandbytes_row_by_row(blocks: int) -> None:
    """Each row's scales are quantised as bitsandbytes' exact code quantises that row alone, and decode alike."""
    functional = bitsandbytes()
    absmax = matrix((6, blocks), seed=1).abs()
    offset = absmax.mean()
    codes, absmax2 = nf4.quantize_scales(absmax, offset)
    decoded = nf4.dequantize_scales(codes, absmax2, offset)
    table = functional.create_dynamic_map()
    op = torch.ops.bitsandbytes.quantize_blockwise.default
    for row in range(6):
        shifted = absmax[row] - offset
        # For float64 its CPU backend takes the nearest entry; its fp32 kernel looks it up in a coarse table.
        exact, scale = op(shifted.double(), table, 256)
        assert torch.equal(codes[row], exact)
        assert torch.equal(absmax2[row], scale)
        state = functional.QuantState(absmax=scale, code=table, blocksize=256, dtype=torch.float32)
        assert torch.equal(decoded[row], functional.dequantize_blockwise(exact, state) + offset)
        fast, fast_scale = functional.quantize_blockwise(shifted, blocksize=256)
        assert torch.equal(fast_scale.absmax, scale)
        assert (fast.int() - codes[row].int()).abs().max() <= 1


def test_double_quantisation_costs_little_accuracy() -> None:
    """The decoded scales are within the map's half step: 0.8 % of a row's largest distance from the offset."""
    absmax = torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    offset = absmax.mean()
    decoded = nf4.dequantize_scales(*nf4.quantize_scales(absmax, offset), offset)
    assert ((decoded - absmax).abs() <= 0.0085 * (absmax - offset).abs().amax(1, keepdim=True)).all()
    assert not torch.equal(decoded, absmax)


@pytest.mark.parametrize("shape", [(12, 200), (8, 20 * 1024)])
def test_a_shard_of_rows_quantises_alone(shape: tuple[int, int]) -> None:
    """With the stored offset, codes and scales of some rows are the same rows of the whole matrix's."""
    value = matrix(shape, seed=2)
    packed, absmax = nf4.quantize(value)
    offset = absmax.mean()
    codes, absmax2 = nf4.quantize_scales(absmax, offset)
    shard = slice(shape[0] // 2, shape[0])
    own_packed, own_absmax = nf4.quantize(value[shard])
    own_codes, own_absmax2 = nf4.quantize_scales(own_absmax, offset)
    for mine, whole in ((own_packed, packed), (own_absmax, absmax), (own_codes, codes), (own_absmax2, absmax2)):
        assert torch.equal(mine, whole[shard])


def test_quantising_a_decoded_matrix_changes_nothing() -> None:
    """Codes of level x absmax are the codes again (with the exact scales), so merging nothing is free of loss."""
    value = matrix((9, 320), seed=3)
    packed, absmax = nf4.quantize(value)
    again, scales = nf4.quantize(nf4.dequantize(packed, absmax, 320, torch.float32))
    assert torch.equal(again, packed) and torch.equal(scales, absmax)


def test_large_matrices_go_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Working in small pieces gives the same codes and values as working at once."""
    value = matrix((33, 192), seed=4)
    packed, absmax = nf4.quantize(value)
    whole = nf4.dequantize(packed, absmax, 192, torch.bfloat16, plain=True)
    monkeypatch.setattr(nf4, "_CHUNK", 500)
    pieces = nf4.quantize(value)
    assert torch.equal(pieces[0], packed) and torch.equal(pieces[1], absmax)
    assert torch.equal(nf4.dequantize(packed, absmax, 192, torch.bfloat16, plain=True), whole)


@pytest.mark.parametrize(
    ("shape", "double", "bits"),
    [
        ((8, 1024), False, 4.5),
        ((8, 1024), True, 4 + 8 / 64 + 32 / 1024),
        ((8, 16384), True, 4 + 8 / 64 + 32 / 16384),
        ((8, 32), False, 9.0),  # a row of 32 is padded to 64
    ],
)
def test_bits_a_weight_are_what_is_stored(shape: tuple[int, int], double: bool, bits: float) -> None:
    """The documented size is the size of the tensors."""
    packed, absmax = nf4.quantize(matrix(shape))
    scales = nf4.quantize_scales(absmax, absmax.mean()) if double else (absmax,)
    stored = sum(t.numel() * t.element_size() for t in (packed, *scales)) * 8 / (shape[0] * shape[1])
    assert stored == bits == nf4.bits_per_weight(shape, double=double)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    """One NaN would take 64 weights along; it is an error."""
    value = matrix((4, 64))
    value[2, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        nf4.quantize(value)


def test_without_bitsandbytes_the_values_are_the_same_and_it_is_said(tmp_path: Path) -> None:
    """Where bitsandbytes is missing, plain torch decodes the same values, after one warning."""
    value = matrix((6, 200), torch.bfloat16)
    packed, absmax = nf4.quantize(value)
    torch.save((packed, absmax, nf4.dequantize(packed, absmax, 200, torch.bfloat16)), tmp_path / "with.pt")
    code = """
        import sys, warnings
        sys.modules["bitsandbytes"] = None
        import torch
        from trimtab.nn import nf4
        packed, absmax, expected = torch.load(sys.argv[1])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                assert torch.equal(nf4.dequantize(packed, absmax, 200, torch.bfloat16), expected)
        assert len(caught) == 1 and "plain torch" in str(caught[0].message), caught
    """
    source = str(Path(nf4.__file__).parents[2])
    script = f"import sys; sys.path.insert(0, {source!r})\n{textwrap.dedent(code)}"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "with.pt")], check=True)
