"""Layer-wise reconstruction: the best values for the weights that a mask leaves.

For a fixed mask the output error ``‖(Ŵ - W) X‖²`` is a least-squares problem in every row of ``Ŵ`` (SparseGPT,
2301.00774, equation 2), in which all removals are compensated at once. With ``H = X Xᵀ`` its normal equations are
``(Ŵ H)∘M = (W H)∘M``. Solving each row by its own inverse costs ``out · in³``; here all rows go through one
preconditioned conjugate-gradient iteration together, ``out · in²`` a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows worked on at a time, where all at once would need copies of the weight.
STRIP = 2048


def reconstruct_weights(
    weight: Tensor, mask: Tensor, moment: Tensor, *, damp: float = 0.01, iterations: int = 100, tolerance: float = 1e-5
) -> Tensor:
    """Weights under ``mask`` whose outputs are nearest to those of ``weight``.

    Args:
        weight: ``[out, in]``, the dense weights.
        mask: bool ``[out, in]``, True = kept.
        moment: ``[in, in]``, ``Σ x xᵀ`` over calibration tokens (any scale); its dtype is the one of the computation.
        damp: share of the mean diagonal added to the diagonal of ``moment``; it draws kept weights to their old values.
        iterations: most steps of conjugate gradients.
        tolerance: a row is done when its preconditioned residual has fallen to this share.

    Returns:
        ``[out, in]`` in the dtype of ``moment``; exactly zero where ``mask`` is False.
    """
    h = moment.clone()
    h.diagonal().add_(damp * moment.diagonal().mean())
    scale = h.diagonal().clamp_min(torch.finfo(h.dtype).tiny)
    dense = weight.to(h.dtype)
    fitted = dense * mask
    residual = ((dense - fitted) @ h) * mask
    direction = residual / scale
    energy = (residual * direction).sum(1, keepdim=True)
    goal = tolerance**2 * energy
    for _ in range(iterations):
        image = (direction @ h) * mask
        step = _ratio(energy, (direction * image).sum(1, keepdim=True))
        fitted += step * direction
        residual -= step * image
        conditioned = residual / scale
        last, energy = energy, (residual * conditioned).sum(1, keepdim=True)
        if bool((energy <= goal).all()):
            break
        direction = conditioned + _ratio(energy, last) * direction
    return fitted


def output_error(weight: Tensor, changed: Tensor, moment: Tensor) -> float:
    """``‖(changed - weight) X‖² / ‖weight X‖²``, the relative squared error of a layer's output; 0 without any output.

    Args:
        weight, changed: ``[out, in]``.
        moment: ``[in, in]``, ``Σ x xᵀ``.
    """
    sums = torch.zeros(2, dtype=moment.dtype, device=moment.device)
    for before, after in zip(weight.split(STRIP), changed.split(STRIP), strict=True):
        dense = before.to(moment.dtype)
        delta = after.to(moment.dtype) - dense
        sums += torch.stack([((rows @ moment) * rows).sum() for rows in (delta, dense)])
    error, energy = sums.tolist()
    return error / energy if energy > 0 else 0.0


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0.0)
