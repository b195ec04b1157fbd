"""The Triton kernel of ``hf_optim::wna16``; ``naive`` says what it computes.

One program makes a tile [BLOCK_M, BLOCK_N] of the output from the chunks ``pid_s, pid_s + SPLIT, ...`` of the columns.
Codes minus zero points are whole numbers below 256 and therefore exact in bfloat16 and float16: the tensor cores
multiply these, and the scale of a group multiplies the float32 sum of its columns. With ``SPLIT > 1`` a second kernel
adds the partial sums in a fixed order (no atomics: the same input gives the same bits).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .naive import half_chunk

BF16, FP16, FP32 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _to_float(codes, zero, MATH: tl.constexpr, WIDTH: tl.constexpr):
    """Codes (uint8) minus ``zero`` (float32, whole numbers), exact, in the type of ``MATH``."""
    if MATH == FP16:
        # 0x6400 | q is the float16 number 1024 + q: bits instead of a conversion.
        numbers = (codes.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - (zero + 1024).to(tl.float16)
    elif MATH == FP32:
        numbers = codes.to(tl.float32) - zero
    elif WIDTH == 4:
        # 0x4300 | q is the bfloat16 number 128 + q.
        numbers = (codes.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - (zero + 128).to(tl.bfloat16)
    else:
        # 0x4B000000 | q is the float32 number 2^23 + q.
        wide = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
        numbers = (wide - (zero + 8388608)).to(tl.bfloat16)
    return numbers


@triton.jit
def _part(
    acc, x_rows, codes, scale, zero, rows, cols, first, M, N, K,
    HALF: tl.constexpr, GROUP: tl.constexpr, GATHER: tl.constexpr, HAS_ZERO: tl.constexpr, WIDTH: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Add ``W[:, first : first + HALF] @ x[:, same].T`` to ``acc`` [BLOCK_N, BLOCK_M]; ``codes`` is [BLOCK_N, HALF].

    The weight stands on the left, so that its numbers go from registers into the tensor cores.
    """
    k = first + tl.arange(0, HALF)
    x = tl.load(x_rows[None, :] + k[:, None], mask=(rows < M)[None, :] & (k < K)[:, None], other=0.0)
    if MATH == FP32:
        x = x.to(tl.float32)
    middle: tl.constexpr = 1 << (WIDTH - 1)
    if GATHER:
        # Several groups in one part: each element brings its own scale.
        at = (tl.minimum(k, K - 1) // GROUP)[None, :] * N + cols[:, None]
        zeros = tl.load(zero + at).to(tl.float32) if HAS_ZERO else tl.full(at.shape, middle, tl.float32)
        w = (codes.to(tl.float32) - zeros) * tl.load(scale + at).to(tl.float32)
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")
    else:
        at = (tl.minimum(first, K - 1) // GROUP) * N + cols
        zeros = tl.load(zero + at).to(tl.float32)[:, None] if HAS_ZERO else tl.full([1, 1], middle, tl.float32)
        w = _to_float(codes, zeros, MATH, WIDTH)
        acc += tl.dot(w, x, input_precision="ieee") * tl.load(scale + at).to(tl.float32)[:, None]
    return acc


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x, packed, scale, zero, bias, out, M, N, K, stride_x, stride_packed,
    HALF: tl.constexpr, GROUP: tl.constexpr, GATHER: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr, MATH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """x [M, K], packed [N, bytes], scale and zero [groups, N], out [M, N], or [SPLIT, M, N] float32 partial sums."""
    pid_n, pid_m, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    wanted = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Columns past the end repeat the last one and are not stored: loads of the weight then need no mask.
    cols = tl.minimum(wanted, N - 1)
    x_rows = x + rows.to(tl.int64) * stride_x
    w_rows = packed + cols.to(tl.int64) * stride_packed
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    PER_CHUNK: tl.constexpr = 2 * HALF if WIDTH == 4 else HALF
    for chunk in range(pid_s, tl.cdiv(K, PER_CHUNK), SPLIT):
        codes = tl.load(w_rows[:, None] + chunk * HALF + tl.arange(0, HALF)[None, :])
        first = chunk * PER_CHUNK
        if WIDTH == 4:
            acc = _part(acc, x_rows, codes & 15, scale, zero, rows, cols, first, M, N, K,
                        HALF, GROUP, GATHER, HAS_ZERO, WIDTH, MATH)  # fmt: skip
            acc = _part(acc, x_rows, codes >> 4, scale, zero, rows, cols, first + HALF, M, N, K,
                        HALF, GROUP, GATHER, HAS_ZERO, WIDTH, MATH)  # fmt: skip
        else:
            acc = _part(acc, x_rows, codes, scale, zero, rows, cols, first, M, N, K,
                        HALF, GROUP, GATHER, HAS_ZERO, WIDTH, MATH)  # fmt: skip
    if HAS_BIAS and SPLIT == 1:
        acc += tl.load(bias + cols).to(tl.float32)[:, None]
    at = (pid_s.to(tl.int64) * M + rows[None, :]) * N + wanted[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(rows < M)[None, :] & (wanted < N)[:, None])


@triton.jit
def _sum_kernel(partial, bias, out, total, N, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out [total] = sum over SPLIT of partial [SPLIT, total], plus bias [N]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(partial + part * total + at, mask=at < total, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias + at % N, mask=at < total, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < total)


def _math(dtype: torch.dtype) -> int:
    # The interpreter (TRITON_INTERPRET=1) has no bfloat16 arithmetic: the same sums are made there in float32.
    interpreted = not isinstance(_linear_kernel, triton.runtime.JITFunction)
    if dtype == torch.bfloat16 and not interpreted:
        return BF16.value
    return FP16.value if dtype == torch.float16 else FP32.value


def choose_tiles(M: int, N: int, K: int, width: int) -> dict[str, int]:
    """Tile shape, split of the columns, warps and pipeline stages (``bench --sweep`` on an H200, K = 4096)."""
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    split = 4 if K >= 4096 else 2 if K >= 2048 else 1
    return {"BLOCK_M": block_m, "BLOCK_N": 64, "SPLIT": split, "num_warps": 4, "num_stages": 3}


def wna16(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    width: int,
    group_size: int,
    tiles: dict[str, int] | None = None,
) -> Tensor:
    """``x W^T + bias`` on the Triton kernel. Arguments as in ``naive.wna16``; float16, bfloat16 or float32."""
    K, N = x.shape[-1], packed.shape[0]
    flat = x.reshape(-1, K)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    M = flat.shape[0]
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M == 0 or N == 0:
        return out.view(*x.shape[:-1], N)
    chosen = tiles or choose_tiles(M, N, K, width)
    split = chosen["SPLIT"]
    target = out if split == 1 else torch.empty((split, M, N), dtype=torch.float32, device=x.device)
    half = half_chunk(group_size, width, K)
    grid = (triton.cdiv(N, chosen["BLOCK_N"]), triton.cdiv(M, chosen["BLOCK_M"]), split)
    _linear_kernel[grid](
        flat, packed, scale, scale if zero is None else zero, scale if bias is None else bias, target,
        M, N, K, flat.stride(0), packed.stride(0),
        HALF=half, GROUP=group_size, GATHER=group_size < K and group_size % half != 0,
        HAS_ZERO=zero is not None, HAS_BIAS=bias is not None, WIDTH=width,
        MATH=_math(x.dtype), **chosen,
    )  # fmt: skip
    if split > 1:
        block = 512
        _sum_kernel[(triton.cdiv(M * N, block),)](
            target, scale if bias is None else bias, out, M * N, N, SPLIT=split, HAS_BIAS=bias is not None, BLOCK=block
        )
    return out.view(*x.shape[:-1], N)
