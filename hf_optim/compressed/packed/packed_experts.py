"""``PackedExperts``: a module of experts that holds their matrices only in the layout of a kernel.

``accelerate`` and the loader make one of an existing module by changing its class, as of a layer (``packed_linear``):
it stays the same object, and what a router or a capacity reads of it (``num_experts``, ``has_gate``, ``_apply_gate``,
``act_fn`` and the others) is its own. The stacked parameters become buffers of a submodule, which returns the codes
bit-exactly: saving, ``restore`` and every fallback follow from them, one expert at a time.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from ...toolkit.experts.routed_model import experts_forward
from ...toolkit.topology.experts import DOWN, PACKED_SHAPES, UP
from ...trust.bounds import first_line
from ..codes import decode
from ..experts import PACKED_EXPERTS, expert_schemes
from ..weights import Codes, QuantizedExperts, QuantizedWeight
from .packed_linear import CHECKPOINT, DecodedWeight, KernelWarning, moved

if TYPE_CHECKING:
    from .kernel import Kernel

# Marks experts that a checkpoint has in gpt-oss's layout (``mxfp4_experts``), in which they are saved again.
NATIVE = "_hf_optim_native"
SIDES = {"gate_up_proj": "up", "up_proj": "up", "down_proj": "down"}


@dataclass(eq=False)
class ExpertPacking:
    """The state of ``PackedExperts`` besides its packed weights.

    Attributes:
        description: the experts as they were described to the kernel, without their codes.
        kernel: the kernel that built the packed weights.
        former: the class of the module before packing.
        undo: restores the module to what it was before packing.
        parameters: the names of all parameters before packing, in order.
        replaced: name -> ``requires_grad`` of the stacked parameters.
        failure: why the experts are decoded for each call; empty while they run on the kernel.
    """

    description: QuantizedExperts
    kernel: Kernel
    former: type[nn.Module]
    undo: Callable[[Any], None]
    parameters: tuple[str, ...]
    replaced: dict[str, bool]
    failure: str = ""


class PackedExperts(nn.Module):
    """A module of experts without stacked parameters. Its class also inherits from that of the former module.

    ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` are decoded at every read: correct, but a dense copy of all
    experts, and writing to it raises.
    """

    packing: ExpertPacking
    has_gate: bool
    is_transposed: bool
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the experts: hidden ``[T, d]``, index int64 and weights ``[T, k]``; returns ``[T, d]``."""
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)

    def mixture_product(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Return the product of the mixture ``[T, d]``; arguments as of ``toolkit.experts.expert_product``."""
        packed: Any = self._modules[PACKED_EXPERTS]
        if self.packing.failure or not packed.accepts(hidden):
            return self.decoded_product(hidden, experts, weights)
        try:
            return packed(hidden, experts, weights, *self._between(experts.reshape(-1)))
        except Exception as error:
            if type(error).__module__ == CHECKPOINT:
                raise
            if isinstance(hidden, FakeTensor):  # the model is being traced, which says nothing about the kernel
                return torch.empty_like(hidden)
            # If the input is at fault, the decoded product raises here.
            output = self.decoded_product(hidden, experts, weights)
            self.fail(f"{self.packing.kernel.name} raised {first_line(error, typed=True)}")
            return output

    def _between(self, numbers: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
        """Return what is applied behind the first product of pairs, and behind the second one (or None).

        The biases of experts are part of both. ``numbers``: int64 ``[n]``, the expert of each pair.
        """
        activation = self._apply_gate if self.has_gate else self.act_fn
        norm: Any = getattr(self, "post_expert_norm", None) if getattr(self, "has_post_expert_norm", False) else None
        if not getattr(self, "has_bias", False):
            return activation, norm
        up, down = (self.get_parameter(f"{name}_bias") for name in self.matrices())
        computed = ((numbers >= 0) & (numbers < len(up)))[:, None]
        chosen = numbers.clamp(0, len(up) - 1)

        def first(pairs: Tensor) -> Tensor:
            return activation(pairs + up[chosen].to(pairs.dtype))

        def second(pairs: Tensor) -> Tensor:
            # A pair that no expert computes stays zero.
            out = pairs + (down[chosen] * computed).to(pairs.dtype)
            return out if norm is None else norm(out)

        return first, second

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Return ``(E, out, in)`` of each stacked matrix, by name."""
        return dict(vars(self)[PACKED_SHAPES])

    def decoded_product(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Return the same with every chosen expert decoded for this call, one after the other."""
        up, down = self.matrices()
        parts = []
        numbers = experts.reshape(-1)
        top_k = experts.shape[1]
        chosen = [int(e) for e in numbers.unique().tolist() if 0 <= e < self.packing.description.count]
        for expert in chosen:
            pairs = (numbers == expert).nonzero()[:, 0]
            activation, norm = self._between(numbers[pairs])
            inner = activation(self._linear(hidden[pairs // top_k], up, expert))
            out = self._linear(inner, down, expert)
            out = (out if norm is None else norm(out)) * weights.reshape(-1)[pairs, None]
            parts.append((pairs // top_k, out))
        total = torch.zeros(hidden.shape, dtype=torch.promote_types(hidden.dtype, weights.dtype), device=hidden.device)
        for tokens, out in parts:
            total = total.index_add(0, tokens, out.to(total.dtype))
        return total.to(hidden.dtype)

    def _linear(self, x: Tensor, parameter: str, expert: int) -> Tensor:
        matrix = self._described(parameter)
        parts = self._codes(parameter, expert)
        inputs = [_rounded(x, expert_schemes(self)[parameter], part) for part in parts]
        rows = [decode(part, matrix.bits, matrix.dtype).to(x.dtype) for part in parts]
        return torch.cat([F.linear(own, weight) for own, weight in zip(inputs, rows, strict=True)], dim=-1)

    def matrices(self) -> tuple[str, str]:
        """Return the names of the matrices, in the order in which a token passes through them."""
        return (UP[0] if self.has_gate else UP[1]), DOWN

    def _described(self, parameter: str) -> QuantizedWeight:
        return getattr(self.packing.description, SIDES[parameter])

    def _codes(self, parameter: str, expert: int) -> list[Codes]:
        packed: Any = self._modules[PACKED_EXPERTS]
        return packed.codes(SIDES[parameter], expert)

    def codes(self, parameter: str, expert: int) -> Codes:
        """Unpack the codes of one matrix ``[out, in]``, whose columns are not reordered."""
        parts = self._codes(parameter, expert)
        zeros = [part.zero for part in parts if part.zero is not None]
        zero = torch.cat(zeros) if len(zeros) == len(parts) else None
        scales = [part.scale for part in parts if part.scale is not None]
        # Kernels of other packages may return codes without it.
        shared: list[Any] = [getattr(part, "global_scale", None) for part in parts]
        column = None if any(each is None for each in shared) else torch.cat(shared)
        return Codes(torch.cat([part.codes for part in parts]), torch.cat(scales), zero, global_scale=column)

    def decoded(self, parameter: str) -> Tensor:
        """Decode the stacked parameter: ``[E, out, in]``, or ``[E, in, out]`` of a transposed module."""
        count, rows, columns = vars(self)[PACKED_SHAPES][parameter]
        matrix = self._described(parameter)
        stacked = torch.empty(count, rows, columns, dtype=matrix.dtype, device=matrix.device)
        for expert in range(count):
            parts = self._codes(parameter, expert)
            stacked[expert] = torch.cat([decode(part, matrix.bits, matrix.dtype) for part in parts])
        return stacked.transpose(1, 2).contiguous() if self.is_transposed else stacked

    def fail(self, reason: str) -> None:
        """Decode the experts for each call until they are packed again, and warn."""
        self.packing.failure = reason
        text = f"{self.packing.description.name} falls back to experts that are decoded for each call: {reason}"
        warnings.warn(text, KernelWarning, stacklevel=4)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        before = self.packing.description.up
        target = fn(torch.empty(0, dtype=before.dtype, device=before.device))
        packed: Any = self._modules.pop(PACKED_EXPERTS)
        try:
            super()._apply(fn, recurse)
        finally:
            self._modules[PACKED_EXPERTS] = packed
        # Scales belong to the codes: they move to another device, but are never rounded to another dtype.
        packed._apply(lambda tensor: moved(fn, tensor))
        if target.dtype != before.dtype or target.device != before.device:
            own = self.packing.description
            up = replace(own.up, dtype=target.dtype, device=target.device)
            own = replace(own, up=up, down=replace(own.down, dtype=target.dtype, device=target.device))
            self.packing.description = own
            changed = target.dtype != before.dtype or target.device.type != before.device.type
            if changed and target.device.type != "meta":
                self._prepack_again(replace(own, codes=packed.codes))
        return self

    def _prepack_again(self, weight: QuantizedExperts) -> None:
        """Pack the experts again, for the current dtype and device of the module."""
        kernel = self.packing.kernel
        reason = kernel.check_experts(weight)
        if reason is None and kernel.prepack_experts is not None:
            try:
                self._modules[PACKED_EXPERTS] = kernel.prepack_experts(weight)
                self.packing.failure = ""
                return
            except ValueError as error:
                reason = str(error)
        self.fail(f"they moved to {weight.up.dtype} on {weight.up.device}, {kernel.name}: {reason}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packing = replace(self.packing)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.packing.former,), vars(self)


def _rounded(x: Tensor, scheme: Any, part: Codes) -> Tensor:
    """Return inputs ``[n, in]`` rounded as a scheme says."""
    if scheme.input_activations is None:
        return x
    from ..state import input_quantizer

    # compressed-tensors recognizes tokens only in three dimensions; in two, all would share one scale.
    return input_quantizer(scheme, part.input_scale, part.input_zero)(x[None])[0]


def _matrix(name: str) -> property:
    def read(self: PackedExperts) -> Tensor:
        if name not in vars(self).get(PACKED_SHAPES, ()):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with torch.inference_mode():
            return self.decoded(name).clone().as_subclass(DecodedWeight)

    return property(read)


@functools.cache
def packed_class(former: Any) -> type[PackedExperts]:
    """Return the class of packed experts that were of the class ``former``, under the same name."""
    body = {name: _matrix(name) for name in SIDES}
    own: Any = {"__module__": former.__module__, "__qualname__": former.__qualname__, **body}
    return type(former.__name__, (PackedExperts, former), own)


def _rebuild(former: Any) -> PackedExperts:
    """Return an empty module, for copies and pickles of a model."""
    cls = packed_class(former)
    return cls.__new__(cls)
