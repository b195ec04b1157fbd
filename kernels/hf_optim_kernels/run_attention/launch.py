"""From tensors to launches: one for each round, of the backward two and one more. Nothing waits for the host."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..common.compute_type import compute_constants
from ..common.launch import is_aligned, launch
from .backward_kernel import _delta_kernel, _key_kernel, _query_kernel
from .kernel import _factor_kernel, _forward_kernel
from .naive import ALONE, Seen

# Places of a block; of heads above 64 in the backward, in float32, and of what the forward and unit keys read at once:
# what a thread holds of each, its place and codes, then takes half of the registers, and runs are often that short.
BLOCK, SMALL = 64, 32
LOG2E = math.log2(math.e)


class Places(NamedTuple):
    """Where tokens are, int32: see ``naive.run_attention``, and ``first`` and ``last`` of ``op.run_attention``."""

    order_q: Tensor
    order_k: Tensor
    low: Tensor
    high: Tensor
    codes: Tensor
    first: Tensor
    last: Tensor


def forward(
    query: Tensor, key: Tensor, value: Tensor, places: Places, seen: Seen, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``naive.run_attention``: out with the strides of ``[B, N, H, Dv]``.

    The last dimension of every tensor is contiguous, and of places all.
    """
    (B, H, N, _), DV = query.shape, value.shape[3]
    out = query.new_empty((B, N, H, DV)).transpose(1, 2)
    lse = torch.empty((B, H, N), dtype=torch.float32, device=query.device)
    if not seen.placed:
        lse.fill_(float("-inf"))
        out.zero_()
    call = _Call(query, key, value, places, seen, scale)
    call.attend(out, lse)
    return out, lse


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, places: Places, seen: Seen,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return ``naive.gradients``; arguments as of ``forward``."""
    (B, H, N, _), G, DV = query.shape, value.shape[1], value.shape[3]
    delta = torch.empty_like(lse)
    blocks = triton.cdiv(N, BLOCK)
    numbers = (H, N, DV, blocks, *grad_out.stride()[:3], *out.stride()[:3])
    constants = {"ROWS": BLOCK, "BLOCK_DV": _padded(DV)}
    _start(_delta_kernel, B * H * blocks, (grad_out, out, delta), (), numbers, constants, 4, 1)
    call = _Call(query, key, value, places, seen, scale)
    found = call.gradients(grad_out, lse, delta)
    if seen.near:
        for whole, part in zip(found, _near(call).gradients(grad_out, lse, delta), strict=True):
            whole[:, :, : seen.near] += part
    if seen.unit:
        grad_query, grad_value = found
        grad_key = query.new_empty(0)
    else:
        grad_query, grad_key, grad_value = found
        grad_key = _of_groups(grad_key, key.shape[1])
    return grad_query, grad_key, _of_groups(grad_value, G)


def _of_groups(part: Tensor, groups: int) -> Tensor:
    """Return the sums over the query heads ``[B, H, N, D]`` that share a head of keys."""
    return part if part.shape[1] == groups else part.unflatten(1, (groups, -1)).sum(2)


def _near(call: _Call) -> _Call:
    """Return the call of the first tokens, each of which sees all before it."""
    shape, near = (*call.query.shape[:2], 1, -1), call.seen.near
    place = torch.arange(near, dtype=torch.int32, device=call.query.device).expand(shape).contiguous()
    begin, end = torch.zeros_like(place), torch.full_like(place, near - 1)
    places = Places(place, place, begin, place, call.places.codes, place, end)
    seen = call.seen._replace(last=True)
    return _Call(call.query, call.key, call.value, places, seen, call.scale, call.factors)


class _Call:
    """What the launches of one call share."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, places: Places, seen: Seen, scale: float,
        factors: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.query, self.key, self.value, self.places = query, key, value, places
        self.seen, self.scale = seen, scale
        (self.B, self.H, self.N, self.D), self.DV = query.shape, value.shape[3]
        self.R, self.L = places.order_q.shape[2:]
        self.factors = self._factors() if factors is None else factors

    def _factors(self) -> Tensor:
        """Return what queries are multiplied with to be keys, ``[B, H, N]``; without ``unit`` what is not read."""
        if not self.seen.unit:
            return self.places.low
        found = torch.empty((self.B, self.H, self.N), dtype=torch.float32, device=self.query.device)
        blocks, size = triton.cdiv(self.N, BLOCK), _padded(self.D)
        constants = {"ROWS": BLOCK, "BLOCK_D": size, "FULL_D": size == self.D}
        numbers = (self.H, self.N, self.D, blocks, *self.query.stride()[:3])
        _start(_factor_kernel, self.B * self.H * blocks, (self.query, found), (), numbers, constants, 4, 1)
        return found

    def attend(self, out: Tensor, lse: Tensor) -> None:
        """Write the attention of all rounds to out ``[B, H, N, Dv]`` and lse ``[B, H, N]``, of as many or more N."""
        small = self.query.dtype == torch.float32
        for r in range(self.R):
            self._run(_forward_kernel, self._tensors(out, lse), (), (out,), lse.shape[2], small, False, r)

    def gradients(self, grad_out: Tensor, lse: Tensor, delta: Tensor) -> list[Tensor]:
        """Return the gradients of query, key (unless keys are queries) and value, ``[B, H, L, ..]``."""
        unit, L = self.seen.unit, self.L
        make = torch.empty if self.seen.placed or self.seen.near == L else torch.zeros
        sizes = (self.D, self.DV) if unit else (self.D, self.D, self.DV)
        found = [make((self.B, self.H, L, size), dtype=self.query.dtype, device=self.query.device) for size in sizes]
        small = self.query.dtype == torch.float32 or max(self.D, self.DV) > 64
        N, key, value = lse.shape[2], *found[-2:]
        *tensors, codes, factors = self._tensors()
        given, places = (codes, factors, lse, delta, grad_out), (self.places.first, self.places.last)
        by_query, by_key = (*tensors, *given, found[0]), (*tensors, *places, *given, key, value)
        steps = key.stride(1), value.stride(1)
        for r in range(self.R):  # with unit, the keys' are added to the queries' of the same round
            self._run(_query_kernel, by_query, (found[0].stride(1),), (grad_out,), N, small, False, r)
            self._run(_key_kernel, by_key, steps, (grad_out,), N, small, True, r)
        return found

    def _tensors(self, *more: Tensor) -> tuple[Tensor, ...]:
        p = self.places
        return self.query, self.key, self.value, p.order_q, p.order_k, p.low, p.high, p.codes, self.factors, *more

    def _run(
        self, kernel: Any, tensors: tuple, steps: tuple, others: tuple, l_h: int, small: bool, by_key: bool, r: int
    ) -> None:
        """Launch a kernel for round r."""
        seen, dtype = self.seen, self.query.dtype
        size = min(SMALL if small else BLOCK, _padded(self.L))
        forward = kernel is _forward_kernel
        loop = min(SMALL, size) if forward or seen.unit else size
        rows, step = (loop, size) if by_key else (size, loop)
        blocks, near = triton.cdiv(self.L, size), (seen.near,) if forward else ()
        if forward and r == 0:
            blocks += triton.cdiv(seen.near, size)
        strides = [stride for each in (self.query, self.key, self.value) for stride in each.stride()[:3]]
        for each in others:
            strides += each.stride()[:3]
        block_d, block_dv = _padded(self.D), _padded(self.DV)
        constants = {
            "ROWS": rows, "STEP": step, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "FULL_D": block_d == self.D,
            "FULL_DV": block_dv == self.DV, "CAUSAL": seen.causal, "UNIT": seen.unit, "OWN": seen.own,
            "LAST": seen.last, **({"NEAR": bool(seen.near)} if forward else {}), "EARLIER": r,
            "MATH": compute_constants(dtype, kernel)["MATH"],
        }  # fmt: skip
        floats = (self.scale * LOG2E, ALONE * LOG2E)
        # Runs of unit keys are two or three steps long: loads ahead cost more registers than they save time.
        stages = 1 if dtype == torch.float32 or by_key or seen.unit else 2
        numbers = (
            self.H, self.value.shape[1], self.places.order_k.shape[1], self.R, self.N, self.L, self.D, self.DV, r,
            seen.before, seen.after, blocks, *near, *strides, *steps, l_h,
        )  # fmt: skip
        _start(kernel, self.B * self.H * blocks, tensors, floats, numbers, constants, 4, stages)


def _start(
    kernel: Any, programs: int, tensors: tuple, floats: tuple, numbers: tuple, constants: dict[str, Any], warps: int,
    stages: int,
) -> None:  # fmt: skip
    if not programs:
        return
    key = (
        *(each.dtype for each in tensors), *(is_aligned(each) for each in tensors),
        *(1 if n == 1 else (16 if n % 16 == 0 else 2) + (n >= 1 << 31) for n in numbers), *constants.values(), warps,
        stages,
    )  # fmt: skip
    launch(
        kernel, (programs, 1, 1), (*tensors, *floats, *numbers), constants, num_warps=warps, num_stages=stages, key=key
    )


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
