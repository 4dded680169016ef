"""NF4 (arXiv 2305.14314): four bits a weight, a scale for every 64 of them, and scales of scales.

Legend: O output rows, I input columns, P = I rounded up to a multiple of 64, N = P / 64 blocks a row.

A row is padded with zeros to P, so that no block crosses a row and a shard of rows quantises alone. In a block
every entry is divided by the block's largest magnitude (its `absmax`, fp32) and becomes the index of the nearest of
16 levels; the even entry of a pair lies in the high half of a byte. The codes are those of bitsandbytes on the
padded matrix.

Double quantisation stores the scales themselves in 8 bits: offset = mean(absmax), and absmax - offset becomes the
nearest entry of bitsandbytes' signed dynamic map, times an fp32 scale for each run of up to 256 scales *of one
row* (bitsandbytes lets its runs of 256 cross rows). Two things make a shard of rows re-quantise alone: such a run
never leaves its row, and the offset is given, not taken anew. Bits a weight: 4 + 32/64 = 4.5 without, and
4 + 8/64 + 32/(64 min(N, 256)) with it: 4.156 at I = 1,024, 4.133 at 4,096, 4.127 from 16,384 on (where P = I).

Levels: with p = ((1 - 1/30) + (1 - 1/32)) / 2 and q the quantile function of the normal distribution, the eight
q(linspace(p, 1/2, 9)[:8]), zero, and the seven -q(linspace(p, 1/2, 8)[:7]), divided by the largest. The table below
is bitsandbytes' (`get_4bit_type`), which rounds a little differently in the seventh digit.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.bnb import import_bitsandbytes

#: Weights that share one scale.
BLOCK = 64

#: Scales of one row that share one scale of scales.
SCALE_BLOCK = 256

# fmt: off
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on

#: Entries that are worked on at a time, so that temporaries stay small and are used again while they are warm.
_CHUNK = 1 << 20


def padded(columns: int) -> int:
    """`columns` rounded up to whole blocks."""
    return -(-columns // BLOCK) * BLOCK


def bits_per_weight(shape: tuple[int, int], *, double: bool) -> float:
    """What a matrix of `shape` (out, in) takes, scales and padding included, the one offset left out."""
    rows, columns = shape
    blocks = padded(columns) // BLOCK
    bits = padded(columns) * 4 + (blocks * 8 + -(-blocks // SCALE_BLOCK) * 32 if double else blocks * 32)
    return bits * rows / (rows * columns)


# -- weights -----------------------------------------------------------------------------------


def quantize(value_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes (O, P/2) in uint8 and absmax (O, N) in fp32 of a matrix of any floating dtype.

    Raises:
        ValueError: an entry is not finite: it would take its whole block along.
    """
    rows, columns = value_OI.shape
    width = padded(columns)
    packed = torch.empty(rows, width // 2, dtype=torch.uint8, device=value_OI.device)
    absmax = torch.empty(rows, width // BLOCK, dtype=torch.float32, device=value_OI.device)
    if value_OI.device.type == "meta":
        return packed, absmax
    bounds = _bounds(LEVELS, value_OI.device)
    for block in _row_chunks(rows, width):
        wide = F.pad(value_OI[block].float().contiguous(), (0, width - columns)).view(-1, width // BLOCK, BLOCK)
        top = wide.abs().amax(-1)
        if not bool(top.isfinite().all()):
            raise ValueError("a matrix with an entry that is not finite cannot be quantised")
        absmax[block] = top
        # As bitsandbytes has it: times the reciprocal, ties to the lower level.
        scaled = (wide * top.clamp(min=1e-38).reciprocal().unsqueeze(-1)).clamp_(-1.0, 1.0)
        codes = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8).view(-1, width)
        packed[block] = (codes[:, ::2] << 4) | codes[:, 1::2]
    return packed, absmax


def dequantize(packed: Tensor, absmax: Tensor, columns: int, dtype: torch.dtype, *, plain: bool = False) -> Tensor:
    """level x absmax, rounded once to `dtype`: (O, I), a view of the padded matrix where I is not P.

    Args:
        packed: (O, P/2), of any one-byte dtype.
        absmax: (O, N), fp32.
        columns: I.
        dtype: of the result.
        plain: use torch alone, even where bitsandbytes' kernel is at hand (a test compares the two).
    """
    rows, width = packed.shape[0], packed.shape[1] * 2
    # bitsandbytes' kernels know no float64. They read codes and scales in order, so slices of columns must be copied
    # (`reshape` would hand on a column of one block as a view with a stride).
    kernel = None if plain or dtype == torch.float64 else dequantize_kernel()
    if kernel is not None and packed.device.type != "meta":
        codes = packed.contiguous().view(torch.uint8).view(-1, 1)
        full: Tensor = kernel(codes, absmax.contiguous().view(-1), BLOCK, "nf4", (rows, width), dtype)
        return full[:, :columns]
    out = torch.empty(rows, width, dtype=dtype, device=packed.device)
    if packed.device.type == "meta":
        return out[:, :columns]
    pairs = _pairs(packed.device)
    for block in _row_chunks(rows, width):
        index = packed[block].contiguous().view(torch.uint8).reshape(-1).int()
        levels = pairs.index_select(0, index).view(torch.float32).view(-1, width // BLOCK, BLOCK)
        out[block] = levels.mul_(absmax[block].unsqueeze(-1)).view(-1, width)
    return out[:, :columns]


# -- scales ------------------------------------------------------------------------------------


def quantize_scales(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes (O, N) in uint8 and second-level absmax (O, ceil(N / 256)) in fp32 of scales (O, N).

    The nearest entry is taken exactly, as in bitsandbytes' CUDA kernel and its torch code. (Its CPU kernel looks
    the value up in a table of 65,536 steps, and is one entry off for about one value in 700.)
    """
    rows, blocks = absmax.shape
    spare = -blocks % SCALE_BLOCK if blocks > SCALE_BLOCK else 0
    run = min(blocks, SCALE_BLOCK)
    shifted = F.pad(absmax - offset, (0, spare)).view(rows, -1, run)
    top = shifted.abs().amax(-1)
    scaled = (shifted * top.clamp(min=1e-38).reciprocal().unsqueeze(-1)).clamp_(-1.0, 1.0)
    codes = torch.bucketize(scaled, _bounds(DYNAMIC_MAP, absmax.device), out_int32=True).to(torch.uint8)
    return codes.view(rows, -1)[:, :blocks].contiguous(), top


def dequantize_scales(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """map[code] x absmax2 + offset in fp32: (O, N)."""
    rows, blocks = codes.shape
    levels = _table(DYNAMIC_MAP, codes.device).index_select(0, codes.reshape(-1).int()).view(rows, blocks)
    if absmax2.shape[1] > 1:
        absmax2 = absmax2.repeat_interleave(SCALE_BLOCK, dim=1)[:, :blocks]
    return levels.mul_(absmax2).add_(offset)


def _dynamic_map() -> tuple[float, ...]:
    entries = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = (10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        entries += [*middles, *(-middle for middle in middles)]
    return tuple(sorted(entries))


#: bitsandbytes' signed 8-bit map: for i in 0..6 the midpoints of 2^i equal parts of [0.1, 1] times 10^(i - 6). Both
#: signs of these 127 values, 0 and 1 are the 256 entries; the smallest is -0.993, and -1 is none of them.
DYNAMIC_MAP = _dynamic_map()


# -- tables and kernels ------------------------------------------------------------------------


def _row_chunks(rows: int, width: int) -> Iterator[slice]:
    height = max(1, _CHUNK // max(1, width))
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def _cached(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep what `make` returns for each set of arguments; while torch.compile traces, make it part of the graph."""
    kept = functools.cache(make)
    return lambda *key: make(*key) if torch.compiler.is_compiling() else kept(*key)


@_cached
def _table(entries: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(entries, dtype=torch.float32, device=device)


@_cached
def _bounds(entries: tuple[float, ...], device: torch.device) -> Tensor:
    """The midpoints between neighbours."""
    table = _table(entries, device)
    return (table[:-1] + table[1:]) / 2


@_cached
def _pairs(device: torch.device) -> Tensor:
    """The two fp32 levels of every byte, as one int64: one look-up decodes two codes."""
    byte = torch.arange(256, device="cpu")
    levels = torch.tensor(LEVELS, dtype=torch.float32, device="cpu")
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=-1).view(torch.int64).view(-1).to(device)


_kernels: dict[str, Callable[..., Any]] | None = None


def load_kernels() -> None:
    """Look once for bitsandbytes; where it cannot be had, say once that plain torch does its work."""
    global _kernels
    if _kernels is not None:
        return
    try:
        import_bitsandbytes()
    except ImportError as error:
        _kernels = {}
        warnings.warn(f"NF4 layers run in plain torch, which unpacks more slowly: {error}", stacklevel=2)
        return
    ops = torch.ops.bitsandbytes
    _kernels = {"dequantize": ops.dequantize_4bit.default}
    if hasattr(ops, "gemm_4bit"):
        _kernels["gemm"] = ops.gemm_4bit.default


def dequantize_kernel() -> Callable[..., Any] | None:
    """bitsandbytes' `dequantize_4bit`, or None."""
    if _kernels is None:
        load_kernels()
    return (_kernels or {}).get("dequantize")


def gemm_kernel() -> Callable[..., Any] | None:
    """bitsandbytes' `gemm_4bit`, which multiplies with packed weights, or None."""
    if _kernels is None:
        load_kernels()
    return (_kernels or {}).get("gemm")
