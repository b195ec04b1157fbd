"""Keys and values in host memory, as they are or in 4 or 8 bits.

Codes of a layer are fetched as a whole while the layer before it computes, and go back when a step has quantized more
of them: every 64 tokens, or every group of them. The latest tokens, which are in full precision, stay on the device.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

from ..toolkit.offloading import OnHost, Ring, host_cache
from ..toolkit.offloading.links import Link
from ..toolkit.offloading.tensors import aligned
from ..toolkit.quantization import KeyValueScheme, scheme_of
from .quantized_cache import QuantizedLayer, require_quantizable

CODES = 6  # tensors of a store that hold codes and scales; those behind them are the tail


def offloaded_cache(model: Any, link: Link | None = None, scheme: KeyValueScheme | None = None) -> Cache:
    """Return an empty cache whose keys and values are in pinned host memory, for ``generate`` or ``forward``.

    They are quantized if the model's configuration says so (``kv_cache``), or ``scheme`` does. Layers with a sliding
    window, which hold little, stay on the device. Outputs are those of the same cache on the device.

    Args:
        model: a decoder-only model on an accelerator.
        link: the way to its device; None for that of the device.
        scheme: of quantized keys and values; None for what the model's configuration says.

    Raises ``ModelError`` for a model on a CPU, whose cache is in host memory already, and for one whose cache is not
    keys and values of heads.
    """
    scheme = scheme or scheme_of(model.config)
    if scheme is None:
        return host_cache(model, link)
    require_quantizable(model.config, scheme)
    return host_cache(model, link, lambda ring: HostCodes(ring, scheme))


class HostCodes(OnHost, QuantizedLayer):
    """A quantized layer whose codes are in host memory, and on the device while it is read.

    Attributes:
        host: the codes and scales of the store behind each other.
        tail: the latest keys and values, on the device.
    """

    grows_by_half = False  # the whole of a layer is moved

    def __init__(self, ring: Ring, scheme: KeyValueScheme) -> None:
        super().__init__(scheme)
        self.ring, self.index = ring, ring.add(self)
        self.tail: tuple[Tensor, ...] = ()
        self._layout: list[tuple[int, Any, Any]] = []  # of each tensor: begin, shape, dtype
        self._kind: Any = None

    @property
    def held_bytes(self) -> int:
        return self.host.numel()

    @property
    def store(self) -> Any:
        """The tensors of the layer on the device, where they are until the next but one layer is read."""
        if self._kind is None:
            return None
        slot = self.ring.fetch(self)
        held = self.ring.holds[slot]
        self.ring.link.wait(held[1] if held is not None else None)
        return self._kind(*self._views(slot), *self.tail)

    @store.setter
    def store(self, value: Any) -> None:
        if self._kind is not None:
            self.ring.settle(self)
        self.ring.forget(self.index)
        if value is None:
            self._kind, self.tail = None, ()
            return
        ring, link = self.ring, self.ring.link
        self._kind, self.tail, self._layout, end = type(value), tuple(value[CODES:]), [], 0
        for each in value[:CODES]:
            self._layout.append((end, each.shape, each.dtype))
            end = aligned(end + each.numel() * each.element_size())
        self.host = link.host(end)
        slot = ring.slot_of(self.index)
        ring.room(slot, self.host)
        held = ring.holds[slot]  # of another layer, whose copy must not arrive afterwards
        link.wait(held[1] if held is not None else None)
        link.wait(ring.written[slot])
        ring.holds[slot] = self.index, None
        for mine, given in zip(self._views(slot), value[:CODES], strict=True):
            mine.copy_(given)
        self._bring_back(slot)

    def _views(self, slot: int) -> list[Tensor]:
        memory = self.ring.slots[slot]
        assert memory is not None
        found = []
        for begin, shape, dtype in self._layout:
            size = shape.numel() * dtype.itemsize
            found.append(memory[begin : begin + size].view(dtype).view(shape))
        return found

    def _bring_back(self, slot: int) -> None:
        """Copy the codes of the layer in a slot to the host."""
        memory, link = self.ring.slots[slot], self.ring.link
        assert memory is not None
        self.written = self.ring.written[slot] = link.copy(self.host, memory[: self.host.numel()], link.mark())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        ring, before = self.ring, self.quantized
        if self.is_initialized:
            ring.fetch(self)
        following = ring.after(self.index)
        if following is not None:
            ring.fetch(following)  # before the work of this layer is given to the device, so that it goes on meanwhile
        found = super().update(key_states, value_states, *args, **kwargs)
        if self.quantized != before:
            self._bring_back(ring.fetch(self))
        return found

    offload = OnHost.offload
    prefetch = OnHost.prefetch
