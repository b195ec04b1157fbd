"""The inverse Hessian of a layer-wise reconstruction problem, ready for a column recursion.

For ``‖(Q - W) X‖²`` the Hessian of every row of ``Q`` is ``H = X Xᵀ`` (times 2, which cancels). The recursions of
Optimal Brain Surgeon type need the rows of the upper Cholesky factor of its inverse: ``H⁻¹ = Uᵀ U``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import NumericalError

# Above this share of the mean diagonal the Hessian says next to nothing any more.
MOST_DAMP = 10.0


@dataclass(frozen=True)
class InverseFactor:
    """``H⁻¹ = upperᵀ upper`` of the damped Hessian.

    Attributes:
        upper: ``[in, in]``, upper triangular, in the Hessian's dtype.
        damp: the share of the mean diagonal that was added in the end.
    """

    upper: torch.Tensor
    damp: float


def dead_columns(hessian: torch.Tensor) -> torch.Tensor:
    """bool ``[in]``: the inputs that were zero in every token."""
    return hessian.diagonal() == 0


def damped(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """``H`` with ``damp`` times its mean diagonal added to the diagonal; dead columns are decoupled.

    A dead input has a row and a column of zeros and gets the mean diagonal (1 if all are dead), so that its weights
    neither take nor give any compensation: they are rounded to nearest. They may matter on other data, so they are
    not set to zero.
    """
    dead = dead_columns(hessian)
    alive = hessian.diagonal()[~dead]
    mean = alive.mean() if alive.numel() else torch.ones((), dtype=hessian.dtype, device=hessian.device)
    out = hessian.clone()
    out[dead, :] = 0
    out[:, dead] = 0
    diagonal = out.diagonal()
    diagonal[dead] = mean
    diagonal += damp * mean
    return out


def inverse_factor(hessian: torch.Tensor, damp: float = 0.01, what: str = "the Hessian") -> InverseFactor:
    """The upper Cholesky factor of the inverse of the damped Hessian.

    Where the damped Hessian is not positive definite in its dtype, damping is raised tenfold, up to ``MOST_DAMP``.

    Args:
        hessian: ``[in, in]``, symmetric, float32 or float64, any scale.
        damp: share of the mean diagonal to add.
        what: what the message calls it, with the module and the step.

    Raises:
        NumericalError: not finite, or singular at the most damping.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise NumericalError(f"{what} is not finite; check the calibration data, or load the model in a wider dtype")
    tried = damp
    while tried <= MOST_DAMP:
        upper = _factor(damped(hessian, tried))
        if upper is not None:
            return InverseFactor(upper, tried)
        tried = max(tried * 10, 1e-6)
    raise NumericalError(
        f"{what} is singular even with damping {tried / 10:g}; calibrate with more samples, or with precision: float64"
    )


def _factor(matrix: torch.Tensor) -> torch.Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    # In low precision an ill-conditioned matrix may pass with a factor that is far off: try it on a vector.
    if bool(failed) or not bool(torch.isfinite(upper).all()) or not _is_inverse(upper, matrix):
        return None
    return upper


def _is_inverse(upper: torch.Tensor, matrix: torch.Tensor) -> bool:
    probe = torch.ones(matrix.shape[0], 1, dtype=matrix.dtype, device=matrix.device)
    back = upper.T @ (upper @ (matrix @ probe))
    return bool((back - probe).abs().max() < 0.05)
