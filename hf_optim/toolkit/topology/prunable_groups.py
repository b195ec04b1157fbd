"""The parts of a transformer that can be taken out whole: neurons of feed-forward layers and heads of attention.

A unit is what has to go together so that the rest computes what it computed with the unit's output at zero: columns of
the linear that reads it, rows of every linear that makes it, and the entries of other parameters that are its own
(a bias for each head on the attention scores). With grouped-query attention a unit is a key/value head with all its
query heads.

Found on a trace. What is between two linears says which of their channels correspond (``pairing``); where a channel
of one token reaches others, it is attention. Which rows of queries and keys belong to a head is asked of the
operations: those to which the head's columns of the output projection have a gradient that is not zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .block_lists import block_of, blocks
from .graph import Op, Trace
from .layer_pairs import LinearPair, find_linear_pairs
from .linear_layers import is_linear
from .reexecution import NotReexecutable, Reexecution, is_close, memoize, ops_signature, random_tensor

HEADS, NEURONS = "heads", "neurons"


@dataclass(frozen=True, eq=False)
class PrunableGroups:
    """The units of one feed-forward or attention layer.

    Attributes:
        kind: ``"neurons"`` or ``"heads"``.
        block: name of the block that holds them.
        consumer: name of the linear that reads them.
        columns: int64 ``[units, columns of each]``, the inputs of the reader.
        entries: for each parameter that has entries of the units, the reader's weight among them: the dimension they
            lie along, and which they are, int64 ``[units, entries of each]``.
        width: width of a unit where the model's configuration may have to name it: columns of a head; 1 for neurons.
    """

    kind: str
    block: str
    consumer: str
    columns: Tensor
    entries: dict[str, tuple[int, Tensor]]
    width: int

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def query_heads(self) -> int:
        """Query heads of each unit; 1 for neurons."""
        return self.columns.shape[1] // self.width


def find_prunable_groups(trace: Trace) -> list[PrunableGroups]:
    """The units of every feed-forward and attention layer in the blocks of a model, in the order in which they run.

    Layers that share their weights with others have none, and neither have experts.
    """
    found = blocks(trace)
    units = []
    for pair in find_linear_pairs(trace):
        block = block_of(found, pair.producer)
        if block is not None and block.holds(pair.consumer):
            units += list(_units(trace, pair, block.name))
    return units


def coupled_layers(units: Iterable[PrunableGroups]) -> list[list[PrunableGroups]]:
    """The layers that share parameters of their units, and so must lose the same ones, together; others alone."""
    groups: list[list[PrunableGroups]] = []
    for one in units:
        touching = [group for group in groups if any(one.entries.keys() & other.entries.keys() for other in group)]
        groups = [group for group in groups if all(group is not other for other in touching)]
        groups.append([*(other for group in touching for other in group), one])
    return groups


def _units(trace: Trace, pair: LinearPair, block: str) -> Iterator[PrunableGroups]:
    source, target = trace.calls_of(pair.producer)[0].writes[0], trace.calls_of(pair.consumer)[0].reads[0]
    try:
        ops, sources = upstream(trace, target)
        if _mixes_tokens(trace, ops, source, target):
            heads = _heads(trace, pair, ops, sources, target)
            if heads is not None:
                rows = torch.bincount(pair.groups)
                yield PrunableGroups(HEADS, block, pair.consumer, _columns(pair), heads, int(rows[0]))
        elif pair.groups.unique().numel() == 1 and pair.repeat == 1:
            yield PrunableGroups(NEURONS, block, pair.consumer, pair.columns, _neurons(trace, pair), 1)
    except NotReexecutable:
        return


def upstream(trace: Trace, target: int) -> tuple[tuple[Op, ...], tuple[int, ...]]:
    """The operations that make the value ``target`` of outputs of linears, and all floating values they start from."""
    makers = {value: op for op in trace.ops for value in op.produces}
    pending = [target]
    ops: dict[int, Op] = {}
    sources: dict[int, None] = {}
    seen = {target}
    while pending:
        value = pending.pop()
        maker = makers.get(value)
        if maker is None or maker.linear is not None:
            if trace.dtypes[value].is_floating_point and value not in trace.constants:
                sources[value] = None
            continue
        ops[maker.position] = maker
        pending += [read for read in maker.reads if read not in seen]
        seen.update(maker.reads)
    return tuple(ops[position] for position in sorted(ops)), tuple(sorted(sources))


def _mixes_tokens(trace: Trace, ops: tuple[Op, ...], source: int, target: int) -> bool:
    """Whether the first token of ``source`` [..., tokens, channels] reaches later tokens of ``target``."""
    shape = trace.shapes[source]
    if len(shape) < 2 or shape[-2] < 2:
        return False

    def answer() -> bool:
        replay = Reexecution(trace, ops, seed=21, guess_integers=True)
        before = random_tensor(shape, seed=22)
        moved = before.clone()
        moved[..., 0, :] = random_tensor(shape, seed=23)[..., 0, :]
        one, two = replay.run({source: before})[target], replay.run({source: moved})[target]
        return not is_close(one[..., 1:, :], two[..., 1:, :])

    return memoize(trace, ("mixes", ops_signature(trace, ops, (source, target))), answer)


def _neurons(trace: Trace, pair: LinearPair) -> dict[str, tuple[int, Tensor]]:
    entries = {f"{pair.consumer}.weight": (_input_dim(pair.consumer_module), pair.columns)}
    makers = [(pair.producer, pair.rows), *((partner.name, partner.rows) for partner in pair.permutable_with)]
    for name, rows in makers:
        for key, dim in _output_parameters(trace.modules[name], name).items():
            # A fused gate and up projection is its own partner: a neuron has two rows of it.
            known = [entries[key][1]] if key in entries else []
            entries[key] = (dim, torch.cat([*known, rows.unsqueeze(1)], dim=1))
    return entries


def _columns(pair: LinearPair) -> Tensor:
    """[heads, columns of each]: of each group of a pair, ascending."""
    return torch.stack([pair.columns[pair.groups == group].flatten().sort().values for group in pair.groups.unique()])


def _heads(
    trace: Trace, pair: LinearPair, ops: tuple[Op, ...], sources: tuple[int, ...], target: int
) -> dict[str, tuple[int, Tensor]] | None:
    """The entries of each head in every parameter; None where some linear mixes heads."""
    if torch.bincount(pair.groups).unique().numel() != 1:
        return None
    columns = _columns(pair)
    question = ("heads", ops_signature(trace, ops, (target, *sources)), tuple(map(tuple, columns.tolist())))
    owned = memoize(trace, question, lambda: _owned(trace, ops, sources, target, columns))
    makers = {value: op for op in trace.ops for value in op.produces}
    entries = {f"{pair.consumer}.weight": (_input_dim(pair.consumer_module), columns)}
    for value, parts in zip(sources, owned, strict=True):
        maker = makers.get(value)
        if maker is not None and maker.linear is not None:
            dim = len(trace.shapes[value]) - 1
            if dim not in parts:
                return None
            module = trace.modules[maker.linear]
            entries |= {key: (d, parts[dim]) for key, d in _output_parameters(module, maker.linear).items()}
        elif parts:
            entries |= {name: next(iter(parts.items())) for name in _parameters(trace, value)}
    return entries


def _owned(
    trace: Trace, ops: tuple[Op, ...], sources: tuple[int, ...], target: int, columns: Tensor
) -> list[dict[int, Tensor]]:
    """For each source the dimensions along which every head has entries of its own, and which: ``[heads, entries]``."""
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
    """The dimensions of ``touched`` [heads, ...] along which the heads have equal, disjoint parts."""
    found = {}
    for dim in range(touched.dim() - 1):
        others = [d for d in range(1, touched.dim()) if d != dim + 1]
        mine = touched.any(dim=others) if others else touched
        counts = mine.sum(1)
        if int(counts[0]) and bool((counts == counts[0]).all()) and int(mine.sum(0).max()) == 1:
            found[dim] = torch.stack([row.nonzero().flatten() for row in mine])
    return found


def _parameters(trace: Trace, value: int) -> list[str]:
    """The names of the parameters that a value without a maker can be: of its shape, of the modules that read it."""
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


def _output_parameters(linear: nn.Module, name: str) -> dict[str, int]:
    """The weight and the bias of a linear, each with the dimension of its outputs."""
    assert is_linear(linear)
    entries = {f"{name}.weight": 0 if isinstance(linear, nn.Linear) else 1}
    if linear.bias is not None:
        entries[f"{name}.bias"] = 0
    return entries
