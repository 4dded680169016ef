"""From the hooks of a stack to READ's network beside it, and from the encoder's network to the decoder's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.nn.sidenet import DepthRun, SideNetwork


class Link:
    """What passes from the encoder's network to the decoder's.

    Args:
        side: the decoder's network.

    Attributes:
        grad: whether the caller of the decoder wants gradients; in the blocks they are off, and in the tap on.
    """

    def __init__(self, side: SideNetwork) -> None:
        self.side = side
        self.grad = False
        self.clear()

    def clear(self) -> None:
        """Forget what was encoded."""
        self.found: Tensor | None = None
        self._states: Tensor | None = None
        self._h: Tensor | None = None
        self._values: tuple[tuple[Any, ...], Tensor] | None = None
        self._joined: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        """A copied model has encoded nothing yet."""
        return Link(copy.deepcopy(self.side, memo))

    def after_encoder(self, encoder: nn.Module, args: Any, output: Any) -> None:
        """Bind what was found in the encoder to the encoder's output."""
        states, found = output[0], self.found
        self.clear()
        if found is None or states.shape[:2] != found.shape[:2]:
            seen = "none" if found is None else tuple(found.shape[:2])
            raise ConfigError(
                f"{type(encoder).__name__} gives {tuple(states.shape)} after blocks of {seen} tokens, so the decoder's "
                "cross-attention does not see the blocks' tokens; use joiner='none'"
            )
        self._states, self._h = states, found

    def values(self, states: Tensor) -> Tensor:
        """The values of the cross-attention to these outputs of the encoder, formed once for all blocks."""
        if not self._gave(states):
            raise ConfigError(
                "the decoder was given encoder outputs that this model's encoder did not just compute, so what READ "
                "found in the encoder is not known for them; run the encoder again with the adapter at work, or "
                "attach READ with joiner='none'"
            )
        assert self._h is not None
        weight: Any = self.side.joiner_weight
        state = (weight._version, self.grad)
        if self._values is None or self._values[0] != state:
            with torch.set_grad_enabled(self.grad):
                self._values = (state, self.side.values(self._h))
        return self._values[1]

    def _gave(self, states: Tensor) -> bool:
        """Whether these are the encoder's outputs, or those with each sequence repeated, as beam search does."""
        if states is self._states:
            return True
        if self._states is None or self._h is None:
            return False
        mine, times = self._states.detach(), states.shape[0] // self._states.shape[0]
        if states.shape != (mine.shape[0] * times, *mine.shape[1:]) or states.dtype != mine.dtype:
            return False
        if not torch.equal(mine.to(states.device).repeat_interleave(times, dim=0), states):
            return False
        # The decoder asks again for each block, and for each token of a generated text.
        self._states, self._h, self._values = states, self._h.repeat_interleave(times, dim=0), None
        return True

    def take(self, block: int, joined: Tensor) -> None:
        """Keep what a block's cross-attention made of the values until the block has run."""
        self._joined = joined

    def handed(self) -> Tensor | None:
        """What was kept for the block that has just run."""
        joined, self._joined = self._joined, None
        return joined


class Reader:
    """Hears a stack, and advances its network.

    Args:
        run: of the stack's network.
        link: to the other stack.
    """

    def __init__(self, run: DepthRun, link: Link) -> None:
        self.run = run
        self.link = link

    def begin(self) -> None:
        self.link.grad = torch.is_grad_enabled()
        self.run.begin()

    def hear(self, number: int, phi: Tensor) -> Tensor | None:
        h = self.run.advance(number, phi, self.link.handed())
        if h is None:
            return None
        if self.run.side.output_weight is None:
            self.link.found = h
            return None
        return self.run.corrected(phi, h)
