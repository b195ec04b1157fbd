r"""Hard concrete gates (Louizos et al., 1712.01312): random gates in [0, 1] that are 0 or 1 with positive probability.

With ``u ~ U(0, 1)``, a temperature β and a stretch to ``(γ, ζ) = (-0.1, 1.1)``, equations 10 to 13::

    s = sigmoid((log u - log(1 - u) + log α) / β),     z = min(1, max(0, s (ζ - γ) + γ))
    P(z ≠ 0) = sigmoid(log α - β log(-γ / ζ)),         ẑ = min(1, max(0, sigmoid(log α) (ζ - γ) + γ))

``ẑ`` is the gate at test time. The sum of ``P(z ≠ 0)`` is the expected L0 norm, which is differentiable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GAMMA, ZETA = -0.1, 1.1
TEMPERATURE = 2.0 / 3.0
# The gate at test time is exactly 0 for log α up to this value.
CLOSED_LOG_ALPHA = math.log(-GAMMA / ZETA)


def gates_from_uniform(log_alpha: Tensor, uniform: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Return gates ``z`` of the shape of ``log_alpha``, which they are differentiable in, for draws ``u`` in (0, 1)."""
    logistic = uniform.log() - torch.log1p(-uniform)
    return stretch_and_clamp(torch.sigmoid((logistic + log_alpha) / temperature))


def sample_gates(log_alpha: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Sample gates with the default generator of torch."""
    edge = torch.finfo(log_alpha.dtype).eps
    return gates_from_uniform(log_alpha, torch.rand_like(log_alpha).clamp(edge, 1.0 - edge), temperature)


def open_probability(log_alpha: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Return ``P(z ≠ 0)`` of each gate."""
    return torch.sigmoid(log_alpha - temperature * CLOSED_LOG_ALPHA)


def deterministic_gates(log_alpha: Tensor) -> Tensor:
    """Return the gates at test time, ``ẑ``; exactly 0 for ``log α <= log(-γ / ζ)``."""
    gate = stretch_and_clamp(torch.sigmoid(log_alpha))
    # The same threshold as the closed form, independent of how the sigmoid rounds.
    return gate.masked_fill(log_alpha <= CLOSED_LOG_ALPHA, 0.0)


def stretch_and_clamp(gate: Tensor) -> Tensor:
    """Stretch from (0, 1) to (γ, ζ), and clamp to [0, 1]."""
    return (gate * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def initial_log_alpha(keep: float) -> float:
    """Return the ``log α`` whose sigmoid is ``keep``, in (0, 1)."""
    return math.log(keep / (1.0 - keep))
