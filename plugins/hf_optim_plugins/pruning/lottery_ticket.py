"""Lottery tickets: prune, rewind the remaining weights to their values early in training, train again (1803.03635).

``W ← m ⊙ W_k``, where ``m`` keeps the largest weights of the *trained* network and ``W_k`` are its weights after ``k``
steps: after round ``r`` of ``n`` a share ``s_r = 1 - (1 - s)^(r / n)`` of ``m`` is zero. With ``k = 0`` this is the
procedure of Frankle & Carbin; larger networks need a ``k`` some way into training (Frankle et al., 1903.01611 and
1912.05671); for a pretrained transformer ``k = 0``, its pretrained weights, is enough (Chen et al., 2007.12223). The
optimizer's state is rewound to step ``k`` as well, and the learning rate follows its schedule from there.
"""

from __future__ import annotations

from typing import Any

from hf_optim import Contract, Paper, RecipeError, Reload, Rounds, RoundTraining, hookimpl, option, technique, traits
from hf_optim.toolkit.pruning import ROUNDS, TRAINING_FORWARD

from ._rounds import InRounds, check_position


@technique(
    "lottery_ticket",
    family="pruning",
    paper=Paper("1803.03635", "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", 2018),
    # The training forward as well: gates, variances and scales that another step trains would not be rewound.
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        adds={traits.SPARSE},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={ROUNDS, TRAINING_FORWARD},
    ),
    reload=Reload.STOCK_DENSE,
    trains=True,
    parallel={"fsdp": "no"},
)
class LotteryTicket(InRounds):
    """Prune in rounds, and rewind the remaining weights to an early step before each retraining.

    The steps of one training are divided into a dense phase of ``T`` steps and rounds of ``T - k``. The weights of step
    ``k`` are kept as the checkpoint ``output_dir/rewind-K``, which training needs until its end.

    Attributes:
        sparsity: share of the weights that is zero at the end, in [0, 1).
        rounds: number of rounds; each removes the same share of the remaining weights.
        rewind_to: ``k``, the step whose weights are restored: a whole number of steps, or a share of the dense phase.
        dense: begin training with a dense phase, whose weights are ranked first; False ranks the initial weights of
            the model, and these are restored (``rewind_to`` is then 0).
        reinitialize: as the control that a ticket must beat, begin the *last* round from random weights instead, with
            a fresh optimizer; the masks are those of the ticket.
        seed: of the random weights.
        scope: ``"layer"`` prunes every layer alike, ``"global"`` ranks all targets together.
        targets: linear layers and matrices of experts, by class, name or pattern; output heads only if named
            exactly, embeddings only if a pattern names them.
        skip: patterns of layers to leave dense.
    """

    sparsity: float = option(0.5, low=0.0, below=1.0)
    rounds: int = option(3, low=1)
    rewind_to: int | float = option(0, low=0)
    dense: bool = True
    reinitialize: bool = False
    seed: int = option(0, low=0)
    scope: str = option("layer", choices=("layer", "global"))
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    title = "Lottery ticket"

    def validate(self) -> None:
        check_position(self.name, self.rewind_to)
        if not self.dense and self.rewind_to:
            raise RecipeError(
                f"lottery_ticket: rewind_to={self.rewind_to!r} is a step of the dense phase, which dense=False leaves "
                "out: set rewind_to to 0, or dense to True"
            )

    def between(self) -> str:
        last = "; the last began from random weights, as a control" if self.reinitialize else ""
        where = f"step {self.rewind_to}" if isinstance(self.rewind_to, int) else f"{self.rewind_to:g} of a phase"
        return f"each began from the weights of {where} of training{last}"

    def driver(self, rounds: Rounds) -> RoundTraining:
        return RoundTraining(
            rounds, dense=self.dense, rewind_to=self.rewind_to, keeps_point=True, renew=self.rewind_weights
        )

    def rewind_weights(self, rounds: Rounds, optimizer: Any) -> None:
        """Restore the weights for the round that begins."""
        if self.reinitialize and not rounds.left:
            rounds.reinitialize(self.seed, optimizer)
        else:
            rounds.rewind(optimizer)


@hookimpl
def register_techniques(register):
    register(LotteryTicket)
