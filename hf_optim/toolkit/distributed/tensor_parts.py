"""The part of a linear layer that a rank holds, and what it exchanges around the layer's forward.

With ``r`` ranks, ``W [out, in]`` and rank ``i``:

    rows:      W_i = rows    i out/r .. (i+1) out/r;   y_i = x W_i^T + b_i;   y = [y_0, ..., y_{r-1}] where it is read
    columns:   W_i = columns i in/r  .. (i+1) in/r;    y = sum_i x_i W_i^T + b;   one all-reduce, b on rank 0 alone
    gathered:  W_i = rows, behind a layer cut by rows: x = [x_0, ..., x_{r-1}] by an all-gather, and y by another one
    experts:   the experts i E/r .. (i+1) E/r, each whole; pairs of other experts are computed by none, one all-reduce

Rows and columns are those of Shoeybi et al., "Megatron-LM", arXiv 1909.08053. ``gathered`` is ours: each output is one
sum over all columns, in the same order as on one rank, for weights whose columns cannot be cut without another result:
inputs with one scale for each token, columns in the order of their groups (act-order), a group that a cut would split.
It moves as many bytes as the all-reduce (two halves of a ring), with one launch more.

What is exchanged is attached as hooks, which stay with the module whatever class it gets later. A tensor without values
(a model that is traced) is given its shape and not exchanged. Gradients flow through all of it. Small tensors without
gradients are exchanged through mapped memory, where the GPUs have it (``peer_memory``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...errors import CheckpointError
from . import collectives
from .liveness import guarded
from .peer_memory import LIMIT, fits, peer_memory

PART = "_hf_optim_part"
RANK = "_hf_optim_rank"
NOT_WHOLE = (
    "this rank has a part of the model, and its checkpoint would be one of a part: the whole one is the checkpoint "
    "that it was loaded from. To change the weights, load it with one rank"
)
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name from torch 2.13 on
ROWS, COLUMNS, GATHERED, WHOLE, EXPERTS = "rows", "columns", "gathered", "whole", "experts"


@dataclass(frozen=True)
class Part:
    """What a rank holds of a module.

    Attributes:
        how: ``rows``, ``columns``, ``gathered``, ``experts`` or ``whole``.
        rank, ranks: number of the part, and how many there are.
        reason: why the layer is whole, or its rows are cut where a plan cuts columns.
        whole_input: the input is whole although columns are cut (``rowwise_split_input``).
        whole_output: rows are cut and the output is gathered (``colwise_gather_output``).
    """

    how: str
    rank: int
    ranks: int
    reason: str = ""
    whole_input: bool = False
    whole_output: bool = False

    def __str__(self) -> str:
        if self.how == WHOLE:
            return f"whole on each rank: {self.reason}" if self.reason else "whole on each rank"
        name = f"{ROWS}, input gathered" if self.how == GATHERED else self.how
        why = f" ({self.reason})" if self.reason else ""
        return f"{name}: part {self.rank + 1} of {self.ranks}{why}"

    @property
    def cuts_rows(self) -> bool:
        """True if the rank holds some of the rows."""
        return self.how in (ROWS, GATHERED)

    def local_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape ``[out, in]`` of the part of a layer."""
        rows, columns = shape
        if self.cuts_rows:
            return rows // self.ranks, columns
        return (rows, columns // self.ranks) if self.how == COLUMNS else shape

    def span(self, size: int) -> slice:
        """Return this rank's part of ``size`` things."""
        own = size // self.ranks
        return slice(self.rank * own, (self.rank + 1) * own)


def part_of(module: nn.Module) -> Part | None:
    """Return the part that a module is, or None for a module that was not cut."""
    return vars(module).get(PART)


def require_whole(model: nn.Module) -> None:
    """Raise ``CheckpointError`` for a model with modules that were cut: it cannot be saved."""
    if any(part_of(module) is not None for module in model.modules()):
        raise CheckpointError(NOT_WHOLE)


def attach_part(module: nn.Module, part: Part) -> None:
    """Let a module, which holds its part already, exchange what its part needs."""
    vars(module)[PART] = part
    if part.how == ROWS:
        module.register_forward_pre_hook(CopyInput())
        if part.whole_output:
            module.register_forward_hook(GatherOutput())
    elif part.how == COLUMNS:
        if part.whole_input:
            module.register_forward_pre_hook(TakeInput(part))
        module.register_forward_hook(SumOutput())
    elif part.how == GATHERED:
        if not part.whole_input:
            module.register_forward_pre_hook(GatherInput())
        else:
            module.register_forward_pre_hook(CopyInput())
        module.register_forward_hook(GatherOutput())
    elif part.how == EXPERTS:
        module.register_forward_pre_hook(OwnExperts(part), with_kwargs=True)
        module.register_forward_hook(SumOutput())


def kept_hooks(name: str, hooks: dict[Any, Any]) -> dict[Any, Any]:
    """Return those entries of a module's dictionary of hooks that ``attach_part`` has made, for a copy of the module.

    ``name`` is that of the dictionary. The hooks with keyword arguments are listed by their numbers in another one.
    """
    if name.endswith("_with_kwargs"):
        return dict(hooks)
    return {number: hook for number, hook in hooks.items() if isinstance(hook, Exchange)}


# -- exchanges --------------------------------------------------------------------------------------------------------
def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over the ranks."""
    if _has_no_values(tensor):
        return tensor
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _Sum.apply(tensor)
    tensor = tensor.contiguous()
    if (peers := peer_memory(tensor.device)) is not None and fits(tensor):
        return guarded(peers.sum, tensor)
    guarded(dist.all_reduce, tensor)
    return tensor


def gather_over_ranks(tensor: Tensor) -> Tensor:
    """Return the tensors of all ranks side by side, in the order of the ranks: ``[..., n]`` -> ``[..., r n]``."""
    if _has_no_values(tensor):
        return torch.cat([tensor] * collectives.world_size(), dim=-1)  # what reads it, reads ``tensor``
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _Gather.apply(tensor)
    return _gathered(tensor)


def _gathered(tensor: Tensor) -> Tensor:
    ranks = collectives.world_size()
    if (peers := peer_memory(tensor.device)) is not None and 0 < ranks * tensor.nbytes <= LIMIT:
        own = beside_zeros(tensor, collectives.rank(), ranks)
        if fits(own):
            return guarded(peers.sum, own)
    found = tensor.new_empty((ranks, *tensor.shape))
    guarded(gather_into, found.view(-1), tensor.contiguous().view(-1))
    return found.movedim(0, -2).flatten(-2)


def beside_zeros(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """Return a tensor at its rank's place among zeros, ``[..., n]`` -> ``[..., r n]``: a sum over ranks gathers it."""
    found = tensor.new_zeros((*tensor.shape[:-1], ranks * tensor.shape[-1]))
    found.narrow(-1, rank * tensor.shape[-1], tensor.shape[-1]).copy_(tensor)
    return found


class _Sum(torch.autograd.Function):
    """Sum over the ranks; each rank has the gradient of the sum already."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        guarded(dist.all_reduce, total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Copy(torch.autograd.Function):
    """The same tensor on every rank; each rank has a part of its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        guarded(dist.all_reduce, total)
        return total


class _Gather(torch.autograd.Function):
    """All parts side by side; each rank has the whole gradient, and takes that of its part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.size = tensor.shape[-1]
        return _gathered(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.narrow(-1, collectives.rank() * ctx.size, ctx.size).contiguous()


# -- hooks ------------------------------------------------------------------------------------------------------------
class Exchange:
    """A hook of a part."""


class CopyInput(Exchange):
    """Before rows: the input's gradient is summed over the ranks."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0] if args else None
        if isinstance(x, Tensor) and torch.is_grad_enabled() and x.requires_grad and not _has_no_values(x):
            return (_Copy.apply(x), *args[1:])
        return None


class TakeInput(Exchange):
    """Before columns whose input is whole: take this rank's columns."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0]
        if torch.is_grad_enabled() and x.requires_grad and not _has_no_values(x):
            x = _Copy.apply(x)
        return (x[..., self.part.span(x.shape[-1])].contiguous(), *args[1:])


class GatherInput(Exchange):
    """Before rows behind a layer that is cut by rows: gather the input."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = gather_over_ranks(args[0])
        if torch.is_grad_enabled() and x.requires_grad and not _has_no_values(x):
            x = _Copy.apply(x)
        return (x, *args[1:])


class GatherOutput(Exchange):
    """After rows: gather the output."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return gather_over_ranks(output)


class SumOutput(Exchange):
    """After columns, or after experts: sum the output."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return sum_over_ranks(output)


class OwnExperts(Exchange):
    """Before experts: number the pairs of this rank's experts from 0; the others are computed by none."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden, index, weights = (given[name] for name in names)
        own = int(module.num_experts)
        local = index - self.part.rank * own
        mine = (local >= 0) & (local < own)
        if torch.is_grad_enabled() and not _has_no_values(hidden):
            hidden = _Copy.apply(hidden) if hidden.requires_grad else hidden
            weights = _Copy.apply(weights) if weights.requires_grad else weights
        return (hidden, local.masked_fill(~mine, own), weights.masked_fill(~mine, 0)), {}
