"""What the techniques that give experts a capacity share: their hooks, the figures on the record, and the card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from hf_optim import Contract, Reload, Technique, hookimpl, traits
from hf_optim.toolkit import experts
from hf_optim.toolkit.statistics import ChannelAbsMax

from ._recompute import recompute
from ._settings import settings_of

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope

CONTRACT = Contract(
    keeps={traits.SPARSE, traits.SPARSE_NM},
    owns={"expert capacity"},
)


class CapacityTechnique(Technique):
    """Hooks of a technique that gives every mixture layer a capacity; its fields are named as those of ``Routing``."""

    capacity: float
    measure: bool

    def routing(self) -> experts.Routing:
        """Return the settings of the layers: the fields that the technique has, and defaults."""
        return settings_of(self, experts.Routing)

    @classmethod
    def for_testing(cls) -> Technique:
        # Of the suite's 4 experts each token chooses 2: nothing is dropped, and stock transformers computes the same.
        return cls.from_dict({"capacity": 2.0})

    def needs_data(self) -> bool:
        return self.measure

    def needs_whole_model(self) -> bool:
        # Tokens of a whole batch compete, and what one layer drops changes what the next one reads.
        return self.measure

    def changes_architecture(self) -> bool:
        return False

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        experts.require_routable(model, label)
        experts.require_limitable(model, self.routing(), label)

    @hookimpl
    def transform_model(self, run: Run) -> None:
        names = experts.attach_routing(run.model, self.routing(), run.label(self))
        experts.store_routing(run.model.config, self.routing())
        run.report(self, layers=len(names))

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        if not self.measure:
            yield
            return
        label = run.label(self)
        # The observer refuses infinite inputs, by name: gates that are NaN would be counted like others.
        layers: Any = experts.require_routable(run.model, label)
        experts.expert_load(run.model, reset=True)
        with ChannelAbsMax(layers, label):
            yield
        load = experts.expert_load(run.model, reset=True)
        run.report(
            self,
            dropped=round(experts.dropped_share(load.values()), 6),
            dropped_by_layer={name: round(part.dropped_share, 6) for name, part in load.items()},
            dropped_by_expert={name: [round(x, 6) for x in part.dropped_shares] for name, part in load.items()},
        )

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        # A later step of the stage may have replaced the model.
        if experts.routing_of(run.model) != self.routing():
            experts.attach_routing(run.model, self.routing(), run.label(self))
            experts.store_routing(run.model.config, self.routing())

    def recompute(self, case: Any) -> dict[str, Any]:
        return recompute(case, self.routing(), self.measure)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        reported, routing = run.reported(self), self.routing()
        order = {
            "position": "by position, first choices of all tokens before second ones",
            "top1": "to the tokens with the largest gate first",
            "sum": "to the tokens with the largest sum of gates first",
        }[routing.priority]
        training = "" if routing.train_capacity is None else f" ({routing.train_capacity:g} in training)"
        stock = card.when(
            "Stock transformers loads the same weights without a capacity: it drops nothing, computes more, and its "
            'outputs differ wherever a token is dropped here. `optim_config="auto"`, `hf_optim.accelerate` and a '
            "new run of this recipe apply the capacity that `config.json` states; `hf_optim.restore` removes it.",
            reload=[Reload.STOCK_DENSE, Reload.STOCK_FORMAT, Reload.STOCK_ARCH],
        )
        card.paragraph(
            "Expert capacity",
            f"The experts of {reported.get('layers', 0)} layers compute a limited number of tokens: capacity factor "
            f"{routing.capacity:g}{training}, rounding `{routing.rounding}`, slots given {order}. What finds no slot "
            "passes by the residual connection. A prediction depends on the other tokens of its batch, later ones "
            f"included.{stock}",
        )
        if "dropped_by_layer" in reported:
            rows = [
                [f"`{name}`", f"{part:.4f}", f"{max(reported['dropped_by_expert'][name]):.4f}"]
                for name, part in sorted(reported["dropped_by_layer"].items())
            ]
            title = "Dropped pairs of token and expert on the calibration data (shares)"
            card.table(title, ["layer", "all experts", "most of one expert"], rows)
