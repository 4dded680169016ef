import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.data.order import Order

SIZES = st.one_of(
    st.integers(1, 600),
    st.integers(1, 11).flatmap(lambda b: st.sampled_from([2**b - 1, 2**b, 2**b + 1])),
)


@given(SIZES, st.integers(0, 2**70), st.integers(0, 10**6))
def test_an_epoch_holds_every_sample_once(n: int, seed: int, epoch: int) -> None:
    """Within one epoch the order is a bijection, for any size, seed and epoch."""
    seen = Order(n, seed).indices(np.arange(epoch * n, (epoch + 1) * n))
    assert np.array_equal(np.sort(seen), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 1023, 1024, 1025])
def test_small_and_awkward_sizes_are_bijections(n: int) -> None:
    """Sizes beside powers of two, where cycle walking has most and least to do, stay bijections."""
    order = Order(n, 5)
    for epoch in range(5):
        assert sorted(order.indices(np.arange(epoch * n, (epoch + 1) * n)).tolist()) == list(range(n))


def test_epochs_and_seeds_differ() -> None:
    """Another epoch or another seed gives another order; the same ones give the same."""
    n = 1000
    positions = np.arange(n)
    first = Order(n, 0).indices(positions)
    assert np.array_equal(first, Order(n, 0).indices(positions))
    for other in (Order(n, 0).indices(positions + n), Order(n, 1).indices(positions), positions):
        assert np.mean(first == other) < 0.02  # two random orders of 1000 agree in one place on average


def test_every_order_of_three_occurs_about_equally_often() -> None:
    """Over many epochs all six orders of three samples come up, none rare: the permutation is not a mere shift."""
    drawn = Order(3, 7).indices(np.arange(3 * 1200)).reshape(-1, 3)
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 120  # 200 expected


def test_neighbours_are_scattered() -> None:
    """Neighbouring positions give samples as far apart as chance would have them: n/3 on average."""
    n = 10_000
    gaps = np.abs(np.diff(Order(n, 3).indices(np.arange(n))))
    assert 0.31 < gaps.mean() / n < 0.36


@given(st.integers(0, 50), st.integers(0, 3 * 10**9))
def test_a_seek_at_a_thousand_million_is_direct(seed: int, position: int) -> None:
    """At n = 10^9 a single position is computed without the others, in range, and equals the vectorised value."""
    order = Order(10**9, seed)
    one = order.index(position)
    assert 0 <= one < 10**9
    assert one == order.indices(np.array([[7, position], [position, 9]]))[0, 1]


def test_the_order_never_changes() -> None:
    """The order is part of what a checkpoint relies on: these values were recorded once."""
    recorded = [334529377, 781104833, 934518387, 229380059]
    assert Order(10**9, 42).indices(np.array([0, 1, 10**9, 5 * 10**9 + 3])).tolist() == recorded


def test_bad_sizes_and_positions_are_errors() -> None:
    """An empty order and a negative position are refused."""
    with pytest.raises(ValueError, match="n=0"):
        Order(0, 1)
    with pytest.raises(ValueError, match="never negative"):
        Order(3, 1).index(-1)
