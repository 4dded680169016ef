"""From the hooks of a stack to READ's network beside it, and from the encoder's network to the decoder's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from trimtab.nn.encoded import Encoded
from trimtab.nn.sidenet import DepthRun, SideNetwork


class Link(Encoded):
    """What passes from the encoder's network to the decoder's.

    Args:
        side: the decoder's network.

    Attributes:
        grad: whether the caller of the decoder wants gradients; in the blocks they are off, and in the tap on.
    """

    method = "READ"
    without = "joiner='none'"

    def __init__(self, side: SideNetwork) -> None:
        self.side = side
        self.grad = False
        super().__init__()

    def clear(self) -> None:
        super().clear()
        self._values: tuple[tuple[Any, ...], Tensor] | None = None
        self._joined: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        """A copied model has encoded nothing yet."""
        return Link(copy.deepcopy(self.side, memo))

    def values(self, states: Tensor) -> Tensor:
        """The values of the cross-attention to these outputs of the encoder, formed once for all blocks.

        Raises:
            ConfigError: the encoder did not just compute them.
        """
        h = self.of(states)
        weight: Any = self.side.joiner_weight
        state = (id(h), weight._version, self.grad)
        if self._values is None or self._values[0] != state:
            with torch.set_grad_enabled(self.grad):
                self._values = (state, self.side.values(h))
        return self._values[1]

    def begin(self, grad: bool) -> None:
        """A forward of a stack begins.

        With gradients each forms the values anew: optimizers (fused ones) may move the weight and not its version.
        """
        if grad or self.grad:
            self._values = None
        self.grad = grad

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
        self.link.begin(torch.is_grad_enabled())
        self.link.handed()  # what a forward left that was cut short in a block
        self.run.begin()

    def hear(self, number: int, phi: Tensor) -> Tensor | None:
        h = self.run.advance(number, phi, self.link.handed())
        if h is None:
            return None
        if self.run.side.output_weight is None:
            self.link.found = h
            return None
        return self.run.corrected(phi, h)
