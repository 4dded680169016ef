"""VeRA (arXiv 2310.11454): y = x W' + b * ((d * (x A')) B'), with W, A and B frozen and the vectors d, b trained.

A and B are random and shared by the layers, so a file holds the vectors, the seed and a checksum of what it
gives. By default there is one A for each input width and one B for each output width (`pair="per_width"`); PEFT
has one pair of the largest shape and slices it, and `pair="peft"` does the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.errors import CannotSave, CheckpointError, ConfigError
from trimtab.methods.base import Adapter
from trimtab.methods.dropout import Dropout
from trimtab.methods.folder import SavedAdapter, reading_config, saved_layers
from trimtab.methods.frozen import FrozenBaseAdapter, Targeted
from trimtab.nn.pairs import Letter, Pairs
from trimtab.nn.residence import Residence
from trimtab.nn.vera import VeRAMixin
from trimtab.nn.weights import is_conv1d, shape_of

Pair = Literal["per_width", "peft"]

#: What an adapter_config.json says it is: PEFT's name for what PEFT can hold, and one it refuses for the other.
PEFT_TYPES: dict[Pair, str] = {"peft": "VERA", "per_width": "TRIMTAB_VERA_PER_WIDTH"}

#: The fields of PEFT's config that are read or make no difference to a trained adapter.
KNOWN_FIELDS = frozenset(
    {"r", "target_modules", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"}
    | {"fan_in_fan_out", "modules_to_save", "init_weights", "exclude_modules", "layers_to_transform", "layers_pattern"}
)

#: PEFT's names of the pair in an adapter file.
PROJECTIONS: dict[Letter, str] = {"A": "base_model.vera_A", "B": "base_model.vera_B"}


class VeRA(Targeted):
    """Vectors on linear layers, between frozen random matrices that the layers share.

    Args:
        rank: r, at least 1. It may be above the layers' size: the paper has 1,024 at a width of 768.
        d_init: the initial value of every entry of d; b starts at 0.
        pair: "per_width": an A for each input width and a B for each output width, each scaled for its own
            fan-in. "peft": PEFT's one pair of the largest shape, sliced, for files that PEFT reads.
        dropout: on the adapter branch's input.

    `targets`, `exclude`, `train_also` and `seed` (of A and B) are as for every method on linear layers.
    """

    abstract = False
    name: Literal["vera"] = "vera"
    rank: Annotated[int, Field(ge=1)] = 256
    d_init: Annotated[float, Field(gt=0.0)] = 0.1
    pair: Pair = "per_width"
    dropout: Dropout = 0.0

    @property
    def update_rank(self) -> int:
        return self.rank

    def _attach(self, model: nn.Module, residence: Residence) -> VeRAAdapter:
        return VeRAAdapter(model, self, residence)

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> VeRA | None:
        kinds = {kind: pair for pair, kind in PEFT_TYPES.items()}
        if saved.get("peft_type") not in kinds:
            return None
        layers = saved_layers(saved, KNOWN_FIELDS)
        with reading_config():
            return cls(
                rank=saved["r"],
                d_init=saved.get("d_initial", 0.1),
                seed=saved["projection_prng_key"],
                pair=kinds[saved["peft_type"]],
                dropout=saved.get("vera_dropout", 0.0),
                **layers,
            )

    def load_saved(self, adapter: Adapter, saved: SavedAdapter) -> None:
        assert isinstance(adapter, VeRAAdapter)
        adapter.load_pair(saved)
        adapter.load_tensors(saved, {})


class VeRAAdapter(FrozenBaseAdapter):
    """VeRA at work on a model.

    Attributes:
        pairs: the matrices A and B that the layers share.
    """

    config: VeRA
    mixin = VeRAMixin

    def __init__(self, model: nn.Module, config: VeRA, residence: Residence) -> None:
        super().__init__(model, config, residence)
        shapes = [shape_of(module) for module in self._targets.values()]
        self.pairs = Pairs(shapes, rank=config.rank, seed=config.seed or 0, sliced=config.pair == "peft")
        self._begin()

    def _new_parts(self, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
        weight = module.weight
        assert isinstance(weight, Tensor)
        dtype = self._residence.held_dtype(self._residence.compute_dtype(name, module))
        d = torch.full((self.config.rank,), self.config.d_init, dtype=dtype, device=weight.device)
        b = torch.zeros(shape_of(module)[0], dtype=dtype, device=weight.device)
        return {"vera_lambda_d": nn.Parameter(d), "vera_lambda_b": nn.Parameter(b)}

    def _attributes(self, name: str, module: nn.Module) -> dict[str, Any]:
        weight = module.weight
        assert isinstance(weight, Tensor)
        out_features, in_features = shape_of(module)
        place = weight.device, self._residence.compute_dtype(name, module)
        return {
            "vera_A": self.pairs.get("A", in_features, *place),
            "vera_B": self.pairs.get("B", out_features, *place),
            "pairs": self.pairs,
            "name": name,
            "dropout": self.config.dropout,
        }

    # -- files ---------------------------------------------------------------------------------

    def save(self, path: str | Path, *, layout: Literal["auto", "peft"] = "auto") -> None:
        """Write the adapter as a folder that `trimtab.load_adapter` reads.

        Args:
            path: of the folder.
            layout: "peft" insists on a folder that PEFT reads, too. "auto" is the same with `pair="peft"`, and
                with the other pair, which PEFT cannot hold, a folder that PEFT refuses.

        Raises:
            CannotSave: layout="peft", and PEFT could not hold this adapter.
        """
        if layout not in ("auto", "peft"):
            raise ConfigError(f"layout={layout!r}: there are 'auto' and 'peft'")
        if layout == "peft" and not self.pairs.sliced:
            raise CannotSave(
                f"layout='peft': PEFT slices one pair of matrices and cannot hold pair={self.config.pair!r}; attach "
                "with VeRA(pair='peft') to exchange files with PEFT, merge() and save the model, or leave layout out"
            )
        super().save(path)

    def _saved(self) -> SavedAdapter:
        full, modules = self._saved_in_full()
        config = {
            **self._peft_config(PEFT_TYPES[self.config.pair]),
            "r": self.config.rank,
            "d_initial": self.config.d_init,
            "projection_prng_key": self.config.seed or 0,
            "save_projection": self.pairs.given,
            "vera_dropout": self.config.dropout,
            "target_modules": list(self._targets),
            "modules_to_save": modules or None,
            "fan_in_fan_out": any(is_conv1d(module) for module in self._targets.values()),
            "bias": "none",
            "init_weights": True,
        }
        pair = {name: self.pairs.exact(letter, 0) for letter, name in PROJECTIONS.items()} if self.pairs.given else {}
        return SavedAdapter(config, {**self.own(), **full, **pair}, self._extra(pair=self.pairs.checksums()))

    def load_pair(self, saved: SavedAdapter) -> None:
        """Make sure that A and B are those that a saved adapter was trained with; takes them out of its tensors.

        Raises:
            CheckpointError: they are not, and the file does not hold them.
        """
        pair = {letter: saved.tensors.pop(name) for letter, name in PROJECTIONS.items() if name in saved.tensors}
        if pair and (len(pair) < 2 or not self.pairs.sliced):
            raise CheckpointError("the adapter's pair is not whole: it needs both vera_A and vera_B, of pair='peft'")
        if saved.config.get("save_projection") and not pair:
            raise CheckpointError("the adapter lacks vera_A and vera_B, which its save_projection = true promises")
        try:
            changed = self.pairs.give(pair) if pair else False
        except ValueError as error:
            raise CheckpointError(f"the adapter is of another base: {error}") from None
        if changed:
            self._remove()
            self._insert()
        then, now = saved.extra.get("pair"), self.pairs.checksums() if "pair" in saved.extra else {}
        if then is None:
            return  # PEFT wrote it
        if not isinstance(then, dict) or set(then) != set(now):
            widths = ", ".join(then) if isinstance(then, dict) else repr(then)
            raise CheckpointError(
                f"the adapter is of another base: its pair has the widths {widths}, and this model's layers "
                f"{', '.join(now)}"
            )
        if wrong := [width for width in now if now[width] != then[width]]:
            raise CheckpointError(
                f"the random matrix {wrong[0]} that seed {self.pairs.seed} gives is not the one that the adapter was "
                f"trained with (sha256 {now[wrong[0]][:12]}, stored {str(then[wrong[0]])[:12]}): the seed, the rank or "
                "the checksum was changed since; restore the files as they were saved"
            )
