"""Prunable groups: the smallest parts of a transformer that can be removed, neurons and attention heads.

A group is a set of parameter entries that must be removed together, so that the rest computes what it computed with the
group's output at zero: columns of the linear layer that reads it (the consumer), rows of every linear layer that
computes it, and the entries of other parameters that belong to it alone (a bias for each head on the attention scores).
With grouped-query attention a group is a key/value head with all its query heads.

Groups are found on a trace. The operations between two linear layers determine which of their channels correspond
(``layer_pairs``); if a channel of one token reaches other tokens, the layer is attention. The rows of queries and keys
that belong to a head are those for which the head's columns of the output projection have a nonzero gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .block_lists import block_of, blocks
from .graph import Op, Trace
from .layer_pairs import LinearPair, find_linear_pairs
from .linear_layers import is_linear
from .reexecution import NotReexecutable, Reexecution, is_close, memoize, ops_signature, random_tensor
from .routing import find_routing

HEADS, NEURONS = "heads", "neurons"

Entries = dict[str, tuple[int, Tensor]]
"""Parameter name -> the dimension along which groups have entries in it, and their indices ``[groups, entries]``."""


@dataclass(frozen=True, eq=False)
class PrunableGroups:
    """The prunable groups of one feed-forward or attention layer. Its length is the number of groups.

    Attributes:
        kind: ``"neurons"`` or ``"heads"``.
        block: name of the block that contains them.
        consumer: name of the linear layer that reads them.
        columns: int64 ``[groups, columns of each]``, the inputs of the consumer.
        entries: for each parameter with entries of the groups, including the consumer's weight: the dimension that they
            are along, and their indices, int64 ``[groups, entries of each]``.
        width: the width of a group that the model's configuration may state: columns of a head; 1 for neurons.
    """

    kind: str
    block: str
    consumer: str
    columns: Tensor
    entries: Entries
    width: int

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def query_heads(self) -> int:
        """Number of query heads of each group; 1 for neurons."""
        return self.columns.shape[1] // self.width


def find_prunable_groups(trace: Trace) -> list[PrunableGroups]:
    """Return the groups of every feed-forward and attention layer in the blocks of a model, in execution order.

    Layers with tied weights have no groups, and neither have experts, nor what a router reads or is made of.
    """
    found = blocks(trace)
    routers = find_routing(trace, [block.name for block in found])
    layers = []
    for pair in find_linear_pairs(trace):
        block = block_of(found, pair.producer)
        if block is not None and block.holds(pair.consumer):
            layers += [groups for groups in groups_of(trace, pair, block.name) if not _touches(groups, routers)]
    return layers


def _touches(groups: PrunableGroups, modules: Collection[str]) -> bool:
    return any(parameter.rpartition(".")[0] in modules for parameter in groups.entries)


def coupled_layers(layers: Iterable[PrunableGroups]) -> list[list[PrunableGroups]]:
    """Collect the layers whose groups share parameters, and which must therefore lose the same groups.

    A layer that shares none is returned in its own list.
    """
    coupled: list[list[PrunableGroups]] = []
    for layer in layers:
        touching = [group for group in coupled if any(layer.entries.keys() & other.entries.keys() for other in group)]
        coupled = [group for group in coupled if all(group is not other for other in touching)]
        coupled.append([*(other for group in touching for other in group), layer])
    return coupled


def groups_of(trace: Trace, pair: LinearPair, block: str) -> Iterator[PrunableGroups]:
    """Yield the groups of the pair's consumer, of one kind; none if they cannot be told."""
    source, target = trace.calls_of(pair.producer)[0].writes[0], trace.calls_of(pair.consumer)[0].reads[0]
    try:
        ops, sources = upstream(trace, target)
        if mixes_tokens(trace, ops, source, target):
            entries = _head_entries(trace, pair, ops, sources, target)
            if entries is not None:
                rows = torch.bincount(pair.groups)
                yield PrunableGroups(HEADS, block, pair.consumer, _head_columns(pair), entries, int(rows[0]))
        elif pair.groups.unique().numel() == 1 and pair.repeat == 1:
            yield PrunableGroups(NEURONS, block, pair.consumer, pair.columns, _neuron_entries(trace, pair), 1)
    except NotReexecutable:
        return


def upstream(trace: Trace, target: int) -> tuple[tuple[Op, ...], tuple[int, ...]]:
    """Return the operations that compute ``target`` from outputs of linear layers, and their floating inputs."""
    producers = {value: op for op in trace.ops for value in op.produces}
    pending = [target]
    ops: dict[int, Op] = {}
    sources: dict[int, None] = {}
    seen = {target}
    while pending:
        value = pending.pop()
        producer = producers.get(value)
        if producer is None or producer.linear is not None:
            if trace.dtypes[value].is_floating_point and value not in trace.constants:
                sources[value] = None
            continue
        ops[producer.position] = producer
        pending += [read for read in producer.reads if read not in seen]
        seen.update(producer.reads)
    return tuple(ops[position] for position in sorted(ops)), tuple(sorted(sources))


def mixes_tokens(trace: Trace, ops: tuple[Op, ...], source: int, target: int) -> bool:
    """Return True if the first token of ``source`` ``[..., tokens, channels]`` reaches later tokens of ``target``."""
    shape = trace.shapes[source]
    if len(shape) < 2 or shape[-2] < 2:
        return False

    def compute() -> bool:
        reexecution = Reexecution(trace, ops, seed=21, guess_integers=True)
        before = random_tensor(shape, seed=22)
        moved = before.clone()
        moved[..., 0, :] = random_tensor(shape, seed=23)[..., 0, :]
        one, two = reexecution.run({source: before})[target], reexecution.run({source: moved})[target]
        return not is_close(one[..., 1:, :], two[..., 1:, :])

    return memoize(trace, ("mixes", ops_signature(trace, ops, (source, target))), compute)


def _neuron_entries(trace: Trace, pair: LinearPair) -> Entries:
    entries = {f"{pair.consumer}.weight": (_input_dim(pair.consumer_module), pair.columns)}
    producers = [(pair.producer, pair.rows), *((partner.name, partner.rows) for partner in pair.permutable_with)]
    for name, rows in producers:
        for key, dim in _output_dims(trace.modules[name], name).items():
            # A fused gate and up projection is its own partner: a neuron has two rows of it.
            known = [entries[key][1]] if key in entries else []
            entries[key] = (dim, torch.cat([*known, rows.unsqueeze(1)], dim=1))
    return entries


def _head_columns(pair: LinearPair) -> Tensor:
    """Return ``[heads, columns of each]``: the columns of each group of a pair, ascending."""
    return torch.stack([pair.columns[pair.groups == group].flatten().sort().values for group in pair.groups.unique()])


def _head_entries(
    trace: Trace, pair: LinearPair, ops: tuple[Op, ...], sources: tuple[int, ...], target: int
) -> Entries | None:
    """Return the entries of each head in every parameter; None if a linear layer mixes heads."""
    if torch.bincount(pair.groups).unique().numel() != 1:
        return None
    columns = _head_columns(pair)
    key = ("heads", ops_signature(trace, ops, (target, *sources)), tuple(map(tuple, columns.tolist())))
    owned = memoize(trace, key, lambda: _entries_per_source(trace, ops, sources, target, columns))
    producers = {value: op for op in trace.ops for value in op.produces}
    entries = {f"{pair.consumer}.weight": (_input_dim(pair.consumer_module), columns)}
    for value, parts in zip(sources, owned, strict=True):
        producer = producers.get(value)
        if producer is not None and producer.linear is not None:
            dim = len(trace.shapes[value]) - 1
            if dim not in parts:
                return None
            module = trace.modules[producer.linear]
            entries |= {name: (d, parts[dim]) for name, d in _output_dims(module, producer.linear).items()}
        elif parts:
            entries |= {name: next(iter(parts.items())) for name in _candidate_parameters(trace, value)}
    return entries


def _entries_per_source(
    trace: Trace, ops: tuple[Op, ...], sources: tuple[int, ...], target: int, columns: Tensor
) -> list[dict[int, Tensor]]:
    """For each source, return dimension -> the entries of each head along it, ``[heads, entries]``, if disjoint."""
    inputs = {v: random_tensor(trace.shapes[v], seed=31 + n).mul_(0.2) for n, v in enumerate(sources)}
    touched: dict[int, list[Tensor]] = {value: [] for value in sources}
    with torch.enable_grad():
        for tensor in inputs.values():
            tensor.requires_grad_(True)
        output = Reexecution(trace, ops, seed=32, guess_integers=True).run(inputs)[target]
        for part in columns:
            along = random_tensor(output.shape, seed=33)[..., part]
            found = torch.autograd.grad(
                (output[..., part] * along).sum(), list(inputs.values()), retain_graph=True, allow_unused=True
            )
            for value, gradient in zip(inputs, found, strict=True):
                touched[value].append(torch.zeros(trace.shapes[value]) if gradient is None else gradient)
    return [_partitions(torch.stack(touched[value]) != 0) for value in sources]


def _partitions(touched: Tensor) -> dict[int, Tensor]:
    """Return the dimensions of ``touched`` ``[heads, ...]`` along which the heads have equal, disjoint parts."""
    found = {}
    for dim in range(touched.dim() - 1):
        others = [d for d in range(1, touched.dim()) if d != dim + 1]
        mine = touched.any(dim=others) if others else touched
        counts = mine.sum(1)
        if int(counts[0]) and bool((counts == counts[0]).all()) and int(mine.sum(0).max()) == 1:
            found[dim] = torch.stack([row.nonzero().flatten() for row in mine])
    return found


def _candidate_parameters(trace: Trace, value: int) -> list[str]:
    """Return the parameters that a value without a producer can be: those of its shape in the modules that read it."""
    shape = trace.shapes[value]
    modules = dict.fromkeys(op.module for op in trace.readers[value])
    held = [
        (f"{module}.{name}" if module else name, parameter)
        for module in modules
        for name, parameter in trace.modules[module].named_parameters(recurse=False)
    ]
    return [name for name, parameter in held if parameter.shape == shape]


def _input_dim(linear: nn.Module) -> int:
    return 1 if isinstance(linear, nn.Linear) else 0


def _output_dims(linear: nn.Module, name: str) -> dict[str, int]:
    """Return the weight and the bias of a linear layer by name, each with the dimension of its outputs."""
    assert is_linear(linear)
    dims = {f"{name}.weight": 0 if isinstance(linear, nn.Linear) else 1}
    if linear.bias is not None:
        dims[f"{name}.bias"] = 0
    return dims
