"""The side network of Ladder Side-Tuning, run rung by rung as a frozen stack runs.

Legend: B sequences, S tokens of each, d width of the hidden states, r the reduction, phi_0 what the first block reads,
phi_j what block j gives, K the kept blocks.

    s <- D_0 phi_0
    for j in K:   s <- block_j(m_j s + (1 - m_j) D_j phi_j),   m_j = sigmoid(a_j / T)
    phi_N' = phi_N + U norm(s)

Blocks and norm are of the model's own classes, d/r wide; D (d -> d/r) and U (d/r -> d) have biases. A side block is
called as the block of the same number was: with its masks and positions, without its cache. What is a function of the
width of a head (rotary embeddings) is replaced by what the side network's own module gives for the same arguments, and
the encoder's outputs by those of the side network beside the encoder.
"""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.nn.encoded import Encoded
from trimtab.nn.precision import cast_linear
from trimtab.nn.stacks import Stack
from trimtab.nn.virtual import named_arguments

#: What blocks of all families call a cache, and the encoder's outputs.
CACHES = ("past_key_values", "past_key_value", "layer_past")
ENCODER = "encoder_hidden_states"


class LadderNetwork(nn.Module):
    """The trained network beside one stack.

    Args:
        blocks: the side blocks, by the number of the block that each stands beside.
        norm: behind the last side block, where the stack has one.
        rotary: modules that give rotary embeddings, by their names in the stack's owner.
        width: d.
        narrow: d/r.
        correct: whether there is a U.

    D, and U where there is one, are zero; the gates are at one half.
    """

    def __init__(
        self,
        blocks: Mapping[int, nn.Module],
        norm: nn.Module | None,
        rotary: Mapping[str, nn.Module],
        *,
        width: int,
        narrow: int,
        correct: bool,
    ) -> None:
        super().__init__()
        self.kept = tuple(blocks)
        self.blocks = nn.ModuleList(blocks.values())
        self.norm = norm
        self.rotary = nn.ModuleDict({name.replace(".", "-"): module for name, module in rotary.items()})
        self.gates = nn.Parameter(torch.zeros(len(self.kept)))

        def linear(into: int, out: int) -> nn.Linear:
            made = nn.Linear(into, out, device="meta").to_empty(device="cpu")  # draws nothing
            for parameter in made.parameters():
                nn.init.zeros_(parameter)
            return made

        #: D_0, and D_j in the order of `kept`.
        self.downs = nn.ModuleList(linear(width, narrow) for _ in range(1 + len(self.kept)))
        self.up = linear(narrow, width) if correct else None

    def draw_downs(self, generator: torch.Generator) -> None:
        """Draw every D as torch draws linear layers, with biases of zero."""
        for down in self.downs:
            weight: Any = down.weight
            bound = weight.shape[1] ** -0.5
            with torch.no_grad():
                weight.uniform_(-bound, bound, generator=generator)

    def select(self, kept: Tensor) -> None:
        """Let every D hand over the coordinates `kept` (d/r) of the hidden states as they are."""
        for down in self.downs:
            weight: Any = down.weight
            with torch.no_grad():
                weight.zero_()[torch.arange(len(kept)), kept] = 1.0

    def rotary_beside(self, owner: nn.Module) -> dict[nn.Module, nn.Module]:
        """The modules that give rotary embeddings, by those of the stack's owner."""
        return {owner.get_submodule(name.replace("-", ".")): module for name, module in self.rotary.items()}


class LadderRun:
    """A side network in the forward of its stack: hears the blocks, and the calls that they get.

    Args:
        side: the network.
        stack: the stack.
        temperature: T.
        dtype: that the stack computes in.
        configs: of the model and of the side blocks, which take over the attention implementation, since the masks
            that they get are made for it.
        encoded: what passes from encoder to decoder; None in models of one stack.
    """

    def __init__(
        self,
        side: LadderNetwork,
        stack: Stack,
        temperature: float,
        dtype: torch.dtype,
        configs: tuple[Any, Any],
        encoded: Encoded | None,
    ) -> None:
        self.side, self.stack, self.temperature, self.dtype = side, stack, temperature, dtype
        self.configs, self.encoded = configs, encoded
        self._handles: list[Any] = []
        self._tried = False
        self._forget()

    def _forget(self) -> None:
        """Drop what belongs to one forward."""
        self._s: Tensor | None = None
        self._call: dict[str, Any] = {}
        #: By the identity of what the backbone's rotary modules gave: that thing, and what stands in its place.
        self._rotated: dict[int, tuple[Any, Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LadderRun:
        """A copy for a copied model: what a forward left behind is no part of it."""
        side, stack, configs = copy.deepcopy((self.side, self.stack, self.configs), memo)
        return LadderRun(side, stack, self.temperature, self.dtype, configs, copy.deepcopy(self.encoded, memo))

    # -- what it sees of a forward -------------------------------------------------------------

    def put_on(self) -> None:
        """Hook the stack's owner, its rotary modules and its blocks."""
        owner = self.stack.owner
        self._handles.append(owner.register_forward_pre_hook(self._before_stack))
        for module in self.side.rotary_beside(owner):
            self._handles.append(module.register_forward_hook(self._after_rotary, with_kwargs=True))
        for block in self.stack.blocks:
            self._handles.append(block.register_forward_pre_hook(self._before_block, with_kwargs=True))

    def take_off(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _before_stack(self, owner: nn.Module, args: Any) -> None:
        self._forget()

    def _after_rotary(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        mine = self.side.rotary_beside(self.stack.owner)[module](*args, **kwargs)
        self._rotated[id(output)] = output, mine
        if isinstance(output, tuple):
            self._rotated.update({id(part): (part, own) for part, own in zip(output, mine, strict=True)})

    def _before_block(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self._call = named_arguments(block, args, kwargs)
        if block is self.stack.blocks[0]:
            self._refuse_cache()

    def _refuse_cache(self) -> None:
        """The side network keeps no cache: it must see all tokens in each forward.

        Raises:
            ConfigError: the call comes with a cache that holds earlier tokens, or has room for later ones.
        """
        for name in CACHES:
            cache = self._call.get(name)
            if cache is None:
                continue
            fixed = getattr(cache, "is_compileable", False)
            if fixed or not hasattr(cache, "get_seq_length") or cache.get_seq_length():
                raise ConfigError(
                    f"{name} holds tokens that are not in this call, and Ladder's side network, which has no cache, "
                    "must see them all: call generate(..., use_cache=False), or the model without a cache"
                )

    # -- what it computes ----------------------------------------------------------------------

    def begin(self) -> None:
        self._s = None
        config, own = self.configs
        if own._attn_implementation != config._attn_implementation:  # somebody changed it
            own._attn_implementation = config._attn_implementation

    def hear(self, number: int, phi: Tensor) -> Tensor | None:
        given, self._call = self._call, {}
        first = next(iter(given))
        if number == 0:
            self._s = self._down(0, given[first])
        assert self._s is not None
        if number in self.side.kept:
            at = self.side.kept.index(number)
            gate = torch.sigmoid(self.side.gates[at] / self.temperature)
            below = self._down(1 + at, phi)
            s = self._s.to(below.device, below.dtype)
            mixed = torch.lerp(below, s, gate.to(below.device, below.dtype))
            self._s = self._climb(at, mixed, {name: value for name, value in given.items() if name != first})
        if number < self.stack.calls - 1:
            return None
        s = self._s.to(phi.device)
        self._forget()
        if self.side.norm is not None:
            s = self.side.norm(s)
        if self.side.up is None:
            assert self.encoded is not None
            self.encoded.found = s
            return None
        delta = cast_linear(s, self.side.up.weight, self.side.up.bias, self.dtype)
        return phi.detach() + delta.to(phi.dtype)

    def _down(self, at: int, phi: Tensor) -> Tensor:
        """D phi (B, S, d/r), on phi's device; nothing flows back into phi."""
        down: Any = self.side.downs[at]
        return cast_linear(phi.detach(), down.weight, down.bias, self.dtype)

    def _climb(self, at: int, x: Tensor, given: dict[str, Any]) -> Tensor:
        """Side block `at` of x (B, S, d/r), called as the block beside it was."""
        block = self.side.blocks[at]
        given = {name: self._in_place_of(name, value) for name, value in given.items()}
        # In a context of its own, so that who collects the hidden states of the model does not collect these.
        context = contextvars.Context()
        try:
            out: Any = context.run(block, x, **given)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if self._tried:
                raise
            raise ConfigError(
                f"{self.stack.name}: block {self.side.kept[at]} of the side network, {x.shape[-1]} wide, cannot run as "
                f"the model's does ({error}); try another reduction, or another method"
            ) from error
        self._tried = True
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    def _in_place_of(self, name: str, value: Any) -> Any:
        """What a side block gets where its neighbour got `value`."""
        if name in CACHES:
            return None
        if name == "use_cache":
            return False
        if name == ENCODER and value is not None:
            if self.encoded is None:
                raise ConfigError(
                    f"{self.stack.name} attends to {ENCODER} of another model, for which Ladder has no side network; "
                    "use another method"
                )
            return self.encoded.of(value)
        if id(value) in self._rotated:
            return self._rotated[id(value)][1]
        if isinstance(value, tuple):
            return tuple(self._in_place_of("", part) for part in value)
        return value
