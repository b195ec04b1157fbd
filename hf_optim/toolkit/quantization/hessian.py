"""Cholesky factor of the inverse Hessian of a layer-wise reconstruction problem.

For ``‖(Q - W) X‖²`` the Hessian of every row of ``Q`` is ``H = X Xᵀ`` (times 2, which cancels). The column recursions
of OBS, OBQ and GPTQ need the rows of the upper Cholesky factor of its inverse: ``H⁻¹ = Uᵀ U``.

The factor takes one factorization and the inversion of a triangle. With ``J``, which reverses the order of columns::

    J H J = L Lᵀ   =>   H = (J L J)(J L J)ᵀ   =>   H⁻¹ = Uᵀ U  with  U = (J L J)⁻¹ = J L⁻¹ J,  upper triangular.

All steps work in a single matrix besides the Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import NumericalError

# Above this share of the mean diagonal the damping dominates the Hessian.
MAX_DAMP = 10.0
# Rows processed at a time, where all at once would need a second matrix; the largest triangle inverted by substitution.
STRIP, LEAF = 1024, 512


@dataclass(frozen=True)
class InverseCholesky:
    """``H⁻¹ = upperᵀ upper`` of the damped Hessian.

    Attributes:
        upper: ``[in, in]``, upper triangular, in the dtype of the Hessian.
        damp: the share of the mean diagonal that was finally added.
    """

    upper: Tensor
    damp: float


def damp_(matrix: Tensor, damp: float) -> Tensor:
    """Add ``damp`` times the mean diagonal to the diagonal of a Hessian ``[in, in]`` in place and decouple dead inputs.

    A dead input was zero in every token. Its row and column are set to zero and its diagonal to the mean (1 if all are
    dead), so that its weights neither receive nor cause compensation: they are rounded to nearest. They are not set to
    zero, because they may matter on other data. There is no synchronization between host and device.
    """
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    alive = (~dead).to(matrix.dtype)
    count = alive.sum()
    mean = torch.where(count > 0, diagonal.sum() / count.clamp_min(1), 1.0)
    for begin in range(0, len(matrix), STRIP):
        matrix[begin : begin + STRIP].masked_fill_(dead[begin : begin + STRIP, None] | dead, 0)
    diagonal += mean * dead + damp * mean
    return matrix


@contextmanager
def damped(hessian: Tensor, damp: float) -> Iterator[Tensor]:
    """Damp a Hessian ``[in, in]`` in its own memory (``damp_``); its diagonal is put back at the end.

    The rows and columns of dead inputs must be zero, as they are in a Gram matrix.
    """
    diagonal = hessian.diagonal().clone()
    try:
        yield damp_(hessian, damp)
    finally:
        hessian.diagonal().copy_(diagonal)


def descent_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """Return ``diag(H) triu(H)⁻¹`` of the columns in ``order``: ``[in, in]``, upper triangular, its diagonal 1.

    It is well-conditioned for every positive definite ``H``: with ``T = triu(H)`` and ``D = diag(H)``,
    ``x T xᵀ = (x H xᵀ + x D xᵀ) / 2``, so that the norm of ``D^½ T⁻¹ D^½`` is at most 2.

    Args:
        hessian: ``[in, in]``, symmetric, positive definite (``damped``); not changed.
        order: int64 ``[in]``.
    """
    lower = _permuted(hessian, order.flip(0), hessian.dtype).tril_()
    return reverse_(invert_lower_(lower)).mul_(hessian.diagonal()[order].unsqueeze(1))


def inverse_cholesky(
    hessian: Tensor, damp: float = 0.01, label: str = "the Hessian", order: Tensor | None = None
) -> InverseCholesky:
    """Compute the upper Cholesky factor of the inverse of the damped Hessian.

    If the damped Hessian is not positive definite in float32, or its factor fails a trial, it is factored in float64;
    if that fails too, the damping is raised tenfold, up to ``MAX_DAMP``.

    Args:
        hessian: ``[in, in]``, symmetric, float32 or float64, any scale; not changed.
        damp: share of the mean diagonal to add.
        label: name of the Hessian in error messages, with the module and the step.
        order: int64 ``[in]``; the factor is that of ``hessian[order][:, order]``. None keeps the order.

    Raises:
        NumericalError: the Hessian is not finite, or singular at the largest damping.
    """
    if not bool(torch.isfinite(torch.stack(torch.aminmax(hessian))).all()):
        raise NumericalError(f"{label} is not finite; check the calibration data, or load the model in a wider dtype")
    columns = torch.arange(len(hessian), device=hessian.device) if order is None else order
    tried = damp
    while tried <= MAX_DAMP:
        for dtype in dict.fromkeys((hessian.dtype, torch.float64)):
            upper = _factor(damp_(_permuted(hessian, columns.flip(0), dtype), tried))
            if upper is not None:
                return InverseCholesky(upper.to(hessian.dtype), tried)
        tried = max(tried * 10, 1e-6)
    raise NumericalError(
        f"{label} is singular even with damping {tried / 10:g}; calibrate with more samples, or with precision: float64"
    )


def _permuted(matrix: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``matrix[columns][:, columns]`` in ``dtype``, in new memory."""
    out = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for begin in range(0, len(columns), STRIP):
        out[begin : begin + STRIP] = matrix[columns[begin : begin + STRIP]].index_select(1, columns)
    return out


def _factor(matrix: Tensor) -> Tensor | None:
    """Return ``U`` of a matrix in reversed order, in its memory; None if it cannot be factored in this precision."""
    # In low precision an ill-conditioned matrix may yield a factor that is far off, so try it on a vector.
    image = matrix.sum(1)
    view = matrix.mT  # LAPACK is column-major: its upper factor is the lower factor here
    failed = torch.linalg.cholesky_ex(view, upper=True, out=(view, torch.empty_like(image[0], dtype=torch.int32))).info
    invert_lower_(matrix)
    back = matrix.mT @ (matrix @ image)
    good = (failed == 0) & ((back - 1).abs().max() < 0.05)
    return reverse_(matrix) if bool(good) else None


def invert_lower_(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix ``[n, n]`` in place, by halves::

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
    """Reverse the order of the rows and columns of ``[n, n]`` in place."""
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
