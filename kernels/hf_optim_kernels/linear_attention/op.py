"""The operators ``torch.ops.hf_optim.linear_attention``, its backward, and ``linear_attention_step`` (see ``naive``).

On a CUDA device they run the Triton kernels, on a CPU the specification (or, under ``TRITON_INTERPRET=1``, the
interpreted kernels). They have fake implementations, and nothing waits for the host, so that a call can be captured and
compiled. Queries, keys, values and gates have gradients; W and states have none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import naive
from .naive import KINDS, TRIG, Settings, State, empty_state, state_heads

__all__ = ["Settings", "State", "empty_state", "linear_attention", "step", "unsupported"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD, MOST_FEATURES = 128, 512


def unsupported(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> str | None:
    """Return why the kernels do not take these tensors; None if they do."""
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"{query.dtype} queries, {key.dtype} keys and {value.dtype} values"
    if weight.dtype not in (torch.float32, query.dtype):
        return f"W of {weight.dtype} for {query.dtype} queries"
    if max(query.shape[3], value.shape[3]) > LARGEST_HEAD:
        return f"heads of {max(query.shape[3], value.shape[3])}"
    if weight.shape[1] > MOST_FEATURES:
        return f"W of {weight.shape[1]} rows"
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "a compute capability below 8.0"
    return None


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    settings: Settings,
    mask: Tensor | None = None,
    log_gate: Tensor | None = None,
    state: State | None = None,
    return_state: bool = False,
    amounts: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """Return ``naive.linear_attention``: out, which has the strides of ``[B, N, H, Dv]``, and the state if asked for.

    Gradients do not go through states: the returned one is detached. Keys, values and gates of padding must be finite.
    A column of W that is multiplied with exactly 0 gives no gradient.

    Raises ``ValueError`` if sizes or settings do not fit each other, if W or a given state requires a gradient, and on
    a GPU for what ``unsupported`` says.
    """
    problem = _mismatch(query, key, value, weight, settings, mask, log_gate, state, amounts, columns)
    if problem is None and can_run_triton(query):
        problem = unsupported(query, key, value, weight)
    if problem:
        raise ValueError(f"linear_attention does not take {problem}")
    given = (None, None, None) if state is None else state
    fixed = None if amounts is None else amounts.detach()
    out, tops, _, *after = _operator(
        query, key, value, weight, mask, log_gate, fixed, columns, *given, *settings, return_state
    )
    if amounts is not None and fixed is not None and amounts.requires_grad and torch.is_grad_enabled():
        # A quotient by the smallest denominator falls as that grows: a factor of 1 with this gradient.
        share = ((amounts - fixed) / fixed).repeat_interleave(query.shape[1] // amounts.shape[1], 1)
        out = out - out.detach() * (share * tops)[..., None].to(out.dtype)
    return out, State(*(each.detach() for each in after)) if return_state else None


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    settings: Settings,
    state: State,
    log_gate: Tensor | None = None,
    amounts: Tensor | None = None,
) -> Tensor:
    """Return the output ``[B, H, 1, Dv]`` of one token, and bring ``state`` up to date in place; without a gradient.

    Tensors are as of ``naive.linear_attention`` with N = M = 1; the state is contiguous and float32 (on a CPU also
    float64).
    """
    problem = _mismatch(query, key, value, weight, settings, None, log_gate, state, amounts)
    if problem is None and query.shape[2] != 1:
        problem = f"{query.shape[2]} tokens in a step"
    if problem is None and can_run_triton(query):
        problem = unsupported(query, key, value, weight)
        if any(each.dtype != torch.float32 or not each.is_contiguous() for each in state):
            problem = "a state that is not contiguous float32"
    if problem:
        raise ValueError(f"linear_attention does not take {problem}")
    return _step(query, key, value, weight, log_gate, amounts, *state, *settings)


def _mismatch(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, settings: Settings, mask: Tensor | None,
    log_gate: Tensor | None, state: State | None, amounts: Tensor | None = None, columns: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Return how the arguments disagree; None if they do not."""
    (B, H, N, D), (G, M) = query.shape, key.shape[1:3]
    if key.shape[0] != B or key.shape[3] != D or value.shape[:3] != key.shape[:3] or H % G:
        shapes = ", ".join(str(list(each.shape)) for each in (query, key, value))
        return f"queries, keys and values of {shapes}"
    L = weight.shape[0]
    if weight.ndim != 3 or weight.shape[2] != D or L not in (1, G, H):
        return f"W of {list(weight.shape)} for {H} query heads and {G} key heads of {D}"
    if settings.kind not in KINDS:
        return f"features of kind {settings.kind!r}, only {' and '.join(KINDS)}"
    if not settings.scale > 0:
        return f"a scale of {settings.scale}: it must be above 0"
    if settings.kind == TRIG and not settings.floor > 0:
        return f"a floor of {settings.floor} for denominators: it must be above 0"
    if settings.causal and N != M:
        return f"{N} queries and {M} keys that are causal"
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (B, M)):
        return f"a mask of {mask.dtype} {list(mask.shape)} for bool {[B, M]}"
    P = state_heads(H, G, L)
    if log_gate is not None and (log_gate.shape != (B, P, M) or not settings.causal):
        return f"gates of {list(log_gate.shape)}: they are {[B, P, M]}, and causal"
    if (amounts is not None or columns is not None) and settings.kind != TRIG:
        return f"amounts or columns with features of kind {settings.kind}"
    if amounts is not None and amounts.shape != (B, P, N):
        return f"amounts of {list(amounts.shape)}: they are {[B, P, N]}"
    if columns is not None and columns.shape != (L, D):
        return f"columns of {list(columns.shape)}: they are {[L, D]}"
    if state is not None:
        F = weight.shape[1] * (1 + (settings.kind == TRIG))
        wanted = [B, P, F, value.shape[3]], [B, P, F], [B, P]
        if [list(each.shape) for each in state] != list(wanted):
            return f"a state of {[list(each.shape) for each in state]} for {list(wanted)}"
    if torch.is_grad_enabled() and (weight.requires_grad or any(each.requires_grad for each in state or ())):
        return "W or a state that requires a gradient: detach it"
    return None


@torch.library.custom_op("hf_optim::linear_attention", mutates_args=())
def _operator(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, mask: Tensor | None, log_gate: Tensor | None,
    amounts: Tensor | None, columns: Tensor | None, state: Tensor | None, sums: Tensor | None,
    reference: Tensor | None, kind: str, scale: float, causal: bool, floor: float, eps: float, exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return out, what the backward needs of queries, and the state: see ``launch.forward``."""
    settings, given = Settings(kind, scale, causal, floor, eps), _state(state, sums, reference)
    if not can_run_triton(query):
        out, after = naive.linear_attention(
            query, key, value, weight, settings, mask, log_gate, given, amounts, columns
        )
        tops = logs = query.new_zeros(query.shape[:3], dtype=after.state.dtype)
        if amounts is not None:
            rows = naive.with_columns(weight, columns)
            tops = naive.replaced(query, key, value, rows, settings, mask, log_gate, given, amounts)
        return _as_made(out), tops, logs.clone(), *after
    from . import launch

    query, key, value = (_flat(each) for each in (query, key, value))
    weight = naive.with_columns(weight, columns).contiguous()
    amounts = amounts if amounts is None else amounts.float().contiguous()
    out, tops, logs, after = launch.forward(
        query, key, value, weight, settings, mask, log_gate, given, exact, amounts=amounts
    )
    return out, tops, logs, *after


@_operator.register_fake
def _(query, key, value, weight, mask, log_gate, amounts, columns, state, sums, reference, kind, *_):
    (B, H, N, _), G, DV = query.shape, key.shape[1], value.shape[3]
    P, F = state_heads(H, G, weight.shape[0]), weight.shape[1] * (1 + (kind == TRIG))
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    shapes = ((B, H, N), (B, H, N), (B, P, F, DV), (B, P, F), (B, P))
    return query.new_empty((B, N, H, DV)).transpose(1, 2), *(query.new_empty(each, dtype=dtype) for each in shapes)


@torch.library.custom_op("hf_optim::linear_attention_backward", mutates_args=())
def _gradients(
    grad_out: Tensor, out: Tensor, tops: Tensor, logs: Tensor, query: Tensor, key: Tensor, value: Tensor,
    weight: Tensor, mask: Tensor | None, log_gate: Tensor | None, amounts: Tensor | None, columns: Tensor | None,
    state: Tensor | None, sums: Tensor | None, reference: Tensor | None, kind: str, scale: float, causal: bool,
    floor: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return ``naive.gradients``; without gates and columns those are empty."""
    settings, given = Settings(kind, scale, causal, floor, eps), _state(state, sums, reference)
    if not can_run_triton(query):
        grads = naive.gradients(grad_out, query, key, value, weight, settings, mask, log_gate, given, amounts, columns)
    else:
        from . import launch

        grad_out, query, key, value = (_flat(each) for each in (grad_out, query, key, value))
        rows = naive.with_columns(weight, columns).contiguous()
        grads = launch.backward(
            grad_out, out, tops, logs, query, key, value, rows, settings, mask, log_gate, given,
            columns=columns is not None,
        )  # fmt: skip
        if columns is not None and grads[4] is not None:
            grads = *grads[:4], naive.of_columns(grads[4].unflatten(0, (len(columns), -1)).sum(1), columns)
    grad_query, grad_key, grad_value, *others = grads
    gate, column = (query.new_empty(0) if each is None else each for each in others)
    return grad_query, grad_key, grad_value, gate, column


@_gradients.register_fake
def _(grad_out, out, tops, logs, query, key, value, weight, mask, log_gate, amounts, columns, *_):
    others = (query.new_empty(0) if each is None else each.new_empty(each.shape) for each in (log_gate, columns))
    return *(each.new_empty(each.shape) for each in (query, key, value)), *others


def _setup_context(ctx, inputs, output) -> None:
    *tensors, kind, scale, causal, floor, eps, _ = inputs
    ctx.settings = (kind, scale, causal, floor, eps)
    ctx.given = [each is not None for each in tensors]
    ctx.save_for_backward(*output[:3], *(each for each in tensors if each is not None))
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, *_):
    out, tops, logs, *rest = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 17
    tensors = [rest.pop(0) if given else None for given in ctx.given]
    *found, gate, column = _gradients(grad_out, out, tops, logs, *tensors, *ctx.settings)
    gate, column = gate if ctx.given[5] else None, column if ctx.given[7] else None
    return *found, None, None, gate, None, column, *(None,) * 9


_operator.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("hf_optim::linear_attention_step", mutates_args=("state", "sums", "reference"))
def _step(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, log_gate: Tensor | None, amounts: Tensor | None,
    state: Tensor, sums: Tensor, reference: Tensor, kind: str, scale: float, causal: bool, floor: float, eps: float,
) -> Tensor:  # fmt: skip
    """Return ``naive.step``."""
    settings, given = Settings(kind, scale, causal, floor, eps), State(state, sums, reference)
    if not can_run_triton(query):
        return naive.step(query, key, value, weight, settings, log_gate, given, amounts)
    from . import launch

    query, key, value = (_flat(each) for each in (query, key, value))
    gate = log_gate if log_gate is None else log_gate.contiguous()
    amounts = amounts if amounts is None else amounts.float().contiguous()
    return launch.step(query, key, value, weight.contiguous(), settings, gate, given, amounts)


@_step.register_fake
def _(query, key, value, *_) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _state(state: Tensor | None, sums: Tensor | None, reference: Tensor | None) -> State | None:
    return None if state is None or sums is None or reference is None else State(state, sums, reference)


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _as_made(out: Tensor) -> Tensor:
    """Return out with the strides that the kernels give it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
