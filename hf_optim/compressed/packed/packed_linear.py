"""``PackedLinear``: a linear layer that holds its weight in a kernel's layout alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ModelError
from ..codes import decode
from ..weights import Codes, QuantizedWeight
from .shared_output import FusedSlice

if TYPE_CHECKING:
    from .kernel import Kernel

PACKED_WEIGHT = "packed_weight"
# Gradient checkpointing ends a recomputation that has gone far enough by raising from within.
CHECKPOINT = "torch.utils.checkpoint"


class KernelWarning(UserWarning):
    """A layer runs as it did before, although it was meant to run on a kernel. The message names it and says why."""


class ProjectionGroup(Protocol):
    """What a layer needs of the layers that share one fused weight with it (``fused_projections.ProjectionGroup``)."""

    def fuse(self) -> bool:
        """Fuse the weights of the layers; False where that is not possible."""
        ...

    def unfuse(self) -> None:
        """Give every layer its own weight for now; the layers stay a group."""

    def disband(self) -> None:
        """Give every layer its own weight again."""


@dataclass(eq=False)
class Packing:
    """What a ``PackedLinear`` knows of itself beside its packed weight.

    Attributes:
        about: the weight as the kernel was told of it, but for its codes and its bias.
        kernel: made the packed weight.
        former: the class the module had.
        undo: makes the module what it was before it was packed.
        parameters: names of the parameters before, in their order; those that the packed weight replaces are
        ``replaced``.
        replaced: name -> shape, dtype and ``requires_grad`` of the parameters that the packed weight replaces.
        attributes: what stood in the instance in the way of ``PackedLinear.forward``.
        failure: why the layer runs dense now; empty while it runs on the kernel.
        group: the layers it is joined with (see ``joining``), or None; looked_at: whether such were looked for.
        norm: the norm that quantizes for it (see ``fusing``), or None.
    """

    description: QuantizedWeight
    kernel: Kernel
    former: type[nn.Linear]
    undo: Callable[[Any], None]
    parameters: tuple[str, ...]
    replaced: dict[str, tuple[torch.Size, torch.dtype, bool]]
    attributes: dict[str, Any]
    failure: str = ""
    group: ProjectionGroup | None = None
    fusion_tried: bool = False
    norm: Any = None

    def unfuse_norm(self) -> None:
        """Let the norm before the layer be an ordinary one again."""
        if self.norm is not None:
            # Another layer that reads the same norm may have done this already.
            if hasattr(self.norm, "unfuse"):
                self.norm.unfuse()
            self.norm = None


def _never(input: Tensor) -> bool:
    return False


class DecodedWeight(Tensor):
    """What ``PackedLinear.weight`` gives: to be read. Results of operations on it are plain tensors.

    It is made in inference mode, so operations in place on it raise ``RuntimeError``; ``weight.data = ...`` (and
    ``weight.data += ...``, as adapters are merged) raises ``ModelError``.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """A copy of the values."""
        return self.clone()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ModelError(
            "this layer holds a compressed weight alone, which cannot be written to: hf_optim.restore(model) first"
        )


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` without a dense weight: its ``packed_weight`` computes, and gives the codes back when asked.

    ``hf_optim.accelerate`` makes one of an existing module by changing its class, so the module stays the same object,
    with its hooks and its bias. ``weight`` is decoded anew whenever it is read (``out * in`` numbers in the layer's
    dtype, which nobody keeps): right but slow, and writing into it raises. An input that the
    packed weight does not take (another dtype or device) is multiplied with a weight decoded for that call; so is every
    input once the packed weight has raised, after one ``KernelWarning``.
    """

    packed_weight: nn.Module
    packing: Packing
    _run: Any
    _accepts: Any

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight ``[out, in]``, decoded now. What would write into it (merging an adapter) raises."""
        with torch.inference_mode():
            return self.decoded().clone().as_subclass(DecodedWeight)

    def decoded(self) -> Tensor:
        """The dense weight ``[out, in]``, as a tensor like any other."""
        description = self.packing.description
        return decode(self.codes(), description.bits, description.dtype)

    def codes(self) -> Codes:
        """The weight's codes, made now."""
        packed_weight: Any = self._modules[PACKED_WEIGHT]
        return packed_weight.codes()

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in] -> [..., out]."""
        if not self._accepts(input):
            return self.dense(input)
        try:
            output = self._run(input)
        except Exception as error:
            if type(error).__module__ == CHECKPOINT:
                raise
            # A fault of the input is the dense layer's to report: it then raises here.
            output = self.dense(input)
            self.fail(f"{self.packing.kernel.name} raised {type(error).__name__}: {error}")
            return output
        bias = self._parameters["bias"]
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            # The packed weight has the bias' values; a difference of zero brings the gradient.
            output = output + (bias - bias.detach())
        return output

    def dense(self, input: Tensor) -> Tensor:
        """The product with a weight decoded for this call, the inputs quantized as the layer's scheme says."""
        scheme = getattr(self, "quantization_scheme", None)
        if scheme is not None and scheme.input_activations is not None:
            from ..codec import quantize_input

            # compressed-tensors finds tokens in three dimensions only; in two it would give all of them one scale.
            flat = input.dim() == 2
            input = quantize_input(self, input[None] if flat else input)
            input = input[0] if flat else input
        return F.linear(input, self.decoded(), self.bias)

    def fail(self, reason: str) -> None:
        """Take the layer off its kernel for good, and say so."""
        self.packing.failure = reason
        self.tie()
        warnings.warn(f"{self.packing.description.name} is dense from now on: {reason}", KernelWarning, stacklevel=4)

    def tie(self) -> None:
        """Look up what ``forward`` calls, and make the packed weight's bias the layer's own."""
        packed_weight: Any = self._modules[PACKED_WEIGHT]
        bias = self._parameters["bias"]
        if isinstance(packed_weight, FusedSlice):
            packed_weight.share_bias(bias)
        elif bias is not None and packed_weight._buffers.get("bias") is not None:
            packed_weight._buffers["bias"] = bias.detach()
            if hasattr(packed_weight, "renew"):
                packed_weight.renew()
        # Past nn.Module.__setattr__ and found without nn.Module.__getattr__.
        self.__dict__["_run"] = packed_weight.forward
        self.__dict__["_accepts"] = _never if self.packing.failure else packed_weight.accepts

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "bias":
            self.tie()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy of the model: its parameters were copied one by one, so the packed weight's bias is another tensor now.
        super().__setstate__(state)
        self.packing = replace(self.packing)
        self.tie()

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        description = self.packing.description
        asked = fn(torch.empty(0, dtype=description.dtype, device=description.device))
        moves = asked.dtype != description.dtype or asked.device != description.device
        group = self.packing.group
        if moves:
            self.packing.unfuse_norm()
        if moves and group is not None:
            group.unfuse()
        packed_weight: Any = self._modules.pop(PACKED_WEIGHT)
        try:
            super()._apply(fn, recurse)
        finally:
            self._modules[PACKED_WEIGHT] = packed_weight
        # Scales are part of the code: they move, but are never rounded to another dtype.
        packed_weight._apply(lambda tensor: _moved(fn, tensor))
        self.tie()
        if moves:
            self.packing.description = replace(description, dtype=asked.dtype, device=asked.device)
            if asked.device.type != "meta" and (asked.dtype, asked.device.type) != (
                description.dtype,
                description.device.type,
            ):
                self._prepack_again()
            if group is not None:
                group.fuse()  # as soon as the last of them has moved
        return self

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """As of any module; but a weight that is not quantized appears as ``weight``, for whoever saves the model."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.packing.description.kind == "dense":
            for key in [key for key in state if key.startswith(f"{prefix}{PACKED_WEIGHT}.")]:
                del state[key]
            state[f"{prefix}weight"] = self.decoded()
        return state

    def _prepack_again(self) -> None:
        """Ask the kernel for a packed weight of the dtype and on the device that the layer has now."""
        bias = self._parameters["bias"]
        weight = replace(self.packing.description, bias=None if bias is None else bias.detach(), codes=self.codes)
        reason = self.packing.kernel.supports(weight)
        if reason is None:
            try:
                self._modules[PACKED_WEIGHT] = self.packing.kernel.prepack(weight)
            except ValueError as error:
                reason = str(error)
        if reason is None:
            self.packing.failure = ""
            self.tie()
        else:
            self.fail(f"it moved to {weight.dtype} on {weight.device}, {self.packing.kernel.name}: {reason}")


def _moved(fn: Any, tensor: Tensor) -> Tensor:
    result = fn(tensor)
    return result if result.dtype == tensor.dtype else tensor.to(result.device)
