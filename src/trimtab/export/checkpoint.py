"""A Hugging Face checkpoint on disk, read one tensor at a time.

Files are read as safetensors alone, and no code that came with a model is ever run. A tensor is read into memory of
its own, not mapped: pages of a mapped file count as the process's memory until the system takes them back, and a
merge of a large model must stay bounded by its largest tensor on every system.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trimtab.errors import CheckpointError, ConfigError
from trimtab.inside import inside
from trimtab.quiet import quiet_libraries
from trimtab.train.tensorfile import DTYPES

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: Files beside the weights that are known and hold no code; nothing else is downloaded or copied.
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
)  # fmt: skip

#: What layer norms called their parameters in the first checkpoints.
_OLD_NAMES = {"gamma": "weight", "beta": "bias"}

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class Stored(NamedTuple):
    """Where a tensor lies: its file's name, its dtype, its shape, and its bytes in the file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's config and the places of its tensors.

    Attributes:
        name: as the user gave it.
        folder: where its files lie.
        config: config.json.
        tensors: each tensor's place, in the order of the files.
        files: the names of the weight files, in order.
        sharded: whether an index names them.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]
    files: tuple[str, ...]
    sharded: bool

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        place = self.tensors[name]
        raw = torch.empty(place.nbytes, dtype=torch.uint8)
        path = self.folder / place.file
        try:
            with open(path, "rb") as file:
                file.seek(place.begin)
                if file.readinto(raw.numpy().data) != place.nbytes:
                    raise CheckpointError(f"{path} ends within the tensor {name}; it was changed while it was read")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        return raw.view(place.dtype).reshape(place.shape)


def open_checkpoint(name: str) -> Checkpoint:
    """Find a checkpoint's files and read their headers.

    Args:
        name: a local folder, or a name on the Hugging Face hub.

    Raises:
        ConfigError: there is no such folder, or the hub does not give it.
        CheckpointError: a file is missing, damaged, leads out of the folder, or is of a kind that is not read.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ConfigError(f"{name} is a file; give the folder that holds config.json and {SINGLE}")
    if not folder.is_dir():
        folder = _from_hub(name)
    config = _read_json(inside(folder, "config.json"), f"{name} is no model folder")
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{name} holds quantised weights; take the plain checkpoint that it was made from")
    index = folder / INDEX
    if index.is_file():
        weight_map = _read_weight_map(inside(folder, INDEX), folder)
        files = tuple(sorted(set(weight_map.values())))
    elif (folder / SINGLE).is_file():
        weight_map, files = None, (SINGLE,)
    else:
        found = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        kind = "only pickled weights, which are not read" if found else "no weights"
        raise CheckpointError(f"{name} holds {kind}; it needs {SINGLE}")
    tensors: dict[str, Stored] = {}
    for file in files:
        for key, place in _read_header(inside(folder, file), file).items():
            if key in tensors:
                raise CheckpointError(f"{name}: the tensor {key} is in two files, {tensors[key].file} and {file}")
            tensors[key] = place
    if weight_map is not None:
        wrong = sorted(
            set(weight_map) ^ set(tensors) | {key for key in tensors if weight_map.get(key) != tensors[key].file}
        )
        if wrong:
            raise CheckpointError(f"{index} does not fit the files beside it: {len(wrong)} tensors, {wrong[0]} first")
    return Checkpoint(name, folder, config, tensors, files, weight_map is not None)


def side_files(folder: Path) -> list[Path]:
    """The known files beside the weights that a folder has.

    Raises:
        CheckpointError: one leads out of the folder.
    """
    return [inside(folder, name) for name in SIDE_FILES if (folder / name).is_file()]


def meta_model(folder: Path, label: str, *, tied: bool | None = None) -> nn.Module:
    """The model of a folder as shapes without values, of the class that its config names; no code of its own.

    Args:
        folder: with a config.json.
        label: how the user named it, for messages.
        tied: whether embeddings and head are tied; None as the config says.

    Raises:
        CheckpointError: transformers does not know the model.
    """
    import transformers

    given = _read_json(inside(folder, "config.json"), f"{label} is no model folder").get("architectures")
    if given is not None and not (isinstance(given, list) and all(isinstance(one, str) for one in given)):
        raise CheckpointError(f"{label}: architectures = {given!r} in its config.json is no list of class names")
    try:
        with quiet_libraries(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
            for part in (config, config.get_text_config()):
                if tied is not None:
                    part.tie_word_embeddings = tied
            named = (config.architectures or [""])[0]
            kind = getattr(transformers, named, None) if named.isidentifier() else None
            if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
                model: nn.Module = kind(config)
            elif named:
                raise CheckpointError(
                    f"{label}: transformers {transformers.__version__} has no model class {named!r}, and code "
                    "that comes with a model is not run"
                )
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            model.tie_weights()  # type: ignore[operator]
    except CheckpointError:
        raise
    except Exception as error:  # a wrong value in a config can fail anywhere in a model's constructor
        raise CheckpointError(f"{label}: its config.json gives no model: {_first_line(error)}") from error
    return model


def model_names(checkpoint: Checkpoint, model: nn.Module) -> dict[str, str]:
    """What the checkpoint's tensors are called in the model: its name in the file -> its name in the model.

    A file may leave out the name of the body ("h.0..." for "transformer.h.0...") or have it too many. A tensor that
    the model does not have (an old buffer) is not in the result.

    Raises:
        CheckpointError: a tensor has another shape in the file than in the model.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for name, place in checkpoint.tensors.items():
        wanted = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in shapes), None)
        if wanted is None:
            owner, _, leaf = name.rpartition(".")
            renamed = f"{owner}.{_OLD_NAMES.get(leaf, leaf)}"
            if renamed != name and any(n in shapes for n in (renamed, prefix + renamed, renamed.removeprefix(prefix))):
                raise CheckpointError(
                    f"{checkpoint.name}: {name} is an old name, which transformers reads as {renamed}; load the model "
                    "with from_pretrained and write it with save_pretrained first, and take that folder"
                )
            continue
        if wanted in found.values():
            raise CheckpointError(f"{checkpoint.name} holds {wanted} twice, the second time as {name}")
        if shapes[wanted] != place.shape:
            raise CheckpointError(
                f"{checkpoint.name}: {name} is {place.shape} in {place.file} and {shapes[wanted]} by config.json"
            )
        found[name] = wanted
    return found


def mapped_model(checkpoint: Checkpoint, *, tied: bool = False) -> nn.Module:
    """The model of a checkpoint with its weights mapped from the files: they take no memory until they are read.

    Args:
        checkpoint: of which model.
        tied: whether a weight that the config ties is one parameter, or one of its own under each of its names.

    Raises:
        CheckpointError: transformers does not know the model, or a weight is missing or has another shape.
    """
    model = meta_model(checkpoint.folder, checkpoint.name)
    keys = {name: key for key, name in model_names(checkpoint, model).items()}
    values: dict[str, Tensor] = {}
    for file in checkpoint.files:
        with safe_open(checkpoint.folder / file, framework="pt") as opened:
            for name, key in keys.items():
                if checkpoint.tensors[key].file == file:
                    values[name] = opened.get_tensor(key)
    for group in ties(model):
        held = next((name for name in group if name in values), None)
        for name in group:
            if held is not None and name not in values:
                # A mapping of its own, since what is written into one of the two must not reach the other.
                with safe_open(checkpoint.folder / checkpoint.tensors[keys[held]].file, framework="pt") as opened:
                    values[name] = opened.get_tensor(keys[held])
    missing = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in values]
    if missing:
        raise CheckpointError(f"{checkpoint.name} lacks {len(missing)} tensors of its model, {missing[0]} first")
    first = {name: group[0] for group in ties(model) for name in group} if tied else {}
    made: dict[str, nn.Parameter] = {}
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            parameter = nn.Parameter(value, requires_grad=value.is_floating_point())
            module._parameters[leaf] = made.setdefault(first.get(name, name), parameter)
        else:
            module._buffers[leaf] = value
    return model


def ties(model: nn.Module) -> list[list[str]]:
    """The groups of names under which the model holds one parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def open_config(name: str) -> Path:
    """The folder with the config.json of a model, without its weights.

    Raises:
        ConfigError, CheckpointError: as `open_checkpoint`.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _from_hub(name, ("config.json",))
    _read_json(inside(folder, "config.json"), f"{name} is no model folder")
    return folder


def _from_hub(name: str, files: Sequence[str] = (*SIDE_FILES, SINGLE, INDEX, "model-*.safetensors")) -> Path:
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"there is no folder {name}")
    from huggingface_hub import snapshot_download

    try:
        with quiet_libraries():
            return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the client and the network below it raise many kinds; all mean: not to be had
        text = _first_line(error)
        if re.search("offline|connect|cached|cache|resolve", text, re.IGNORECASE):
            raise ConfigError(
                f"{name} is no folder, and the hub cannot be reached; give a local folder, or go online once"
            ) from error
        raise ConfigError(f"{name} is no folder, and the hub does not give it: {text}") from error


def _read_json(path: Path, otherwise: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{otherwise}: {path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _read_weight_map(path: Path, folder: Path) -> dict[str, str]:
    weight_map = _read_json(path, str(folder)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map of names to files")
    for file in sorted(set(weight_map.values())):
        if Path(file).suffix != ".safetensors":
            raise CheckpointError(f"{path} names {file!r}; only .safetensors files are read")
        if not inside(folder, file).is_file():
            raise CheckpointError(f"{folder} lacks {file}, which {INDEX} names")
    return weight_map


def _read_header(path: Path, name: str) -> dict[str, Stored]:
    """The places of a file's tensors; the library checks the header against the file's length first."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from None
    places: dict[str, Stored] = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(f"{path}: the tensor {key} has the dtype {entry['dtype']}, which is not read")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        shape = tuple(entry["shape"])
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{path} is damaged: {key} has {end - begin} bytes for {shape} of {entry['dtype']}")
        places[key] = Stored(name, dtype, shape, begin, end)
    return places


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
