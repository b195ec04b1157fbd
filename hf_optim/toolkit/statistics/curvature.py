r"""Curvature of a model's loss in single weights: Hessian-vector products by double backward, and power iteration.

For the gradient ``g(W)`` of a loss in one weight ``W`` and a fixed ``v`` of its shape (1905.03696, section 3)::

    d(gᵀ v)/dW = H v

``H`` is the diagonal block of the Hessian that belongs to ``W``, and is never formed. Applying it repeatedly to a
normalised vector converges to the eigenvector of the eigenvalue of the largest magnitude; the Rayleigh quotient
``vᵀ H v`` is the estimate of that eigenvalue.

Memory: only the current weights require a gradient. The activations from the first of them to the output are kept once
for the forward and about twice for the gradient, on a small part of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Eigenpair:
    """The eigenvalue of the largest magnitude, and its eigenvector.

    Attributes:
        value: the Rayleigh quotient of ``vector``, with its sign.
        vector: the eigenvector, of unit length, in the shape of the weight.
        steps: number of Hessian-vector products.
        converged: True if the last two estimates agree to the tolerance.
    """

    value: float
    vector: Tensor
    steps: int
    converged: bool


@contextmanager
def enable_double_backward(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Require gradients of ``weights`` alone, and use the attention backend that supports double backward.

    On exit the flags ``requires_grad`` of all parameters are restored, also if the body raises. Nothing is written to
    ``.grad`` as long as ``torch.autograd.grad`` is used.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def gradients(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a loss by name, with a graph for double backward.

    Weights that the loss does not depend on are left out.
    """
    if not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
    return {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}


def hessian_product(gradient: Tensor, weight: Tensor, vector: Tensor) -> Tensor:
    """Return ``H v``, in the shape of ``weight``. The graph of ``gradient`` is kept for the next product."""
    if not gradient.requires_grad:  # the loss is linear in this weight
        return torch.zeros_like(weight)
    (product,) = torch.autograd.grad(gradient, weight, vector, retain_graph=True, allow_unused=True)
    return torch.zeros_like(weight) if product is None else product.detach()


def power_iteration(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 100, tolerance: float = 1e-3
) -> Eigenpair:
    """Return the eigenvalue of the largest magnitude of a symmetric operator, and its eigenvector.

    Args:
        product: the operator, a function from a vector to a vector of the same shape.
        start: a nonzero vector that is not orthogonal to the eigenvector; a random one is not.
        iterations: maximum number of products.
        tolerance: relative change of the estimate at which to stop.
    """
    vector = start / start.norm()
    value, steps = 0.0, 0
    for steps in range(1, iterations + 1):
        image = product(vector)
        last, value = value, float((vector * image).sum())
        length = float(image.norm())
        if length == 0.0 or not torch.isfinite(image).all():
            return Eigenpair(value, vector, steps, length == 0.0)
        if steps > 1 and abs(value - last) <= tolerance * abs(value):
            return Eigenpair(value, vector, steps, True)
        vector = image / length
    return Eigenpair(value, vector, steps, False)


def random_direction(like: Tensor, seed: int = 0) -> Tensor:
    """Return standard normal numbers from a separate generator, in the shape, dtype and device of ``like``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
