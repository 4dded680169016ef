"""Where each parameter of a model lives while a method is at work on it.

A trained tensor lives in fp32 and its module casts it for compute (see `precision`); a frozen one lives in
the compute dtype, and what narrowing it lost is its carry, in host memory (see `weights`). `Residence`
moves tensors between the two, in place, and at the end gives everything back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trimtab.nn.precision import hold, release
from trimtab.nn.present import PresentParameters
from trimtab.nn.weights import Holder, narrow_with_carry


def fingerprint(tensor: Tensor) -> tuple[int, float] | None:
    """Two numbers that an optimizer's step changes. (Version counters do not: fused AdamW leaves them alone.)

    The exclusive-or of all bits misses equal changes in an even number of equal entries, as in a norm's
    weights of one; the sum does not, since 1 + x and 1 - x round differently.
    """
    if tensor.device.type == "meta":
        return None
    exact = tensor.detach() if tensor.device.type != "mps" else tensor.detach().cpu()  # MPS has no float64
    return int(torch.hash_tensor(exact).view(torch.int64)), float(exact.sum(dtype=torch.float64))


def disarm_fused_encoders(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Keep torch's encoder layers from reading their sublayers' weights past the sublayers' own forward.

    In eval mode without gradients `nn.TransformerEncoderLayer` takes a fused path that would see neither an
    adapter nor a cast. Returns what to set back: module, attribute, value.
    """
    armed: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            armed.append((module, "activation_relu_or_gelu", module.activation_relu_or_gelu))
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            armed.append((module, "use_nested_tensor", module.use_nested_tensor))
            module.use_nested_tensor = False
    return armed


class Keep(Protocol):
    """Where copies of base tensors lie (see `methods.keep`)."""

    def __contains__(self, name: str) -> bool: ...
    def put(self, name: str, tensor: Tensor) -> None: ...
    def get(self, name: str) -> Tensor: ...
    def check(self) -> None: ...
    def drop(self) -> None: ...


class Residence:
    """The dtype, the carry and the `requires_grad` of each parameter of `model`, tied ones once.

    Args:
        model: any module; its parameters' names and identities never change here. Where somebody else puts others in
            their place, those are meant from then on.
        dtype: compute dtype, and storage dtype of what is frozen; None keeps each parameter's own.
        pure: hold trained tensors in the compute dtype as well.
        kept: where to keep a copy of each tensor that is trained, narrowed or written into; None keeps none.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None = None, pure: bool = False, kept: Keep | None = None
    ) -> None:
        self.pure = pure
        self.dtype = dtype
        self.parameters = PresentParameters(model)
        self._plain = {name: (p.dtype, p.requires_grad) for name, p in self.parameters.items()}
        self.compute = {name: dtype or p.dtype for name, p in self.parameters.items()}
        self.carries: dict[str, Tensor] = {}
        self._quantized: dict[str, nn.Module] = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if isinstance(own := getattr(module, "holder", None), Holder) and own.quantized
        }
        self.kept = kept
        self._edited: set[str] = set()
        self._live: dict[str, Tensor] = {}
        self._fingerprints: dict[str, tuple[int, float] | None] = {}
        self._armed = disarm_fused_encoders(model)

    def quantized(self) -> list[str]:
        """The names of the weights that are held in few bits, and so cannot train."""
        return list(self._quantized)

    @property
    def trained(self) -> list[str]:
        """The names of the base's tensors that train now."""
        return [name for name in self.parameters if name in self._fingerprints]

    def compute_dtype(self, name: str, module: nn.Module) -> torch.dtype:
        """The dtype that a linear layer called `name` computes in."""
        own: torch.dtype | None = getattr(module, "compute_dtype", None)
        return self.compute.get(f"{name}.weight") or self.dtype or own or torch.get_default_dtype()

    def held_dtype(self, compute: torch.dtype) -> torch.dtype:
        """The dtype in which a tensor that trains is held, where its layer computes in `compute`."""
        return compute if self.pure else torch.promote_types(compute, torch.float32)

    def train(self, names: Iterable[str]) -> None:
        """Let these parameters train: fp32 (unless `pure`), cast by their modules."""
        for name in names:
            parameter, compute = self.parameters[name], self.compute[name]
            self._keep(name)
            parameter.requires_grad_(True)
            parameter.data = parameter.data.to(self.held_dtype(compute))
            if not self.pure:
                for owner in self.parameters.owners(name):
                    hold(owner, compute)
            self._fingerprints[name] = fingerprint(parameter)

    def check(self) -> None:
        """Make sure that what trains is there, and held: a module that was put in since is not.

        A carry without values beside a weight that has them by now stands for nothing.

        Raises:
            ConfigError: a parameter that trains is gone, or tied ones were parted.
        """
        for name in self.trained:
            self.parameters.check(name)
            for owner in () if self.pure else self.parameters.owners(name):
                hold(owner, self.compute[name])
        for name in [
            name for name, carry in self.carries.items() if carry.is_meta and not self.parameters[name].is_meta
        ]:
            del self.carries[name]

    def freeze(self, names: Iterable[str]) -> None:
        """Freeze these parameters: gradient freed, stored in the compute dtype, the rest in a carry."""
        for name in names:
            parameter = self.parameters[name]
            parameter.requires_grad_(False)
            parameter.grad = None
            if name in self.written_in_training([name]):
                self._edited.add(name)
            self._fingerprints.pop(name, None)
            compute = self.compute[name]
            if torch.promote_types(parameter.dtype, compute) == compute:
                parameter.data = parameter.data.to(compute)  # nothing is lost
            else:
                self._keep(name)
                parameter.data, carry = narrow_with_carry(parameter.data, compute)
                if not self.pure:
                    self.carries[name] = carry
            for owner in self.parameters.owners(name):
                if not any(p is not None and p.requires_grad for p in owner._parameters.values()):
                    release(owner)

    def _stored(self, name: str) -> dict[str, Tensor]:
        """The tensors of a parameter, by the names to keep them under: a quantised weight has several."""
        if name in self.parameters:
            return {name: self.parameters[name]}
        module = self._quantized.get(name)
        own = None if module is None else getattr(module, "holder", None)
        return {} if own is None else {name + part: t for part, t in own.stored(module.weight).items()}  # type: ignore[union-attr]

    def copy_to(self, kept: Keep, *names: str) -> None:
        """Keep copies of parameters; of a quantised weight, of all that it is made of."""
        for name in names:
            for key, tensor in self._stored(name).items():
                kept.put(key, tensor)

    def _keep(self, name: str) -> None:
        if self.kept is not None and name not in self.kept:
            self.copy_to(self.kept, name)

    def check_kept(self) -> None:
        """Find out whether all copies are there, before anything is given back from them."""
        if self.kept is not None:
            self.kept.check()

    def edit(self, names: Iterable[str], *, kept: Keep | None = None) -> None:
        """Say that these frozen parameters are about to be written into; call it before.

        Args:
            names: of the parameters; a quantised weight, which is not in `parameters`, may be among them.
            kept: where to keep copies from now on, if the residence keeps none.
        """
        self.kept = self.kept if self.kept is not None else kept
        for name in names:
            self._keep(name)
            self._edited.add(name)

    def written_in_training(self, names: Iterable[str]) -> list[str]:
        """Those of the parameters that something was written into since they began to train."""
        marks = self._fingerprints
        return [name for name in names if name in marks and fingerprint(self.parameters[name]) != marks[name]]

    def changed(self) -> list[str]:
        """The parameters that were written into, by training or by `edit`."""
        trained = set(self.written_in_training(list(self._fingerprints)))
        return [
            *(n for n in self.parameters if n in self._edited or n in trained),
            *(self._edited - set(self.parameters)),
        ]

    def lost(self) -> list[str]:
        """The parameters that were written into and of which no copy is kept."""
        return [name for name in self.changed() if self.kept is None or name not in self.kept]

    def narrowed(self) -> list[str]:
        """The frozen parameters that are stored in fewer bits than the model came with, and not kept."""
        return [
            name
            for name, p in self.parameters.items()
            if name not in self._fingerprints
            and torch.promote_types(p.dtype, self._plain[name][0]) != p.dtype
            and (self.kept is None or name not in self.kept)
        ]

    def show_base(self) -> None:
        """Put the kept values in the place of all that was written, until `hide_base`; parameters stay themselves."""
        for name in self.changed():
            for key, tensor in self._stored(name).items():
                assert self.kept is not None
                self._live[key] = tensor.data
                # A copy of the copy: whoever writes into what is shown must not write into what is kept.
                tensor.data = self.kept.get(key).to(tensor.device, tensor.dtype, copy=True)

    def hide_base(self) -> None:
        """Put back what `show_base` took away."""
        for name in [*self.parameters, *self._quantized] if self._live else ():
            for key, tensor in self._stored(name).items():
                if key in self._live:
                    tensor.data = self._live.pop(key)

    def take_back(self, trained: Iterable[str], values: Keep) -> None:
        """Undo `settle`: the `trained` train again, the others are frozen, and those in `values` have these values."""
        wanted = set(trained)
        self.freeze(name for name in self.parameters if name not in wanted)
        self._put_back(values)
        self.train(name for name in self.parameters if name in wanted)
        for module, attribute, value in self._armed:
            setattr(module, attribute, type(value)(0))

    def widen(self) -> list[Callable[[], None]]:
        """Let every weight that is still held in few bits be dense, in its layer's compute dtype.

        Returns functions that undo it, bit for bit.
        """
        undo = []
        for name, module in self._quantized.items():
            weight, own = module.weight, getattr(module, "holder", None)
            if isinstance(own, Holder) and isinstance(weight, Tensor):
                dtype = self.compute_dtype(name.removesuffix(".weight"), module)
                blocks = [own.rows(weight, block).to(dtype) for block in own.row_blocks(weight)]
                undo.append(own.widen(module, torch.cat(blocks)))
        return undo

    def settle(self) -> None:
        """Leave a plain model in the compute dtype, or what it was cast to since: all rounded once, no module held."""
        self._edited.update(self.changed())
        self.compute = self._cast_since()
        self._leave(self.compute)

    def _cast_since(self) -> dict[str, torch.dtype]:
        """The compute dtypes, or what somebody cast the model to: what trains is in fp32 after `.float()`, too.

        So where a parameter that trains does not say it, the frozen ones of its compute dtype do, if they agree.
        """
        now, trained = {name: p.dtype for name, p in self.parameters.items()}, set(self.trained)
        frozen: dict[torch.dtype, set[torch.dtype]] = {}
        for name in now.keys() - trained:
            frozen.setdefault(self.compute[name], set()).add(now[name])
        for name in trained:
            own = self.compute[name]
            if now[name] == self.held_dtype(own):
                now[name] = next(iter(frozen[own])) if len(frozen.get(own, ())) == 1 else own
        return now

    def restore(self) -> None:
        """Leave the model as it came, its dtypes included; exact if nothing was lost or narrowed."""
        if self.kept is not None:
            self._put_back(self.kept)
        self._leave({name: dtype for name, (dtype, _) in self._plain.items()})
        if self.kept is not None:
            self.kept.drop()

    def _put_back(self, values: Keep) -> None:
        for name, parameter in self.parameters.items():
            if name in values:
                parameter.data = values.get(name).to(parameter.device)
        for name in self._quantized:
            for key, tensor in self._stored(name).items():
                if key in values:
                    tensor.data.copy_(values.get(key))  # in place: a master may be a mapped file

    def _leave(self, dtypes: dict[str, torch.dtype]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data = parameter.data.to(dtypes[name])
            parameter.grad = None
            parameter.requires_grad_(self._plain[name][1])
            for owner in self.parameters.owners(name):
                release(owner)
        for module, attribute, value in self._armed:
            setattr(module, attribute, value)
        self._fingerprints.clear()
        self.carries.clear()
