"""The methods of the pruning sweep: the recipe of each at a given sparsity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Step = dict[str, Any]
Recipe = Callable[[float, "Shape"], list[Step]]

ROUNDS = 3
# The point that weights and schedule are rewound to, as a fraction of one phase.
REWIND_TO = 0.2


@dataclass(frozen=True)
class Shape:
    """The weights of a model's blocks; sparsity is counted over them.

    Attributes:
        layers: number of blocks.
        attention, feed_forward: number of weights in the linear layers of one block.
        heads: number of heads that can be removed one by one, or 0.
        neurons: number of neurons of a feed-forward layer.
    """

    layers: int
    attention: int
    feed_forward: int
    heads: int
    neurons: int

    @property
    def weights(self) -> int:
        return self.layers * (self.attention + self.feed_forward)


@dataclass(frozen=True)
class Method:
    """A method that reduces the number of weights.

    Attributes:
        name: as printed.
        recipe: maps sparsity and shape to the steps; no steps for the dense model.
        trains: False if the model is measured right after the recipe. All others train for the same number of steps.
    """

    name: str
    recipe: Recipe
    trains: bool = True


def single_step(technique: str, **fields: Any) -> Recipe:
    """Return the recipe of one step."""
    return lambda sparsity, _: [{"technique": technique, "sparsity": sparsity, **fields}]


def in_rounds(technique: str, **fields: Any) -> Recipe:
    """Return the recipe of a dense phase and three rounds, together as long as the training of the other methods."""
    return single_step(technique, rounds=ROUNDS, dense=True, **fields)


def top_kast(sparsity: float, _: Shape) -> list[Step]:
    """Return the recipe of Top-KAST.

    Half of the weights that the forward leaves out receive gradients. Masks are fixed for the last 30 % of training.
    """
    return [{"technique": "top_kast", "sparsity": sparsity, "backward_sparsity": sparsity / 2, "every": 1, "end": 0.7}]


def smaller_dense(sparsity: float, shape: Shape) -> list[Step]:
    """Return the recipe of a dense model with as many weights in its blocks as the sparse models have non-zeros.

    Whole layers or heads are removed, and neurons for the rest. Of the combinations that give the target, the one that
    shrinks attention and feed-forward layers most evenly is taken.
    """
    target = (1.0 - sparsity) * shape.weights
    candidates = []
    for layers in range(1, shape.layers + 1) if not shape.heads else (shape.layers,):
        for heads in range(1, shape.heads + 1) if shape.heads else (1,):
            of_heads = heads / shape.heads if shape.heads else 1.0
            of_neurons = (target / layers - of_heads * shape.attention) / shape.feed_forward
            if 0.0 < of_neurons <= 1.0:
                candidates.append((abs(of_neurons - of_heads), layers, heads, of_neurons))
    _, layers, heads, of_neurons = min(candidates)
    step: Step = {"technique": "structured", "score": "activation", "round_to": 1}
    return [
        {
            **step,
            "layers": shape.layers - layers,
            "heads": shape.heads - heads if shape.heads else 0,
            "neurons": round((1.0 - of_neurons) * shape.neurons),
        }
    ]


METHODS = (
    Method("magnitude, one shot, no training", single_step("magnitude"), trains=False),
    Method("magnitude, one shot", single_step("magnitude")),
    Method("gmp", single_step("gmp", end=0.7, every=20)),
    Method("iterative, fine-tuned", in_rounds("iterative")),
    Method("weight rewinding", in_rounds("lottery_ticket", rewind_to=REWIND_TO)),
    Method("random tickets", in_rounds("lottery_ticket", rewind_to=REWIND_TO, reinitialize=True)),
    Method("lr rewinding", in_rounds("lr_rewinding", rewind_to=REWIND_TO)),
    Method("variational dropout", single_step("variational_dropout", end=0.3, settle=0.7)),
    Method("l0", single_step("l0", end=0.4, settle=0.7)),
    Method("top_kast", top_kast),
    Method("smaller dense", smaller_dense),
)
DENSE = Method("dense", lambda *_: [])
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
