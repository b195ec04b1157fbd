"""Which block stays on the device, which in host memory and which on disk, and what a pass over the model then moves.

    device = outside + resident + ring,    ring = (ahead + 1) * largest streamed block
    host   = outside on the host + streamed blocks in pinned memory + buffers of the readers
    time of a pass >= max((host blocks + disk blocks) / link, disk blocks / disk)

Every pass reads every block once, so which blocks stay does not change the bytes; that they lie evenly between streamed
ones does: the link works while they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import ModelError
from .sizes import show_size

DEVICE, HOST, DISK = "device", "host", "disk"


@dataclass(frozen=True)
class OffloadPlan:
    """Where the weights of a model are, in bytes.

    Attributes:
        places: of each block, in the order in which they run: ``device``, ``host`` or ``disk``.
        sizes: bytes of each block.
        outside: bytes of the weights outside the blocks that are on the device.
        outside_host: bytes of those that are in host memory (an embedding, of which a pass reads a few rows).
        ahead: how many streamed blocks are fetched while one computes.
        ring: bytes of the ``ahead + 1`` device buffers.
        readers: bytes of host memory that reading from disk takes.
        link: bytes a second from host memory to the device, measured; None where the device is the host.
        disk: bytes a second from disk, measured; None if no block is there.
    """

    places: tuple[str, ...]
    sizes: tuple[int, ...]
    outside: int
    outside_host: int
    ahead: int
    ring: int
    readers: int
    link: float | None = None
    disk: float | None = None

    def bytes_at(self, place: str) -> int:
        """Return the bytes of the blocks at a place."""
        return sum(size for size, at in zip(self.sizes, self.places, strict=True) if at == place)

    @property
    def device_bytes(self) -> int:
        """The bytes of weights that the device holds, the ring included: constant while the model runs."""
        return self.outside + self.bytes_at(DEVICE) + self.ring

    @property
    def host_bytes(self) -> int:
        """The bytes of host memory, if the device is not the host."""
        return self.outside_host + self.bytes_at(HOST) + self.readers

    @property
    def streamed(self) -> tuple[int, ...]:
        """The positions of the blocks that are not on the device."""
        return tuple(index for index, place in enumerate(self.places) if place != DEVICE)

    @property
    def streamed_bytes(self) -> int:
        """The bytes that a pass over the model moves to the device."""
        return self.bytes_at(HOST) + self.bytes_at(DISK)

    @property
    def seconds(self) -> float | None:
        """The least time of a pass, from the measured links; None before they were measured."""
        times = [0.0]
        if self.link:
            times.append(self.streamed_bytes / self.link)
        if self.disk:
            times.append(self.bytes_at(DISK) / self.disk)
        measured = self.link is not None or self.disk is not None
        return max(times) if measured else None

    def figures(self) -> dict[str, Any]:
        """Return what a record holds: counts and bytes. What follows from a measured link differs between machines."""
        return {
            "blocks": {place: self.places.count(place) for place in (DEVICE, HOST, DISK)},
            "bytes": {
                "blocks_on_device": self.bytes_at(DEVICE),
                "blocks_in_host_memory": self.bytes_at(HOST),
                "blocks_on_disk": self.bytes_at(DISK),
                "outside_blocks": self.outside + self.outside_host,
                "moved_by_each_pass": self.streamed_bytes,
            },
        }

    def __str__(self) -> str:
        time = f", {1000 * self.seconds:.1f} ms by the measured link" if self.seconds else ""
        on_device, in_host, on_disk = (self.places.count(place) for place in (DEVICE, HOST, DISK))
        ring = self.ahead + 1 if self.ring else 0
        return (
            f"{on_device} of {len(self.places)} blocks on the device ({show_size(self.device_bytes)} with the rest of "
            f"the model and a ring of {ring}), {in_host} in host memory, {on_disk} on disk; a pass moves "
            f"{show_size(self.streamed_bytes)}{time}"
        )


def make_plan(
    sizes: Sequence[int],
    outside: int,
    outside_host: int,
    *,
    to: str,
    ahead: int,
    device_budget: int | None,
    host_budget: int | None,
    readers: int,
    host_is_device: bool,
) -> OffloadPlan:
    """Return the plan for blocks of these sizes. Raises ``ModelError`` if a budget is too small, with the least one.

    Without a budget for the device, no block stays there; without one for the host, all streamed blocks are in host
    memory (``to="cpu"``) or on disk (``to="disk"``).
    """
    if host_is_device:
        limits = [limit for limit in (device_budget, host_budget) if limit is not None]
        device_budget, host_budget = min(limits, default=None), None
    taken = readers if host_is_device and to == DISK else 0
    resident = _evenly(sizes, _room(sizes, outside + taken, ahead, device_budget))
    streamed = [index for index in range(len(sizes)) if index not in resident]
    fits = len(streamed) <= 1
    depth = 0 if fits else min(ahead, len(streamed) - 1)
    ring = 0 if not streamed else (depth + 1) * max(sizes[index] for index in streamed)
    plan = OffloadPlan(
        tuple(DEVICE if index in resident else HOST for index in range(len(sizes))),
        tuple(sizes), outside, outside_host, depth, ring, taken,
    )  # fmt: skip
    if device_budget is not None and plan.device_bytes + taken > device_budget:
        where = "host_memory" if host_is_device else "device_memory"
        raise ModelError(
            f"{where}={show_size(device_budget)} is too little: {show_size(outside)} are outside the blocks, and "
            f"{depth + 1} buffers of one block take {show_size(ring)}"
            + (f", the readers {show_size(taken)}" if taken else "")
            + f"; the least is {show_size(plan.device_bytes + taken)} ({plan.device_bytes + taken} bytes)"
        )
    if to == DISK:
        return _with_disk(plan, host_budget, readers, host_is_device)
    if host_budget is not None and plan.host_bytes > host_budget:
        raise ModelError(
            f"host_memory={show_size(host_budget)} is less than the {show_size(plan.host_bytes)} of the weights that "
            "are not on the device: offload to disk (to='disk'), or raise device_memory"
        )
    return plan


def _with_disk(plan: OffloadPlan, host_budget: int | None, readers: int, host_is_device: bool) -> OffloadPlan:
    """Move streamed blocks to disk, except for as many as a host budget holds, evenly among them."""
    streamed, kept = plan.streamed, set()  # type: ignore[var-annotated]
    if not host_is_device and host_budget is not None:
        room = host_budget - plan.outside_host - readers
        if room < 0:
            raise ModelError(
                f"host_memory={show_size(host_budget)} is too little: the readers take {show_size(readers)}, and "
                f"weights outside the blocks {show_size(plan.outside_host)}"
            )
        sizes = [plan.sizes[index] for index in streamed]
        kept = {streamed[index] for index in _evenly(sizes, room)}
    places = [DISK if at == HOST and index not in kept else at for index, at in enumerate(plan.places)]
    return replace(plan, places=tuple(places), readers=readers if DISK in places else 0)


def _room(sizes: Sequence[int], outside: int, ahead: int, budget: int | None) -> int:
    """Return the bytes for resident blocks beside a ring; if all blocks fit without one, their bytes."""
    if budget is None:
        return 0
    if outside + sum(sizes) <= budget:
        return sum(sizes)
    return max(0, budget - outside - (min(ahead, len(sizes) - 1) + 1) * max(sizes))


def _evenly(sizes: Sequence[int], room: int) -> set[int]:
    """Return positions, spread evenly, whose sizes fit into ``room``: as many as there can be of equal sizes."""
    count = len(sizes)
    for wanted in range(count, 0, -1):
        found = {min(count - 1, (2 * n + 1) * count // (2 * wanted)) for n in range(wanted)}
        if len(found) == wanted and sum(sizes[index] for index in found) <= room:
            return found
    return set()
