r"""Sparse variational dropout (Molchanov et al., 1701.05369): Gaussian noise on weights, with a variance for each.

The posterior of a weight is ``N(w, σ²)``, the prior is log-uniform. With ``α = σ² / w²``, equation 14 of the paper::

    -KL ≈ k₁ sigmoid(k₂ + k₃ log α) - ½ log(1 + 1/α) - k₁,      k₁, k₂, k₃ = 0.63576, 1.87320, 1.48695

What that approximates is ``½ log α - E log|1 + sqrt(α) ε| + E log|ε|``, ``ε ~ N(0, 1)``. A layer's output is drawn, not
its weights (local reparametrization), and the variance is a parameter beside ``w`` (the paper's additive noise)::

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
# Of w², where its logarithm is taken; smaller weights count as this.
FLOOR = 1e-8


def log_alpha(weight: Tensor, log_variance: Tensor) -> Tensor:
    """``log α = log σ² - log w²`` of each weight, any shape; float32, or float64 for float64 weights."""
    weight = weight.to(log_variance.dtype) if log_variance.dtype == torch.float64 else weight.float()
    return log_variance - weight.square().clamp(min=FLOOR).log()


def kl_divergence(log_alpha: Tensor) -> Tensor:
    """The divergence of each weight's posterior from the prior, in nats; falls from infinity to 0 as α rises."""
    # k₁ - k₁ sigmoid(v) = k₁ sigmoid(-v), and log(1 + 1/α) = softplus(-log α): no cancellation at either end.
    return K1 * torch.sigmoid(-(K2 + K3 * log_alpha)) + 0.5 * F.softplus(-log_alpha)


def output_noise(input: Tensor, variance: Tensor) -> Tensor:
    """``sqrt(x² σ²ᵀ) ε``: what noise of the weights does to a layer's output.

    Args:
        input: ``[..., in]``.
        variance: ``σ²`` of the weights, ``[out, in]``, not negative, float32 or float64.

    Returns:
        ``[..., out]``, independent for each row. Under autocast to bfloat16 the product runs in it; float16 is too
        narrow for squares, and float32 takes its place.
    """
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    dtype = torch.float32 if dtype == torch.float16 else dtype
    with torch.autocast(device, enabled=False):
        spread = F.linear(input.to(dtype).square(), variance.to(dtype))
        # A root has no gradient at zero; the bound is far below what any noise could be.
        deviation = spread.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        return deviation * torch.randn_like(deviation)


class WeightNoise:
    """The forward of a linear layer with noisy weights, and their divergence. Weights under a mask have neither.

    Attributes:
        layer: whose noise it is; ``log_variance`` is its parameter, of the shape of its weight, float32 or float64.
        parameter: full name of the weight.
        active: whether there is noise; without, the layer is an ordinary one.
        heard: whether noise was ever drawn, which the first forward in training does; it stays True.
    """

    def __init__(
        self,
        layer: nn.Module,
        parameter: str,
        kept: Mapping[str, Tensor],
        choose: Callable[[], Mapping[str, Tensor]],
        initial: float,
    ) -> None:
        """Attach to ``layer``; ``kept`` are masks by parameter name, ``choose`` gives those of evaluation."""
        weight = layer.get_parameter("weight")
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        start = torch.full_like(weight, initial, dtype=wide)
        self.parameter, self.kept, self.choose = parameter, kept, choose
        self.active, self.heard = True, False
        self.layer: NoisyLayer = attach_noise(layer, self, log_variance=start)

    def mask(self) -> Tensor | None:
        """What an earlier step kept, of the shape of the weight, or None."""
        mask = self.kept.get(self.parameter)
        return None if mask is None else mask.to(self.layer.weight.device)

    def log_alpha(self) -> Tensor:
        """``log α`` of every weight, of its shape."""
        return log_alpha(self.layer.weight, self.layer.get_parameter("log_variance"))

    def divergence(self) -> Tensor:
        """The sum over the weights that are not masked, a scalar."""
        each, mask = kl_divergence(self.log_alpha()), self.mask()
        return each.sum() if mask is None else each.masked_fill(~mask, 0.0).sum()

    def __call__(self, layer: NoisyLayer, input: Tensor) -> Tensor:
        weight = weight_out_in(layer)
        if self.active and not layer.training:
            weight = weight * as_out_in(layer, self.choose()[self.parameter].to(weight.device))
        mean = apply_linear(layer, input, weight)
        if not self.active or not layer.training:
            return mean
        self.heard = True
        variance, mask = layer.get_parameter("log_variance").exp(), self.mask()
        if mask is not None:
            variance = variance.masked_fill(~mask, 0.0)
        return mean + output_noise(input, as_out_in(layer, variance)).to(mean.dtype)
