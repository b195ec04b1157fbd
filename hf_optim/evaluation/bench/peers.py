"""Peers: operators of other libraries for the same product, each only if its package is installed.

A peer packs a random dense weight in its own format and multiplies. Its error is measured against the float64 product
of the dense weight, and so includes its quantization error: it shows that the peer computes the right product, not how
accurate it is.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 128
OUTLIERS = 8
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class MatmulProblem:
    """A matrix product to time: a dense weight ``[out, in]`` and inputs ``[rows, in]`` on the device."""

    weight: Tensor
    x: Tensor

    @classmethod
    def random(cls, op: str, N: int, K: int, M: int, dtype: torch.dtype, device: torch.device) -> MatmulProblem:
        """Draw normal weights (2:4 sparse for ``sparse24``) and inputs (with outlier columns for ``llm_int8``)."""
        weight = torch.randn(N, K, device=device, dtype=dtype) * 0.02
        x = torch.randn(M, K, device=device, dtype=dtype)
        if op == "sparse24":
            weight = prune24(weight)
        if op == "llm_int8":
            x[:, :: max(1, K // OUTLIERS)] *= 20
        return cls(weight, x)

    @property
    def flops(self) -> int:
        """Multiplications and additions of the product."""
        return 2 * self.x.shape[0] * self.weight.numel()


@dataclass(frozen=True, eq=False)
class Peer:
    """An operator of another library.

    Attributes:
        name: its name in tables.
        package: the distribution that must be installed; None for operators of PyTorch.
        ops: the operators it is compared with; empty for all.
        bits: bits per weight that it must read.
        prepare: packs a weight and returns the product with it.
        math: data type whose matrix rate bounds it.
        graph: True if it can be captured in a CUDA graph.
        dense: True for the product with the unquantized weight.
        part: True if it does only part of the work, so that its output is not the product with ``weight``.
    """

    name: str
    package: str | None
    ops: tuple[str, ...]
    bits: float
    prepare: Callable[[Tensor], Product]
    math: str = "bfloat16"
    graph: bool = True
    dense: bool = False
    part: bool = False

    @property
    def role(self) -> Literal["dense", "peer", "part"]:
        """The role of its rows, see ``OpResult``."""
        return "dense" if self.dense else "part" if self.part else "peer"

    def missing(self) -> str:
        """Return why it cannot be timed, or an empty string."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return ""
        return f"{self.package} is not installed"

    def contender(self, problem: MatmulProblem, tools: Any) -> Any:
        """Build the contender for a problem, over several copies of the weight. Errors of the peer are not caught."""
        size = int(problem.weight.numel() * self.bits / 8)
        products = [self.prepare(problem.weight) for _ in range(tools.copies_for(size))]
        reference = problem.x.double() @ problem.weight.double().T if not self.part else None
        calls = [_Call(product, problem.x) for product in products]
        return tools.Contender(
            self.name, calls, size, problem.flops, reference, math=self.math, graph=self.graph, dense=self.dense
        )


@dataclass(frozen=True, eq=False)
class _Call:
    product: Product
    x: Tensor

    def __call__(self) -> Tensor:
        with torch.inference_mode():
            return self.product(self.x)


def peers_for(op: str) -> list[Peer]:
    """Return the peers that an operator is compared with, the dense product first."""
    return [peer for peer in PEERS if not peer.ops or op in peer.ops]


def installed_packages() -> list[str]:
    """Return the installed distributions among those of the peers."""
    return [name for name in dict.fromkeys(p.package for p in PEERS) if name and importlib.util.find_spec(name)]


def make_linear(weight: Tensor) -> nn.Linear:
    """Return an ``nn.Linear`` without bias that holds a copy of the weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def prune24(weight: Tensor) -> Tensor:
    """Return the weight ``[out, in]`` pruned 2:4: the two largest magnitudes of every four columns are kept."""
    groups = weight.view(len(weight), -1, 4)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.abs().topk(2, dim=-1).indices, True)
    return (groups * kept).view_as(weight)


def quantize_int4(weight: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes in [0, 16), and scale and offset per group: ``weight ~ (codes - 8) * scale + offset``."""
    grouped = weight.float().view(len(weight), -1, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-6)
    codes = ((grouped - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.uint8)
    return codes.view_as(weight), scale, low + 8 * scale


def _dense(weight: Tensor) -> Product:
    return make_linear(weight)


def _int4pack(weight: Tensor) -> Product:
    codes, scale, offset = quantize_int4(weight)
    pair = torch.stack((scale, offset), -1).transpose(0, 1).contiguous().to(weight.dtype)
    if weight.is_cuda:
        packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, pair)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, pair)


def _int_mm(weight: Tensor) -> Product:
    """Prepare the integer product alone, of inputs quantized beforehand: the best that a library call can do."""
    scale = weight.abs().amax(1, keepdim=True).float() / 127
    codes = (weight.float() / scale).round().to(torch.int8)
    quantized: dict[int, Tensor] = {}

    def product(x: Tensor) -> Tensor:
        if id(x) not in quantized:
            quantized[id(x)] = (x.float() / x.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)
        return torch._int_mm(quantized[id(x)], codes.T)

    return product


def _sparse24(weight: Tensor) -> Product:
    sparse = torch.sparse.to_sparse_semi_structured(weight.clone())
    return lambda x: F.linear(x, sparse)


def _torchao(weight: Tensor, config: Any) -> Product:
    from torchao.quantization import quantize_

    layer = make_linear(weight)
    quantize_(layer, config)
    return layer


def _torchao_int4(weight: Tensor) -> Product:
    from torchao.quantization import Int4WeightOnlyConfig

    settings = {"group_size": GROUP, "int4_packing_format": "tile_packed_to_4d", "set_inductor_config": False}
    return _torchao(weight, Int4WeightOnlyConfig(**settings))


def _torchao_int8(weight: Tensor) -> Product:
    """Prepare the compiled layer, as the documentation of torchao recommends.

    Without compilation, the quantization of the inputs takes many small kernels.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    torch.compiler.reset()
    return torch.compile(
        _torchao(weight, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)), dynamic=False
    )


def _nf4(weight: Tensor) -> Product:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    layer.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    return layer.to(weight.device)


def _bnb_int8(weight: Tensor) -> Product:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to(weight.device).eval()
    # It multiplies in float16, whatever the dtype of the input.
    return lambda x: layer(x.to(torch.float16)).to(x.dtype)


def _gemlite_int4(weight: Tensor) -> Product:
    from gemlite.helper import A16W4_HQQ_INT

    codes, scale, offset = quantize_int4(weight)
    zero = 8 - offset / scale
    packer = A16W4_HQQ_INT(device=str(weight.device), dtype=weight.dtype)
    return packer.from_weights(codes, scale.reshape(-1, 1), zero.reshape(-1, 1))


def _gemlite_int8(weight: Tensor) -> Product:
    from gemlite.helper import A8W8_int8_dynamic

    packer = A8W8_int8_dynamic(device=str(weight.device), dtype=weight.dtype)
    return packer.from_weights(weight.clone())


INT4 = 4 + 32 / GROUP
PEERS = (
    Peer("dense", None, (), 16, _dense, dense=True),
    Peer("torch int4pack", None, ("wna16",), INT4, _int4pack),
    Peer("torchao int4", "torchao", ("wna16",), INT4, _torchao_int4),
    Peer("bitsandbytes nf4", "bitsandbytes", ("wna16",), 4.5, _nf4),
    Peer("gemlite A16W4", "gemlite", ("wna16",), INT4, _gemlite_int4),
    Peer("torch _int_mm (product alone)", None, ("w8a8", "llm_int8"), 8, _int_mm, math="int8", part=True),
    Peer("torchao int8 (compiled)", "torchao", ("w8a8",), 8, _torchao_int8, math="int8"),
    Peer("gemlite A8W8", "gemlite", ("w8a8",), 8, _gemlite_int8, math="int8"),
    # Not capturable with outliers: it reads their columns back from the device.
    Peer("bitsandbytes LLM.int8", "bitsandbytes", ("llm_int8",), 8, _bnb_int8, math="int8", graph=False),
    Peer("torch 2:4", None, ("sparse24",), 16 * 9 / 16, _sparse24),
)
