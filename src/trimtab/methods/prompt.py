"""Prompt tuning (arXiv 2104.08691): p trained embeddings before those of each sequence, and a frozen model.

They are put in where a model's backbone begins, and in a decoder or an encoder of its own the hidden states of
the virtual tokens are taken off where it ends. So heads, losses, labels and whoever calls the model see the batch's
own positions and nothing else; what the tokens compute is what PEFT computes for them. In an encoder-decoder model
they stand before the encoder's tokens, and the decoder reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import ValidationInfo, field_validator
from torch import Tensor, nn

from trimtab.errors import CheckpointError, ConfigError
from trimtab.methods.base import Method
from trimtab.methods.soft import SAVED, SoftPrompt, SoftPromptAdapter
from trimtab.nn.draw import stable_generator
from trimtab.nn.residence import Residence
from trimtab.nn.stacks import is_encoder_decoder, part
from trimtab.nn.virtual import VirtualTokens, backbone, input_embeddings, name_of, named_arguments, read_shape

Init = Literal["vocab", "text", "random"]


class PromptTuning(SoftPrompt):
    """Trained embeddings before the batch.

    Args:
        init: "vocab": embeddings of tokens drawn from the vocabulary; "text": those of `text`, repeated or cut to
            `length`; "random": a normal distribution of deviation 1, PEFT's default.
        text: with init="text": a text, or token ids.
        tokenizer: folder or hub name of the tokenizer of a `text` that is a string.
    """

    abstract = False
    name: Literal["prompt"] = "prompt"
    init: Init = "vocab"
    text: str | tuple[int, ...] | None = None
    tokenizer: str | None = None

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    peft_fields: ClassVar[frozenset[str]] = frozenset(
        {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
    )

    @field_validator("text")
    @classmethod
    def _text_goes_with_init(cls, text: str | tuple[int, ...] | None, info: ValidationInfo) -> Any:
        init = info.data.get("init")
        if init == "text" and not text:
            raise ValueError('init="text" needs a text, or token ids')
        if text is not None and init != "text":
            raise ValueError(f'a text is for init="text", and init is "{init}"')
        return text

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer_goes_with_text(cls, tokenizer: str | None, info: ValidationInfo) -> str | None:
        text = info.data.get("text")
        if isinstance(text, str) and tokenizer is None:
            raise ValueError("a text that is a string needs a tokenizer; name one, or give token ids as text")
        if tokenizer is not None and not isinstance(text, str):
            raise ValueError("a tokenizer is for a text that is a string")
        return tokenizer

    @property
    def no_merge(self) -> str:
        return "a prompt stands before the tokens and is no part of any weight"

    def _attach(self, model: nn.Module, residence: Residence) -> PromptTuningAdapter:
        return PromptTuningAdapter(model, self, residence)

    @classmethod
    def _plain(cls, length: int) -> Method:
        return cls(length=length, init="random")


class PromptTuningAdapter(SoftPromptAdapter):
    """A trained prompt at work on a model."""

    config: PromptTuning

    def _find_host(self) -> tuple[str, nn.Module]:
        if is_encoder_decoder(self.model):
            host = part(self.model, "encoder")
            part(self.model, "decoder")
            name = name_of(self.model, host)
        else:
            name, host = backbone(self.model)
        if input_embeddings(host) is None:
            raise ConfigError(f"{type(host).__name__} has no input embeddings, so nothing can stand before its tokens")
        return name, host

    def _drawn(self) -> dict[str, Tensor]:
        table = input_embeddings(self.host)
        assert table is not None
        weight = table.weight
        assert isinstance(weight, Tensor)
        words, width = weight.shape
        length = self.config.length
        generator = stable_generator(self.config.seed or 0, SAVED)
        if self.config.init == "random":
            return {SAVED: torch.randn(length, width, generator=generator, device="cpu")}
        if self.config.init == "text":
            text = self._text_ids(words)
            ids = torch.tensor(text).repeat(-(-length // len(text)))[:length]
        else:
            ids = torch.randint(words, (length,), generator=generator, device="cpu")
        with torch.no_grad():
            drawn: Tensor = table(ids.to(weight.device))
        return {SAVED: drawn.float()}

    def _text_ids(self, words: int) -> list[int]:
        """The text's token ids, special ones that the tokenizer adds among them, as in PEFT."""
        text = self.config.text
        ids = _tokenized(text, str(self.config.tokenizer)) if isinstance(text, str) else list(text or ())
        if not ids or not all(0 <= index < words for index in ids):
            odd = next((index for index in ids if not 0 <= index < words), None)
            raise ConfigError(
                f"text = {text!r} has no tokens" if odd is None else f"text: token id {odd} is not among the {words}"
            )
        return ids

    def _hook(self) -> None:
        decoder = part(self.model, "decoder") if is_encoder_decoder(self.model) else None
        splice = _Splice(self._virtual, keep=decoder is not None)
        self._before(self.host, splice.before)
        self._after(self.host, splice.after)
        if decoder is not None:
            self._before(decoder, _Widen(self._virtual).before)

    def prompt(self) -> Tensor:
        return self._own[SAVED].detach()

    def _checked(self, tensor: Tensor, config: Any) -> Tensor:
        # PEFT gives encoder-decoder models a second prompt, for the decoder, which prompt tuning never reads.
        length = self.config.length
        if (config.get("num_transformer_submodules") or 1) == 2 and len(tensor) == 2 * length:
            return tensor[:length]
        if config.get("num_transformer_submodules") not in (None, 1, 2):
            raise CheckpointError(f"num_transformer_submodules = {config['num_transformer_submodules']} is not known")
        return tensor

    def _peft_fields(self) -> dict[str, Any]:
        return {
            "token_dim": self._own[SAVED].shape[1],
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }


class _Splice:
    """Puts the prompt before a backbone's tokens, and takes its hidden states off again.

    Args:
        keep: leave the prompt's hidden states where they are (an encoder, whose decoder reads them).
    """

    def __init__(self, virtual: VirtualTokens, keep: bool) -> None:
        self.virtual = virtual
        self.keep = keep
        self._spliced = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._spliced = False
        call = named_arguments(module, args, kwargs)
        shape = read_shape(call)
        if shape is None:
            return args, kwargs
        sequences, tokens = shape
        self.virtual.check_call(call)
        held = self.virtual.cached(call, tokens)
        self.virtual.check_length(held + tokens if held else self.virtual.length + tokens)
        first = held == 0
        if first:
            if not self.keep:
                self.virtual.begin(call.get("past_key_values"))
            embeds = call.get("inputs_embeds")
            if embeds is None:
                table = input_embeddings(module)
                assert table is not None
                embeds = table(call["input_ids"])
            # Cast after the expansion, so that the sum over the sequences of the gradient is taken in fp32.
            prompt = getattr(module, SAVED).expand(sequences, -1, -1).to(embeds.device, embeds.dtype)
            call |= {"input_ids": None, "inputs_embeds": torch.cat((prompt, embeds), dim=1)}
            if call.get("token_type_ids") is not None:
                kinds = call["token_type_ids"]
                call["token_type_ids"] = torch.cat((kinds.new_zeros(len(kinds), self.virtual.length), kinds), dim=1)
        if "attention_mask" in call:
            call["attention_mask"] = self.virtual.mask(call["attention_mask"], rows=first)
        if "position_ids" in call:
            call["position_ids"] = self.virtual.positions(call["position_ids"], rows=first)
        self._spliced = first
        return (), call

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.keep or not self._spliced:
            return output
        self.virtual.begin(getattr(output, "past_key_values", None))
        p = self.virtual.length
        if not isinstance(getattr(output, "last_hidden_state", None), Tensor):
            raise ConfigError(
                f"{type(module).__name__} answers with a {type(output).__name__} without last_hidden_state, so the "
                "prompt's hidden states cannot be taken off; leave return_dict at True"
            )
        output["last_hidden_state"] = output.last_hidden_state[:, p:]
        for name, at in (("hidden_states", 1), ("attentions", 2)):
            if getattr(output, name, None) is not None:
                rest = (t if t is None else t.narrow(at, p, t.shape[at] - p) for t in getattr(output, name))
                output[name] = tuple(rest)
        return output


class _Widen:
    """Lets a decoder's mask of the encoder's positions speak of the prompt, too."""

    def __init__(self, virtual: VirtualTokens) -> None:
        self.virtual = virtual

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = named_arguments(module, args, kwargs)
        mask, states = call.get("encoder_attention_mask"), call.get("encoder_hidden_states")
        if mask is None or states is None:
            return args, kwargs
        if mask.shape[-1] + self.virtual.length != states.shape[1]:
            raise ConfigError(
                f"the encoder's states have {states.shape[1]} positions and its mask {mask.shape[-1]}, not "
                f"{self.virtual.length} fewer: encoder_outputs were not made with this adapter's prompt; make them anew"
            )
        return (), {**call, "encoder_attention_mask": self.virtual.mask(mask, rows=False)}


def _tokenized(text: str, tokenizer: str) -> list[int]:
    from transformers import AutoTokenizer

    folder = Path(tokenizer).expanduser()
    path = folder.is_absolute() or tokenizer.startswith(".") or tokenizer.count("/") > 1
    if path and not folder.is_dir():
        raise ConfigError(
            f"tokenizer = {tokenizer!r} cannot be loaded: there is no such folder; give a folder with a "
            "tokenizer.json, a name on the hub (owner/name), or token ids as text"
        )
    try:
        # Code that comes with a tokenizer is never run.
        loaded: Any = AutoTokenizer.from_pretrained(str(folder) if path else tokenizer, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer = {tokenizer!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    return list(loaded(text)["input_ids"])
