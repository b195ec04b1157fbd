"""Layer-wise reconstruction: the optimal values of the weights that a mask keeps.

For a fixed mask ``M`` the output error ``‖(Ŵ - W) X‖²`` is a least-squares problem in every row of ``Ŵ`` (SparseGPT,
2301.00774, equation 2), in which all removals are compensated at once. With ``H = X Xᵀ`` its normal equations are
``(Ŵ H)∘M = (W H)∘M``. Solving each row by its own inverse costs ``out · in³``; here one preconditioned conjugate
gradient iteration solves all rows together, at ``out · in²`` per step.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows processed at a time, where all at once would need copies of the weight.
STRIP = 2048


def reconstruct_weights(
    weight: Tensor, mask: Tensor, hessian: Tensor, *, damp: float = 0.01, iterations: int = 100, tolerance: float = 1e-5
) -> Tensor:
    """Return the weights under ``mask`` whose outputs are closest to those of ``weight``.

    Args:
        weight: ``[out, in]``, the dense weights.
        mask: bool ``[out, in]``, True = kept.
        hessian: ``[in, in]``, ``Σ x xᵀ`` over calibration tokens (any scale); computed in its dtype.
        damp: share of the mean diagonal added to the diagonal of ``hessian``; pulls kept weights to their old values.
        iterations: upper limit on the conjugate-gradient steps.
        tolerance: a row has converged once the norm of its preconditioned residual has fallen to this share.

    Returns:
        ``[out, in]`` in the dtype of ``hessian``; exactly zero where ``mask`` is False.
    """
    h = hessian.clone()
    h.diagonal().add_(damp * hessian.diagonal().mean())
    scale = h.diagonal().clamp_min(torch.finfo(h.dtype).tiny)
    dense = weight.to(h.dtype)
    fitted = dense * mask
    residual = ((dense - fitted) @ h) * mask
    direction = residual / scale
    rho = (residual * direction).sum(1, keepdim=True)
    goal = tolerance**2 * rho
    for _ in range(iterations):
        image = (direction @ h) * mask
        step = _ratio(rho, (direction * image).sum(1, keepdim=True))
        fitted += step * direction
        residual -= step * image
        conditioned = residual / scale
        last, rho = rho, (residual * conditioned).sum(1, keepdim=True)
        if bool((rho <= goal).all()):
            break
        direction = conditioned + _ratio(rho, last) * direction
    return fitted


def output_error(weight: Tensor, changed: Tensor, hessian: Tensor) -> float:
    """Return ``‖(changed - weight) X‖² / ‖weight X‖²``, the relative squared error of a layer's output.

    It is 0 if all outputs are zero.

    Args:
        weight, changed: ``[out, in]``.
        hessian: ``[in, in]``, ``Σ x xᵀ``.
    """
    sums = torch.zeros(2, dtype=hessian.dtype, device=hessian.device)
    for before, after in zip(weight.split(STRIP), changed.split(STRIP), strict=True):
        dense = before.to(hessian.dtype)
        delta = after.to(hessian.dtype) - dense
        sums += torch.stack([((rows @ hessian) * rows).sum() for rows in (delta, dense)])
    error, total = sums.tolist()
    return error / total if total > 0 else 0.0


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0.0)
