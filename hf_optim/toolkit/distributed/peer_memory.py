"""Sums of small tensors over the GPUs of one host in one launch, through memory that they map from each other.

A step of generation sums a few KiB after every second matrix. NCCL takes about 40 us for it, however few the bytes
are: its kernel hands them over in turns. Here each rank writes its tensor into a buffer that all others have mapped
(PyTorch's symmetric memory), waits until all have written, and reads the buffers of all ("one-shot"). Each rank adds in
the order of the ranks, so all have the same bits. NVLink multicast is not used.

The buffer is allocated at the first exchange of a device, by all ranks together, and never while a graph is captured.
Where any rank cannot map it (GPUs without access to each other, several hosts, another backend), all ranks use the
process group as before. A process has one buffer for each device: exchanges are those of one stream at a time.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from . import collectives

logger = logging.getLogger(__name__)

LIMIT = 1 << 20
"""Bytes of the largest tensor: each rank reads those of all ranks, so a ring is faster for large ones."""
MOST_RANKS = 8
ALIGNED = 16
DTYPES = (torch.bfloat16, torch.float32)
_prepared: dict[torch.device, tuple[Any, PeerMemory | None]] = {}  # with the process group that it was prepared for


@dataclass(frozen=True)
class PeerMemory:
    """A buffer that all ranks have mapped.

    Attributes:
        buffer: uint8 ``[LIMIT]``.
        group: the name of the process group.
    """

    buffer: Tensor
    group: str

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a contiguous tensor over the ranks, as a new tensor."""
        if tensor.data_ptr() % ALIGNED:  # of a slice, and perhaps on this rank alone
            tensor = tensor.clone()
        held = self.buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(held, tensor, "sum", self.group)


def fits(tensor: Tensor) -> bool:
    """Return True if a sum in one launch takes a tensor: the same on all ranks, whose tensors are alike."""
    return tensor.is_cuda and tensor.dtype in DTYPES and 0 < tensor.nbytes <= LIMIT and tensor.nbytes % ALIGNED == 0


def peer_memory(device: torch.device) -> PeerMemory | None:
    """Return the buffer of a device, or None where there is none. The first call is one of all ranks together."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return None
    world = dist.group.WORLD
    held = _prepared.get(device)
    if held is None or held[0] is not world:
        if torch.cuda.is_current_stream_capturing():
            return None
        held = _prepared[device] = (world, _prepare(device))
    return held[1]


def _prepare(device: torch.device) -> PeerMemory | None:
    """Allocate and map a buffer. Each step is taken by all ranks or by none, so none waits for one that has failed."""
    from torch.distributed import _symmetric_memory as symmetric  # not in every build of PyTorch

    reason, world = _obstacle(), cast("dist.ProcessGroup", dist.group.WORLD)
    buffer = torch.empty(0)
    if collectives.is_true_on_all_ranks(not reason):
        try:
            buffer = symmetric.empty(LIMIT, dtype=torch.uint8, device=device)
        except Exception as error:  # what PyTorch raises where the driver allows no shared handles is not documented
            reason = f"{type(error).__name__}: {error}"
        if collectives.is_true_on_all_ranks(not reason):
            try:
                symmetric.rendezvous(buffer, world.group_name)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            if collectives.is_true_on_all_ranks(not reason):
                return PeerMemory(buffer, world.group_name)
    logger.info("small sums over ranks use the process group: %s", reason or "another rank cannot map memory")
    return None


def _obstacle() -> str:
    """Return why this rank can map no memory of others; an empty string if it may be able to. Called by all ranks."""
    ranks = collectives.world_size()
    hosts: list[str | None] = [None] * ranks
    dist.all_gather_object(hosts, socket.gethostname())
    if len(set(hosts)) > 1:
        return "the ranks are on several hosts"
    if not 1 < ranks <= MOST_RANKS:
        return f"{ranks} ranks (2 to {MOST_RANKS})"
    if "nccl" not in str(dist.get_backend_config()):
        return "the backend of the process group is not NCCL"
    return ""
