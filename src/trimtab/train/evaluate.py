"""The mean loss over scored tokens, exactly, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.errors import DataError
from trimtab.train.objective import eval_mode

if TYPE_CHECKING:
    from trimtab.data.batches import Batch


@dataclass(frozen=True)
class EvalResult:
    """Figures over one set of scored tokens.

    Attributes:
        loss: nats a token, the sum of all token losses over their number.
        perplexity: exp(loss); infinite where that overflows.
        bits_per_byte: the same sum in bits, over the UTF-8 bytes of exactly the scored tokens.
        tokens: how many were scored.
        bytes: how many bytes of text they stand for.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int

    def record(self) -> dict[str, Any]:
        """The figures as a record of metrics.jsonl."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
        }


def evaluate(
    model: nn.Module, objective: Callable[[Batch], Tensor], batches: Iterable[tuple[Batch, int]]
) -> EvalResult:
    """Score `batches` in eval mode, without gradients; every module's mode is restored afterwards.

    Args:
        model: what `objective` runs.
        objective: the sum of the token losses of a batch, an fp32 scalar.
        batches: each with the number of UTF-8 bytes of its scored tokens.

    Raises:
        DataError: there is no scored token, or no text under the scored ones.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens = text_bytes = 0
    with eval_mode(model), torch.no_grad():
        for batch, size in batches:
            total += objective(batch.to(device)).double()
            tokens += batch.n_valid
            text_bytes += size
    if tokens == 0 or text_bytes == 0:
        raise DataError(
            f"the validation part has {tokens} scored tokens over {text_bytes} bytes of text; "
            "give more text, a larger data.validation_share, or data.validation_sources"
        )
    nats = float(total)
    loss = nats / tokens
    perplexity = math.exp(loss) if loss < 709 else math.inf
    return EvalResult(loss, perplexity, nats / math.log(2) / text_bytes, tokens, text_bytes)
