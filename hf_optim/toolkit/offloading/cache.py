"""Keys and values in host memory: each layer's are fetched while the layers before it compute.

A step moves the keys and values of every layer to the device once, and those of its new tokens back. (transformers'
offloaded caches move all of them back at each step as well.) The layers share two
buffers on the device, or three if their number is odd.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ...errors import ModelError
from ..compat import VERSION
from .links import Link, link_to

GROWTH = 256


def host_cache(model: Any, link: Link | None = None, quantized: Callable[[Ring], Any] | None = None) -> Cache:
    """Return an empty cache whose keys and values are in host memory: see ``hf_optim.offloaded_cache``.

    Args:
        model: a decoder-only model on an accelerator.
        link: the way to its device; None for that of the device.
        quantized: makes a layer that holds codes; None for keys and values as they are.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{model.config.model_type} has an encoder, whose keys and values are a cache of their own")
    link = link or link_to(next(model.parameters()).device)
    if link is None or link.host_is_device:
        raise ModelError("the model computes on the CPU, so its keys and values are in host memory already")
    config = model.config.get_text_config(decoder=True)
    stock = DynamicCache(config=config).layers
    plain = [*stock, *(DynamicLayer() for _ in range(config.num_hidden_layers - len(stock)))]
    odd = next((layer for layer in plain if not isinstance(layer, DynamicLayer)), None)
    if odd is not None:
        raise ModelError(f"{config.model_type} has a {type(odd).__name__}, which holds more than keys and values")
    ring = Ring(link)
    make = quantized or HostLayer
    return Cache(layers=[make(ring) if type(layer) is DynamicLayer else layer for layer in plain])


class Ring:
    """Buffers on the device, which layers take in turn, and the layers by their order."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.layers: list[Any] = []  # weak references
        self.slots: list[Tensor | None] = [None] * 3
        self.written: list[Any] = [None] * 3
        self.holds: list[tuple[int, Any] | None] = [None] * 3  # the layer in a slot, and the ticket of its copy

    def add(self, layer: Any) -> int:
        """Add a layer behind the others, and return its position."""
        self.layers.append(weakref.ref(layer))
        return len(self.layers) - 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Ring:
        """Return a ring of the same link, whose layers are put in their places when they are copied."""
        made = memo[id(self)] = Ring(self.link)
        made.layers = [lambda: None] * len(self.layers)
        return made

    def slot_of(self, index: int) -> int:
        """Return the slot of a layer: never that of the layer after it, which is the first behind the last."""
        count = len(self.layers)
        return 2 if count % 2 and index == count - 1 and count > 1 else index % 2

    def fetch(self, layer: OnHost) -> int:
        """Begin to copy what a layer holds into its slot, if it is not on its way there; return the slot."""
        slot = self.slot_of(layer.index)
        held = self.holds[slot]
        if held is not None and held[0] == layer.index:
            return slot
        memory = self.room(slot, layer.host)
        size, ticket = layer.held_bytes, None
        if size:
            # Copies follow each other in both directions, so what the layer wrote last is there. The mark is behind the
            # attention of the layer that had the slot before.
            ticket = self.link.copy(memory[:size], layer.host.view(-1)[:size], self.link.mark())
        self.holds[slot] = (layer.index, ticket)
        return slot

    def room(self, slot: int, host: Tensor) -> Tensor:
        """Return a slot, at least as large as the host memory of a layer."""
        memory = self.slots[slot]
        if memory is None or len(memory) < host.numel():
            held = self.holds[slot]
            # Memory that is freed may be taken at once: nothing may still read or write it.
            self.link.finish(held[1] if held is not None else None)
            self.link.finish(self.written[slot])
            self.slots[slot] = memory = self.link.slot(host.numel())
        return memory

    def after(self, index: int) -> OnHost | None:
        """Return the layer after this one, in a circle."""
        found = self.layers[(index + 1) % len(self.layers)]()
        return found if found is not None and found.index != index and found.is_initialized else None

    def settle(self, layer: OnHost) -> None:
        """Wait on the host until no copy reads or writes the host memory of a layer, which may be freed then."""
        self.link.finish(layer.written)
        held = self.holds[self.slot_of(layer.index)]
        if held is not None and held[0] == layer.index:
            self.link.finish(held[1])

    def forget(self, index: int) -> None:
        """Take what a slot holds of a layer for outdated."""
        held = self.holds[self.slot_of(index)]
        if held is not None and held[0] == index:
            self.holds[self.slot_of(index)] = None


class OnHost:
    """What layers of a ring share: copies, and that nothing is under way when one is dropped.

    Attributes:
        ring, index: the ring, and the position in it.
        host: uint8, in host memory.
        written: the ticket of the latest copy to ``host``.
    """

    ring: Ring
    index: int
    host: Tensor
    written: Any = None
    is_initialized: bool

    @property
    def held_bytes(self) -> int:
        """How many bytes of ``host``, from the first on, the layer needs on the device."""
        raise NotImplementedError

    def offload(self) -> None:
        """Do nothing: it is offloaded."""

    def prefetch(self) -> None:
        """Do nothing: the layer before it fetches it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.is_initialized:
            self.ring.settle(self)
        made = memo[id(self)] = object.__new__(type(self))
        for name, value in vars(self).items():
            if name == "host" and value is not None:
                own = self.ring.link.host(value.numel()).view(value.shape)
                value = own.copy_(value)
            else:
                value = None if name == "written" else copy.deepcopy(value, memo)
            made.__dict__[name] = value
        made.ring.layers[self.index] = weakref.ref(made)
        return made

    def __del__(self) -> None:
        if self.__dict__.get("is_initialized"):
            self.ring.settle(self)


class HostLayer(OnHost, DynamicLayer):
    """A layer whose keys and values are in host memory, token by token: ``[tokens, 2, batch, heads, channels]`` bytes.

    Attributes:
        host: ``[room, bytes of a token]``.
        tokens: how many it holds.
    """

    is_compileable = False

    def __init__(self, ring: Ring) -> None:
        super().__init__()
        self.ring, self.index = ring, ring.add(self)
        self.tokens = 0

    @property
    def held_bytes(self) -> int:
        return self.tokens * self.host.shape[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.shape[:-2] != value_states.shape[:-2] or key_states.dtype != value_states.dtype:
            raise ModelError("keys and values with other heads or dtypes cannot be kept in one buffer")
        self.device, self.dtype = key_states.device, key_states.dtype
        self.widths = key_states.shape[-1], value_states.shape[-1]
        self._set(key_states.shape[0], key_states.shape[1], key_states.shape[-2])
        self.is_initialized = True

    def _set(self, batch: int, heads: int, tokens: int) -> None:
        self.batch, self.heads = batch, heads
        size = batch * heads * sum(self.widths) * self.dtype.itemsize
        self.host = self.ring.link.host((tokens + GROWTH) * size).view(-1, size)
        # transformers looks at these for the batch, the heads and the dtype.
        self.keys = torch.empty(batch, heads, 0, self.widths[0], dtype=self.dtype, device=self.device)
        self.values = torch.empty(batch, heads, 0, self.widths[1], dtype=self.dtype, device=self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, ring, link = key_states.shape[-2], self.ring, self.ring.link
        self._grow(self.tokens + new)
        slot = ring.fetch(self)
        held = ring.holds[slot]
        link.wait(held[1] if held is not None else None)
        link.wait(ring.written[slot])  # the layer that had the slot before may still be on its way to the host
        memory = ring.slots[slot]
        assert memory is not None
        keys, values = self._views(memory[: self.host.numel()].view(self.host.shape), self.tokens + new)
        keys[:, :, self.tokens :].copy_(key_states)
        values[:, :, self.tokens :].copy_(value_states)
        fresh = memory[: self.host.numel()].view(self.host.shape)[self.tokens : self.tokens + new]
        self.written = ring.written[slot] = link.copy(self.host[self.tokens : self.tokens + new], fresh, link.mark())
        self.tokens += new
        following = ring.after(self.index)
        if following is not None:
            ring.fetch(following)
        ring.forget(self.index)
        return keys, values

    def _grow(self, tokens: int) -> None:
        if tokens <= len(self.host):
            return
        self.ring.settle(self)
        host = self.ring.link.host((tokens + tokens // 2 + GROWTH) * self.host.shape[1]).view(-1, self.host.shape[1])
        host[: self.tokens].copy_(self.host[: self.tokens])
        self.host = host
        self.ring.forget(self.index)

    def _views(self, memory: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[batch, heads, tokens, channels]`` in the memory of a layer."""
        cut = self.batch * self.heads * self.widths[0] * self.dtype.itemsize
        parts = memory[:tokens, :cut], memory[:tokens, cut:]
        shaped = (
            part.view(self.dtype).view(tokens, self.batch, self.heads, width) if part.is_contiguous()
            else part.view(self.dtype).unflatten(1, (self.batch, self.heads, width))
            for part, width in zip(parts, self.widths, strict=True)
        )  # fmt: skip
        keys, values = (each.permute(1, 2, 0, 3) for each in shaped)
        return keys, values

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.tokens + length, 0

    def reset(self) -> None:
        self.tokens = 0
        self.ring.forget(self.index)

    def crop(self, max_length: int) -> None:
        """Drop the last tokens: a negative number of them; before transformers 5.23 a positive length is kept."""
        keep = self.tokens + max_length if max_length < 0 else max_length
        if max_length > 0 and VERSION >= (5, 23):
            raise ModelError("crop takes the number of tokens to remove, as a negative number")
        self.tokens = max(0, min(self.tokens, keep))
        self.ring.forget(self.index)

    def _rows(self, chosen: Any) -> None:
        """Replace the rows of the batch by ``chosen(keys or values)``, on the host."""
        if not self.is_initialized:
            return
        self.ring.settle(self)
        keys, values = (chosen(each).contiguous() for each in self._views(self.host, self.tokens))
        self._set(keys.shape[0], self.heads, self.tokens)
        own = self._views(self.host, self.tokens)
        own[0].copy_(keys)
        own[1].copy_(values)
        self.ring.holds = [None] * 3

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda each: each.index_select(0, beam_idx.to("cpu")))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda each: each.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda each: each[indices.to("cpu")])
