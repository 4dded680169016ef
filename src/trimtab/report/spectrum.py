"""The spectrum of an update: singular values of (W now) - (W at attach), one matrix at a time.

Legend: dW the update of one matrix (out, in) in fp32; sigma its singular values, falling; r the rank of one
adapter; k the number of restarts.

*Rank* counts the singular values above `threshold` (1e-2) of the largest. Counting those above rounding error
would not do: one merge that is rounded to bf16 leaves noise of full rank. A sum of k + 1 products of rank r has at
most rank (k + 1) r, and plain LoRA stays at r, so these two are the lines to hold a rank against
(ReLoRA, arXiv 2307.05695, section 3).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import CheckpointError, ConfigError, NonFiniteError, ReportError
from trimtab.report.files import write_whole
from trimtab.report.singular import THRESHOLD, numerical_rank, singular_values
from trimtab.report.start import write_start

__all__ = [
    "MatrixSpectrum",
    "Spectrum",
    "TypeSpectrum",
    "matrix_types",
    "update_spectrum",
    "write_start",
]

#: Below this share of the largest, singular values from a Gram matrix are noise.
SMALLEST_THRESHOLD = 1e-6
#: The absolute bound under which ReLoRA's authors count a singular value as near zero (their figure 4).
NEAR_ZERO = 0.1


@dataclass(frozen=True)
class MatrixSpectrum:
    """The update of one matrix.

    Attributes:
        name: qualified name of the weight or its module.
        type: what the matrix is in every layer (`q_proj`), see `matrix_types`.
        shape: (out, in).
        singular_values: of dW, falling; min(out, in) of them.
        rank: how many of them exceed `threshold` times the largest; 0 for an update of zero.
        frobenius: |dW|.
        start_frobenius: |W| at attach.
    """

    name: str
    type: str
    shape: tuple[int, int]
    singular_values: tuple[float, ...]
    rank: int
    frobenius: float
    start_frobenius: float

    @property
    def relative(self) -> float:
        """|dW| / |W|; infinite when a matrix of zeros was updated, 0 when nothing moved."""
        return _ratio(self.frobenius, self.start_frobenius)


@dataclass(frozen=True)
class TypeSpectrum:
    """All matrices of one type together: `near_zero` is the mean number of singular values below 0.1 a matrix."""

    type: str
    matrices: int
    shape: tuple[int, int]
    rank_min: int
    rank_median: float
    rank_max: int
    full_rank: int
    largest: float
    near_zero: float
    relative: float


@dataclass(frozen=True)
class Spectrum:
    """The update of a whole model.

    Attributes:
        matrices: in the model's order.
        threshold: see `numerical_rank`.
        rank: r of one adapter, where there is one.
        restarts: k, how often the adapter was merged and drawn anew; None where that is unknown.
    """

    matrices: tuple[MatrixSpectrum, ...]
    threshold: float = THRESHOLD
    rank: int | None = None
    restarts: int | None = None

    @property
    def bound(self) -> int | None:
        """(k + 1) r, the most that the rank of the update can be."""
        return None if self.rank is None or self.restarts is None else (self.restarts + 1) * self.rank

    def by_type(self) -> dict[str, list[MatrixSpectrum]]:
        """The matrices of each type, types in the order of their first matrix."""
        found: dict[str, list[MatrixSpectrum]] = {}
        for matrix in self.matrices:
            found.setdefault(matrix.type, []).append(matrix)
        return found

    def types(self) -> list[TypeSpectrum]:
        """One row a type."""
        return [_summary(kind, group) for kind, group in self.by_type().items()]

    def to_json(self) -> dict[str, Any]:
        """Plain values; singular values with six significant digits (their noise begins at the eighth)."""
        matrices = []
        for matrix in self.matrices:
            entry = asdict(matrix)
            entry["shape"] = list(matrix.shape)
            entry["singular_values"] = [float(f"{value:.6g}") for value in matrix.singular_values]
            matrices.append(entry)
        return {
            "format": 1,
            "threshold": self.threshold,
            "rank": self.rank,
            "restarts": self.restarts,
            "types": [_plain(asdict(row)) for row in self.types()],
            "matrices": matrices,
        }

    @classmethod
    def from_json(cls, value: Any) -> Spectrum:
        """The inverse of `to_json`.

        Raises:
            ReportError: a key is missing, or a value is not what it should be.
        """
        try:
            if value["format"] != 1:
                raise ReportError(
                    f"the spectrum has format {value['format']!r}; this version of trimtab reads format 1"
                )
            matrices = tuple(
                MatrixSpectrum(
                    name=str(entry["name"]),
                    type=str(entry["type"]),
                    shape=(int(entry["shape"][0]), int(entry["shape"][1])),
                    singular_values=tuple(float(sigma) for sigma in entry["singular_values"]),
                    rank=int(entry["rank"]),
                    frobenius=float(entry["frobenius"]),
                    start_frobenius=float(entry["start_frobenius"]),
                )
                for entry in value["matrices"]
            )
            if not all(math.isfinite(sigma) and sigma >= 0 for matrix in matrices for sigma in matrix.singular_values):
                raise ReportError("the spectrum holds a singular value that is negative or not finite")
            rank, restarts = value["rank"], value["restarts"]
            return cls(
                matrices,
                threshold=float(value["threshold"]),
                rank=None if rank is None else int(rank),
                restarts=None if restarts is None else int(restarts),
            )
        except (KeyError, TypeError, ValueError, IndexError) as problem:
            raise ReportError(f"the spectrum is damaged ({type(problem).__name__}: {problem})") from problem

    def save(self, path: Path) -> None:
        """Write `to_json`, all of it or nothing."""
        write_whole(path, json.dumps(self.to_json(), allow_nan=False), ReportError)

    @classmethod
    def load(cls, path: Path) -> Spectrum:
        """Read a file of `save`.

        Raises:
            ReportError: the file is missing or damaged.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise ReportError(f"{path} cannot be read ({problem})") from problem
        try:
            return cls.from_json(value)
        except ReportError as problem:
            raise ReportError(f"{path}: {problem}") from problem


def matrix_types(names: list[str]) -> dict[str, str]:
    """What each named matrix is in every layer: the last part of its path that is not a number.

    `model.layers.3.self_attn.q_proj` is a `q_proj`. Where two modules of a layer share that part (the two
    `c_proj` of GPT-2), the part before it tells them apart: `attn.c_proj`, `mlp.c_proj`.
    """
    words = {}
    for name in names:
        parts = [part for part in name.removesuffix(".weight").split(".") if not part.isdecimal()]
        words[name] = parts or [name]
    parents: dict[str, set[str]] = {}
    for parts in words.values():
        parents.setdefault(parts[-1], set()).add(parts[-2] if len(parts) > 1 else "")
    return {name: ".".join(parts[-2:]) if len(parents[parts[-1]]) > 1 else parts[-1] for name, parts in words.items()}


def update_spectrum(
    start: Path | Iterator[tuple[str, Tensor]],
    now: Iterator[tuple[str, Tensor]],
    *,
    threshold: float = THRESHOLD,
    rank: int | None = None,
    restarts: int | None = None,
    device: torch.device | str = "cpu",
) -> Spectrum:
    """Compare the weights of now with those at attach, with two matrices in memory at a time.

    Args:
        start: a file of `write_start`, or name and value of each matrix at attach.
        now: name and value of each matrix that `start` holds; in any order for a file, else in that of `start`.
        threshold: share of the largest singular value above which one counts towards the rank.
        rank: r of the run's adapter, kept as a reference line.
        restarts: k of the run, likewise.
        device: where the singular values are computed.

    Raises:
        CheckpointError: `start` cannot be read, or does not hold the same names and shapes as `now`.
        NonFiniteError: a matrix holds a value that is not finite.
    """
    if not SMALLEST_THRESHOLD <= threshold < 1.0:
        raise ConfigError(
            f"the spectrum's threshold must lie in [{SMALLEST_THRESHOLD:g}, 1), got {threshold}; "
            "smaller singular values are rounding noise"
        )
    pairs = _from_file(start, now) if isinstance(start, Path) else _together(start, now)
    bound = None if rank is None or restarts is None else (restarts + 1) * rank
    found = [_one(name, before, after, threshold, device, bound) for name, before, after in pairs]
    kinds = matrix_types([entry["name"] for entry in found])
    matrices = tuple(MatrixSpectrum(type=kinds[entry["name"]], **entry) for entry in found)
    return Spectrum(matrices, threshold=threshold, rank=rank, restarts=restarts)


def _from_file(start: Path, now: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, value at attach, and value now."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(start), framework="pt") as file:
            missing = set(file.keys())
            for name, value in now:
                if name not in missing:
                    raise CheckpointError(
                        f"{start} does not fit this model: it has no {name!r}"
                        if name not in file.keys()  # noqa: SIM118 (an open file is no mapping)
                        else f"{name!r} came twice while the update was compared with {start}"
                    )
                missing.discard(name)
                before = file.get_tensor(name)
                if before.ndim != 2 or before.shape != value.shape:
                    raise CheckpointError(
                        f"{start} does not fit this model: {name!r} is {tuple(before.shape)} there and "
                        f"{tuple(value.shape)} here"
                    )
                yield name, before, value
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"{start} cannot be read ({problem}); it holds the weights at attach") from problem
    if missing:
        raise CheckpointError(
            f"{start} does not fit this model: it holds {min(missing)!r}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, which the model does not have"
        )


def _together(
    start: Iterator[tuple[str, Tensor]], now: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    for (name, before), (same, after) in zip(start, now, strict=True):
        if name != same or before.shape != after.shape:
            raise ValueError(f"{same!r} of now stands where the start has {name!r}")
        yield name, before, after


def _one(
    name: str, before: Tensor, after: Tensor, threshold: float, device: torch.device | str, bound: int | None
) -> dict[str, Any]:
    """All but the type of one `MatrixSpectrum`."""
    old = before.to(device, torch.float32)
    delta = after.detach().to(device, torch.float32) - old
    if not bool(torch.isfinite(delta).all()):
        raise NonFiniteError(f"the update of {name!r} is not finite, so it has no spectrum; the run has diverged")
    values = singular_values(delta, bound, 0.1 * threshold)
    return {
        "name": name,
        "shape": (int(delta.shape[0]), int(delta.shape[1])),
        "singular_values": tuple(values.tolist()),
        "rank": numerical_rank(values, threshold),
        "frobenius": float(torch.linalg.vector_norm(delta, dtype=torch.float64)),
        "start_frobenius": float(torch.linalg.vector_norm(old, dtype=torch.float64)),
    }


def _summary(kind: str, group: list[MatrixSpectrum]) -> TypeSpectrum:
    ranks = [matrix.rank for matrix in group]
    near_zero = sum(sum(sigma < NEAR_ZERO for sigma in matrix.singular_values) for matrix in group)
    shapes = [shape for shape, _ in groupby(sorted(matrix.shape for matrix in group))]
    return TypeSpectrum(
        type=kind,
        matrices=len(group),
        shape=shapes[-1],
        rank_min=min(ranks),
        rank_median=median(ranks),
        rank_max=max(ranks),
        full_rank=max(min(matrix.shape) for matrix in group),
        largest=max((matrix.singular_values[0] for matrix in group if matrix.singular_values), default=0.0),
        near_zero=near_zero / len(group),
        relative=_ratio(
            math.hypot(*(matrix.frobenius for matrix in group)),
            math.hypot(*(matrix.start_frobenius for matrix in group)),
        ),
    )


def _ratio(part: float, whole: float) -> float:
    if whole > 0.0:
        return part / whole
    return math.inf if part > 0.0 else 0.0


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Six digits, and None for infinity (the relative update of a matrix that began at zero), which JSON lacks."""
    return {
        key: (float(f"{value:.6g}") if math.isfinite(value) else None) if isinstance(value, float) else value
        for key, value in row.items()
    }
