"""Tensors of a sharded checkpoint, read by plain file reads when they are asked for.

Files are read, not mapped: pages of a mapped file count as resident memory of the process for as long as the kernel
likes, and a limit on that memory is what this driver is for.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..toolkit.checkpoint.safetensors import TORCH_DTYPES, SafetensorsHeaders, TensorInfo


def read_tensor(entry: TensorInfo, pinned: bool = False) -> Tensor:
    """One tensor of a shard as it is stored, in memory of its own. Raises ``CheckpointError`` if it cannot be read."""
    if entry.type not in TORCH_DTYPES:
        raise CheckpointError(f"{entry.file.name}: {entry.key} has the type {entry.type}, which hf_optim cannot read")
    tensor = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.type], pin_memory=pinned)
    if not tensor.numel():
        return tensor
    into = byte_view(tensor)
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.begin)
        done = 0
        while done < len(into):
            read = file.readinto(into[done:])
            if not read:
                raise CheckpointError(f"{entry.file.name} is truncated: it ends inside {entry.key}")
            done += read
    return tensor


def read_sample(entry: TensorInfo) -> bytes:
    """A few kilobytes of a tensor: enough to tell two trainings of one architecture apart."""
    size = entry.end - entry.begin
    with entry.file.open("rb") as file:
        file.seek(entry.begin + size // 2)
        return file.read(min(4096, size - size // 2))


@dataclass(frozen=True)
class TensorSources:
    """How parameters of the model come from the checkpoint: the tensors they are made of, and what joins them.

    Attributes:
        sources: entries with the pattern of the conversion that each matched (None: none).
        converter: transformers' ``WeightConverter``, or None where one tensor is the parameter.
    """

    sources: tuple[tuple[TensorInfo, str | None], ...]
    converter: Any = None


class Checkpoint:
    """The weights of a model, by the names that the model has for them.

    Args:
        files: the safetensors shards.
        model: the model that they belong to, without weights, as ``skeleton.build`` makes it: its ``state_dict`` says
            which tensors there are and in what dtype, and transformers' conversions are those it was loaded with.
    """

    def __init__(self, files: Iterable[str | Path], model: PreTrainedModel) -> None:
        self.listing = SafetensorsHeaders(files)
        self.model = model
        self.wanted = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        self._recipes = _recipes(self.listing, model, self.wanted)
        self._found: dict[str, str] = {}
        for first, recipe in self._recipes.items():
            for name in _targets(first, recipe, self.wanted):
                self._found[name] = first

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the names that the checkpoint has nothing for."""
        return [name for name in names if name not in self._found]

    def plain(self, name: str) -> TensorInfo | None:
        """The stored tensor that *is* the parameter, bit for bit; None where it must be cast or put together."""
        recipe = self._recipes[self._found[name]]
        if recipe.converter is not None:
            return None
        entry = recipe.sources[0][0]
        return entry if TORCH_DTYPES.get(entry.type) == self.wanted[name] else None

    def read(self, names: Sequence[str], pinned: bool = False) -> dict[str, Tensor]:
        """The tensors of these names, in the model's dtype, on the CPU."""
        wanted = dict.fromkeys(names)
        made: dict[str, Tensor] = {}
        for name in wanted:
            if name not in made:
                made |= {key: value for key, value in self._make(self._found[name], pinned) if key in wanted}
        return made

    def stored_bytes(self, names: Iterable[str]) -> int:
        """Bytes that the tensors of these names take in the checkpoint."""
        firsts = dict.fromkeys(self._found[name] for name in names)
        return sum(entry.end - entry.begin for first in firsts for entry, _ in self._recipes[first].sources)

    def _make(self, first: str, pinned: bool) -> Iterator[tuple[str, Tensor]]:
        recipe = self._recipes[first]
        if recipe.converter is None:
            entry = recipe.sources[0][0]
            yield first, read_tensor(entry, pinned).to(self.wanted[first])
            return
        converter = copy.deepcopy(recipe.converter)
        dtype = self.wanted.get(first)
        for entry, pattern in recipe.sources:
            tensor = read_tensor(entry)
            converter.add_tensor(first, entry.key, pattern, tensor.to(dtype) if dtype is not None else tensor)
        for name, value in converter.convert(first, model=self.model, config=self.model.config).items():
            yield name, value[0] if isinstance(value, list) else value


def _recipes(
    listing: SafetensorsHeaders, model: PreTrainedModel, wanted: Mapping[str, Any]
) -> dict[str, TensorSources]:
    # As transformers' own loader goes about it: in natural order, and a name that needs no renaming is left alone.
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    sources: dict[str, list[tuple[TensorInfo, str | None]]] = defaultdict(list)
    meta = dict(wanted)
    for key, entry in sorted(listing.entries.items(), key=lambda item: dot_natural_key(item[0])):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
        if name not in meta and key in meta:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, meta)
        sources[name].append((entry, pattern))
    return {
        name: TensorSources(tuple(found), by_pattern[found[0][1]] if found[0][1] is not None else None)
        for name, found in sources.items()
    }


def _targets(first: str, recipe: TensorSources, wanted: Mapping[str, Any]) -> list[str]:
    """The parameters that a recipe makes: one, but for conversions that split a tensor."""
    if recipe.converter is None or len(recipe.converter.target_patterns) < 2:
        return [first] if first in wanted else []
    begin = recipe.converter.target_patterns[0]
    return [name for each in recipe.converter.target_patterns if (name := first.replace(begin, each)) in wanted]


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to be written to a file or read into."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs on 3.10
