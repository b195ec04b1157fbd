"""The blocks of a decoder as they run in generation: some rows of a batch through a block, others past it.

The model's own forward makes masks, positions and the order of its blocks; each block is replaced by a gate that calls
a function with the block and its arguments. A row that has left passes its state on unchanged. Later tokens attend to
it in every block, so its keys and values are computed from that state, by the block's own norm and attention: the
block is called with a cache that takes keys and values and stops it there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ...errors import ModelError
from ...toolkit.compat import CACHE
from ...toolkit.exits import ExitHeads, ExitSettings, attach_stored_exits, exits_of, stored_settings, view
from ...toolkit.modules import relative_difference
from .. import sessions
from .settings import EarlyExit

# (index of the block, the block, its hidden state, its other arguments) -> its output
Passage = Callable[[int, nn.Module, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]


class Stack:
    """A decoder whose blocks are passed one by one.

    Attributes:
        model: the decoder; nothing of it is changed.
        layers: indices of the blocks after which a token may leave.
        count: blocks.
    """

    def __init__(self, model: Any, settings: EarlyExit) -> None:
        self.model = model
        self.heads = heads_of(model)
        self.count = self.heads.structure.blocks
        self.layers = settings.layers or default_layers(model, settings.confidence)
        _require_layers(model, self.layers, self.heads)
        name = self.heads.structure.list_name
        members: dict[str, Any] = dict(model.get_submodule(name)._modules)
        self.blocks: list[nn.Module] = list(members.values())
        # The gates refer to the switch alone: with the stack they would be a cycle, and the model outlive its deletion.
        self._switch = _Switch()
        listed = view(model.get_submodule(name), {})
        gates = {key: Gate(self._switch, index, block) for index, (key, block) in enumerate(members.items())}
        vars(listed)["_modules"] = gates
        run: Any = view(model, {name: listed})
        self._run = run.base_model
        self._fills = [_without_queries(block) for block in self.blocks]

    def forward(
        self, passage: Passage, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any
    ) -> None:
        """Run the blocks over tokens ``[rows, n]`` behind a cache, with a passage in place of each."""
        given: dict[str, Any] = {"input_ids": tokens, "use_cache": True, CACHE: cache}
        if mask is not None:
            given["attention_mask"] = mask
        if positions is not None:
            given["position_ids"] = positions
        self._switch.passage = passage
        try:
            self._run(**given)
        finally:
            self._switch.passage = plainly

    def logits(self, layer: int, hidden: Tensor) -> Tensor:
        """Return float32 logits ``[..., V]`` of the exit after a block, for states ``[..., width]``."""
        last = layer == self.count - 1
        index = self.heads.count - 1 if last else self.heads.settings.layers.index(layer)
        return self.heads.logits(index, hidden).to(torch.float32)

    def some(
        self, index: int, block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any],
        rows: Tensor, others: Tensor,
    ) -> Tensor:  # fmt: skip
        """Run a block for ``rows`` of a batch; ``others`` keep their states, of which the cache gets keys and values.

        Args:
            index, block, hidden, args, kwargs: of the passage.
            rows, others: indices that are all rows together, int64, ascending.
        """
        batch = hidden.shape[0]
        filled = self._keys_values(index, hidden[others], args, kwargs, batch, others)
        if not len(rows):
            filled.write(_cache_of(args, kwargs))
            return hidden
        cache = _Rows(_cache_of(args, kwargs), rows, others, filled, batch)
        args, kwargs = _picked(args, rows, batch, cache), _picked(kwargs, rows, batch, cache)
        found = hidden.clone()
        found[rows] = first(block(hidden[rows], *args, **kwargs))
        return found

    def _keys_values(
        self, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, rows: Tensor
    ) -> _Captured:
        """Return the keys and values that a block makes of states ``[rows, n, width]``."""
        taken = _Captured()
        try:
            self._fills[index](hidden, *_picked(args, rows, batch, taken), **_picked(kwargs, rows, batch, taken))
        except _Taken:
            pass
        except ValueError as error:
            raise ModelError(
                f"block {index} of {type(self.model).__name__} does not fill a cache with keys and values alone, so "
                f'that those of tokens that leave early cannot be filled in ({error}): generate with mode="stock"'
            ) from error
        if taken.keys is None:
            raise ModelError(
                f"block {index} of {type(self.model).__name__} writes no keys and values into the cache, so that those "
                'of tokens that leave early cannot be filled in: generate with mode="stock"'
            )
        return taken

    def prove(self) -> None:
        """Raise ``ModelError`` unless leaving out nothing is the model, and each block fills one layer of the cache.

        What a block writes for a state must be what the short way to keys and values gives for it.
        """
        model, made = self.model, ModelError
        now = sessions.fingerprint(model)
        if _PROVEN.get(model) == now:
            return
        device = model.get_input_embeddings().weight.device
        most = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.arange(2, 10, device=device).reshape(2, 4) % most
        written: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            mask = torch.ones_like(ids)
            expected = model(input_ids=ids, attention_mask=mask, use_cache=True)
            stock = expected.get(CACHE)
            if (reason := why_unsupported(stock)) is not None:
                raise made(f"early exits do not decode {type(model).__name__}: {reason}")
            ours = model(input_ids=ids[:, :3], attention_mask=mask[:, :3], use_cache=True).get(CACHE)

            def passage(
                index: int, block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
            ) -> Tensor:
                rows = torch.arange(len(hidden), device=hidden.device)
                taken = self._keys_values(index, hidden, args, kwargs, len(hidden), rows)
                assert taken.keys is not None
                assert taken.values is not None
                if taken.layer != index:
                    raise made(f"block {index} of {type(model).__name__} writes into layer {taken.layer} of the cache")
                written.append((taken.keys, taken.values))
                found = block(hidden, *args, **kwargs)
                if isinstance(found, tuple) and len(found) > 1:
                    raise made(f"the blocks of {type(model).__name__} return more than a hidden state")
                states.append(first(found))
                return first(found)

            states: list[Tensor] = []
            self.forward(passage, ids[:, 3:], mask, None, ours)
            gap = _gap(self.logits(self.count - 1, states[-1])[:, -1], expected.logits[:, -1].float())
            for index, (layer, (keys, values)) in enumerate(zip(stock.layers, written, strict=True)):
                if layer.keys.dim() != keys.dim() or not layer.keys.shape[2]:
                    raise made(
                        f"block {index} of {type(model).__name__} does not keep the key of its latest token in the "
                        "cache, so that those of tokens that leave early cannot be compared with the model's"
                    )
                gap = max(gap, _gap(keys, layer.keys[:, :, -1:]), _gap(values, layer.values[:, :, -1:]))
        if not gap <= (5e-2 if model.dtype in (torch.float16, torch.bfloat16) else 1e-3):
            raise ModelError(
                f"the blocks of {type(model).__name__}, one by one, do not compute what the model does (relative "
                f'difference {gap:.1e}): early exits are not supported for it; generate with mode="stock"'
            )
        _PROVEN[model] = now


def heads_of(model: Any) -> ExitHeads:
    """Return the exits of a model, from the folder of its checkpoint if its configuration describes some.

    A model without exits of its own has one after every block, read by its final norm and head.
    """
    if exits_of(model) is None and stored_settings(model.config) is not None:
        home = Path(str(getattr(model, "name_or_path", "") or ""))
        attach_stored_exits(model, home if home.is_dir() else None)
    return exits_of(model) or _shared_heads(model)


def default_layers(model: Any, confidence: str) -> tuple[int, ...]:
    """Return the blocks after which a token may leave where no setting names them.

    Raises ``ModelError`` if there are none.
    """
    heads = heads_of(model)
    found = tuple(layer for layer in heads.settings.layers if layer > 0 or confidence != "state")
    if not found:
        raise ModelError(
            f"no exit of {type(model).__name__} has a block before its own, whose state the confidence is the cosine "
            "to: choose another confidence"
        )
    return found


def _require_layers(model: Any, layers: tuple[int, ...], heads: ExitHeads) -> None:
    if unknown := sorted(set(layers) - set(heads.settings.layers)):
        known = ", ".join(map(str, heads.settings.layers))
        raise ModelError(
            f"a token cannot leave {type(model).__name__} after block {unknown[0]}: its exits sit after blocks {known}"
        )


# Exits after every block, of models without exits of their own. They refer to the model weakly.
_SHARED: weakref.WeakKeyDictionary[nn.Module, tuple[int, ExitHeads]] = weakref.WeakKeyDictionary()
_PROVEN: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def _shared_heads(model: Any) -> ExitHeads:
    now = sessions.fingerprint(model)
    if _SHARED.get(model, (None, None))[0] != now:
        structure = ExitHeads(model, ExitSettings((0,))).structure
        _SHARED[model] = (now, ExitHeads(model, ExitSettings(tuple(range(structure.blocks - 1))), structure))
    return _SHARED[model][1]


class _Switch:
    """Holds what the gates of a stack call in place of their blocks."""

    def __init__(self) -> None:
        self.passage: Passage = plainly


class Gate(nn.Module):
    """In the place of a block, whose attributes it has: calls the passage of its switch with the block."""

    def __init__(self, switch: _Switch, index: int, block: nn.Module) -> None:
        super().__init__()
        vars(self)["_switch"], vars(self)["_index"], vars(self)["_block"] = switch, index, block

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(vars(self)["_block"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        own = vars(self)
        return own["_switch"].passage(own["_index"], own["_block"], hidden_states, args, kwargs)


def plainly(index: int, block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Run a block for all rows."""
    return first(block(hidden, *args, **kwargs))


def first(output: Any) -> Tensor:
    """Return the hidden state in what a block returns."""
    return output[0] if isinstance(output, tuple) else output


def why_unsupported(cache: Any) -> str | None:
    """Return why tokens cannot be appended to a cache block by block; None if they can be."""
    if cache is None:
        return "the model returns no cache"
    for layer in getattr(cache, "layers", ()):
        if not isinstance(layer, DynamicLayer):
            return f"it keeps its state in a {type(layer).__name__}, to which keys and values are not appended"
    return None if getattr(cache, "layers", None) else f"it keeps its state in a {type(cache).__name__}"


class _Taken(Exception):
    """A block has computed keys and values, and goes no further."""


class _Captured(Cache):
    """Takes the keys and values of a block, and stops it."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: Any = None
        self.values: Any = None
        self.layer = -1
        self.more: Any = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.keys, self.values, self.layer, self.more = key_states, value_states, layer_idx, (args, kwargs)
        raise _Taken

    def write(self, cache: Cache) -> None:
        """Append what was taken to the cache that it is for."""
        args, kwargs = self.more
        cache.update(self.keys, self.values, self.layer, *args, **kwargs)


class _Rows(Cache):
    """A cache as it appears to some rows: keys and values of the others are appended along with theirs."""

    def __init__(self, cache: Cache, rows: Tensor, others: Tensor, filled: _Captured, batch: int) -> None:
        super().__init__(layers=cache.layers)
        self._whole, self._rows, self._others, self._filled, self._batch = cache, rows, others, filled, batch

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = (
            own.new_empty((self._batch, *own.shape[1:]))
            .index_copy_(0, self._rows, own)
            .index_copy_(0, self._others, new)
            for own, new in ((key_states, self._filled.keys), (value_states, self._filled.values))
        )
        found = self._whole.update(keys, values, layer_idx, *args, **kwargs)
        return found[0][self._rows], found[1][self._rows]


def _cache_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Cache))


def _picked(value: Any, rows: Tensor, batch: int, cache: Cache) -> Any:
    """Return arguments of a block for some rows, with another cache. Tensors of one row are for all."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 1 and value.shape[0] == batch and batch > 1 else value
    if isinstance(value, Cache):
        return cache
    if isinstance(value, (tuple, list)):
        return type(value)(_picked(each, rows, batch, cache) for each in value)
    if isinstance(value, dict):
        return {key: _picked(each, rows, batch, cache) for key, each in value.items()}
    return value


class _NoQueries(nn.Module):
    """In the place of a projection to queries that nothing reads: zeros of its shape."""

    def __init__(self, projection: Any) -> None:
        super().__init__()
        self._width = projection.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(()).expand(*hidden.shape[:-1], self._width)


def _without_queries(block: nn.Module) -> nn.Module:
    """Return a view of a block that does not project queries, where they have a projection of their own."""
    names = [name for name, module in block.named_modules() if _is_query(name, module)]
    return view(block, {names[0]: _NoQueries(block.get_submodule(names[0]))}) if len(names) == 1 else block


def _is_query(name: str, module: nn.Module) -> bool:
    return name.rsplit(".", 1)[-1] == "q_proj" and type(module) is nn.Linear


def _gap(found: Tensor, expected: Tensor) -> float:
    return relative_difference(found.double(), expected.double())
