"""The methods of the pruning sweep: the recipe of each for a sparsity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Step = dict[str, Any]
Recipe = Callable[[float, "Shape"], list[Step]]

ROUNDS = 3
# Of one phase: where weights and schedule go back to.
REWIND_TO = 0.2


@dataclass(frozen=True)
class Shape:
    """The weights of a model's blocks, of which the sparsity is a share.

    Attributes:
        layers: how many blocks there are.
        attention, feed_forward: weights of one block's linear layers.
        heads: heads that may be removed on their own, or 0.
        neurons: of a feed-forward layer.
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
    """One way to a model with few weights.

    Attributes:
        name: as printed.
        recipe: sparsity and shape -> the steps; none for the dense model.
        trains: False where the model is measured as it comes out of the recipe; the others all train equally long.
    """

    name: str
    recipe: Recipe
    trains: bool = True


def one(technique: str, **fields: Any) -> Recipe:
    return lambda sparsity, _: [{"technique": technique, "sparsity": sparsity, **fields}]


def rounds(technique: str, **fields: Any) -> Recipe:
    """A dense phase and three rounds, together as long as the training of the other methods."""
    return one(technique, rounds=ROUNDS, dense=True, **fields)


def top_kast(sparsity: float, _: Shape) -> list[Step]:
    """The gradient reaches half of what the forward leaves out; supports stay for the last third of training."""
    return [{"technique": "top_kast", "sparsity": sparsity, "backward_sparsity": sparsity / 2, "every": 1, "end": 0.7}]


def smaller_dense(sparsity: float, shape: Shape) -> list[Step]:
    """A dense model with as many weights in its blocks as the sparse ones have non-zeros.

    Of the ways to that number through whole layers or heads, and neurons for the rest, the one is taken that shrinks
    attention and feed-forward layers most evenly.
    """
    wanted = (1.0 - sparsity) * shape.weights
    ways = []
    for layers in range(1, shape.layers + 1) if not shape.heads else (shape.layers,):
        for heads in range(1, shape.heads + 1) if shape.heads else (1,):
            share = heads / shape.heads if shape.heads else 1.0
            neurons = (wanted / layers - share * shape.attention) / shape.feed_forward
            if 0.0 < neurons <= 1.0:
                ways.append((abs(neurons - share), layers, heads, neurons))
    _, layers, heads, neurons = min(ways)
    step: Step = {"technique": "structured", "score": "activation", "round_to": 1}
    return [
        {
            **step,
            "layers": shape.layers - layers,
            "heads": shape.heads - heads if shape.heads else 0,
            "neurons": round((1.0 - neurons) * shape.neurons),
        }
    ]


METHODS = (
    Method("magnitude, one shot, no training", one("magnitude"), trains=False),
    Method("magnitude, one shot", one("magnitude")),
    Method("gmp", one("gmp", end=0.7, every=20)),
    Method("iterative, fine-tuned", rounds("iterative")),
    Method("weight rewinding", rounds("lottery_ticket", rewind_to=REWIND_TO)),
    Method("random tickets", rounds("lottery_ticket", rewind_to=REWIND_TO, reinitialize=True)),
    Method("lr rewinding", rounds("lr_rewinding", rewind_to=REWIND_TO)),
    Method("variational dropout", one("variational_dropout", end=0.3, settle=0.7)),
    Method("l0", one("l0", end=0.4, settle=0.7)),
    Method("top_kast", top_kast),
    Method("smaller dense", smaller_dense),
)
DENSE = Method("dense", lambda *_: [])
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
