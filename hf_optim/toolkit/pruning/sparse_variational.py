r"""Sparse variational dropout (Molchanov et al., 1701.05369): Gaussian noise on weights, with a variance per weight.

The posterior of a weight is ``N(w, σ²)``, the prior is log-uniform. With ``α = σ² / w²``, equation 14 of the paper::

    -KL ≈ k₁ sigmoid(k₂ + k₃ log α) - ½ log(1 + 1/α) - k₁,      k₁, k₂, k₃ = 0.63576, 1.87320, 1.48695

It approximates ``½ log α - E log|1 + sqrt(α) ε| + E log|ε|`` with ``ε ~ N(0, 1)``. The output of a layer is sampled,
not its weights (local reparametrization), and the variance is a separate parameter (the paper's additive noise)::

    y = x wᵀ + b + sqrt(x² σ²ᵀ) ε
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..topology.linear_layers import weight_out_in
from .noisy_layers import NoisyLayer, apply_linear, as_out_in, attach_noise

K1, K2, K3 = 0.63576, 1.87320, 1.48695
# Lower bound on w² before its logarithm is taken.
FLOOR = 1e-8


def log_alpha(weight: Tensor, log_variance: Tensor) -> Tensor:
    """Return ``log α = log σ² - log w²`` of each weight, any shape; float32, or float64 for a float64 variance."""
    weight = weight.to(log_variance.dtype) if log_variance.dtype == torch.float64 else weight.float()
    return log_variance - weight.square().clamp(min=FLOOR).log()


def kl_divergence(log_alpha: Tensor) -> Tensor:
    """Return the KL divergence of each weight's posterior from the prior, in nats.

    It falls from infinity to 0 as α rises.
    """
    # k₁ - k₁ sigmoid(v) = k₁ sigmoid(-v), and log(1 + 1/α) = softplus(-log α): no cancellation at either end.
    return K1 * torch.sigmoid(-(K2 + K3 * log_alpha)) + 0.5 * F.softplus(-log_alpha)


def output_noise(input: Tensor, variance: Tensor) -> Tensor:
    """Sample ``sqrt(x² σ²ᵀ) ε``, the noise of a layer's output that noise of its weights causes.

    Args:
        input: ``[..., in]``.
        variance: ``σ²`` of the weights, ``[out, in]``, non-negative, float32 or float64.

    Returns:
        ``[..., out]``, independent for each row. Under autocast to bfloat16 the product is computed in bfloat16; under
        autocast to float16, whose range is too small for squares, in float32.
    """
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    dtype = torch.float32 if dtype == torch.float16 else dtype
    with torch.autocast(device, enabled=False):
        of_output = F.linear(input.to(dtype).square(), variance.to(dtype))
        # The square root has no gradient at zero. The bound is far below any actual noise.
        deviation = of_output.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        return deviation * torch.randn_like(deviation)


class WeightNoise:
    """The forward of a linear layer with noisy weights, and their KL divergence. Masked weights have neither.

    Attributes:
        layer: the layer; its parameter ``log_variance`` has the shape of its weight, float32 or float64.
        parameter: full name of the weight.
        active: False computes as the linear layer without noise.
        sampled: True once a forward in training has sampled noise.
    """

    def __init__(
        self,
        layer: nn.Module,
        parameter: str,
        kept: Mapping[str, Tensor],
        evaluation_masks: Callable[[], Mapping[str, Tensor]],
        initial: float,
    ) -> None:
        """Attach noise to ``layer``.

        Args:
            layer: an ``nn.Linear`` or ``Conv1D``.
            parameter: full name of its weight.
            kept: masks of earlier steps, by parameter name.
            evaluation_masks: returns the masks for evaluation mode, by parameter name.
            initial: initial value of every ``log σ²``.
        """
        weight = layer.get_parameter("weight")
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        start = torch.full_like(weight, initial, dtype=wide)
        self.parameter, self.kept, self.evaluation_masks = parameter, kept, evaluation_masks
        self.active, self.sampled = True, False
        self.layer: NoisyLayer = attach_noise(layer, self, log_variance=start)

    def mask(self) -> Tensor | None:
        """Return the mask of earlier steps in the shape of the weight, or None."""
        mask = self.kept.get(self.parameter)
        return None if mask is None else mask.to(self.layer.weight.device)

    def log_alpha(self) -> Tensor:
        """Return ``log α`` of every weight, in the shape of the weight."""
        return log_alpha(self.layer.weight, self.layer.get_parameter("log_variance"))

    def divergence(self) -> Tensor:
        """Return the sum of the KL divergence over the weights that are not masked, a scalar."""
        each, mask = kl_divergence(self.log_alpha()), self.mask()
        return each.sum() if mask is None else each.masked_fill(~mask, 0.0).sum()

    def __call__(self, layer: NoisyLayer, input: Tensor) -> Tensor:
        weight = weight_out_in(layer)
        if self.active and not layer.training:
            weight = weight * as_out_in(layer, self.evaluation_masks()[self.parameter].to(weight.device))
        mean = apply_linear(layer, input, weight)
        if not self.active or not layer.training:
            return mean
        self.sampled = True
        variance, mask = layer.get_parameter("log_variance").exp(), self.mask()
        if mask is not None:
            variance = variance.masked_fill(~mask, 0.0)
        return mean + output_noise(input, as_out_in(layer, variance)).to(mean.dtype)
