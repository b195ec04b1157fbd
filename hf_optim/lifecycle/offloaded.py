"""Loading a model whose blocks are in host memory or on disk: never the whole model at once, neither here nor there.

transformers loads the checkpoint on to the meta device, so classes, names, ties and dtypes are its own, and its account
of missing tensors is held against the rule of every load. Then block after block is brought to where it will be kept:

- a dense block on disk stays in the checkpoint's own files, which are read while the model runs, unless tensors have to
  be cast or converted;
- a compressed block is packed for its kernels on the device of the model, and its packed tensors are kept.

What is outside the blocks is loaded to the device.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.meta_model import compute_buffers
from ..checkpoints.reader import Checkpoint
from ..errors import ModelError, RecipeError
from ..recipes.composition import step_label
from ..recipes.config import OptimConfig
from ..recipes.technique import Technique
from ..runs.progress import progress
from ..runs.run import Run
from ..toolkit.offloading import OffloadPlan, OpenFile, Piece, offload, offload_plan, place
from ..toolkit.offloading.door import Spiller, require_blocks, require_link
from ..toolkit.offloading.files import drop_pages
from ..toolkit.offloading.links import link_to
from ..toolkit.offloading.streamer import Stored
from ..toolkit.offloading.tensors import Unit, bytes_of, lay_out, ranges, tensors_of

log = logging.getLogger(__name__)


# -- the step ---------------------------------------------------------------------------------------------------------
def offloading_step(recipe: OptimConfig) -> Technique | None:
    """Return the step of a recipe that offloads the finished model, or None.

    Raises ``RecipeError`` if the recipe trains: offloaded weights cannot be trained.
    """
    found = [(number, step) for number, step in enumerate(recipe.steps) if step.offloading() is not None]
    if not found:
        return None
    number, step = found[0]
    if any(stage.trains for stage in recipe.stages):
        raise RecipeError(
            f"{step_label(number, step)} offloads the weights, and offloaded weights cannot be trained: leave it out, "
            "and offload the trained model with hf_optim.offload(model)"
        )
    return step


def offload_finished(run: Run, model: Any) -> None:
    """Offload the model of a finished run, if its recipe says so."""
    step = offloading_step(run.recipe)
    if step is None or not run.finished:
        return
    try:
        offload(model, **(step.offloading() or {}))
    except ModelError as error:
        raise ModelError(f"{run.label(step)}: {error}") from error
    report_plan(run, step, offload_plan(model))


def report_plan(run: Run, step: Technique, plan: OffloadPlan) -> None:
    """Put a plan on the record of a run."""
    run.report(step, **plan.figures())
    log.info("%s: %s", run.label(step), plan)


# -- loading ----------------------------------------------------------------------------------------------------------
def compute_device(device_map: Any) -> torch.device:
    """Return the device of a ``device_map`` that names one. Raises ``ModelError`` for one that spreads a model."""
    places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if len(places) != 1:
        raise ModelError(f"device_map spreads the model over {len(places)} places: name the device that computes")
    (place_,) = places
    if place_ is None:
        return torch.get_default_device()
    if isinstance(place_, int):
        return torch.device("cuda", place_)
    if str(place_) in ("auto", "balanced", "balanced_low_0", "sequential", "disk", "meta"):
        raise ModelError(
            f"device_map={str(place_)!r} has accelerate place the weights, whose hooks move them, too: name the device "
            "that computes, such as device_map='cuda', and pass device_memory="
        )
    return torch.device(place_)


def offload_loaded(
    model: Any,
    files: Sequence[Path],
    settings: Mapping[str, Any],
    device: torch.device,
    packed: Any,
    before: Callable[[], object],
) -> Any:
    """Bring the weights of a model on the meta device to where ``settings`` want them, and return it.

    Args:
        model: as transformers loaded it on to the meta device.
        files: the safetensors files of the checkpoint.
        settings: the arguments of ``hf_optim.offload``.
        device: where the model computes.
        packed: converts the layers of a compressed checkpoint (``PackedBlocks``); None for a dense one.
        before: called when the weights are in their places, before the model is one that streams.
    """
    link = link_to(device)
    require_link(link, device, settings["to"])
    assert link is not None
    compute_buffers(model)
    blocks = [(name, model.get_submodule(name)) for name in _block_names(model)]
    checkpoint = Checkpoint(files, model)
    store = _Store(settings, link, checkpoint, direct=packed is None)
    shared = _shared(model, blocks)
    stored: list[Stored] = []
    with progress(blocks, "offloading", unit="blocks") as shown, torch.no_grad():
        for name, block in shown:
            if packed is not None:
                packed.convert(name, block, model, checkpoint, device)
            stored.append(store.keep(*_layout(name, block, shared)))
            if packed is not None:
                _without_values(block)
        kept = {(id(place_.module()), place_.key) for each in stored for unit in each.units for place_ in unit.places}
        if packed is not None:
            packed.convert("", model, model, checkpoint, device, kept)
        outside = _load_rest(model, kept, checkpoint, device)
    store.finish()
    for file in files:
        drop_pages(file)
    if packed is not None:
        packed.finish(model)
    return place(model, device=device, stored=stored, outside=outside, blocks=blocks, before=before, **settings)


class _Store:
    """Brings the blocks of a checkpoint to where they are kept.

    Args:
        settings: the arguments of ``hf_optim.offload``.
        direct: blocks on disk may stay in the files of the checkpoint.
    """

    def __init__(self, settings: Mapping[str, Any], link: Any, checkpoint: Checkpoint, direct: bool) -> None:
        self.on_disk, self.folder = settings["to"] == "disk", settings.get("folder")
        self.link, self.checkpoint, self.direct = link, checkpoint, direct
        self.writer: Spiller | None = None
        self.opened: dict[Path, OpenFile] = {}

    def keep(self, units: list[Unit], size: int) -> Stored:
        """Keep a block, whose tensors are in memory if they are not read from the files as they are."""
        found = Stored(units, size)
        if self.direct and self.on_disk and (pieces := self._pieces(units)) is not None:
            found.pieces = pieces
            return found
        memory = torch.empty(size, dtype=torch.uint8) if self.on_disk else self.link.host(size)
        self._fill(units, memory)
        if self.on_disk:
            self.writer = self.writer or Spiller(self.folder)
            self.writer.add(found, memory)
        else:
            found.memory = memory
        return found

    def finish(self) -> None:
        """Let what was written be read."""
        if self.writer is not None:
            self.writer.finish()

    def _pieces(self, units: Iterable[Unit]) -> list[Piece] | None:
        """Return where a block is in the files; None if a tensor has to be cast or converted."""
        pieces = []
        for unit in units:
            info = self.checkpoint.stored_unchanged(unit.name)
            if info is None or info.end - info.begin != unit.size:
                return None
            if info.file not in self.opened:
                self.opened[info.file] = OpenFile(info.file, info.file.name)
            pieces.append(Piece(self.opened[info.file], info.begin, unit.size, unit.begin, unit.name))
        return pieces

    def _fill(self, units: Iterable[Unit], memory: Tensor) -> None:
        """Write the tensors of a block to its buffer: as its modules have them, or from the files."""
        for unit in units:
            own = memory[unit.begin : unit.end]
            if not self.direct:
                own.copy_(bytes_of(unit))
            else:
                value = self.checkpoint.read([unit.name])[unit.name].contiguous()
                own.copy_(value.reshape(-1).view(torch.uint8))


def _block_names(model: Any) -> list[str]:
    """Return the names of the blocks of a model, from its class: its own layers may have no weights yet."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"), torch.no_grad():
        return [name for name, _ in require_blocks(type(model)(config))]


def _load_rest(model: nn.Module, kept: set[tuple[int, str]], checkpoint: Checkpoint, device: torch.device) -> int:
    """Load what is not kept with the blocks to the device; return its bytes. Tied tensors stay tied."""
    groups: dict[int, list[Any]] = {}
    for each in tensors_of(model):
        if each.tensor.is_meta and (id(each.module), each.key) not in kept:
            groups.setdefault(id(each.tensor), []).append(each)
    for group in groups.values():
        known = [each.name for each in group if not checkpoint.missing([each.name])]
        if not known:
            raise ModelError(
                f"the checkpoint has no {group[0].name}: load the model without offloading it, and save it"
            )
        value = checkpoint.read(known[:1])[known[0]].to(device)
        made: Any = nn.Parameter(value, requires_grad=False) if group[0].is_parameter else value
        for each in group:
            held: Any = each.module._parameters if each.is_parameter else each.module._buffers
            held[each.key] = made
    outside = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
            outside[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(outside.values())


def _shared(model: Any, blocks: Iterable[tuple[str, nn.Module]]) -> set[int]:
    """Return the ids of tensors that are not in one block alone. Those stay on the device."""
    owner: dict[int, set[int]] = {}
    inside = {id(part): index for index, (_, block) in enumerate(blocks) for part in block.modules()}
    for each in tensors_of(model):
        owner.setdefault(id(each.tensor), set()).add(inside.get(id(each.module), -1))
    return {key for key, found in owner.items() if len(found) > 1}


def _layout(name: str, block: nn.Module, shared: set[int]) -> tuple[list[Unit], int]:
    found = [
        dataclasses.replace(each, name=f"{name}.{each.name}")
        for each in tensors_of(block)
        if id(each.tensor) not in shared
    ]
    return lay_out(sorted(ranges(found), key=lambda group: group[0].name))


def _without_values(block: nn.Module) -> None:
    """Put what was packed and is kept elsewhere on the meta device; tensors over the same memory stay one."""
    for group in ranges(tensors_of(block)):
        made: dict[int, Any] = {}
        for each in group:
            held: Any = each.module._parameters if each.is_parameter else each.module._buffers
            tensor = each.tensor
            if id(tensor) not in made:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
                made[id(tensor)] = nn.Parameter(empty, requires_grad=False) if each.is_parameter else empty
            held[each.key] = made[id(tensor)]


# -- compressed checkpoints -------------------------------------------------------------------------------------------
class PackedBlocks:
    """Packs the layers of a compressed checkpoint, block by block.

    Args:
        kernels: in order of preference.
    """

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels
        self.reasons: dict[str, str] = {}

    def convert(
        self,
        name: str,
        part: nn.Module,
        model: nn.Module,
        checkpoint: Checkpoint,
        device: torch.device,
        kept: Iterable[tuple[int, str]] = (),
    ) -> None:
        """Read the tensors of a block, and pack its layers on the device; for the model, what is left of its layers.

        ``kept`` are tensors that stay without values.
        """
        from ..compressed.packed.loader import PENDING, convert

        prefix = f"{name}." if name else ""
        for each in list(tensors_of(part)):
            waits = name or PENDING in each.module.__dict__
            if not each.tensor.is_meta or not waits or (id(each.module), each.key) in kept:
                continue
            full = prefix + each.name
            value = checkpoint.read([full])[full].to(device)
            held: Any = each.module._parameters if each.is_parameter else each.module._buffers
            held[each.key] = nn.Parameter(value, requires_grad=False) if each.is_parameter else value
        self.reasons |= convert(part, self.kernels, prefix, model)

    def finish(self, model: Any) -> None:
        """Have the model saved as it was stored, and warn about layers that no kernel runs."""
        from ..compressed.packed.accelerate import finish_packed

        finish_packed(model, self.reasons)
