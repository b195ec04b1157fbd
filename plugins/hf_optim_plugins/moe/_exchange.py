"""What the techniques that exchange tokens between ranks share: their hooks, the record and the card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedModel

from hf_optim import Contract, Technique, hookimpl, traits
from hf_optim.toolkit import experts

from ._settings import settings_of

if TYPE_CHECKING:
    from hf_optim import Card, Run

CONTRACT = Contract(keeps={traits.SPARSE, traits.SPARSE_NM}, owns={"expert exchange"})

USAGE = (
    "It takes effect where transformers (from 5.23 on) spreads the experts over ranks: `from_pretrained(..., "
    'optim_config="auto", distributed_config=DistributedConfig(ep_size=...))`, or `hf_optim.accelerate(model)` after '
    "stock loading. One process computes as stock transformers does, and stock transformers ignores the setting."
)


class ExchangeTechnique(Technique):
    """Hooks of a technique that says how ranks exchange tokens; its fields are named as those of ``Exchange``."""

    kind: ClassVar[str]

    def exchange(self) -> experts.Exchange:
        """Return the setting of the layers: the fields that the technique has, and defaults."""
        return settings_of(self, experts.Exchange, kind=self.kind)

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
        if experts.stored_exchange(run.model.config) != self.exchange():
            self.settle(run)

    def settle(self, run: Run) -> None:
        """Store the setting in the configuration, and apply it if the experts are spread over ranks."""
        label = run.label(self)
        spread = experts.attach_exchange(run.model, self.exchange(), label)
        experts.store_exchange(run.model.config, self.exchange())
        run.report(self, layers=len(experts.require_routable(run.model, label)), layers_over_ranks=len(spread))

    def recompute(self, case: Any) -> dict[str, Any]:
        assert experts.stored_exchange(case.after.config) == self.exchange(), "config.json has other settings"
        layers = experts.require_routable(case.after, self.spec.name)
        return {"layers": len(layers), "layers_over_ranks": 0}

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        layers = run.reported(self).get("layers", 0)
        card.paragraph("Exchange between ranks", f"{self.sentence(layers)} {USAGE}")

    def sentence(self, layers: int) -> str:
        """Return what the card says of the exchange of so many layers."""
        raise NotImplementedError
