"""Several processes calibrate one model together: ``torchrun --nproc-per-node 2 -m hf_optim.cli compress ...``.

Every rank has the model (one block of it at a time on its accelerator) and a share of the calibration data; statistics
are reduced over the ranks (``toolkit.sharing``), so that each computes the same weights, which are those of one rank to
the order of its sums. Rank 0 alone writes, logs and shows progress. A rank that fails ends with its message and a
status that is not 0, upon which ``torchrun`` (or ``accelerate launch``) ends the others.
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
from ..toolkit.distributed import collectives

_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Set by the launchers for their workers; a process that a worker starts is none of them.
_LAUNCHED = (*_NEEDED, "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
# Ranks whose weights differ by more than this share have not reduced what they calibrated on.
TOLERANCE = 1e-3


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Be one of the ranks that the environment speaks of, if it does; leave them at the end.

    gloo carries what is on a CPU, nccl what is on CUDA. A process group that exists already is used, and kept.
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
    """Whether this rank writes and speaks; True where there is only one."""
    return collectives.rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if collectives.world_size() > 1:
        collectives.sum_over_ranks(1)


def own_environment() -> dict[str, str]:
    """The environment for a process that this rank starts, and that is no rank itself."""
    return {key: value for key, value in os.environ.items() if key not in _LAUNCHED}


def refuse_distributed(recipe: Any) -> None:
    """Raise ``RecipeError`` for a recipe that several ranks cannot do together."""
    if collectives.world_size() == 1:
        return
    if recipe.driver == "streamed":
        raise RecipeError("driver streamed works with one rank: leave torchrun out, or leave the driver out")
    for stage in recipe.stages:
        if stage.trains:
            raise RecipeError(f"{stage} trains: compress a recipe with training stages with one rank")
        for step in stage.steps:
            if step.needs_teacher():
                raise RecipeError(
                    f"step {step.name} learns from batches one by one, which several ranks do not share: use one rank"
                )


def share_of(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """This rank's part of the calibration batches: disjoint, together all of them.

    Whole batches, every ``ranks``-th, where that is even; else rows, every ``ranks``-th of them all.
    """
    count, own = collectives.world_size(), collectives.rank()
    if len(batches) % count == 0 and len({len(next(iter(batch.values()))) for batch in batches}) == 1:
        return list(batches[own::count])
    shares, before = [], 0
    for batch in batches:
        rows = len(next(iter(batch.values())))
        first = (own - before) % count
        before += rows
        if first < rows:
            shares.append({key: value[first::count] for key, value in batch.items()})
    if before < count:
        raise DataError(f"{before} rows of calibration data are too few for {count} ranks")
    return shares


@torch.no_grad()
def require_equal_weights(model: nn.Module) -> None:
    """Raise ``NumericalError`` unless all ranks have the same weights, to rounding.

    A step that uses calibration data in a way of its own would leave each rank with weights of its own.
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
            f"the ranks disagree about {len(apart)} weights, {names[apart[0]]} the first: a step of this recipe does "
            "not reduce what it calibrates on; use one rank"
        )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No output but errors, no progress bars."""
    from tqdm.std import tqdm
    from transformers.utils import logging as transformers_logging

    plain: Any = tqdm.__init__

    def without_bar(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **{**kwargs, "disable": True})

    logger = logging.getLogger("hf_optim")
    level = logger.level
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    tqdm.__init__ = without_bar  # type: ignore[method-assign]
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        tqdm.__init__ = plain  # type: ignore[method-assign]
        transformers_logging.enable_progress_bar()
        logger.setLevel(level)
