"""Where a row or a token should stop: oracles from the quality at each exit, and the loss of a classifier of exits.

likelihood:   s_n = log p(y | exit n)          correctness:  s_n = [ argmax p(. | exit n) = y ]
smoothing:    s~_n(t) = sum_t' exp(-(t - t')^2 / sigma) s_n(t')
target:       argmax_n  s_n - penalty n        the shallowest of equal ones
multinomial:  log q(n) = log softmax(z)_n
geometric:    log q(n) = log sigmoid(z_n) + sum_{m < n} log(1 - sigmoid(z_m)),  without the first term at the last
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

NO_LABEL = -100


def quality(logits: Tensor, labels: Tensor, oracle: str) -> Tensor:
    """Return how good the prediction at each position is, float32 of the shape of ``labels``; 0 without a label.

    logits: ``[..., classes]``; labels: int64 ``[...]``, -100 for none; oracle: ``likelihood`` or ``correctness``.
    """
    known = labels != NO_LABEL
    if oracle == "correctness":
        return ((logits.argmax(-1) == labels) & known).float()
    given = labels.clamp_min(0)[..., None]
    return logits.float().log_softmax(-1).gather(-1, given).squeeze(-1).masked_fill(~known, 0.0)


def smooth(scores: Tensor, sigma: float) -> Tensor:
    """Return scores ``[rows, tokens, exits]`` summed over tokens with the RBF kernel; ``sigma`` 0 returns them as is.

    Positions without a label have a score of 0, and so no part in the sums.
    """
    if sigma == 0:
        return scores
    place = torch.arange(scores.shape[1], device=scores.device, dtype=scores.dtype)
    kernel = torch.exp(-((place[:, None] - place) ** 2) / sigma)
    return torch.einsum("ts,bsn->btn", kernel, scores)


def targets(scores: Tensor, penalty: float) -> Tensor:
    """Return the exit with the best penalized score, int64 ``[...]``, from scores ``[..., exits]``."""
    depth = torch.arange(scores.shape[-1], device=scores.device, dtype=scores.dtype)
    return (scores - penalty * depth).argmax(-1)


def log_probabilities(logits: Tensor, law: str) -> Tensor:
    """Return the log probabilities of all exits, ``[..., exits]``.

    logits: of a multinomial classifier ``[..., exits]``; of a geometric one ``[..., exits - 1]``, one for each early
    exit.
    """
    if law == "multinomial":
        return logits.log_softmax(-1)
    stays = functional.logsigmoid(-logits).cumsum(-1)
    before = functional.pad(stays, (1, 0))  # the sum over the exits before each
    stops = functional.pad(functional.logsigmoid(logits), (0, 1))
    return before + stops


def classifier_loss(log_q: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of each target, of its shape."""
    return -log_q.gather(-1, target[..., None]).squeeze(-1)


def exit_weights(kind: str, count: int) -> list[float]:
    """Return the weights of the losses of exits 1 to ``count``, which sum to 1.

    ``uniform``: 1; ``linear``: n; ``sqrt``: sqrt(n); ``inverse``: 1 / n; ``inverse_sqrt``: 1 / sqrt(n).
    """
    power = {"uniform": 0.0, "linear": 1.0, "sqrt": 0.5, "inverse": -1.0, "inverse_sqrt": -0.5}[kind]
    found = [float(n) ** power for n in range(1, count + 1)]
    return [each / sum(found) for each in found]


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Return scores of the exits as a last dimension."""
    return torch.stack(list(parts), -1)
