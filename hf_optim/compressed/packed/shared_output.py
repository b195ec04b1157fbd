"""``FusedSlice``: the packed weight of a layer whose rows are some of a joint packed weight's.

Layers that read the same tensor (q, k and v; gate and up) can be one product. Each stays a layer of its own, with its
hooks and its name: the first that is called with a tensor computes for all, and leaves the output on a ``FusedOutput``,
where the others find theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..weights import Codes


class FusedOutput:
    """What the first of some layers computed, until the last has taken its part.

    Args:
        sizes: rows of each layer.
        contiguous: whether outputs must be contiguous, as those of ``nn.Linear`` are, and not only views.

    Attributes:
        everyone: a bit for each layer.
        held: the input, its version, whether gradients were recorded, the output of each layer, and the bits of those
            that have not taken theirs; None when there is nothing to take. One tuple, so that another thread sees all
            or nothing of it.
    """

    def __init__(self, sizes: list[int], contiguous: bool) -> None:
        self.sizes, self.contiguous, self.everyone = sizes, contiguous, (1 << len(sizes)) - 1
        self.held: tuple[Tensor, int, bool, Sequence[Tensor], int] | None = None

    def split(self, y: Tensor) -> Sequence[Tensor]:
        """The output [..., sum of sizes] as one of each layer."""
        if torch.compiler.is_compiling():
            starts = accumulate(self.sizes[:-1], initial=0)
            parts: Sequence[Tensor] = [y.narrow(-1, *at) for at in zip(starts, self.sizes, strict=True)]
        else:
            # One call for all. Nobody writes into the whole, so parts may be written into, as outputs of nn.Linear may.
            parts = torch.unsafe_split_with_sizes(y, self.sizes, -1)
        return [part.contiguous() for part in parts] if self.contiguous else parts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": None}


def _version(x: Tensor) -> int:
    """Grows with each write into a tensor.

    Tensors of inference mode have none, and a compiler cannot branch on it. There no write is expected between the
    calls of joined layers: they were seen to read one tensor without any.
    """
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


class FusedSlice(nn.Module):
    """The rows ``start`` to ``stop`` of a joint packed weight.

    The joint packed weight is a submodule of the first part alone; every part knows it. A part is a packed weight as
    any other (see ``Kernel``): whatever it is called with, its output is right; what it saves is the product, where the
    input is the very tensor that another part was called with last, not written to since.
    """

    fused_output: FusedOutput
    fused: Any

    def __init__(self, fused: nn.Module, fused_output: FusedOutput, index: int, label: str) -> None:
        super().__init__()
        if index == 0:
            self._modules["fused"] = fused
        # Found without nn.Module.__getattr__, and not registered twice.
        self.__dict__["fused"] = fused
        self.fused_output, self.index, self.bit, self.label = fused_output, index, 1 << index, label
        self.start = sum(fused_output.sizes[:index])
        self.stop = self.start + fused_output.sizes[index]

    @property
    def accepts(self) -> Any:
        """The joint packed weight's own ``accepts``."""
        return self.fused.accepts

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out], a view of the joint output."""
        fused_output, recording, version = self.fused_output, torch.is_grad_enabled(), _version(x)
        held = fused_output.held
        if (
            held is not None
            and held[0] is x
            and held[4] & self.bit
            and held[1] == version
            and held[2] == recording
        ):  # fmt: skip
            outputs, waiting = held[3], held[4] & ~self.bit
        else:
            fused_output.held = None
            outputs, waiting = fused_output.split(self.fused.forward(x)), fused_output.everyone & ~self.bit
        fused_output.held = (x, version, recording, outputs, waiting) if waiting else None
        return outputs[self.index]

    def codes(self) -> Codes:
        """This part of the joint packed weight's codes, in memory of its own."""
        return slice_rows(self.fused.codes(), self.start, self.stop)

    @torch.no_grad()
    def share_bias(self, bias: Tensor | None) -> None:
        """Copy a layer's bias into the fused weight, and make the layer's bias a view of it (shared memory)."""
        whole = self.fused._buffers.get("bias")
        if whole is None:
            return
        own = whole[self.start : self.stop]
        if bias is None:
            own.zero_()
        elif bias.data_ptr() != own.data_ptr():
            own.copy_(bias)
            if (bias.dtype, bias.device) == (own.dtype, own.device):
                bias.data = own


def slice_rows(found: Any, start: int, stop: int) -> Codes:
    """Copies of some rows of codes."""

    def copy(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.clone()

    def some(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[start:stop].clone()

    return Codes(
        found.codes[start:stop].clone(),
        some(found.scale),
        some(found.zero),
        copy(found.order),
        copy(found.input_scale),
        copy(found.input_zero),
    )
