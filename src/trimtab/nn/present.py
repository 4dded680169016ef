"""What a model has under a name at this moment.

Parameters are replaced behind an adapter's back: by `load_state_dict(assign=True)`, `to_empty`,
`resize_token_embeddings`, and by whatever splits a model over processes. An adapter that kept the old ones would train
and save tensors that the model does not read, so it keeps names, and looks the parameters up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from trimtab.errors import ConfigError


def module_at(model: nn.Module, name: str) -> nn.Module | None:
    """The module that a model has under a qualified name, or None."""
    found: nn.Module | None = model
    for part in name.split(".") if name else ():
        found = None if found is None else found._modules.get(part)
    return found


def parameter_at(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that a model has under a qualified name, or None."""
    owner, _, leaf = name.rpartition(".")
    module = module_at(model, owner)
    return None if module is None else module._parameters.get(leaf)


class PresentParameters(Mapping[str, nn.Parameter]):
    """The floating-point parameters that a model had when this was made, by first name; each as it is when asked for.

    Attributes:
        aliases: all names of each, by the first one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.is_floating_point():
                names.setdefault(id(parameter), []).append(name)
        self.aliases = {group[0]: group for group in names.values()}

    def __getitem__(self, name: str) -> nn.Parameter:
        if name not in self.aliases:
            raise KeyError(name)
        found = parameter_at(self._model, name)
        if found is None:
            raise ConfigError(
                f"{name} is no parameter of the model any more, as it was when the adapter was attached; change the "
                "model first and attach then"
            )
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self.aliases)

    def __len__(self) -> int:
        return len(self.aliases)

    def owners(self, name: str) -> list[nn.Module]:
        """The modules that hold a parameter, each once."""
        found = [module_at(self._model, alias.rpartition(".")[0]) for alias in self.aliases[name]]
        return list({id(module): module for module in found if module is not None}.values())

    def check(self, name: str) -> None:
        """Make sure that a parameter is there, and still one.

        Raises:
            ConfigError: as said.
        """
        parameter = self[name]
        for alias in self.aliases[name][1:]:
            if parameter_at(self._model, alias) is not parameter:
                raise ConfigError(
                    f"{name} and {alias} were one tensor when the adapter was attached and are two now, as "
                    "load_state_dict(assign=True) makes of tied weights; call model.tie_weights()"
                )
