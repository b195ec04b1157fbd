"""The end of kernels that compute a tile of the transposed output with warp-group instructions (Gluon; Hopper)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def finish(
    acc, partial, semaphores, scale, bias, out, tile, part, split, first_m, first_n, M, N,
    ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr, IS_SPLIT: gl.constexpr,
):  # fmt: skip
    """Store ``acc`` [BLOCK_N, BLOCK_M] of tile ``tile`` of out [M, N], or with ``IS_SPLIT`` the sum of ``split`` parts.

    ``partial`` is float32, for every tile ``split`` parts; the last program of a tile to arrive stores (see
    ``common.splitk``). With ``ROW_SCALE`` sums are multiplied by scale [N].
    """
    BLOCK_N: gl.constexpr = acc.shape[0]
    BLOCK_M: gl.constexpr = acc.shape[1]
    sums: gl.constexpr = acc.type.layout
    is_storing = True
    if IS_SPLIT:
        own = gl.arange(0, BLOCK_N, gl.SliceLayout(1, sums))[:, None] * BLOCK_M
        own = own + gl.arange(0, BLOCK_M, gl.SliceLayout(0, sums))[None, :]
        parts = partial + tile.to(gl.int64) * (split * BLOCK_N * BLOCK_M) + own
        gl.store(parts + part * (BLOCK_N * BLOCK_M), acc)
        gl.thread_barrier()  # every thread has stored its part before one of them counts
        is_storing = gl.atomic_add(semaphores + tile, 1, sem="acq_rel") == split - 1
    if is_storing:
        if IS_SPLIT:
            acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, sums)
            for each in range(split):
                acc += gl.load(parts + each * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            gl.store(semaphores + tile, 0)
        inside = gl.minimum(first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, sums)), N - 1)
        if ROW_SCALE:
            acc = acc * gl.load(scale + inside).to(gl.float32)[:, None]
        if HAS_BIAS:
            acc = acc + gl.load(bias + inside).to(gl.float32)[:, None]
        stored: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, gl.num_warps()], [0, 1])
        result = gl.convert_layout(acc.to(out.dtype.element_ty), stored)
        n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, stored))
        m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, stored))
        gl.store(out + m.to(gl.int64)[None, :] * N + n[:, None], result, mask=(n < N)[:, None] & (m < M)[None, :])
