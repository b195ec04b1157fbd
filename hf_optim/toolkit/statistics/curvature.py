r"""Curvature of a model's loss in single weights: Hessian-vector products by double backward, and power iteration.

For the gradient ``g(W)`` of a loss in one weight ``W`` and a fixed ``v`` of its shape (1905.03696, section 3)::

    d(gᵀ v)/dW = H v

``H`` is the diagonal block of the Hessian that belongs to ``W``, and is never formed. Applying it over and over to a
normalised vector leads to its eigenvalue of the largest magnitude; the Rayleigh quotient ``vᵀ H v`` is the estimate.

Memory: only the weights in work require a gradient, so what is kept are the activations from the first of them to the
output, once for the forward and about twice for the gradient, of one small part of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@dataclass(frozen=True)
class Eigenpair:
    """The eigenvalue of the largest magnitude.

    Attributes:
        value: the Rayleigh quotient of ``vector``, with its sign.
        vector: of unit length, in the shape of the weight.
        steps: products that were made.
        converged: whether the last two estimates agree to the tolerance.
    """

    value: float
    vector: Tensor
    steps: int
    converged: bool


@contextmanager
def enable_double_backward(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Gradients on, for ``weights`` alone, and attention on the backend that can be differentiated twice.

    The flags ``requires_grad`` of all parameters are put back, also when the body raises. Nothing is written to
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
    """The gradients of a loss, ready to be differentiated again; without weights that the loss does not depend on."""
    if not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
    return {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}


def hessian_product(gradient: Tensor, weight: Tensor, vector: Tensor) -> Tensor:
    """``H v``, in the shape of ``weight``. The graph of ``gradient`` is kept for the next product."""
    if not gradient.requires_grad:  # the loss is linear in this weight
        return torch.zeros_like(weight)
    (product,) = torch.autograd.grad(gradient, weight, vector, retain_graph=True, allow_unused=True)
    return torch.zeros_like(weight) if product is None else product.detach()


def power_iteration(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 100, tolerance: float = 1e-3
) -> Eigenpair:
    """The eigenvalue of the largest magnitude of a symmetric operator.

    Args:
        product: the operator.
        start: any vector but zero; not orthogonal to the eigenvector, which a random one is not.
        iterations: most products.
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
    """Standard normal numbers from a generator of their own, in the shape, dtype and device of ``like``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def calibration_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss whose curvature says what a model cannot lose, on one batch of its inputs; a scalar.

    With ``labels`` in the batch, and for a causal language model with its ``input_ids`` as labels, it is the model's
    own loss. Where there are no labels it measures how far the outputs move from what they are: for logits
    ``KL(p₀ ‖ p)``, mean over positions, for other outputs ``½ ‖f - f₀‖²`` per row of the batch. Both are zero where the
    weights are, with zero gradient, and their Hessian is exactly the Gauss-Newton matrix ``Jᵀ A J`` (``A`` the Fisher
    matrix of the softmax, or the identity): double backward gives it without approximation.
    """
    mask = batch.get("attention_mask")
    labels = batch.get("labels")
    if labels is None and is_causal(model) and "input_ids" in batch:
        labels = batch["input_ids"]
        labels = labels if mask is None else labels.masked_fill(mask == 0, -100)
    if labels is not None:
        return model(**{**batch, "labels": labels}).loss
    output = model(**batch)
    logits = getattr(output, "logits", None)
    values = logits if isinstance(logits, Tensor) else _first_floating(output)
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    # A mask of another shape (of an encoder, for a decoder's outputs) says nothing about these positions.
    kept = values.new_ones(values.shape[:-1])
    if isinstance(mask, Tensor) and mask.shape == kept.shape:
        kept = mask.to(kept)
    if not isinstance(logits, Tensor):
        return 0.5 * ((values - values.detach()).square().sum(-1) * kept).sum() / values.shape[0]
    log_p = values.log_softmax(-1)
    fixed = log_p.detach()
    return ((fixed.exp() * (fixed - log_p)).sum(-1) * kept).sum() / kept.sum()


def is_causal(model: nn.Module) -> bool:
    """Whether the model is one of transformers' causal language models, whose labels are its own inputs."""
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _first_floating(output: Any) -> Tensor:
    values: Sequence[Any] = (
        [output] if isinstance(output, Tensor) else list(getattr(output, "values", lambda: output)())
    )
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())


class RecordedBatches:
    """Context manager: the keyword arguments with which a model is called, one dictionary per call.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: list[dict[str, Any]] = []
        self._handle: Any = None

    def __enter__(self) -> list[dict[str, Any]]:
        self._handle = self.model.register_forward_pre_hook(self._keep, with_kwargs=True)
        return self.found

    def __exit__(self, *raised: object) -> None:
        self._handle.remove()

    def _keep(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.found.append(dict(kwargs))


def sample_microbatches(batches: Sequence[Mapping[str, Any]], count: int, rows: int) -> list[dict[str, Any]]:
    """``count`` parts of the data of at most ``rows`` rows, evenly spaced over it; fewer where there are no more."""
    parts = []
    for batch in batches:
        size = max((len(value) for value in batch.values() if isinstance(value, Tensor)), default=0)
        for begin in range(0, size, rows):
            parts.append({key: _rows(value, begin, rows, size) for key, value in batch.items()})
    if len(parts) <= count:
        return parts
    return [parts[index * len(parts) // count] for index in range(count)]


def _rows(value: Any, begin: int, rows: int, size: int) -> Any:
    return value[begin : begin + rows] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
