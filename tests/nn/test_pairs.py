"""VeRA's shared matrices: what is drawn, that it is pinned, and that it is held once."""

from __future__ import annotations

import copy
import gc
import hashlib
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from models_for_tests import tiny_llama

from trimtab.nn.pairs import Pairs, draw, draw_peft

CPU = torch.device("cpu")
SHAPES = [(32, 32), (16, 32), (48, 32), (32, 48)]


def pairs(sliced: bool = False, seed: int = 0) -> Pairs:
    return Pairs(SHAPES, rank=8, seed=seed, sliced=sliced)


@pytest.mark.parametrize(("letter", "shape"), [("A", (8, 48)), ("B", (48, 8))])
def test_a_draw_is_pinned_to_an_algorithm(letter: str, shape: tuple[int, int]) -> None:
    """numpy's MT19937, seeded with 32 bits of the key's sha256, gives the same fp32 numbers to the last bit."""
    key = f"5\0{letter}\x0048".encode()
    seed = (int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1) & 0xFFFFFFFF
    raw = np.random.RandomState(seed)._bit_generator.random_raw(8 * 48) & 0xFFFFFF
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    expected = ((2.0 * raw + 1.0 - 2.0**24) * (bound / 2.0**24)).astype(np.float32).reshape(shape)
    assert np.array_equal(draw(letter, 48, 8, 5).numpy(), expected)  # type: ignore[arg-type]


def test_the_pinned_draw_has_not_moved() -> None:
    """The checksums that files of earlier versions hold."""
    small = Pairs([(4, 6)], rank=3, seed=0, sliced=False).checksums()
    assert {key: value[:16] for key, value in small.items()} == {"A6": "012bd6b3f60b6f2e", "B4": "323e861e3174d537"}


@pytest.mark.parametrize("width", [32, 512])
def test_each_matrix_is_scaled_for_its_own_fan_in(width: int) -> None:
    """Kaiming-uniform with gain sqrt(2): the variance is 2 / fan-in, which is in for A and r for B."""
    for letter, fan_in in (("A", width), ("B", 64)):
        matrix = draw(letter, width, 64, 0)  # type: ignore[arg-type]
        assert matrix.abs().max() <= math.sqrt(6 / fan_in)
        assert matrix.abs().max() > 0.99 * math.sqrt(6 / fan_in)
        assert matrix.square().mean().item() == pytest.approx(2 / fan_in, rel=0.05)
        assert abs(matrix.mean().item()) < 0.05 * math.sqrt(2 / fan_in)


def test_widths_letters_and_seeds_give_unrelated_draws() -> None:
    """No two matrices of a model are one stream of numbers, and another seed gives another pair."""
    drawn = [draw("A", 48, 48, 0), draw("B", 48, 48, 0), draw("A", 48, 48, 1), draw("A", 64, 48, 0)[:, :48]]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.1


def test_the_sliced_pair_is_that_of_peft() -> None:
    """Bit for bit, for layers of which none has both the largest width in and the largest width out."""
    peft = pytest.importorskip("peft")
    for key in (0, 7):
        config = peft.VeraConfig(r=8, target_modules="all-linear", projection_prng_key=key)
        theirs = peft.get_peft_model(tiny_llama(), config).base_model
        ours = draw_peft(8, pairs().largest, key)
        assert torch.equal(theirs.vera_A["default"], ours["A"])
        assert torch.equal(theirs.vera_B["default"], ours["B"])


@pytest.mark.parametrize("sliced", [False, True])
def test_a_matrix_is_held_once_and_as_long_as_a_layer_holds_it(sliced: bool) -> None:
    """Who asks for the same gets the same tensor; with the last holder it is gone."""
    shared = pairs(sliced)
    first = shared.get("A", 32, CPU, torch.bfloat16)
    assert shared.get("A", 32, CPU, torch.bfloat16) is first
    assert shared.get("A", 32, CPU, torch.float32) is not first
    assert torch.equal(shared.get("A", 32, CPU, torch.float32).bfloat16(), first)
    wider = shared.get("A", 48, CPU, torch.bfloat16)
    assert (wider.untyped_storage()._cdata == first.untyped_storage()._cdata) == sliced
    assert torch.equal(wider[:, :32], first) == sliced
    alive = [weakref.ref(first), weakref.ref(wider)]
    del first, wider
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert len(shared._live) == 0


@pytest.mark.parametrize("sliced", [False, True])
def test_copies_and_pickles_draw_the_same(sliced: bool) -> None:
    """A copy is a Pairs of its own with the same numbers."""
    shared = pairs(sliced, seed=3)
    held = shared.get("B", 48, CPU, torch.float32)
    for other in (copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        assert torch.equal(other.get("B", 48, CPU, torch.float32), held)
        assert other.checksums() == shared.checksums()


def test_checksums_are_of_the_fp32_bytes() -> None:
    """One for each matrix; any change of a seed or of a value changes it."""
    shared = pairs()
    expected = hashlib.sha256(draw("B", 16, 8, 0).numpy().astype("<f4").tobytes()).hexdigest()
    assert list(shared.checksums()) == ["A32", "A48", "B16", "B32", "B48"]
    assert shared.checksums()["B16"] == expected
    assert not set(shared.checksums().values()) & set(pairs(seed=1).checksums().values())
    assert list(pairs(sliced=True).checksums()) == ["A48", "B48"]


def test_a_given_pair_is_used_where_it_differs() -> None:
    """What the seed gives anyway is not kept; another pair replaces it; a wrong shape is refused."""
    shared = pairs(sliced=True)
    seeded = draw_peft(8, shared.largest, 0)
    before = shared.get("A", 32, CPU, torch.float32)
    assert not shared.give({k: v.clone() for k, v in seeded.items()})
    assert shared.get("A", 32, CPU, torch.float32) is before
    assert shared.give({"A": seeded["A"] + 1, "B": seeded["B"]})
    assert torch.equal(shared.get("A", 32, CPU, torch.float32), seeded["A"][:, :32] + 1)
    with pytest.raises(ValueError, match=r"vera_A is \(8, 32\), and the layers need \(8, 48\)"):
        shared.give({"A": seeded["A"][:, :32], "B": seeded["B"]})
    assert torch.equal(pairs(sliced=True).get("A", 32, CPU, torch.float32), before)


def test_the_meta_device_draws_nothing() -> None:
    """A model without memory gets matrices without memory, of the right shapes."""
    for sliced in (False, True):
        meta = pairs(sliced).get("A", 32, torch.device("meta"), torch.bfloat16)
        assert meta.is_meta and meta.shape == (8, 32) and meta.dtype == torch.bfloat16
