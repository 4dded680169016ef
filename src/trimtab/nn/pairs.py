"""The frozen random matrices that VeRA's layers share: drawn from a seed, never trained, never stored.

Legend: R rank, I in_features, O out_features.

Two ways to come by them:

per width   one A (R, I) for each input width and one B (O, R) for each output width, each from a generator of
            its own and scaled for the fan-in of the layers that use it
sliced      PEFT's: one A (R, largest I) and one B (largest O, R), of which a layer uses the first columns and
            rows; kept bit for bit, wrong scale for narrow layers included, so that files can be exchanged

All are Kaiming-uniform with gain sqrt(2): U(-sqrt(6 / fan_in), sqrt(6 / fan_in)), where the fan-in of A is I and
that of B is R (arXiv 2310.11454; PEFT's VeraModel has the gain).

What is drawn per width is pinned to the last bit on every machine: 24-bit integers k from the Mersenne Twister
MT19937 (32-bit seed, its usual seeding; each is the low bits of one output), turned into bound (2k + 1 - 2^24) /
2^24 by one product in float64 and rounded to fp32. PEFT leaves that to `uniform_`, whose fp32 arithmetic may be
contracted otherwise elsewhere. In either case a sha256 of the fp32 bytes tells whether two draws are the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from trimtab.nn.draw import stable_generator

Letter = Literal["A", "B"]


def kaiming_bound(fan_in: int) -> float:
    """sqrt(6 / fan_in), in the order of operations in which PEFT computes it."""
    return math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan_in))


def draw(letter: Letter, width: int, rank: int, seed: int) -> Tensor:
    """A (rank, width) or B (width, rank) of one width, in fp32 on the CPU."""
    shape = (rank, width) if letter == "A" else (width, rank)
    k = torch.empty(shape, dtype=torch.int32, device="cpu")
    k.random_(0, 1 << 24, generator=stable_generator(seed, letter, width))
    odd = k.to(torch.float64).mul_(2.0).add_(1.0 - (1 << 24))  # exact: odd integers below 2^24
    return odd.mul_(kaiming_bound(shape[1]) / (1 << 24)).to(torch.float32)


def draw_peft(rank: int, largest: tuple[int, int], seed: int) -> dict[Letter, Tensor]:
    """PEFT's one pair for a largest shape (out, in): A first, then B, from one generator."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn: dict[Letter, Tensor] = {}
    shapes: dict[Letter, tuple[int, int]] = {"A": (rank, largest[1]), "B": (largest[0], rank)}
    for letter, shape in shapes.items():
        bound = kaiming_bound(shape[1])
        drawn[letter] = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(
            -bound, bound, generator=generator
        )
    return drawn


class Pairs:
    """The shared matrices of one adapter, on whatever devices and in whatever dtypes its layers want them.

    A matrix is drawn when the first layer asks for it, handed to all that ask for the same, and gone with the
    last layer that holds it. Copies and pickles of a model carry the matrices that its layers hold.

    Args:
        shapes: (out, in) of the layers.
        rank: R.
        seed: PEFT's projection_prng_key, where `sliced`.
        sliced: one pair of the largest shape, sliced, as PEFT has it.

    Attributes:
        followers: what is learnt about which layers read one input (see `reading`), by layer names.
    """

    def __init__(self, shapes: Iterable[tuple[int, int]], *, rank: int, seed: int, sliced: bool) -> None:
        shapes = list(shapes)
        self.widths: dict[Letter, list[int]] = {
            "A": sorted({i for _, i in shapes}),
            "B": sorted({o for o, _ in shapes}),
        }
        self.rank, self.seed, self.sliced = rank, seed, sliced
        self.followers: dict[str, set[str]] = {}
        self._given: dict[Letter, Tensor] = {}
        self._live: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": None}  # layers carry what they hold

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _live=WeakValueDictionary())

    @property
    def largest(self) -> tuple[int, int]:
        """The largest out and the largest in, which need not be one layer's."""
        return self.widths["B"][-1], self.widths["A"][-1]

    def get(self, letter: Letter, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A (rank, width) or B (width, rank): one tensor for all who ask for the same device and dtype."""
        key = (letter, width, device, dtype)
        found = self._live.get(key)
        if found is None:
            # A tensor made in inference mode could never take part in training.
            with torch.inference_mode(False), torch.no_grad():
                found = (
                    self._slice(letter, width, device, dtype) if self.sliced else self._place(letter, width, *key[2:])
                )
            self._live[key] = found
        return found

    def _slice(self, letter: Letter, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (letter, None, device, dtype)
        whole = self._live.get(key)  # alive as long as a slice of it is
        if whole is None:
            whole = self._live[key] = self._place(letter, width, device, dtype)
        return whole[:, :width] if letter == "A" else whole[:width]

    def _place(self, letter: Letter, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A matrix (the whole one, where sliced) drawn, rounded once, and put on a device."""
        if device.type == "meta":
            width = self.widths[letter][-1] if self.sliced else width
            return torch.empty((self.rank, width) if letter == "A" else (width, self.rank), dtype=dtype, device=device)
        return self.exact(letter, width).to(dtype).to(device)

    def exact(self, letter: Letter, width: int) -> Tensor:
        """A matrix (the whole one, where sliced) in fp32 on the CPU."""
        if self._given:
            return self._given[letter]
        if self.sliced:
            return draw_peft(self.rank, self.largest, self.seed)[letter]
        return draw(letter, width, self.rank, self.seed)

    @property
    def given(self) -> bool:
        """Whether the pair came from a file and is not what the seed gives here."""
        return bool(self._given)

    def give(self, pair: dict[Letter, Tensor]) -> bool:
        """Use this sliced pair, should it differ from the seed's; whether it does. Layers must ask anew then.

        Raises:
            ValueError: a matrix has not the shape of the whole one.
        """
        assert self.sliced
        self._given = {}
        for letter, tensor in pair.items():
            drawn = self.exact(letter, 0)
            if drawn.shape != tensor.shape:
                raise ValueError(f"vera_{letter} is {tuple(tensor.shape)}, and the layers need {tuple(drawn.shape)}")
            if not torch.equal(drawn, tensor.float()):
                self._given = {key: value.detach().float().cpu() for key, value in pair.items()}
        if self._given:
            self._live.clear()
        return self.given

    def checksums(self) -> dict[str, str]:
        """sha256 of the fp32 bytes (little-endian, row by row) of each matrix, by letter and width: "A768"."""
        whole: dict[Letter, list[int]] = {"A": [self.largest[1]], "B": [self.largest[0]]}
        return {
            f"{letter}{width}": hashlib.sha256(self.exact(letter, width).contiguous().numpy().tobytes()).hexdigest()
            for letter, widths in (whole if self.sliced else self.widths).items()
            for width in widths
        }
