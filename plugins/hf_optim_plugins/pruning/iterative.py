"""Iterative magnitude pruning: prune a part, fine-tune the remaining weights, repeat (Han et al., 1506.02626).

``s_r = 1 - (1 - s)^(r / n)`` is the sparsity after round ``r`` of ``n``. In a round the weights of smallest magnitude
are removed, and the rest is trained at one small learning rate, ``η = rate · η_max``: the retraining called fine-tuning
by Renda et al. (2003.02389), who keep the last rate of the original schedule. The schedules of transformers end at 0,
where nothing would be learned; ``rate`` describes the rate that is used instead. Han et al. prune below ``q`` times the
standard deviation of a layer's weights in each round; here the share to remove is given and the threshold follows.
"""

from __future__ import annotations

from hf_optim import Contract, Paper, Reload, Rounds, RoundTraining, hookimpl, option, technique, traits
from hf_optim.toolkit.pruning import ROUNDS

from ._rounds import InRounds

# As a share of the highest rate: the mean over the last fifth of a linear decay, and about the last stage of a stepwise
# one.
SMALL_RATE = 0.1


@technique(
    "iterative",
    family="pruning",
    paper=Paper("1506.02626", "Learning both Weights and Connections for Efficient Neural Networks", 2015),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS}, adds={traits.SPARSE}, keeps={traits.SPARSE, traits.SPARSE_NM}, owns={ROUNDS}
    ),
    reload=Reload.STOCK_DENSE,
    trains=True,
    parallel={"data": "yes"},
)
class Iterative(InRounds):
    """Prune a part of the weights, fine-tune the rest, and repeat until the sparsity is reached.

    The steps of one training are divided evenly among the rounds (and the dense phase, if there is one). Weights and
    the optimizer's state carry over from round to round.

    Attributes:
        sparsity: share of the weights that is zero at the end, in [0, 1).
        rounds: number of rounds; each removes the same share of the remaining weights.
        dense: begin training with a dense phase, which follows the Trainer's learning-rate schedule and is as long as a
            round; False prunes before the first step, which suits a trained model.
        rate: the learning rate of retraining, as a share of the Trainer's ``learning_rate``; None uses all of it
            without a dense phase, and with one the rate at which its schedule ends, but at least a tenth.
        scope: ``"layer"`` prunes every layer alike, ``"global"`` ranks all targets together.
        targets: linear layers and matrices of experts, by class, name or pattern; output heads only if named
            exactly, embeddings only if a pattern names them.
        skip: patterns of layers to leave dense.
    """

    sparsity: float = option(0.5, low=0.0, below=1.0)
    rounds: int = option(3, low=1)
    dense: bool = False
    rate: float | None = option(None, above=0.0, high=1.0)
    scope: str = option("layer", choices=("layer", "global"))
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    title = "Iterative magnitude pruning"

    def between(self) -> str:
        return "between them the remaining weights were fine-tuned at one learning rate"

    def driver(self, rounds: Rounds) -> RoundTraining:
        return RoundTraining(rounds, dense=self.dense, held=self.held)

    def held(self, last: float) -> float:
        """Return the learning-rate multiplier of retraining, if that of the dense phase ends at ``last``."""
        if self.rate is not None:
            return self.rate
        return max(last, SMALL_RATE) if self.dense else 1.0


@hookimpl
def register_techniques(register):
    register(Iterative)
