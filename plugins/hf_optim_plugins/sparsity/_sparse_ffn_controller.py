"""Blocks and controller of a feed-forward layer that was dense: which units lie together, and which are picked."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_optim import NumericalError

CHUNK = 1024  # tokens whose units exist at a time
COMPARED = 2048  # tokens by which units are put into blocks
RATE, BATCH, HELD_OUT = 3e-3, 256, 10  # Adam; a tenth of the tokens chooses the epoch
RIDGE = 1e-2  # of the mean variance of the inputs


class Units(NamedTuple):
    """The units of a dense layer, row by row.

    Attributes:
        up, gate: weight ``[units, in]`` and bias ``[units]`` or None; the gate is None without one.
        down: ``[units, out]``.
    """

    up: tuple[Tensor, Tensor | None]
    gate: tuple[Tensor, Tensor | None] | None
    down: Tensor


class Controller(NamedTuple):
    """C1 ``[rank, in]``, C2 ``[units, rank]`` and c ``[units]``, float32."""

    first: Tensor
    second: Tensor
    bias: Tensor


@torch.no_grad()
def contributions(x: Tensor, units: Units, act: Any) -> Tensor:
    """Return what each unit adds to the output, as a length: ``|a| |W2 row|``, float32 ``[T, units]``."""
    length = units.down.float().norm(dim=1)
    parts = []
    for rows in x.split(CHUNK):
        inner = F.linear(rows, *units.up)
        inner = act(inner) if units.gate is None else act(F.linear(rows, *units.gate)) * inner
        parts.append(inner.float().abs() * length)
    return torch.cat(parts)


@torch.no_grad()
def exclusive_order(mass: Tensor, block: int) -> Tensor:
    """Return an order int64 ``[units]`` in which units of one block are seldom needed together.

    Only the largest contribution of a block is kept, so the order should make the sum of these large. Units are given
    to blocks in rounds, the largest first, one for each block: each unit goes to the block whose largest contribution
    it raises most, over all tokens. A block without units is raised by all of it, so that the first round spreads
    the largest units.

    Args:
        mass: ``[T, units]``.
        block: units of a block.
    """
    mass = mass[:: max(1, len(mass) // COMPARED)][:COMPARED]
    blocks = mass.shape[1] // block
    ranked = mass.sum(0).argsort(descending=True, stable=True).view(block, blocks)
    held = torch.empty(blocks, block, dtype=torch.long, device=mass.device)
    held[:, 0] = ranked[0]
    largest = mass[:, ranked[0]].clone()  # [T, blocks]
    for turn in range(1, block):
        free = torch.ones(blocks, dtype=torch.bool, device=mass.device)
        for unit in ranked[turn].tolist():
            gain = (mass[:, unit, None] - largest).clamp_min(0).sum(0)
            best = int(torch.where(free, gain, -1.0).argmax())
            held[best, turn] = unit
            free[best] = False
            # Blocks that are full for this round are not looked at again, so theirs may change now.
            largest[:, best] = torch.maximum(largest[:, best], mass[:, unit])
    return held.reshape(-1)


def kept_share(mass: Tensor, choice: Tensor) -> float:
    """Return the share of ``mass`` ``[T, blocks, N]`` in the units ``choice`` int64 ``[T, blocks]``; 1 without mass."""
    total = float(mass.double().sum())
    return float(mass.gather(-1, choice.unsqueeze(-1)).double().sum()) / total if total > 0 else 1.0


def choices(x: Tensor, controller: Controller, block: int) -> Tensor:
    """Return the chosen units int64 ``[T, blocks]``."""
    first, second, bias = controller
    return F.linear(F.linear(x, first), second, bias).view(len(x), -1, block).argmax(-1)


@torch.no_grad()
def regressed(x: Tensor, mass: Tensor, rank: int, biased: bool, seed: int) -> Controller:
    """Return the controller that predicts ``mass`` ``[T, units]`` best in the sense of least squares, of this rank.

    Regression on ``x`` with a ridge, then its largest singular directions, weighted by the variance of the inputs.
    """
    mean = x.mean(0) if biased else x.new_zeros(x.shape[1])
    level = mass.mean(0)
    rows, wanted = x - mean, mass - level
    gram = rows.T @ rows / len(x)
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) + 1e-12)
    root = torch.linalg.cholesky(gram)
    weight = torch.cholesky_solve(rows.T @ wanted / len(x), root)  # [in, units]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(root.T @ weight, q=rank, niter=4)
    first = torch.linalg.solve_triangular(root.T, left, upper=True).T  # [rank, in]
    second = right * values
    first, second = _padded(first, rank, 0), _padded(second, rank, 1)
    logits = F.linear(F.linear(x, first), second)
    scale = 1 / logits.std().clamp_min(1e-12)
    bias = (level - F.linear(F.linear(mean, first), second)) * scale if biased else torch.zeros_like(level)
    return Controller(first, second * scale, bias)


def _padded(matrix: Tensor, size: int, dim: int) -> Tensor:
    missing = size - matrix.shape[dim]
    shape = list(matrix.shape)
    shape[dim] = missing
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=dim) if missing > 0 else matrix


def train_controller(
    x: Tensor, mass: Tensor, block: int, rank: int, biased: bool, epochs: int, seed: int, label: str
) -> Controller:
    """Return a controller that picks the unit of each block that the dense layer used most.

    From least squares, by cross entropy with the largest unit of each block, each block weighted by what is lost if
    another one is picked. The epoch that keeps most of the held-out tokens' mass is taken, the start included.

    Args:
        x: ``[T, in]``.
        mass: contributions ``[T, units]``, in the order of the blocks.
        block, rank, biased: of the controller.
        epochs: passes over the tokens.
        seed: of their order.
        label: of the step, for messages.

    Raises ``NumericalError`` if the loss is not finite.
    """
    x, mass = x.float(), mass.float()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    held_out = order[: max(1, len(x) // HELD_OUT)]
    trained = order[len(held_out) :] if len(x) > 1 else order
    start = regressed(x[trained], mass[trained], rank, biased, seed)
    table = mass.view(len(x), -1, block)
    target = table.argmax(-1)
    lost = table.amax(-1) - (table.sum(-1) - table.amax(-1)) / (block - 1)
    lost = lost / lost.mean().clamp_min(torch.finfo(torch.float32).tiny)
    parts = [part.clone().requires_grad_(True) for part in start]
    optimizer = torch.optim.Adam(parts if biased else parts[:2], lr=RATE)
    best = -1.0, start
    for epoch in range(epochs + 1):
        now = Controller(*(part.detach().clone() for part in parts))
        share = kept_share(table[held_out], choices(x[held_out], now, block))
        if share > best[0]:
            best = share, now
        if epoch == epochs:
            break
        for batch in trained[torch.randperm(len(trained), generator=generator).to(x.device)].split(BATCH):
            with torch.enable_grad():
                logits = F.linear(F.linear(x[batch], parts[0]), parts[1], parts[2]).view(len(batch), -1, block)
                each = F.cross_entropy(logits.flatten(0, 1), target[batch].flatten(), reduction="none")
                loss = (each * lost[batch].flatten()).mean()
            if not bool(torch.isfinite(loss)):
                raise NumericalError(f"{label}: the loss of a controller became {loss.item()}; check the data")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return best[1]
