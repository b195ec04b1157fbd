"""What routes in a mixture of experts: routers and the gates of shared experts, found on a trace.

A *projection* is a linear layer, or a product with a 2-D parameter of a module. Its output is followed through the
operations between it and the next product (softmax, sigmoid, masks, slices):

- a projection in a block is a **router** if an operation that chooses among its outputs (top-k, argmax, a sort) reads
  them and the chosen indices are used, or if one factor for each expert multiplies the outputs of the experts;
- a layer whose output reaches the outputs of the model through routers alone is a part of the router;
- a projection is the **gate of a shared expert** if it lies in the same part of a block as a router, and one number per
  token of it multiplies all channels of another tensor there.

Neither the gate of a gated feed-forward layer (as wide as what it multiplies), nor a gate on attention heads (no router
beside it), nor an indexer of sparse attention (its choice follows a product of two activations) is one of these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .experts import has_stacked_weights
from .graph import Op, Trace

ROUTER, SHARED_EXPERT_GATE = "router", "gate of a shared expert"

CHOOSING = {"topk", "sort", "argsort", "argmax", "argmin", "max", "min", "kthvalue", "multinomial", "msort"}
"""Operations that return which entries along a dimension are the largest."""

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "matmul", "linear", "einsum", "dot", "grouped_mm"}
REDUCTIONS = {"mean", "sum", "var", "var_mean", "norm", "linalg_vector_norm", "amax", "amin", "native_layer_norm"}
WIDEST_GATE = 8
"""Most outputs of the gate of shared experts."""

FACTORS = {"mul", "mul_", "addcmul", "addcmul_", "div", "div_"}
LAYOUT = {"t", "transpose", "permute", "view", "_unsafe_view", "reshape", "clone", "_to_copy", "detach", "alias"}
LAYOUT |= {"expand", "unsqueeze", "squeeze", "select", "slice", "index", "index_select", "contiguous"}


@dataclass(frozen=True, eq=False)
class _Projection:
    """A product with a matrix of the model: ``owner`` is the module that has the matrix."""

    op: Op
    owner: str
    value: int
    width: int


def find_routing(trace: Trace, blocks: Collection[str]) -> dict[str, str]:
    """Return the modules of a mixture of experts that route: name -> ``ROUTER`` or ``SHARED_EXPERT_GATE``.

    ``blocks`` are the names of the blocks; nothing outside them is returned, unless there are none. A module is a
    linear layer, or the owner of a bare weight.
    """
    return _Finder(trace, tuple(blocks)).find()


class _Finder:
    """Finds what routes in one trace."""

    def __init__(self, trace: Trace, blocks: tuple[str, ...]) -> None:
        self.trace, self.blocks = trace, blocks
        self.weights = _weights(trace)
        self.projections = self._projections()
        self.expert_counts = self._expert_values()
        self.cut = {projection.op.position for projection in self.projections}

    def find(self) -> dict[str, str]:
        inside = [p for p in self.projections if self._block(p.owner) is not None]
        routers = [p for p in inside if self._chooses_experts(p)]
        found = {p.owner: ROUTER for p in routers}
        found |= {p.owner: ROUTER for p in self._only_through({p.op.position for p in routers})}
        mixtures = [*found, *self._expert_holders()]
        for p in self.projections:
            if p.owner not in found and self._block(p.owner) is not None and self._gates_a_branch(p, mixtures):
                found[p.owner] = SHARED_EXPERT_GATE
        return found

    # -- the parts of the trace -----------------------------------------------------------------------------------
    def _projections(self) -> list[_Projection]:
        found = []
        for op in self.trace.ops:
            if op.linear is not None:
                owner: str | None = op.linear
            elif _name(op) in PRODUCTS:
                matrices = [self.weights[v] for v in op.reads if v in self.weights and self.weights[v][1] == 2]
                owner = matrices[0][0].rpartition(".")[0] if len(matrices) == 1 else None
            else:
                continue
            if owner is not None and op.produces and self.trace.shapes[op.produces[0]]:
                value = op.produces[0]
                found.append(_Projection(op, owner, value, int(self.trace.shapes[value][-1])))
        return found

    def _expert_values(self) -> dict[int, set[int]]:
        """Return value -> the numbers of experts in the layers whose experts computed it, up to the next product.

        What one activation has weighted already is no longer an output of experts alone.
        """
        fixed = {*self.trace.parameters, *self.trace.constants}
        counts: dict[int, set[int]] = defaultdict(set)
        lists = _expert_lists(self.trace, self.blocks)
        for op in self.trace.ops:
            if op.linear is not None:
                owner = next((name for name in lists if op.linear.startswith(name + ".")), None)
                own = {lists[owner]} if owner is not None else set()
            elif _name(op) in PRODUCTS:
                own = {self.weights[v][2] for v in op.reads if v in self.weights and self.weights[v][1] == 3}
                own = {count for count in own if count > 1}
            else:
                experts = [counts[v] for v in op.reads if v in counts]
                factors = [v for v in op.reads if v not in counts and v not in fixed]
                own = set() if _name(op) in FACTORS and factors else set().union(*experts)
            if own:
                for value in op.produces:
                    counts[value] |= own
        return dict(counts)

    def _expert_holders(self) -> list[str]:
        """Return the modules that hold stacked matrices of experts, or a list of them."""
        stacked = {n for n, m in self.trace.modules.items() if has_stacked_weights(m) and self._block(n) is not None}
        return [*stacked, *_expert_lists(self.trace, self.blocks)]

    def _block(self, name: str) -> str | None:
        if not self.blocks:
            return ""
        return next((b for b in self.blocks if name == b or name.startswith(b + ".")), None)

    # -- routers --------------------------------------------------------------------------------------------------
    def _chooses_experts(self, p: _Projection) -> bool:
        """Return True if the outputs of a projection are chosen from, or are factors of experts."""
        return any(
            self._chooses(op, value) or (p.width > 1 and self._weighs_experts(op, value, p.width))
            for op, value in self._readers_up_to_products(p)
        )

    def _chooses(self, op: Op, value: int) -> bool:
        if _name(op) not in CHOOSING or not self.trace.shapes[value]:
            return False
        integers = [v for v in op.writes if self.trace.dtypes[v] == torch.int64]
        used = any(self.trace.readers.get(v) for v in integers) or (self.trace.partial and bool(integers))
        return used and self.trace.shapes[value][_dim(op)] > 1

    def _weighs_experts(self, op: Op, value: int, width: int) -> bool:
        """Return True if an operation multiplies outputs of as many experts by ``value``."""
        if _name(op) not in FACTORS | PRODUCTS or value in self.expert_counts:
            return False
        counts = {count for other in op.reads if other != value for count in self.expert_counts.get(other, ())}
        return width in counts or (_name(op) in PRODUCTS and any(width % count == 0 for count in counts))  # slots

    def _readers_up_to_products(self, p: _Projection, stops: Collection[str] = ()) -> Iterable[tuple[Op, int]]:
        """Yield the operations that read the output of a projection or what is computed from it, with what they read.

        Integers, products, and the operations ``stops`` end the way, and so does a result with more elements: it is
        the other operand (the scores of keys) that the output is a factor of.
        """
        pending, seen = [p.value], {p.value}
        largest = self.trace.shapes[p.value].numel()
        while pending:
            value = pending.pop()
            for op in self.trace.readers.get(value, ()):
                yield op, value
                if (
                    op.position in self.cut
                    or _name(op) in {*PRODUCTS, *stops}
                    or "attention" in _name(op)
                    or "conv" in _name(op)
                ):
                    continue
                for result in op.produces:
                    if result not in seen and self._is_derived(result) and self.trace.shapes[result].numel() <= largest:
                        seen.add(result)
                        pending.append(result)

    def _is_derived(self, value: int) -> bool:
        return self.trace.dtypes[value].is_floating_point or self.trace.dtypes[value] == torch.bool

    def _only_through(self, routers: set[int]) -> list[_Projection]:
        """Return the projections in blocks whose outputs reach the model's outputs through ``routers`` only."""
        if not routers or self.trace.partial:
            return []
        alive = set(self.trace.outputs)
        feeding: set[int] = set()
        for op in reversed(self.trace.ops):
            if op.position in routers:
                feeding.update(op.reads)
                continue
            if alive.intersection(op.produces):
                alive.update(op.reads)
            if feeding.intersection(op.produces):
                feeding.update(op.reads)
        return [
            p
            for p in self.projections
            if p.op.position not in routers
            and self._block(p.owner) is not None
            and p.value in feeding
            and p.value not in alive
        ]

    # -- gates of shared experts ----------------------------------------------------------------------------------
    def _gates_a_branch(self, p: _Projection, mixtures: list[str]) -> bool:
        """Return True if one number per token of a projection multiplies a wider tensor beside a router."""
        if p.width > WIDEST_GATE:
            return False
        for op, value in self._readers_up_to_products(p, REDUCTIONS):
            if _name(op) not in FACTORS or not self.trace.shapes[value] or self.trace.shapes[value][-1] != 1:
                continue
            wide = [v for v in op.reads if v != value and self.trace.shapes[v] and self.trace.shapes[v][-1] > 1]
            part = _common(p.op.module, op.module)
            block = self._block(p.owner)
            beside = part != block or p.width == 1
            within = f"{part}." if part else ""
            if wide and beside and part.startswith(block or "") and any(name.startswith(within) for name in mixtures):
                return True
        return False


def _name(op: Op) -> str:
    return getattr(op.function, "_opname", "").removeprefix("_") if op.linear is None else ""


def _dim(op: Op) -> int:
    """Return the dimension among whose entries an operation chooses."""
    position = 2 if _name(op) in ("topk", "kthvalue") else 1
    dim = op.args[position] if len(op.args) > position else op.kwargs.get("dim", -1)
    return dim if isinstance(dim, int) and not isinstance(dim, bool) else -1


def _common(left: str, right: str) -> str:
    parts = []
    for one, other in zip(left.split("."), right.split("."), strict=False):
        if one != other:
            break
        parts.append(one)
    return ".".join(parts)


def _weights(trace: Trace) -> dict[int, tuple[str, int, int]]:
    """Return value -> (name of the floating parameter that it is computed from, its dimensions, its first size).

    From it alone: a view, or the parameter scaled or normalized.
    """
    fixed = {*trace.parameters, *trace.constants}
    found = {}
    for value, name in trace.parameters.items():
        shape = trace.shapes[value]
        if trace.dtypes[value].is_floating_point and len(shape) >= 2:
            found[value] = (name, len(shape), int(shape[0]))
    for op in trace.ops:
        if op.linear is None and _name(op) in {name.removeprefix("_") for name in LAYOUT}:
            for read in op.reads[:1]:
                if read in found:
                    found |= dict.fromkeys(op.writes, found[read])
        elif op.linear is None and fixed.issuperset(op.reads):
            source = next((found[read] for read in op.reads if read in found), None)
            if source is not None:
                found |= {value: source for value in op.produces if len(trace.shapes[value]) >= 2}
        if op.linear is None and op.reads and fixed.issuperset(op.reads):
            fixed.update(op.produces)
    return found


def _expert_lists(trace: Trace, blocks: Collection[str]) -> dict[str, int]:
    """Return the lists in blocks whose members are of one class and are layers: name -> number of members."""
    found = {}
    for name, module in trace.modules.items():
        members = list(module.children()) if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else []
        alike = len(members) > 1 and len({type(member) for member in members}) == 1
        inside = not blocks or any(name.startswith(block + ".") for block in blocks)
        matrices = [sum(p.dim() >= 2 for p in member.parameters()) for member in members]
        if alike and inside and min(matrices) >= 2:
            found[name] = len(members)
    return found


def unfinished(trace: Trace) -> set[str]:
    """Return the linear layers of a partial trace whose outputs no product reads: the forward failed before."""
    needed: set[int] = set()
    used, seen = set(), set()
    for op in reversed(trace.ops):
        if op.linear is not None:
            seen.add(op.linear)
            if needed.intersection(op.produces):
                used.add(op.linear)
        if op.linear is not None or _name(op) in PRODUCTS or needed.intersection(op.produces):
            needed.update(op.reads)
    return seen - used if trace.partial else set()


def siblings(
    found: Mapping[str, str], modules: Mapping[str, nn.Module], reached: Collection[str]
) -> dict[str, str | None]:
    """Return the role of modules that the traced forward did not reach, by their counterparts in other blocks.

    Counterparts have the same class, and the same name up to numbers. All that were reached must have one role, or
    none of them one: the value is then None.
    """
    roles: dict[tuple[str, type], set[str | None]] = defaultdict(set)
    for name in [*reached, *found]:
        if name in modules:
            roles[_kind(name, modules[name])].add(found.get(name))
    result = {}
    for name, module in modules.items():
        known = roles.get(_kind(name, module), set())
        if name not in found and name not in reached and len(known) == 1:
            result[name] = next(iter(known))
    return result


def _kind(name: str, module: nn.Module) -> tuple[str, type]:
    return ".".join("*" if part.isdigit() else part for part in name.split(".")), type(module)
