"""From tensors to the launches of a step in which tokens halt, and of its gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..common.launch import is_aligned, launch
from ..common.support import unsupported_dtype
from .kernel import _gradient_kernel, _step_kernel, _sums_kernel
from .naive import Accumulators, Gradients

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_CHANNELS = 8192
"""Channels of a state, which a program holds in registers."""
# Numbers of a tile of states, and of each warp of its program; programs that share the gradient of all tokens, and the
# rows and columns of their sums that are added at a time. None is tuned on a device.
TILE, PER_WARP, PROGRAMS, SUM_ROWS, SUM_COLUMNS = 2048, 512, 528, 32, 64


def unsupported(state: Tensor, read: Tensor | None, weight: Tensor, bias: Tensor) -> str | None:
    """Return why the kernels do not compute a step; None if they do."""
    if state.shape[-1] > MOST_CHANNELS:
        return f"{state.shape[-1]} channels, at most {MOST_CHANNELS}"
    given = (state, weight, bias) if read is None else (state, read, weight, bias)
    if state.is_cuda and torch.cuda.get_device_capability(state.device) < (8, 0):
        return "a compute capability below 8.0"
    return next((why for part in given if (why := unsupported_dtype(part.dtype, DTYPES)) is not None), None)


def _tile(channels: int) -> tuple[int, int, int]:
    """Return the tokens of a tile, its columns, and warps of a program."""
    block = triton.next_power_of_2(channels)
    rows = max(1, TILE // block)
    return rows, block, min(16, max(1, rows * block // PER_WARP))


def _key(given: tuple[Tensor, ...], tokens: int, channels: int, constants: dict[str, Any]) -> tuple:
    kinds = ((part.dtype, is_aligned(part)) for part in given)
    return (*kinds, tokens == 1, tokens % 16 == 0, channels, *constants.values())


def _bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)


def halting_step(
    state: Tensor, read: Tensor | None, weight: Tensor, bias: Tensor, before: Accumulators, epsilon: float, last: bool,
    blend: bool,
) -> tuple[Accumulators, Tensor]:  # fmt: skip
    """Return ``naive.halting_step``; accumulators are float32."""
    channels, tokens = state.shape[-1], before.total.numel()
    after = Accumulators(*(torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in before))
    p = torch.empty_like(after.total)
    if not tokens:
        return after, p
    rows, block, warps = _tile(channels)
    held = state.contiguous()
    total, remainder, steps, running, output = before
    given = (
        held, held if read is None else read.contiguous(), weight.contiguous(), bias, total.contiguous(),
        remainder.contiguous(), steps.contiguous(), _bytes(running), output.contiguous(),
        *after[:3], _bytes(after.running), after.output, p,
    )  # fmt: skip
    constants = {"LAST": last, "BLEND": blend, "APART": read is not None, "ROWS": rows, "BLOCK": block}
    launch(
        _step_kernel, (triton.cdiv(tokens, rows), 1, 1), (*given, 1 - epsilon, tokens, channels), constants,
        num_warps=warps, num_stages=1, key=_key(given, tokens, channels, constants),
    )  # fmt: skip
    return after, p


def gradient(
    state: Tensor, read: Tensor | None, weight: Tensor, bias: Tensor, total: Tensor, running: Tensor,
    output: Tensor | None, runs: Tensor, p: Tensor, upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Gradients:  # fmt: skip
    """Return ``naive.gradient``. Calls with equal tensors give equal bits: sums are added in one order."""
    channels, tokens = state.shape[-1], p.numel()
    found = Gradients(
        torch.empty(state.shape, dtype=state.dtype, device=state.device),
        state.new_empty(0) if read is None else torch.empty(read.shape, dtype=read.dtype, device=read.device),
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device),
        torch.empty(bias.shape, dtype=bias.dtype, device=bias.device),
        torch.empty_like(p),
        torch.empty_like(p),
        p.new_empty(0) if output is None else torch.empty(state.shape, dtype=p.dtype, device=p.device),
    )
    if not tokens:
        return found._replace(weight=found.weight.zero_(), bias=found.bias.zero_())
    rows, block, warps = _tile(channels)
    programs = min(PROGRAMS, triton.cdiv(tokens, rows))
    sums = torch.empty(programs, channels + 1, dtype=torch.float32, device=state.device)
    held = state.contiguous()
    ups = [p if part is None else part.contiguous() for part in upstream]
    given = (
        held, held if read is None else read.contiguous(), weight.contiguous(),
        p if output is None else output.contiguous(), total.contiguous(), _bytes(running), _bytes(runs), p, *ups,
        found.state, found.state if read is None else found.read, found.total, found.remainder,
        p if output is None else found.output, sums,
    )  # fmt: skip
    has = dict(zip(("HAS_TOTAL", "HAS_REMAINDER", "HAS_OUTPUT"), (part is not None for part in upstream), strict=True))
    constants = {"BLEND": output is not None, "APART": read is not None, **has, "ROWS": rows, "BLOCK": block}
    launch(
        _gradient_kernel, (programs, 1, 1), (*given, tokens, channels), constants,
        num_warps=warps, num_stages=1, key=_key(given, tokens, channels, constants),
    )  # fmt: skip
    sizes = {"ROWS": SUM_ROWS, "BLOCK": SUM_COLUMNS}
    added = (sums, found.weight, found.bias)
    launch(
        _sums_kernel, (triton.cdiv(channels + 1, SUM_COLUMNS), 1, 1), (*added, programs, channels), sizes,
        num_warps=4, num_stages=1, key=_key(added, programs, channels, sizes),
    )  # fmt: skip
    return found
