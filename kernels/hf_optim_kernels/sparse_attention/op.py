"""The operator ``torch.ops.hf_optim.sparse_attention`` and its backward (see ``naive``). Importing this registers them.

On a CUDA device they run the Triton kernels, on a CPU the specification (or, under ``TRITON_INTERPRET=1``, the
interpreted kernels). They have fake implementations and a gradient, also of lse. Once a layout has its work items
(``prepare``, or a first call), nothing waits for the host, so that a call can be captured and compiled.

An eager call that records a gradient may go past ``torch.library``, whose work in Python for the many tensors of a
layout takes longer than the kernels do on rows of some thousand tokens (``DIRECT``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.support import can_run_triton, unsupported_attention
from . import naive
from .naive import Layout

LARGEST_HEAD = 128
# Of the fields of ``items.Plan``, those that are tensors; they come first.
TENSORS = 10
# Whether eager calls with a gradient go past torch.library, which takes the host longer.
DIRECT = True


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Return why the kernels do not take these tensors; None if they do."""
    problem = unsupported_attention(query, key, value, LARGEST_HEAD)
    if problem is None and query.shape[1] % key.shape[1]:
        problem = f"{query.shape[1]} query heads do not share {key.shape[1]} key heads evenly"
    return problem


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Any,
    scale: float,
    segments_q: Tensor | None = None,
    segments_k: Tensor | None = None,
    ramp: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``naive.sparse_attention``: out and lse, with gradients of both, also for the reach of ``ramp``.

    out has the strides of ``[B, N, H, Dv]``. Keys and values that no query sees must be finite: they are multiplied by
    zero.

    Raises ``ValueError`` if the layout or the segments do not fit the tensors, if ``scale`` is not above 0, and on a
    GPU for what ``unsupported`` says.
    """
    if not scale > 0:
        raise ValueError(f"the scale of scores must be above 0, not {scale}")
    triton = can_run_triton(query)
    problem = _mismatch(query, key, value, segments_q, segments_k, ramp)
    if problem is None and triton:
        problem = unsupported(query, key, value)
        if layout.starts.device != query.device:
            problem = f"a layout on {layout.starts.device} for tensors on {query.device}"
    if problem:
        raise ValueError(f"sparse_attention does not take {problem}")
    made = prepare(layout, query, key) if triton else None
    recorded = torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (query, key, value, ramp)
    )
    if not torch.compiler.is_compiling():
        if not recorded:
            return _computed(query, key, value, segments_q, segments_k, layout, made, scale, ramp)
        if DIRECT and triton and _is_plain(query, key, value):
            return _Direct.apply(query, key, value, segments_q, segments_k, layout, made, scale, ramp)  # type: ignore
    plan, numbers = ([], []) if made is None else (list(made[:TENSORS]), list(made[TENSORS:]))
    numbers = [layout.block, *numbers]
    return _operator(
        query, key, value, segments_q, segments_k, layout.heads, layout.starts, layout.columns, layout.masks,
        layout.bits, layout.key_starts, layout.rows, layout.key_masks, layout.order_q, layout.order_k, plan, numbers,
        scale, ramp,
    )  # fmt: skip


def _mismatch(
    query: Tensor, key: Tensor, value: Tensor, segments_q: Tensor | None, segments_k: Tensor | None,
    ramp: Tensor | None,
) -> str | None:  # fmt: skip
    """Return how the shapes disagree; None if they do not."""
    B, H, N, D = query.shape
    if ramp is not None and (ramp.shape != (H, 3) or ramp.device != query.device):
        return f"a ramp of {list(ramp.shape)} on {ramp.device} for {H} heads on {query.device}"
    if key.shape[0] != B or key.shape[3] != D or value.shape[:3] != key.shape[:3]:
        shapes = ", ".join(str(list(each.shape)) for each in (query, key, value))
        return f"queries, keys and values of {shapes}"
    if (segments_q is None) != (segments_k is None):
        return "segments of queries or of keys alone"
    if segments_q is not None and segments_k is not None:
        found, right = (segments_q.shape, segments_k.shape), ((B, N), (B, key.shape[2]))
        if found != right:
            return f"segments of {[list(each) for each in found]} for {[list(each) for each in right]}"
    return None


def prepare(layout: Any, query: Tensor, key: Tensor) -> Any:
    """Return the work items of a layout for tensors of these shapes, made at the first call: see ``items.plan``.

    What is captured in a graph or compiled must be prepared before.
    """
    from .items import plan

    (B, H, N, _), (G, M) = query.shape, key.shape[1:3]
    return plan(layout, B, H, G, N, M)


def _computed(
    query: Tensor, key: Tensor, value: Tensor, segments_q: Tensor | None, segments_k: Tensor | None, layout: Any,
    made: Any, scale: float, ramp: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``naive.sparse_attention``; ``made`` is what ``prepare`` returned, None where Triton cannot run."""
    if made is None:
        out, lse = naive.sparse_attention(query, key, value, layout, scale, segments_q, segments_k, ramp)
        return _as_made(out), lse
    from . import launch

    segments_q, segments_k = _numbers(segments_q), _numbers(segments_k)
    return launch.forward(
        _flat(query), _flat(key), _flat(value), segments_q, segments_k, layout, made, scale, _ramp(ramp)
    )  # fmt: skip


def _gradients_of(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    segments_q: Tensor | None, segments_k: Tensor | None, layout: Any, made: Any, scale: float, ramp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return ``naive.gradients``; arguments as of ``_computed``."""
    if made is None:
        return naive.gradients(
            grad_out, grad_lse, query, key, value, out, lse, layout, scale, segments_q, segments_k, ramp
        )  # fmt: skip
    from . import launch

    segments_q, segments_k = _numbers(segments_q), _numbers(segments_k)
    return launch.backward(
        _flat(grad_out), grad_lse, _flat(query), _flat(key), _flat(value), out, lse, segments_q, segments_k, layout,
        made, scale, _ramp(ramp),
    )  # fmt: skip


def _is_plain(*tensors: Tensor) -> bool:
    """Return True for ordinary tensors outside of traces and transforms, which see operators alone."""
    watched = torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()
    return not watched and all(type(each) in (Tensor, torch.nn.Parameter) for each in tensors)


class _Direct(torch.autograd.Function):
    """``sparse_attention`` with its gradient, without ``torch.library``; arguments as of ``_computed``."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        query, key, value, segments_q, segments_k, ctx.layout, ctx.made, ctx.scale, ramp = given
        out, lse = _computed(*given)
        ctx.save_for_backward(out, lse, query, key, value, segments_q, segments_k, ramp)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        out, lse, query, key, value, segments_q, segments_k, ramp = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        found = _gradients_of(
            grad_out, grad_lse, out, lse, query, key, value, segments_q, segments_k, ctx.layout, ctx.made, ctx.scale,
            ramp,
        )  # fmt: skip
        return *found[:3], None, None, None, None, None, found[3]


def _read(fields: Sequence[Any], plan: Sequence[Tensor], numbers: Sequence[int]) -> tuple[Layout, Any]:
    """Return layout and work items from arguments of the operators."""
    from .items import assemble

    return Layout(numbers[0], *fields), assemble(plan, numbers[1:]) if plan else None


@torch.library.custom_op("hf_optim::sparse_attention", mutates_args=())
def _operator(
    query: Tensor, key: Tensor, value: Tensor, segments_q: Tensor | None, segments_k: Tensor | None, heads: Tensor,
    starts: Tensor, columns: Tensor, masks: Tensor, bits: Tensor, key_starts: Tensor, rows: Tensor, key_masks: Tensor,
    order_q: Tensor | None, order_k: Tensor | None, plan: Sequence[Tensor], numbers: Sequence[int], scale: float,
    ramp: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``naive.sparse_attention``: ``numbers`` is the block and, with ``plan``, the fields of ``items.Plan``."""
    fields = heads, starts, columns, masks, bits, key_starts, rows, key_masks, order_q, order_k
    return _computed(query, key, value, segments_q, segments_k, *_read(fields, plan, numbers), scale, ramp)


@_operator.register_fake
def _(query, key, value, *_) -> tuple[Tensor, Tensor]:
    B, H, N, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((B, N, H, value.shape[3])).transpose(1, 2), query.new_empty((B, H, N), dtype=dtype)


@torch.library.custom_op("hf_optim::sparse_attention_backward", mutates_args=())
def _gradients(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    segments_q: Tensor | None, segments_k: Tensor | None, heads: Tensor, starts: Tensor, columns: Tensor, masks: Tensor,
    bits: Tensor, key_starts: Tensor, rows: Tensor, key_masks: Tensor, order_q: Tensor | None, order_k: Tensor | None,
    plan: Sequence[Tensor], numbers: Sequence[int], scale: float, ramp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return ``naive.gradients``; for no ramp an empty tensor. Arguments as of ``hf_optim::sparse_attention``."""
    fields = heads, starts, columns, masks, bits, key_starts, rows, key_masks, order_q, order_k
    found = _gradients_of(
        grad_out, grad_lse, out, lse, query, key, value, segments_q, segments_k, *_read(fields, plan, numbers), scale,
        ramp,
    )  # fmt: skip
    return *found[:3], query.new_empty(0) if found[3] is None else found[3]


@_gradients.register_fake
def _(grad_out, grad_lse, out, lse, query, key, value, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ramp = query.new_empty(0) if rest[-1] is None else rest[-1].new_empty(rest[-1].shape)
    return *(each.new_empty(each.shape) for each in (query, key, value)), ramp


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, *tensors, plan, ctx.numbers, ctx.scale, ramp = inputs
    tensors.append(ramp)
    ctx.given = [each is not None for each in tensors]
    ctx.save_for_backward(*output, query, key, value, *(each for each in tensors if each is not None), *plan)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
    out, lse, query, key, value, *rest = ctx.saved_tensors
    *tensors, ramp = [rest.pop(0) if given else None for given in ctx.given]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    found = _gradients(grad_out, grad_lse, out, lse, query, key, value, *tensors, rest, ctx.numbers, ctx.scale, ramp)
    return *found[:3], *[None] * 12, [None] * len(rest), None, None, None if ramp is None else found[3]


_operator.register_autograd(_backward, setup_context=_setup_context)


def _ramp(ramp: Tensor | None) -> Tensor | None:
    return None if ramp is None else ramp.float().contiguous()


def _numbers(segments: Tensor | None) -> Tensor | None:
    return None if segments is None else segments.to(torch.int32).contiguous()


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _as_made(out: Tensor) -> Tensor:
    """Return out with the strides that the kernels give it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
