"""Where the two sublayers of a block end: the output projections of its attention and of its feed-forward network.

A layer is the attention's if a part of its name within the block says so, and an output projection if it is
called as the libraries call theirs. What this finds is checked block by block, so that a model that is built in
another way is an error and never half adapted.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trimtab.errors import TargetError
from trimtab.nn.inject import find_targets, is_linear

#: Last name parts, in lower case, of output projections: LLaMA and its kin, GPT-2, T5, OPT and BART, Falcon and
#: NeoX, DistilBERT, ALBERT, ModernBERT, torch. BERT's is "output.dense", GPT-NeoX's "attention.dense".
OUTPUT_NAMES = frozenset(
    {"o_proj", "down_proj", "c_proj", "o", "wo", "out_proj", "fc2", "fc_out", "dense_4h_to_h", "out_lin", "lin2"}
    | {"ffn_output", "linear2", "w2", "dense"}
)
_ATTENTION = ("attn", "attention")
_CROSS = ("cross", "encdec", "encoder_attn")


def sublayer_outputs(model: nn.Module, *, attention: bool, exclude: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The output projection of the feed-forward network of each block, by qualified name, in the model's order.

    Args:
        model: a model with its blocks in an `nn.ModuleList`.
        attention: those of self-attention, too (not of cross-attention).
        exclude: name endings to leave out.

    Raises:
        TargetError: there are none, or a block has not exactly one of each.
    """
    blocks = _blocks(model)
    found: list[str] = []
    for block, linears in blocks.items():
        ends = [name for name in linears if is_output(name)]
        inner = [name for name in ends if _says(name, _ATTENTION)]
        wanted = {"feed-forward": [name for name in ends if name not in inner]}
        if attention:
            wanted["self-attention"] = [name for name in inner if not _says(name, _CROSS)]
        if not ends:
            continue
        for what, names in wanted.items():
            if len(names) != 1:
                raise TargetError(
                    f"targets: {block} has {len(names)} layers that look like its {what}'s output projection"
                    f"{' (' + ', '.join(names) + ')' if names else ''}, not one; its linear layers are "
                    f"{', '.join(linears)}; name the layers: targets=[...]"
                )
        found += [f"{block}.{name}" for names in wanted.values() for name in names]
    if not found:
        raise TargetError(
            f"targets: {type(model).__name__} has no blocks whose output projections could be told by their names; "
            "name the layers: targets=[...]"
        )
    chosen = find_targets(model, found, exclude)
    return {name: module for name, module in chosen.items() if name in found}


def _blocks(model: nn.Module) -> dict[str, list[str]]:
    """The linear layers of each block, by their names within it; a block is an entry of an outermost list."""
    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    blocks: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        if stack is not None and is_linear(module):
            index, _, rest = name.removeprefix(f"{stack}.").partition(".")
            blocks.setdefault(f"{stack}.{index}", []).append(rest)
    return {block: [name for name in names if name] for block, names in blocks.items()}


def is_output(name: str) -> bool:
    """Whether a linear layer's name within its block is that of an output projection."""
    owner, _, leaf = name.lower().rpartition(".")
    if leaf == "dense" and not _says(owner.rpartition(".")[2], _ATTENTION):
        return owner.rpartition(".")[2] == "output"
    return leaf in OUTPUT_NAMES


def says_attention(name: str) -> bool:
    """Whether a name within a block is of, or in, an attention."""
    return _says(name, _ATTENTION)


def _says(name: str, words: Sequence[str]) -> bool:
    return any(word in name.lower() for word in words)
