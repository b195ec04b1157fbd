"""The operator ``torch.ops.hf_optim.halting_step``: the update of a step in which tokens halt (see ``naive``).

Importing this module registers it. On a CUDA device it runs the Triton kernels, on a CPU the specification (or, under
``TRITON_INTERPRET=1``, the interpreted kernels). Nothing waits for the host, so that a call can be captured and
compiled. The gradient is a pair of kernels, too, and has none of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import naive
from .naive import Accumulators


def unsupported(state: Tensor, read: Tensor | None, weight: Tensor, bias: Tensor) -> str | None:
    """Return why the kernels do not compute a step of these tensors (see ``naive``); None if they do."""
    from . import launch

    return launch.unsupported(state, read, weight, bias)


def _module(state: Tensor, read: Tensor | None, weight: Tensor, bias: Tensor, wide: torch.dtype) -> Any:
    """Return the module that computes: ``launch``, or ``naive`` on a CPU. Raises ``ValueError`` if none does."""
    if not can_run_triton(state) or (not state.is_cuda and wide == torch.float64):
        return naive
    from . import launch

    why = launch.unsupported(state, read, weight, bias)
    if why is None and wide != torch.float32:
        why = f"accumulators in {wide}"
    if why is not None:
        raise ValueError(f"halting_step: {why}")
    return launch


def _check(state: Tensor, read: Tensor | None, weight: Tensor, bias: Tensor, before: Accumulators) -> None:
    """Raise ``ValueError`` for shapes or dtypes that do not fit each other."""
    tokens, channels = state.shape[:-1], state.shape[-1:]
    fits = weight.shape == channels and not bias.dim() and (read is None or read.shape == state.shape)
    fits = fits and before.output.shape == state.shape and all(part.shape == tokens for part in before[:4])
    if not fits:
        shapes = ", ".join(str(list(part.shape)) for part in (state, weight, bias, *before))
        raise ValueError(f"halting_step: the shapes of state, weight, bias and accumulators do not fit: {shapes}")
    wide = {part.dtype for part in (before.total, before.remainder, before.output)}
    if len(wide) > 1 or before.steps.dtype != torch.int64 or before.running.dtype != torch.bool:
        raise ValueError(f"halting_step: accumulators in {', '.join(str(part.dtype) for part in before)}")


@torch.library.custom_op("hf_optim::halting_step", mutates_args=())
def halting_step(
    state: Tensor, read: Tensor | None, weight: Tensor, bias: Tensor, total: Tensor, remainder: Tensor, steps: Tensor,
    running: Tensor, output: Tensor, epsilon: float, last: bool, blend: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return total, remainder, steps, running and output after a step, and its probabilities, which have no gradient.

    Arguments as in ``naive.halting_step``. Raises ``ValueError`` for shapes that do not fit each other, and for dtypes
    that the kernels do not compute.
    """
    before = Accumulators(total, remainder, steps, running, output)
    _check(state, read, weight, bias, before)
    module = _module(state, read, weight, bias, output.dtype)
    after, p = module.halting_step(state, read, weight, bias, before, epsilon, last, blend)
    return (*after, p)


@halting_step.register_fake
def _(state, read, weight, bias, total, remainder, steps, running, output, epsilon, last, blend):
    return tuple(part.new_empty(part.shape) for part in (total, remainder, steps, running, output, total))


@torch.library.custom_op("hf_optim::halting_step_gradient", mutates_args=())
def halting_step_gradient(
    state: Tensor, read: Tensor | None, weight: Tensor, bias: Tensor, total: Tensor, running: Tensor,
    output: Tensor | None, runs: Tensor, p: Tensor, up_total: Tensor | None, up_remainder: Tensor | None,
    up_output: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return ``naive.gradient``."""
    module = _module(state, read, weight, bias, p.dtype)
    upstream = (up_total, up_remainder, up_output)
    return tuple(module.gradient(state, read, weight, bias, total, running, output, runs, p, upstream))


@halting_step_gradient.register_fake
def _(state, read, weight, bias, total, running, output, runs, p, up_total, up_remainder, up_output):
    empty = state.new_empty(0)
    parts = (state, empty if read is None else read, weight, bias, p, p, p.new_empty(0) if output is None else output)
    return tuple(part.new_empty(part.shape) for part in parts)


def _setup_context(ctx, inputs, output) -> None:
    state, read, weight, bias, total, _, _, running, mixture, _, _, blend = inputs
    runs, p = output[3], output[5]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(state, read, weight, bias, total, running, mixture if blend else None, runs, p)
    ctx.mark_non_differentiable(output[2], runs, p)


def _backward(ctx, up_total, up_remainder, _steps, _running, up_output, _p):
    found = halting_step_gradient(*ctx.saved_tensors, up_total, up_remainder, up_output)
    state, read, weight, bias, total, remainder, output = found
    has_read, blends = ctx.saved_tensors[1] is not None, ctx.saved_tensors[6] is not None
    given = (state, read if has_read else None, weight, bias, total, remainder)
    return *given, None, None, output if blends else up_output, None, None, None


halting_step.register_autograd(_backward, setup_context=_setup_context)
