"""``FusedSlice``: the packed weight of a layer that runs as part of a fused product.

Layers that read the same tensor (q, k and v; gate and up) can run as one product. Each remains a separate layer, with
its hooks and its name: the first one called with a tensor computes the product, and caches the outputs of the others in
a ``FusedOutput``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..weights import Codes


class FusedOutput:
    """Cache of the output of a fused product, until the last layer has taken its slice.

    Args:
        sizes: rows of each layer.
        contiguous: return contiguous outputs, like those of ``nn.Linear``, instead of views.

    Attributes:
        all_bits: a bit for each layer.
        cached: the input, its version, whether gradients were recorded, the output of each layer, and the bits of the
            layers that have not taken theirs; None when there is nothing to take. It is one tuple, so that another
            thread sees all of it or nothing.
    """

    def __init__(self, sizes: list[int], contiguous: bool) -> None:
        self.sizes, self.contiguous, self.all_bits = sizes, contiguous, (1 << len(sizes)) - 1
        self.cached: tuple[Tensor, int, bool, Sequence[Tensor], int] | None = None

    def split(self, y: Tensor) -> Sequence[Tensor]:
        """Split the output [..., sum of sizes] into the outputs of the layers."""
        if torch.compiler.is_compiling():
            starts = accumulate(self.sizes[:-1], initial=0)
            parts: Sequence[Tensor] = [y.narrow(-1, *at) for at in zip(starts, self.sizes, strict=True)]
        else:
            # A single call. Nothing writes into the whole, so slices may be modified in place like nn.Linear outputs.
            parts = torch.unsafe_split_with_sizes(y, self.sizes, -1)
        return [part.contiguous() for part in parts] if self.contiguous else parts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cached": None}


def _version(x: Tensor) -> int:
    """Return a counter that grows with each write into a tensor.

    Tensors of inference mode have none, and a compiler cannot branch on it. In both cases no write is expected between
    the calls of fused layers: in the trace they read one tensor with no write in between.
    """
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


class FusedSlice(nn.Module):
    """The rows ``start`` to ``stop`` of a fused weight.

    The fused weight is a submodule of the first slice only; every slice has a reference to it. A slice is a packed
    weight like any other (see ``Kernel``): its output is correct for every input. It saves a product if the input is
    the same tensor that another slice was called with last, unmodified since.
    """

    fused_output: FusedOutput
    fused: Any

    def __init__(self, fused: nn.Module, output: FusedOutput, index: int, label: str) -> None:
        super().__init__()
        if index == 0:
            self._modules["fused"] = fused
        # In the instance dict: found without nn.Module.__getattr__, and not registered twice.
        self.__dict__["fused"] = fused
        self.fused_output, self.index, self.bit, self.label = output, index, 1 << index, label
        self.start = sum(output.sizes[:index])
        self.stop = self.start + output.sizes[index]

    @property
    def accepts(self) -> Callable[[Tensor], bool]:
        """The ``accepts`` of the fused weight."""
        return self.fused.accepts

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out], a view of the fused output."""
        output, recording, version = self.fused_output, torch.is_grad_enabled(), _version(x)
        cached = output.cached
        if (
            cached is not None
            and cached[0] is x
            and cached[4] & self.bit
            and cached[1] == version
            and cached[2] == recording
        ):  # fmt: skip
            outputs, remaining = cached[3], cached[4] & ~self.bit
        else:
            output.cached = None
            outputs, remaining = output.split(self.fused.forward(x)), output.all_bits & ~self.bit
        output.cached = (x, version, recording, outputs, remaining) if remaining else None
        return outputs[self.index]

    def codes(self) -> Codes:
        """Return this slice of the fused weight's codes, as copies."""
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


def slice_rows(codes: Codes, start: int, stop: int) -> Codes:
    """Return copies of the rows ``start`` to ``stop`` of a weight's codes."""

    def copy(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.clone()

    def rows(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[start:stop].clone()

    # Kernels of other packages may return codes without a global scale.
    return Codes(
        codes.codes[start:stop].clone(),
        rows(codes.scale),
        rows(codes.zero),
        copy(codes.order),
        copy(codes.input_scale),
        copy(codes.input_zero),
        rows(getattr(codes, "global_scale", None)),
    )
