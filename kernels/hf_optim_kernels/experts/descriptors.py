"""Tensor descriptors of the matrices of experts: which can be made, and whether a kernel reads them rightly.

How a compiler lays a described tile out in shared memory differs between versions of Triton. So a configuration is
compared with the specification on a few random rows before it is first used on a device, and one that differs from it
gives way to pointers. Nothing is tried while a graph is captured.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common.launch import is_aligned
from . import naive
from .naive import CONCATENATED, UNGATED, Gate
from .tiles import Tiles

log = logging.getLogger(__name__)

EXPERTS = 3
# Rounding of 16-bit numbers; a tile in the wrong place differs by 1.
LARGEST_ERROR = 0.02
_right: dict[tuple, bool] = {}


class _State(threading.local):
    trying = False


_STATE = _State()


def can_describe(weight: Tensor, x: Tensor) -> bool:
    """Return True if tensor descriptors can read a weight ``[E, out, in]`` and rows ``x``: by hardware and layout."""
    stored = weight if weight.stride(2) == 1 else weight.transpose(1, 2)
    if weight.element_size() != 2 or not stored.is_contiguous() or not is_aligned(weight, x) or x.stride(0) % 8:
        return False
    # Rows begin at multiples of 16 bytes, and so do the halves of a transposed matrix.
    if stored.shape[2] % 16:
        return False
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0)


def describe(weight: Tensor, block_n: int, block_k: int, gate: Gate | None) -> TensorDescriptor:
    """Return the descriptor of ``weight`` ``[E, out, in]``, contiguous or transposed, with tiles of a product.

    Rows and columns past those of an expert are zeros. With a concatenated ``gate``, a tile has ``block_n`` columns of
    the gate and as many of up.
    """
    transposed, (E, N, K) = weight.stride(2) != 1, weight.shape
    stored = weight.transpose(1, 2) if transposed else weight
    if gate is not None and gate.layout == CONCATENATED:
        if transposed:
            return TensorDescriptor.from_tensor(stored.view(E, K, 2, N // 2), [1, block_k, 2, block_n])
        return TensorDescriptor.from_tensor(stored.view(E * 2, N // 2, K), [2, block_n, block_k])
    width = block_n * (1 if gate is None or gate.layout == UNGATED else 2)
    return TensorDescriptor.from_tensor(stored, [1, block_k, width] if transposed else [1, width, block_k])


def is_trying() -> bool:
    """Return True inside of ``are_right``."""
    return _STATE.trying


def are_right(
    x: Tensor,
    transposed: bool,
    gate: Gate | None,
    block: int,
    tiles: Tiles,
    by_pair: bool,
    top_k: int,
    has_bias: bool,
    rows_product: Callable[..., Tensor],
) -> bool:
    """Return True if a configuration has been found to compute ``naive.rows_product``; tries it at the first call.

    Args:
        x: rows; its dtype and device count.
        transposed, gate, block, tiles, by_pair, top_k, has_bias: of the product.
        rows_product: ``launch.rows_product``.
    """
    if not x.is_cuda:
        return True
    key = (x.device.index, x.dtype, transposed, gate, block, tiles, by_pair, top_k > 0, has_bias)
    if key not in _right:
        if torch.cuda.is_current_stream_capturing():
            return False
        _STATE.trying = True
        try:
            error = trial_error(
                x.dtype, x.device, transposed, gate, block, tiles, by_pair, top_k, has_bias, rows_product
            )  # fmt: skip
            _right[key] = error < LARGEST_ERROR
            if not _right[key]:
                log.warning("grouped products read pointers: %s differ from their specification by %.1e", tiles, error)
        except Exception as problem:  # a compiler that cannot build it
            _right[key] = False
            log.warning("grouped products read pointers: %s cannot be built (%s)", tiles, type(problem).__name__)
        finally:
            _STATE.trying = False
    return _right[key]


@torch.no_grad()
def trial_error(
    dtype: torch.dtype,
    device: torch.device,
    transposed: bool,
    gate: Gate | None,
    block: int,
    tiles: Tiles,
    by_pair: bool,
    top_k: int,
    has_bias: bool,
    rows_product: Callable[..., Tensor],
) -> float:
    """Return the relative error of a configuration on random rows of three experts: several blocks and tiles."""
    random = torch.Generator(device).manual_seed(0)
    draw = lambda *size: torch.randn(size, device=device, generator=random)  # noqa: E731
    # Two whole tiles of columns, and two steps and a half of the sum.
    N, K = 2 * tiles.n * (1 if gate is None or gate.layout == UNGATED else 2), 5 * tiles.k // 2
    weight = (draw(EXPERTS, K, N) if transposed else draw(EXPERTS, N, K)).mul_(K**-0.5).to(dtype)
    weight = weight.transpose(1, 2) if transposed else weight
    bias = draw(EXPERTS, N).to(dtype) if has_bias else None
    choices = max(1, top_k)
    # Rows by expert: a whole block and one of a single row behind it, two whole ones, and a short one by itself.
    counts = (block + 1, 2 * block, block // 3)
    experts = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)]).to(device)
    tokens = -(-(len(experts) + 1) // choices)
    experts = F.pad(experts, (0, tokens * choices - len(experts)), value=EXPERTS)
    experts = experts[torch.randperm(len(experts), device=device, generator=random)].view(tokens, choices)
    found = naive.route(experts, EXPERTS, block)
    rows = draw(tokens if top_k else tokens * choices, K).to(dtype)
    own = rows_product(rows, weight, bias, found, top_k, by_pair, block, gate, tiles).float()
    wide = None if bias is None else bias.float()
    right = naive.rows_product(rows.float(), weight.float(), wide, found, top_k, by_pair, block)
    right = right if gate is None else naive.apply_gate(right, gate)
    known = experts.reshape(-1) < EXPERTS
    known = known if by_pair else known[found.order.long()]
    error = (own[known] - right[known]).norm() / right[known].norm()
    return float(error) if bool(torch.isfinite(error)) else float("inf")
