"""Cache layers that hold keys and values in 4 or 8 bits, for transformers' loop and for captured steps."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from ..errors import ModelError, require_any_model
from ..toolkit.compat import CACHE
from ..toolkit.quantization import KeyValueScheme, cache_layers, layer_patterns, scheme_of
from .codes import Codes, attention_takes_codes

PACKAGE = "hf_optim_kernels.kv_cache"
# A cache grows by half of what it holds, and by these tokens at least.
GROWTH = 512
# Up to so many tokens are appended by the kernel, more by PyTorch's operators.
FEW = 16


# The modules of the kernels, imported with the first layer: torch.compile cannot trace an import.
_KERNELS: dict[str, Any] = {}


def _kernel(name: str) -> Any:
    if not _KERNELS:
        _KERNELS.update((each, importlib.import_module(f"{PACKAGE}.{each}")) for each in ("format", "naive", "op"))
    return _KERNELS[name]


def layout_of(scheme: KeyValueScheme) -> Any:
    """Return the ``Format`` of the kernels for a scheme."""
    made = _kernel("format").Format
    symmetric, float8 = scheme.is_symmetric, scheme.bits == "float8"
    return made(scheme.width, float8, scheme.keys == "token", scheme.group, scheme.residual, symmetric)


def key_value_cache(model: Any, scheme: KeyValueScheme | None = None) -> Cache:
    """Return an empty quantized cache for a model, to pass to ``generate`` or ``forward``.

    Layers with a sliding window or an attention pattern, which hold little, and heads of more than 256 channels are
    kept in full precision.

    Args:
        model: a decoder-only model.
        scheme: None for the one in the model's configuration.

    Raises ``ModelError`` without a scheme, and for models whose cache is not keys and values of heads.
    """
    require_any_model(model)
    scheme = scheme or scheme_of(model.config)
    if scheme is None:
        raise ModelError("the model's configuration names no quantization of keys and values: pass scheme=")
    require_quantizable(model.config, scheme)
    stock = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    count = max(len(stock), model.config.get_text_config(decoder=True).num_hidden_layers)
    plain = [*stock, *(DynamicLayer() for _ in range(count - len(stock)))]
    drops = layer_patterns(model.config.get_text_config(decoder=True))[1] or [False] * count
    layers = [
        QuantizedLayer(scheme) if type(layer) is DynamicLayer and not dropping else layer
        for layer, dropping in zip(plain, drops, strict=True)
    ]
    return Cache(layers=layers)


def require_quantizable(config: Any, scheme: KeyValueScheme) -> None:
    """Raise ``ModelError`` if no layer of a model's cache can be quantized."""
    layers = cache_layers(config)
    if any(layer.takes(scheme) for layer in layers):
        return
    if all(layer.window is not None or layer.drops for layer in layers):
        raise ModelError(
            f"every layer of {config.model_type} has a sliding window or an attention pattern, and holds few tokens, "
            "in full precision: there is nothing to quantize"
        )
    raise ModelError(f"the heads of {config.model_type} have more channels than the kernels take (256)")


def with_wanted_cache(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a decoding method with a quantized cache, if the model's configuration says so.

    It replaces the empty cache that transformers has prepared; one with tokens, and one that a user chose, is kept.
    """
    given = kwargs.get(CACHE)
    chosen = type(given) is not DynamicCache or getattr(given, "_is_user_defined", False) or given.get_seq_length()
    if chosen or scheme_of(model.config) is None:
        return kwargs
    return {**kwargs, CACHE: key_value_cache(model)}


def reads_codes(model: Any, kwargs: dict[str, Any]) -> bool:
    """Return True if transformers' loop can run on our attention: over a quantized cache, in place of ``sdpa``.

    What its prefill needs besides ``sdpa`` (softcap, sinks) only the model's own attention has.
    """
    if model.config.get_text_config(decoder=True)._attn_implementation != "sdpa":
        return False
    return any(isinstance(layer, QuantizedLayer) for layer in getattr(kwargs.get(CACHE), "layers", ()))


class _Quantized:
    """What the dynamic and the static layer share: the store, and what attention is given."""

    scheme: KeyValueScheme
    store: Any
    state: Tensor

    def attention(
        self, query: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float
    ) -> Tensor:
        """Return the attention ``[B, Q, H, Dv]`` of a query to the layer, decoded in the kernel."""
        op = _kernel("op")
        fields = [int(each) for each in self.fmt]  # type: ignore[attr-defined]
        longest = self.longest if mask is None else mask.shape[-1]  # type: ignore[attr-defined]
        return op.kv_attend(query, self.state, 0, longest, mask, sinks, scale, softcap, fields, *self.store)

    def unsupported(self, query: Tensor, mask: Tensor | None) -> str | None:
        """Return why the kernel does not take a query; None if it does."""
        return _kernel("op").unsupported(query, self.store.tail_keys.shape[1], mask)


class QuantizedLayer(_Quantized, DynamicLayer):
    """A layer that grows, quantized as it is written; each token is quantized once.

    ``update`` returns keys and values in full precision, decoded; to an attention on our kernels, ``Codes``. The first
    call, the prefill, gets back what it gave. After ``crop`` into quantized tokens, the rest of their group continues
    in full precision from the decoded values.

    Attributes:
        scheme: its settings.
        fmt: the layout of the codes.
        tokens: tokens in it.
        quantized: how many of them are quantized.
    """

    is_compileable = False
    grows_by_half = True

    def __init__(self, scheme: KeyValueScheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.fmt = layout_of(scheme)
        self.tokens = self.quantized = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        require_width(key_states, value_states)
        self.device = key_states.device
        self.tokens = self.quantized = 0
        self._allocate(key_states, value_states, GROWTH)
        self.state = torch.zeros(3, dtype=torch.int32, device=self.device)
        self.is_initialized = True

    def _allocate(self, key: Tensor, value: Tensor, tokens: int) -> None:
        self._set(_kernel("format").allocate(self.fmt, key, value, tokens))

    def _set(self, store: Any) -> None:
        # transformers looks at ``keys`` and ``values`` for heads, dtype and device.
        self.store, self.keys, self.values = store, store.tail_keys, store.tail_values

    @property
    def longest(self) -> int:
        """More tokens than the layer has room for."""
        return _kernel("format").capacity(self.store, self.fmt) + self.fmt.ring

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, first = key_states.shape[-2], self.tokens == 0
        self._grow(self.tokens + new)
        if new <= FEW and _kernel("op").can_run_triton(key_states):
            fields = [int(each) for each in self.fmt]
            _kernel("op").kv_append(key_states, value_states, self.state, fields, *self.store)
            self._count(self.tokens + new, self.fmt.quantized(self.tokens + new, self.quantized), on_device=False)
        else:
            append = _kernel("naive").append
            due = append(self.store, self.fmt, self.tokens, self.quantized, key_states, value_states)
            self._count(self.tokens + new, due)
        if first and new > 1:
            return key_states, value_states
        if attention_takes_codes():
            codes = Codes(self, key_states.dtype)
            return codes, codes
        return self.decoded()

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Return the decoded keys and values of all tokens: ``[B, G, tokens, D]`` each."""
        found: tuple[Tensor, Tensor] = _kernel("naive").read(self.store, self.fmt, self.tokens, self.quantized)
        return found

    def _count(self, tokens: int, quantized: int, on_device: bool = True) -> None:
        self.tokens, self.quantized = tokens, quantized
        if on_device:
            self.state[0].fill_(tokens)
            self.state[1].fill_(quantized)

    def _grow(self, tokens: int) -> None:
        """Make room for the codes of ``tokens``."""
        needed, room = self.fmt.quantized(tokens), _kernel("format").capacity(self.store, self.fmt)
        if needed <= room:
            return
        old, more = self.store, max(GROWTH, needed // 2 if room > GROWTH and self.grows_by_half else 0)
        made = _kernel("format").allocate(self.fmt, old.tail_keys, old.tail_values, needed + more)
        for mine, theirs in zip(made, old, strict=True):
            if mine.dim() > 2:
                mine[:, :, : theirs.shape[2]].copy_(theirs)
        self._set(made)

    # -- what transformers asks for -----------------------------------------------------------------------------------
    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def reset(self) -> None:
        self.is_initialized = False
        self.keys = self.values = None
        self.store = None
        self.tokens = self.quantized = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the latest tokens: ``-n`` of them; on transformers before 5.23, a positive number is what to keep."""
        if not self.is_initialized or tokens_to_remove == 0:
            return
        kept = self.tokens + tokens_to_remove if tokens_to_remove < 0 else min(tokens_to_remove, self.tokens)
        if kept < 0:
            raise ModelError(f"the cache has {self.tokens} tokens: {-tokens_to_remove} cannot be removed")
        if kept >= self.quantized:
            self._count(kept, self.quantized)
            return
        key, value = (t[:, :, :kept] for t in self.decoded())
        whole = kept // self.fmt.step * self.fmt.step
        slots = torch.arange(whole, kept, device=self.device) % self.fmt.ring
        self.store.tail_keys[:, :, slots] = key[:, :, whole:]
        self.store.tail_values[:, :, slots] = value[:, :, whole:]
        self._count(kept, whole)

    def _rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self._set(type(self.store)(*(choose(t) for t in self.store)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda t: t[indices].contiguous())

    def offload(self) -> None:
        """Raise ``ModelError``: the codes stay where attention reads them."""
        raise ModelError("a quantized cache cannot be offloaded")

    prefetch = offload

    def static(self, rows: int, length: int) -> StaticQuantizedLayer:
        """Return a static layer for ``rows`` rows of up to ``length`` tokens in the layout of this one."""
        return StaticQuantizedLayer(self, rows, length)


class StaticQuantizedLayer(_Quantized, StaticLayer):
    """A quantized layer at addresses that do not change, whose counts are on the device.

    Args:
        source: a layer that is like it.
        rows, length: what fits.
    """

    def __init__(self, source: QuantizedLayer, rows: int, length: int) -> None:
        super().__init__(max_cache_len=length)
        self.scheme, self.fmt, self.longest = source.scheme, source.fmt, length
        self.quantized_at_start = 0
        if not source.is_initialized:
            return
        like = (t.new_empty((rows, *t.shape[1:])) for t in (source.store.tail_keys, source.store.tail_values))
        self.store = _kernel("format").allocate(self.fmt, *like, length)
        self.keys, self.values = self.store.tail_keys, self.store.tail_values
        self.device, self.batch_size = source.device, rows
        self.state = torch.zeros(3, dtype=torch.int32, device=self.device)
        for each in (*self.store, self.state):
            torch._dynamo.mark_static_address(each)
        self.is_initialized = True

    @property  # type: ignore[override]
    def cumulative_length(self) -> Tensor:
        """The tokens in it, on the device."""
        return self.state[0] if self.is_initialized else torch.zeros((), dtype=torch.int32)

    @cumulative_length.setter
    def cumulative_length(self, value: Tensor) -> None:
        pass  # set by the constructor of the base class

    def load(self, source: QuantizedLayer) -> None:
        """Copy the codes and the tail of a layer; rows beyond its own get its first row.

        Raises ``ModelError`` if the layer does not fit.
        """
        rows = source.store.tail_keys.shape[0]
        if source.tokens > self.longest or rows > self.batch_size:
            raise ModelError(
                f"a cache of {rows} x {source.tokens} tokens does not fit in one for {self.batch_size} x {self.longest}"
            )
        for mine, theirs in zip(self.store, source.store, strict=True):
            if mine.dim() > 2:
                kept = min(mine.shape[2], theirs.shape[2])
                mine[:rows, :, :kept].copy_(theirs[:, :, :kept])
                mine[rows:, :, :kept].copy_(theirs[:1, :, :kept])
        self.quantized_at_start = source.quantized
        self.set_tokens(source.tokens)

    def unload(self, target: QuantizedLayer, tokens: int) -> None:
        """Copy the rows of ``target`` to it, ``tokens`` of which count."""
        rows = target.store.tail_keys.shape[0]
        target._grow(tokens)
        for mine, theirs in zip(self.store, target.store, strict=True):
            if mine.dim() > 2:
                kept = min(mine.shape[2], theirs.shape[2])
                theirs[:, :, :kept].copy_(mine[:rows, :, :kept])
        written, quantized, _ = self.state.tolist()
        target._count(written, quantized)
        target.crop(tokens - written)

    def set_tokens(self, tokens: int) -> None:
        """Set the number of tokens to ``tokens``: those of ``load``, or a few more."""
        self.state[0].fill_(tokens)
        self.state[1].fill_(self.fmt.quantized(tokens, self.quantized_at_start))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ModelError("a static quantized layer is filled from the cache of a prefill")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        fields = [int(each) for each in self.fmt]
        _kernel("op").kv_append(key_states, value_states, self.state, fields, *self.store)
        if attention_takes_codes():
            codes = Codes(self, key_states.dtype)
            return codes, codes
        return self.decoded()

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Return the decoded keys and values ``[B, G, longest, D]``, zeros behind the tokens in it."""
        tokens, quantized, _ = self.state.tolist()
        read = _kernel("naive").read(self.store, self.fmt, tokens, quantized)
        key, value = (torch.nn.functional.pad(t, (0, 0, 0, self.longest - tokens)) for t in read)
        return key, value


def require_width(key: Tensor, value: Tensor) -> None:
    """Raise ``ModelError`` for heads that the kernels do not take."""
    widest = max(key.shape[-1], value.shape[-1])
    if widest > 256:
        raise ModelError(f"heads of {widest} channels cannot be quantized, only of up to 256")
