"""READ (arXiv 2305.15348): a small recurrent network over the layers of a frozen Transformer corrects its output.

Nothing is back-propagated through the backbone, which runs with gradients off: training keeps neither its
activations nor runs its backward pass. Each token is corrected alone, from its own hidden states through the layers,
so causality and the KV cache stay what they are.

In an encoder-decoder model the encoder has a network of its own. The encoder is not corrected; what its network found
reaches the decoder's through the joiner: the decoder's frozen cross-attention probabilities, applied to it.

The paper's text leaves much open. What is built here is its idea with the choices of the authors' code as settings:
`READ(cell="gru", size=256, aggregate="mean", init="drawn")` is theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.methods.base import Adapter, Method
from trimtab.methods.folder import SavedAdapter, reading_config, refuse_unknown
from trimtab.methods.frozen import FrozenBaseAdapter
from trimtab.nn.crossing import Crossing
from trimtab.nn.draw import stable_generator
from trimtab.nn.inject import head_modules
from trimtab.nn.recurrence import Cell
from trimtab.nn.replay import Reading
from trimtab.nn.residence import Residence
from trimtab.nn.sidelink import Link, Reader
from trimtab.nn.sidenet import Aggregate, DepthRun, SideNetwork
from trimtab.nn.stacks import (
    DepthHooks,
    Stack,
    find_stacks,
    is_encoder_decoder,
    keep_still,
    let_go,
    part,
    still_parts,
    stop_checkpointing,
)
from trimtab.nn.virtual import qualified

FILE_TYPE = "TRIMTAB_READ"
#: The name of the side network among the modules of the one that holds the blocks.
SIDE = "read"
#: The settings that a file holds.
_SETTINGS = ("cell", "size", "aggregate", "joiner", "scale", "init", "blocks", "backbone_dropout", "width")

Beside = Literal["head", "final_norm"]


class READ(Method):
    """A recurrent network over depth beside a frozen backbone.

    Args:
        cell: "rnn" (tanh), "gru" or "lstm"; or "none": each layer has a network of its own, without recurrence (the
            paper's ablation), which goes with aggregate="mean".
        size: k, of the recurrence's state.
        aggregate: "last": the correction reads the last state; "mean": the mean of all.
        joiner: "attention": the decoder's network sees what the encoder's found, through the frozen cross-attention;
            "none": it does not, and the encoder has no network. Without effect in models of one stack.
        scale: s, of the correction.
        init: "zero": W_o = 0, so that training starts at the backbone exactly; "drawn": W_o as torch draws a linear
            layer.
        blocks: endings of the names of the lists that hold the blocks, in encoder-decoder models the encoder's first;
            None finds them.
        backbone_dropout: let the frozen backbone's dropout follow `model.train()`; else it stays off.
        width: of the hidden states; None asks the model's config.
        train_also: what trains in full beside it: "head", "final_norm". None lets the head of a task train
            (classification, regression, span), which is usually new, and not that of a language model.
        seed: of what is drawn; None is 0.
    """

    abstract = False
    name: Literal["read"] = "read"
    cell: Cell | Literal["none"] = "rnn"
    size: Annotated[int, Field(ge=1)] = 128
    aggregate: Aggregate = "last"
    joiner: Literal["attention", "none"] = "attention"
    scale: Annotated[float, Field(gt=0.0)] = 1.0
    init: Literal["zero", "drawn"] = "zero"
    blocks: tuple[str, ...] | None = None
    backbone_dropout: bool = False
    width: Annotated[int, Field(ge=1)] | None = None
    train_also: tuple[Beside, ...] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None

    @field_validator("train_also", mode="before")
    @classmethod
    def _only_behind_the_blocks(cls, given: Any) -> Any:
        inner = [role for role in given or () if role in ("norms", "embeddings")]
        if inner:
            raise ValueError(
                f"{inner[0]!r} would need gradients through the backbone, which READ never computes; what can train is "
                "'head' and 'final_norm'"
            )
        return given

    @field_validator("aggregate")
    @classmethod
    def _reads_every_layer(cls, aggregate: Aggregate, info: Any) -> Aggregate:
        if info.data.get("cell") == "none" and aggregate == "last":
            raise ValueError("without recurrence the last state is of the last layer alone; use aggregate='mean'")
        return aggregate

    @property
    def no_merge(self) -> str:
        return "a recurrent network over the layers corrects the output, and no weight of the base could stand for it"

    @property
    def writes_base(self) -> str:
        return f"train_also={list(self.train_also)}" if self.train_also else ""

    def for_pretraining(self, seed: int) -> READ:
        return self.model_copy(update={"seed": seed if self.seed is None else self.seed})

    def _attach(self, model: nn.Module, residence: Residence) -> READAdapter:
        return READAdapter(model, self, residence)

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> READ | None:
        if saved.get("peft_type") != FILE_TYPE:
            return None
        refuse_unknown(dict(saved), {*_SETTINGS, "modules_to_save"})
        with reading_config():
            settings = {key: saved[key] for key in _SETTINGS}
            return cls(**{**settings, "blocks": tuple(settings["blocks"]), "train_also": ()})

    def load_saved(self, adapter: Adapter, saved: SavedAdapter) -> None:
        assert isinstance(adapter, READAdapter)
        adapter.load_tensors(saved, {})


class READAdapter(FrozenBaseAdapter):
    """READ at work on a model."""

    config: READ

    def __init__(self, model: nn.Module, config: READ, residence: Residence) -> None:
        super().__init__(model, config, residence)
        self._stacks = _choose(model, config)
        self._crossing = self._find_crossing()
        self._sides = self._make_sides()
        self._link = Link(self._sides[-1])
        self._handles: list[Any] = []
        self._still: list[nn.Module] = []
        self._unchecked: list[nn.Module] = []
        self._hooks = []
        for stack, side in zip(self._stacks, self._sides, strict=True):
            run = DepthRun(side, config.aggregate, config.scale, stack.calls)
            self._hooks.append(DepthHooks(stack, Reader(run, self._link)))
        self._begin()

    # -- what it is made of --------------------------------------------------------------------

    def _find_crossing(self) -> Crossing | None:
        if len(self._stacks) == 1:
            return None
        return Crossing(self._stacks[1].blocks, self._stacks[1].name)

    def _make_sides(self) -> list[SideNetwork]:
        generator = stable_generator(self.config.seed or 0, "read")
        sides = []
        for stack in self._stacks:
            first = stack is self._stacks[0] and self._crossing is not None  # the encoder
            reads = None if first else self._crossing
            at = next(iter(stack.blocks[-1].parameters()))
            sides.append(
                SideNetwork(
                    self.config.width or _width(stack, self.model),
                    self.config.size,
                    calls=stack.calls,
                    cell=self.config.cell,
                    joined=0 if reads is None else reads.result_width,
                    source=0 if reads is None else self.config.size,
                    values=0 if reads is None else reads.width,
                    correct=not first,
                    drawn=self.config.init == "drawn",
                    generator=generator,
                    device=at.device,
                    dtype=self._residence.held_dtype(self._compute_dtype(stack)),
                )
            )
        return sides

    def _compute_dtype(self, stack: Stack) -> torch.dtype:
        """What a stack computes in: the compute dtype of its first floating-point parameter."""
        inside = [dtype for name, dtype in self._residence.compute.items() if name.startswith(f"{stack.name}.")]
        return inside[0] if inside else self._residence.dtype or torch.get_default_dtype()

    def _in_full(self) -> Iterable[str]:
        chosen = self.config.train_also
        names: list[str] = []
        heads = head_modules(self.model)
        if chosen is None:
            getter = getattr(self.model, "get_output_embeddings", None)
            words = getter() if callable(getter) else None
            heads = {name: module for name, module in heads.items() if module is not words}
        elif "head" not in chosen:
            heads = {}
        elif not heads:
            raise ConfigError(f"train_also: {type(self.model).__name__} has no head that could train")
        names += [f"{name}." for name in heads]
        if chosen and "final_norm" in chosen:
            names += [f"{name}." for name in self._final_norms()]
        return [name for name in self._residence.parameters if name.startswith(tuple(names))] if names else []

    def _final_norms(self) -> list[str]:
        """The norms behind the last block: in the module that holds the blocks, and not before them."""
        stack = self._stacks[-1]
        found = [
            qualified(stack.owner_name, name)
            for name, child in stack.owner.named_children()
            if ("norm" in name.lower() or "Norm" in type(child).__name__) and "embed" not in name.lower()
        ]
        if not found:
            raise ConfigError(
                f"train_also: {type(self.model).__name__} has no norm behind its last block (post-norm blocks bring "
                "their own); leave 'final_norm' out"
            )
        return found

    # -- on the model --------------------------------------------------------------------------

    def _insert(self) -> None:
        for stack, side in zip(self._stacks, self._sides, strict=True):
            if hasattr(stack.owner, SIDE):
                raise ConfigError(f"{stack.owner_name or type(stack.owner).__name__} has a {SIDE!r} of its own")
            at = next(iter(stack.blocks[-1].parameters()))
            side.to(at.device)
            stack.owner.add_module(SIDE, side)
        for hooks in self._hooks:
            hooks.put_on()
        self._unchecked = stop_checkpointing(self.model)
        if not self.config.backbone_dropout:
            trained = {id(self._residence.parameters[name]) for name in self._residence.trained}
            self._still = keep_still(still_parts(self.model, trained))
        if self._crossing is not None:
            encoder = part(self.model, "encoder")
            self._handles.append(encoder.register_forward_hook(self._link.after_encoder))
            self._crossing.put_on(self._link.values, self._link.take)

    def _remove(self) -> None:
        if self._crossing is not None:
            self._crossing.take_off()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        let_go(self._still, self.model.training)
        self._still = []
        for module in self._unchecked:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        self._unchecked = []
        for hooks in self._hooks:
            hooks.take_off()
        for stack in self._stacks:
            del stack.owner._modules[SIDE]
        self._link.clear()

    def own(self) -> dict[str, nn.Parameter]:
        return {
            qualified(stack.owner_name, f"{SIDE}.{name}"): parameter
            for stack, side in zip(self._stacks, self._sides, strict=True)
            for name, parameter in side.named_parameters()
        }

    def reading(self) -> Reading:
        if self.config.backbone_dropout:
            raise ConfigError(
                "backbone_dropout=True: the hidden states are drawn anew in each forward, so they cannot be kept; "
                "attach with backbone_dropout=False"
            )
        widths = tuple(self.config.width or _width(stack, self.model) for stack in self._stacks)
        return Reading(tuple(self._hooks), widths, self._crossing, tuple(self._sides))

    # -- results -------------------------------------------------------------------------------

    def effective_weights(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())  # no matrix is updated

    def _saved(self) -> SavedAdapter:
        full, modules = self._saved_in_full()
        settings = {key: getattr(self.config, key) for key in _SETTINGS}
        settings["blocks"] = [stack.name for stack in self._stacks]
        config = {**self._peft_config(FILE_TYPE), **settings, "modules_to_save": modules or None}
        return SavedAdapter(config, dict(self.own()) | full, self._extra())


def _choose(model: nn.Module, config: READ) -> list[Stack]:
    """The stacks to read: one, or an encoder's and a decoder's, in that order."""
    found = find_stacks(model, config.blocks or ())
    if is_encoder_decoder(model) and config.blocks is None:
        sides = []
        for kind in ("encoder", "decoder"):
            inside = set(map(id, part(model, kind).modules()))
            of_kind = [stack for stack in found if id(stack.owner) in inside]
            if len(of_kind) != 1:
                raise ConfigError(_several(model, of_kind, f"{kind}'s blocks"))
            sides += of_kind
        return sides if config.joiner == "attention" else sides[1:]
    if config.blocks is not None and len(found) == 2 and is_encoder_decoder(model) and config.joiner == "attention":
        return found
    if len(found) != 1:
        raise ConfigError(_several(model, found, "blocks"))
    return found


def _several(model: nn.Module, found: list[Stack], what: str) -> str:
    names = ", ".join(stack.name for stack in found) or "none"
    return (
        f"blocks: the {what} of {type(model).__name__} could be any of {names}; name the list with blocks=['<name>']"
        " (in encoder-decoder models the encoder's and the decoder's)"
    )


def _width(stack: Stack, model: nn.Module) -> int:
    config: Any = getattr(stack.owner, "config", None) or getattr(model, "config", None)
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ConfigError(
            f"width: the config of {type(model).__name__} does not say how wide its hidden states are; give width="
        )
    return width
