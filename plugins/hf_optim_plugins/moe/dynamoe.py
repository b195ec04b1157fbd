"""DynaMoE: capacities of experts that follow their load, with a CUDA graph for each configuration, and nothing dropped.

    room[e] = bucket(p + deviations sqrt(p)),  p = max over the last forwards of load[e];  bucket: power of 2, or of 64
    a new graph if  a load > room (trigger times in the window),  or  sum(room) > slack * sum(room it needs now)

Padding to one static capacity wastes what the busiest expert needs on all others, and drops what exceeds it. Here
every expert has a buffer of its own size. While loads stay within their buckets, a captured graph is replayed; a
forward in which an expert overflows is computed without buckets, to the same result, and the graph of the larger
buckets is captured for the next one. When the load has moved away, buckets shrink. An expert without load has no
buffer, and its weights are not read.

Kossmann, Jia, Aiken, "Optimizing Mixture of Experts using Dynamic Recompilations", arXiv 2205.01848. There FlexFlow
recompiles its task graph; here the experts of one layer are captured, for each number of tokens that occurs again.

Differences: the paper's trigger and buckets are not published as code; theirs are ours. The load is read by the host
after each replay, which costs one wait per layer. With gradients, on a CPU, and within the graph of
``hf_optim.generate`` the layers compute without buckets. ``stable`` is the paper's cache of sample assignments:
sequences are known by their tokens, and computed again from time to time.

Weights and class do not change. The setting stands in ``config.json`` (``"hf_optim": {"buckets": ...}``);
``optim_config="auto"`` and ``hf_optim.accelerate`` apply it, ``hf_optim.restore`` ends it, stock transformers ignores
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedModel

from hf_optim import Contract, Paper, RecipeError, Reload, Technique, hookimpl, option, technique, traits
from hf_optim.toolkit import experts

from ._settings import settings_of

if TYPE_CHECKING:
    from hf_optim import Card, Run


@technique(
    "dynamoe",
    family="moe",
    paper=Paper("2205.01848", "Optimizing Mixture of Experts using Dynamic Recompilations", 2022),
    contract=Contract(keeps={traits.SPARSE, traits.SPARSE_NM}, owns={"expert buckets"}),
    reload=Reload.STOCK_DENSE,
)
class DynaMoE(Technique):
    """Give every expert room for its load, in captured graphs that change with it; never drop a token.

    Attributes:
        rule: room is a power of two (``power``), or a multiple of 64 (``64``).
        deviations: room over the peak load, before rounding, in square roots of it.
        window: forwards over which the peak is taken.
        trigger: forwards of the window with too little room, at which capacities change.
        slack: capacities also change if there is more room than this multiple of what the window needs.
        graphs: captured graphs that a layer keeps; the one not used for the longest time is forgotten.
        stable: in training, a sequence whose choices were the same so many times in a row keeps them and its gates, and
            its router is not computed, nor trained by it; 0 computes all routers. Not with ``output_router_logits``.
    """

    rule: Literal["power", "64"] = "power"
    deviations: float = option(2.0, low=0.0, high=100.0)
    window: int = option(16, low=1, high=4096)
    trigger: int = option(1, low=1, high=4096)
    slack: float = option(1.5, low=1.0, high=1e6)
    graphs: int = option(8, low=1, high=1024)
    stable: int = option(0, low=0, high=4096)

    @property
    def buckets(self) -> experts.Buckets:
        """The setting of the layers."""
        return settings_of(self, experts.Buckets)

    def validate(self) -> None:
        try:
            _ = self.buckets
        except ValueError as error:
            raise RecipeError(f"{self.spec.name}: {error}") from error

    def changes_architecture(self) -> bool:
        return False

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        experts.require_routable(model, label)

    @hookimpl
    def transform_model(self, run: Run) -> None:
        self.settle(run)

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        # A later step of the stage may have replaced the model.
        if experts.buckets_in(run.model) != self.buckets:
            self.settle(run)

    def settle(self, run: Run) -> None:
        """Let the layers run with buckets, and store the setting in the configuration."""
        names = experts.attach_buckets(run.model, self.buckets, run.label(self))
        experts.store_buckets(run.model.config, self.buckets)
        run.report(self, layers=len(names))

    def recompute(self, case: Any) -> dict[str, Any]:
        assert experts.stored_buckets(case.after.config) == self.buckets, "config.json has other settings than the step"
        return {"layers": len(experts.require_routable(case.after, self.spec.name))}

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        rule = "powers of two" if self.rule == "power" else "multiples of 64"
        card.paragraph(
            "Buckets of experts",
            f"On a GPU, the experts of {run.reported(self).get('layers', 0)} layers compute in buffers whose sizes "
            f"({rule}) follow their load over {self.window} forwards, captured as a CUDA graph for each configuration. "
            "A forward that does not fit is computed without buffers; nothing is dropped, and results are those of "
            'stock transformers up to rounding. `optim_config="auto"` and `hf_optim.accelerate` apply it, '
            "`hf_optim.restore` ends it, and stock transformers ignores it.",
        )


@hookimpl
def register_techniques(register) -> None:
    register(DynaMoE)
