"""Selective recomputation: what a cheap operation can give again is not kept for the backward pass.

Autograd keeps the result of an activation or of a norm for the linear layer behind it, beside what the activation or
the norm keeps of its own input. Within `recomputing` such a result is kept as a recipe instead: the operation, and what
it was computed of. The backward pass computes it again, bit for bit, by operations without a matrix product in them
(Korthikanti et al. 2022, "Reducing activation recomputation in large Transformer models", where a block's cheap and
large parts are recomputed). A recipe is taken only where it holds fewer bytes that nothing else holds.

Two operations are replaced on the CPU, where torch's own keep much more: dropout, whose mask is drawn again from a
seed, and scaled dot-product attention with dropout, whose probabilities are computed again, product and all
(`dropattention`). Their random numbers are other ones than torch's.

What autograd cannot see is not seen here either: a tensor whose memory is written through `.data` or NumPy between the
operation and the backward pass. A result that the model's caller keeps anyway saves nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from trimtab.errors import ConfigError
from trimtab.nn.dropattention import attention
from trimtab.nn.dropping import can_drop, dropout, new_seed
from trimtab.nn.sdpa import Asked
from trimtab.nn.split import is_part

#: How many operations a recipe may run; GELU's approximation, written out, has eight.
_OPERATIONS = 12

#: Results below this many bytes are kept: to write a recipe takes longer than such an operation.
_SMALL = 2**15

#: When this many notes have come since, those that nothing can need any more are dropped.
_NOTES = 4096

#: A sum keeps neither part, so of two large ones a recipe would hold twice as much as the sum has.
_SUMS: frozenset[Any] = frozenset({torch.add, torch.sub, Tensor.add, Tensor.sub})

#: Stands for an argument that is not there any more.
_GONE: Any = object()

#: Without a product of matrices, and with the same result at every call.
_CHEAP: frozenset[Any] = frozenset(
    {
        *(F.gelu, F.silu, F.relu, F.softmax, F.layer_norm, F.rms_norm),
        *_SUMS,
        *(torch.mul, torch.div, torch.neg, torch.tanh, torch.sigmoid),
        *(torch.rsqrt, torch.pow, torch.square, torch.exp),
        *(Tensor.mul, Tensor.div, Tensor.neg, Tensor.tanh, Tensor.sigmoid),
        *(Tensor.rsqrt, Tensor.pow, Tensor.square, Tensor.exp),
        *(Tensor.to, Tensor.float, Tensor.type_as),
    }
)


#: Shape, strides and offset.
_Layout = tuple[tuple[int, ...], tuple[int, ...], int]


class _Kept:
    """A tensor that the graph holds, and the number of in-place changes at which it was seen."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def sources(self) -> Iterator[_Kept]:
        yield self

    def value(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was changed in place after "
                f"the forward pass used it: it is at version {self.tensor._version}, not {self.version}"
            )
        return self.tensor


class _Recipe:
    """An operation and its arguments; tensors among them are parts of what recipes give, or kept."""

    def __init__(self, function: Callable[..., Tensor], args: list[Any], kwargs: dict[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        #: How often it was packed and is yet to be asked for; and its result, from the first to the last of these.
        self.awaited = 0
        self._result: Tensor | None = None

    def sources(self) -> Iterator[_Kept]:
        for part in (*self.args, *self.kwargs.values()):
            if isinstance(part, _Kept | _Part):
                yield from part.sources()

    def result(self) -> Tensor:
        """The value, for one of those who wait for it: layers that read the same have it computed once."""
        value = self.value() if self._result is None else self._result
        self.awaited -= 1
        self._result = value if self.awaited > 0 else None
        return value

    def value(self) -> Tensor:
        return self.function(*map(_value, self.args), **{name: _value(part) for name, part in self.kwargs.items()})


class _Part:
    """A tensor that lies in the storage that a recipe fills, maybe in another shape than its result has."""

    def __init__(self, recipe: _Recipe, strides: tuple[int, ...], layout: _Layout) -> None:
        self.recipe, self.strides, self.layout = recipe, strides, layout

    def sources(self) -> Iterator[_Kept]:
        return self.recipe.sources()

    def value(self) -> Tensor:
        return self._of(self.recipe.value())

    def result(self) -> Tensor:
        return self._of(self.recipe.result())

    def _of(self, whole: Tensor) -> Tensor:
        if whole.stride() != self.strides:
            raise RuntimeError(f"recomputed with strides {whole.stride()} what had {self.strides}")
        return whole.as_strided(*self.layout)


def _value(part: Any) -> Any:
    return part.value() if isinstance(part, _Kept | _Part) else part


class _Seen:
    """A tensor that an operation was given, which it does not keep alive."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # A weak reference keeps a storage's address from being used again, so the address names this one storage.
        self.storage, self.address = _weak(storage), storage._cdata
        self.tensor, self.version = weakref.ref(tensor), tensor._version
        self.layout, self.dtype = _layout(tensor), tensor.dtype


class _Note:
    """How a result came about: it fills a storage of its own."""

    def __init__(
        self, result: Tensor, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.storage = _weak(result.untyped_storage())
        self.version, self.strides, self.dtype = result._version, result.stride(), result.dtype
        self.function = function
        self.args = [_seen(part) for part in args]
        self.kwargs = {name: _seen(part) for name, part in kwargs.items()}
        self.recipe: Callable[[], _Recipe | None] = lambda: None  # the one that was packed, while the graph holds it


def _seen(part: Any) -> Any:
    return _Seen(part) if isinstance(part, Tensor) else part


class _Budget:
    """The operations that a recipe may have yet: what is needed twice counts twice, as it is computed twice."""

    def __init__(self) -> None:
        self.left = _OPERATIONS

    def spend(self) -> bool:
        self.left -= 1
        return self.left >= 0


class _Memory:
    """What is known of a forward pass: how results came about, and what its graph holds; by storages' addresses."""

    def __init__(self) -> None:
        self.notes: dict[int, _Note] = {}
        self.held: dict[int, weakref.ref[_Kept]] = {}
        self.fresh = 0
        self.hook = self.pack  # one object, to be known by

    def note(self, result: Any, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember how a result came about, if it has a storage of its own and is worth it."""
        if not _plain(result) or not result.requires_grad or torch.is_autocast_enabled(result.device.type):
            return
        storage = result.untyped_storage()
        if storage.nbytes() < _SMALL:
            return
        if result.storage_offset() or storage.nbytes() != result.numel() * result.element_size():
            return
        tensors = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
        if not all(_plain(part) and part.untyped_storage()._cdata != storage._cdata for part in tensors):
            return
        if function in _SUMS and sum(part.numel() == result.numel() for part in tensors) > 1:
            return
        self.notes[storage._cdata] = _Note(result, function, args, kwargs)
        self.fresh += 1
        if self.fresh > max(_NOTES, len(self.notes) // 2):
            self._forget()

    def _forget(self) -> None:
        """Drop what no result that is alive can need: a context may last for many steps."""
        needed: dict[int, _Note] = {}
        asked = [address for address, note in self.notes.items() if not _expired(note.storage)]
        while asked:
            address = asked.pop()
            note = self.notes.get(address)
            if note is not None and address not in needed:
                needed[address] = note
                asked += [part.address for part in (*note.args, *note.kwargs.values()) if isinstance(part, _Seen)]
        self.notes = needed
        self.held = {address: kept for address, kept in self.held.items() if kept() is not None}
        self.fresh = 0

    def pack(self, tensor: Tensor) -> _Kept | _Part:
        """What autograd keeps in the place of a tensor."""
        if not _plain(tensor):
            return _Kept(tensor)
        storage = tensor.untyped_storage()
        note = self._note_of(storage._cdata, tensor._version, tensor.dtype)
        if note is not None and self._held(storage._cdata) is None:
            recipe = note.recipe() or self._recipe(note, _Budget())
            if recipe is not None:
                new = [kept for kept in recipe.sources() if self._held(_address(kept.tensor)) is None]
                sizes = {_address(kept.tensor): kept.tensor.untyped_storage().nbytes() for kept in new}
                if sum(sizes.values()) < storage.nbytes():
                    for kept in new:
                        self.held[_address(kept.tensor)] = weakref.ref(kept)
                    note.recipe = weakref.ref(recipe)
                    recipe.awaited += 1
                    return _Part(recipe, note.strides, _layout(tensor))
        kept = _Kept(tensor)
        if self._held(storage._cdata) is None:
            self.held[storage._cdata] = weakref.ref(kept)
        return kept

    def _held(self, address: int) -> _Kept | None:
        held = self.held.get(address)
        return None if held is None else held()

    def _note_of(self, address: int, version: int, dtype: torch.dtype) -> _Note | None:
        note = self.notes.get(address)
        return None if note is None or note.version != version or note.dtype != dtype else note

    def _recipe(self, note: _Note, budget: _Budget) -> _Recipe | None:
        """A recipe of what is held or alive now; None if a part of it is gone or was changed, or it is too long."""
        if not budget.spend():
            return None
        args = [self._source(part, budget) for part in note.args]
        kwargs = {name: self._source(part, budget) for name, part in note.kwargs.items()}
        gone = any(part is _GONE for part in (*args, *kwargs.values()))
        return None if gone else _Recipe(note.function, args, kwargs)

    def _source(self, seen: Any, budget: _Budget) -> Any:
        """An argument: what is held, or else a recipe, or else what is alive."""
        if not isinstance(seen, _Seen):
            return seen
        kept = self._held(seen.address)
        if kept is not None and kept.tensor._version == seen.version:
            return _Kept(kept.tensor.as_strided(*seen.layout)) if kept.tensor.dtype == seen.dtype else _GONE
        note = self._note_of(seen.address, seen.version, seen.dtype)
        if note is not None and (recipe := self._recipe(note, budget)) is not None:
            return _Part(recipe, note.strides, seen.layout)
        alive = seen.tensor()
        if alive is None or _address(alive) != seen.address or _layout(alive) != seen.layout:
            return _GONE
        return _Kept(alive) if alive.dtype == seen.dtype and alive._version == seen.version else _GONE


def _expired(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _layout(tensor: Tensor) -> _Layout:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _plain(tensor: Any) -> bool:
    """Whether a tensor is what its strided storage says, and nothing else."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        return False
    return not (tensor.is_complex() or tensor.is_neg() or tensor.is_nested or tensor.is_inference())


def _unpack(kept: _Kept | _Part) -> Tensor:
    with torch.no_grad():
        return kept.value() if isinstance(kept, _Kept) else kept.result()


class _Recording(TorchFunctionMode):
    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if not self._records():
            return func(*args, **kwargs)
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            found = attention(Asked(*args, **kwargs))
            return func(*args, **kwargs) if found is None else found
        result = func(*args, **kwargs)
        if func in _CHEAP:
            self.memory.note(result, func, args, kwargs)
        return result

    def _records(self) -> bool:
        """Whether what is called now belongs to the forward pass of this context, and of no other machinery.

        Activation checkpointing has hooks of its own, or no gradients, in the forward pass, and calls a block again in
        the backward pass, which no mode reaches: both must draw the same dropout. A compiler traces its own graph.
        """
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        return hooks is not None and hooks[0] is self.memory.hook

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        on_cpu = type(input) is Tensor and input.device.type == "cpu"
        if not on_cpu or not training or inplace or not can_drop(p) or not input.requires_grad:
            return F.dropout(input, p, training, inplace)
        seed = new_seed()
        result = dropout(input, p, seed)
        self.memory.note(result, dropout, (input, p, seed), {})
        return result


def _check(model: nn.Module) -> None:
    # What checkpointing and compiling leave on a module stands among its own attributes.
    inside = [module.__dict__ for module in model.modules()]
    if any(own.get("gradient_checkpointing") is True for own in inside):
        raise ConfigError(
            "selective recomputation does not go with activation checkpointing, which runs whole blocks again where "
            "other dropout would be drawn; switch one of them off (model.gradient_checkpointing_disable())"
        )
    if any("_orig_mod" in own["_modules"] or own.get("_compiled_call_impl") is not None for own in inside):
        raise ConfigError(
            "selective recomputation does not go with a compiled model: torch.compile chooses what to keep itself; "
            "leave one of them out"
        )
    if any(map(is_part, model.parameters())):
        raise ConfigError(
            "selective recomputation does not go with a model that FSDP or tensor parallelism splits, whose weights "
            "are not whole at every moment of the backward pass; train without it"
        )


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Within this context a forward pass keeps recipes where they are smaller; the backward pass may be outside.

        with trimtab.recomputing(model):
            loss = model(**batch).loss
        loss.backward()

    Loss and gradients are those without it, bit for bit, but for the random numbers of dropout on the CPU. Gradients of
    gradients are not to be had of attention with dropout.

    Args:
        model: what runs in the context; it is looked at and not changed.

    Raises:
        ConfigError: it is under activation checkpointing or compiled, or its parameters are split over processes.
    """
    _check(model)
    memory = _Memory()
    with torch.autograd.graph.saved_tensors_hooks(memory.hook, _unpack), _Recording(memory):
        yield
