"""From a batch to a loss: the sum of token losses of a language model, causal or encoder-decoder.

The chunked form calls the model with its output head standing aside: what the head is given goes, with
its weight, to `linear_cross_entropy`, so that logits never exist whole. The model is called as a whole,
so whoever listens to its calls hears of them. What it does to its logits beyond the head is read from its
config (a cap as in Gemma 2, a scale as in Cohere and Granite) or from the model (a bias of BART's and
Marian's), and `Objective.check` compares the result with the model's own logits before anything trains
on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.errors import ConfigError
from trimtab.nn.loss import linear_cross_entropy

IGNORED = -100

_WAY_OUT = "set loss.chunked=false"
# Tokens of the batch that `check` looks at.
_CHECK_TOKENS = 64
# To this size `check` raises the logits: a cap or a scale that is invisible at the small logits of a
# fresh model is plain there.
_CHECK_LOGITS = 64.0


class Scored(Protocol):
    """What the objective reads of a batch.

    `input_ids` (n, S); `labels` (n, S), already shifted, -100 where not scored; `attention_mask`
    (n, 1, S, S) or (n, S), and `position_ids` (n, S), or None.
    """

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def attention_mask(self) -> Tensor | None: ...
    @property
    def position_ids(self) -> Tensor | None: ...


class ScoredPair(Scored, Protocol):
    """What it reads of a batch of an encoder-decoder model.

    `input_ids` and `attention_mask` (n, S) are the encoder's; `decoder_input_ids` (n, T) is what the decoder reads
    where `labels` (n, T) are due (transformers' models make it by shifting labels to the right);
    `decoder_attention_mask` (n, T) or None. `position_ids` are not used.
    """

    @property
    def decoder_input_ids(self) -> Tensor: ...
    @property
    def decoder_attention_mask(self) -> Tensor | None: ...


class Objective:
    """The loss of a transformers language model, causal or encoder-decoder.

    Args:
        model: has `get_output_embeddings()` and `config`. For an encoder-decoder model batches are `ScoredPair`s.
        chunked: never hold all logits; False asks the model for its logits.
        chunk: tokens whose logits exist at once.

    Raises:
        ConfigError: `chunked`, and the model's head is not a plain linear layer.
    """

    def __init__(self, model: nn.Module, chunked: bool = True, chunk: int = 1024) -> None:
        self.model: Any = model
        self.chunked = chunked
        self.chunk = chunk
        if chunked:
            self._head()
            self.softcap, self.scale = _logit_settings(self.model)

    def __call__(self, batch: Scored) -> Tensor:
        """The sum of the losses of the batch's scored tokens: a scalar in fp32, in nats."""
        if self.chunked:
            return self._chunked(self._hidden(batch), batch.labels, "sum")
        logits = self._logits(batch).float()
        return functional.cross_entropy(
            logits.flatten(0, -2), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def arguments(self, batch: Scored) -> dict[str, Any]:
        """What the model is called with."""
        arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        names = ["attention_mask", "position_ids"]
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            names = ["attention_mask", "decoder_input_ids", "decoder_attention_mask"]
            if getattr(batch, "decoder_input_ids", None) is None:
                raise ConfigError(
                    f"{type(self.model).__name__} reads with an encoder and writes with a decoder, and the batch has "
                    "no decoder_input_ids: give it the labels shifted to the right"
                )
        given = ((name, getattr(batch, name, None)) for name in names)
        arguments |= {name: value for name, value in given if value is not None}
        mask = arguments.get("attention_mask")
        if mask is not None and mask.dim() == 4 and mask.dtype == torch.bool and self._adds_masks():
            least = torch.finfo(self.model.dtype).min
            arguments["attention_mask"] = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, least)
        return arguments

    def _adds_masks(self) -> bool:
        """Whether the model's attention adds a mask to the scores, to which True would be 1."""
        return getattr(getattr(self.model, "config", None), "_attn_implementation", None) == "eager"

    def check(self, batch: Scored) -> None:
        """Compare the chunked loss with the model's own logits on the first tokens of a batch.

        They are compared as they are, and with the head's input scaled up by a power of two, which
        brings out a cap or a scale that this class does not know of. Neither the model's modes nor the
        random state are changed.

        Raises:
            ConfigError: they differ; the way out is `loss.chunked=false`.
        """
        if not self.chunked:
            return
        short = _Short(batch, _CHECK_TOKENS)
        devices = [short.labels.device] if short.labels.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices), eval_mode(self.model):
            hidden = self._hidden(short)
            logits = self._logits(short).float()
            targets = short.input_ids if short.decoder_input_ids is None else short.decoder_input_ids
            self._compare(hidden, logits, targets)
            largest = float(logits.abs().max())
            if 0.0 < largest < _CHECK_LOGITS:
                factor = 2.0 ** round(torch.tensor(_CHECK_LOGITS / largest).log2().item())
                handle = self._head().register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor, *inputs[1:]))
                try:
                    raised = self._logits(short).float()
                finally:
                    handle.remove()
                self._compare(hidden * factor, raised, targets)

    def _compare(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> None:
        words = self._head().weight.shape[0]
        if logits.shape != (*targets.shape, words):
            raise ConfigError(
                f"the model's logits have the shape {tuple(logits.shape)}, its head alone gives "
                f"{(*targets.shape, words)}, so the chunked loss would be another one: {_WAY_OUT}"
            )
        own = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
        ours = self._chunked(hidden, targets, "none").flatten()
        # A model in a low precision rounds its logits, their cap and their scale, one after the other.
        unit = 2.0**-6 if hidden.dtype in (torch.bfloat16, torch.float16) else 1e-4
        allowed = unit * (1.0 + float(logits.abs().max()))
        difference = float((own - ours).abs().max())
        if not difference <= allowed:
            raise ConfigError(
                f"the chunked loss differs from the model's own by {difference:.3g} nats on a token (allowed "
                f"{allowed:.2g}): {type(self.model).__name__} does something to its logits that softcap="
                f"{self.softcap} and scale={self.scale:g} do not describe; {_WAY_OUT}"
            )

    def _chunked(self, hidden: Tensor, labels: Tensor, reduction: Any) -> Tensor:
        head = self._head()
        return linear_cross_entropy(
            hidden,
            head.weight,
            labels,
            bias=self._bias(head),
            ignore_index=IGNORED,
            reduction=reduction,
            softcap=self.softcap,
            scale=self.scale,
            chunk=self.chunk,
        )

    def _bias(self, head: nn.Linear) -> Tensor | None:
        """What is added to each word's logit: the head's bias, and what BART and its like add behind the head."""
        behind = getattr(self.model, "final_logits_bias", None)
        if not isinstance(behind, Tensor):
            return head.bias
        return behind.flatten() if head.bias is None else head.bias + behind.flatten()

    def _hidden(self, batch: Scored) -> Tensor:
        """What the head is given, (n, S, d)."""
        with _stands_aside(self._head()) as given:
            self.model(**self.arguments(batch))
        if len(given) != 1:
            raise ConfigError(
                f"the output head of {type(self.model).__name__} is called {len(given)} times in a forward, and the "
                f"chunked loss needs what it is given in one call: {_WAY_OUT}"
            )
        return given[0]

    def _logits(self, batch: Scored) -> Tensor:
        logits: Tensor = self.model(**self.arguments(batch)).logits
        return logits

    def _head(self) -> nn.Linear:
        """The head as it is now; the end of a warm start may have made another of it.

        An adapted head has parameters that its weight does not show, and at the start they change
        nothing, so that no comparison of values would find them.
        """
        find = getattr(self.model, "get_output_embeddings", None)
        head = find() if find is not None else None
        if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
            kind = "no output head" if head is None else f"an output head of type {type(head).__name__}"
            raise ConfigError(f"{type(self.model).__name__} has {kind}, not a plain linear layer: {_WAY_OUT}")
        extra = [name for name, _ in head.named_parameters() if name not in ("weight", "bias")]
        if extra:
            raise ConfigError(
                f"the output head of {type(self.model).__name__} has parameters beside weight and bias "
                f"({', '.join(extra)}), which the chunked loss would not train: {_WAY_OUT}"
            )
        return head


class _Short:
    """The first tokens of a batch's first sequence."""

    def __init__(self, batch: Scored, tokens: int) -> None:
        def cut(name: str) -> Tensor | None:
            value: Tensor | None = getattr(batch, name, None)
            return None if value is None else value[:1, ..., :tokens]

        self.input_ids = batch.input_ids[:1, :tokens]
        self.labels = batch.labels[:1, :tokens]
        self.attention_mask = cut("attention_mask")
        if self.attention_mask is not None and self.attention_mask.dim() == 4:
            self.attention_mask = self.attention_mask[:, :, :tokens]
        self.position_ids = cut("position_ids")
        self.decoder_input_ids = cut("decoder_input_ids")
        self.decoder_attention_mask = cut("decoder_attention_mask")


@contextmanager
def _stands_aside(head: nn.Module) -> Iterator[list[Tensor]]:
    """Let a head keep what it is given instead of projecting it; yields what it was given.

    It returns one zero of as many dimensions, to which a model can do what it does to logits.
    """
    given: list[Tensor] = []
    attributes = head.__dict__
    own = attributes.get("forward")  # put there by whoever wraps a module's forward

    def keep(x: Tensor) -> Tensor:
        given.append(x)
        return x.new_zeros((1,) * x.dim())

    attributes["forward"] = keep
    try:
        yield given
    finally:
        if own is None:
            del attributes["forward"]
        else:
            attributes["forward"] = own


def _logit_settings(model: Any) -> tuple[float | None, float]:
    """The softcap and the scale of a model's logits, as its config names them."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
    scale = getattr(config, "logit_scale", None)  # Cohere
    divisor = getattr(config, "logits_scaling", None)  # Granite
    factor = float(scale) if isinstance(scale, int | float) else 1.0
    if isinstance(divisor, int | float):
        factor /= float(divisor)
    return (float(softcap) if softcap else None), factor


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
