"""Norm groups: norms and the linear layers that read them, to move a scale from one into the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .block_lists import ModuleScope, block_of, blocks
from .fake_model import copy_with_tensors
from .graph import Trace
from .linear_layers import features, linears, parameter_names, tied_weights
from .reexecution import is_scale_equivariant, memoize, random_tensor
from .tracing import as_trace

PRECISION = 1e-3
"""Relative tolerance for the outputs of a norm module, which may compute in float32 and adds an epsilon."""


@dataclass(frozen=True, eq=False)
class NormGroup:
    """A norm and the linear layers that read exactly its output.

    The output is ``(weight + offset) * n(x) + bias``.

    Attributes:
        name, module: the norm.
        linears: the linear layers by name; empty for a norm that only a router and experts read.
        others: descriptions of everything else that reads the output: the residual connection, a router, expert
            tensors, the outputs of the model.
        offset: 0 for most norms, 1 for those that store the weight as a difference from one.
    """

    name: str
    module: nn.Module
    linears: dict[str, nn.Module]
    others: tuple[str, ...]
    offset: float

    @property
    def exclusive(self) -> bool:
        """True if nothing but the linear layers reads the output.

        A scale of the channels can then move from the norm into the columns of ``linears`` exactly.
        """
        return not self.others


def find_norm_groups(source: nn.Module | Trace, block: ModuleScope | None = None) -> list[NormGroup]:
    """Return the norms of a model with the linear layers that read exactly their output, in execution order.

    With ``block`` only the norms in it. A norm that neither a linear layer nor any other weight reads is left out,
    and so is one whose gain is not called ``weight``. See ``NormGroup`` for what is exact.
    """
    return list(_norm_groups(as_trace(source), block))


def _norm_groups(trace: Trace, block: ModuleScope | None) -> Iterator[NormGroup]:
    parameters = parameter_names(trace.model)
    unreached = set(linears(trace.model)) - {call.name for call in trace.calls}
    found = blocks(trace) if unreached else []
    for name in dict.fromkeys(call.name for call in trace.calls):
        if block is not None and not block.holds(name):
            continue
        if not is_norm(trace, name):
            continue
        names, others, other_weights = _readers(trace, name)
        offset = norm_offset(trace, name) if names or other_weights else None
        if offset is None:
            continue
        width = trace.modules[name].get_parameter("weight").numel()
        near = block_of(found, name)
        others += [
            f"{linear}: not reached by the traced forward"
            for linear in sorted(unreached)
            if block_of(found, linear) is near and features(trace.modules[linear])[1] == width
        ]
        for member in (name, *names):
            others += tied_weights(trace.modules[member], member, parameters)
        yield NormGroup(
            name=name,
            module=trace.modules[name],
            linears={linear: trace.modules[linear] for linear in names},
            others=tuple(dict.fromkeys(others)),
            offset=offset,
        )


def is_norm(trace: Trace, name: str) -> bool:
    """Return True if a module has a ``weight [d]``, perhaps a ``bias [d]``, and maps ``[..., d]`` to ``[..., d]``."""
    module = trace.modules[name]
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if weight is None or weight.dim() != 1 or not set(parameters) <= {"weight", "bias"}:
        return False
    return all(
        len(call.reads) == len(call.writes) == 1
        and trace.shapes[call.reads[0]] == trace.shapes[call.writes[0]]
        and trace.shapes[call.reads[0]][-1:] == weight.shape
        for call in trace.calls_of(name)
    )


def norm_offset(trace: Trace, name: str) -> float | None:
    """Return ``_gain_offset``, computed once for norms of the same class, size and settings."""
    module = trace.modules[name]
    settings = tuple((key, value) for key, value in vars(module).items() if isinstance(value, (int, float, str)))
    key = ("offset", type(module), module.get_parameter("weight").shape, settings)
    return memoize(trace, key, lambda: _gain_offset(module))


def _gain_offset(module: nn.Module) -> float | None:
    """Determine the offset of a norm by running it; None if it does not normalise or its weight is not a gain."""
    copied = copy_with_tensors(module, lambda tensor: torch.ones(tensor.shape, dtype=torch.float64))
    x = random_tensor((1, 8, module.get_parameter("weight").numel()), seed=1)

    def output(weight: float, scale: float = 1.0) -> Tensor:
        with torch.no_grad():
            for name, parameter in copied.named_parameters():
                parameter.fill_(weight if name == "weight" else 0.0)
            return copied(x * scale).double()

    try:
        zero, one, two, larger = output(0.0), output(1.0), output(2.0), output(1.0, scale=2.0)
    except Exception:  # it needs another shape than [batch, tokens, channels], so it is not a norm of channels
        return None
    normed = one - zero
    size = normed.square().sum()
    offset = float((zero * normed).sum() / size) if size > 0 else float("nan")
    offset = float(round(offset)) if abs(offset - round(offset, 0)) < PRECISION else offset
    expected = ((zero, offset * normed), (two - one, normed), (larger, one))
    bound = PRECISION * float(one.abs().max())
    return offset if all(float((left - right).abs().max()) <= bound for left, right in expected) else None


def _readers(trace: Trace, name: str) -> tuple[list[str], list[str], bool]:
    """Return the readers of a norm's output: linear layers, descriptions of the rest, and whether the rest has weights.

    Weights outside of linear layers belong to a router or to experts: a module that reads the output has a matrix.
    """
    values: set[int] = set()
    others: list[str] = []
    other_weights = False
    by_linear: dict[str, int] = defaultdict(int)
    pending = [value for call in trace.calls_of(name) for value in call.writes]
    while pending:
        value = pending.pop()
        if value in values:
            continue
        values.add(value)
        if value in trace.outputs:
            others.append("the output of the model")
        for op in trace.readers.get(value, ()):
            if op.linear is not None:
                by_linear[op.linear] += 1
            elif is_scale_equivariant(trace, op, value):
                pending.extend(op.writes)
            else:
                others.append(str(op))
                other_weights = other_weights or any(
                    p.dim() >= 2 for p in trace.modules[op.module].parameters(recurse=False)
                )
    for linear, count in by_linear.items():
        if count != len(trace.calls_of(linear)):
            others.append(f"{linear}: reads other tensors too")
    first = {linear: trace.calls_of(linear)[0].start for linear in by_linear}
    return sorted(by_linear, key=lambda linear: first[linear]), others, other_weights
