"""Tables of learned positions: which one a model reads, and a longer one in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hf_optim import ModelError
from hf_optim.toolkit.attention import hidden_states

TOKENS = 8  # of the text with which a table is found


@dataclass(frozen=True)
class PositionTable:
    """A table of positions.

    Attributes:
        name: of its module, an ``nn.Embedding``.
        offset: row of the first position; rows before it are of padding, or unused.
        positions: how many there are.
        counts_offset: ``config.max_position_embeddings`` counts the rows before the first position, too (RoBERTa).
    """

    name: str
    offset: int
    positions: int
    counts_offset: bool

    def configured(self, length: int) -> int:
        """Return ``config.max_position_embeddings`` for ``length`` positions."""
        return length + self.offset * self.counts_offset


class _Lookups(TorchFunctionMode):
    """Keep the indices of every lookup in an embedding, by the identity of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.embedding:
            self.found[id(args[1])] = args[0]
        return func(*args, **(kwargs or {}))


def find_table(model: PreTrainedModel, label: str) -> PositionTable | None:
    """Return the table whose rows a model reads in their order, whatever the tokens are; None if it reads none.

    Raises ``ModelError`` if the rows of the table do not fit ``config.max_position_embeddings``.
    """
    config = model.config
    reserved = {getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    some = [token for token in range(config.vocab_size) if token not in reserved][: 2 * TOKENS + 1]
    if len(some) < TOKENS:
        return None
    texts = [some[:TOKENS][::-1], [some[-1]] * TOKENS]
    seen = []
    for text in texts:
        with _Lookups() as lookups:
            hidden_states(model, {"input_ids": torch.tensor([text], device=model.device)})
        seen.append(lookups.found)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or id(module.weight) not in seen[0]:
            continue
        first, second = (found[id(module.weight)].reshape(-1) for found in seen)
        offset = int(first[0])
        if torch.equal(first, second) and torch.equal(first.cpu(), offset + torch.arange(TOKENS)):
            return _table(name, offset, len(module.weight), config.max_position_embeddings, label)
    return None


def _table(name: str, offset: int, rows: int, configured: int, label: str) -> PositionTable:
    if configured not in (rows, rows - offset):
        raise ModelError(
            f"{label}: {name} has {rows} rows, {offset} of them before the first position, which does not fit "
            f"max_position_embeddings={configured}; this architecture is not supported"
        )
    return PositionTable(name, offset, rows - offset, offset > 0 and configured == rows)


def copied(table: Tensor, offset: int, length: int) -> Tensor:
    """Return a table ``[offset + length, d]`` in which positions repeat: ``new[i] = old[i mod n]``."""
    positions = table[offset:]
    place = torch.arange(length, device=table.device) % len(positions)
    return torch.cat([table[:offset], positions[place]])


def interpolated(table: Tensor, offset: int, length: int) -> Tensor:
    """Return a table ``[offset + length, d]`` over the same range: ``new[i] = old[i (n - 1) / (length - 1)]``.

    Between two rows it is linear, in float64; the first and the last row stay.
    """
    positions = table[offset:].double()
    place = torch.arange(length, device=table.device, dtype=torch.float64) * (len(positions) - 1) / (length - 1)
    low = place.floor().long().clamp_max(len(positions) - 1)
    high = (low + 1).clamp_max(len(positions) - 1)
    share = (place - low)[:, None]
    new = positions[low] * (1 - share) + positions[high] * share
    return torch.cat([table[:offset], new.to(table.dtype)])


def extend(model: PreTrainedModel, table: PositionTable, rows: Tensor, label: str) -> None:
    """Put ``rows`` in the place of a table, in place, with the buffers and the configuration that follow from it.

    Raises ``ModelError``, and leaves the model unchanged, if anything else depends on the number of positions in a way
    that is not known.
    """
    length = len(rows) - table.offset
    old, new = model.config.max_position_embeddings, table.configured(length)
    buffers = _longer_buffers(model, table, new, label)
    module = model.get_submodule(table.name)
    assert isinstance(module, nn.Embedding)
    module.weight = nn.Parameter(rows, requires_grad=module.weight.requires_grad)
    module.num_embeddings = len(rows)
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer
    for config in _configs(model):
        if config.max_position_embeddings == old:
            config.max_position_embeddings = new


def _configs(model: PreTrainedModel) -> list[Any]:
    held = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in held if hasattr(config, "max_position_embeddings")}.values())


def _longer_buffers(model: PreTrainedModel, table: PositionTable, configured: int, label: str) -> dict[str, Tensor]:
    """Return the buffers of the model that another number of positions changes, with their new values."""
    changed = type(model.config).from_dict({**model.config.to_dict(), "max_position_embeddings": configured})
    with torch.device("meta"):
        made = type(model)(changed)
    shapes = {name: part.shape for name, part in (*made.named_parameters(), *made.named_buffers())}
    other = [n for n, p in model.named_parameters() if shapes.get(n) != p.shape and n != f"{table.name}.weight"]
    found = {n: _longer(b, shapes[n]) for n, b in model.named_buffers() if shapes.get(n, b.shape) != b.shape}
    other += [name for name, buffer in found.items() if buffer is None]
    if other:
        raise ModelError(
            f"{label}: {', '.join(other[:3])} of {type(model).__name__} depend on the number of positions, too; this "
            "architecture is not supported"
        )
    return {name: buffer for name, buffer in found.items() if buffer is not None}


def _longer(buffer: Tensor, shape: torch.Size) -> Tensor | None:
    """Return a buffer that counts positions, is all zero, or is a causal mask, in another shape; None for others."""
    ones = torch.ones(shape, device=buffer.device, dtype=buffer.dtype)
    makers = (
        lambda like: torch.arange(like.shape[-1], device=buffer.device).to(buffer.dtype).expand_as(like),
        torch.zeros_like,
        lambda like: like.tril() if like.dim() > 1 and like.shape[-1] == like.shape[-2] else torch.zeros_like(like),
    )
    for make in makers:
        if torch.equal(make(torch.ones_like(buffer)), buffer):
            return make(ones).clone()
    return None
