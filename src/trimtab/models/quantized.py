"""Loading a checkpoint into 4 bits, tensor by tensor, and folders of quantised models.

The model is built without values; each tensor is read from its safetensors shard, quantised or cast, and put in
its place before the next one is read. So beside the quantised model there is never more than one tensor of the
checkpoint in memory. No pickle is read, and no code that came with a model is run.

A quantised model's folder has Hugging Face's config.json, in which `quantization_config` says how each layer is held,
and quantized.safetensors with packed codes and scales. It is read back bit for bit. (Under the usual file name
transformers would pass over a quantisation that it does not know, and draw the weights that do not fit anew.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from trimtab.errors import CheckpointError, ConfigError
from trimtab.models.load import read_config
from trimtab.models.quantize import check_dtype, check_settings, choose, drop_masters, make_masters
from trimtab.models.tensorfiles import TensorFiles
from trimtab.nn.nf4layer import NF4Linear
from trimtab.nn.packing import pack
from trimtab.nn.residence import disarm_fused_encoders
from trimtab.nn.weights import is_conv1d
from trimtab.quiet import quiet_libraries

METHOD = "trimtab-nf4"
TENSORS = "model.safetensors"
MIN_KEPT = 0.5
PACKED = "quantized.safetensors"


def load_quantized(
    path: str | Path,
    kind: str = "nf4",
    *,
    double: bool | None = None,
    skip: Sequence[str] | None = None,
    compute_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    master: str | Path | None = None,
    min_kept: float | None = None,
    model_class: Any = None,
) -> PreTrainedModel:
    """A model with its linear layers in 4 bits, from a plain checkpoint or from a folder of `save_quantized`.

    Args:
        path: a folder, or a hub name.
        kind: "nf4".
        double: as in `quantize`; None is True for a plain checkpoint. A quantised folder says it itself.
        skip: as in `quantize`; likewise.
        compute_dtype: as in `quantize`; None takes what a quantised folder says.
        dtype: of what is not quantised; None keeps what the files have.
        device: where the model is put, tensor by tensor.
        master: as in `quantize`. Of a quantised folder it begins with the decoded weights.
        min_kept: as in `quantize`; None takes what a quantised folder says, or else 0.5.
        model_class: a model class of transformers; None takes the one that the config names.

    Raises:
        ConfigError: a setting is wrong or has no effect, or there is no such model.
        TargetError: an ending of `skip` matches nothing.
        CheckpointError: a file is missing or damaged, or does not fit the config.
    """
    least = MIN_KEPT if min_kept is None else min_kept
    check_settings(kind, compute_dtype, least, double)
    check_dtype("dtype", dtype)
    _check_device(device)
    stored = _stored_quantization(Path(path).expanduser())
    if stored is not None and (double is not None or skip is not None):
        given = "double" if double is not None else "skip"
        raise ConfigError(f"{given} has no effect: {path} is quantised already; leave it out")
    folder = _folder(path)
    hf = _stored_config(folder) if stored is not None else _plain_config(path)
    model = _skeleton(hf, model_class)
    with TensorFiles(folder, TENSORS if stored is None else PACKED) as files:
        if stored is None:
            layers = choose(model, skip or ())
        else:
            layers = {name: model.get_submodule(name) for name in _known(model, stored["layers"], folder)}
        names = _file_names(model, files)
        masters = make_masters(layers, master)
        try:
            for name, module in layers.items():
                options: dict[str, Any] = {"compute": compute_dtype, "master": masters.get(name), "min_kept": least}
                if stored is None:
                    value = files.read(names[f"{name}.weight"], _weight_shape(module)).to(device)
                    try:
                        pack(module, double=True if double is None else double, value=value, **options)
                    except ValueError as error:
                        raise CheckpointError(f"{folder}: {name}.weight: {error}") from None
                    del value
                else:
                    options["min_kept"] = min_kept
                    _unpack_stored(module, name, stored["layers"][name], files, device, options)
            _fill(model, files, names, dtype, device)
        except BaseException:
            drop_masters(masters, master)
            raise
    disarm_fused_encoders(model)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = _stored_generation(folder)
    return model.eval()


def save_quantized(model: PreTrainedModel, path: str | Path) -> None:
    """Write a model that was quantised, and has no adapter, as a folder that `load_quantized` reads.

    Raises:
        ConfigError: the model is not quantised, or no model of transformers.
        CheckpointError: the folder cannot be written.
    """
    folder = Path(path)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    if not layers or not hasattr(model, "config"):
        what = "has no quantised layer" if not layers else "is no model of transformers"
        raise ConfigError(f"save_quantized: {type(model).__name__} {what}; call trimtab.quantize(model) first")
    from trimtab.methods.attached import record_of

    if record_of(model) is not None:
        raise ConfigError("save_quantized: the model has an adapter; save it with adapter.save(), and detach it first")
    described = {
        name: {
            "double": m.doubly,
            "dtype": _dtype_name(m.compute_dtype),
            "compute": _dtype_name(m.holder.compute),
            "min_kept": m.holder.min_kept,
        }
        for name, m in layers.items()
    }
    seen: dict[tuple[int, int, torch.Size], str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.storage_offset(), tensor.shape)
        if tensor.numel() and seen.setdefault(key, name) != name:
            continue  # tied: once is enough
        tensors[name] = tensor.detach().cpu().contiguous()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["architectures"] = [type(model).__name__]
        config["quantization_config"] = {"quant_method": METHOD, "format": 1, "layers": described}
        save_file(tensors, folder / PACKED, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the model cannot be written to {folder}: {error}") from None


# -- what a folder says ------------------------------------------------------------------------


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _stored_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {str(error).splitlines()[0]}") from None


def _stored_generation(folder: Path) -> Any:
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        file = folder / "generation_config.json"
        raise CheckpointError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None


def _stored_quantization(folder: Path) -> dict[str, Any] | None:
    """How a folder of `save_quantized` holds its layers, or None for any other."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    said = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(said, dict) or said.get("quant_method") != METHOD:
        return None
    layers = said.get("layers")
    if said.get("format") != 1 or not isinstance(layers, dict):
        raise CheckpointError(f"{file}: quantization_config has a format that this version does not know")
    return said


def _plain_config(path: str | Path) -> Any:
    """The config of a plain checkpoint; what is wrong is said of this call, which has no setting model.name."""
    try:
        return read_config(str(path))
    except ConfigError as error:
        text = str(error).removeprefix("model.name: ")
        if text.startswith("no preset"):
            text = f"there is no folder {path}, and a name on the hub is owner/name"
        raise ConfigError(f"load_quantized: {text}") from None


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    _plain_config(path)  # one clear line where there is no such model
    from huggingface_hub import snapshot_download

    with quiet_libraries():
        return Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json"]))


def _known(model: nn.Module, layers: dict[str, Any], folder: Path) -> list[str]:
    modules = dict(model.named_modules())
    for name in layers:
        module = modules.get(name)
        if module is None or not (type(module) is nn.Linear or is_conv1d(module)):
            raise CheckpointError(f"{folder}: the config names a quantised layer {name}, which the model does not have")
    return [name for name in modules if name in layers]


# -- building and filling ----------------------------------------------------------------------


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f"device = {device!r} cannot be used: {(str(error).splitlines() or ['?'])[0]}") from None


def _skeleton(hf: Any, model_class: Any) -> PreTrainedModel:
    """The model with its parameters on the meta device and its other buffers in place.

    What a config names is called only if it is a model class: transformers has functions of other kinds, too.
    """
    said = getattr(hf, "architectures", None) or []
    cls = model_class or (getattr(transformers, str(said[0]), None) if said else None)
    if cls is not None and not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        named = f"model_class = {cls!r}" if model_class else f"architectures = {said} in config.json"
        raise ConfigError(
            f"the model cannot be built: {named} is no model class of transformers; give one as model_class="
        )
    try:
        with _parameters_on_meta(), no_init_weights():
            model: PreTrainedModel = cls(hf) if cls is not None else AutoModelForCausalLM.from_config(hf)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError) as error:
        raise ConfigError(f"the model cannot be built from its config: {error}") from None
    model.tie_weights()
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While it holds, every parameter that a module registers goes to the meta device.

    Building all on the meta device would lose the buffers that no file stores (rotary frequencies, say). A
    parameter exists for a moment, uninitialised: no page of it is touched.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _file_names(model: PreTrainedModel, files: TensorFiles) -> dict[str, str]:
    """The name in the files of each of the model's tensors that they store.

    A checkpoint of the bare model lacks the prefix of a model with a head, and the other way round.

    Raises:
        CheckpointError: a parameter is nowhere in the files.
    """
    prefix = f"{model.base_model_prefix}."
    names: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    wanted = [*owners.values(), *([name] for name, _ in model.named_buffers())]
    for tied in wanted:
        tries = [t for name in tied for t in (name, name.removeprefix(prefix), prefix + name)]
        found = next((t for t in tries if t in files.homes), None)
        if found is not None:
            names.update(dict.fromkeys(tied, found))
        elif any(name in dict(model.named_parameters()) for name in tied):
            raise CheckpointError(
                f"{files.folder} does not store {tied[0]}; is it a checkpoint of {type(model).__name__}?"
            )
    return names


def _weight_shape(module: nn.Module) -> torch.Size:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape


def _unpack_stored(
    module: nn.Module, name: str, said: Any, files: TensorFiles, device: torch.device | str, options: dict[str, Any]
) -> None:
    """Make a layer what a folder of `save_quantized` stored; of `options`, what is None is taken from there."""
    try:
        dtype, double = getattr(torch, said["dtype"]), said["double"]
        # Folders of the first version do not say these two.
        compute, min_kept = said.get("compute"), said.get("min_kept", MIN_KEPT)
        compute = compute if compute is None else getattr(torch, compute)
        check_settings("nf4", compute, min_kept)
        check_settings("nf4", dtype, min_kept)
    except (KeyError, TypeError, AttributeError, ConfigError):
        dtype = double = compute = min_kept = None
    if dtype is None or not isinstance(double, bool):
        raise CheckpointError(f"{files.folder}: the config does not say how {name} is held: {said!r}")
    own_options = {"compute": compute, "min_kept": min_kept} | {n: v for n, v in options.items() if v is not None}
    pack(module, double=double, dtype=dtype, **own_options)
    assert isinstance(module, NF4Linear)
    for leaf in ("weight", *module.scale_names):
        own = getattr(module, leaf)
        key = f"{name}.{leaf}"
        if key not in files.homes:
            raise CheckpointError(f"{files.folder} does not store {key}")
        value = files.read(key, own.shape)
        if value.dtype != own.dtype:
            raise CheckpointError(f"{files.folder}: {key} is {value.dtype} and should be {own.dtype}")
        if leaf == "weight":
            module.weight = nn.Parameter(value.to(device), requires_grad=False)
        else:
            module._buffers[leaf] = value.to(device)
    if not module.weight.is_meta and not bool(module.scales().isfinite().all()):
        raise CheckpointError(f"{files.folder}: the scales of {name} are not finite; the file is damaged, save it anew")
    if options["master"] is not None:
        module.holder.start_master()


def _fill(
    model: nn.Module, files: TensorFiles, names: dict[str, str], dtype: torch.dtype | None, device: torch.device | str
) -> None:
    """Give every parameter and stored buffer that is not filled yet its value; tied ones once."""
    filled: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for leaf, parameter in module._parameters.items():
            if parameter is None or parameter.device.type != "meta":
                continue
            if id(parameter) not in filled:
                value = files.read(names[dot + leaf], parameter.shape)
                if not value.is_floating_point():
                    raise CheckpointError(
                        f"{files.folder}: {names[dot + leaf]} is {value.dtype}, which is no plain weight"
                    )
                value = value.to(device, dtype)
                filled[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            module._parameters[leaf] = filled[id(parameter)]
        own = module.scale_names if isinstance(module, NF4Linear) else ()
        for leaf, buffer in module._buffers.items():
            if buffer is None or leaf in own:
                continue
            stored = names.get(dot + leaf)
            value = buffer if stored is None else files.read(stored, buffer.shape).to(buffer.dtype)
            module._buffers[leaf] = value.to(device)
