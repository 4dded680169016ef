"""What llama.cpp calls the models that can be written for it, and the order in which it keeps their rows.

llama.cpp rotates pairs of neighbouring rows in the architecture `llama`, and transformers pairs row i of a head with
row i + d/2 (d rows a head). So the rows of q and k are brought into llama.cpp's order, head by head: with a head's
rows as a (2, d/2) table, the table is turned. (llama.cpp, conversion/llama.py.) The other architectures here rotate
as transformers does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from trimtab.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Family:
    """One model class of transformers in llama.cpp: its architecture's name, and whether q and k are reordered."""

    arch: str
    reordered: bool


#: Other classes would need other hyperparameters, other names or other orders of rows.
FAMILIES = {
    "LlamaForCausalLM": Family("llama", True),
    "MistralForCausalLM": Family("llama", True),
    "Qwen2ForCausalLM": Family("qwen2", False),
    "Qwen3ForCausalLM": Family("qwen3", False),
}


def gguf_package() -> ModuleType:
    """The `gguf` package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError("--gguf needs the gguf package: pip install 'trimtab[gguf]'") from None
    module: ModuleType = gguf
    return module


class Names:
    """llama.cpp's names and row order for one model.

    Args:
        config: the model's config, of transformers.
        label: how the user named the model, for messages.

    Raises:
        CheckpointError: no such model can be written.
    """

    def __init__(self, config: Any, label: str) -> None:
        kinds = list(config.architectures or [])
        family = FAMILIES.get(kinds[0]) if kinds else None
        if family is None:
            kind = kinds[0] if kinds else f"{config.model_type} without a head"
            raise CheckpointError(
                f"{label} is a {kind}, which cannot be written as GGUF here; those that can: {', '.join(FAMILIES)}. "
                "For another one save the merged model and use llama.cpp's convert_hf_to_gguf.py"
            )
        gguf = gguf_package()
        self.family = family
        self.config = config
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
        self._map = gguf.get_tensor_name_map(arch, config.num_hidden_layers)

    def of(self, name: str) -> str | None:
        """llama.cpp's name of a parameter, or None when it has none."""
        found: str | None = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    def rows(self, name: str, value: Tensor) -> Tensor:
        """The rows of a parameter of this name, or of its lora_B, in llama.cpp's order."""
        part = re.search(r"\.self_attn\.([qk])_proj\.", name)
        if not self.family.reordered or part is None:
            return value
        heads = self.config.num_attention_heads if part.group(1) == "q" else self.config.num_key_value_heads
        half = value.shape[0] // heads // 2
        return value.reshape(heads, 2, half, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
