"""``offload`` moves the blocks of a model to host memory or disk, ``restore_weights`` brings them back."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ModelError, require_any_model
from ...trust.bounds import shown
from ..topology import blocks as find_blocks
from .classes import STATE, BlockState, ModelState, block_class, find_state, model_class, streamed_blocks
from .files import Piece, Reader, SpillFile
from .links import CpuLink, Link, blocks_ahead, link_to, measure_link
from .plan import DEVICE, DISK, HOST, OffloadPlan, make_plan
from .sizes import parse_size
from .streamer import Stored, Streamer
from .tensors import Found, Unit, bytes_of, lay_out, point_at, ranges, tensors_of

PLACES = ("cpu", "disk")
DISK_RATE = 1.5e9  # before the disk is measured: bytes a second of an ordinary solid state disk


def offload(
    model: nn.Module,
    to: str = "cpu",
    *,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    ahead: int | None = None,
    folder: str | Path | None = None,
    threads: int = 4,
) -> nn.Module:
    """Move the weights of a model's blocks to host memory or disk, in place; they are fetched while the model runs.

    Outputs stay equal to the bit: the same kernels multiply the same numbers. Packed weights (``optim_config="auto"``,
    ``accelerate``) move packed. A pass over the model moves each streamed block once, so a decoding step takes at least
    the streamed bytes over the link. Adapters (peft) stay on the device, and so does what is outside the blocks.

    Args:
        model: a model on one device, or a wrapper around one (peft); not compiled, and without hooks of accelerate.
        to: ``cpu`` keeps the blocks in pinned host memory, for a model on an accelerator; ``disk`` keeps them in a file
            without a name in ``folder``, except for what ``host_memory`` holds.
        device_memory: bytes of weights on the device, the buffers included (``4GiB``): as many blocks as fit stay
            there. None for as few as can be.
        host_memory: the most bytes of weights in host memory. For a model on a CPU it is the budget of all weights.
        ahead: how many blocks are fetched while one computes; None for as many as the measured link needs.
        folder: for ``disk``; None for the temporary folder. It must not be in memory.
        threads: that read from disk.

    Returns the model. Raises ``ModelError`` for a model that cannot be offloaded, and for budgets that are too small,
    with the least one.
    """
    require_any_model(model)
    return place(
        model, to, device_memory=device_memory, host_memory=host_memory, ahead=ahead, folder=folder, threads=threads
    )


def place(
    model: nn.Module,
    to: str,
    *,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    ahead: int | None = None,
    folder: str | Path | None = None,
    threads: int = 4,
    device: torch.device | None = None,
    link: Link | None = None,
    stored: Sequence[Stored] | None = None,
    outside: int | None = None,
    blocks: Sequence[tuple[str, nn.Module]] | None = None,
    before: Callable[[], object] | None = None,
) -> nn.Module:
    """``offload``, also of a model whose blocks are stored already and have no values in memory.

    Args:
        device: where the model computes; None for where it is.
        link: the way there; None for that of the device.
        stored: of each block in the order in which they run, its bytes: on disk, or in host memory.
        outside: bytes of weights outside the blocks, if ``stored`` is given.
        blocks: the blocks by name; None to find them.
        before: called when everything is in its place, before the classes are changed.
    """
    if to not in PLACES:
        raise ModelError(f"to={shown(to)}: weights are offloaded to one of {', '.join(PLACES)}")
    if ahead is not None and not 1 <= ahead <= 64:
        raise ModelError(f"ahead={ahead}: between 1 and 64 blocks are fetched ahead")
    inner = require_offloadable(model, meta=stored is not None)
    device = device or next(inner.parameters()).device
    link = link or link_to(device)
    require_link(link, device, to)
    assert link is not None
    budgets = parse_size(device_memory, "device_memory"), parse_size(host_memory, "host_memory")
    blocks = blocks if blocks is not None else require_blocks(inner)
    if stored is None:
        layouts, outside = split(inner, blocks)
        known: Sequence[Stored] = [Stored(units, size) for units, size in layouts]
    else:
        known = stored
    assert outside is not None
    sizes = [each.size for each in known]
    rates = _Rates(link, to, max(sizes), outside)
    plan = make_plan(
        sizes, outside, 0, to=to, ahead=ahead or rates.ahead, device_budget=budgets[0], host_budget=budgets[1],
        readers=Reader.memory(threads) if to == DISK else 0, host_is_device=link.host_is_device,
    )  # fmt: skip
    reader = _reader(link, threads) if to == DISK or stored is not None else None
    with torch.inference_mode(False):  # buffers that were made in it could not be written to outside of it
        if stored is None:
            _store(plan, known, link, folder)
        else:
            assert reader is not None
            _bring(plan, known, link, reader)
        streamer = Streamer(link, [known[i] for i in plan.streamed], plan.ahead, reader) if plan.streamed else None
    if streamer is not None:
        plan = replace(plan, ring=sum(len(slot) for slot in streamer.slots), link=rates.link)
    states = [
        BlockState(streamer, index, *blocks[position]) for index, position in enumerate(plan.streamed) if streamer
    ]
    for state, position in zip(states, plan.streamed, strict=True):
        state.to_slot()
        _renew(blocks[position][1])
    if before is not None:
        before()
    for state, position in zip(states, plan.streamed, strict=True):
        module = blocks[position][1]
        module.__dict__[STATE] = state
        module.__class__ = block_class(state.former)  # type: ignore[arg-type]
    if streamer is not None:
        plan = _measured(plan, streamer)
    _swap_model(inner, plan, streamer)
    for state in states:
        state.withdraw()
    return model


def require_link(link: Link | None, device: torch.device, to: str) -> None:
    """Raise ``ModelError`` if weights cannot be offloaded from a device to ``to``."""
    if link is None:
        raise ModelError(f"there is no offloading for devices of the type {device.type}: only for CUDA and the CPU")
    if to == "cpu" and link.host_is_device:
        raise ModelError(
            "the model computes on the CPU, so its weights are in host memory already: offload to disk (to='disk')"
        )


def require_blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Return name and module of each block of a model. Raises ``ModelError`` if there are not two."""
    blocks = [(block.name, block.module) for block in find_blocks(model)]
    if len(blocks) < 2:
        raise ModelError(f"{type(model).__name__} has no list of blocks to stream one after the other")
    return blocks


def offload_plan(model: nn.Module) -> OffloadPlan:
    """Return where the weights of an offloaded model are. Raises ``ModelError`` for a model that is not offloaded."""
    state = find_state(model)
    if state is None:
        raise ModelError(f"this {type(model).__name__} is not offloaded: call hf_optim.offload(model) first")
    return state.plan


@torch.no_grad()
def restore_weights(model: nn.Module) -> bool:
    """Bring the weights of an offloaded model back to its device; return False for a model that is not offloaded."""
    state = find_state(model)
    if state is None:
        return False
    inner = next(m for m in model.modules() if m.__dict__.get(STATE) is state)
    for block in streamed_blocks(model):
        own: BlockState = block.__dict__[STATE]
        stored = own.streamer.stored[own.index]
        if name := own.written():
            warnings.warn(
                f"{name} was written to while it was offloaded, and has its former values again", stacklevel=2
            )
        own.to_store()  # a parameter that was put in the place of another one stays, with the former values
        for unit in stored.units:
            memory = bytes_of(unit).to(own.streamer.link.device, copy=True)
            point_at([replace(unit, begin=0)], memory)
        _renew(block)
        del block.__dict__[STATE]
        block.__class__ = own.former
    if state.streamer is not None:
        state.streamer.forget()
    del inner.__dict__[STATE]
    inner.__class__ = state.former
    for name, parameter in inner.named_parameters():
        if name in state.trained:
            parameter.requires_grad_(True)
    return True


def require_offloadable(model: nn.Module, meta: bool = False) -> PreTrainedModel:
    """Return the transformers model in ``model``; raise ``ModelError`` if it cannot be offloaded.

    ``meta``: its weights have no values yet.
    """
    inner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    if inner is None:
        raise ModelError(f"{type(model).__name__} is not a transformers model (PreTrainedModel)")
    kind = type(inner).__name__
    if find_state(model) is not None:
        raise ModelError(f"this {kind} is offloaded already: call hf_optim.restore(model) to offload it otherwise")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ModelError(
            f"hooks of accelerate move the weights of this {kind} (device_map, cpu_offload): load it without a "
            "device_map, or call accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
        )
    if any("_orig_mod" in m._modules or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        raise ModelError(f"this {kind} is compiled: offload it first, then compile it")
    if model.training and not meta:
        raise ModelError(f"this {kind} is in training mode, and offloaded weights cannot be trained: call model.eval()")
    tensors = [*inner.named_parameters(), *inner.named_buffers()]
    odd = next((n for n, t in inner.named_parameters() if type(t) is not nn.Parameter), None)
    if odd is not None:
        found = type(inner.get_parameter(odd)).__name__
        raise ModelError(f"{odd} is a {found}, which another library manages: offload an ordinary or packed model")
    if not meta and (empty := next((name for name, tensor in tensors if tensor.is_meta), None)):
        raise ModelError(f"{empty} is on the meta device and has no values: load the weights first")
    devices = {str(parameter.device) for _, parameter in inner.named_parameters()}
    if len(devices) != 1 and not meta:
        raise ModelError(
            f"the weights of this {kind} are on {', '.join(sorted(devices))}: offload a model on one device"
        )
    return inner


def split(model: PreTrainedModel, blocks: Iterable[tuple[str, nn.Module]]) -> tuple[list[tuple[list[Unit], int]], int]:
    """Return units and bytes of each block, and the bytes of everything else: shared tensors, adapters, embeddings."""
    owner: dict[int, int] = {}
    for index, (_, block) in enumerate(blocks):
        for module in block.modules():
            owner.setdefault(id(module), index)
    for module in _adapters(model):
        owner.pop(id(module), None)
    count = 1 + max(owner.values())
    own: list[list[list[Found]]] = [[] for _ in range(count)]
    outside = 0
    for group in ranges(tensors_of(model)):
        holders = {owner.get(id(each.module)) for each in group}
        holder = next(iter(holders))
        if len(holders) == 1 and holder is not None:
            own[holder].append(group)
        else:
            outside += max(each.tensor.numel() * each.tensor.element_size() for each in group)
    return [lay_out(_in_order(groups)) for groups in own], outside


def _in_order(groups: list[list[Found]]) -> list[list[Found]]:
    return sorted(groups, key=lambda group: group[0].name)


def _adapters(model: nn.Module) -> list[nn.Module]:
    """Return the modules of peft's adapters: the parts that a layer with an adapter names as such."""
    found: list[nn.Module] = []
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()) or ():
            part = module._modules.get(str(name).partition(".")[0])
            found += part.modules() if part is not None else ()
    return found


class _Rates:
    """What was measured of a link, and how far ahead it has to be read."""

    def __init__(self, link: Link, to: str, block: int, outside: int) -> None:
        rate, memory = measure_link(link)
        self.link = None if link.host_is_device else rate
        link_rate = DISK_RATE if to == "disk" else rate
        self.ahead = blocks_ahead(outside, block, memory, link_rate, waits=to == "disk")


def _reader(link: Link | None, threads: int) -> Reader:
    """Return a reader into the memory of a device, or without a link into host memory."""
    link = link or CpuLink()
    return Reader(link.host, link.copy, link.finish, threads)


@torch.no_grad()
def _store(plan: OffloadPlan, blocks: Sequence[Stored], link: Link, folder: str | Path | None) -> None:
    """Bring the streamed blocks of a model in memory to where they are kept, one after the other."""
    writer: Spiller | None = None
    # The model's own memory is free before that of the next block is taken: until then, blocks share this.
    nothing = torch.empty(max(blocks[index].size for index in plan.streamed) if plan.streamed else 0, dtype=torch.uint8)
    for index in plan.streamed:
        stored = blocks[index]
        memory = link.host(stored.size)
        for unit in stored.units:
            memory[unit.begin : unit.end].copy_(bytes_of(unit))
        if plan.places[index] == HOST:
            stored.memory = memory
        else:
            writer = writer or Spiller(folder)
            writer.add(stored, memory)
        point_at(stored.units, nothing)
    if writer is not None:
        writer.finish()


class Spiller:
    """Writes blocks to a spill file; what is kept of them is where they are there."""

    def __init__(self, folder: str | Path | None) -> None:
        self.file = SpillFile(folder)
        self.begins: list[tuple[Stored, int]] = []

    def add(self, stored: Stored, memory: Tensor) -> None:
        """Write the buffer of a block."""
        self.begins.append((stored, self.file.append(memory)))

    def finish(self) -> None:
        """Give the blocks their pieces."""
        file = self.file.finished()
        for stored, begin in self.begins:
            stored.pieces = [Piece(file, begin + u.begin, u.size, u.begin, u.name) for u in stored.units]


@torch.no_grad()
def _bring(plan: OffloadPlan, blocks: Sequence[Stored], link: Link, reader: Reader) -> None:
    """Bring blocks that are stored already to where the plan has them."""
    for index, stored in enumerate(blocks):
        place = plan.places[index]
        if place == HOST and stored.memory is None:
            memory = link.host(stored.size)
            for part in _reader(None, reader.threads).read(stored.pieces, memory):
                part.result()
            stored.memory, stored.pieces = memory, []
        elif place == DEVICE:
            memory = link.slot(stored.size)
            if stored.memory is not None:
                link.finish(link.copy(memory, stored.memory, None))
            else:
                for part in reader.read(stored.pieces, memory):
                    link.finish(part.result())
            point_at(stored.units, memory)
            stored.memory, stored.pieces = None, []


def _renew(block: nn.Module) -> None:
    """Have packed layers forget the addresses that their weights had."""
    for module in block.modules():
        renew = getattr(module, "renew", None)
        if callable(renew):
            renew()


def _swap_model(inner: PreTrainedModel, plan: OffloadPlan, streamer: Streamer | None) -> None:
    adapters = {id(parameter) for module in _adapters(inner) for parameter in module.parameters()}
    trained = {n for n, p in inner.named_parameters() if p.requires_grad and id(p) not in adapters}
    for name, parameter in inner.named_parameters():
        if name in trained:
            parameter.requires_grad_(False)
    inner.__dict__[STATE] = ModelState(plan, streamer, type(inner), trained)
    inner.__class__ = model_class(type(inner))  # type: ignore[assignment, arg-type]


def _measured(plan: OffloadPlan, streamer: Streamer) -> OffloadPlan:
    """Return the plan with the measured rate of the disk: that of the first blocks, which are read here."""
    if DISK not in plan.places:
        return plan
    on_disk = next(n for n, index in enumerate(plan.streamed) if plan.places[index] == DISK)
    started, size = time.perf_counter(), streamer.stored[on_disk].size
    assert streamer.reader is not None
    for part in streamer.reader.read(streamer.stored[on_disk].pieces, streamer.memory_of(on_disk)):
        streamer.link.finish(part.result())
    return replace(plan, disk=size / (time.perf_counter() - started))
