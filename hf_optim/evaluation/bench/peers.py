"""Other people's ways to do the same product, each only where its package is installed.

A peer packs a random dense weight in its own way and multiplies. Its error is against the float64 product of the dense
weight, so it has the error of its codes in it: it shows that the peer computes the right thing, not how well.
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
class Problem:
    """A dense weight ``[out, in]`` and inputs ``[rows, in]`` on the device."""

    weight: Tensor
    x: Tensor

    @classmethod
    def random(cls, op: str, N: int, K: int, M: int, dtype: torch.dtype, device: torch.device) -> Problem:
        """Normal weights (2:4 sparse for that operator) and inputs (with large columns for LLM.int8)."""
        weight = torch.randn(N, K, device=device, dtype=dtype) * 0.02
        x = torch.randn(M, K, device=device, dtype=dtype)
        if op == "sparse24":
            weight = prune24(weight)
        if op == "llm_int8":
            x[:, :: max(1, K // OUTLIERS)] *= 20
        return cls(weight, x)

    @property
    def flops(self) -> int:
        return 2 * self.x.shape[0] * self.weight.numel()


@dataclass(frozen=True, eq=False)
class Peer:
    """One peer.

    Attributes:
        name: what a table prints.
        package: the distribution that must be installed; None for PyTorch's own operators.
        ops: the operators it is compared with; empty: all.
        bits: of its codes, for the bytes that it must read.
        prepare: packs a weight and gives the product with it.
        math: type of the matrix rate that bounds it.
        graph: whether a CUDA graph can hold it.
        dense: the product of the weight as it is.
        part: it does a part of the work alone, and its output is no product of ``weight``.
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
        return "dense" if self.dense else "part" if self.part else "peer"

    def missing(self) -> str:
        """Why it cannot take part; empty if it can."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return ""
        return f"{self.package} is not installed"

    def contender(self, task: Problem, tools: Any) -> Any:
        """The work over several copies of the weight. Raises whatever the peer raises."""
        size = int(task.weight.numel() * self.bits / 8)
        products = [self.prepare(task.weight) for _ in range(tools.copies_for(size))]
        reference = task.x.double() @ task.weight.double().T if not self.part else None
        calls = [_Call(product, task.x) for product in products]
        return tools.Contender(
            self.name, calls, size, task.flops, reference, math=self.math, graph=self.graph, dense=self.dense
        )


@dataclass(frozen=True, eq=False)
class _Call:
    product: Product
    x: Tensor

    def __call__(self) -> Tensor:
        with torch.inference_mode():
            return self.product(self.x)


def peers_for(op: str) -> list[Peer]:
    """The peers that an operator is compared with, the dense product first."""
    return [peer for peer in PEERS if not peer.ops or op in peer.ops]


def packages() -> list[str]:
    """Distributions of the peers that are installed."""
    return [name for name in dict.fromkeys(p.package for p in PEERS) if name and importlib.util.find_spec(name)]


def linear(weight: Tensor) -> nn.Linear:
    """An ``nn.Linear`` with a copy of the weight, without a bias."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return made


def prune24(weight: Tensor) -> Tensor:
    """The two largest magnitudes of every four columns of ``[out, in]``."""
    fours = weight.view(len(weight), -1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, fours.abs().topk(2, dim=-1).indices, True)
    return (fours * kept).view_as(weight)


def quantize4(weight: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest codes in [0, 16), scales and minima per group: ``weight ~ (codes - 8) * scale + middle``."""
    grouped = weight.float().view(len(weight), -1, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-6)
    codes = ((grouped - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.uint8)
    return codes.view_as(weight), scale, low + 8 * scale


def _dense(weight: Tensor) -> Product:
    return linear(weight)


def _int4pack(weight: Tensor) -> Product:
    codes, scale, middle = quantize4(weight)
    pair = torch.stack((scale, middle), -1).transpose(0, 1).contiguous().to(weight.dtype)
    if weight.is_cuda:
        packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, pair)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, pair)


def _int_mm(weight: Tensor) -> Product:
    """The integer product alone, of codes made beforehand: what a library call can do at best."""
    scale = weight.abs().amax(1, keepdim=True).float() / 127
    codes = (weight.float() / scale).round().to(torch.int8)
    held: dict[int, Tensor] = {}

    def product(x: Tensor) -> Tensor:
        if id(x) not in held:
            held[id(x)] = (x.float() / x.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)
        return torch._int_mm(held[id(x)], codes.T)

    return product


def _sparse24(weight: Tensor) -> Product:
    sparse = torch.sparse.to_sparse_semi_structured(weight.clone())
    return lambda x: F.linear(x, sparse)


def _torchao(weight: Tensor, config: Any) -> Product:
    from torchao.quantization import quantize_

    layer = linear(weight)
    quantize_(layer, config)
    return layer


def _torchao_int4(weight: Tensor) -> Product:
    from torchao.quantization import Int4WeightOnlyConfig

    settings = {"group_size": GROUP, "int4_packing_format": "tile_packed_to_4d", "set_inductor_config": False}
    return _torchao(weight, Int4WeightOnlyConfig(**settings))


def _torchao_int8(weight: Tensor) -> Product:
    """Compiled, as its documentation asks for: the quantization of the inputs is many small kernels otherwise."""
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
    # Its product is in float16, whatever it is given.
    return lambda x: layer(x.to(torch.float16)).to(x.dtype)


def _gemlite_int4(weight: Tensor) -> Product:
    from gemlite.helper import A16W4_HQQ_INT

    codes, scale, middle = quantize4(weight)
    zero = 8 - middle / scale
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
    # Without outliers it can be captured, with them it asks the device which columns they are.
    Peer("bitsandbytes LLM.int8", "bitsandbytes", ("llm_int8",), 8, _bnb_int8, math="int8", graph=False),
    Peer("torch 2:4", None, ("sparse24",), 16 * 9 / 16, _sparse24),
)
