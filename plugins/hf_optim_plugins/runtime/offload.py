"""Weights in pinned host memory or on disk, fetched while the model computes: a model larger than its device.

    device = outside + resident + (ahead + 1) * block        bytes, constant while the model runs
    time of a pass >= max(streamed / link, on disk / disk)   streamed: the bytes of all blocks that are not resident

A pass over the model moves every streamed block once into a ring of buffers, so a decoding step takes what the link
takes for these bytes, whatever the order; resident blocks lie evenly between them and compute meanwhile. Packed weights
move packed: with 4-bit codes a quarter of the bytes.

There is no paper of this alone. The known forms are accelerate's hooks, which copy a layer when it is called, and
transformers' offloaded caches, which copy one layer ahead. What differs here is in docs/offload.md.

A step changes no weight and no file: a checkpoint saved from an offloaded model is an ordinary one, which is not
offloaded when it is loaded without this step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_optim import (
    Card,
    Contract,
    ModelError,
    RecipeError,
    Reload,
    Run,
    Technique,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.toolkit import topology
from hf_optim.toolkit.offloading import ALIGNMENT, parse_size


@technique(
    "offload",
    family="runtime",
    contract=Contract(keeps={traits.SPARSE, traits.SPARSE_NM}, owns={"place of the weights"}),
    reload=Reload.STOCK_DENSE,
)
class Offload(Technique):
    """Keep the blocks of a model in host memory or on disk, and fetch them while it runs.

    Attributes:
        to: ``cpu`` for pinned host memory (of a model on an accelerator), or ``disk``.
        device_memory: bytes of weights on the device, such as ``4GiB``; as many blocks as fit stay there. Null is as
            few as can be.
        host_memory: the most bytes of weights in host memory; with ``disk``, as many blocks as fit are kept there. For
            a model on a CPU, of all weights.
        ahead: blocks that are fetched while one computes; null for as many as the measured link needs.
        folder: for ``disk``, where weights are written that cannot be read from the checkpoint as they are.
        threads: that read from disk.
    """

    to: str = option("cpu", choices=("cpu", "disk"))
    device_memory: int | str | None = None
    host_memory: int | str | None = None
    ahead: int | None = option(None, low=1, high=64)
    folder: str | None = None
    threads: int = option(4, low=1, high=64)

    @classmethod
    def for_testing(cls) -> Offload:
        return cls(to="disk", ahead=None, threads=2)

    def validate(self) -> None:
        parse_size(self.device_memory, "offload: device_memory")
        parse_size(self.host_memory, "offload: host_memory")
        if self.folder is not None and self.to != "disk":
            raise RecipeError("offload: folder is for to: disk; with to: cpu nothing is written")

    def offloading(self) -> Mapping[str, Any]:
        fields = ("to", "device_memory", "host_memory", "ahead", "folder", "threads")
        return {name: getattr(self, name) for name in fields}

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        if len(topology.blocks(model)) < 2:
            raise ModelError(f"{label}: {type(model).__name__} has no list of blocks to stream one after the other")

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        self.check_model(run.model, run.label(self))

    def recompute(self, case: Any) -> dict[str, Any]:
        return figures_of(case.before)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        if not metrics:
            return
        blocks, sizes = metrics["blocks"], metrics["bytes"]
        card.paragraph(
            "Offloading",
            f"The model was offloaded when it was saved: {blocks['device']} of its blocks were on the device, "
            f"{blocks['host']} in host memory and {blocks['disk']} on disk. A pass over the model moved "
            f"{sizes['moved_by_each_pass']} bytes, and takes at least as long as the link takes for them. This changes "
            "no weight, and the checkpoint is an ordinary one: where it is loaded, it is not offloaded. Memory and "
            "times in the results, where there are any, are those of the whole model on its device.",
        )


def figures_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return what is reported of a model on a CPU, all of whose blocks are on disk."""
    blocks = [block.module for block in topology.blocks(model)]
    sizes = [_buffer(list(block.parameters())) for block in blocks]
    outside = sum(p.numel() * p.element_size() for p in model.parameters())
    outside -= sum(p.numel() * p.element_size() for block in blocks for p in block.parameters())
    return {
        "blocks": {"device": 0, "host": 0, "disk": len(blocks)},
        "bytes": {
            "blocks_on_device": 0,
            "blocks_in_host_memory": 0,
            "blocks_on_disk": sum(sizes),
            "outside_blocks": outside,
            "moved_by_each_pass": sum(sizes),
        },
    }


def _buffer(tensors: list[Any]) -> int:
    """Return the bytes of the buffer of a block."""
    return sum(-(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT for tensor in tensors)


@hookimpl
def register_techniques(register) -> None:
    register(Offload)
