r"""Per-embedding-group quantization: channels of similar range share one of K grids for activations.

A few channels of a transformer's activations are far larger than the others, and a single 8-bit grid for the whole
tensor leaves the others no resolution. One grid per channel would fix that, but then no integer product is left. In
between, the channels are divided into K groups, each with its own grid from calibration data (section 4 of the paper)::

    q(x)_j = s_g (clamp(round(x_j / s_g) + z_g, -128, 127) - z_g),     g = g(j)
    y      = sum_g  s_g W_g (c_g - z_g),                               c the codes: K integer products

K = 1 is one grid per tensor, K = d one per channel. The K products are summed in floating point, so the rows of each
W_g can have their own scales at no cost: weights that are small because the inputs are outliers keep their resolution,
too.

Channels are first sorted by their range, so that channels of similar range are in one group. The sorting is folded into
the weights, in three places, and costs nothing at inference:

- the residual stream: columns of embeddings, gains of norms, columns of the layers that read the stream, rows of those
  that write it;
- the neurons of a feed-forward layer: rows of the first matrix (and of the gate), columns of the second;
- the value channels of an attention head: rows of the value projection, columns of the output projection. Here group g
  is the g-th part of every head.

Bondarenko, Nagel, Blankevoort, "Understanding and Overcoming the Challenges of Efficient Transformer Quantization",
arXiv 2109.12948, which has groups of even size on the input, the output and the sum of BERT's feed-forward layers. Here
all inputs of linears and of norms (the residual sums) have groups, and by default their sizes are fitted: of all ways
to cut the sorted channels into K intervals the one with the least noise, ``sum_g n_g (range of g)^2``. With even sizes
one in K channels shares the outliers' grid, however few outliers there are. The paper's weights have one scale per
tensor, those here one for each row and group of inputs (``strategy``).

If a model returns its residual stream (an encoder without a head), the order of the stream's channels would be visible,
so it is kept; the groups then list their channels, with the same results. The modules store int8 weights and the grids;
they round their inputs and compute the product in floating point on decoded weights. So the checkpoint is smaller, but
no step is faster yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hf_optim import Contract, ModelError, Paper, Reload, Run, Scope, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode
from hf_optim.toolkit import topology
from hf_optim.toolkit.permutation import folding
from hf_optim.toolkit.pruning import require_finite
from hf_optim.toolkit.quantization import ChannelMinMax, even_groups, group_qparams, optimal_groups
from hf_optim.toolkit.topology import LinearPair, ResidualStream, find_residual_stream, not_reached, permute_residual_

from . import _recompute_activations
from ._activation_code import Grids, code_of, install, select_unshared

Ranges = dict[str, tuple[Tensor, Tensor]]


@technique(
    "peg",
    family="quantization",
    paper=Paper(
        "2109.12948", "Understanding and Overcoming the Challenges of Efficient Transformer Quantization", 2021
    ),
    contract=Contract(needs={traits.FLOAT_WEIGHTS}, adds={traits.QUANTIZED}, drops={traits.FLOAT_WEIGHTS}),
    reload=Reload.REMOTE_CODE,
)
class PEG(Technique):
    """Quantize activations to 8 bits with one scale per group of channels of similar range, and weights to 8 bits.

    Attributes:
        targets: linear layers to quantize, by class, name or pattern.
        skip: patterns of layers to leave out.
        groups: K, the number of groups of an input's channels.
        permute: sort channels by range first. False: groups are slices of the channels in their own order.
        split: sizes of the groups: ``"even"`` as in the paper, or ``"fitted"`` for the least noise.
        sites: which inputs have groups: ``"all"``, or ``"residual"``: those that come from the residual stream, as in
            the paper; the others then have one grid per tensor.
        sums: also round the residual sums, which the norms read.
        bits: of a weight, symmetric; None leaves weights unquantized.
        strategy: which weights share a scale: those of an output channel (``"channel"``), or of an output channel and a
            group of inputs (``"group"``).
    """

    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()
    groups: int = option(6, low=1)
    permute: bool = True
    split: Literal["even", "fitted"] = "fitted"
    sites: Literal["all", "residual"] = "all"
    sums: bool = True
    bits: int | None = option(8, low=2, high=8)
    strategy: Literal["channel", "group"] = "group"

    remote_code: ClassVar[RemoteCode] = code_of("peg")

    def needs_whole_model(self) -> bool:
        return True

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        layers, skipped = select_unshared(scope.model, scope.select(self.targets, self.skip))
        require_finite(
            {f"{name}.weight": layer.get_parameter("weight") for name, layer in layers.items()}, run.label(self)
        )
        wiring = Wiring.of(scope.model)
        norms = {name: scope.model.get_submodule(name) for name in wiring.norms if self.sums}
        with ChannelMinMax({**layers, **norms}, run.label(self)) as ranges:
            yield
        skipped |= not_reached((*layers, *norms), ranges)
        found = self._arrange(wiring, ranges)
        grids = {name: self._grids(name, ranges[name], order, wiring) for name, order in found.orders.items()}
        seen = [name for name in layers if name in ranges]
        sums = [name for name in norms if name in ranges]
        install(scope.model, self.remote_code, seen, sums, grids, self.bits, self.strategy == "group")
        run.cover(self, seen, skipped)
        run.report(
            self,
            linear_inputs=len(seen),
            residual_sums=len(grids) - len(seen),
            orders_folded=found.folded,
            groups=self.groups,
            noise_against_one_group=round(relative_noise(ranges, {n: g.group for n, g in grids.items()}), 6),
            **({"residual_order": found.reason} if found.reason else {}),
        )

    def _arrange(self, wiring: Wiring, ranges: Ranges) -> Arrangement:
        """Sort the channels by range, in the weights where that is exact; ``ranges`` are updated."""
        orders = {name: torch.arange(low.numel()) for name, (low, _) in ranges.items()}
        if not self.permute:
            return Arrangement(orders, 0, "")
        stream = wiring.sort_residual_(ranges)
        orders |= stream.orders
        folded = stream.folded
        own = {name for name in ranges if name not in wiring.shared}
        for pair in wiring.pairs:
            if pair.consumer in own:
                orders[pair.consumer] = sort_pair_(pair, ranges)
                own.remove(pair.consumer)
                folded += 1
        orders.update({name: width(ranges[name]).argsort(stable=True) for name in own})
        return Arrangement(orders, folded, stream.reason)

    def _grids(self, name: str, ends: tuple[Tensor, Tensor], order: Tensor, wiring: Wiring) -> Grids:
        low, high = ends
        groups = self.groups if self.sites == "all" or name in wiring.shared else 1
        along = (
            even_groups(low.numel(), groups)
            if self.split == "even"
            else optimal_groups(low.cpu()[order], high.cpu()[order], groups)
        )
        group = torch.empty_like(along)
        group[order] = along
        module = wiring.model.get_submodule(name)
        return Grids(*group_qparams(low, high, group, module.get_parameter("weight").dtype), group)

    def recompute(self, case: Any) -> dict[str, Any]:
        return _recompute_activations.peg(case)


class Arrangement(NamedTuple):
    """The order in which the channels of each input are cut into groups.

    Attributes:
        orders: name of the reader -> int64 ``[channels]``.
        folded: number of orders that are folded into the weights.
        reason: why the order of the residual stream is not; empty if it is.
    """

    orders: dict[str, Tensor]
    folded: int
    reason: str


@dataclass(frozen=True)
class Wiring:
    """The parts of a model whose channels may be sorted: its residual stream, and pairs of linears.

    Attributes:
        model: the model.
        residual: its stream, or None.
        pairs: linears with corresponding channels.
        reason: why the model has no residual stream to sort; empty if it has one.
    """

    model: nn.Module
    residual: ResidualStream | None
    pairs: list[LinearPair]
    reason: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> Wiring:
        trace = topology.trace(model)
        try:
            return cls(model, find_residual_stream(trace), topology.find_linear_pairs(trace))
        except ModelError as error:
            return cls(model, None, topology.find_linear_pairs(trace), str(error))

    @property
    def norms(self) -> tuple[str, ...]:
        return self.residual.norms if self.residual else ()

    @property
    def shared(self) -> set[str]:
        """Names of the modules whose input is in the order of the residual stream."""
        return {*self.residual.readers, *self.residual.norms} if self.residual else set()

    def sort_residual_(self, ranges: Ranges) -> Arrangement:
        """Sort the stream by the range of its channels.

        If the order is folded into the weights, ``ranges`` are updated. Otherwise the result has the order of each
        input that reads the stream, and the reason.
        """
        names = [name for name in ranges if name in self.shared]
        if self.residual is None or not names:
            return Arrangement({}, 0, self.reason)
        order = common_order([ranges[name] for name in names])
        try:
            permute_residual_(self.model, order, self.residual)  # type: ignore[arg-type]
        except ModelError as error:
            return Arrangement(dict.fromkeys(names, order), 0, str(error))
        ranges.update({name: reordered(ranges[name], order) for name in names})
        return Arrangement({}, 1, "")


def width(ends: tuple[Tensor, Tensor]) -> Tensor:
    """Return the width of each channel's range, extended to contain 0: ``[channels]`` on the CPU."""
    low, high = ends
    return (high.clamp_min(0) - low.clamp_max(0)).cpu()


def reordered(ends: tuple[Tensor, Tensor], order: Tensor) -> tuple[Tensor, Tensor]:
    return ends[0][order.to(ends[0].device)], ends[1][order.to(ends[1].device)]


def common_order(sites: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return one order of the channels for several inputs, int64 ``[channels]``: by the largest relative width.

    The widths of an input are divided by their median, so that no input outweighs the others by its size alone.
    """
    relative = [w / w.median().clamp_min(1e-12) for w in map(width, sites)]
    return torch.stack(relative).amax(0).argsort(stable=True)


def sort_pair_(pair: LinearPair, ranges: Ranges) -> Tensor:
    """Sort the channels between two linears by range in their weights, each within its own exchange group.

    Returns the order in which the consumer's columns are cut: the first of every group, then the second, and so on.
    """
    widths = folding.max_over_columns(pair, width(ranges[pair.consumer]))
    order, rank = torch.arange(len(widths)), torch.zeros(len(widths), dtype=torch.float64)
    for number in pair.groups.unique():
        members = (pair.groups == number).nonzero().flatten()
        order[members] = members[widths[members].argsort(stable=True)]
        rank[members] = torch.arange(len(members), dtype=torch.float64) / len(members)
    columns = pair.column_order(order)
    folding.permute_pair_(pair, order)
    ranges[pair.consumer] = reordered(ranges[pair.consumer], columns)
    return folding.expand_to_columns(pair, rank).argsort(stable=True)


def relative_noise(ranges: Ranges, groups: dict[str, Tensor]) -> float:
    """Return the noise of the grids relative to that of one grid per tensor, averaged over the inputs."""
    shares = []
    for name, group in groups.items():
        low, high = (end.double().cpu() for end in ranges[name])
        count = int(group.max()) + 1
        start = torch.zeros(count, dtype=torch.float64)
        widths = start.scatter_reduce(0, group, high, "amax") - start.scatter_reduce(0, group, low, "amin")
        whole = len(group) * float(high.max().clamp_min(0) - low.min().clamp_max(0)) ** 2
        shares.append(float((widths[group] ** 2).sum()) / whole if whole else 1.0)
    return sum(shares) / len(shares) if shares else 1.0


@hookimpl
def register_techniques(register):
    register(PEG)
