"""The stacks of blocks of a Transformer, and hooks that run a stack without gradients and see what each block gives.

A block is called with gradients switched off: frozen parameters alone would not do, since a model may let the inputs
of its blocks require gradients (`enable_input_require_grads`). So autograd keeps nothing of a block, whatever the
model, and whoever listens gets each block's hidden states as soon as they are there.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.nn.swap import Swapped, put_on, take_off
from trimtab.nn.untraced import untraced


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after the other.

    Attributes:
        name: of the list that holds the blocks, in the model.
        owner_name: of the module that holds the list; empty for the model itself.
        owner: that module, whose forward runs the blocks.
        blocks: the list's elements, each once.
        calls: how many times a block is called in one forward; more than there are blocks where they are shared.
    """

    name: str
    owner_name: str
    owner: nn.Module
    blocks: tuple[nn.Module, ...]
    calls: int

    @property
    def shared(self) -> bool:
        """Whether a block runs more than once in a forward."""
        return self.calls != len(self.blocks)


def find_stacks(model: nn.Module, named: tuple[str, ...] = ()) -> list[Stack]:
    """The stacks of a model, in its order.

    Without names they are the outermost `nn.ModuleList`s whose elements are all of transformers'
    GradientCheckpointingLayer: the parts of a model that could be run again one at a time are its blocks.

    Args:
        model: any module.
        named: endings of the names of lists, instead.

    Raises:
        ConfigError: a name fits no list, or more than one; or nothing was found.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module)
    }
    if named:
        return [_stack(model, _one(lists, ending)) for ending in named]
    found = [name for name, module in lists.items() if isinstance(module, nn.ModuleList) and all(map(is_block, module))]
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if not outermost:
        raise ConfigError(
            f"{type(model).__name__} has no list of blocks that could be found; name it with "
            f"blocks=['<name>']. Its lists are: {', '.join(lists) or 'none'}"
        )
    return [_stack(model, name) for name in outermost]


def is_block(module: nn.Module) -> bool:
    """Whether a module is of transformers' class of blocks, told by name, so that nothing is imported."""
    return any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__)


def _one(lists: Mapping[str, nn.Module], ending: str) -> str:
    fits = [ending] if ending in lists else [name for name in lists if name.endswith(f".{ending}")]
    if len(fits) != 1:
        what = "no list of blocks" if not fits else f"{len(fits)} lists ({', '.join(fits)})"
        raise ConfigError(
            f"blocks: {ending!r} fits {what}; the model's lists are {', '.join(lists) or 'none'}"
            f"{'; give a longer ending' if fits else ''}"
        )
    return fits[0]


def _stack(model: nn.Module, name: str) -> Stack:
    entries = [module for module in model.get_submodule(name)._modules.values() if module is not None]
    blocks = tuple(dict.fromkeys(entries))  # a list may hold a block several times
    owner_name = name.rpartition(".")[0]
    owner = model.get_submodule(owner_name)
    config: Any = getattr(owner, "config", None) or getattr(model, "config", None)
    # A config that counts groups of layers says that the layers of a group are one module (ALBERT).
    shared = getattr(config, "num_hidden_groups", None) is not None
    return Stack(name, owner_name, owner, blocks, config.num_hidden_layers if shared else len(entries))


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model reads with an encoder and writes with a decoder; some with such a config have none."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and bool(_part(model, "decoder"))


def _part(model: nn.Module, kind: str) -> nn.Module | None:
    getter = getattr(model, f"get_{kind}", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) and found is not model else None


def part(model: nn.Module, kind: str) -> nn.Module:
    """The "encoder" or "decoder" of an encoder-decoder model.

    Raises:
        ConfigError: the model does not say which it is.
    """
    found = _part(model, kind)
    if found is None:
        raise ConfigError(
            f"{type(model).__name__} has no get_{kind}() that gives its {kind}, by which its blocks would be known; "
            "give its class one"
        )
    return found


class Listener(Protocol):
    """Who hears what the blocks of a stack give."""

    def begin(self) -> None:
        """Called before the first block of a forward."""

    def hear(self, number: int, phi: Tensor) -> Tensor | None:
        """Called after each block, in the grad mode of the caller.

        Args:
            number: of the call of a block, from 0.
            phi: its hidden states (B, S, d).

        Returns:
            What stands in the place of the hidden states; None leaves them.
        """


_RUNS = "runs"

#: Takes the number of a call and what its block gave; gives what is heard instead.
Through = Callable[[int, Tensor], Tensor]


class DepthHooks:
    """The hooks on one stack.

    Args:
        stack: whose blocks are run without gradients.
        listener: who hears of it. An object, and no closure, so that a copied model has a listener of its own.

    Attributes:
        through: what the hidden states go through on their way to the listener, if anything; the next block reads
            them as they were.
        form: how a block gave its hidden states last: 0 for a tensor, else the length of the tuple they led.
    """

    def __init__(self, stack: Stack, listener: Listener) -> None:
        self.stack = stack
        self._listener = listener
        self.through: Through | None = None
        self.form = 0
        self._done = 0
        self._grad = True
        #: The thread whose forward is under way; setdefault lets one thread alone in.
        self._claim: dict[str, int] = {}
        self._handles: list[Any] = []

    def put_on(self) -> None:
        """Hook the stack's owner and its blocks."""
        owner = self.stack.owner
        self._handles.append(owner.register_forward_pre_hook(self._before_stack))
        self._handles.append(owner.register_forward_hook(self._after_stack))
        for block in self.stack.blocks:
            put_on(block, _Guarded)
            block.guard_failed = self._after_failure  # type: ignore[assignment]
            self._handles.append(block.register_forward_pre_hook(self._before_block))
            self._handles.append(block.register_forward_hook(self._after_block))

    def take_off(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for block in self.stack.blocks:
            take_off(block, _Guarded)
            del block.__dict__["guard_failed"]
        self._claim.clear()
        self._done = 0

    @property
    def current(self) -> int:
        """The number of the block that runs now, or runs next."""
        return self._done

    @untraced
    def _before_stack(self, owner: nn.Module, args: Any) -> None:
        self._refuse_other(self._claim.get(_RUNS))
        self._done = 0

    def _after_stack(self, owner: nn.Module, args: Any, output: Any) -> None:
        self._claim.clear()
        if self._done != self.stack.calls:
            raise ConfigError(
                f"{self.stack.name}: {self._done} of {self.stack.calls} blocks ran in this forward; every block must "
                "run once and in order (no layer drop, no early exit)"
            )
        self._done = 0

    @untraced
    def _before_block(self, block: nn.Module, args: Any) -> None:
        self._claim_run()
        self._check_order(block)
        if self._done == 0:
            self._listener.begin()
        self._grad = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    def _claim_run(self) -> None:
        """A forward hands its states on from block to block, so there can be one at a time."""
        mine = threading.get_ident()
        self._refuse_other(self._claim.setdefault(_RUNS, mine))
        self._claim[_RUNS] = mine  # where the other one ended within a forward

    def _refuse_other(self, claimed: int | None) -> None:
        if claimed in (None, threading.get_ident()):
            return
        if any(thread.ident == claimed for thread in threading.enumerate()):
            raise ConfigError(
                f"{self.stack.name}: another thread is in the midst of a forward of this model; let one at a time run "
                "it (a lock), or give each thread a copy (copy.deepcopy)"
            )

    def _after_failure(self) -> None:
        """A block of this thread's forward failed or was interrupted."""
        if self._claim.get(_RUNS) == threading.get_ident():
            self._claim.clear()

    def _check_order(self, block: nn.Module) -> None:
        blocks = self.stack.blocks
        if not self.stack.shared and 0 < self._done < len(blocks) and block is blocks[self._done]:
            return
        if not any(one is block for one in blocks):
            raise ConfigError(
                f"{self.stack.name}: a copy of a block runs with the hooks of the model it was copied from, as "
                "nn.DataParallel makes them; use DDP (torch.nn.parallel.DistributedDataParallel)"
            )
        if block is blocks[0] and not self.stack.shared:
            self._done = 0  # a forward that was cut short is forgotten
        elif self._done >= self.stack.calls or not (self.stack.shared or block is blocks[self._done]):
            at = next(number for number, one in enumerate(blocks) if one is block)
            raise ConfigError(
                f"{self.stack.name}: block {at} ran where block {self._done} of {self.stack.calls} was due; every "
                "block must run once and in order (no layer drop, no early exit)"
            )

    @untraced
    def _after_block(self, block: nn.Module, args: Any, output: Any) -> Any:
        torch.set_grad_enabled(self._grad)
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor):
            raise ConfigError(
                f"{self.stack.name}: block {self._done} gives {type(output).__name__}, and hidden states must be a "
                "tensor, or the first of a tuple"
            )
        self.form = len(output) if isinstance(output, tuple) else 0
        changed = self._listener.hear(self._done, hidden if self.through is None else self.through(self._done, hidden))
        self._done += 1
        if self._done == self.stack.calls:
            self._claim.clear()
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


class _Guarded(Swapped):
    """Mixin of a block whose call ends in the grad mode it began in, whatever ends it.

    torch calls no hook after an interrupt (KeyboardInterrupt, SystemExit), so the hooks alone would leave gradients
    off in the whole process.
    """

    label = ""

    #: Called where it fails or is interrupted.
    guard_failed: Callable[[], None]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        grad = torch.is_grad_enabled()
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            self.guard_failed()
            raise
        finally:
            torch.set_grad_enabled(grad)


class _Still(Swapped):
    """Mixin of a module that stays in eval mode: its dropout is off whatever `model.train()` says."""

    label = ""

    #: The modes that the module and those in it would be in.
    still_modes: dict[nn.Module, bool] = {}  # noqa: RUF012

    def train(self, mode: bool = True) -> Any:
        self.still_modes = dict.fromkeys(self.still_modes, mode)
        return super().train(False)  # type: ignore[misc]


def still_parts(model: nn.Module, trained: set[int]) -> Iterator[nn.Module]:
    """The largest parts of a model's backbone that hold nothing that trains; heads are no part of it.

    Args:
        model: with or without a head.
        trained: ids of the parameters that train.
    """

    def parts(module: nn.Module) -> Iterator[nn.Module]:
        if module is not model and not any(id(p) in trained for p in module.parameters()):
            yield module
        else:
            for child in module.children():
                yield from parts(child)

    base = getattr(model, "base_model", model)  # transformers' name for a model without its head
    yield from dict.fromkeys(parts(base if isinstance(base, nn.Module) else model))


def keep_still(parts: Iterator[nn.Module]) -> list[nn.Module]:
    """Put modules into eval mode for good; returns them, for `let_go`."""
    held = list(parts)
    for module in held:
        modes: Any = {one: one.training for one in module.modules()}
        put_on(module, _Still)
        module.eval()
        module.still_modes = modes
    return held


def let_go(parts: list[nn.Module]) -> None:
    """Undo `keep_still`; each module gets the mode that it had, or that its model was brought into since."""
    for module in reversed(parts):
        modes: Any = module.__dict__.pop("still_modes")
        take_off(module, _Still)
        for one, mode in modes.items():
            one.training = mode


def stop_checkpointing(model: nn.Module) -> list[nn.Module]:
    """Switch activation checkpointing off where it is on, and say so; returns the modules, to switch it on again."""
    on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    if on:
        warnings.warn(
            "gradient checkpointing is switched off: nothing of the blocks is kept for a backward pass, so there is "
            "nothing to save by running them twice",
            stacklevel=2,
        )
    for module in on:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    return on
