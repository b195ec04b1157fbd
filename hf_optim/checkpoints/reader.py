"""Read tensors of a sharded checkpoint on demand, under the names and with the conversions of the model.

Files are read, not memory-mapped: pages of a mapped file count towards the resident memory of the process, which the
streamed driver must keep below a limit.
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
from ..toolkit import compat
from ..toolkit.checkpoint.key_names import model_names
from ..toolkit.checkpoint.safetensors import TORCH_DTYPES, SafetensorsHeaders, TensorInfo


def read_tensor(info: TensorInfo, pinned: bool = False) -> Tensor:
    """Read one tensor as it is stored, into newly allocated CPU memory (pinned if asked for).

    Raises ``CheckpointError`` if its type is not supported or the file is truncated.
    """
    if info.type not in TORCH_DTYPES:
        raise CheckpointError(f"{info.file.name}: {info.key} has the type {info.type}, which hf_optim cannot read")
    tensor = torch.empty(info.shape, dtype=TORCH_DTYPES[info.type], pin_memory=pinned)
    if not tensor.numel():
        return tensor
    buffer = byte_view(tensor)
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.begin)
        done = 0
        while done < len(buffer):
            read = file.readinto(buffer[done:])
            if not read:
                raise CheckpointError(f"{info.file.name} is truncated: it ends inside {info.key}")
            done += read
    return tensor


@dataclass(frozen=True)
class TensorSources:
    """The stored tensors that parameters of the model are made from, and the conversion that combines them.

    Attributes:
        sources: stored tensors, each with the pattern of the conversion that it matched (None: none).
        converter: transformers' ``WeightConverter``, or None where one tensor is the parameter.
    """

    sources: tuple[tuple[TensorInfo, str | None], ...]
    converter: Any = None


class Checkpoint:
    """The weights of a model on disk, by their names in the model.

    Args:
        files: the safetensors shards.
        model: the model on the meta device (``meta_model.build``). Its ``state_dict`` defines which tensors there are
            and in what dtype; transformers' conversions are those it was loaded with.
    """

    def __init__(self, files: Iterable[str | Path], model: PreTrainedModel) -> None:
        self.headers = SafetensorsHeaders(files)
        self.model = model
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        # A conversion that splits a tensor makes several parameters; it is kept under the first one's name.
        self._sources = _find_sources(self.headers, model, self.dtypes)
        self._first_of: dict[str, str] = {}
        for first, sources in self._sources.items():
            for name in _targets(first, sources, self.dtypes):
                self._first_of[name] = first

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return those of the names that the checkpoint has no tensor for."""
        return [name for name in names if name not in self._first_of]

    def stored_unchanged(self, name: str) -> TensorInfo | None:
        """Return the stored tensor that is the parameter, bitwise identical; None if it must be cast or converted."""
        sources = self._sources[self._first_of[name]]
        if sources.converter is not None:
            return None
        info = sources.sources[0][0]
        return info if TORCH_DTYPES.get(info.type) == self.dtypes[name] else None

    def read(self, names: Sequence[str], pinned: bool = False) -> dict[str, Tensor]:
        """Read the tensors with these names, in the model's dtype, on the CPU.

        ``pinned`` allocates pinned memory for tensors that need no conversion. Raises ``CheckpointError`` if a tensor
        cannot be read.
        """
        wanted = dict.fromkeys(names)
        tensors: dict[str, Tensor] = {}
        for name in wanted:
            if name not in tensors:
                tensors |= {key: value for key, value in self._load(self._first_of[name], pinned) if key in wanted}
        return tensors

    def _load(self, first: str, pinned: bool) -> Iterator[tuple[str, Tensor]]:
        sources = self._sources[first]
        if sources.converter is None:
            yield first, read_tensor(sources.sources[0][0], pinned).to(self.dtypes[first])
            return
        converter = copy.deepcopy(sources.converter)
        dtype = self.dtypes.get(first)
        for info, pattern in sources.sources:
            tensor = read_tensor(info)
            converter.add_tensor(first, info.key, pattern, tensor.to(dtype) if dtype is not None else tensor)
        for name, value in converter.convert(first, model=self.model, config=self.model.config).items():
            yield name, value[0] if isinstance(value, list) else value


def _find_sources(
    headers: SafetensorsHeaders, model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]
) -> dict[str, TensorSources]:
    from transformers.core_model_loading import WeightConverter

    conversions = compat.weight_conversions(model)
    by_pattern = {
        pattern: each for each in conversions if isinstance(each, WeightConverter) for pattern in each.source_patterns
    }
    sources: dict[str, list[tuple[TensorInfo, str | None]]] = defaultdict(list)
    for key, (name, pattern) in model_names(headers.entries, conversions, model.base_model_prefix, dtypes).items():
        sources[name].append((headers.entries[key], pattern))
    return {
        name: TensorSources(tuple(found), by_pattern[found[0][1]] if found[0][1] is not None else None)
        for name, found in sources.items()
    }


def _targets(first: str, sources: TensorSources, dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Return the parameters made from these sources: several only if the conversion splits a tensor."""
    if sources.converter is None or len(sources.converter.target_patterns) < 2:
        return [first] if first in dtypes else []
    patterns = sources.converter.target_patterns
    return [name for pattern in patterns if (name := first.replace(patterns[0], pattern)) in dtypes]


def byte_view(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as bytes, to be written to a file or read into."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs on 3.10
