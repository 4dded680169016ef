"""What a network beside a frozen encoder found, bound to the encoder's output until the decoder asks for it."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError


class Encoded:
    """From the network beside an encoder to the one beside the decoder.

    Attributes:
        found: (B, S, any) what the encoder's network gave last, until the encoder has ended.
        method: whose networks they are.
        without: how to do without the encoder's, as the end of an error message.
    """

    method: ClassVar[str] = "the adapter"
    without: ClassVar[str] = ""

    def __init__(self) -> None:
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoded:
        """A copied model has encoded nothing yet; both of its networks get the same one."""
        return type(self)()

    def clear(self) -> None:
        """Forget what was encoded."""
        self.found: Tensor | None = None
        self._bound: _Bound | None = None
        #: The same for what the decoder was called with last, cast or with each sequence repeated.
        self._last: _Bound | None = None
        self._within = False

    def before_model(self, model: nn.Module, args: Any) -> None:
        """A forward pre-hook of the model."""
        self._within = False

    def after_model(self, model: nn.Module, args: Any, output: Any) -> None:
        """A forward hook of the model: an encoder's output of a training step is of no use after it.

        Kept is what a generation goes on with, and what the caller had the encoder alone compute.
        """
        if self._within and torch.is_grad_enabled():
            self.clear()

    def after_encoder(self, encoder: nn.Module, args: Any, output: Any) -> None:
        """Bind what was found in the encoder to the encoder's output; a forward hook of the encoder.

        Raises:
            ConfigError: the output is not of the tokens that the blocks saw.
        """
        states, found = output[0], self.found
        self.clear()
        if found is None or states.shape[:2] != found.shape[:2]:
            seen = "none" if found is None else tuple(found.shape[:2])
            raise ConfigError(
                f"{type(encoder).__name__} gives {tuple(states.shape)} after blocks of {seen} tokens, so the decoder's "
                f"cross-attention does not see the blocks' tokens{f'; use {self.without}' if self.without else ''}"
            )
        self._bound = _Bound(states, _version(states), found)
        self._within = True

    def of(self, states: Tensor) -> Tensor:
        """What was found for these outputs of the encoder.

        Raises:
            ConfigError: the encoder did not just compute them.
        """
        for bound in (self._last, self._bound):
            if bound is not None and states is bound.states and _version(states) == bound.version:
                return bound.h
        h = self._repeated(states)
        if h is None:
            raise ConfigError(
                "the decoder was given encoder outputs that this model's encoder did not just compute, so what "
                f"{self.method} found in the encoder is not known for them; run the encoder again with the adapter at "
                f"work{f', or attach {self.method} with {self.without}' if self.without else ''}"
            )
        return h

    def _repeated(self, states: Tensor) -> Tensor | None:
        """What was found, if these are the encoder's outputs with each sequence repeated, as beam search does."""
        if self._bound is None or _version(self._bound.states) != self._bound.version:
            return None
        mine, h = self._bound.states.detach(), self._bound.h
        times = states.shape[0] // mine.shape[0]
        if states.shape != (mine.shape[0] * times, *mine.shape[1:]):
            return None
        # FSDP2 may cast what it hands to each block (MixedPrecisionPolicy).
        if not torch.equal(mine.to(states.device, states.dtype).repeat_interleave(times, dim=0), states):
            return None
        if times > 1:
            h = h.repeat_interleave(times, dim=0)
        # The decoder asks again for each block, and for each token of a generated text.
        if times > 1 or states.dtype == mine.dtype:
            self._last = _Bound(states, _version(states), h)
        return h


class _Bound(NamedTuple):
    """Outputs of the encoder, their version, which writing in place moves, and what was found for them."""

    states: Tensor
    version: int
    h: Tensor


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
