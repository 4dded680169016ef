"""Deterministic measures of a piece of training: live bytes, saved bytes, FLOPs; and peak resident memory.

The first three give the same number on every machine. They see tensors: scratch space inside a
kernel is in none of them, but it is in the resident memory, which is measured in a process of its own.
"""

from __future__ import annotations

import gc
import inspect
import math
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

# -- live bytes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LiveBytes:
    """Bytes of all tensor storages: before a call, at most during it, and after it."""

    before: int
    peak: int
    after: int

    @property
    def above(self) -> int:
        """What the call needed at its peak beyond what existed before."""
        return self.peak - self.before


class LiveMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of tensors that exist, each once, while the mode is on.

    Every tensor that an operator returns is followed by a weak reference to its storage, so views share
    a count and a freed storage leaves it. Tensors without memory (meta, fake) are not counted.

    Args:
        existing: tensors to count from the start.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        for tensor in existing:
            self._follow(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._follow(value)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        if storage is None:
            return
        key, size = storage._cdata, storage.nbytes()
        if key not in self._references:
            self._references[key] = weakref.ref(storage, partial(self._forget, key))
            self._sizes[key] = 0
        self.live += size - self._sizes[key]  # a storage may have been resized
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, _: Any) -> None:
        del self._references[key]
        self.live -= self._sizes.pop(key)


def live_bytes(function: Callable[[], object], existing: Iterable[Tensor] | None = None) -> LiveBytes:
    """Peak live tensor bytes during `function()`.

    What the function returns is alive when `after` is read.

    Args:
        function: called once.
        existing: tensors that count as being there before; None takes every tensor that Python or a
            `.grad` can reach in this process.
    """
    gc.collect()
    meter = LiveMeter(reachable_tensors() if existing is None else existing)
    before = meter.live
    with meter:
        result = function()
    after = meter.live
    del result
    return LiveBytes(before, meter.peak, after)


def reachable_tensors() -> Iterator[Tensor]:
    """Every tensor that the garbage collector knows, and the gradients that hang on them."""
    for thing in gc.get_objects():
        # `isinstance` would ask proxies for their class, and run whatever they do then.
        if issubclass(type(thing), Tensor):
            yield thing
            if thing.is_leaf and thing.grad is not None:
                yield thing.grad


def _storage(tensor: Tensor) -> Any:
    """The storage of a strided tensor that holds memory, or None."""
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return None
    try:
        storage = tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):  # wrapper subclasses and functorch's tensors have none of their own
        return None
    return None if storage.device.type == "meta" else storage


# -- saved for backward ----------------------------------------------------------------------------


def saved_bytes(function: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of `function()`, unique storages counted once.

    Args:
        function: runs a forward; what it returns keeps the graph alive while it is counted.
        exclude: tensors whose storages are there anyway, such as a batch. Parameters never count.

    A storage counts whole, even if a small view of it was saved, because the view keeps it alive.
    """
    known = {storage._cdata for storage in map(_storage, exclude) if storage is not None}
    kept: dict[int, Any] = {}  # holds the storages, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage is not None and storage._cdata not in known and not _is_parameter(tensor):
            kept[storage._cdata] = storage
        return tensor.detach()  # an output that its own node saved would keep itself alive for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    total: int = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def _is_parameter(tensor: Tensor) -> bool:
    base = tensor._base if tensor._is_view() else tensor
    return isinstance(base, torch.nn.Parameter)


# -- FLOPs -----------------------------------------------------------------------------------------


def _product_flops(first: Sequence[int], second: Sequence[int]) -> int:
    """2 (batch) m k n of a product of the shapes (batch, m, k) and (batch, k, n)."""
    return 2 * math.prod(first) * int(second[-1])


def _in_place_product(_: Any, first: Sequence[int], second: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return _product_flops(first, second)


def _matrix_vector(matrix: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


def _in_place_matrix_vector(_: Any, matrix: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


def _scores(query: Sequence[int], key: Sequence[int]) -> int:
    """FLOPs of q k' over all heads of the queries (B, H, Q, E), for keys (B, G, K, E)."""
    return 2 * math.prod(query) * int(key[2])


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return _scores(query, key) + _scores((*query[:3], value[3]), key)


def _attention_backward(
    _: Any, query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """The scores again and the gradients of q and k; the gradients of the probabilities and of v: torch's rule."""
    return 3 * _scores(query, key) + 2 * _scores((*query[:3], value[3]), key)


# torch's counter knows mm, addmm, bmm and baddbmm, but not their in-place forms, which hand-written backwards use;
# and the fused attentions of CUDA, but not the CPU's.
_MORE_PRODUCTS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.addmm_: _in_place_product,
    torch.ops.aten.baddbmm_: _in_place_product,
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.addmv: _in_place_matrix_vector,
    torch.ops.aten.addmv_: _in_place_matrix_vector,
}


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions in `function()`.

    Those inside a custom autograd function count, in its forward and in its backward. A multiply-add is 2.
    """
    with FlopCounterMode(display=False, custom_mapping=dict(_MORE_PRODUCTS)) as counter:
        function()
    return int(counter.get_total_flops())


# -- resident memory -------------------------------------------------------------------------------

# Runs a script as __main__ and then writes this process's peak where the parent reads it.
# It imports nothing large itself: torch alone would be 200 MB of somebody else's peak.
_BOOTSTRAP = """
import os, runpy, sys
target, sys.argv = sys.argv[1], sys.argv[2:]
sys.path[:0] = [os.path.dirname(os.path.abspath(sys.argv[0])), {root!r}]
{measure}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open(target, "w") as file:
        file.write(str(own_peak_resident()))
"""


def own_peak_resident() -> int:
    """Peak resident bytes of this process since it began to run its program.

    On Linux this is VmHWM, not `ru_maxrss`: that one is inherited from the parent across fork and exec.
    """
    # Self-contained, since `peak_resident` runs this source in another process.
    import resource
    import sys

    platform: str = sys.platform
    if platform == "linux":
        with open("/proc/self/status") as status:
            found = next((int(line.split()[1]) for line in status if line.startswith("VmHWM:")), None)
        if found is not None:  # some sandboxes leave the line out
            return found * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform == "darwin" else peak * 1024


def peak_resident(script: Sequence[str | Path]) -> tuple[int, str]:
    """Peak resident bytes of a Python script in a process of its own, and what it printed.

    Args:
        script: the file and its arguments.

    Raises:
        RuntimeError: the script did not end with status 0; the message holds the end of its errors.
    """
    root = str(Path(__file__).resolve().parents[2])
    boot = _BOOTSTRAP.format(root=root, measure=inspect.getsource(own_peak_resident))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "peak.json"
        done = subprocess.run(
            [sys.executable, "-c", boot, str(target), *map(str, script)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{script[0]} ended with status {done.returncode}: {done.stderr[-2000:]}")
        return int(target.read_text()), done.stdout
