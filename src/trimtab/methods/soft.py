"""What methods share whose parameters are virtual tokens: hooks on one part of the model, and PEFT's files of them.

The parameters are registered on the part of the model that reads them (`host`), so that wrappers (DDP) and
`.to()` see them; hooks on the host and on other parts do the rest. Nothing of the base is touched.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.errors import CheckpointError, ConfigError
from trimtab.methods.base import Adapter, Method
from trimtab.methods.folder import SavedAdapter, reading_config, refuse_unknown
from trimtab.methods.foldercheck import HEADS
from trimtab.methods.frozen import FrozenBase, FrozenBaseAdapter
from trimtab.nn.residence import Residence
from trimtab.nn.stacks import is_encoder_decoder
from trimtab.nn.virtual import VirtualTokens, position_limit, qualified

#: The one tensor of PEFT's files.
SAVED = "prompt_embeddings"
#: What PEFT puts before the model's own names in the files of these methods.
BASE = "base_model."
#: Fields of every such config of PEFT.
FIELDS = frozenset(
    {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
    | {"modules_to_save"}
)


class SoftPrompt(FrozenBase):
    """Settings of a method with virtual tokens.

    Args:
        length: p, the number of virtual tokens before each sequence.
    """

    abstract: ClassVar[bool] = True
    length: Annotated[int, Field(ge=1)] = 20

    #: PEFT's name of the method, and the fields of its config that are known beside `FIELDS`.
    peft_type: ClassVar[str]
    peft_fields: ClassVar[frozenset[str]]

    @property
    def virtual_tokens(self) -> int:
        return self.length

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> Method | None:
        if saved.get("peft_type") != cls.peft_type:
            return None
        refuse_unknown(dict(saved), FIELDS | cls.peft_fields)
        with reading_config():
            return cls._plain(saved["num_virtual_tokens"])

    @classmethod
    @abc.abstractmethod
    def _plain(cls, length: int) -> Method:
        """The config of an adapter whose tensor is about to be loaded."""

    def load_saved(self, adapter: Adapter, saved: SavedAdapter) -> None:
        assert isinstance(adapter, SoftPromptAdapter)
        adapter.load(saved)


class SoftPromptAdapter(FrozenBaseAdapter):
    """Virtual tokens at work on a model.

    Attributes:
        host: the part of the model that has the parameters, and `host_name` its name.
    """

    config: SoftPrompt
    host: nn.Module
    host_name: str

    def __init__(self, model: nn.Module, config: SoftPrompt, residence: Residence) -> None:
        super().__init__(model, config, residence)
        self.host_name, self.host = self._find_host()
        limit = position_limit(model)
        if limit is not None and config.length >= limit:
            raise ConfigError(
                f"length = {config.length}: the model has {limit} positions, and that many virtual tokens leave none "
                "for the batch; use fewer"
            )
        causal = any(getattr(module, "is_causal", False) is True for module in self.host.modules())
        self._virtual = VirtualTokens(config.length, limit, causal)
        self._handles: list[Any] = []
        self._taken = {self.host_name: {name: self._parameter(value) for name, value in self._drawn().items()}}
        self._begin()

    # -- what a method says --------------------------------------------------------------------

    @abc.abstractmethod
    def _find_host(self) -> tuple[str, nn.Module]:
        """The part of the model that has the parameters."""

    @abc.abstractmethod
    def _drawn(self) -> dict[str, Tensor]:
        """The initial values by the parameters' names on the host, in fp32."""

    @abc.abstractmethod
    def _hook(self) -> None:
        """Put the hooks on the model, through `_before` and `_after`."""

    # -- putting it on -------------------------------------------------------------------------

    def _parameter(self, value: Tensor) -> nn.Parameter:
        at = next(iter(self._residence.parameters.values()))
        return nn.Parameter(value.to(at.device, self._residence.held_dtype(self._compute_dtype())))

    def _compute_dtype(self) -> torch.dtype:
        """What the host computes in: the compute dtype of its first floating-point parameter."""
        prefix = f"{self.host_name}." if self.host_name else ""
        inside = [dtype for name, dtype in self._residence.compute.items() if name.startswith(prefix)]
        return inside[0] if inside else self._residence.dtype or torch.get_default_dtype()

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _insert(self) -> None:
        for name, parameter in self._taken[self.host_name].items():
            self.host.register_parameter(name, parameter)
        self._hook()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._taken = self._parts
        for name in self._own:
            self.host._parameters.pop(name, None)

    @property
    def _wearers(self) -> dict[str, nn.Module]:
        return {self.host_name: self.host}

    @property
    def _own(self) -> dict[str, nn.Parameter]:
        """The parameters by their names on the host."""
        return self._parts[self.host_name]

    def own(self) -> dict[str, nn.Parameter]:
        return {qualified(self.host_name, name): parameter for name, parameter in self._own.items()}

    # -- files ---------------------------------------------------------------------------------

    @abc.abstractmethod
    def prompt(self) -> Tensor:
        """The tensor that a file holds; no gradient."""

    @abc.abstractmethod
    def _peft_fields(self) -> dict[str, Any]:
        """The fields of PEFT's config that are this method's own."""

    def _saved(self) -> SavedAdapter:
        full, modules = self._saved_in_full()
        task = task_type(self.model)
        full = {**self._head(task), **full}
        config = {
            **self._peft_config(self.config.peft_type),
            "task_type": task,
            "num_virtual_tokens": self.config.length,
            "modules_to_save": modules or None,
            **self._peft_fields(),
        }
        tensors = {SAVED: self.prompt()} | {BASE + name: tensor for name, tensor in full.items()}
        return SavedAdapter(config, tensors, self._extra(), prefix="")

    def _head(self, task: str) -> dict[str, Tensor]:
        """The tensors of a head that PEFT wants in the file for a task, trained or not."""
        owners = [name for name, _ in self.model.named_modules() if name.rpartition(".")[2] in HEADS.get(task, ())]
        inside = tuple(f"{name}." for name in owners)
        return {n: p.detach() for n, p in self._residence.parameters.items() if inside and n.startswith(inside)}

    def load(self, saved: SavedAdapter) -> None:
        """Take the tensors of a folder, ours or PEFT's.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape.
        """
        if SAVED not in saved.tensors:
            raise CheckpointError(f"the adapter's file has no {SAVED}")
        (own,) = self.own()
        tensors = {own: self._checked(saved.tensors[SAVED], saved.config)}
        for name, tensor in saved.tensors.items():
            if name != SAVED and not self._is_there(plain := self._plain_name(name), tensor):
                tensors[plain] = tensor
        renamed = copy.copy(saved)
        renamed.tensors = tensors
        self.load_tensors(renamed, {})

    def _checked(self, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
        """The file's tensor as this adapter holds it."""
        return tensor

    def _is_there(self, name: str, tensor: Tensor) -> bool:
        """Whether the base has this very tensor: a head that did not train need not train here."""
        own = self._residence.parameters.get(name)
        return own is not None and own.shape == tensor.shape and torch.equal(own.detach().cpu(), tensor.to(own.dtype))

    def _plain_name(self, name: str) -> str:
        """The model's own name of a tensor: reading takes "base_model.model." off, of which "model." may be its own."""
        known = {known for known, _ in self.model.named_parameters(remove_duplicate=False)}
        return next((n for n in (name.removeprefix(BASE), f"model.{name}") if n in known), name)


def task_type(model: nn.Module) -> str:
    """PEFT's word for what a model does: it chooses the wrapper that puts the virtual tokens before the batch."""
    kind = type(model).__name__
    for ending, task in (
        ("ForSequenceClassification", "SEQ_CLS"),
        ("ForTokenClassification", "TOKEN_CLS"),
        ("ForQuestionAnswering", "QUESTION_ANS"),
    ):
        if kind.endswith(ending):
            return task
    generates = getattr(model, "can_generate", None)
    if not (callable(generates) and generates()):
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM"
