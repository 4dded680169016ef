"""Ladder Side-Tuning (arXiv 2206.06522): a narrow Transformer beside a frozen one, fed from each of its blocks.

The side network is a stack of the model's own blocks, r times narrower. Before each of its blocks a gate mixes its
hidden states with those of the frozen block beside it, mapped down; what it ends with is mapped up and added to the
frozen stack's last hidden states. Gradients flow through the side network alone. In an encoder-decoder model there are
two, and the decoder's attends to what the encoder's ends with.

From the authors' code: the widths, the gates, the mappings, the kept layers, the initialisation by cutting. Otherwise:

- The end is added before the final norm, through a mapping that starts at zero, so that training starts at the frozen
  model exactly; theirs leaves the final hidden states to the side network, or mixes both behind the norm by a gate.
- Weights are cut by magnitude instead of by Fisher information, for which data would be needed (see `nn.pruned`).
- The mappings down start as the cut itself, so that what the cut weights read at the start is what they were cut for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from torch import nn

from trimtab.errors import ConfigError
from trimtab.methods.beside import Beside, BesideAdapter, final_norms
from trimtab.nn.draw import stable_generator
from trimtab.nn.encoded import Encoded
from trimtab.nn.ladder import LadderNetwork, LadderRun
from trimtab.nn.precision import hold
from trimtab.nn.pruned import Pair, cut_blocks, cut_norm
from trimtab.nn.reduced import config_of, head_width, reduced_config, reduced_owner
from trimtab.nn.residence import Residence
from trimtab.nn.stacks import Stack, still_parts


class Ladder(Beside):
    """A narrow Transformer beside a frozen one.

    Args:
        reduction: r, by which all widths are divided; it must divide the width of the hidden states.
        layers: numbers from 0 of the blocks that have a side block, in rising order, the same in encoder and decoder;
            None is all of them.
        temperature: T, of the gates sigmoid(a / T), where a starts at 0.
        init: "pruned": the side network's weights are those rows and columns of the frozen ones that have the largest
            absolute values; "drawn": drawn as the model's class draws them.

    `blocks`, `backbone_dropout`, `train_also` and `seed` are as for every method of this kind (`Beside`). The side
    network's own dropout is the model's, and follows `model.train()`.
    """

    abstract = False
    name: Literal["ladder"] = "ladder"
    reduction: Annotated[int, Field(ge=1)] = 8
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    temperature: Annotated[float, Field(gt=0.0)] = 0.1
    init: Literal["pruned", "drawn"] = "pruned"

    file_type = "TRIMTAB_LADDER"
    file_settings = ("reduction", "layers", "temperature", "init", "blocks", "backbone_dropout")

    @field_validator("layers")
    @classmethod
    def _rising(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and (not layers or list(layers) != sorted(set(layers))):
            raise ValueError("give the numbers of the blocks to keep, each once and in rising order")
        return layers

    @property
    def no_merge(self) -> str:
        return "a network beside the model corrects its output, and no weight of the base could stand for it"

    def idle_settings(self) -> dict[str, str]:
        drawn = self.init == "drawn" or self.seed is None
        return {} if drawn else {"seed": "init='pruned' draws nothing"}

    def _attach(self, model: nn.Module, residence: Residence) -> LadderAdapter:
        return LadderAdapter(model, self, residence)


def _divides(config: Any, reduction: int) -> bool:
    """Whether a side network can be so much narrower."""
    try:
        reduced_config(config, reduction)
    except ConfigError:
        return False
    return True


class SideEncoded(Encoded):
    """What passes from the side network beside the encoder to the one beside the decoder: its last hidden states."""

    method = "Ladder"


class LadderAdapter(BesideAdapter):
    """Ladder Side-Tuning at work on a model."""

    config: Ladder
    side_name = "ladder"
    _sides: list[LadderNetwork]
    _encoded: SideEncoded

    # -- what it is made of --------------------------------------------------------------------

    def _make_sides(self) -> list[LadderNetwork]:
        self._runs: list[LadderRun] = []
        self._configs: list[tuple[Any, Any]] = []
        sides, pairs = [], []
        for number, stack in enumerate(self._stacks):
            kept = self._kept(stack)
            config = config_of(stack, self.model)
            small = self._reduced(config)
            made = reduced_owner(stack, small, self.model, stable_generator(self._seed, "blocks", stack.name))
            leaf = stack.name.rpartition(".")[2]
            blocks = {at: made.get_submodule(f"{leaf}.{at}") for at in kept}
            kind = ("encoder", "decoder")[number] if self._pair else ""
            heads = head_width(config, kind), head_width(small, kind)
            pairs += [Pair(f"{stack.name}.{at}", stack.blocks[at], block, heads) for at, block in blocks.items()]
            norms = final_norms(stack.owner)
            side = LadderNetwork(
                blocks,
                made.get_submodule(norms[-1]) if norms else None,
                {name: made.get_submodule(name) for name in _rotary(stack.owner, leaf)},
                width=config.hidden_size,
                narrow=small.hidden_size,
                correct=stack is self._stacks[-1],
            )
            side.draw_downs(stable_generator(self._seed, "downs", stack.name))
            sides.append(side)
            self._configs.append((config, small))
        if self.config.init == "pruned" and not any(p.is_meta for p in self.model.parameters()):
            self._cut(sides, pairs)
        for stack, side in zip(self._stacks, sides, strict=True):
            self._hold(stack, side)
        return sides

    def _reduced(self, config: Any) -> Any:
        """The config of a side network.

        Raises:
            ConfigError: the widths cannot be divided so; the message has the largest reduction by which all can.
        """
        try:
            return reduced_config(config, self.config.reduction)
        except ConfigError as error:
            every = [config_of(stack, self.model) for stack in self._stacks]
            for reduction in range(min(self.config.reduction, config.hidden_size), 0, -1):
                if all(_divides(one, reduction) for one in every):
                    raise ConfigError(f"{error}, such as reduction={reduction}") from None
            raise

    @property
    def no_cache(self) -> str:
        return "its side network keeps none, and must see all tokens each time"

    @property
    def _seed(self) -> int:
        return self.config.seed or 0

    def _kept(self, stack: Stack) -> tuple[int, ...]:
        """The numbers of the blocks that have a side block."""
        if stack.shared:
            raise ConfigError(
                f"{stack.name} runs a block {stack.calls} times in a forward, and Ladder needs a block for each time; "
                "use another method"
            )
        kept = tuple(range(len(stack.blocks))) if self.config.layers is None else self.config.layers
        if kept[-1] >= len(stack.blocks):
            raise ConfigError(
                f"layers: {stack.name} has no block {kept[-1]}; its blocks are 0 to {len(stack.blocks) - 1}"
            )
        return kept

    def _cut(self, sides: list[LadderNetwork], pairs: list[Pair]) -> None:
        """Let the side networks be parts of the stacks."""
        config, small = self._configs[-1]
        if any(one.hidden_size != config.hidden_size for one, _ in self._configs):
            raise ConfigError("init='pruned': encoder and decoder are not of one width; use init='drawn'")
        rotated = any(len(side.rotary) for side in sides)
        kept = cut_blocks(pairs, config.hidden_size, small.hidden_size, rotated=rotated)
        for stack, side in zip(self._stacks, sides, strict=True):
            side.select(kept)
            if side.norm is not None:
                cut_norm(stack.owner.get_submodule(final_norms(stack.owner)[-1]), side.norm, kept)

    def _hold(self, stack: Stack, side: LadderNetwork) -> None:
        """Let what trains be held in fp32 (unless `pure`) and computed in the stack's dtype."""
        compute = self._compute_dtype(stack)
        for parameter in side.parameters():
            parameter.data = parameter.data.to(self._residence.held_dtype(compute))
            parameter.requires_grad_(True)
        for part in (side.blocks, side.norm):
            for module in () if part is None or self._residence.pure else part.modules():
                if module._parameters:
                    hold(module, compute)

    def _make_encoded(self) -> SideEncoded:
        return SideEncoded()

    def _listener(self, number: int) -> LadderRun:
        stack = self._stacks[number]
        run = LadderRun(
            self._sides[number],
            stack,
            self.config.temperature,
            self._compute_dtype(stack),
            self._configs[number],
            self._encoded if self._pair else None,
        )
        self._runs.append(run)
        return run

    # -- on the model --------------------------------------------------------------------------

    def _place(self, stack: Stack, side: nn.Module) -> None:
        assert isinstance(side, LadderNetwork)
        super()._place(stack, side)
        side.train(stack.owner.training)
        for part in (side.downs[0], side.rotary):
            part.to(_device(stack.blocks[0]))
        for number, block, down in zip(side.kept, side.blocks, side.downs[1:], strict=True):
            block.to(_device(stack.blocks[number]))
            down.to(_device(stack.blocks[number]))

    def _still_parts(self) -> Iterator[nn.Module]:
        """As of every network beside a backbone; the side network itself has dropout, and is no part of it."""
        mine = {id(module) for side in self._sides for module in side.modules()}
        trained = {id(self._residence.parameters[name]) for name in self._residence.trained}
        trained |= {id(parameter) for parameter in self.own().values()}
        return (module for module in still_parts(self.model, trained) if id(module) not in mine)

    def _insert(self) -> None:
        super()._insert()
        for run in self._runs:
            run.put_on()

    def _remove(self) -> None:
        for run in self._runs:
            run.take_off()
        super()._remove()


def _device(block: nn.Module) -> Any:
    return next(iter(block.parameters())).device


def _rotary(owner: nn.Module, blocks: str) -> list[str]:
    """The names of the modules that give rotary embeddings for all blocks."""
    return [
        name
        for name, module in owner.named_modules()
        if "Rotary" in type(module).__name__ and not name.startswith(f"{blocks}.")
    ]
