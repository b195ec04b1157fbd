"""Ranks must run the same: versions, recipe, configuration and checkpoint, compared before any weight is read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...errors import RankError
from . import collectives
from .liveness import guarded

FACTS = ("versions", "recipe", "configuration", "checkpoint", "number of ranks", "device type")
"""What is compared, in this order in every version: a rank of another version must be able to tell."""
PACKAGES = ("hf-optim", "torch", "transformers", "compressed-tensors", "safetensors", "triton")
HEAD_BYTES = 1 << 16


def versions() -> str:
    """Return the versions of what computes, as text."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} none")
    return ", ".join(found)


def fingerprint_of_files(files: Iterable[Path]) -> str:
    """Return names, sizes and the first 64 KiB (the header, or most of it) of files, hashed. Not all of the weights."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(HEAD_BYTES))
    return digest.hexdigest()


def as_text(value: Any) -> str:
    """Return a configuration or a recipe as text that is equal for equal ones."""
    return json.dumps(value, sort_keys=True, default=str)


def require_agreement(facts: Mapping[str, str]) -> None:
    """Raise ``RankError`` on every rank unless all ranks have the same ``facts`` (texts, by a name of ``FACTS``)."""
    if collectives.world_size() == 1:
        return
    hashes = [hashlib.sha256(facts.get(name, "").encode()).digest() for name in FACTS]
    device = "cuda" if str(dist.get_backend()) == "nccl" else "cpu"
    mine = torch.tensor([list(each) for each in hashes], dtype=torch.uint8, device=device)
    all_of_them = [torch.empty_like(mine) for _ in range(collectives.world_size())]
    guarded(dist.all_gather, all_of_them, mine)
    table = torch.stack(all_of_them).cpu()
    for number, name in enumerate(FACTS):
        apart = [rank for rank in range(len(table)) if not torch.equal(table[rank, number], table[0, number])]
        if apart:
            own = facts.get(name, "")
            shown = f" (here, on rank {collectives.rank()}: {own[:200]})" if own else ""
            raise RankError(
                f"rank {', '.join(map(str, apart))} and rank 0 have different {name}{shown}: start all ranks with the "
                "same environment, the same arguments and the same files"
            )
