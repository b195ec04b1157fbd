"""Block reconstruction: on which examples states are compared, the gradient of a step, and that no loss rises."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_optim.toolkit.quantization import ProjectedAdam
from hf_optim.toolkit.quantization.block_reconstruction import (
    COMPARED_SEQUENCES,
    COMPARED_TOKENS,
    BlockExamples,
    reconstruct_block,
)

CPU = torch.device("cpu")


def examples_of(sizes, width=6, seed=0, target=None):
    """Return examples of so many sequences of 5 rows, and outputs of a random matrix (or of ``target``)."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(width, width, generator=generator, dtype=torch.float64) if target is None else target
    inputs = [torch.randn(size, 5, width, generator=generator, dtype=torch.float64) for size in sizes]
    return BlockExamples([SimpleNamespace(args=(x,), kwargs={}, output=x @ matrix.T, rows=None) for x in inputs], CPU)


def trained(block, parameters, examples, **fields):
    given = {"learning_rate": 0.1, "steps": 4, "batch_size": 4, "seed": 0, "masks": {}, "label": "it", **fields}
    return reconstruct_block(block, parameters, examples, **given)


@pytest.mark.parametrize(
    ("sizes", "sequences", "found"),
    [
        ([8] * 8, 16, [2, 6]),
        ([8] * 8, 17, [1, 4, 6]),
        ([1, 1, 1, 1, 30], 32, [0, 1, 2, 3, 4]),  # two would be too few, all are 34
        ([4, 4], 32, [0, 1]),
        ([40], 32, [0]),
    ],
)
def test_evenly_spaced_examples_have_enough_sequences(sizes, sequences, found):
    assert examples_of(sizes).some(sequences) == found


def test_short_sequences_are_taken_more_at_a_time():
    examples = examples_of([1, 2, 1, 3, 1])  # of 5 tokens each
    assert examples.sizes[3] == (3, 15)
    assert examples.some(1, 11) == [1, 3]
    assert examples.some(1, 26) == [0, 1, 3, 4]
    assert examples.some(1, 100) == [0, 1, 2, 3, 4]
    taken = [group for group, _ in zip(examples.batches(1, 0, 16), range(6), strict=False)]
    assert all(sum(5 * examples.sizes[number][0] for number in group) >= 16 for group in taken)
    assert min(map(len, taken)) < 4
    assert [sorted(next(examples.batches(1, seed, 100))) for seed in range(2)] == [[0, 1, 2, 3, 4]] * 2
    assert next(examples.batches(2, 0)) == next(examples.batches(2, 0, 10))


def test_the_mean_is_over_sequences():
    examples = examples_of([1, 3])
    by_hand = [float(examples.loss(lambda x: x, number)) for number in (0, 1)]
    assert examples.mean_loss(lambda x: x, [0, 1]) == pytest.approx((by_hand[0] + 3 * by_hand[1]) / 4, rel=1e-12)
    assert examples.mean_loss(lambda x: x, [1]) == by_hand[1]


class Squared:
    """Computes ``(w * w) x``; its weight is made of a parameter, and counted."""

    def __init__(self):
        self.root = torch.full((6, 6), 0.5, dtype=torch.float64, requires_grad=True)
        self.gain = torch.ones(6, dtype=torch.float64, requires_grad=True)
        self.made = 0

    def weights(self):
        self.made += 1
        return {"weight": self.root.square()}

    def with_weights(self, weights, x):
        return (x * self.gain) @ weights["weight"].T

    def __call__(self, x):
        return self.with_weights(self.weights(), x)


@pytest.mark.parametrize("sizes", [[4, 4], [2] * 4, [1, 3, 2, 2]])
def test_weights_that_are_made_once_give_the_same_descent(sizes):
    found = []
    for once in (False, True):
        block = Squared()
        given = {"weights": block.weights} if once else {}
        run = block.with_weights if once else block
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        masks = {id(block.root): mask}
        losses = trained(run, [block.root, block.gain], examples_of(sizes), masks=masks, **given)
        found.append((block.root.detach(), block.gain.detach(), *losses))
        assert bool((block.root.detach()[~mask] == 0.5).all())
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-12, atol=0)
    assert found[0][2:] == pytest.approx(found[1][2:], rel=1e-12)
    assert found[1][3] < found[1][2]
    assert block.made == 4 + 1 + 2  # four steps, the loss before, and a comparison after each epoch


def test_gradients_of_half_precision_are_summed_in_float32():
    root = torch.full((6, 6), 0.5, dtype=torch.bfloat16, requires_grad=True)
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.extend(group["params"][0].grad.dtype for group in self.param_groups)
            super().step()

    trained(
        lambda x: x @ root.double().T, [root], examples_of([2, 2]), optimizer=lambda tensors: Watched(tensors, lr=0.1)
    )
    assert set(seen) == {torch.float32}


def test_a_small_gain_on_the_compared_examples_is_confirmed_on_all():
    """Example 1 of three has enough sequences and tokens; what gains a little there and loses elsewhere is not kept."""
    x = torch.ones(32, 128, 1, dtype=torch.float64)
    for elsewhere, expected in ((-4.0, 0.0), (4.0, 0.02)):
        outputs = [elsewhere, 2.0, elsewhere]
        examples = BlockExamples(
            [SimpleNamespace(args=(x,), kwargs={}, output=value * x, rows=None) for value in outputs], CPU
        )
        assert examples.some(COMPARED_SEQUENCES, COMPARED_TOKENS) == [1]
        shift = torch.zeros(1, dtype=torch.float64, requires_grad=True)

        def step(tensors):
            return ProjectedAdam(tensors, 0.1, (0.9, 0.99), lambda: tensors[0].data.fill_(0.02))

        before, after = trained(lambda x, shift=shift: x * shift, [shift], examples, optimizer=step, steps=1)
        assert float(shift.detach()) == expected
        assert before == pytest.approx(4.0)
        assert after == pytest.approx((2 - expected) ** 2)


def test_what_cannot_be_computed_is_an_error():
    from hf_optim import NumericalError

    layer = nn.Linear(6, 6, bias=False).double()
    layer.weight.data[0, 0] = torch.inf
    with pytest.raises(NumericalError, match="it: the distance to the original block's outputs became NaN or infinite"):
        trained(layer, [layer.weight], examples_of([2, 2]))
