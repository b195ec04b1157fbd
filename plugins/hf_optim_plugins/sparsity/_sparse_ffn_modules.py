"""The feed-forward layer of the Scaling Transformer (2111.12763): of each block of N units a controller picks one.

    y = (act(x W1 + b1) * m) W2 + b2,       m: one 1 in each block of N units, elsewhere 0
    m = argmax over the block of  (x C1) C2 + c

With a gate, a unit is a row of the gate, of the up and of the down projection: ``act(x Wg) * (x W1)``. In training the
choice is ``argmax(log_softmax(l) + T g)`` of Gumbel noise g, with the gradient of the softmax; only a share of calls
takes it, the others take the softmax itself as m. One draw decides for a whole call.

A unit is one row of every matrix (W2 is stored transposed), so that few tokens read the chosen rows and no others. The
units of block b are the rows b N to b N + N - 1 of all matrices. (Trax has the rows of its W2 in another order: unit j
of block b is there row j d_ff / N + b. Weights of Trax have to be put in this one.)

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hf_optim.toolkit.modules import ByEitherName, Inlet, ReplacedModules, connect

from ._sparse_ffn_codes import decode_rows, encode_rows
from ._sparse_ffn_kernel import by_kernel

COPIED_BYTES = 1 << 20
"""Of rows that are copied at a time on a CPU: they are multiplied while a cache has them."""
MOST_GATHERED = 8
"""Tokens of a call that read chosen rows alone, at most."""
SPARSE_FFN_FIELDS = {
    "act", "gated", "bias", "out_bias", "controller_bias", "controller_output", "temperature", "hard_share", "bits",
    "group",
}  # fmt: skip
SPARSE_FFN_NUMBERS = {"block": 1, "rank": 0, "neurons": 1, "width": 1, "out": 1, "gather_rows": 0}
"""Whole numbers that describe a layer, and the least value of each."""


class SparseFFN(nn.Module):
    """A feed-forward layer of which each token computes one unit per block.

    Attributes:
        up, gate: ``[units, in]``; ``gate`` only of a gated layer.
        down: ``[units, out]``.
        up_bias, gate_bias, bias: ``[units]``, ``[units]`` and ``[out]``, each if the layer has it.
        controller_in: ``[rank, in]``, C1; ``controller_out``: ``[units, rank]``, C2; ``controller_bias``: ``[units]``.
            None with blocks of one unit, where there is nothing to choose.

    Args:
        entry: the settings. ``width``, ``neurons``, ``out``, ``block`` (N), ``rank``, ``act``, ``gated``, ``bias`` (of
            units), ``out_bias``, ``controller_bias``, ``temperature``, ``hard_share``, ``controller_output`` (multiply
            by the probability of what was chosen), ``gather_rows`` (up to so many tokens read chosen rows alone),
            ``bits`` (of a stored weight; 16 for a float of any width) and ``group`` (weights with one scale).
        about: dtype and device.
    """

    up: Tensor
    down: Tensor
    down_scale: Tensor
    up_bias: Tensor | None
    gate_bias: Tensor | None
    bias: Tensor | None
    controller_in: Tensor
    controller_out: Tensor
    controller_bias: Tensor | None

    def __init__(self, entry: dict[str, Any], about: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.entry = sparse_ffn_settings(entry)
        about = about or {}
        units, width, rank = entry["neurons"], entry["width"], entry["rank"]
        self.act_fn = ACT2FN[entry["act"]]
        shapes = {
            "up": (units, width),
            "gate": (units, width) if entry["gated"] else None,
            "down": (units, entry["out"]),
        }
        self.matrices = [name for name, shape in shapes.items() if shape]
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **about)) if shape else None)
        vectors = {
            "up_bias": units * entry["bias"],
            "gate_bias": units * (entry["bias"] and entry["gated"]),
            "bias": entry["out"] * entry["out_bias"],
        }
        for name, size in vectors.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size, **about)) if size else None)
        chooses = entry["block"] > 1
        for name, shape in (("controller_in", (rank, width)), ("controller_out", (units, rank))):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **about)) if chooses else None)
        biased = chooses and entry["controller_bias"]
        self.register_parameter("controller_bias", nn.Parameter(torch.zeros(units, **about)) if biased else None)
        self.reset_parameters()
        if entry["bits"] < 16:
            self.encode_()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02, kernel_scaling: bool = False) -> None:
        """Draw weights for training from scratch.

        ``kernel_scaling`` multiplies W2 by sqrt(N), since only one of N units adds to the output.
        """
        for name in self.matrices:
            nn.init.normal_(getattr(self, name), std=std)
        if kernel_scaling:
            self.down.mul_(math.sqrt(self.entry["block"]))
        for matrix in (self.controller_in, self.controller_out):
            if matrix is not None:
                nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)

    # -- codes --------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def encode_(self, bits: int | None = None, group: int | None = None) -> None:
        """Replace the float matrices by codes of ``bits`` and scales, in place; the controller stays a float."""
        if bits is not None:
            self.entry = sparse_ffn_settings({**self.entry, "bits": bits, "group": group})
        for name in self.matrices:
            codes, scale = encode_rows(getattr(self, name), self.entry["bits"], self.entry["group"])
            delattr(self, name)
            self.register_parameter(name, None)
            self.register_buffer(f"{name}_codes", codes)
            self.register_buffer(f"{name}_scale", scale)

    def rows(self, name: str, units: Tensor | None = None) -> Tensor:
        """Return rows ``[n, columns]`` of a matrix, all of them without ``units`` int64 ``[n]``."""
        if self.entry["bits"] == 16:
            matrix = getattr(self, name)
            return matrix if units is None else matrix.index_select(0, units)
        parts = (getattr(self, f"{name}_codes"), getattr(self, f"{name}_scale"))
        if units is not None:
            parts = tuple(part.index_select(0, units) for part in parts)  # type: ignore[assignment]
        return decode_rows(*parts, self.entry["bits"])

    @property
    def weight(self) -> Tensor:
        """What stands for the last projection's weight: T5 reads its dtype."""
        return self.down if self.entry["bits"] == 16 else self.down_scale

    # -- the choice ---------------------------------------------------------------------------------------------------
    def logits(self, x: Tensor) -> Tensor:
        """Return the logits ``[T, blocks, N]`` for ``x`` ``[T, in]``; the controller is linear."""
        out = F.linear(F.linear(x, self.controller_in), self.controller_out, self.controller_bias)
        return out.view(len(x), self.entry["neurons"] // self.entry["block"], self.entry["block"])

    def training_mask(self, logits: Tensor) -> Tensor:
        """Return m ``[T, blocks, N]`` of one call in training."""
        log_mask = logits.log_softmax(-1)
        soft = log_mask.exp()
        uniform = torch.rand_like(soft).clamp(1e-6, 1 - 1e-6)
        noise = -torch.log(-torch.log(uniform))
        choice = (log_mask + self.entry["temperature"] * noise).argmax(-1, keepdim=True)
        hard = torch.zeros_like(soft).scatter(-1, choice, 1.0)
        straight = hard + (soft - soft.detach())
        if self.entry["controller_output"]:
            straight = straight * soft
        return torch.where(torch.rand((), device=soft.device) < self.entry["hard_share"], straight, soft)

    # -- the layer ----------------------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., out]`` for ``x`` ``[..., in]``."""
        tokens = x.reshape(-1, x.shape[-1])
        return self.compute(tokens).view(*x.shape[:-1], self.entry["out"])

    def compute(self, x: Tensor) -> Tensor:
        """Return ``[T, out]`` for ``x`` ``[T, in]``."""
        if self.entry["block"] == 1:
            return self.masked(x, None)
        if self.training:
            logits = self.logits(x)
            return self.masked(x, self.training_mask(logits if logits.dtype == torch.float64 else logits.float()))
        if 0 < len(x) <= self.entry["gather_rows"]:
            out = by_kernel(self, x)
            return self.gathered(x) if out is None else out
        logits = self.logits(x)
        choice, factor = self.choose(logits)
        chosen = torch.arange(self.entry["block"], device=x.device) == choice.unsqueeze(-1)
        return self.masked(x, chosen.to(x.dtype) if factor is None else chosen * factor.unsqueeze(-1))

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the unit in each block int64 ``[T, blocks]``, and its probability if that multiplies it."""
        choice = logits.argmax(-1)
        if not self.entry["controller_output"]:
            return choice, None
        wide = logits if logits.dtype == torch.float64 else logits.float()
        probability = wide.softmax(-1).gather(-1, choice.unsqueeze(-1)).squeeze(-1)
        return choice, probability.to(logits.dtype)

    def masked(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return ``[T, out]``, all units computed; ``mask`` ``[T, blocks, N]`` multiplies them, None keeps all."""
        inner = F.linear(x, self.rows("up"), self.up_bias)
        if self.entry["gated"]:
            inner = self.act_fn(F.linear(x, self.rows("gate"), self.gate_bias)) * inner
        else:
            inner = self.act_fn(inner)
        if mask is not None:
            inner = inner * mask.reshape(inner.shape).to(inner.dtype)
        return F.linear(inner, self.rows("down").t(), self.bias)

    def gathered(self, x: Tensor) -> Tensor:
        """Return ``[T, out]`` from the chosen rows alone; for few tokens."""
        choice, factor = self.choose(self.logits(x))
        size = self.entry["block"]
        units = choice + torch.arange(0, choice.shape[1] * size, size, device=x.device)  # [T, blocks]
        inner = self._inner(x, "up", units)
        inner = self.act_fn(self._inner(x, "gate", units)) * inner if self.entry["gated"] else self.act_fn(inner)
        if factor is not None:
            inner = inner * factor
        cpu = x.device.type == "cpu"
        exact = inner.dtype in (torch.float32, torch.float64)  # not where autocast has rounded the products
        if cpu and self.entry["bits"] == 16 and exact and inner.dtype == self.down.dtype:
            # Adds up chosen rows without a copy of them.
            out = F.embedding_bag(units, self.down, mode="sum", per_sample_weights=inner)
        elif (step := self._rows_at_a_time(x, self.entry["out"])) < units.shape[1]:
            parts = zip(units.split(step, 1), inner.split(step, 1), strict=True)
            out = torch.stack([self._sum(own, weights) for own, weights in parts]).sum(0)
        else:
            out = self._sum(units, inner)
        return out if self.bias is None else out + self.bias.to(out.dtype)  # autocast leaves biases wide

    def _rows_at_a_time(self, x: Tensor, columns: int) -> int:
        """Return how many rows of each token are copied at a time: on a CPU those that a cache holds."""
        size = x.element_size() * columns * max(1, len(x))
        return max(1, COPIED_BYTES // size) if x.device.type == "cpu" else 2**31

    def _inner(self, x: Tensor, name: str, units: Tensor) -> Tensor:
        """Return the products ``[T, blocks]`` of each token with its chosen rows of a matrix."""
        step = self._rows_at_a_time(x, x.shape[1])
        if step < units.shape[1]:
            out = torch.cat([self._products(x, name, own) for own in units.split(step, 1)], dim=1)
        else:
            out = self._products(x, name, units)
        bias = getattr(self, f"{name}_bias")
        return out if bias is None else out + bias.index_select(0, units.reshape(-1)).view_as(out).to(out.dtype)

    def _products(self, x: Tensor, name: str, units: Tensor) -> Tensor:
        rows = self.rows(name, units.reshape(-1)).view(*units.shape, -1)
        return torch.bmm(rows, x.unsqueeze(2)).squeeze(2)

    def _sum(self, units: Tensor, inner: Tensor) -> Tensor:
        rows = self.rows("down", units.reshape(-1)).view(*units.shape, -1)
        return torch.bmm(inner.unsqueeze(1), rows).squeeze(1)

    def extra_repr(self) -> str:
        own = self.entry
        return (
            f"{own['width']} -> {own['neurons']} units in blocks of {own['block']} -> {own['out']}, {own['bits']} bits"
        )


def sparse_ffn_settings(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a layer. Raises ``ValueError`` for those with which it cannot compute."""
    missing = sorted((SPARSE_FFN_FIELDS | set(SPARSE_FFN_NUMBERS)) - set(entry))
    if missing:
        raise ValueError(f"sparse_ffn: the settings of a layer lack {', '.join(missing)}")
    for name, least in SPARSE_FFN_NUMBERS.items():
        if type(entry[name]) is not int or not least <= entry[name] < 2**31:
            raise ValueError(f"sparse_ffn: {name} must be a whole number of at least {least}, not {entry[name]!r}")
    units, block, rank, width = (entry[name] for name in ("neurons", "block", "rank", "width"))
    if units % block:
        raise ValueError(f"sparse_ffn: blocks of {block} units do not divide {units} units")
    if block > 1 and not 1 <= rank <= width:
        raise ValueError(f"sparse_ffn: the rank of the controller must be from 1 to the width {width}, not {rank}")
    if block == 1 and rank:
        raise ValueError(f"sparse_ffn: blocks of one unit leave nothing to choose, so the rank must be 0, not {rank}")
    if not 0 <= entry["hard_share"] <= 1 or not 0 <= entry["temperature"] < math.inf:
        raise ValueError("sparse_ffn: hard_share must be from 0 to 1, and temperature at least 0")
    if entry["act"] not in ACT2FN:
        raise ValueError(f"sparse_ffn: {entry['act']!r} is not one of transformers' activations")
    if entry["bits"] not in (16, 8, 4):
        raise ValueError(f"sparse_ffn: a weight has 16, 8 or 4 bits, not {entry['bits']!r}")
    for columns in (width, entry["out"]) if entry["bits"] < 16 else ():
        group = entry["group"] or columns
        if type(group) is not int or group < 2 or columns % group or (entry["bits"] == 4 and group % 2):
            raise ValueError(f"sparse_ffn: groups of {entry['group']!r} weights do not divide rows of {columns}")
    return dict(entry)


def gathered_tokens(block: int) -> int:
    """Return up to how many tokens read chosen rows alone; more of them read most rows of a block between them.

    Blocks of one unit have nothing to choose. On an H200, 4 tokens are faster so with blocks of 4, and 8 from 8 on.
    """
    return min(MOST_GATHERED, block) if block > 1 else 0


class PlacedSparseFFN(SparseFFN):
    """A ``SparseFFN`` in the place of a model's last projection, whose input the first projection's inlet keeps.

    A feed-forward layer is not one module in every architecture (OPT, BERT); what the model does between the
    projections, an activation or dropout, is applied to nothing.
    """

    def __init__(self, entry: dict[str, Any], about: dict[str, Any] | None = None) -> None:
        super().__init__(entry, about)
        self.inlet: list[Inlet] = []  # in a list, so that it is not registered twice

    def forward(self, nothing: Tensor) -> Tensor:
        """Return ``[..., out]`` for the input ``[..., in]`` that the inlet keeps; ``nothing`` is ``[..., 0]``."""
        return super().forward(self.inlet[0].take())


class SparseFFNModules(ReplacedModules):
    """Base of a model class whose feed-forward layers named in ``config.sparse_ffn`` are sparse."""

    replaced_field = "sparse_ffn"

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        super().__init__(config, *inputs, **kwargs)
        for entry, layer, modules in self._sparse_layers():
            inlet = modules[entry["inlets"][0]]
            if isinstance(inlet, Inlet):
                connect(layer, inlet)

    def _sparse_layers(self) -> Iterator[tuple[dict[str, Any], PlacedSparseFFN, ByEitherName]]:
        """Yield the entry of each sparse layer, the layer, and the modules by their names in the configuration."""
        modules = ByEitherName(self)  # type: ignore[arg-type]
        field = getattr(self.config, self.replaced_field, None) or {}  # type: ignore[attr-defined]
        for name, entry in field.get("modules", {}).items():
            layer = modules[name]
            if isinstance(layer, PlacedSparseFFN):
                yield entry, layer, modules

    def replacement(self, module: nn.Module, entry: Any, field: dict[str, Any]) -> nn.Module:
        if "block" not in entry:
            return Inlet(entry["keeps"])
        weight: Any = module.weight
        return PlacedSparseFFN(entry, {"dtype": weight.dtype, "device": weight.device})

    def encode_units(self, bits: int, group: int | None = None) -> None:
        """Replace the weights of the units of all sparse feed-forward layers by codes of 8 or 4 bits, in place.

        ``group`` weights of a row have one scale; None gives each row one.
        """
        for entry, layer, _ in self._sparse_layers():
            layer.encode_(bits, group)
            entry.update(bits=bits, group=group)
