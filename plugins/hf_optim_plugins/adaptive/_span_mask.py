"""The soft mask of adaptive spans, and the learned spans of an attention module.

    m(x) = clamp((z S - x) / R + 1, 0, 1)   for x < S,   0 for others

x is the distance of a key from the query. This file is stored beside checkpoints, so it imports only torch and
transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from hf_optim.toolkit.attention import constant_on


class LogMask(torch.autograd.Function):
    """The logarithm of the mask; memory and gradient need the distances and z alone."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, distance: Tensor, size: int, ramp: int) -> Tensor:
        """Return ``[H, *distance.shape]`` in float32, in float64 for z in float64; -inf where the mask is 0.

        Args:
            z: ``[H]``, from 0 to 1.
            distance: int64, of any shape; its sign does not count.
            size: S, the largest span.
            ramp: R, over how many keys the mask falls.
        """
        ctx.save_for_backward(z, distance)
        ctx.size, ctx.ramp = size, ramp
        return _ramped(z, distance, size, ramp).clamp_(0, 1).log_()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradient of z: at m = 1 that of the ramp, as ``clamp`` has it.

        A key just at the end of the ramp, where m is 0, is not seen and has none; there ``clamp`` passes one.
        """
        z, distance = ctx.saved_tensors
        mask = _ramped(z, distance, ctx.size, ctx.ramp)
        within = (mask > 0) & (mask <= 1)
        slope = torch.where(within, grad / mask.masked_fill(~within, 1), 0) * (ctx.size / ctx.ramp)
        return slope.flatten(1).sum(1).to(z.dtype), None, None, None


def _ramped(z: Tensor, distance: Tensor, size: int, ramp: int) -> Tensor:
    """Return the mask before it is clamped, negative beyond ``size``."""
    z = z.to(torch.promote_types(z.dtype, torch.float32)).view(-1, *[1] * distance.dim())
    away = distance.abs()
    mask = (z * size - away.to(z.dtype)) / ramp + 1
    return mask.masked_fill(away >= size, -1)


def support(share: float, size: int, ramp: int) -> int:
    """Return how many nearest keys, the query among them, have a mask above 0, for z = ``share``."""
    return min(size, math.ceil(share * size + ramp))


def untouched(share: float, size: int) -> int:
    """Return how many nearest keys, the query among them, have a mask of 1, for z = ``share``."""
    return min(size, math.floor(share * size) + 1)


class SpanBias:
    """What the masks of heads add to scores. ``z``: ``[H]``, clamped to [0, 1]; ``size`` and ``ramp`` in tokens."""

    def __init__(self, z: Tensor, size: int, ramp: int) -> None:
        self.z, self.size, self.over = z, size, ramp

    def __call__(self, distance: Tensor, heads: Tensor | None) -> Tensor:
        z = (self.z if heads is None else self.z[heads]).clamp(0, 1)
        return LogMask.apply(z, distance, self.size, self.over)  # type: ignore[no-any-return]

    def of(self, heads: Tensor) -> SpanBias:
        """Return that of chosen heads, int64 ``[H']``."""
        return SpanBias(self.z[heads], self.size, self.over)

    def ramp(self) -> Tensor:
        """Return ``z S + R``, ``1 / R`` and S of each head, float32 ``[H, 3]``: m(x) is ``(z S + R - x) / R``."""
        z = self.z.float().clamp(0, 1)[:, None]
        each = ((self.over, 1 / self.over, self.size),), ((self.size, 0, 0),)
        rest, unit = (constant_on(part, z.device, z.dtype) for part in each)
        return torch.addcmul(rest, z, unit)  # one operation: a layer's other work takes less than three


class HeadSpans(nn.Module):
    """The learned spans of the heads of one attention: ``z`` ``[H]``, in float32, each from 0 to 1."""

    def __init__(self, heads: int, **about: Any) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.ones(heads, dtype=torch.float32, **about))
        self._known: tuple[Any, tuple[float, ...]] | None = None
        self._waiting: tuple[Any, tuple[float, ...]] | None = None  # read by another layer in this forward
        self._others: list[ReferenceType[HeadSpans]] = []

    def read_with(self, others: Sequence[HeadSpans]) -> None:
        """Read the spans of other layers with the own ones: a forward then waits for the device once."""
        self._others = [ref(each) for each in others if each is not self]

    def shares(self, again: bool) -> tuple[float, ...]:
        """Return z as numbers; ``again``: read it although it seems unchanged. This waits for the device, unless the
        first layer of this forward has read it.

        Without values (on the meta device) spans are the longest. Raises ``ValueError`` unless all are finite.
        """
        z = self.z.detach()
        if z.is_meta or type(z).__name__ == "FakeTensor":
            return (1.0,) * len(z)
        state = self._state()
        waiting, self._waiting = self._waiting, None
        if state is not None and self._known is not None and self._known[0] == state and not again:
            return self._known[1]
        if state is None or waiting is None or waiting[0] != state:
            waiting = state, self._read_all()
        if not all(math.isfinite(value) for value in waiting[1]):
            raise ValueError("the learned spans of the attention are not finite numbers")
        self._known = state, tuple(min(max(value, 0.0), 1.0) for value in waiting[1])
        return self._known[1]

    def _state(self) -> Any:
        """Return what changes with z, but for writes to ``z.data``; None if nothing is known to."""
        return None if self.z.is_inference() else (self.z._version, self.z.data_ptr())

    def _read_all(self) -> tuple[float, ...]:
        """Read the spans of this layer, which are returned, and of the others on its device."""
        found = [self, *(each for each in (other() for other in self._others) if each is not None)]
        like = [each for each in found if (each.z.device, each.z.shape) == (self.z.device, self.z.shape)]
        read = torch.stack([each.z.detach().float() for each in like]).tolist()
        for each, values in zip(like[1:], read[1:], strict=True):
            each._waiting = each._state(), tuple(values)
        return tuple(read[0])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None, "_waiting": None, "_others": []}

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring z back to 0 to 1, as after each step of training."""
        self.z.clamp_(0, 1)
