"""``PackedLinear``: a linear layer that holds its weight only in the layout of a kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from ...errors import ModelError
from ...trust.bounds import first_line
from ..codes import decode
from ..weights import Codes, QuantizedWeight
from .shared_output import FusedSlice

if TYPE_CHECKING:
    from .kernel import Kernel

PACKED_WEIGHT = "packed_weight"
# Gradient checkpointing ends a recomputation early by raising an exception of this module from inside the forward.
CHECKPOINT = "torch.utils.checkpoint"


class KernelWarning(UserWarning):
    """A layer does not run on a kernel although it was meant to. The message names the layer and the reason."""


class ProjectionGroup(Protocol):
    """The layers that share one fused weight (``fused_projections.FusedProjections``), as one of them sees it."""

    def fuse(self) -> bool:
        """Fuse the weights of the layers. Return False if that is not possible."""
        ...

    def unfuse(self) -> None:
        """Give every layer its own weight; the layers remain a group."""

    def disband(self) -> None:
        """Give every layer its own weight and dissolve the group."""


@dataclass(eq=False)
class Packing:
    """The state of a ``PackedLinear`` besides its packed weight.

    Attributes:
        description: the weight as it was described to the kernel, without its codes and its bias.
        kernel: the kernel that built the packed weight.
        former: the class of the module before packing.
        undo: restores the module to what it was before packing.
        parameters: the names of all parameters before packing, in order.
        replaced: name -> shape, dtype and ``requires_grad`` of those parameters that the packed weight replaces.
        attributes: instance attributes that would have overridden ``PackedLinear.forward``.
        failure: why the layer runs dense; empty while it runs on the kernel.
        group: the layers it is fused with (see ``fused_projections``), or None.
        fusion_tried: True once such layers have been searched for.
        norm: the norm that quantizes for this layer (see ``fused_norm``), or None.
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
        """Make the norm before the layer an ordinary norm again."""
        if self.norm is not None:
            # Another layer that reads the same norm may already have unfused it.
            if hasattr(self.norm, "unfuse"):
                self.norm.unfuse()
            self.norm = None


def _reject(input: Tensor) -> bool:
    return False


class DecodedWeight(Tensor):
    """The read-only value of ``PackedLinear.weight``. Results of operations on it are plain tensors.

    It is created in inference mode, so in-place operations on it raise ``RuntimeError``. ``weight.data = ...`` (and
    ``weight.data += ...``, which merges adapters) raises ``ModelError``.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """A copy of the values."""
        return self.clone()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ModelError(
            "this layer holds only a compressed weight, which cannot be written to: call hf_optim.restore(model) first"
        )


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` without a dense weight: its ``packed_weight`` computes the product and can return the codes.

    ``hf_optim.accelerate`` creates one from an existing module by changing its class, so the module remains the same
    object, with its hooks and its bias. ``weight`` is decoded at every read (``out * in`` numbers in the layer's dtype,
    which are not cached): correct but slow, and writing to it raises. An input that the packed weight does not accept
    (another dtype or device) is multiplied with a weight decoded for that call. The same holds for every input once the
    packed weight has raised an exception, after one ``KernelWarning``.
    """

    packed_weight: nn.Module
    packing: Packing
    _run: Any
    _accepts: Any

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Decode the dense weight ``[out, in]``. Writing to it, as merging an adapter does, raises."""
        with torch.inference_mode():
            return self.decoded().clone().as_subclass(DecodedWeight)

    def decoded(self) -> Tensor:
        """Decode the dense weight ``[out, in]`` into an ordinary tensor."""
        description = self.packing.description
        return decode(self.codes(), description.bits, description.dtype)

    def codes(self) -> Codes:
        """Unpack the codes of the weight."""
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
            if isinstance(input, FakeTensor):  # the model is being traced, which says nothing about the kernel
                return input.new_empty((*input.shape[:-1], self.out_features))
            # If the input is at fault, the dense product raises here.
            output = self.dense(input)
            self.fail(f"{self.packing.kernel.name} raised {first_line(error, typed=True)}")
            return output
        bias = self._parameters["bias"]
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            # The packed weight added the bias without a gradient; adding zero attaches it.
            output = output + (bias - bias.detach())
        return output

    def rotated_forward(self, input: Tensor, block: int) -> Tensor | None:
        """Return ``forward`` of Hadamard transforms of ``input``, rotated and quantized in one pass over it.

        Args:
            input: [..., in].
            block: neighbouring channels that are transformed together.

        Returns [..., out]; None where the packed weight does not do that, and where hooks must see the input.
        """
        run = getattr(self._modules[PACKED_WEIGHT], "rotated_forward", None)
        bias = self._parameters["bias"]
        if run is None or self._forward_pre_hooks or self._forward_hooks or not self._accepts(input):
            return None
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return None
        found: Tensor | None = run(input, block)
        return found

    def dense(self, input: Tensor) -> Tensor:
        """Multiply with a weight decoded for this call; the input is quantized according to the layer's scheme."""
        scheme = getattr(self, "quantization_scheme", None)
        if scheme is not None and scheme.input_activations is not None:
            from ..codec import quantize_input

            # compressed-tensors recognizes tokens only in three dimensions; in two, all would share one scale.
            flat = input.dim() == 2
            input = quantize_input(self, input[None] if flat else input)
            input = input[0] if flat else input
        return F.linear(input, self.decoded(), self.bias)

    def fail(self, reason: str) -> None:
        """Fall back to the dense path until the layer is packed again, and warn."""
        self.packing.failure = reason
        self.refresh()
        text = f"{self.packing.description.name} falls back to the dense path: {reason}"
        warnings.warn(text, KernelWarning, stacklevel=4)

    def refresh(self) -> None:
        """Cache the methods that ``forward`` calls, and let the packed weight share the layer's bias."""
        packed_weight: Any = self._modules[PACKED_WEIGHT]
        bias = self._parameters["bias"]
        if isinstance(packed_weight, FusedSlice):
            packed_weight.share_bias(bias)
        elif bias is not None and packed_weight._buffers.get("bias") is not None:
            packed_weight._buffers["bias"] = bias.detach()
            if hasattr(packed_weight, "renew"):
                packed_weight.renew()
        # In the instance dict: set without nn.Module.__setattr__, and found without nn.Module.__getattr__.
        self.__dict__["_run"] = packed_weight.forward
        self.__dict__["_accepts"] = _reject if self.packing.failure else packed_weight.accepts

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "bias":
            self.refresh()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In a copy of the model, parameters are copied one by one, so the packed weight's bias is another tensor.
        super().__setstate__(state)
        self.packing = replace(self.packing)
        self.refresh()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        before = self.packing.description
        target = fn(torch.empty(0, dtype=before.dtype, device=before.device))
        moves = target.dtype != before.dtype or target.device != before.device
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
        # Scales belong to the codes: they move to another device, but are never rounded to another dtype.
        packed_weight._apply(lambda tensor: moved(fn, tensor))
        self.refresh()
        if moves:
            self.packing.description = replace(before, dtype=target.dtype, device=target.device)
            changed = target.dtype != before.dtype or target.device.type != before.device.type
            if changed and target.device.type != "meta":
                self._prepack_again()
            if group is not None:
                group.fuse()  # succeeds once the last layer of the group has moved
        return self

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """Return the state dict as for any module, but with a weight that is not quantized as the dense ``weight``."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.packing.description.kind == "dense":
            for key in [key for key in state if key.startswith(f"{prefix}{PACKED_WEIGHT}.")]:
                del state[key]
            state[f"{prefix}weight"] = self.decoded()
        return state

    def _prepack_again(self) -> None:
        """Prepack the weight again, for the current dtype and device of the layer."""
        bias = self._parameters["bias"]
        weight = replace(self.packing.description, bias=None if bias is None else bias.detach(), codes=self.codes)
        reason = self.packing.kernel.check(weight)
        if reason is None:
            try:
                self._modules[PACKED_WEIGHT] = self.packing.kernel.prepack(weight)
            except ValueError as error:
                reason = str(error)
        if reason is None:
            self.packing.failure = ""
            self.refresh()
        else:
            self.fail(f"it moved to {weight.dtype} on {weight.device}, {self.packing.kernel.name}: {reason}")


def moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply ``fn`` but keep the dtype."""
    result = fn(tensor)
    return result if result.dtype == tensor.dtype else tensor.to(result.device)
