"""READ (arXiv 2305.15348): a small recurrent network over the layers of a frozen Transformer corrects its output.

Nothing is back-propagated through the backbone, which runs with gradients off: training keeps neither its
activations nor runs its backward pass. Each token is corrected alone, from its own hidden states through the layers,
so causality and the KV cache stay what they are.

In an encoder-decoder model the encoder has a network of its own. The encoder is not corrected; what its network found
reaches the decoder's through the joiner: the decoder's frozen cross-attention probabilities, applied to it.

The paper's text leaves much open. What is built here is its idea with the choices of the authors' code as settings:
`READ(cell="gru", size=256, aggregate="mean", init="drawn")` is theirs for one stack, but for how the recurrence's own
weights are drawn (see `DepthCell`). In encoder-decoder models theirs has two such networks and no joiner.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from torch import nn

from trimtab.errors import ConfigError
from trimtab.methods.beside import Beside, BesideAdapter
from trimtab.nn.crossing import Crossing
from trimtab.nn.draw import stable_generator
from trimtab.nn.recurrence import Cell
from trimtab.nn.replay import Reading
from trimtab.nn.residence import Residence
from trimtab.nn.sidelink import Link, Reader
from trimtab.nn.sidenet import Aggregate, DepthRun, SideNetwork
from trimtab.nn.stacks import Stack


class READ(Beside):
    """A recurrent network over depth beside a frozen backbone.

    Args:
        cell: "rnn" (tanh), "gru" or "lstm"; or "none": each layer has a network of its own, without recurrence (the
            paper's ablation), which goes with aggregate="mean".
        size: k, of the recurrence's state, at most 65,536.
        aggregate: "last": the correction reads the last state; "mean": the mean of all.
        joiner: "attention": the decoder's network sees what the encoder's found, through the frozen cross-attention;
            "none": it does not, and the encoder has no network. Without effect in models of one stack.
        scale: s, of the correction.
        init: "zero": W_o = b_o = 0, so that training starts at the backbone exactly; "drawn": both as torch draws a
            linear layer.
        width: of the hidden states; None asks the model's config.

    `blocks`, `backbone_dropout`, `train_also` and `seed` are as for every method of this kind (`Beside`).
    """

    abstract = False
    name: Literal["read"] = "read"
    cell: Cell | Literal["none"] = "rnn"
    size: Annotated[int, Field(ge=1, le=2**16)] = 128
    aggregate: Aggregate = "last"
    joiner: Literal["attention", "none"] = "attention"
    scale: Annotated[float, Field(gt=0.0)] = 1.0
    init: Literal["zero", "drawn"] = "zero"
    width: Annotated[int, Field(ge=1)] | None = None

    file_type = "TRIMTAB_READ"
    file_settings = ("cell", "size", "aggregate", "joiner", "scale", "init", "blocks", "backbone_dropout", "width")

    @field_validator("aggregate")
    @classmethod
    def _reads_every_layer(cls, aggregate: Aggregate, info: Any) -> Aggregate:
        if info.data.get("cell") == "none" and aggregate == "last":
            raise ValueError("without recurrence the last state is of the last layer alone; use aggregate='mean'")
        return aggregate

    @property
    def reads_encoder(self) -> bool:
        return self.joiner == "attention"

    @property
    def no_merge(self) -> str:
        return "a recurrent network over the layers corrects the output, and no weight of the base could stand for it"

    @property
    def no_hidden_cache(self) -> str:
        why = "with backbone_dropout=True they are drawn anew in each forward (False keeps them the same)"
        return why if self.backbone_dropout else ""

    def _attach(self, model: nn.Module, residence: Residence) -> READAdapter:
        return READAdapter(model, self, residence)


class READAdapter(BesideAdapter):
    """READ at work on a model."""

    config: READ
    side_name = "read"
    _sides: list[SideNetwork]
    _encoded: Link

    def _make_sides(self) -> list[SideNetwork]:
        self._crossing = Crossing(self._stacks[1].blocks, self._stacks[1].name) if self._pair else None
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

    def _make_encoded(self) -> Link:
        return Link(self._sides[-1])

    def _listener(self, number: int) -> Reader:
        run = DepthRun(self._sides[number], self.config.aggregate, self.config.scale, self._stacks[number].calls)
        return Reader(run, self._encoded)

    def _insert(self) -> None:
        super()._insert()
        if self._crossing is not None:
            self._crossing.put_on(self._encoded.values, self._encoded.take)

    def _remove(self) -> None:
        if self._crossing is not None:
            self._crossing.take_off()
        super()._remove()

    def reading(self) -> Reading:
        widths = tuple(self.config.width or _width(stack, self.model) for stack in self._stacks)
        return Reading(tuple(self._hooks), widths, self._crossing, tuple(self._sides))


def _width(stack: Stack, model: nn.Module) -> int:
    config: Any = getattr(stack.owner, "config", None) or getattr(model, "config", None)
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ConfigError(
            f"width: the config of {type(model).__name__} does not say how wide its hidden states are; give width="
        )
    return width
