"""The spectrum of an update, and the file of weights at attach."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.errors import CheckpointError, ConfigError, NonFiniteError, ReportError
from trimtab.report import files
from trimtab.report.singular import numerical_rank, singular_values
from trimtab.report.spectrum import Spectrum, matrix_types, update_spectrum
from trimtab.report.start import write_start


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def low_rank(seed: int, out: int, inner: int, rank: int) -> Tensor:
    """A product of rank `rank` whose singular values are of one order."""
    left = torch.linalg.qr(noise(seed, out, rank))[0]
    right = torch.linalg.qr(noise(seed + 1, inner, rank))[0]
    return left @ right.T


def named(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from tensors.items()


def spectrum_of(folder: Path, before: dict[str, Tensor], after: dict[str, Tensor], **options: float) -> Spectrum:
    write_start(folder / "start.safetensors", named(before))
    return update_spectrum(folder / "start.safetensors", named(after), **options)  # type: ignore[arg-type]


# -- singular values ---------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 40),
    inner=st.integers(1, 40),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e30]),
    seed=st.integers(0, 10**6),
)
def test_singular_values_match_float64_svd(out: int, inner: int, scale: float, seed: int) -> None:
    """The Gram route agrees with a float64 SVD to 1e-7 of the largest value, at every shape and scale."""
    delta = noise(seed, out, inner) * scale
    exact = torch.linalg.svdvals(delta.double())
    found = singular_values(delta)
    assert found.shape == (min(out, inner),)
    assert float((found - exact).abs().max()) <= 1e-7 * float(exact[0])


def test_singular_values_of_a_steep_spectrum_are_right_far_below_the_threshold() -> None:
    """Values down to 1e-6 of the largest are right to 2 %, four orders below the rank's threshold."""
    left, right = torch.linalg.qr(noise(1, 60, 60).double())[0], torch.linalg.qr(noise(2, 90, 60).double())[0]
    true = torch.logspace(0, -6, 60, dtype=torch.float64)
    found = singular_values(left @ torch.diag(true) @ right.T)
    assert float((found / true - 1).abs().max()) < 0.02


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(50, 90),
    inner=st.integers(50, 90),
    rank=st.integers(1, 4),
    scale=st.sampled_from([1e-30, 1e-3, 1e30]),
    seed=st.integers(0, 10**6),
)
def test_within_a_bound_on_the_rank_the_values_are_the_same(
    out: int, inner: int, rank: int, scale: float, seed: int
) -> None:
    """Of an update in fp32 whose entries are rounded as those of a difference of weights are; the rest are zeros."""
    exact = (low_rank(seed, out, inner, rank) @ torch.diag(torch.linspace(1.0, 0.05, inner))).double()
    delta = ((exact + 30.0).float() - 30.0) * scale
    true = torch.linalg.svdvals(exact) * scale
    found = singular_values(delta, rank, 1e-3)
    assert found.shape == true.shape
    assert int((found > 0).sum()) <= rank + 8 < min(out, inner)
    assert float((found[:rank] - true[:rank]).abs().max()) <= 2e-5 * float(true[0])
    assert numerical_rank(found) == numerical_rank(singular_values(delta))


@pytest.mark.parametrize(("beyond", "zeros"), [(0.9e-3, True), (3e-3, False)])
def test_a_bound_that_is_wrong_is_seen(beyond: float, zeros: bool) -> None:
    """Twenty values of one size above a bound of 2: together they are below a thousandth of the largest, or not."""
    left, right = torch.linalg.qr(noise(3, 80, 22).double())[0], torch.linalg.qr(noise(4, 120, 22).double())[0]
    sizes = torch.tensor([1.0, 0.5, *[beyond / 20**0.5] * 20], dtype=torch.float64)
    delta = left @ torch.diag(sizes) @ right.T
    found, whole = singular_values(delta, 2, 1e-3), singular_values(delta)
    assert torch.equal(found, whole) != zeros
    assert float((found - whole).abs().max()) <= (beyond if zeros else 0.0)
    assert float((found - whole)[:2].abs().max()) <= 1e-6
    assert bool((found[15:] == 0).all()) == zeros


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.sampled_from([1e-20, 0.5, 3.0, 1e20]))
def test_rank_ignores_scale_rotation_and_transposition(seed: int, factor: float) -> None:
    """Scaling, turning, permuting and transposing an update leaves its rank alone."""
    delta = sum(low_rank(seed + 10 * i, 24, 36, 3) for i in range(3))
    assert isinstance(delta, Tensor)
    turn = torch.linalg.qr(noise(seed + 99, 24, 24))[0]
    order = torch.randperm(36, generator=torch.Generator().manual_seed(seed))
    for form in (delta, delta * factor, turn @ delta, delta[:, order], delta.T):
        assert numerical_rank(singular_values(form)) == 9


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5), restarts=st.integers(0, 4))
def test_rank_of_a_sum_of_low_rank_updates_is_bounded(seed: int, rank: int, restarts: int) -> None:
    """k + 1 random updates of rank r add up to rank (k + 1) r; never more."""
    parts = [low_rank(seed + 1000 * i, 40, 56, rank) for i in range(restarts + 1)]
    assert numerical_rank(singular_values(torch.stack(parts).sum(0))) == (restarts + 1) * rank


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 1)])
def test_zero_update_has_rank_zero(shape: tuple[int, int]) -> None:
    """Nothing moved: all singular values are 0, and so is the rank."""
    values = singular_values(torch.zeros(shape))
    assert values.tolist() == [0.0] * min(shape)
    assert numerical_rank(values) == 0


def test_threshold_is_a_share_of_the_largest_and_strict() -> None:
    """A value exactly at the threshold does not count."""
    values = torch.tensor([2.0, 0.5, 0.25, 0.1], dtype=torch.float64)
    assert [numerical_rank(values, at) for at in (0.01, 0.05, 0.125, 0.3)] == [4, 3, 2, 1]


# -- the update of a model ---------------------------------------------------------------------


def test_spectrum_counts_restarts_between_r_and_the_bound(tmp_path: Path) -> None:
    """With 3 restarts of rank 4 the rank is above 4 and at most 16; without restarts it is 4."""
    base = noise(0, 48, 64) * 0.02
    once = base + 0.25 * low_rank(10, 48, 64, 4)
    often = base + sum(0.25 * low_rank(10 + 50 * i, 48, 64, 4) for i in range(4))
    names = {"a.q_proj": base, "b.q_proj": base}
    spectrum = spectrum_of(tmp_path, names, {"a.q_proj": once, "b.q_proj": often}, rank=4, restarts=3)
    assert [matrix.rank for matrix in spectrum.matrices] == [4, 16]
    assert spectrum.bound == 16


def test_merge_rounded_to_bf16_counts_the_update_and_not_the_noise(tmp_path: Path) -> None:
    """bf16 rounding fills every direction with noise; the rank at 1e-2 still is the update's."""
    base = (noise(0, 64, 96) * 0.02).bfloat16()
    merged = (base.float() + low_rank(5, 64, 96, 4) + low_rank(7, 64, 96, 4)).bfloat16()
    before, after = {"x.up_proj": base.float()}, {"x.up_proj": merged.float()}
    assert spectrum_of(tmp_path, before, after).matrices[0].rank == 8
    assert spectrum_of(tmp_path, before, after, threshold=1e-6).matrices[0].rank == 64


def test_norms_and_relative_size(tmp_path: Path) -> None:
    """|dW| and |dW| / |W| are Frobenius norms of the fp32 difference."""
    base, delta = noise(0, 6, 9), noise(1, 6, 9) * 1e-2
    matrix = spectrum_of(tmp_path, {"m.o_proj": base}, {"m.o_proj": base + delta}).matrices[0]
    assert matrix.frobenius == pytest.approx(float(delta.norm()), rel=1e-5)
    assert matrix.relative == pytest.approx(float(delta.norm() / base.norm()), rel=1e-5)
    assert sum(sigma**2 for sigma in matrix.singular_values) == pytest.approx(matrix.frobenius**2, rel=1e-9)


def test_spectrum_asks_for_one_matrix_at_a_time(tmp_path: Path) -> None:
    """No matrix of the model is kept once the next one is asked for."""
    import weakref

    tensors = {f"layers.{i}.q_proj": noise(i, 8, 8) for i in range(5)}
    write_start(tmp_path / "start.safetensors", named(tensors))
    alive: list[weakref.ref[Tensor]] = []

    def one_by_one() -> Iterator[tuple[str, Tensor]]:
        for i in range(5):
            value = noise(i + 100, 8, 8)
            alive.append(weakref.ref(value))
            yield f"layers.{i}.q_proj", value
            del value
            assert sum(ref() is not None for ref in alive) <= 1

    assert len(update_spectrum(tmp_path / "start.safetensors", one_by_one()).matrices) == 5


def test_types_are_grouped_over_layers(tmp_path: Path) -> None:
    """One aggregate a type, over its layers, in the model's order."""
    before = {f"model.layers.{i}.self_attn.{kind}.weight": noise(i, 8, 8) for i in (0, 1) for kind in ("q", "v")}
    after = {name: value + (0.2 * low_rank(3, 8, 8, 2) if ".q." in name else 0) for name, value in before.items()}
    rows = spectrum_of(tmp_path, before, after).types()
    assert [(row.type, row.matrices, row.rank_min, row.rank_max) for row in rows] == [("q", 2, 2, 2), ("v", 2, 0, 0)]
    assert rows[0].near_zero == 6  # sigma = 0.2 twice, the other six are zero
    assert rows[1].near_zero == 8


def test_matrix_types_tell_equal_names_of_one_layer_apart() -> None:
    """GPT-2 calls two matrices c_proj; a bare nn.Sequential has numbers alone."""
    names = ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.mlp.c_proj", "3"]
    assert list(matrix_types(names).values()) == ["c_attn", "attn.c_proj", "mlp.c_proj", "mlp.c_proj", "3"]


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({"a.q": torch.ones(2, 3)}, "'b.q'.*which the model does not have"),
        ({"a.q": torch.ones(2, 3), "b.q": torch.ones(2, 3), "c.q": torch.ones(2, 3)}, "has no 'c.q'"),
        ({"a.q": torch.ones(2, 3), "b.q": torch.ones(3, 2)}, r"'b.q' is \(2, 3\) there and \(3, 2\) here"),
    ],
)
def test_names_and_shapes_must_fit(tmp_path: Path, after: dict[str, Tensor], message: str) -> None:
    """A missing name, an extra one and another shape are errors that say which."""
    with pytest.raises(CheckpointError, match=message):
        spectrum_of(tmp_path, {"a.q": torch.ones(2, 3), "b.q": torch.ones(2, 3)}, after)


def test_a_name_that_comes_twice_is_an_error(tmp_path: Path) -> None:
    """A repeated name would count one update twice."""
    write_start(tmp_path / "s", named({"a.q": torch.ones(2, 3)}))
    with pytest.raises(CheckpointError, match="twice"):
        update_spectrum(tmp_path / "s", iter([("a.q", torch.ones(2, 3))] * 2))
    with pytest.raises(CheckpointError, match="twice"):
        write_start(tmp_path / "t", iter([("a.q", torch.ones(2, 3))] * 2))
    assert not (tmp_path / "t").exists()


def test_a_diverged_update_is_an_error(tmp_path: Path) -> None:
    """NaN has no spectrum; the error names the matrix."""
    with pytest.raises(NonFiniteError, match=r"a\.q"):
        spectrum_of(tmp_path, {"a.q": torch.ones(2, 2)}, {"a.q": torch.tensor([[1.0, float("nan")], [0.0, 1.0]])})


@pytest.mark.parametrize("threshold", [0.0, 1e-9, 1.0, float("nan")])
def test_a_threshold_in_the_noise_is_refused(tmp_path: Path, threshold: float) -> None:
    """Below 1e-6 of the largest, singular values are rounding."""
    with pytest.raises(ConfigError, match="threshold"):
        spectrum_of(tmp_path, {"a.q": torch.ones(2, 2)}, {"a.q": torch.ones(2, 2)}, threshold=threshold)


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 8, b"no safetensors at all"])
def test_an_unreadable_start_is_one_error(tmp_path: Path, content: bytes | None) -> None:
    """A missing or damaged start file is a CheckpointError that names it."""
    path = tmp_path / "start.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"start\.safetensors"):
        update_spectrum(path, iter(()))


# -- files -------------------------------------------------------------------------------------


def test_spectrum_survives_its_file(tmp_path: Path) -> None:
    """What is read back is what was written, singular values to six digits; a start at zero included."""
    before = {"l.0.q": noise(0, 5, 7), "l.0.v": torch.zeros(4, 4)}
    after = {"l.0.q": noise(1, 5, 7), "l.0.v": torch.ones(4, 4)}
    spectrum = spectrum_of(tmp_path, before, after, rank=2, restarts=1)
    assert spectrum.matrices[1].relative == float("inf")
    spectrum.save(tmp_path / "spectrum.json")
    again = Spectrum.load(tmp_path / "spectrum.json")
    assert again.to_json() == spectrum.to_json()
    assert (again.rank, again.restarts, again.bound, again.threshold) == (2, 1, 4, 0.01)
    for old, new in zip(spectrum.matrices, again.matrices, strict=True):
        assert (new.name, new.type, new.shape, new.rank) == (old.name, old.type, old.shape, old.rank)
        assert new.singular_values == pytest.approx(old.singular_values, rel=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1, "threshold": 0.01, "rank": null, "restarts": null, "matrices": [{"name": "x"}]}',
        '{"format": 1, "threshold": 0.01, "rank": null, "restarts": null, "matrices": [{"name": "x", "type": "x", '
        '"shape": [1, 1], "rank": 1, "frobenius": 1, "start_frobenius": 1, "singular_values": [NaN]}]}',
    ],
)
def test_a_damaged_spectrum_is_one_error(tmp_path: Path, text: str) -> None:
    """Whatever is wrong with spectrum.json, one error names the file."""
    (tmp_path / "spectrum.json").write_text(text)
    with pytest.raises(ReportError, match=r"spectrum\.json"):
        Spectrum.load(tmp_path / "spectrum.json")


@pytest.mark.parametrize("room", [8, 64, 1 << 16])
def test_start_file_is_plain_safetensors(tmp_path: Path, room: int) -> None:
    """Any reader of the format reads it, also when the names outgrow the room kept for them."""
    tensors = {f"a.{i}": noise(i, 3 + i, 300) for i in range(6)}
    tensors["bf16"] = noise(9, 4, 4, dtype=torch.bfloat16)
    tensors["turned"] = noise(8, 4, 6).T
    tensors["empty"] = torch.empty(0, 4)
    write_start(tmp_path / "start.safetensors", named(tensors), room=room)
    loaded = load_file(tmp_path / "start.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name].float()) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["start.safetensors"]


def test_moving_the_data_up_spans_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data longer than one piece is moved whole, also when pieces overlap their own place."""
    monkeypatch.setattr("trimtab.report.start._PIECE", 56)
    tensors = {f"weight.{i}": noise(i, 11, 13) for i in range(3)}
    write_start(tmp_path / "start.safetensors", named(tensors), room=8)
    loaded = load_file(tmp_path / "start.safetensors")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_spectrum_reads_a_file_of_the_safetensors_library(tmp_path: Path) -> None:
    """The start file may come from elsewhere."""
    save_file({"a.q": torch.zeros(3, 3)}, tmp_path / "s")
    assert update_spectrum(tmp_path / "s", iter([("a.q", torch.eye(3))])).matrices[0].rank == 3


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk is full, one line says so, the old file stays, and nothing is left beside it."""
    path = tmp_path / "start.safetensors"
    write_start(path, named({"a": torch.ones(2)}))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"start\.safetensors.*No space left") as caught:
        write_start(path, named({"a": torch.zeros(2)}))
    assert "\n" not in str(caught.value)
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["start.safetensors"]


def test_a_failure_half_way_leaves_no_file(tmp_path: Path) -> None:
    """When the weights stop coming, neither the file nor its temporary one exists."""

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(2, 2)
        raise RuntimeError("the model went away")

    with pytest.raises(RuntimeError, match="went away"):
        write_start(tmp_path / "start.safetensors", broken())
    assert list(tmp_path.iterdir()) == []


def test_saved_spectrum_is_strict_json(tmp_path: Path) -> None:
    """No NaN and no Infinity in the file: other programs read it, too."""
    spectrum_of(tmp_path, {"a.q": torch.zeros(2, 2)}, {"a.q": torch.eye(2)}).save(tmp_path / "spectrum.json")

    def refuse(token: str) -> None:
        raise AssertionError(token)

    value = json.loads((tmp_path / "spectrum.json").read_text(), parse_constant=refuse)
    assert value["types"][0]["relative"] is None
