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
from .shared_output import Part

if TYPE_CHECKING:
    from .kernel import Kernel

OPERAND = "operand"
# Gradient checkpointing ends a recomputation that has gone far enough by raising from within.
CHECKPOINT = "torch.utils.checkpoint"


class KernelWarning(UserWarning):
    """A layer runs as it did before, although it was meant to run on a kernel. The message names it and says why."""


class Group(Protocol):
    """What a layer needs of the layers that share one fused weight with it (``fused_projections.Group``)."""

    def join(self) -> bool:
        """Fuse the weights of the layers; False where that is not possible."""
        ...

    def part(self) -> None:
        """Give every layer its own weight for now; the layers stay a group."""

    def end(self) -> None:
        """Give every layer its own weight again."""


@dataclass(eq=False)
class Packing:
    """What a ``PackedLinear`` knows of itself beside its operand.

    Attributes:
        about: the weight as the kernel was told of it, but for its codes and its bias.
        kernel: made the operand.
        former: the class the module had.
        undo: makes the module what it was before it was packed.
        parameters: names of the parameters before, in their order; those that the operand replaces are ``replaced``.
        replaced: name -> shape, dtype and ``requires_grad`` of the parameters that the operand replaces.
        attributes: what stood in the instance in the way of ``PackedLinear.forward``.
        failure: why the layer runs dense now; empty while it runs on the kernel.
        group: the layers it is joined with (see ``joining``), or None; looked_at: whether such were looked for.
        norm: the norm that quantizes for it (see ``fusing``), or None.
    """

    about: QuantizedWeight
    kernel: Kernel
    former: type[nn.Linear]
    undo: Callable[[Any], None]
    parameters: tuple[str, ...]
    replaced: dict[str, tuple[torch.Size, torch.dtype, bool]]
    attributes: dict[str, Any]
    failure: str = ""
    group: Group | None = None
    looked_at: bool = False
    norm: Any = None

    def apart(self) -> None:
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
    """An ``nn.Linear`` without a dense weight: its ``operand`` computes, and gives the codes back when asked.

    ``hf_optim.accelerate`` makes one of an existing module by changing its class, so the module stays the same object,
    with its hooks and its bias. ``weight`` is decoded anew whenever it is read (``out * in`` numbers in the layer's
    dtype, which nobody keeps): right but slow, and writing into it raises. An input that the
    operand does not take (another dtype or device) is multiplied with a weight decoded for that call; so is every
    input once the operand has raised, after one ``KernelWarning``.
    """

    operand: nn.Module
    packing: Packing
    _run: Any
    _takes: Any

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight ``[out, in]``, decoded now. What would write into it (merging an adapter) raises."""
        with torch.inference_mode():
            return self.decoded().clone().as_subclass(DecodedWeight)

    def decoded(self) -> Tensor:
        """The dense weight ``[out, in]``, as a tensor like any other."""
        about = self.packing.about
        return decode(self.codes(), about.bits, about.dtype)

    def codes(self) -> Codes:
        """The weight's codes, made now."""
        operand: Any = self._modules[OPERAND]
        return operand.codes()

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in] -> [..., out]."""
        if not self._takes(input):
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
            # The operand has the bias' values; a difference of zero brings the gradient.
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
        warnings.warn(f"{self.packing.about.name} is dense from now on: {reason}", KernelWarning, stacklevel=4)

    def tie(self) -> None:
        """Look up what ``forward`` calls, and make the operand's bias the layer's own."""
        operand: Any = self._modules[OPERAND]
        bias = self._parameters["bias"]
        if isinstance(operand, Part):
            operand.share_bias(bias)
        elif bias is not None and operand._buffers.get("bias") is not None:
            operand._buffers["bias"] = bias.detach()
            if hasattr(operand, "renew"):
                operand.renew()
        # Past nn.Module.__setattr__ and found without nn.Module.__getattr__.
        self.__dict__["_run"] = operand.forward
        self.__dict__["_takes"] = _never if self.packing.failure else operand.takes

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "bias":
            self.tie()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy of the model: its parameters were copied one by one, so the operand's bias is another tensor now.
        super().__setstate__(state)
        self.packing = replace(self.packing)
        self.tie()

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        about = self.packing.about
        asked = fn(torch.empty(0, dtype=about.dtype, device=about.device))
        moves = asked.dtype != about.dtype or asked.device != about.device
        group = self.packing.group
        if moves:
            self.packing.apart()
        if moves and group is not None:
            group.part()
        operand: Any = self._modules.pop(OPERAND)
        try:
            super()._apply(fn, recurse)
        finally:
            self._modules[OPERAND] = operand
        # Scales are part of the code: they move, but are never rounded to another dtype.
        operand._apply(lambda tensor: _moved(fn, tensor))
        self.tie()
        if moves:
            self.packing.about = replace(about, dtype=asked.dtype, device=asked.device)
            if asked.device.type != "meta" and (asked.dtype, asked.device.type) != (about.dtype, about.device.type):
                self._bind_again()
            if group is not None:
                group.join()  # as soon as the last of them has moved
        return self

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """As of any module; but a weight that is not quantized appears as ``weight``, for whoever saves the model."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.packing.about.kind == "dense":
            for key in [key for key in state if key.startswith(f"{prefix}{OPERAND}.")]:
                del state[key]
            state[f"{prefix}weight"] = self.decoded()
        return state

    def _bind_again(self) -> None:
        """Ask the kernel for an operand of the dtype and on the device that the layer has now."""
        bias = self._parameters["bias"]
        weight = replace(self.packing.about, bias=None if bias is None else bias.detach(), codes=self.codes)
        reason = self.packing.kernel.serves(weight)
        if reason is None:
            try:
                self._modules[OPERAND] = self.packing.kernel.bind(weight)
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
