"""Train the router of a divided feed-forward layer on activations of the dense one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_optim import NumericalError

LEARNING_RATE, BATCH, HELD_OUT = 1e-2, 512, 10  # as in the paper's code: Adam, and a tenth for validation
CHUNK = 1024  # tokens whose neurons exist at a time


@torch.no_grad()
def neuron_mass(x: Tensor, gate_up: tuple[Any, Any], act: Any) -> Tensor:
    """Return how much each neuron does for each token: ``|a|``, ``[T, neurons]``, in float32.

    For ReLU this is the activation itself, as in the paper; other activations may be negative.

    Args:
        x: ``[T, in]``, inputs of the layer.
        gate_up: (weight ``[neurons, in]``, bias or None) that the activation is applied to, and of what it multiplies;
            None without a gate.
        act: the activation.
    """
    (weight, bias), up = gate_up
    parts = []
    for rows in x.split(CHUNK):
        inner = act(F.linear(rows, weight, bias))
        inner = inner if up is None else inner * F.linear(rows, *up)
        parts.append(inner.float().abs())
    return torch.cat(parts)


def covered_share(mass: Tensor, chosen: Tensor) -> float:
    """Return the share of ``mass`` ``[T, E]`` on the experts ``chosen``, int64 ``[T, k]``; 1 without mass."""
    total = float(mass.double().sum())
    return float(mass.double().gather(1, chosen).sum()) / total if total > 0 else 1.0


def train_router(
    x: Tensor, mass: Tensor, centers: Tensor, active: int, epochs: int, seed: int, label: str
) -> tuple[Tensor, Tensor]:
    """Return the matrices ``[E, in]`` and ``[E, E]`` of an MLP router.

    ``scores = W2 tanh(W1 x / |x|)``, from W1 = the centers and W2 = the identity, by binary cross entropy with the
    experts' mass over the largest one of the batch. The epoch that covers most mass of the held-out tokens is kept, the
    start included.

    Args:
        x: ``[T, in]``.
        mass: ``[T, E]``, of each expert.
        centers: ``[E, in]``.
        active: how many experts are chosen.
        epochs: passes over the tokens.
        seed: of their order.
        label: of the step, for messages.

    Raises ``NumericalError`` if the loss is not finite.
    """
    rows = F.normalize(x.float(), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).to(rows.device)
    held_out = order[: max(1, len(rows) // HELD_OUT)]
    trained = order[len(held_out) :] if len(rows) > 1 else order
    first = centers.float().clone().requires_grad_(True)
    second = torch.eye(len(centers), device=rows.device).requires_grad_(True)
    optimizer = torch.optim.Adam([first, second], lr=LEARNING_RATE)

    def score(part: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(part, first)), second)

    best = -1.0, first.detach().clone(), second.detach().clone()
    for epoch in range(epochs + 1):
        with torch.no_grad():
            share = covered_share(mass[held_out], score(rows[held_out]).topk(active, dim=-1).indices)
        if share > best[0]:
            best = share, first.detach().clone(), second.detach().clone()
        if epoch == epochs:
            break
        for batch in trained[torch.randperm(len(trained), generator=generator).to(rows.device)].split(BATCH):
            with torch.enable_grad():
                target = mass[batch] / mass[batch].max().clamp_min(torch.finfo(torch.float32).tiny)
                loss = F.binary_cross_entropy_with_logits(score(rows[batch]), target)
            if not bool(torch.isfinite(loss)):
                raise NumericalError(f"{label}: the loss of a router became {loss.item()}; check the calibration data")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return best[1], best[2]
