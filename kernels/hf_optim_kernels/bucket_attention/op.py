"""The operator ``torch.ops.hf_optim.bucket_attention`` and its backward (see ``naive``). Importing this registers them.

On a CUDA device they run the Triton kernels, on a CPU the specification (or, under ``TRITON_INTERPRET=1``, the
interpreted kernels). They have fake implementations and a gradient, also of lse, by which results of several rounds of
hashing are combined. Nothing waits for the host, so that places may be computed in the same graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton, unsupported_attention
from . import naive
from .naive import Buckets

__all__ = ["Buckets", "bucket_attention", "unsupported"]

LARGEST_HEAD = 128


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Return why the kernels do not take these tensors; None if they do."""
    return unsupported_attention(query, key, value, LARGEST_HEAD)


def bucket_attention(
    query: Tensor, key: Tensor, value: Tensor, places_q: Tensor, places_k: Tensor, buckets: Buckets, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``naive.bucket_attention``: out and lse, with gradients of both.

    out has the strides of ``[B, N, H, Dv]``. That places name tokens that exist, each once in a head (gathered: with
    one key), is not checked: it would wait for the device.

    Raises ``ValueError`` if sizes do not fit each other, and on a GPU for what ``unsupported`` says.
    """
    problem = _mismatch(query, key, value, places_q, places_k, buckets, scale)
    if problem is None and can_run_triton(query):
        problem = unsupported(query, key, value)
    if problem:
        raise ValueError(f"bucket_attention does not take {problem}")
    return _operator(query, key, value, places_q, places_k, list(map(int, buckets)), scale)


def _mismatch(
    query: Tensor, key: Tensor, value: Tensor, places_q: Tensor, places_k: Tensor, buckets: Buckets, scale: float
) -> str | None:
    """Return how the arguments disagree; None if they do not."""
    (B, H, N, D), (G, M) = query.shape, key.shape[1:3]
    if key.shape[0] != B or key.shape[3] != D or value.shape[:3] != key.shape[:3] or H % G:
        shapes = ", ".join(str(list(each.shape)) for each in (query, key, value))
        return f"queries, keys and values of {shapes}"
    if not scale > 0:
        return f"a scale of {scale}: it must be above 0"
    if min(buckets.width_q, buckets.width_k) < 1 or min(buckets.before, buckets.after) < 0:
        return f"{buckets}"
    for places in (places_q, places_k):
        if places.dtype != torch.int32 or places.shape[:2] != (B, H) or places.ndim != 3:
            return f"places of {places.dtype} {list(places.shape)}: they are int32 [{B}, {H}, places]"
    sizes = places_q.shape[2], places_k.shape[2]
    chunks = sizes[0] // buckets.width_q
    wanted = chunks * buckets.width_q, chunks * buckets.width_k
    if wanted != sizes:
        return f"{sizes[0]} and {sizes[1]} places in chunks of {buckets.width_q} and {buckets.width_k}"
    if buckets.gathered and (sizes != (N, M) or G != H):
        return f"{N} gathered queries and {M} gathered keys of {G} heads for {sizes[0]} and {sizes[1]} places of {H}"
    return None


@torch.library.custom_op("hf_optim::bucket_attention", mutates_args=())
def _operator(
    query: Tensor, key: Tensor, value: Tensor, places_q: Tensor, places_k: Tensor, numbers: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``naive.bucket_attention``: ``numbers`` are the fields of ``Buckets``."""
    buckets = _buckets(numbers)
    if not can_run_triton(query):
        out, lse = naive.bucket_attention(query, key, value, places_q, places_k, buckets, scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse
    from . import launch

    query, key, value = (_flat(each) for each in (query, key, value))
    return launch.forward(query, key, value, places_q.contiguous(), places_k.contiguous(), buckets, scale)


@_operator.register_fake
def _(query, key, value, *_) -> tuple[Tensor, Tensor]:
    B, H, N, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((B, N, H, value.shape[3])).transpose(1, 2), query.new_empty((B, H, N), dtype=dtype)


@torch.library.custom_op("hf_optim::bucket_attention_backward", mutates_args=())
def _gradients(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    places_q: Tensor, places_k: Tensor, numbers: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return ``naive.gradients``."""
    buckets = _buckets(numbers)
    if not can_run_triton(query):
        return naive.gradients(grad_out, grad_lse, query, key, value, out, lse, places_q, places_k, buckets, scale)
    from . import launch

    grad_out, query, key, value = (_flat(each) for each in (grad_out, query, key, value))
    places_q, places_k = places_q.contiguous(), places_k.contiguous()
    return launch.backward(grad_out, grad_lse, query, key, value, out, lse, places_q, places_k, buckets, scale)


@_gradients.register_fake
def _(grad_out, grad_lse, out, lse, query, key, value, *_) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(each.new_empty(each.shape) for each in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.numbers, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
    out, lse, *tensors = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    return *_gradients(grad_out, grad_lse, out, lse, *tensors, ctx.numbers, ctx.scale), None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)


def _buckets(numbers: list[int]) -> Buckets:
    width_q, width_k, before, after, *flags = numbers
    wrap, causal, no_self, gathered = map(bool, flags)
    return Buckets(width_q, width_k, before, after, wrap, causal, no_self, gathered)


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
