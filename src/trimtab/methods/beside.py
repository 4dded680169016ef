"""What methods share whose network stands beside a frozen backbone: hooks on its blocks, which run without gradients.

Nothing is back-propagated through the backbone, so training keeps neither its activations nor runs its backward pass.
A network hears what each block gives and changes what the last one gives. In an encoder-decoder model each of the two
stacks has one, and the encoder's hands on what it found instead of changing anything.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import nn

from trimtab.errors import ConfigError
from trimtab.methods.base import Adapter, Method
from trimtab.methods.folder import SavedAdapter, reading_config, refuse_unknown
from trimtab.methods.frozen import FrozenBaseAdapter
from trimtab.nn.behind import NothingBehind
from trimtab.nn.encoded import Encoded
from trimtab.nn.inject import head_modules, task_head
from trimtab.nn.residence import Residence
from trimtab.nn.split import check_units
from trimtab.nn.stacks import (
    DepthHooks,
    Listener,
    Stack,
    find_stacks,
    is_encoder_decoder,
    keep_still,
    let_go,
    part,
    still_parts,
    stop_checkpointing,
)
from trimtab.nn.untraced import untraced
from trimtab.nn.virtual import qualified

Full = Literal["head", "final_norm"]


class Beside(Method):
    """Settings of a method whose network stands beside a frozen backbone.

    Args:
        blocks: endings of the names of the lists that hold the blocks, in encoder-decoder models the encoder's and the
            decoder's; None finds them.
        backbone_dropout: let the frozen backbone's dropout follow `model.train()`; else it stays off.
        train_also: what trains in full beside it: "head", "final_norm". None lets the head of a task train
            (classification, regression, span), which is usually new, and not that of a language model.
        seed: of what is drawn; None is 0.
    """

    abstract: ClassVar[bool] = True
    works_sharded: ClassVar[bool] = True
    blocks: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    backbone_dropout: bool = False
    train_also: tuple[Full, ...] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None

    #: What our files call the method (PEFT has none of them), and the settings that a file holds.
    file_type: ClassVar[str]
    file_settings: ClassVar[tuple[str, ...]]

    @field_validator("train_also", mode="before")
    @classmethod
    def _only_behind_the_blocks(cls, given: Any) -> Any:
        inner = [role for role in given or () if role in ("norms", "embeddings")]
        if inner:
            raise ValueError(
                f"{inner[0]!r} would need gradients through the backbone, which {cls.__name__} never computes; what "
                "can train is 'head' and 'final_norm'"
            )
        return given

    @property
    def reads_encoder(self) -> bool:
        """Whether the encoder of an encoder-decoder model has a network, too."""
        return True

    @property
    def writes_base(self) -> str:
        return f"train_also={list(self.train_also)}" if self.train_also else ""

    def for_pretraining(self, seed: int) -> Self:
        return self.model_copy(update={"seed": seed if self.seed is None else self.seed})

    def for_finetuning(self, seed: int, *, new_head: bool) -> Self:
        return self.for_pretraining(seed)

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> Self | None:
        if cls.abstract or saved.get("peft_type") != cls.file_type:
            return None
        refuse_unknown(dict(saved), {*cls.file_settings, "modules_to_save"})
        with reading_config():
            given = {key: saved[key] for key in cls.file_settings}
            return cls(**{**given, "blocks": tuple(given["blocks"]), "train_also": ()})

    def load_saved(self, adapter: Adapter, saved: SavedAdapter) -> None:
        assert isinstance(adapter, BesideAdapter)
        adapter.load_tensors(saved, {})


class BesideAdapter(FrozenBaseAdapter):
    """A network beside a frozen backbone at work.

    Attributes:
        side_name: of the network among the modules of the one that holds the blocks.
    """

    config: Beside
    side_name: ClassVar[str]

    def __init__(self, model: nn.Module, config: Beside, residence: Residence) -> None:
        super().__init__(model, config, residence)
        self._stacks = choose_stacks(model, config.blocks, both=config.reads_encoder)
        self._sides = self._make_sides()
        self._encoded = self._make_encoded()
        self._handles: list[Any] = []
        # A decoder is the last of an encoder-decoder model.
        self._behind = None if is_encoder_decoder(model) else NothingBehind(model, self._stacks[-1])
        self._still: list[nn.Module] = []
        self._unchecked: list[nn.Module] = []
        self._hooks = [DepthHooks(stack, self._listener(number)) for number, stack in enumerate(self._stacks)]
        self._begin()

    # -- what a method says --------------------------------------------------------------------

    @abc.abstractmethod
    def _make_sides(self) -> Sequence[nn.Module]:
        """The network beside each stack."""

    @abc.abstractmethod
    def _make_encoded(self) -> Encoded:
        """What passes from the encoder's network to the decoder's."""

    @abc.abstractmethod
    def _listener(self, number: int) -> Listener:
        """Who hears a stack and advances its network."""

    # -- what it is made of --------------------------------------------------------------------

    @property
    def _pair(self) -> bool:
        """Whether there is an encoder's network and a decoder's."""
        return len(self._stacks) == 2

    def _compute_dtype(self, stack: Stack) -> torch.dtype:
        """What a stack computes in: the compute dtype of its first floating-point parameter."""
        inside = [dtype for name, dtype in self._residence.compute.items() if name.startswith(f"{stack.name}.")]
        return inside[0] if inside else self._residence.dtype or torch.get_default_dtype()

    def _in_full(self) -> Iterable[str]:
        chosen = self.config.train_also
        names: list[str] = []
        heads = {**head_modules(self.model), **task_head(self.model)}
        if chosen is None:
            getter = getattr(self.model, "get_output_embeddings", None)
            words = getter() if callable(getter) else None
            heads = {name: module for name, module in heads.items() if module is not words}
        elif "head" not in chosen:
            heads = {}
        elif not heads:
            raise ConfigError(f"train_also: {type(self.model).__name__} has no head that could train")
        elif tied := [name for name, module in heads.items() if self._holds_words(module)]:
            raise ConfigError(
                f"train_also: {tied[0]} of {type(self.model).__name__} is tied to the embeddings, which lie before the "
                "blocks and would need gradients through the backbone; leave 'head' out"
            )
        names += [f"{name}." for name in heads]
        if chosen and "final_norm" in chosen:
            stack = self._stacks[-1]
            norms = final_norms(stack.owner)
            if not norms:
                raise ConfigError(
                    f"train_also: {type(self.model).__name__} has no norm behind its last block (post-norm blocks "
                    "bring their own); leave 'final_norm' out"
                )
            names += [f"{qualified(stack.owner_name, name)}." for name in norms]
        return [name for name in self._residence.parameters if name.startswith(tuple(names))] if names else []

    def _holds_words(self, head: nn.Module) -> bool:
        """Whether a head has a tensor of the input embeddings."""
        getter = getattr(self.model, "get_input_embeddings", None)
        words = getter() if callable(getter) else None
        inside = set(map(id, words.parameters())) if isinstance(words, nn.Module) else set()
        return any(id(parameter) in inside for parameter in head.parameters())

    # -- on the model --------------------------------------------------------------------------

    def _insert(self) -> None:
        for stack, side in zip(self._stacks, self._sides, strict=True):
            if hasattr(stack.owner, self.side_name):
                raise ConfigError(
                    f"{stack.owner_name or type(stack.owner).__name__} has a {self.side_name!r} of its own, which is "
                    "the name of the network that is put there; rename that one"
                )
            self._place(stack, side)
            stack.owner.add_module(self.side_name, side)
        self._handles.append(self._stacks[0].owner.register_forward_pre_hook(self._before_blocks))
        for hooks in self._hooks:
            hooks.put_on()
        if self._behind is not None:
            self._behind.put_on()
        self._unchecked = stop_checkpointing(self.model)
        if not self.config.backbone_dropout:
            self._still = keep_still(self._still_parts())
        if self._pair:
            encoder = part(self.model, "encoder")
            self._handles.append(encoder.register_forward_hook(self._encoded.after_encoder))
            self._handles.append(self.model.register_forward_pre_hook(self._encoded.before_model))
            self._handles.append(self.model.register_forward_hook(self._encoded.after_model))

    def _place(self, stack: Stack, side: nn.Module) -> None:
        """Move a network to where its stack is: the model may have moved while the adapter was off it."""
        side.to(next(iter(stack.blocks[-1].parameters())).device)

    def _still_parts(self) -> Iterator[nn.Module]:
        """The parts of the model that stay in eval mode."""
        trained = {id(self._residence.parameters[name]) for name in self._residence.trained}
        return still_parts(self.model, trained)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        let_go(self._still)
        self._still = []
        for module in self._unchecked:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        self._unchecked = []
        if self._behind is not None:
            self._behind.take_off()
        for hooks in self._hooks:
            hooks.take_off()
        for stack in self._stacks:
            del stack.owner._modules[self.side_name]
        self._encoded.clear()

    # -- on a model that is split over processes -----------------------------------------------

    @untraced
    def _before_blocks(self, owner: nn.Module, args: Any) -> None:
        """A model is split after its adapter came, and its first forward is the first to know."""
        self._check_units()

    def _check_units(self) -> None:
        check_units(self.model, self._apart(), (block for stack in self._stacks for block in stack.blocks))

    def _apart(self) -> Iterator[tuple[str, nn.Module]]:
        """What no unit may begin at: the networks, and what holds one and not the end of the blocks.

        A unit is made whole for the backward pass by the gradient of its output, which an encoder's has none of.
        """
        end = f"{self._stacks[-1].name}."
        for stack, side in zip(self._stacks, self._sides, strict=True):
            name = stack.owner_name
            while name and not end.startswith(f"{name}."):
                yield name, self.model.get_submodule(name)
                name = name.rpartition(".")[0]
            yield from side.named_modules(prefix=qualified(stack.owner_name, self.side_name))

    def _check_model(self, call: str) -> None:
        super()._check_model(call)
        try:
            self._check_units()
        except ConfigError as error:
            raise ConfigError(f"{call}: {error}") from None

    def own(self) -> dict[str, nn.Parameter]:
        return {
            qualified(stack.owner_name, f"{self.side_name}.{name}"): parameter
            for stack, side in zip(self._stacks, self._sides, strict=True)
            for name, parameter in side.named_parameters()
        }

    # -- results -------------------------------------------------------------------------------

    def _updated(self) -> dict[str, nn.Module]:
        return {}  # no matrix of the base is

    def _saved(self) -> SavedAdapter:
        full, modules = self._saved_in_full()
        settings = {key: getattr(self.config, key) for key in self.config.file_settings}
        settings["blocks"] = [stack.name for stack in self._stacks]
        config = {**self._peft_config(self.config.file_type), **settings, "modules_to_save": modules or None}
        return SavedAdapter(config, dict(self.own()) | full, self._extra())


def final_norms(owner: nn.Module) -> list[str]:
    """The names of the norms behind the last block: in the module that holds the blocks, and not before them."""
    return [
        name
        for name, child in owner.named_children()
        if ("norm" in name.lower() or "Norm" in type(child).__name__) and "embed" not in name.lower()
    ]


def choose_stacks(model: nn.Module, blocks: tuple[str, ...] | None, *, both: bool) -> list[Stack]:
    """The stacks that get a network: one, or an encoder's and a decoder's, in that order.

    Args:
        model: any module.
        blocks: endings of the names of lists, or None.
        both: the encoder of an encoder-decoder model, too.

    Raises:
        ConfigError: there are none, or it is not clear which.
    """
    found = find_stacks(model, blocks or ())
    if not is_encoder_decoder(model):
        if len(found) != 1:
            raise ConfigError(_several(model, found, "blocks"))
        return found
    chosen, odd = [], list(found)
    for kind in ("encoder", "decoder") if both else ("decoder",):
        inside = set(map(id, part(model, kind).modules()))
        of_kind = [stack for stack in found if id(stack.owner) in inside]
        if blocks is not None and not of_kind:
            raise ConfigError(
                f"blocks={list(blocks)} names no blocks of the {kind} of {type(model).__name__}, which has a network "
                f"beside it; name {'the lists of both, encoder and decoder' if both else 'its list'}, or leave blocks "
                "out"
            )
        if len(of_kind) != 1:
            raise ConfigError(_several(model, of_kind, f"{kind}'s blocks"))
        chosen += of_kind
        odd = [stack for stack in odd if stack is not of_kind[0]]
    if blocks is not None and odd:
        raise ConfigError(
            f"blocks={list(blocks)} names {odd[0].name}, beside which there is no network with these settings; leave "
            "it out"
        )
    return chosen


def _several(model: nn.Module, found: list[Stack], what: str) -> str:
    names = ", ".join(stack.name for stack in found) or "none"
    return (
        f"blocks: the {what} of {type(model).__name__} could be any of {names}; name the list with blocks=['<name>']"
        " (in encoder-decoder models the encoder's and the decoder's)"
    )
