"""Sharing what several layers make of one input: when it is shared, when it is not, when it is let go."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.nn.reading import _READINGS, share


class Layers:
    """Readers of inputs with one matrix; counts the products."""

    def __init__(self) -> None:
        self.matrix = torch.randn(3, 4)
        self.followers: dict[str, set[str]] = {}
        self.products = 0

    def read(self, name: str, x: Tensor) -> Tensor:
        def make() -> Tensor:
            self.products += 1
            with torch.no_grad():
                return x.detach() @ self.matrix.t()

        u = share(make, x, self.matrix, x.dtype, reader=name, followers=self.followers)
        with torch.no_grad():
            assert torch.equal(u, x.detach() @ self.matrix.t())  # never a wrong one, whatever happened before
        return u

    def forward(self, x: Tensor, names: str = "qkv") -> list[Tensor]:
        return [self.read(name, x) for name in names]


@pytest.fixture(autouse=True)
def _nothing_is_left_over() -> None:
    gc.collect()
    _READINGS.by_id.clear()


def test_one_product_for_all_readers_from_the_first_forward_on() -> None:
    """q, k and v of an input take one product, also the first time."""
    layers = Layers()
    for step in range(1, 4):
        layers.forward(torch.randn(5, 4))
        assert layers.products == step
    assert layers.followers == {"q": {"k", "v"}}


def test_u_goes_with_the_last_reader_although_x_lives_on() -> None:
    """Once the group is known, nothing of u is held after its last reader, and a lone reader holds nothing."""
    layers = Layers()
    layers.forward(torch.randn(5, 4))
    layers.forward(torch.randn(5, 4), "o")
    x = torch.randn(5, 4)
    u = layers.read("q", x)
    alive = weakref.ref(u)
    del u
    gc.collect()
    assert alive() is not None  # k and v are still to come
    layers.forward(x, "kv")
    gc.collect()
    assert alive() is None
    lone = weakref.ref(layers.read("o", y := torch.randn(5, 4)))
    assert lone() is None and y is not None


def test_u_goes_with_x_while_the_group_is_unknown() -> None:
    """In the first forward nobody knows who is to come, so u lives as long as x and no longer."""
    layers = Layers()
    x = torch.randn(5, 4)
    alive = weakref.ref(layers.forward(x)[0])
    assert alive() is not None
    del x
    gc.collect()
    assert alive() is None
    assert not _READINGS.by_id


def test_a_changed_input_is_read_anew() -> None:
    """In-place changes raise the version; a swapped storage is seen as well."""
    layers = Layers()
    x = torch.randn(5, 4)
    layers.read("q", x)
    x.add_(1)
    layers.read("k", x)
    assert layers.products == 2
    x.data = torch.randn(5, 4)
    layers.read("v", x)
    assert layers.products == 3


def test_an_equal_address_is_not_the_same_input() -> None:
    """A tensor in a freed one's place, a view of the same memory, and a stale note under the same id are new inputs."""
    layers, place = Layers(), np.random.default_rng(0).standard_normal((5, 4), dtype=np.float32)
    x = torch.from_numpy(place)
    layers.read("q", x)
    view = x[:]
    layers.read("k", view)
    assert layers.products == 2 and view.data_ptr() == x.data_ptr()
    _READINGS.by_id[id(view)] = _READINGS.by_id.pop(id(x))
    layers.read("v", view)
    assert layers.products == 3
    del x, view
    place[:] = 1.0
    layers.read("v", torch.from_numpy(place))
    assert layers.products == 4


def test_another_matrix_or_dtype_is_another_product() -> None:
    """A new pair, as after `.to()`, and another compute dtype, as under autocast, never meet an old u."""
    layers = Layers()
    x = torch.randn(5, 4)
    layers.read("q", x)
    layers.matrix = torch.randn(3, 4)
    layers.read("k", x)
    assert layers.products == 2
    share(
        lambda: x.bfloat16() @ layers.matrix.bfloat16().t(), x, layers.matrix, torch.bfloat16, reader="v", followers={}
    )
    layers.read("v", x)
    assert layers.products == 3


def test_a_changed_order_is_right_and_learnt() -> None:
    """Readers that come first, late, twice, or not at all: always right, and one product once it is known."""
    layers = Layers()
    for names in ("qk", "kq", "vqk", "q", "qkv", "qqkk", "k", "qkvo"):
        layers.forward(torch.randn(5, 4), names)
    layers.products = 0
    for names in ("qkvo", "kq", "vqk"):
        layers.forward(torch.randn(5, 4), names)
    assert layers.products == 3


def test_a_late_reader_is_awaited_the_next_time() -> None:
    """A group that turns out larger than it was is shared whole from the next forward on."""
    layers = Layers()
    layers.forward(torch.randn(5, 4), "qk")
    layers.forward(torch.randn(5, 4), "qkv")
    assert layers.products == 3  # v came after u was dropped
    layers.forward(torch.randn(5, 4), "qkv")
    assert layers.products == 4


def test_an_input_that_is_kept_can_be_read_by_forward_after_forward() -> None:
    """A static input, as of a captured graph or a test: one product a forward, and nothing is held in between."""
    layers, x = Layers(), torch.randn(5, 4)
    layers.forward(torch.randn(5, 4))
    for step in range(2, 5):
        alive = weakref.ref(layers.forward(x)[0])
        assert layers.products == step and alive() is None


def test_an_exception_in_the_middle_leaves_nothing_behind() -> None:
    """A forward that breaks off holds u no longer than x, and the next one is right."""
    layers = Layers()
    layers.forward(torch.randn(5, 4))

    def broken() -> weakref.ref[Tensor]:
        x = torch.randn(5, 4)
        try:
            alive = weakref.ref(layers.read("q", x))
            raise RuntimeError
        except RuntimeError:
            return alive

    alive = broken()
    gc.collect()
    assert alive() is None and not _READINGS.by_id
    layers.forward(torch.randn(5, 4))
    assert layers.products == 3


def test_a_long_lived_input_is_shared_across_blocks() -> None:
    """An encoder's output that every decoder block reads, between inputs of their own, is read once."""
    layers = Layers()
    for _ in range(2):
        encoded, layers.products = torch.randn(5, 4), 0
        for block in range(3):
            layers.forward(torch.randn(2, 4), "qkv")
            layers.forward(encoded, f"{block * 2}{block * 2 + 1}")
        assert layers.products == 3 + 1
    reading = _READINGS.by_id[id(encoded)]
    assert reading.made is None  # dropped after the last block


def test_inference_mode_shares_nothing() -> None:
    """Inference tensors have no version, and a u made in inference mode must not reach training."""
    layers = Layers()
    x = torch.randn(5, 4)
    with torch.inference_mode():
        layers.forward(x)
        layers.forward(torch.randn(5, 4))
        inside = torch.randn(5, 4)
    assert layers.products == 6
    assert not layers.read("k", x).is_inference()
    layers.forward(inside)
    assert layers.products == 10


def test_u_of_a_pass_without_gradients_serves_one_with_them() -> None:
    """u has no history, so it does not matter in which mode it was made."""
    layers = Layers()
    x = torch.randn(5, 4, requires_grad=True)
    with torch.no_grad():
        layers.read("q", x)
    u = layers.read("k", x)
    assert layers.products == 1 and not u.requires_grad


def test_threads_do_not_see_each_other() -> None:
    """Several threads on the same layers and inputs at once: every u is right, and none is left behind."""
    layers, wrong = Layers(), []
    x = torch.randn(50, 4)

    def work() -> None:
        try:
            for _ in range(200):
                layers.forward(torch.randn(5, 4))
                layers.forward(x, "kqv")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not _READINGS.by_id


def test_nothing_is_shared_under_torch_func() -> None:
    """Its tensors have no storage to tell them by."""
    layers = Layers()

    def f(x: Tensor) -> Tensor:
        for name in "qk":
            share(lambda: layers.matrix, x, layers.matrix, x.dtype, reader=name, followers=layers.followers)
        return x.sum()

    assert torch.equal(torch.func.grad(f)(torch.ones(2, 4)), torch.ones(2, 4))
    assert not layers.followers


def test_a_write_past_autograd_is_the_limit() -> None:
    """The versions see every write but that through .data, as the module says."""
    layers = Layers()
    x = torch.randn(5, 4)
    first = layers.read("q", x)
    version = x._version
    x.data.mul_(2)
    assert x._version == version
    stale = share(lambda: first * 2, x, layers.matrix, x.dtype, reader="k", followers=layers.followers)
    assert stale is first
    with torch.no_grad():
        x.mul_(2)
    assert layers.read("v", x) is not first
