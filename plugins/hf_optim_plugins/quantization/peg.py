r"""Per-embedding-group quantization: channels of like range share one of K grids for activations.

A few channels of a transformer's activations are far larger than the others, and one 8-bit grid for the whole tensor
leaves the others no resolution. One grid for each channel would, but then no product of integers is left. In between,
the channels stand in K groups, each with a grid of its own, made beforehand from calibration data (section 4 of the
paper)::

    q(x)_j = s_g (clamp(round(x_j / s_g) + z_g, -128, 127) - z_g),     g = g(j)
    y      = sum_g  s_g W_g (c_g - z_g),                               c the codes: K integer products

K = 1 is one grid per tensor, K = d one per channel. The K products are summed in floating point, so the rows of each
W_g have scales of their own at no cost: what outliers of the input make small in the weight keeps its resolution, too.

Channels are first sorted by their range, so that those of like
range meet in one group. The sorting is folded into the weights, in three places, and inference pays nothing for it:

- the residual stream: columns of embeddings, gains of norms, columns of what reads the stream, rows of what writes it;
- the neurons of a feed-forward layer: rows of the first matrix (and of the gate), columns of the second;
- the value channels of an attention head: rows of the value projection, columns of the output projection. Here group g
  is the g-th part of every head.

Bondarenko, Nagel, Blankevoort, "Understanding and Overcoming the Challenges of Efficient Transformer Quantization",
arXiv 2109.12948, which has groups of even size on the input, the output and the sum of BERT's feed-forward layers. Here
all inputs of linears and of norms (the residual sums) have groups, and by default their sizes are fitted: of all ways
to cut the sorted channels into K intervals the one with the least noise, ``sum_g n_g (range of g)^2``. With even sizes
one in K channels shares the outliers' grid, however few outliers there are.

Where a model returns its residual stream (an encoder without a head), the order of its channels would show, so it
stays; the groups then list their channels, with the same numbers. The modules store int8 weights and the grids; they
round their inputs and compute the product in floating point on decoded weights. So the checkpoint is smaller, and no
step is faster yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_optim import Contract, ModelError, Paper, Reload, Run, Scope, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode
from hf_optim.toolkit import topology
from hf_optim.toolkit.permutation import folding
from hf_optim.toolkit.pruning import require_finite
from hf_optim.toolkit.quantization import ChannelMinMax, even_groups, group_qparams, optimal_groups
from hf_optim.toolkit.topology import LinearPair, ResidualStream, find_residual_stream, permute_residual_

from ._activation_code import Grids, code_of, install, separate

Ranges = dict[str, tuple[Tensor, Tensor]]
UNSEEN = "no calibration input reached it"


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
    """Activations in 8 bits with a grid for each group of channels of like range, and 8-bit weights.

    Attributes:
        targets: which linears.
        skip: which of them to leave out.
        groups: K, how many groups the channels of an input stand in.
        permute: sort channels by range first. False: groups are slices of the channels as they stand.
        split: sizes of the groups: ``"even"`` as in the paper, or ``"fitted"`` for the least noise.
        sites: which inputs have groups: ``"all"``, or ``"residual"``: those that come from the residual stream, as in
            the paper; the others have one grid per tensor then.
        sums: also round the residual sums, which the norms read.
        bits: of a weight, symmetric; None leaves weights as they are.
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
        layers, skipped = separate(scope.model, scope.select(self.targets, self.skip))
        require_finite(
            {f"{name}.weight": layer.get_parameter("weight") for name, layer in layers.items()}, run.label(self)
        )
        wiring = Wiring.of(scope.model)
        norms = {name: scope.model.get_submodule(name) for name in wiring.norms if self.sums}
        with ChannelMinMax({**layers, **norms}, run.label(self)) as ranges:
            yield
        idle = [name for name in (*layers, *norms) if name not in ranges]
        if idle:
            skipped[UNSEEN] = idle
        orders, folded = self._arrange(wiring, ranges)
        grids = {name: self._grids(name, ranges[name], order, wiring) for name, order in orders.items()}
        seen = [name for name in layers if name in ranges]
        sums = [name for name in norms if name in ranges]
        install(scope.model, self.remote_code, seen, sums, grids, self.bits, self.strategy == "group")
        run.cover(self, seen, skipped)
        run.report(
            self,
            linear_inputs=len(seen),
            residual_sums=len(grids) - len(seen),
            orders_folded=folded,
            groups=self.groups,
            noise_against_one_group=round(relative_noise(ranges, {n: g.group for n, g in grids.items()}), 6),
            **({"residual_order": wiring.obstacle} if self.permute and wiring.obstacle else {}),
        )

    def _arrange(self, wiring: Wiring, ranges: Ranges) -> tuple[dict[str, Tensor], int]:
        """Sort the channels, in the weights where that is exact; ``ranges`` follow.

        Returns, for each input, the order in which its channels are cut into groups, and how many orders were folded.
        """
        orders = {name: torch.arange(low.numel()) for name, (low, _) in ranges.items()}
        if not self.permute:
            return orders, 0
        folded = wiring.sort_residual_(ranges, orders)
        own = {name for name in ranges if name not in wiring.shared}
        for pair in wiring.pairs:
            if pair.consumer in own:
                orders[pair.consumer] = sort_pair_(pair, ranges)
                own.remove(pair.consumer)
                folded += 1
        orders.update({name: width(ranges[name]).argsort(stable=True) for name in own})
        return orders, folded

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


@dataclass
class Wiring:
    """What may be sorted in a model: its residual stream, and pairs of linears.

    Attributes:
        model: the model.
        residual: its stream, or None; ``obstacle`` then says why.
        pairs: linears with corresponding channels.
        obstacle: why the order of the stream cannot be changed; empty if it can.
    """

    model: nn.Module
    residual: ResidualStream | None
    pairs: list[LinearPair]
    obstacle: str = ""

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

    def sort_residual_(self, ranges: Ranges, orders: dict[str, Tensor]) -> int:
        """Sort the stream by the range of its channels; how many orders were folded into weights: 1 or 0."""
        names = [name for name in ranges if name in self.shared]
        if self.residual is None or not names:
            return 0
        order = common_order([ranges[name] for name in names])
        try:
            permute_residual_(self.model, order, self.residual)  # type: ignore[arg-type]
        except ModelError as error:
            self.obstacle = str(error)
            orders.update(dict.fromkeys(names, order))
            return 0
        ranges.update({name: reordered(ranges[name], order) for name in names})
        return 1


def width(ends: tuple[Tensor, Tensor]) -> Tensor:
    """The width of each channel's range with 0 in it, ``[channels]`` on the CPU."""
    low, high = ends
    return (high.clamp_min(0) - low.clamp_max(0)).cpu()


def reordered(ends: tuple[Tensor, Tensor], order: Tensor) -> tuple[Tensor, Tensor]:
    return ends[0][order.to(ends[0].device)], ends[1][order.to(ends[1].device)]


def common_order(sites: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One order of the channels for several inputs, ``[channels]`` int64: by the largest of their relative widths.

    The widths of an input are taken relative to their median, so that no input outweighs the others by its size alone.
    """
    relative = [w / w.median().clamp_min(1e-12) for w in map(width, sites)]
    return torch.stack(relative).amax(0).argsort(stable=True)


def sort_pair_(pair: LinearPair, ranges: Ranges) -> Tensor:
    """Sort the channels between two linears by range, each within its own exchange group, in their weights.

    Returns the order in which the consumer's columns are cut: the first of every group, then the second ...
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
    """Noise of the grids relative to that of one grid per tensor, the mean over inputs."""
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
