"""Finished parts of the result: one shard for each block, and beside it what the run knew when it was finished.

A block is finished when its state file is there: the shard is written first, and both appear whole or not at all. A
run that was killed reads a finished block back from its shard, bit by bit as it was when the next one was calibrated.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...checkpoints.reader import Checkpoint, read_tensor
from ...checkpoints.shard_writer import write_shard
from ...compressed.quantizer import PackingFallback
from ...compressed.state import dump_module_state, load_module_state, quantized_modules
from ...compressed.state_dict import packed_state_dict
from ...errors import CheckpointError
from ...runs import snapshot
from ...runs.resume_header import is_begun, write_json
from ...runs.run import Run
from ...toolkit.checkpoint.safetensors import DTYPE_NAMES, TORCH_DTYPES, SafetensorsHeaders, TensorInfo
from .decode import decode_weight, describe_experts, is_stored_quantized, require_one_scheme

HEADER = "journal.json"
INDEX = "model.safetensors.index.json"


class StreamedOutput:
    """The result as far as it is written, in a directory of its own.

    Args:
        directory: where; made when needed.
        names: of the blocks, in order.
        identity: what the result depends on (recipe, model, data, versions), as JSON types.
        resume: True to go on with what is there, False to start anew (what is there is removed).

    Raises:
        CheckpointError: when resuming, and what is there was made from something else.
    """

    def __init__(self, directory: Path, names: list[str], identity: Mapping[str, Any], resume: bool) -> None:
        self.directory, self.names = directory, names
        if not resume:
            shutil.rmtree(directory, ignore_errors=True)
        header = directory / HEADER
        if is_begun(header, identity, f"the journal in {directory.name} was made with"):
            return
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        write_json(header, identity)

    # -- names ----------------------------------------------------------------------------------------------------
    def shard(self, number: int) -> Path:
        """The shard of block ``number``; ``len(names)`` for what lies outside the blocks."""
        return self.directory / f"model-{number + 1:05d}-of-{len(self.names) + 1:05d}.safetensors"

    def _state(self, number: int) -> Path:
        return self.directory / f"state-{number + 1:05d}.safetensors"

    def finished(self, number: int) -> bool:
        return self._state(number).is_file() and self.shard(number).is_file()

    @property
    def shards(self) -> list[Path]:
        return [self.shard(number) for number in range(len(self.names) + 1)]

    # -- writing --------------------------------------------------------------------------------------------------
    def write_block(self, run: Run, number: int) -> list[str]:
        """Write a block that is done. Returns the names of modules that no longer fit their grid and stay dense."""
        name = self.names[number]
        block = run.model.get_submodule(name)
        dense, meta = dump_module_state(block)
        state, loose = packed_state_dict(block, run.model, name)
        require_one_scheme(run.model, name, self.names[:number], loose)
        experts = describe_experts(run.model, name)
        own = {f"{name}.{key}": value for key, value in state.items()}
        saved = to_saved_names(run.model, own)
        write_shard(self.shard(number), saved)
        keys = {id(value): key for key, value in saved.items()}
        where = {key.removeprefix(f"{name}."): keys[id(value)] for key, value in own.items() if id(value) in keys}
        # What the shard does not say (a zero point of a symmetric grid, what a conversion took apart) is kept beside.
        kept = {
            f"kept.{key}": value
            for key, value in dense.items()
            if not _says(state.get(key), value, key in where)
            and not is_stored_quantized(block, key, where, loose, experts)
        }
        tensors, known = snapshot.take(run, inside=f"{name}.")
        masks = {key.removeprefix("mask."): tensors.pop(key) for key in list(tensors) if key.startswith("mask.")}
        bits = {f"bits.{key}": _pack_bits(mask) for key, mask in masks.items()}
        rest = {f"run.{key}": value for key, value in tensors.items()}
        about = {
            "module": meta,
            "run": known,
            "where": where,
            "loose": loose,
            "experts": experts,
            "inventory": {key: [DTYPE_NAMES[value.dtype], list(value.shape)] for key, value in dense.items()},
            "masks": {key: list(mask.shape) for key, mask in masks.items()},
        }
        write_shard(self._state(number), {**kept, **bits, **rest}, {"hf_optim": json.dumps(about)})
        return [f"{name}.{part}" if part else name for part in loose]

    def write_rest(
        self, run: Run, names: list[str], checkpoint: Checkpoint, packing_fallback: PackingFallback, loose: list[str]
    ) -> None:
        """Write what lies outside the blocks: from memory what is real there, the rest as it stands in the checkpoint.

        ``loose`` takes the names of modules that no longer fit their grid.
        """
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        model: Any = run.model
        for name, module in quantized_modules(model).items():
            if f"{name}.weight" in names and not module.get_parameter("weight").is_meta:
                packing_fallback.apply(run, name)
        prefixes = tuple(f"{name}." for name in self.names)
        # Of a tied tensor, the name that transformers keeps.
        state = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
        state = {name: value for name, value in state.items() if not name.startswith(prefixes)}
        packed: dict[str, Tensor] = {}
        for name, module in quantized_modules(model).items():
            if any(f"{name}.{key}" in state for key in ("weight", "input_scale")) and not _is_meta(module):
                own, left = packed_state_dict(module)
                loose += [name for _ in left]
                state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
                packed |= {f"{name}.{key}": value for key, value in own.items()}
        saved = to_saved_names(model, state | packed)
        empty = {id(value): name for name, value in state.items() if value.is_meta}
        made: dict[str, Tensor | TensorInfo] = {}
        for key, value in saved.items():
            if not value.is_meta:
                made[key] = value
            elif id(value) in empty:
                name = empty[id(value)]
                entry = checkpoint.plain(name)
                made[key] = entry if entry is not None else checkpoint.read([name])[name]
        if len(made) < len(saved):
            real = checkpoint.read(list(empty.values()))
            made = dict(to_saved_names(model, state | packed | real))
        write_shard(self.shard(len(self.names)), made)

    # -- reading back ---------------------------------------------------------------------------------------------
    def about(self, number: int) -> dict[str, Any]:
        """What was noted beside a finished block."""
        try:
            with safe_open(self._state(number), framework="pt") as file:
                return json.loads(file.metadata()["hf_optim"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"the journal's {self._state(number).name} cannot be read ({error}); start without --resume"
            ) from error

    def restore(self, run: Run, number: int) -> list[str]:
        """Put the run where it was when block ``number`` was finished. Returns what ``write_block`` returned."""
        about = self.about(number)
        entries = SafetensorsHeaders([self._state(number)]).entries
        tensors = {
            key.removeprefix("run."): read_tensor(entry) for key, entry in entries.items() if key.startswith("run.")
        }
        snapshot.restore(run, tensors, about["run"])
        name = self.names[number]
        return [f"{name}.{part}" if part else name for part in about["loose"]]

    def mark(self, block: nn.Module, number: int) -> None:
        """Give a weightless block the quantization state of the finished one, without its tensors."""
        about = self.about(number)
        empty = {
            key: torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta")
            for key, (dtype, shape) in about["inventory"].items()
        }
        load_module_state(block, empty, about["module"])

    def load(self, block: nn.Module, number: int) -> None:
        """Bring a real block to the state of the finished one, bit by bit."""
        about = self.about(number)
        load_module_state(block, self.dense(number, about=about), about["module"])

    def dense(self, number: int, keys: list[str] | None = None, about: Any = None) -> dict[str, Tensor]:
        """Tensors of a finished block as they were in memory, by their names in the block; None for all."""
        about = about or self.about(number)
        saved, kept = (
            SafetensorsHeaders([self.shard(number)]).entries,
            SafetensorsHeaders([self._state(number)]).entries,
        )
        made: dict[str, Tensor] = {}
        for key in about["inventory"] if keys is None else keys:
            dtype, shape = about["inventory"][key]
            entry = saved.get(about["where"].get(key, ""))
            if f"kept.{key}" in kept:
                made[key] = read_tensor(kept[f"kept.{key}"])
            elif entry is not None and (entry.type, list(entry.shape)) == (dtype, shape):
                made[key] = read_tensor(entry)
            else:
                made[key] = self._decoded(key, about, saved)
        return made

    def masks(self) -> dict[str, int]:
        """Where the masks of the run are: parameter name -> block."""
        return {name: number for number in range(len(self.names)) for name in self.about(number)["masks"]}

    def mask(self, number: int, name: str) -> Tensor:
        """The mask of a parameter, which was kept beside a block."""
        shape = self.about(number)["masks"][name]
        return _unpack_bits(read_tensor(SafetensorsHeaders([self._state(number)]).entries[f"bits.{name}"]), shape)

    def _decoded(self, key: str, about: Mapping[str, Any], saved: Mapping[str, Any]) -> Tensor:
        held: dict[str, dict[str, str]] = defaultdict(dict)
        for own, name in about["where"].items():
            linear, _, leaf = own.rpartition(".")
            held[linear][leaf] = name

        def stored(linear: str) -> dict[str, Tensor]:
            return {leaf: read_tensor(saved[name]) for leaf, name in held[linear].items()}

        return decode_weight(key, about, stored, TORCH_DTYPES[about["inventory"][key][0]])

    # -- the end --------------------------------------------------------------------------------------------------
    def index(self, parameters: int) -> dict[str, Any]:
        """The index of all shards, as transformers writes it."""
        weight_map, total = {}, 0
        for path in self.shards:
            for key, entry in SafetensorsHeaders([path]).entries.items():
                weight_map[key] = path.name
                total += entry.end - entry.begin
        return {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}

    def remove(self) -> None:
        """The run is over."""
        shutil.rmtree(self.directory, ignore_errors=True)


def to_saved_names(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part of a state dict under the names that ``save_pretrained`` writes, without what it leaves out."""
    from transformers.core_model_loading import revert_weight_conversion

    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return dict(revert_weight_conversion(model, {key: value for key, value in state.items() if key not in ignored}))


def _says(saved: Any, dense: Tensor, written: bool) -> bool:
    """Whether the tensor stands in the shard as it was in memory."""
    return (
        written
        and isinstance(saved, Tensor)
        and saved.dtype == dense.dtype
        and saved.shape == dense.shape
        and torch.equal(saved, dense)
    )


def _is_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters(recurse=False))


def _pack_bits(mask: Tensor) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.packbits(mask.cpu().reshape(-1).numpy()))


def _unpack_bits(packed: Tensor, shape: list[int]) -> Tensor:
    import numpy

    count = int(numpy.prod(shape))
    return torch.from_numpy(numpy.unpackbits(packed.numpy(), count=count)).bool().reshape(shape)
