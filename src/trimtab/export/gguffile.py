"""Writing a GGUF file, tensor by tensor, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import CheckpointError, ConfigError
from trimtab.export.folder import hidden_folder
from trimtab.export.ggufnames import gguf_package

#: llama.cpp's numbers for what most of a file's tensors are.
FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}


def refuse_used_file(out: Path) -> None:
    """Nothing that is there already is written over.

    Raises:
        ConfigError: `out` exists, or its folder does not.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists; remove it, or choose another name")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.absolute().parent} to put it in")


def write_gguf(
    out: Path,
    arch: str,
    describe: Callable[[Any], None],
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    value: Callable[[str], Tensor],
) -> None:
    """Write a GGUF file under a temporary name and rename it.

    Args:
        out: the new file.
        arch: llama.cpp's name of the architecture.
        describe: puts metadata into a `gguf.GGUFWriter`.
        kinds: dtype and shape of each tensor, in the order of the file.
        value: makes the tensor of a name, of any float dtype; it is rounded once to its kind.

    Raises:
        ConfigError: `out` is in use.
        CheckpointError: it cannot be written, or a value does not fit into fp16.
    """
    refuse_used_file(out)
    gguf = gguf_package()
    types = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    writer, hidden = gguf.GGUFWriter(None, arch), None
    try:
        hidden = hidden_folder(out)
        temporary = hidden / "out"
        describe(writer)
        for name, (dtype, shape) in kinds.items():
            size = int(np.prod(shape)) * dtype.itemsize
            # The shape is that of the entries; a dtype other than uint8 keeps the library from dividing it.
            writer.add_tensor_info(name, shape, np.dtype(np.float16), size, raw_dtype=types[dtype])
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (dtype, shape) in kinds.items():
            tensor = _rounded(name, value(name), dtype)
            if tuple(tensor.shape) != shape:
                raise AssertionError(f"{name} came as {tuple(tensor.shape)}, not as {shape}")
            writer.write_tensor_data(tensor.reshape(-1).view(torch.uint8).numpy())
        for file in writer.fout:
            file.flush()
            os.fsync(file.fileno())
        writer.close()
        temporary.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"{out} could not be written: {error.strerror or error}; nothing is left of it, so free some space or "
            "choose another place, and try again"
        ) from error
    finally:
        writer.close()
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)


def _rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = value.to(dtype).contiguous()
    if dtype == torch.float16 and not bool(torch.isfinite(narrow).all()) and bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{name} holds {float(value.abs().max()):.3g}, too large for fp16; take --dtype bf16")
    return narrow
