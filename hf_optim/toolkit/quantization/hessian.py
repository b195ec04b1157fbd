"""The inverse Hessian of a layer-wise reconstruction problem, ready for a column recursion.

For ``‖(Q - W) X‖²`` the Hessian of every row of ``Q`` is ``H = X Xᵀ`` (times 2, which cancels). The recursions of
Optimal Brain Surgeon type need the rows of the upper Cholesky factor of its inverse: ``H⁻¹ = Uᵀ U``.

It takes one factorization and the inversion of a triangle. With ``J``, which reverses the order of the columns::

    J H J = L Lᵀ   =>   H = (J L J)(J L J)ᵀ   =>   H⁻¹ = Uᵀ U  with  U = (J L J)⁻¹ = J L⁻¹ J,  upper triangular.

All of it is done in one matrix beside the Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import NumericalError

# Above this share of the mean diagonal the Hessian says next to nothing any more.
MAX_DAMP = 10.0
# Rows worked on at a time, where all at once would need a second matrix; the largest triangle inverted by substitution.
STRIP, LEAF = 1024, 512


@dataclass(frozen=True)
class InverseCholesky:
    """``H⁻¹ = upperᵀ upper`` of the damped Hessian.

    Attributes:
        upper: ``[in, in]``, upper triangular, in the Hessian's dtype.
        damp: the share of the mean diagonal that was added in the end.
    """

    upper: Tensor
    damp: float


def dead_columns(hessian: Tensor) -> Tensor:
    """bool ``[in]``: the inputs that were zero in every token."""
    return hessian.diagonal() == 0


def damped(hessian: Tensor, damp: float) -> Tensor:
    """``H`` with ``damp`` times its mean diagonal added to the diagonal; dead columns are decoupled.

    A dead input has a row and a column of zeros and gets the mean diagonal (1 if all are dead), so that its weights
    neither take nor give any compensation: they are rounded to nearest. They may matter on other data, so they are
    not set to zero.
    """
    return _damp(hessian.clone(), damp)


def _damp(matrix: Tensor, damp: float) -> Tensor:
    """``damped`` in place. The host does not wait for the device."""
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    alive = (~dead).to(matrix.dtype)
    count = alive.sum()
    mean = torch.where(count > 0, diagonal.sum() / count.clamp_min(1), 1.0)
    for begin in range(0, len(matrix), STRIP):
        matrix[begin : begin + STRIP].masked_fill_(dead[begin : begin + STRIP, None] | dead, 0)
    diagonal += mean * dead + damp * mean
    return matrix


def inverse_cholesky(
    hessian: Tensor, damp: float = 0.01, what: str = "the Hessian", order: Tensor | None = None
) -> InverseCholesky:
    """The upper Cholesky factor of the inverse of the damped Hessian.

    Where the damped Hessian is not positive definite in float32, or its factor fails a trial, it is factored in
    float64; where that does not do, damping is raised tenfold, up to ``MAX_DAMP``.

    Args:
        hessian: ``[in, in]``, symmetric, float32 or float64, any scale.
        damp: share of the mean diagonal to add.
        what: what the message calls it, with the module and the step.
        order: int64 ``[in]``; the factor is that of ``hessian[order][:, order]``. None: as it stands.

    Raises:
        NumericalError: not finite, or singular at the most damping.
    """
    if not bool(torch.isfinite(torch.stack(torch.aminmax(hessian))).all()):
        raise NumericalError(f"{what} is not finite; check the calibration data, or load the model in a wider dtype")
    columns = torch.arange(len(hessian), device=hessian.device) if order is None else order
    tried = damp
    while tried <= MAX_DAMP:
        for dtype in dict.fromkeys((hessian.dtype, torch.float64)):
            upper = _factor(_damp(_picked(hessian, columns.flip(0), dtype), tried))
            if upper is not None:
                return InverseCholesky(upper.to(hessian.dtype), tried)
        tried = max(tried * 10, 1e-6)
    raise NumericalError(
        f"{what} is singular even with damping {tried / 10:g}; calibrate with more samples, or with precision: float64"
    )


def _picked(matrix: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """``matrix[columns][:, columns]`` in ``dtype``, a matrix of its own."""
    out = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for begin in range(0, len(columns), STRIP):
        out[begin : begin + STRIP] = matrix[columns[begin : begin + STRIP]].index_select(1, columns)
    return out


def _factor(matrix: Tensor) -> Tensor | None:
    """``U`` of the matrix with its columns reversed, in its place; None where it cannot be had in this precision."""
    # In low precision an ill-conditioned matrix may pass with a factor that is far off: try it on a vector.
    image = matrix.sum(1)
    view = matrix.mT  # LAPACK counts columns first: its upper factor is the lower one of the rows
    failed = torch.linalg.cholesky_ex(view, upper=True, out=(view, torch.empty_like(image[0], dtype=torch.int32))).info
    invert_lower_(matrix)
    back = matrix.mT @ (matrix @ image)
    good = (failed == 0) & ((back - 1).abs().max() < 0.05)
    return reverse_(matrix) if bool(good) else None


def invert_lower_(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix ``[n, n]``, in its place, by halves::

    [A  0]⁻¹   [     A⁻¹       0  ]
    [B  C]   = [-C⁻¹ B A⁻¹   C⁻¹ ]
    """
    n = len(lower)
    if n <= LEAF:
        one = torch.eye(n, dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, one, upper=False))
    half = n // 2
    first, second, corner = invert_lower_(lower[:half, :half]), invert_lower_(lower[half:, half:]), lower[half:, :half]
    for begin in range(0, n - half, STRIP):
        corner[begin : begin + STRIP] = corner[begin : begin + STRIP] @ first
    for begin in range(0, half, STRIP):
        corner[:, begin : begin + STRIP] = -(second @ corner[:, begin : begin + STRIP])
    return lower


def reverse_(matrix: Tensor) -> Tensor:
    """Rows and columns ``[n, n]`` in reversed order, in place."""
    n = len(matrix)
    for begin in range(0, n // 2, STRIP):
        end = min(begin + STRIP, n // 2)
        top, bottom = matrix[begin:end], matrix[n - end : n - begin]
        held = top.flip(0, 1)
        top.copy_(bottom.flip(0, 1))
        bottom.copy_(held)
    if n % 2:
        matrix[n // 2] = matrix[n // 2].flip(0)
    return matrix
