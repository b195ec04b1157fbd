"""Completed parts of a streamed result: one shard per block, and a state file with the rest of what resuming needs.

A block is complete once its shard and its state file have their checksums (``runs.work_files``); that of the state file
is written last. A damaged block is calibrated again. A run that was killed reads completed blocks back from their
shards, bitwise identical to what the next block was calibrated on.
"""

from __future__ import annotations

import json
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
from ...runs import snapshot, work_files
from ...runs.disk_errors import readable_disk_errors
from ...runs.resume_header import HEADER, is_begun, remove_work_folder, require_work_folder, write_json
from ...runs.run import Run
from ...toolkit.checkpoint.safetensors import DTYPE_NAMES, TORCH_DTYPES, SafetensorsHeaders, TensorInfo
from .decode import decode_weight, describe_experts, is_stored_quantized, require_one_scheme

INDEX = "model.safetensors.index.json"


class StreamedOutput:
    """The parts of the result written so far, in a directory.

    Args:
        directory: where; created if it does not exist.
        names: the names of the blocks, in order.
        identity: what the result depends on (recipe, model, data, versions), in JSON types.
        resume: True to reuse the completed blocks in ``directory``, False to remove them and start over.

    Raises:
        CheckpointError: when resuming, if the completed blocks have another identity.
    """

    def __init__(self, directory: Path, names: list[str], identity: Mapping[str, Any], resume: bool) -> None:
        self.directory, self.names = directory, names
        self._digest = work_files.digest_json(identity)
        self._completed: dict[int, bool] = {}
        require_work_folder(directory)
        header = directory / HEADER
        if resume and is_begun(header, identity, f"the journal in {directory.name} was made with"):
            return
        remove_work_folder(directory)
        with readable_disk_errors(directory, "the journal"):
            directory.mkdir(parents=True)
        write_json(header, identity)

    # -- files ----------------------------------------------------------------------------------------------------
    def shard(self, number: int) -> Path:
        """Return the path of the shard of block ``number``; ``len(names)`` is the shard of the non-block weights."""
        return self.directory / f"model-{number + 1:05d}-of-{len(self.names) + 1:05d}.safetensors"

    def _state(self, number: int) -> Path:
        return self.directory / f"state-{number + 1:05d}.safetensors"

    def is_completed(self, number: int) -> bool:
        """Return True if block ``number`` has been written, and both of its files are as they were written."""
        if number not in self._completed:
            files = (self._state(number), self.shard(number))
            self._completed[number] = all(work_files.is_intact(path, self._digest) for path in files)
        return self._completed[number]

    @property
    def shards(self) -> list[Path]:
        """The paths of all shards, in order."""
        return [self.shard(number) for number in range(len(self.names) + 1)]

    # -- writing --------------------------------------------------------------------------------------------------
    def write_block(self, run: Run, number: int) -> list[str]:
        """Write a calibrated block. Returns the names of modules that no longer fit their grid and are written dense.

        Raises ``ModelError`` if stock transformers could not read the block's experts.
        """
        name = self.names[number]
        block = run.model.get_submodule(name)
        dense, meta = dump_module_state(block)
        state, off_grid = packed_state_dict(block, run.model, name)
        require_one_scheme(run.model, name, self.names[:number], off_grid)
        experts = describe_experts(run.model, name)
        own = {f"{name}.{key}": value for key, value in state.items()}
        saved = to_saved_names(run.model, own)
        self._write(self._state(number), self.shard(number), saved)
        keys = {id(value): key for key, value in saved.items()}
        where = {key.removeprefix(f"{name}."): keys[id(value)] for key, value in own.items() if id(value) in keys}
        # Tensors that the shard does not determine: a zero point of a symmetric grid, what a conversion took apart.
        kept = {
            f"kept.{key}": value
            for key, value in dense.items()
            if not (key in where and _is_identical(state.get(key), value))
            and not is_stored_quantized(block, key, where, off_grid, experts)
        }
        run_tensors, run_meta = snapshot.take(run, inside=f"{name}.")
        masks = {
            key.removeprefix("mask."): run_tensors.pop(key) for key in list(run_tensors) if key.startswith("mask.")
        }
        metadata = {
            "module": meta,
            "run": run_meta,
            "where": where,
            "loose": off_grid,
            "experts": experts,
            "inventory": {key: [DTYPE_NAMES[value.dtype], list(value.shape)] for key, value in dense.items()},
            "masks": {key: list(mask.shape) for key, mask in masks.items()},
        }
        tensors = {
            **kept,
            **{f"bits.{key}": _pack_bits(mask) for key, mask in masks.items()},
            **{f"run.{key}": value for key, value in run_tensors.items()},
        }
        write_shard(self._state(number), tensors, {"hf_optim": json.dumps(metadata)})
        work_files.seal(self._state(number), self._digest)
        self._completed[number] = True
        return [f"{name}.{part}" if part else name for part in off_grid]

    def _write(self, state: Path, shard: Path, tensors: Mapping[str, Tensor | TensorInfo]) -> None:
        """Write and seal a shard, whose state file is incomplete until it is written, too."""
        for path in (state, shard):
            work_files.unseal(path)
        write_shard(shard, tensors)
        work_files.seal(shard, self._digest)

    def write_non_blocks(
        self, run: Run, names: list[str], checkpoint: Checkpoint, packing_fallback: PackingFallback, off_grid: list[str]
    ) -> None:
        """Write the shard of the weights outside the blocks.

        What is materialized is written from memory, everything else is copied from the checkpoint.

        Args:
            run: the run.
            names: the parameters and persistent buffers outside the blocks.
            checkpoint: the original checkpoint.
            packing_fallback: as for the blocks.
            off_grid: extended by the modules that no longer fit their grid.
        """
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        model: Any = run.model
        for name, module in quantized_modules(model).items():
            if f"{name}.weight" in names and not module.get_parameter("weight").is_meta:
                packing_fallback.apply(run, name)
        prefixes = tuple(f"{name}." for name in self.names)
        # Each tied tensor once, under the name that transformers keeps.
        state = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
        state = {name: value for name, value in state.items() if not name.startswith(prefixes)}
        packed: dict[str, Tensor] = {}
        for name, module in quantized_modules(model).items():
            if any(f"{name}.{key}" in state for key in ("weight", "input_scale")) and not _is_meta(module):
                own, unpackable = packed_state_dict(module)
                off_grid += [name for _ in unpackable]
                state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
                packed |= {f"{name}.{key}": value for key, value in own.items()}
        saved = to_saved_names(model, state | packed)
        meta_names = {id(value): name for name, value in state.items() if value.is_meta}
        tensors: dict[str, Tensor | TensorInfo] = {}
        for key, value in saved.items():
            if not value.is_meta:
                tensors[key] = value
            elif id(value) in meta_names:
                name = meta_names[id(value)]
                info = checkpoint.stored_unchanged(name)
                tensors[key] = info if info is not None else checkpoint.read([name])[name]
        if len(tensors) < len(saved):  # a conversion made new meta tensors: convert the real ones
            real = checkpoint.read(list(meta_names.values()))
            tensors = dict(to_saved_names(model, state | packed | real))
        write_shard(self.shard(len(self.names)), tensors)

    # -- reading back ---------------------------------------------------------------------------------------------
    def metadata(self, number: int) -> dict[str, Any]:
        """Return the metadata of a completed block. Raises ``CheckpointError`` if its state file cannot be read."""
        try:
            with safe_open(self._state(number), framework="pt") as file:
                return json.loads(file.metadata()["hf_optim"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"the journal's {self._state(number).name} cannot be read ({error}); start without --resume"
            ) from error

    def restore(self, run: Run, number: int) -> list[str]:
        """Restore the run as it was when block ``number`` was completed. Returns what ``write_block`` returned."""
        metadata = self.metadata(number)
        entries = SafetensorsHeaders([self._state(number)]).entries
        tensors = {
            key.removeprefix("run."): read_tensor(info) for key, info in entries.items() if key.startswith("run.")
        }
        snapshot.restore(run, tensors, metadata["run"])
        name = self.names[number]
        return [f"{name}.{part}" if part else name for part in metadata["loose"]]

    def attach_schemes(self, block: nn.Module, number: int) -> None:
        """Give a meta block the quantization schemes of the completed one, without reading its tensors."""
        metadata = self.metadata(number)
        empty = {
            key: torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta")
            for key, (dtype, shape) in metadata["inventory"].items()
        }
        load_module_state(block, empty, metadata["module"])

    def load_block(self, block: nn.Module, number: int) -> None:
        """Load the completed state into a materialized block, bit-exact."""
        metadata = self.metadata(number)
        load_module_state(block, self.dense_tensors(number, metadata=metadata), metadata["module"])

    def dense_tensors(
        self, number: int, keys: list[str] | None = None, metadata: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Return tensors of a completed block as they were in memory, decoded, by their names in the block.

        Args:
            number: the block.
            keys: which tensors; None for all.
            metadata: its ``metadata``, if it has been read already.
        """
        metadata = metadata or self.metadata(number)
        saved = SafetensorsHeaders([self.shard(number)]).entries
        kept = SafetensorsHeaders([self._state(number)]).entries
        tensors: dict[str, Tensor] = {}
        for key in metadata["inventory"] if keys is None else keys:
            dtype, shape = metadata["inventory"][key]
            info = saved.get(metadata["where"].get(key, ""))
            if f"kept.{key}" in kept:
                tensors[key] = read_tensor(kept[f"kept.{key}"])
            elif info is not None and (info.type, list(info.shape)) == (dtype, shape):
                tensors[key] = read_tensor(info)
            else:
                tensors[key] = self._decode(key, metadata, saved)
        return tensors

    def mask_locations(self) -> dict[str, int]:
        """Return the block that holds each mask of the run: parameter name -> block number."""
        return {name: number for number in range(len(self.names)) for name in self.metadata(number)["masks"]}

    def read_mask(self, number: int, name: str) -> Tensor:
        """Read the mask of a parameter from the state file of its block."""
        shape = self.metadata(number)["masks"][name]
        return _unpack_bits(read_tensor(SafetensorsHeaders([self._state(number)]).entries[f"bits.{name}"]), shape)

    def _decode(self, key: str, metadata: Mapping[str, Any], saved: Mapping[str, TensorInfo]) -> Tensor:
        names: dict[str, dict[str, str]] = defaultdict(dict)
        for own, name in metadata["where"].items():
            linear, _, leaf = own.rpartition(".")
            names[linear][leaf] = name

        def stored(linear: str) -> dict[str, Tensor]:
            return {leaf: read_tensor(saved[name]) for leaf, name in names[linear].items()}

        return decode_weight(key, metadata, stored, TORCH_DTYPES[metadata["inventory"][key][0]])

    # -- the end --------------------------------------------------------------------------------------------------
    def index(self, parameters: int) -> dict[str, Any]:
        """Return the index of all shards, in the format of transformers."""
        weight_map, total = {}, 0
        for path in self.shards:
            for key, info in SafetensorsHeaders([path]).entries.items():
                weight_map[key] = path.name
                total += info.end - info.begin
        return {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}

    def remove(self) -> None:
        """Remove the directory, once the run has finished."""
        remove_work_folder(self.directory)


def to_saved_names(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a part of a state dict to what ``save_pretrained`` writes: its names, without the keys it leaves out."""
    from transformers.core_model_loading import revert_weight_conversion

    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return dict(revert_weight_conversion(model, {key: value for key, value in state.items() if key not in ignored}))


def _is_identical(saved: Any, dense: Tensor) -> bool:
    return (
        isinstance(saved, Tensor)
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
