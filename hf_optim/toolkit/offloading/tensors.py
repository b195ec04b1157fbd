"""The tensors of a block as ranges of bytes, and where its modules find them.

A *unit* is a range of memory that one or more tensors of a block cover: a weight alone, or a fused bias and the biases
that are views of it. The units of a block lie behind each other in one buffer, so a block moves as one copy, and its
tensors are views of the buffer, wherever the buffer is.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 512
"""Units begin at multiples of this many bytes: more than any kernel needs, and a sector of a disk."""


@dataclass(frozen=True)
class Bound:
    """One place of a module that holds a tensor of a unit.

    Attributes:
        module: a weak reference to the module.
        key: the name of the parameter or buffer there.
        is_parameter: it is a parameter.
        offset: bytes from the beginning of the unit.
        dtype, shape, stride: of the tensor.
        trains: its ``requires_grad`` before it was offloaded.
    """

    module: weakref.ref[nn.Module]
    key: str
    is_parameter: bool
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    trains: bool

    @property
    def held(self) -> Any:
        """The dictionary of the module that holds the tensor; None if the module is gone."""
        module = self.module()
        return None if module is None else module._parameters if self.is_parameter else module._buffers

    def view(self, memory: Tensor) -> Tensor:
        """Return the tensor in the memory of its unit, uint8."""
        size = span(self.shape, self.stride) * self.dtype.itemsize
        typed = memory[self.offset : self.offset + size].view(self.dtype)
        return typed.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Unit:
    """A range of memory of a block.

    Attributes:
        name: the qualified name of its first tensor, for messages.
        begin: where it is in the buffer of the block.
        size: bytes.
        places: what holds tensors in it.
    """

    name: str
    begin: int
    size: int
    places: tuple[Bound, ...]

    @property
    def end(self) -> int:
        return self.begin + self.size


@dataclass(frozen=True)
class Found:
    """A tensor of a model and the place that holds it."""

    name: str
    module: nn.Module
    key: str
    is_parameter: bool
    tensor: Tensor

    @property
    def start(self) -> int:
        return self.tensor.data_ptr()

    @property
    def end(self) -> int:
        return self.start + span(self.tensor.shape, self.tensor.stride()) * self.tensor.dtype.itemsize


def span(shape: Iterable[int], stride: Iterable[int]) -> int:
    """Return how many elements of memory a strided tensor covers."""
    pairs = list(zip(shape, stride, strict=True))
    return 0 if any(size == 0 for size, _ in pairs) else 1 + sum((size - 1) * step for size, step in pairs)


def aligned(size: int) -> int:
    """Return the next multiple of ``ALIGNMENT``."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def tensors_of(model: nn.Module) -> Iterator[Found]:
    """Yield every place of a model that holds a parameter or buffer; tied ones several times.

    Buffers that no checkpoint holds (``persistent=False``) are left out: they are small and may be written to.
    """
    for path, module in model.named_modules():
        for held, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for key, tensor in held.items():
                if tensor is None or (not is_parameter and key in module._non_persistent_buffers_set):
                    continue
                yield Found(f"{path}.{key}" if path else key, module, key, is_parameter, tensor)


def ranges(found: Iterable[Found]) -> list[list[Found]]:
    """Group places whose tensors overlap in memory; tensors without values or elements are alone, by identity."""
    real, alone = [], {}  # type: ignore[var-annotated]
    for each in found:
        if each.tensor.is_meta or each.tensor.numel() == 0:
            alone.setdefault(id(each.tensor), []).append(each)
        else:
            real.append(each)
    groups: list[list[Found]] = list(alone.values())
    end = -1
    for each in sorted(real, key=lambda item: (item.start, -item.end)):
        if each.start < end:
            groups[-1].append(each)
        else:
            groups.append([each])
        end = max(end, each.end) if each.start < end else each.end
    return groups


def lay_out(groups: Iterable[list[Found]]) -> tuple[list[Unit], int]:
    """Return the units of a block, one for each group of places, and the bytes of its buffer."""
    units, at = [], 0
    for group in groups:
        first = group[0]
        start = 0 if first.tensor.is_meta else min(each.start for each in group)
        places, size = [], 0
        for each in group:
            tensor = each.tensor
            offset = 0 if tensor.is_meta or not tensor.numel() else each.start - start
            covered = span(tensor.shape, tensor.stride()) * tensor.dtype.itemsize
            size = max(size, offset + covered)
            places.append(
                Bound(
                    weakref.ref(each.module), each.key, each.is_parameter, offset, tensor.dtype, tensor.shape,
                    tuple(tensor.stride()), tensor.requires_grad,
                )
            )  # fmt: skip
        units.append(Unit(first.name, at, size, tuple(places)))
        at = aligned(at + size)
    return units, at


def bytes_of(unit: Unit) -> Tensor:
    """Return the memory of a unit where its tensors are now, uint8: a view, not a copy."""
    place = unit.places[0]
    tensor = place.held[place.key].detach()
    begin = tensor.storage_offset() * tensor.dtype.itemsize - place.offset
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return raw.set_(tensor.untyped_storage(), begin, (unit.size,), (1,))


def point_at(units: Iterable[Unit], memory: Tensor) -> None:
    """Make the tensors of a block views of a buffer, the same tensor objects as before where that is possible."""
    seen: dict[int, Tensor] = {}
    for unit in units:
        own = memory[unit.begin : unit.end]
        for place in unit.places:
            held = place.held
            if held is None or place.key not in held:
                continue
            tensor, value = held[place.key], place.view(own)
            if tensor.is_meta:
                made = seen.get(id(tensor))
                if made is None:
                    # A view of the buffer would count the fetches as writes to it; this tensor counts its own alone.
                    made = value.new_empty(0)
                    made = nn.Parameter(made, requires_grad=False) if place.is_parameter else made
                    made.data = value
                    seen[id(tensor)] = made
                held[place.key] = made
            else:
                tensor.data = value
