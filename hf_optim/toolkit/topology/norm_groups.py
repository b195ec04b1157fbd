"""Normalisations and the linear layers that read them, for folding a scale from one into the other."""

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
from .tracing import trace

PRECISION = 1e-3
"""Relative tolerance when a norm module is probed: it may compute in float32, and it adds an epsilon."""


@dataclass(frozen=True, eq=False)
class NormGroup:
    """A normalisation and the linear layers that read exactly its output.

    The output is `(weight + offset) * n(x) + bias`; `offset` is 0 for most norms and 1 for those that store
    the weight as a difference from one.  `others` describes everything else that reads the output: the
    residual connection, a router, expert tensors, the result of the model.  If there is nothing else, the
    group is `exclusive`, and a scale of the channels can move from the norm into the columns of `linears`
    exactly.  `linears` is empty for a norm that only a router and experts read.
    """

    name: str
    module: nn.Module
    linears: dict[str, nn.Module]
    others: tuple[str, ...]
    offset: float

    @property
    def exclusive(self) -> bool:
        """Whether the linears are all that reads the norm's output."""
        return not self.others


def find_norm_groups(source: nn.Module | Trace, block: ModuleScope | None = None) -> list[NormGroup]:
    """Return the norms of a model with the linear layers that read exactly their output, in execution order.

    With ``block`` only the norms inside it. A norm that neither a linear layer nor any other weight reads is left out,
    and so is one whose gain is not called ``weight``. ``NormGroup`` says what is exact.
    """
    return list(_norm_groups(_traced(source), block))


def _norm_groups(trace: Trace, block: ModuleScope | None) -> Iterator[NormGroup]:
    held_by = parameter_names(trace.model)
    unreached = set(linears(trace.model)) - {call.name for call in trace.calls}
    found = blocks(trace) if unreached else []
    for name in dict.fromkeys(call.name for call in trace.calls):
        if block is not None and not block.holds(name):
            continue
        if not _looks_like_norm(trace, name):
            continue
        names, others, raw = _readers(trace, name)
        offset = _offset(trace, name) if names or raw else None
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
            others += tied_weights(trace.modules[member], member, held_by)
        yield NormGroup(
            name=name,
            module=trace.modules[name],
            linears={linear: trace.modules[linear] for linear in names},
            others=tuple(dict.fromkeys(others)),
            offset=offset,
        )


def _looks_like_norm(trace: Trace, name: str) -> bool:
    """Whether a module has a `weight` [d], perhaps a `bias` [d], and maps one tensor [..., d] to another."""
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


def _offset(trace: Trace, name: str) -> float | None:
    """`_gain_offset`, worked out once for norms of the same class, size and settings."""
    module = trace.modules[name]
    settings = tuple((key, value) for key, value in vars(module).items() if isinstance(value, (int, float, str)))
    question = ("offset", type(module), module.get_parameter("weight").shape, settings)
    return memoize(trace, question, lambda: _gain_offset(module))


def _gain_offset(module: nn.Module) -> float | None:
    """The `offset` of a norm, asked of the module; None if it does not normalise or its weight is no gain."""
    double = copy_with_tensors(module, lambda tensor: torch.ones(tensor.shape, dtype=torch.float64))
    x = random_tensor((1, 8, module.get_parameter("weight").numel()), seed=1)

    def output(weight: float, scale: float = 1.0) -> Tensor:
        with torch.no_grad():
            for name, parameter in double.named_parameters():
                parameter.fill_(weight if name == "weight" else 0.0)
            return double(x * scale).double()

    try:
        zero, one, two, larger = output(0.0), output(1.0), output(2.0), output(1.0, scale=2.0)
    except Exception:  # the module wants another shape than [batch, tokens, channels]: no norm of channels
        return None
    normed = one - zero
    size = normed.square().sum()
    offset = float((zero * normed).sum() / size) if size > 0 else float("nan")
    offset = float(round(offset)) if abs(offset - round(offset, 0)) < PRECISION else offset
    expected = ((zero, offset * normed), (two - one, normed), (larger, one))
    bound = PRECISION * float(one.abs().max())
    return offset if all(float((left - right).abs().max()) <= bound for left, right in expected) else None


def _readers(trace: Trace, name: str) -> tuple[list[str], list[str], bool]:
    """Who reads the norm's output: the linears, a description of the rest, whether the rest has weights.

    Weights that are no linear layer belong to a router or to experts: some module that reads the output holds
    a matrix.
    """
    values: set[int] = set()
    others: list[str] = []
    raw = False
    by_linear: dict[str, int] = defaultdict(int)
    pending = [value for call in trace.calls_of(name) for value in call.writes]
    while pending:
        value = pending.pop()
        if value in values:
            continue
        values.add(value)
        if value in trace.outputs:
            others.append("the result of the model")
        for op in trace.readers.get(value, ()):
            if op.linear is not None:
                by_linear[op.linear] += 1
            elif is_scale_equivariant(trace, op, value):
                pending.extend(op.writes)
            else:
                others.append(str(op))
                raw = raw or any(p.dim() >= 2 for p in trace.modules[op.module].parameters(recurse=False))
    for linear, count in by_linear.items():
        if count != len(trace.calls_of(linear)):
            others.append(f"{linear}: reads other tensors too")
    first = {linear: trace.calls_of(linear)[0].start for linear in by_linear}
    return sorted(by_linear, key=lambda linear: first[linear]), others, raw


def _traced(source: nn.Module | Trace) -> Trace:
    return source if isinstance(source, Trace) else trace(source)
