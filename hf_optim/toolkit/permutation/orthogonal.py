"""Orthogonal matrices: Hadamard matrices of many orders, random rotations, and steps along the manifold of rotations.

A Hadamard matrix has entries of one magnitude and orthogonal rows, so ``x H / sqrt(n)`` spreads an outlier of one
channel evenly over all. Orders are products of powers of two (Sylvester) and of Paley's orders, ``q + 1`` for a prime
``q = 3 mod 4`` and ``2 (q + 1)`` for a prime ``q = 1 mod 4``: 12, 20, 24, 28, 36, 44, ... (Paley, "On orthogonal
matrices", J. Math. Phys. 12, 1933). Any other width takes the Kronecker product of the Hadamard matrix
of its power of two with a random orthogonal matrix: still orthogonal, with entries of many magnitudes.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def power_of_two_in(number: int) -> int:
    """Return the largest power of two that divides a positive number."""
    return number & -number


@functools.lru_cache(maxsize=32)
def hadamard_matrix(order: int) -> Tensor | None:
    """Return a Hadamard matrix, float64 ``[order, order]`` of 1 and -1; None if this construction has none."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if order < 1 or order % 4:
        return None
    found = _paley(order)
    if found is None and (half := hadamard_matrix(order // 2)) is not None:
        found = _doubled(half)
    return found


def _doubled(half: Tensor) -> Tensor:
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


def _paley(order: int) -> Tensor | None:
    """Return Paley's matrix of this order, of either kind; None for powers of two, which Sylvester's serves better."""
    if order & (order - 1) == 0:
        return None
    if _is_prime(order - 1):  # = 3 mod 4
        jacobsthal = _jacobsthal(order - 1)
        border = torch.zeros(order, order, dtype=torch.float64)
        border[0, 1:], border[1:, 0], border[1:, 1:] = 1.0, -1.0, jacobsthal
        return border + torch.eye(order, dtype=torch.float64)
    half = order // 2
    if _is_prime(half - 1) and (half - 1) % 4 == 1:
        conference = torch.zeros(half, half, dtype=torch.float64)
        conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1.0, 1.0, _jacobsthal(half - 1)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, plus) + torch.kron(torch.eye(half, dtype=torch.float64), minus)
    return None


def _jacobsthal(prime: int) -> Tensor:
    """Return the quadratic characters of ``i - j`` modulo a prime, float64 ``[prime, prime]``."""
    numbers = torch.arange(prime)
    squares = torch.zeros(prime, dtype=torch.bool)
    squares[(numbers[1:] * numbers[1:]) % prime] = True
    character = torch.where(squares, 1.0, -1.0).double()
    character[0] = 0.0
    return character[(numbers[:, None] - numbers[None, :]) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def random_orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix, float64 ``[width, width]``, uniform over all."""
    drawn = torch.randn(width, width, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    return (q * torch.where(torch.diagonal(r) < 0, -1.0, 1.0)).contiguous()


def random_rotation(width: int, generator: torch.Generator, keeps_mean: bool = False) -> Tensor:
    """Return a Hadamard matrix with random signs, ``diag(s) H / sqrt(n)``: float64 ``[width, width]``, orthogonal.

    A width without a Hadamard matrix takes a Kronecker product (see above). With ``keeps_mean`` a reflection follows
    that makes the rows sum to one, so that the mean of the channels stays.
    """
    matrix = hadamard_matrix(width)
    if matrix is not None:
        spread = matrix / math.sqrt(width)
    else:
        even = power_of_two_in(width)
        outer = random_orthogonal(width // even, generator)
        inner = hadamard_matrix(even)
        assert inner is not None
        spread = torch.kron(outer, inner / math.sqrt(even))
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    rotation = signs[:, None] * spread
    return _keeping_mean(rotation) if keeps_mean else rotation


def _keeping_mean(rotation: Tensor) -> Tensor:
    """Return ``Q F`` with the reflection F that takes ``Q^T 1`` to 1, so that ``(Q F)^T 1 = 1``."""
    ones = torch.ones(len(rotation), dtype=rotation.dtype)
    axis = rotation.T @ ones - ones
    size = axis.square().sum()
    if float(size) < 1e-20:
        return rotation
    return rotation - 2 * torch.outer(rotation @ axis, axis) / size


def cayley_step(rotation: Tensor, gradient: Tensor, rate: float, momentum: Tensor, keeps_mean: bool) -> Tensor:
    """Move a rotation against the gradient along the manifold of orthogonal matrices, and return it.

    The direction is a skew matrix Y, the step ``(I + a/2 Y)^-1 (I - a/2 Y) R``, which is orthogonal (Li, Li and
    Todorovic, "Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform", 2002.01113). The
    length a is ``rate`` over the norm of Y: no step turns by more than about ``rate``.

    Args:
        rotation, gradient: float64 ``[..., n, n]``.
        rate: length of the step.
        momentum: ``[..., n, n]``, the running sum of directions, updated in place.
        keeps_mean: remove what would change the sum of the rows.
    """
    drawn = gradient @ rotation.mT
    skew = drawn - drawn.mT
    if keeps_mean:
        skew = skew - skew.mean(-1, keepdim=True)
        skew = skew - skew.mean(-2, keepdim=True)
    momentum.mul_(0.9).add_(skew)
    length = torch.linalg.matrix_norm(momentum, ord=2).clamp_min(torch.finfo(momentum.dtype).tiny)
    half = momentum * (rate / 2 / length)[..., None, None]
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    return torch.linalg.solve(eye + half, (eye - half) @ rotation)


def orthogonality_error(rotation: Tensor) -> float:
    """Return the largest entry of ``|R^T R - I|`` over the matrices of ``[..., n, n]``."""
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    return float((rotation.mT @ rotation - eye).abs().max())
