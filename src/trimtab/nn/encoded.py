"""What a network beside a frozen encoder found, bound to the encoder's output until the decoder asks for it."""

from __future__ import annotations

from typing import Any, ClassVar

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
        self._states: Tensor | None = None
        self._h: Tensor | None = None

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
        self._states, self._h = states, found

    def of(self, states: Tensor) -> Tensor:
        """What was found for these outputs of the encoder.

        Raises:
            ConfigError: the encoder did not just compute them.
        """
        if not self._gave(states):
            raise ConfigError(
                "the decoder was given encoder outputs that this model's encoder did not just compute, so what "
                f"{self.method} found in the encoder is not known for them; run the encoder again with the adapter at "
                f"work{f', or attach {self.method} with {self.without}' if self.without else ''}"
            )
        assert self._h is not None
        return self._h

    def _gave(self, states: Tensor) -> bool:
        """Whether these are the encoder's outputs, or those with each sequence repeated, as beam search does."""
        if states is self._states:
            return True
        if self._states is None or self._h is None:
            return False
        mine, times = self._states.detach(), states.shape[0] // self._states.shape[0]
        if states.shape != (mine.shape[0] * times, *mine.shape[1:]):
            return False
        # FSDP2 may cast what it hands to each block (MixedPrecisionPolicy).
        if not torch.equal(mine.to(states.device, states.dtype).repeat_interleave(times, dim=0), states):
            return False
        # The decoder asks again for each block, and for each token of a generated text.
        if times > 1:
            self._h = self._h.repeat_interleave(times, dim=0)
        if times > 1 or states.dtype == mine.dtype:
            self._states = states
        return True
