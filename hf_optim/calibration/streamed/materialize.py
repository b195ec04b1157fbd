"""Materialize part of a model on the meta device, and offload it again.

Modules stay the same objects throughout, and so do the meta parameters outside the blocks, so that tied parameters
remain tied. While a part is materialized, it holds other parameter objects.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Reads the tensors with these names.
ReadTensors = Callable[[list[str]], Mapping[str, Tensor]]


def state_names(module: nn.Module, name: str) -> list[str]:
    """Return the full names of the parameters and persistent buffers of the module ``name``."""
    return [f"{name}.{key}" if name else key for key in module.state_dict()]


@torch.no_grad()
def materialize(module: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a meta module its tensors, named as in its own ``state_dict``, on ``device``.

    Buffers that no checkpoint holds move there too. Tensors from another device are copied asynchronously.
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
    """The weights outside the blocks (embeddings, last norm, head); materialized on the CPU while they are in use.

    Args:
        model: the model on the meta device.
        blocks: the names of its blocks.
        read: reads tensors by name.

    Attributes:
        names: the parameters and persistent buffers outside the blocks.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[str], read: ReadTensors) -> None:
        prefixes = tuple(f"{name}." for name in blocks)
        self.model, self.read = model, read
        self.names = [name for name in model.state_dict() if not name.startswith(prefixes)]
        # By the id of the meta tensor, so that tied tensors have one entry with several holders.
        self._holders: dict[int, list[tuple[nn.Module, str, bool]]] = defaultdict(list)
        self._name_of: dict[int, str] = {}
        self._meta: dict[int, Tensor] = {}
        wanted = set(self.names)
        for path, part in model.named_modules():
            for held, is_parameter in ((part._parameters, True), (part._buffers, False)):
                for key, tensor in held.items():
                    name = f"{path}.{key}" if path else key
                    if tensor is not None and tensor.is_meta and name in wanted:
                        self._holders[id(tensor)].append((part, key, is_parameter))
                        self._name_of.setdefault(id(tensor), name)
                        self._meta[id(tensor)] = tensor

    def materialize(self, modules: Iterable[nn.Module] | None = None) -> None:
        """Materialize the tensors that these modules hold directly; None for everything outside the blocks."""
        own = None if modules is None else {id(module) for module in modules}
        wanted = [
            key
            for key, holders in self._holders.items()
            if self._is_offloaded(key) and (own is None or any(id(part) in own for part, _, _ in holders))
        ]
        if not wanted:
            return
        values = self.read([self._name_of[key] for key in wanted])
        for key in wanted:
            value, meta = values[self._name_of[key]], self._meta[key]
            made = nn.Parameter(value, requires_grad=meta.requires_grad) if isinstance(meta, nn.Parameter) else value
            self._put(key, made)

    def offload(self) -> None:
        """Put the meta tensors back, the same objects as before."""
        for key, meta in self._meta.items():
            self._put(key, meta)

    @contextmanager
    def on_demand(self) -> Iterator[None]:
        """Materialize a module outside the blocks when it is called in the body; offload all of them afterwards."""
        parts = {id(part): part for holders in self._holders.values() for part, _, _ in holders}
        handles = [
            part.register_forward_pre_hook(lambda module, args: self.materialize([module])) for part in parts.values()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.offload()

    def _is_offloaded(self, key: int) -> bool:
        part, name, is_parameter = self._holders[key][0]
        return (part._parameters if is_parameter else part._buffers)[name] is self._meta[key]

    def _put(self, key: int, value: Tensor) -> None:
        for part, name, is_parameter in self._holders[key]:
            (part._parameters if is_parameter else part._buffers)[name] = value  # type: ignore[assignment]
