"""Making a part of a weightless model real, and weightless again.

A module stays the same object throughout, and so does a weightless parameter outside the blocks: whoever noted that
two modules share one finds it shared again. While a part is real, its parameters are others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Read = Callable[[list[str]], Mapping[str, Tensor]]


def state_names(module: nn.Module, name: str) -> list[str]:
    """The full names of the parameters and persistent buffers of the module ``name``."""
    return [f"{name}.{key}" if name else key for key in module.state_dict()]


@torch.no_grad()
def materialize(module: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a weightless module its tensors, named as in its own ``state_dict``, on ``device``.

    Buffers that no checkpoint holds move there too. A tensor on another device is copied without waiting for the copy.
    """
    for prefix, part in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        for key, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = tensors[dot + key].to(device, non_blocking=True)
                part._parameters[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for key, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[key] = (tensors[dot + key] if buffer.is_meta else buffer).to(device, non_blocking=True)


@torch.no_grad()
def offload_to_meta(module: nn.Module) -> None:
    """Put the parameters and persistent buffers of a module on the meta device, and its other buffers on the CPU."""
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = torch.empty_like(parameter, device="meta")
                part._parameters[key] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for key, buffer in part._buffers.items():
            if buffer is not None:
                home = "cpu" if key in part._non_persistent_buffers_set else "meta"
                part._buffers[key] = buffer.to(home)


class NonBlockWeights:
    """What lies outside the blocks (embeddings, last norm, head): real, on the CPU, while it is in use.

    Args:
        model: the weightless model.
        inside: the names of its blocks.
        read: reads tensors by name.
    """

    def __init__(self, model: nn.Module, inside: Iterable[str], read: Read) -> None:
        prefixes = tuple(f"{name}." for name in inside)
        self.model, self.read = model, read
        self.names = [name for name in model.state_dict() if not name.startswith(prefixes)]
        self._holders: dict[int, list[tuple[nn.Module, str, bool]]] = defaultdict(list)
        self._name_of: dict[int, str] = {}
        self._empty: dict[int, Tensor] = {}
        wanted = set(self.names)
        for path, part in model.named_modules():
            for held, is_parameter in ((part._parameters, True), (part._buffers, False)):
                for key, tensor in held.items():
                    name = f"{path}.{key}" if path else key
                    if tensor is not None and tensor.is_meta and name in wanted:
                        self._holders[id(tensor)].append((part, key, is_parameter))
                        self._name_of.setdefault(id(tensor), name)
                        self._empty[id(tensor)] = tensor

    @property
    def unique(self) -> list[str]:
        """The first name of each tensor; what is tied has one."""
        return list(self._name_of.values())

    def make_real(self, parts: Iterable[nn.Module] | None = None) -> None:
        """Make what these modules hold themselves real; None for everything outside the blocks."""
        own = None if parts is None else {id(part) for part in parts}
        wanted = [
            key
            for key, holders in self._holders.items()
            if self._is_empty(key) and (own is None or any(id(part) in own for part, _, _ in holders))
        ]
        if not wanted:
            return
        values = self.read([self._name_of[key] for key in wanted])
        for key in wanted:
            value = values[self._name_of[key]]
            empty = self._empty[key]
            made = nn.Parameter(value, requires_grad=empty.requires_grad) if isinstance(empty, nn.Parameter) else value
            self._put(key, made)

    def make_weightless(self) -> None:
        """Put the weightless tensors back, the same objects as before."""
        for key, empty in self._empty.items():
            self._put(key, empty)

    @contextmanager
    def on_demand(self) -> Iterator[None]:
        """In the body, a module outside the blocks becomes real when it is called; afterwards all are weightless."""
        parts = {id(part): part for holders in self._holders.values() for part, _, _ in holders}
        handles = [
            part.register_forward_pre_hook(lambda module, args: self.make_real([module])) for part in parts.values()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.make_weightless()

    def _is_empty(self, key: int) -> bool:
        part, name, is_parameter = self._holders[key][0]
        return (part._parameters if is_parameter else part._buffers)[name] is self._empty[key]

    def _put(self, key: int, value: Tensor) -> None:
        for part, name, is_parameter in self._holders[key]:
            (part._parameters if is_parameter else part._buffers)[name] = value  # type: ignore[assignment]
