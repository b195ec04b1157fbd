"""Binding a quantized ``nn.Linear``: which modules are served, their integer codes, and the layer that runs them.

A module in memory holds the dequantized ``weight`` [out, in] with ``weight_scale`` [out, groups] (or [out, 1], or one
number), ``weight_zero_point`` of the same shape where the grid is asymmetric, and ``quantization_scheme`` (of
compressed-tensors, of which only the attributes are read here). The codes follow from these.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import util
from typing import Any

import torch
from torch import Tensor, nn

from . import cpu, naive, op

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STRATEGIES = ("tensor", "channel", "group")
# Where the Triton kernel beats the dense product of float16 or bfloat16 (bench.py, H200: 1.2 to 1.4 times, in a graph).
MOST_ROWS = 32
LEAST_WEIGHTS = 1 << 24


@dataclass(frozen=True)
class Codes:
    """A quantized weight: ``(codes - zero) * scale``.

    Attributes:
        codes: uint8 [out, in], in [0, 2^width).
        scale: float32 [out, groups].
        zero: float32 [out, groups], whole numbers; None where it is 2^(width - 1) everywhere.
        width: 4 or 8.
        group_size: columns of a group.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    width: int
    group_size: int


def serves(name: str, module: nn.Module) -> str | None:
    """None where the module can run here, else why not; the empty string for a module that is not quantized."""
    scheme = getattr(module, "quantization_scheme", None)
    args = getattr(scheme, "weights", None)
    if args is None:
        return ""
    for what in ("input_activations", "output_activations"):
        if getattr(scheme, what, None) is not None:
            return f"its {what.replace('_', ' ')} are quantized, this kernel is for weights only"
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return f"a {type(module).__name__} is not laid out as nn.Linear"
    return _grid_refusal(module, args) or _weight_refusal(module) or _device_refusal(module)


def _grid_refusal(module: nn.Module, args: Any) -> str | None:
    if _plain(args.type) != "int" or not 2 <= args.num_bits <= 8:
        return f"{args.num_bits}-bit {_plain(args.type)} codes; served are integers of 2 to 8 bits"
    if _plain(args.strategy) not in STRATEGIES:
        return f"scales per {_plain(args.strategy)}; served are {', '.join(STRATEGIES)}"
    if getattr(module, "weight_g_idx", None) is not None:
        return "its groups are of scattered columns (weight_g_idx)"
    if getattr(module, "weight_scale", None) is None:
        return "it has no weight_scale"
    return None


def _weight_refusal(module: nn.Linear) -> str | None:
    weight = getattr(module, "weight", None)
    if weight is None:
        return "its weight is still compressed"
    if weight.is_meta:
        return "its weight is offloaded"
    if weight.dtype not in DTYPES:
        return f"{_name(weight.dtype)} weights"
    return None


def _device_refusal(module: nn.Linear) -> str | None:
    device = module.weight.device
    if device.type == "cpu":
        args = _args(module)
        return cpu.refusal(module.weight, args.num_bits, _group_size(module), bool(args.symmetric))
    if device.type != "cuda":
        return f"no kernel for {device.type} devices"
    if util.find_spec("triton") is None:
        return "Triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernel needs compute capability 8.0, this GPU has {major}.{minor}"
    return _gpu_refusal(module)


def _gpu_refusal(module: nn.Linear) -> str | None:
    """Where the Triton kernel is right but was not measured to be faster than the dense product."""
    bits, group_size = _args(module).num_bits, _group_size(module)
    rows, columns = module.weight.shape
    if bits > 4 or module.weight.dtype == torch.float32:
        return "on a GPU, packed pays for codes of up to 4 bits with 16-bit activations"
    if group_size < columns and group_size % 16:
        return f"groups of {group_size} columns are no multiple of 16"
    if rows * columns < LEAST_WEIGHTS:
        return f"a layer of {rows * columns:,} weights is faster dense (packed pays from {LEAST_WEIGHTS:,})"
    return None


def bind(module: nn.Linear) -> nn.Module:
    """The layer that stands in for ``module.forward``. Raises ``ValueError`` when the weight is not on its grid."""
    found = codes_of(module)
    if module.weight.device.type == "cpu":
        return cpu.PackedLinear(found.codes, found.scale, found.zero, module.bias, found.width, module.weight)
    bound = PackedLinear(found, module.bias, module.weight.dtype)
    # Compiles the kernel now: a CUDA graph that is being captured must not load code.
    for rows in (1, MOST_ROWS):
        bound(module.weight.new_zeros(rows, module.weight.shape[1]))
    return bound


@torch.no_grad()
def codes_of(module: nn.Linear) -> Codes:
    """The integer codes of a dequantized weight. Raises ``ValueError`` when the weight is not on its grid.

    They are the codes it was made of, but for asymmetric codes of 8 bits in bfloat16, which has too few digits to tell
    255 steps apart: there a code may be one off, which moves the weight by no more than bfloat16 had rounded it.
    """
    args = _args(module)
    weight = module.weight.float()
    rows, columns = weight.shape
    stored: Any = module.weight_scale
    group_size = _group_size(module)
    width = 4 if args.num_bits <= 4 else 8
    shape = (rows, -(-columns // group_size))
    scale = _spread(stored, shape)
    points: Any = None if args.symmetric else module.weight_zero_point
    zero_point = None if points is None else _spread(points, shape)
    grouped = weight.view(rows, shape[1], group_size)
    # A group of zeros may have scale 0; its codes are then the zero point.
    steps = torch.where(scale[..., None] == 0, 0.0, grouped / scale[..., None]).round()
    signed = steps if zero_point is None else steps + zero_point[..., None]
    low = -(2 ** (args.num_bits - 1))
    signed = signed.clamp(low, -low - 1)
    again = (signed if zero_point is None else signed - zero_point[..., None]) * scale[..., None]
    # The stored weight was rounded to its type: half a unit in the last place, twice that for products in that type.
    finfo = torch.finfo(module.weight.dtype)
    allowed = grouped.abs() * finfo.eps + finfo.tiny
    if not bool(((again - grouped).abs() <= allowed).all()):
        raise ValueError("its weight is not on the grid of its scales (changed since it was quantized?)")
    offset = 2 ** (width - 1)
    codes = (signed + offset).to(torch.uint8).view(rows, columns)
    return Codes(codes, scale, None if zero_point is None else zero_point + offset, width, group_size)


class PackedLinear(nn.Module):
    """``x W^T + bias`` on ``hf_optim::wna16``.

    The Triton kernel is two launches through Python, 60 to 100 microseconds of the host where a dense product of 60
    million weights takes 33. So it is taken inside graphs alone: ``torch.compile`` (``generate`` with a static cache
    uses it) and CUDA graphs. Called eagerly, the layer stays dense.

    Attributes:
        packed: uint8 [out, bytes], see ``naive.pack``.
        scale, zero: [groups, out].
    """

    def __init__(self, found: Codes, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.group_size, self.dtype = found.width, found.group_size, dtype
        self.label = f"wna16 Triton, {found.width}-bit (in graphs, up to {MOST_ROWS} rows)"
        self.register_buffer("packed", naive.pack(found.codes, found.width, found.group_size))
        scale, short = found.scale.T.contiguous(), found.scale.T.contiguous().to(dtype)
        self.register_buffer("scale", short if torch.equal(short.float(), scale) else scale)
        self.register_buffer("zero", None if found.zero is None else found.zero.T.to(torch.int16).contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel is right for this input, and faster than the dense product."""
        rows = x.numel() // x.shape[-1] if x.numel() else 0
        same = x.dtype == self.dtype and x.device == self.packed.device
        fits = same and 0 < rows <= MOST_ROWS and not torch.is_autocast_enabled(x.device.type)
        return fits and (torch.compiler.is_compiling() or not x.is_cuda or torch.cuda.is_current_stream_capturing())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        return op.wna16(x, self.packed, self.scale, self.zero, self.bias, self.width, self.group_size)


def _args(module: nn.Module) -> Any:
    """How the weight is quantized: compressed-tensors' ``QuantizationArgs``."""
    scheme: Any = module.quantization_scheme
    return scheme.weights


def _group_size(module: nn.Linear) -> int:
    args = _args(module)
    return int(args.group_size) if _plain(args.strategy) == "group" else module.weight.shape[1]


def _spread(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Scales or zero points, per tensor, channel or group, as float32 [out, groups]."""
    values = values.detach().float()
    values = values.view(-1, 1) if values.dim() < 2 else values
    if values.shape[0] not in (1, shape[0]) or values.shape[1] not in (1, shape[1]):
        raise ValueError(f"its scales are {list(values.shape)}, expected {list(shape)}")
    return values.expand(shape).contiguous()


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
