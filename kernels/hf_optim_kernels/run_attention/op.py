"""The operator ``torch.ops.hf_optim.run_attention`` and its backward (see ``naive``). Importing this registers them.

On a CUDA device they run the Triton kernels, on a CPU the specification (or, under ``TRITON_INTERPRET=1``, the
interpreted kernels). They have fake implementations and gradients, and nothing waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton, unsupported_attention
from . import naive
from .naive import Seen

__all__ = ["Seen", "run_attention", "unsupported"]

LARGEST_HEAD, MOST_ROUNDS = 128, 8


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Return why the kernels do not take these tensors; None if they do."""
    return unsupported_attention(query, key, value, LARGEST_HEAD)


def run_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    order_q: Tensor,
    order_k: Tensor,
    low: Tensor,
    high: Tensor,
    seen: Seen,
    scale: float,
    codes: Tensor | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """Return the attention of ``naive.run_attention``, with gradients of query, key and value.

    out has the strides of ``[B, N, H, Dv]``. Arguments are those of ``naive.run_attention``, and:

    Args:
        key: None with ``seen.unit``.
        codes: as there; may be left out for one round.
        first, last: int32 ``[B, H, rounds, N]``: the first and the last place whose queries may see the key at a place.
            Left out they are found where a gradient is wanted, in ``low`` and ``high``, neither of which may then fall
            from one place to the next, also at places without a token.

    That places name tokens that exist, each once in a round, is not checked: it would wait for the device.

    Raises ``ValueError`` if sizes do not fit each other, and on a GPU for what ``unsupported`` says.
    """
    keys = query if key is None else key
    problem = _mismatch(query, keys, value, order_q, order_k, (low, high, codes, first, last), seen, scale)
    if problem is None and (key is None) != seen.unit:
        problem = "a key beside unit, or no key without it"
    if problem is None and can_run_triton(query):
        problem = unsupported(query, keys, value)
    if problem:
        raise ValueError(f"run_attention does not take {problem}")
    if torch.is_grad_enabled() and any(each.requires_grad for each in (query, keys, value)) and first is None:
        first, last = _seen_from(low, high)
    given = [low if each is None else each for each in (codes, first, last)]
    empty = query.new_empty(0)
    own = empty if key is None else key
    return _operator(query, own, value, order_q, order_k, low, high, *given, list(map(int, seen)), scale)[0]


def _seen_from(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the last place whose queries see each place, of runs in ascending order."""
    place = torch.arange(low.shape[-1], dtype=low.dtype, device=low.device).expand_as(low).contiguous()
    first = torch.searchsorted(high, place, out_int32=True)
    return first, torch.searchsorted(low, place, out_int32=True, right=True) - 1


def _mismatch(
    query: Tensor, key: Tensor, value: Tensor, order_q: Tensor, order_k: Tensor, others: tuple, seen: Seen,
    scale: float,
) -> str | None:  # fmt: skip
    """Return how the arguments disagree; None if they do not."""
    (B, H, N, _), (G, M) = query.shape, value.shape[1:3]
    if key.shape[0] != B or key.shape[2:] != query.shape[2:] or value.shape[0] != B or M != N or H % G:
        shapes = ", ".join(str(list(each.shape)) for each in (query, key, value))
        return f"queries, keys and values of {shapes}"
    if key.shape[1] != (H if seen.unit else G):
        return f"{key.shape[1]} heads of keys and {G} of values"
    if not scale > 0:
        return f"a scale of {scale}: it must be above 0"
    R = order_q.shape[2] if order_q.ndim == 4 else 0
    heads = (H, G) if order_q is not order_k else (H,)
    for name, part, some in (("order_q", order_q, (H,)), ("order_k", order_k, heads),
                             *((name, part, (H,)) for name, part in zip(("low", "high", "codes", "first", "last"),
                                                                       others, strict=True))):  # fmt: skip
        if part is not None and (part.dtype != torch.int32 or all(list(part.shape) != [B, h, R, N] for h in some)):
            return f"{name} of {part.dtype} {list(part.shape)}: int32 [{B}, {some[-1]}, rounds, {N}]"
    if R > MOST_ROUNDS:
        return f"{R} rounds: {MOST_ROUNDS} are the most"
    if R > 1 and others[2] is None:
        return "several rounds without codes"
    if R > 1 and (seen.own or (seen.unit and order_k is not order_q)):
        return "several rounds of queries and keys in orders of their own"
    if seen.near and not (seen.unit and seen.causal and 0 < seen.near <= N):
        return f"near={seen.near} for {N} tokens: it is for causal attention with unit keys, and at most all tokens"
    if seen.last and not seen.unit:
        return "last without unit: it is for queries that are keys"
    if min(seen.before, seen.after, seen.near) < 0:
        return f"{seen}"
    return None


@torch.library.custom_op("hf_optim::run_attention", mutates_args=())
def _operator(
    query: Tensor, key: Tensor, value: Tensor, order_q: Tensor, order_k: Tensor, low: Tensor, high: Tensor,
    codes: Tensor, first: Tensor, last: Tensor, numbers: list[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``naive.run_attention``: ``numbers`` are the fields of ``Seen``; without a key it has no entries."""
    seen = _seen(numbers)
    keys = query if seen.unit else key
    if not can_run_triton(query):
        out, lse = naive.run_attention(query, keys, value, order_q, order_k, low, high, codes, seen, scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse
    from . import launch

    query, keys, value = (_flat(each) for each in (query, keys, value))
    places = launch.Places(*(each.contiguous() for each in (order_q, order_k, low, high, codes, first, last)))
    return launch.forward(query, keys, value, places, seen, scale)


@_operator.register_fake
def _(query, key, value, *_) -> tuple[Tensor, Tensor]:
    B, H, N, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((B, N, H, value.shape[3])).transpose(1, 2), query.new_empty((B, H, N), dtype=dtype)


@torch.library.custom_op("hf_optim::run_attention_backward", mutates_args=())
def _gradients(
    grad_out: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, order_q: Tensor,
    order_k: Tensor, low: Tensor, high: Tensor, codes: Tensor, first: Tensor, last: Tensor, numbers: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return ``naive.gradients``."""
    seen = _seen(numbers)
    keys = query if seen.unit else key
    if not can_run_triton(query):
        given = order_q, order_k, low, high, codes
        return naive.gradients(grad_out, query, keys, value, *given, seen=seen, scale=scale)
    from . import launch

    grad_out, query, keys, value = (_flat(each) for each in (grad_out, query, keys, value))
    places = launch.Places(*(each.contiguous() for each in (order_q, order_k, low, high, codes, first, last)))
    return launch.backward(grad_out, query, keys, value, out, lse, places, seen, scale)


@_gradients.register_fake
def _(grad_out, out, lse, query, key, value, *_) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.numbers, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, _):
    if grad_out is None:
        return (None,) * 12
    out, lse, *tensors = ctx.saved_tensors
    of_query, of_key, of_value = _gradients(grad_out, out, lse, *tensors, ctx.numbers, ctx.scale)
    return of_query, of_key, of_value, *(None,) * 9


_operator.register_autograd(_backward, setup_context=_setup_context)


def _seen(numbers: list[int]) -> Seen:
    before, after, causal, unit, own, near, placed, last = numbers
    return Seen(before, after, bool(causal), bool(unit), bool(own), near, bool(placed), bool(last))


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
