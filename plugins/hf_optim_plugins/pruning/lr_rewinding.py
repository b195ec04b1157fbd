"""Learning-rate rewinding: prune, keep the weights, and repeat the learning-rate schedule (Renda et al., 2003.02389).

In retraining ``η_t = η(k + t)``, the schedule of the original training from its step ``k`` on, while the weights
continue from their trained values: ``s_r = 1 - (1 - s)^(r / n)`` of them are zero after round ``r`` of ``n``.
"""

from __future__ import annotations

from hf_optim import Contract, Paper, Reload, Rounds, RoundTraining, hookimpl, option, technique, traits
from hf_optim.toolkit.pruning import ROUNDS

from ._rounds import InRounds, check_position


@technique(
    "lr_rewinding",
    family="pruning",
    paper=Paper("2003.02389", "Comparing Rewinding and Fine-tuning in Neural Network Pruning", 2020),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS}, adds={traits.SPARSE}, keeps={traits.SPARSE, traits.SPARSE_NM}, owns={ROUNDS}
    ),
    reload=Reload.STOCK_DENSE,
    trains=True,
    parallel={"data": "yes"},
)
class LRRewinding(InRounds):
    """Prune in rounds, and restart the learning-rate schedule for each retraining.

    The steps of one training are divided into a dense phase of ``T`` steps and rounds of ``T - k``. The Trainer's
    schedule (with its warm-up) is made for ``T`` steps. Weights and the optimizer's state carry over from round to
    round.

    Attributes:
        sparsity: share of the weights that is zero at the end, in [0, 1).
        rounds: number of rounds; each removes the same share of the remaining weights.
        rewind_to: ``k``, the step of the schedule at which retraining begins: a whole number, or a share of the phase.
        dense: begin training with a dense phase; False prunes before the first step, which suits a trained model.
        scope: ``"layer"`` prunes every layer alike, ``"global"`` ranks all targets together.
        targets: linear layers and matrices of experts, by class, name or pattern; output heads only if named
            exactly, embeddings only if a pattern names them.
        skip: patterns of layers to leave dense.
    """

    sparsity: float = option(0.5, low=0.0, below=1.0)
    rounds: int = option(3, low=1)
    rewind_to: int | float = option(0, low=0)
    dense: bool = True
    scope: str = option("layer", choices=("layer", "global"))
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    title = "Learning-rate rewinding"

    def between(self) -> str:
        return "the weights carried over from round to round, and the learning-rate schedule started again in each"

    def validate(self) -> None:
        check_position(self.name, self.rewind_to)

    def driver(self, rounds: Rounds) -> RoundTraining:
        return RoundTraining(rounds, dense=self.dense, rewind_to=self.rewind_to)


@hookimpl
def register_techniques(register):
    register(LRRewinding)
