"""Which layers a method adapts, and what role each tensor of a model has.

Works on any `nn.Module`: no model family is named here, only what a module is (an embedding, a norm, a
linear layer) and, for output heads, what Hugging Face models call them.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn

from trimtab.errors import TargetError
from trimtab.nn.swap import Swapped
from trimtab.nn.weights import Holder, is_conv1d, shape_of

ALL_LINEAR = "all-linear"

#: Last name parts of output heads in Hugging Face models; `get_output_embeddings` finds the others.
HEAD_NAMES = frozenset(
    {
        "lm_head",
        "embed_out",
        "output_projection",
        "score",
        "classifier",
        "pre_classifier",
        "qa_outputs",
        "classification_head",
        "pooler",
    }
)


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The output heads by all their names: what `get_output_embeddings` returns, and modules with a head's name."""
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    named = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    heads = {id(module) for name, module in named if module is output or name.rpartition(".")[2] in HEAD_NAMES}
    return {name: module for name, module in named if id(module) in heads}


def task_head(model: nn.Module) -> dict[str, nn.Module]:
    """What a model for a task has beside its base model, by name; nothing in a language model, or without a base."""
    base = getattr(model, "base_model", model)  # transformers' name for a model without its head
    getter = getattr(model, "get_output_embeddings", None)
    if base is model or (callable(getter) and getter() is not None):
        return {}
    return {name: module for name, module in model.named_children() if module is not base}


def is_linear(module: nn.Module) -> bool:
    """Whether a layer can be adapted: exactly nn.Linear (a subclass may not call its forward), Conv1D, or quantised."""
    return type(module) is nn.Linear or is_conv1d(module) or isinstance(getattr(module, "holder", None), Holder)


def passed_over(model: nn.Module, chosen: Callable[[str], bool] = bool) -> str:
    """The end of an error message: which subclasses of nn.Linear were passed over, and why; empty if there are none.

    Args:
        model: any module.
        chosen: whether a name is meant; all are without it.
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, Swapped)]
    found = [(name, module) for name, module in found if not is_linear(module) and chosen(name)]
    if not found:
        return ""
    name, module = found[0]
    more = f" and {len(found) - 1} more are" if len(found) > 1 else " is"
    return (
        f"; {name}{more} passed over, of {type(module).__name__}, a subclass of nn.Linear: its forward may be another "
        "one, or not be called"
    )


def warn_of_rest(model: nn.Module, chosen: Mapping[str, nn.Module], what: str, left: str) -> None:
    """Warn if layers hold less than half of what a model multiplies with: all matrices but embeddings, norms, heads.

    Args:
        model: any module.
        chosen: the layers by name.
        what: the call or setting that chose them.
        left: what happens to the others.
    """
    size = sum(rows * columns for rows, columns in map(shape_of, chosen.values()))
    covered = {f"{name}.weight" for name in chosen}
    rest = {
        name: model.get_parameter(name)
        for name, roles in parameter_roles(model).items()
        if roles == {"base"} and name not in covered
    }
    rest = {name: p for name, p in rest.items() if p.dim() > 1 and p.is_floating_point()}
    whole = size + sum(p.numel() for p in rest.values())
    if 2 * size >= whole:
        return
    largest: dict[str, str] = {}
    for name, p in sorted(rest.items(), key=lambda entry: -entry[1].numel()):
        largest.setdefault(name.rpartition(".")[2], f"{name} {tuple(p.shape)}")
    warnings.warn(
        f"{what}: the linear layers hold {100 * size / whole:.0f} % of the weights in {type(model).__name__}'s blocks; "
        f"the largest of the others are {', '.join(list(largest.values())[:3])}: {left}",
        stacklevel=3,
    )


def find_targets(
    model: nn.Module, targets: str | Sequence[str], exclude: Sequence[str] = (), *, embeddings: bool = False
) -> dict[str, nn.Module]:
    """The layers to adapt, by qualified name, in the model's order.

    Args:
        model: any module.
        targets: "all-linear": every linear of the blocks, not the output head (in a model without a known
            head, every linear). A list of name endings: "q_proj" or "attn.q_proj" match whole parts. Any
            other string: a regular expression that must match a whole qualified name.
        exclude: name endings to leave out.
        embeddings: let names and regular expressions match embeddings, too.

    Raises:
        TargetError: nothing matches (the closest names are listed), or a match is no linear layer.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if name and (is_linear(module) or (embeddings and isinstance(module, nn.Embedding)))
    }
    if not linears:
        raise TargetError(
            f"targets={targets!r}: {type(model).__name__} has no linear layers to adapt{passed_over(model)}"
        )
    if targets == ALL_LINEAR:
        chosen = _all_linear(model, {name: module for name, module in linears.items() if is_linear(module)})
    elif isinstance(targets, str):
        chosen = _by_pattern(model, linears, targets)
    else:
        chosen = _by_ending(model, linears, targets)
    for ending in exclude:
        if not any(name_ends(name, ending) for name in linears):
            raise TargetError(f"exclude: {ending!r} matches no linear layer; {closest(ending, linears)}")
    kept = {name: module for name, module in chosen.items() if not any(name_ends(name, end) for end in exclude)}
    if not kept:
        raise TargetError(
            f"exclude={list(exclude)!r} leaves none of the {len(chosen)} layers that targets={targets!r} matches"
        )
    _refuse_shared(model, kept)
    return kept


def _all_linear(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, nn.Module]:
    heads = head_modules(model)
    inside_head = tuple(f"{name}." for name in heads)
    body = {n: m for n, m in linears.items() if n not in heads and not n.startswith(inside_head)}
    if not heads:
        return body
    stacks = tuple(f"{name}." for name, module in model.named_modules() if name and isinstance(module, nn.ModuleList))
    blocks = {n: m for n, m in body.items() if n.startswith(stacks)}
    if not (blocks or body):
        raise TargetError(
            f"targets='{ALL_LINEAR}': the only linear layers are the output head {sorted(heads)}; name them"
            f"{passed_over(model)}"
        )
    return blocks or body


def _by_pattern(model: nn.Module, linears: dict[str, nn.Module], pattern: str) -> dict[str, nn.Module]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise TargetError(
            f"targets={pattern!r} is not a regular expression: {error}; for name endings give a list"
        ) from None
    chosen = {name: module for name, module in linears.items() if compiled.fullmatch(name)}
    if not chosen:
        raise TargetError(
            f"targets={pattern!r} matches no linear layer (a string is a regular expression for whole names; for "
            f"endings give a list); {closest(pattern, linears)}"
            f"{passed_over(model, lambda name: compiled.fullmatch(name) is not None)}"
        )
    return chosen


def _by_ending(model: nn.Module, linears: dict[str, nn.Module], endings: Sequence[str]) -> dict[str, nn.Module]:
    if not endings:
        raise TargetError(f"targets is an empty list; name layer endings or use '{ALL_LINEAR}'")
    for ending in endings:
        if any(name_ends(name, ending) for name in linears):
            continue
        others = [(n, m) for n, m in model.named_modules() if n and name_ends(n, ending)]
        if others:
            name, module = others[0]
            if isinstance(module, nn.Linear) and (why := passed_over(model, partial(name_ends, ending=ending))):
                raise TargetError(f"targets: {ending!r} matches {name}, which cannot be adapted{why}")
            raise TargetError(
                f"targets: {ending!r} matches {name}, a {type(module).__name__}, which is no nn.Linear or Conv1D"
            )
        raise TargetError(
            f"targets: {ending!r} matches no linear layer; {closest(ending, linears)}{passed_over(model)}"
        )
    return {name: module for name, module in linears.items() if any(name_ends(name, ending) for ending in endings)}


def _refuse_shared(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """A weight that another module reads as well (tied weights) cannot carry an adapter of one of them."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in chosen.items():
        shared = owners.get(id(module.weight), [])
        if len(shared) > 1:
            raise TargetError(
                f"targets: {name}.weight is tied ({' = '.join(shared)}); leave it out with exclude=['{name}'], or give "
                "the output head a weight of its own with trimtab.untie(model)"
            )


def name_ends(name: str, ending: str) -> bool:
    """Whether the last whole parts of a qualified name are `ending`."""
    return name == ending or name.endswith(f".{ending}")


def closest(wanted: str, linears: dict[str, nn.Module]) -> str:
    """The near misses of a name ending, as the end of an error message; embeddings among them if they are very near."""
    wanted = wanted.rpartition(".")[2]
    endings = sorted({name.rpartition(".")[2] for name, module in linears.items() if is_linear(module)})
    others = sorted({name.rpartition(".")[2] for name, module in linears.items() if not is_linear(module)})
    near = difflib.get_close_matches(wanted, others, n=4, cutoff=0.7)
    near += difflib.get_close_matches(wanted, endings, n=4 - len(near), cutoff=0.3) if len(near) < 4 else []
    return f"the closest names are {', '.join(near or endings[:8])}"


def parameter_roles(model: nn.Module) -> dict[str, frozenset[str]]:
    """The roles of each parameter, tied ones once, under its first name.

    Roles are "embedding", "norm", "head" and "base"; a tied embedding and head has both.
    """
    modules = dict(model.named_modules(remove_duplicate=False))  # T5 shares the module of its embeddings
    heads = head_modules(model)
    inside_head = tuple(f"{name}." for name in heads)
    roles: dict[int, set[str]] = {}
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner_name = name.rpartition(".")[0]
        owner = modules[owner_name]
        kind = type(owner).__name__
        if owner_name in heads or name.startswith(inside_head):
            role = "head"
        elif isinstance(owner, nn.Embedding) or "Embedding" in kind:
            role = "embedding"
        elif "Norm" in kind:
            role = "norm"
        else:
            role = "base"
        names.setdefault(id(parameter), name)
        roles.setdefault(id(parameter), set()).add(role)
    return {names[key]: frozenset(value) for key, value in roles.items()}
