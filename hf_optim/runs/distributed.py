"""Calibrate one model on several ranks: ``torchrun --nproc-per-node 2 -m hf_optim.cli compress ...``.

Every rank has the model (one block at a time on its accelerator) and a share of the calibration data. Statistics are
reduced over the ranks (``toolkit.distributed``), so all ranks compute the same weights, equal to those of a single rank
up to the order of summation (which a recursion over a badly conditioned Hessian turns into other codes). What all of
them could compute alike, they may divide (``toolkit.distributed.divided``). Only rank 0
writes, logs and shows progress. A rank that fails prints its message and exits with a nonzero status, and ``torchrun``
(or ``accelerate launch``) then ends the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import DataError, NumericalError, RecipeError
from ..recipes.contract import OnRanks
from ..toolkit.distributed import collectives
from ..toolkit.statistics import batch_size, can_split, take_rows
from .progress import silenced

_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Set by the launchers for their workers, and removed for the processes that a worker starts.
_LAUNCHED = (*_NEEDED, "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
# Ranks whose weights differ by more than this share have not reduced their statistics.
TOLERANCE = 1e-3


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the process group that the environment describes, if any, and leave it at the end.

    Uses gloo for CPU tensors and nccl for CUDA tensors. An existing process group is used, and kept.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or collectives.world_size() > 1:
        yield
        return
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise RecipeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start the ranks with "
            "torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        with contextlib.nullcontext() if is_main() else _silent():
            yield
    finally:
        dist.destroy_process_group()


def is_main() -> bool:
    """Return True on the rank that writes and logs; always True with a single rank."""
    return collectives.rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if collectives.world_size() > 1:
        collectives.sum_over_ranks(1)


def own_environment() -> dict[str, str]:
    """Return the environment for a child process of this rank, without the launcher's variables."""
    return {key: value for key, value in os.environ.items() if key not in _LAUNCHED}


def refuse_distributed(recipe: Any) -> None:
    """Raise ``RecipeError`` for a recipe that cannot run on several ranks."""
    if collectives.world_size() == 1:
        return
    if recipe.driver == "streamed":
        raise RecipeError("driver streamed works with one rank: leave torchrun out, or leave the driver out")
    for stage in recipe.stages:
        if stage.trains:
            raise RecipeError(f"{stage.label} trains: compress a recipe with training stages with one rank")
        for step in stage.steps:
            if step.needs_teacher() or step.spec.parallel.calibration is OnRanks.NO:
                raise RecipeError(
                    f"step {step.name} learns from batches one by one, which ranks cannot share: use one rank"
                )


def share_of(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return this rank's part of the calibration batches: disjoint parts that together are all of them.

    Every ``n``-th batch if that divides evenly over the ``n`` ranks or rows cannot be taken from a batch, else every
    ``n``-th row.
    """
    count, own = collectives.world_size(), collectives.rank()
    sizes = [batch_size(batch) for batch in batches]
    if (len(batches) % count == 0 and len(set(sizes)) == 1) or not all(map(can_split, batches)):
        if len(batches) < count:
            raise DataError(f"{len(batches)} batches of calibration data are too few for {count} ranks")
        return list(batches[own::count])
    shares, before = [], 0
    for batch, rows in zip(batches, sizes, strict=True):
        first = (own - before) % count
        before += rows
        if first < rows:
            shares.append(take_rows(batch, slice(first, None, count)))
    if before < count:
        raise DataError(f"{before} rows of calibration data are too few for {count} ranks")
    return shares


@torch.no_grad()
def require_equal_weights(model: nn.Module) -> None:
    """Raise ``NumericalError`` unless all ranks have the same weights up to rounding.

    They differ if a step uses calibration data without reducing its statistics over the ranks.
    """
    if collectives.world_size() == 1:
        return
    names, sums = [], []
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            names.append(name)
            sums.append(parameter.double().abs().sum().cpu())
    mine = torch.stack(sums)
    low, high = collectives.all_reduce_(mine.clone(), "min"), collectives.all_reduce_(mine.clone(), "max")
    apart = ((high - low) > TOLERANCE * high).nonzero().flatten().tolist()
    if apart:
        raise NumericalError(
            f"the ranks disagree about {len(apart)} weights (first {names[apart[0]]}): a step of this recipe does not "
            "reduce its statistics over the ranks; use one rank"
        )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress all output but errors, and progress bars."""
    logger = logging.getLogger("hf_optim")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            silenced(everywhere=True),
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            yield
    finally:
        logger.setLevel(level)
