"""Hierarchical all-to-all: tokens reach the ranks of their experts in two exchanges over the grid of nodes.

    flat           G - 1 messages of m bytes from every rank to every other
    intra_first    L - 1 messages of N m bytes within the node, then N - 1 of L m bytes between nodes
    inter_first    N - 1 messages of L m bytes between nodes, then L - 1 of N m bytes within the node

with G = N L ranks on N nodes. A rank sends (L - 1) + (N - 1) messages in place of N L - 1, and each that leaves the
node is L times as large. The bytes between nodes are the same; those within a node grow up to N times. So it gains
where messages are so small that their number costs more than their bytes.

Nie et al., "HetuMoE: An Efficient Trillion-scale Mixture-of-Expert Distributed Training System", arXiv 2203.14685,
gather within the node first; Tutel's 2DH (arXiv 2206.03382) goes between nodes first. Both orders are here, and equal
the flat exchange to the bit, forward and backward: what a rank receives has the same order. Rows are exchanged without
padding, so ranks may send any numbers of tokens.

The weights and the class do not change. The setting stands in ``config.json`` (``"hf_optim": {"exchange": ...}``). It
is an ``EPImplementation`` of transformers (from 5.23 on): ``optim_config="auto"`` with a ``distributed_config`` uses
it, ``hf_optim.accelerate`` and ``hf_optim.restore`` switch it. ``hf_optim.toolkit.distributed.all_to_all`` and
``hf_optim.toolkit.experts.exchange_experts`` are the same on plain ``torch.distributed``.
"""

from __future__ import annotations

from typing import Literal

from hf_optim import Paper, Reload, hookimpl, option, technique

from ._exchange import CONTRACT, ExchangeTechnique


@technique(
    "hierarchical_all_to_all",
    family="moe",
    paper=Paper(
        "2203.14685", "HetuMoE: An Efficient Trillion-scale Mixture-of-Expert Distributed Training System", 2022
    ),
    contract=CONTRACT,
    reload=Reload.STOCK_DENSE,
    parallel={"expert": "yes"},
)
class HierarchicalAllToAll(ExchangeTechnique):
    """Exchange tokens between the ranks of expert parallelism in two steps: within nodes and between nodes.

    Attributes:
        order: ``intra_first`` (HetuMoE) exchanges within the node and then between nodes; ``inter_first`` (Tutel) the
            other way round; ``flat`` among all ranks at once.
        ranks_per_node: null takes what the launcher's environment states (``LOCAL_WORLD_SIZE``, ``LOCAL_SIZE``,
            ``OMPI_COMM_WORLD_LOCAL_SIZE``, ``MPI_LOCALNRANKS``, ``SLURM_NTASKS_PER_NODE``), else one node.
        timeout: seconds that a rank waits for the others of its node or column; null is the default of the backend.
    """

    kind = "hierarchical"

    order: Literal["intra_first", "inter_first", "flat"] = "intra_first"
    ranks_per_node: int | None = option(None, low=1, high=2**20)
    timeout: float | None = option(None, above=0.0, high=86400.0)

    def sentence(self, layers: int) -> str:
        ranks = "as the launcher states" if self.ranks_per_node is None else f"of {self.ranks_per_node} ranks"
        order = {
            "intra_first": "within the node first, then between nodes",
            "inter_first": "between nodes first, then within the node",
            "flat": "among all ranks at once",
        }[self.order]
        return (
            f"The experts of {layers} layers get tokens of other ranks {order} (nodes {ranks}); results are those of "
            "one exchange, bit-exact."
        )


@hookimpl
def register_techniques(register) -> None:
    register(HierarchicalAllToAll)
