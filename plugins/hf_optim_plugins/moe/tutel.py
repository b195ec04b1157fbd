"""Tutel: the fastest of several ways to run experts across ranks, as measured for each load, all with one result.

    way = argmin over ways of  max over ranks of  t(way, pairs of a rank, imbalance)
    ways: exchange in d chunks, d in degrees;  exchange over the grid of nodes;  gather

*Exchange* sends tokens to the ranks of their experts (expert parallelism); with d > 1 chunks, the next one is on its
way while one is computed, and the last one on its way back. *Gather* brings the weights of all experts to every rank,
whose tokens stay (data parallelism); it wins where a rank has many tokens for few weights, or where one rank would get
most of the tokens. Parameters stay where they are, so ways can change from one forward to the next.

Every way is timed when its turn comes: ``trials`` forwards (and backwards) after one that is not timed, for each bucket
of tokens (powers of 2) and of load (powers of the square root of 2). All ranks have the same counts and reduce their
times, so they take the same way. ``hf_optim.expert_exchange`` and the log give the times and the reason.

Hwang et al., "Tutel: Adaptive Mixture-of-Experts at Scale", arXiv 2206.03382. Its capacities: C = 0 computes every
pair; C > 0 gives each expert k floor(C ceil(T / E)) slots; C < 0 as many as the busiest expert needs, at most those of
|C|.

Differences: Tutel pads every expert to its capacity, so that C < 0 saves time there. Here rows are exchanged without
padding: C and -C compute the same. Tutel searches pipelining degrees; here all are timed. Rounding: products of other
numbers of rows may be summed in another order, so that ways agree up to that, and to the bit in what is exchanged.
"""

from __future__ import annotations

from typing import Any, Literal

from hf_optim import (
    Card,
    Contract,
    Paper,
    RecipeError,
    Reload,
    Run,
    Technique,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.toolkit import experts

from ._exchange import CONTRACT, ExchangeTechnique


@technique(
    "tutel",
    family="moe",
    paper=Paper("2206.03382", "Tutel: Adaptive Mixture-of-Experts at Scale", 2022),
    contract=CONTRACT,
    reload=Reload.STOCK_DENSE,
    parallel={"expert": "yes"},
)
class Tutel(ExchangeTechnique):
    """Run experts across ranks in the fastest way for the load: tokens exchanged in chunks, or weights gathered.

    Attributes:
        parallelism: ``auto`` times all ways; ``exchange`` and ``gather`` leave the other out.
        degrees: numbers of chunks in which tokens are exchanged and computed, at most 64 each.
        capacity: Tutel's C: 0 drops nothing; otherwise each expert computes k floor(|C| ceil(T / E)) of the T tokens
            that a rank has, first come, first served, also in one process.
        trials: how often each way is timed, after one forward that is not.
        ranks_per_node: null takes what the launcher's environment states, else one node. With several nodes, both
            hierarchical orders are among the ways.
        timeout: seconds that a rank waits for the others of its node or column; null is the default of the backend.
    """

    kind = "adaptive"

    parallelism: Literal["auto", "exchange", "gather"] = "auto"
    degrees: tuple[int, ...] = (1, 2, 4)
    capacity: float = option(0.0, low=-1e4, high=1e4)
    trials: int = option(2, low=1, high=100)
    ranks_per_node: int | None = option(None, low=1, high=2**20)
    timeout: float | None = option(None, above=0.0, high=86400.0)

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"degrees": [1, 2]})

    def validate(self) -> None:
        try:
            self.exchange(), self.routing()
        except ValueError as error:
            raise RecipeError(f"{self.spec.name}: {error}") from error

    def contract(self) -> Contract:
        if not self.capacity:
            return self.spec.contract
        return Contract(keeps={traits.SPARSE, traits.SPARSE_NM}, owns={*self.spec.contract.owns, "expert capacity"})

    def reload(self) -> Reload:
        return Reload.STOCK_ARCH if self.capacity else Reload.STOCK_DENSE

    def routing(self) -> experts.Routing | None:
        """Return the capacity, or None for C = 0."""
        return experts.Routing(capacity=abs(self.capacity), rounding="tutel") if self.capacity else None

    def settle(self, run: Run) -> None:
        super().settle(run)
        routing = self.routing()
        if routing is not None:
            experts.attach_routing(run.model, routing, run.label(self))
            experts.store_routing(run.model.config, routing)
        choices = [entry["choices"] for entry in experts.expert_exchange(run.model).values()]
        run.report(self, choices=sum(map(len, choices)))

    def recompute(self, case: Any) -> dict[str, Any]:
        assert experts.stored_routing(case.after.config) == self.routing(), "config.json has another capacity"
        return {**super().recompute(case), "choices": 0}

    def sentence(self, layers: int) -> str:
        ways = [f"an exchange of tokens in {' or '.join(map(str, self.degrees))} chunks"]
        ways += ["a gather of all experts' weights"]
        allowed = ways if self.parallelism == "auto" else [ways[self.parallelism == "gather"]]
        return (
            f"Across ranks, the experts of {layers} layers run in the way that is fastest when it is measured: "
            f"{', or '.join(allowed)}."
        )

    @hookimpl
    def export(self, run: Run, directory: Any, card: Card) -> None:
        super().export(run, directory, card)
        if self.capacity:
            card.paragraph(
                "Expert capacity",
                f"Each expert computes at most k floor({abs(self.capacity):g} ceil(T / E)) of T tokens, first come, "
                "first served; what finds no slot passes by the residual connection. Stock transformers computes every "
                'pair; `optim_config="auto"` applies the capacity that `config.json` states.',
            )


@hookimpl
def register_techniques(register) -> None:
    register(Tutel)
