"""The launches of a mixture layer whose gradients are needed: its forward, which keeps the first product, and its
backward.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..common.compute_type import compute_constants
from ..common.launch import launch
from .backward import _activate_grad_kernel, _activate_kernel, _outer_kernel
from .launch import _gate_constants, _in_order, _kind, _tensor_kinds, combine, rows_product
from .naive import UNGATED, Gate, Route, Weights, block_rows
from .naive_backward import Gradients, Needs
from .routing import route
from .tiles import Tiles, fitting_stages, shared_memory

# Columns of a row that a program of the activation takes at a time.
MOST_COLUMNS = 1024
# Tiles of a sum of outer products: ``n`` and ``k`` are its rows and columns; 32-bit numbers take twice the room.
OUTER, WIDE_OUTER = Tiles(128, 128, 8, 4), Tiles(64, 64, 4, 2)
# Rows that are multiplied at a time.
ROWS, WIDE_ROWS = 64, 32


def forward(
    hidden: Tensor, experts: Tensor, weights: Tensor, given: Weights, gate: Gate
) -> tuple[Tensor, Tensor, Route]:  # fmt: skip
    """Return ``naive.mixture``, the first product [T k, 2 I] ([T k, I]) in the order of the route, and the route."""
    top_k, (up, down) = experts.shape[1], given.matrices
    block = block_rows(experts.numel(), len(up))
    found = route(experts, len(up), block)
    inner = rows_product(hidden.to(up.dtype), up, given.up_bias, found, top_k, False, block)
    middle = activation(inner, found, gate, len(up))
    rows = rows_product(middle, down, given.down_bias, found, 0, True, block)
    return combine(rows, experts, weights, len(up), hidden.dtype), inner, found


def backward(
    grad: Tensor, hidden: Tensor, experts: Tensor, weights: Tensor, given: Weights, gate: Gate, inner: Tensor,
    found: Route, needs: Needs, outer_tiles: Tiles | None = None,
) -> Gradients:  # fmt: skip
    """Return ``naive_backward.gradients``; all tensors but the matrices are contiguous."""
    (up, down), top_k, count = given.matrices, experts.shape[1], given.up.shape[0]
    block = block_rows(experts.numel(), count)
    x, dy = hidden.to(up.dtype), grad.to(up.dtype)
    u = rows_product(dy, down.transpose(1, 2), None, found, top_k, False, block)
    d_inner, scaled, dw = activation_gradient(inner, u, weights, found, gate, count, needs.down)
    del u
    found_down, down_bias = _matrix_gradient(
        dy, scaled, found, weights, given.down, given.down_bias, given.transposed, needs.down, needs.down_bias,
        (top_k, 0), outer_tiles,
    )  # fmt: skip
    if needs.down_bias and given.down_bias is not None and down_bias is None:
        down_bias = _sum_of_rows(dy, found, weights, given.down_bias, top_k)
    del scaled
    found_up, up_bias = _matrix_gradient(
        d_inner, x, found, None, given.up, given.up_bias, given.transposed, needs.up, needs.up_bias, (0, top_k),
        outer_tiles,
    )  # fmt: skip
    if needs.up_bias and given.up_bias is not None and up_bias is None:
        up_bias = _sum_of_rows(d_inner, found, None, given.up_bias, 0)
    dx = None
    if needs.hidden:
        rows = rows_product(d_inner, up.transpose(1, 2), None, found, 0, True, block)
        ones = torch.ones(experts.shape, dtype=rows.dtype, device=rows.device)
        dx = combine(rows, experts, ones, count, hidden.dtype)
    if needs.weights and given.down_bias is not None:
        known = (experts >= 0) & (experts < count)
        shares = (dy @ given.down_bias.to(dy.dtype).T).float().gather(1, torch.where(known, experts, 0).long())
        dw = dw + torch.where(known, shares, 0)
    return Gradients(dx, dw.to(weights.dtype) if needs.weights else None, found_up, found_down, up_bias, down_bias)


def activation(rows: Tensor, found: Route, gate: Gate, count: int) -> Tensor:
    """Return ``naive.apply_gate`` of the rows [T k, 2 I] of a route, [T k, I]; undefined where no expert computes."""
    N = rows.shape[1] // (1 if gate.layout == UNGATED else 2)
    out = rows.new_empty(rows.shape[0], N)
    block = min(MOST_COLUMNS, max(16, triton.next_power_of_2(N)))
    tensors, constants = (
        (rows, out, found.offsets),
        _in_order({**_gate_constants(gate), "BLOCK_N": block}, _activate_kernel),
    )
    launch(
        _activate_kernel, (rows.shape[0], -(-N // block), 1),
        (*tensors, gate.alpha, gate.offset, gate.limit, count, N), constants, num_warps=4, num_stages=1,
        key=(*_tensor_kinds(tensors), _kind(count), _kind(N), *constants.values()),
    )  # fmt: skip
    return out


def activation_gradient(
    rows: Tensor, grad: Tensor, weights: Tensor, found: Route, gate: Gate, count: int, scaled: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradient of rows [T k, 2 I] for ``grad`` [T k, I] of their activation before the pairs' weights.

    Also return the activation times the weights, if ``scaled``, and the gradient of the weights, float32 [T, k].
    """
    N = grad.shape[1]
    d_rows, d_weights = torch.empty_like(rows), torch.empty(weights.shape, dtype=torch.float32, device=rows.device)
    times = torch.empty_like(grad) if scaled else None
    block = min(MOST_COLUMNS, max(16, triton.next_power_of_2(N)))
    constants = _in_order({**_gate_constants(gate), "SCALED": scaled, "BLOCK_N": block}, _activate_grad_kernel)
    tensors = (
        rows, grad, weights, found.order, found.offsets, d_rows, grad if times is None else times, d_weights,
    )  # fmt: skip
    launch(
        _activate_grad_kernel, (rows.shape[0], 1, 1),
        (*tensors, gate.alpha, gate.offset, gate.limit, count, N), constants, num_warps=4, num_stages=1,
        key=(*_tensor_kinds(tensors), _kind(count), _kind(N), *constants.values()),
    )  # fmt: skip
    return d_rows, times, d_weights


def outer_product(
    left: Tensor, right: Tensor, found: Route, weights: Tensor | None, out: Tensor, bias: Tensor | None,
    choices: tuple[int, int], tiles: Tiles | None = None,
) -> None:  # fmt: skip
    """Fill ``out`` [E, M, N], of any strides, with the sums of the outer products of each expert's rows.

    Args:
        left, right: [T k, M] and [T k, N] in the order of the route; or [T, ...] of tokens, where ``choices`` is k.
        found: the route.
        weights: [T, k], which the rows that are summed for the bias are multiplied by; None does not.
        bias: [E, M], filled with the sums of the rows of ``left``; None for none.
        choices: of left and of right, k or 0.
        tiles: rows and columns of a tile (``n``, ``k``); None takes the usual ones.
    """
    (count, M, N), wide = out.shape, left.element_size() > 2
    tiles = tiles or (WIDE_OUTER if wide else OUTER)
    rows = WIDE_ROWS if wide else ROWS
    block_m = min(tiles.n, max(16, triton.next_power_of_2(M)))
    block_n = min(tiles.k, max(16, triton.next_power_of_2(N)))
    constants = _in_order({
        "LEFT_K": choices[0], "RIGHT_K": choices[1], "BIAS": bias is not None,
        "WEIGHTED": bias is not None and weights is not None, "EVEN": M % block_m == 0 and N % block_n == 0,
        "MATH": compute_constants(left.dtype, _outer_kernel)["MATH"], "BLOCK_M": block_m, "BLOCK_N": block_n,
        "BLOCK_R": rows, "GROUP": tiles.group,
    }, _outer_kernel)  # fmt: skip
    stages = fitting_stages(tiles.stages, (block_m + block_n) * rows * left.element_size(), shared_memory(left.device))
    tensors = (
        left, right, found.order, found.offsets, left if weights is None else weights, out,
        out if bias is None else bias,
    )  # fmt: skip
    numbers = (M, N, left.stride(0), right.stride(0), *out.stride())
    launch(
        _outer_kernel, (-(-M // block_m) * -(-N // block_n), count, 1), (*tensors, *numbers), constants,
        num_warps=tiles.warps, num_stages=stages,
        key=(*_tensor_kinds(tensors), *map(_kind, numbers), *constants.values(), tiles.warps, stages),
    )  # fmt: skip


def _matrix_gradient(
    left: Tensor, right: Tensor | None, found: Route, weights: Tensor | None, matrix: Tensor, bias: Tensor | None,
    transposed: bool, needed: bool, bias_needed: bool, choices: tuple[int, int], tiles: Tiles | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of a stack of matrices and, with it, of their biases; None where none is needed."""
    if not needed or right is None:
        return None, None
    out = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    added = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if bias_needed and bias is not None else None
    outer_product(left, right, found, weights, out.transpose(1, 2) if transposed else out, added, choices, tiles)
    return out, added


def _sum_of_rows(rows: Tensor, found: Route, weights: Tensor | None, bias: Tensor, top_k: int) -> Tensor:
    """Return the gradient of biases [E, M] whose matrices are frozen: a sum of outer products with a column of ones."""
    ones = rows.new_ones(found.order.numel(), 16)
    out, matrix = torch.empty_like(bias), rows.new_empty(bias.shape[0], bias.shape[1], 16)
    outer_product(rows, ones, found, weights, matrix, out, (top_k, 0))
    return out
