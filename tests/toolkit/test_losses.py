"""The distillation losses: against the papers' formulas in float64, their limits, and their memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_optim.toolkit.distillation.losses import (
    DIRECTIONS,
    divergence,
    head_loss,
    kd_loss,
    scored_rows,
    top_k,
    top_k_kd_loss,
)

T = 2.5
BETA = 0.3


def logits(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 3


def formula(student: torch.Tensor, teacher: torch.Tensor, direction: str) -> torch.Tensor:
    """The definition, written with plain logarithms."""
    p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
    kl = {
        "forward": lambda: (p * (p / q).log()).sum(-1),
        "reverse": lambda: (q * (q / p).log()).sum(-1),
        "js": lambda: (
            BETA * (p * (p / (BETA * p + (1 - BETA) * q)).log()).sum(-1)
            + (1 - BETA) * (q * (q / (BETA * p + (1 - BETA) * q)).log()).sum(-1)
        ),
    }
    return T**2 * kl[direction]().mean()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("chunk", [1, 22, 10**9], ids=["row", "two rows", "whole"])
def test_loss_and_gradient_equal_the_formula(direction: str, chunk: int):
    student, teacher = logits(0, 2, 3, 11).requires_grad_(), logits(1, 2, 3, 11)
    ours = kd_loss(student, teacher, temperature=T, direction=direction, beta=BETA, chunk_elements=chunk)
    expected = formula(student, teacher, direction)
    (ours_grad,) = torch.autograd.grad(7 * ours, student)
    (expected_grad,) = torch.autograd.grad(7 * expected, student)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours_grad, expected_grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_labels_are_compared_independently(direction: str):
    student, teacher, rows = logits(0, 5, 3).requires_grad_(), logits(1, 5, 3), torch.tensor([0, 2, 3])
    ours = head_loss("labels", student, teacher, temperature=T, direction=direction, beta=BETA, rows=rows)
    both = [torch.stack([z, torch.zeros_like(z)], -1)[rows] for z in (student, teacher)]  # σ(z) = softmax([z, 0])
    expected = formula(*both, direction)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-14)
    far = torch.tensor([[800.0, -800.0]], dtype=torch.float64)
    assert head_loss("labels", far, -far, direction=direction).isfinite()


def test_a_regression_is_the_mean_squared_error():
    student, teacher = logits(0, 5, 2).requires_grad_(), logits(1, 5, 2)
    ours = head_loss("regression", student, teacher, temperature=T)
    expected = ((student - teacher) ** 2).mean()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (ours, expected)))
    with pytest.raises(ValueError, match="differ"):
        head_loss("regression", student, teacher[:, :1])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction: str):
    student, teacher = logits(2, 4, 6).requires_grad_(), logits(3, 4, 6)
    rows = torch.tensor([0, 3])
    assert torch.autograd.gradcheck(
        lambda s: kd_loss(s, teacher, temperature=T, direction=direction, rows=rows, chunk_elements=6), student
    )
    target = top_k(teacher[rows], 3, T)
    for rest in ("bucket", "renormalize"):
        assert torch.autograd.gradcheck(
            lambda s, rest=rest: top_k_kd_loss(s, target, temperature=T, direction=direction, rest=rest, rows=rows),
            student,
        )


def test_high_temperature_is_the_mean_square_of_centred_logits():
    student, teacher = logits(4, 5, 13).requires_grad_(), logits(5, 5, 13)
    difference = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    expected = difference.square().mean() / 2
    ours = kd_loss(student, teacher, temperature=1e4)
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, student)[0] for loss in (ours, expected)), rtol=2e-3, atol=1e-5
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rest", ["bucket", "renormalize"])
def test_top_k_of_all_classes_equals_the_full_loss(direction: str, rest: str):
    student, teacher = logits(6, 5, 9).requires_grad_(), logits(7, 5, 9)
    rows = torch.tensor([1, 2, 4])
    options = {"temperature": T, "direction": direction, "beta": BETA, "rows": rows}
    cached = top_k_kd_loss(student, top_k(teacher[rows], 9, T), rest=rest, **options)
    live = kd_loss(student, teacher, **options)
    torch.testing.assert_close(cached, live, rtol=1e-10, atol=1e-14)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (cached, live)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-13)


def test_top_k_sums_the_rest():
    teacher = logits(8, 4, 10)
    found = top_k(teacher, 3, T, chunk_elements=10)
    p = (teacher / T).softmax(-1)
    values, indices = p.topk(3, -1)
    assert torch.equal(found.indices.long(), indices)
    torch.testing.assert_close(found.log_probs.exp(), values)
    torch.testing.assert_close(found.rest.exp(), 1 - values.sum(-1))


def test_bucket_is_the_divergence_of_the_summed_distributions():
    student, teacher = logits(9, 6, 10), logits(10, 6, 10)
    p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
    top, index = p.topk(4, -1)
    other = q.gather(-1, index)
    p4 = torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)
    q4 = torch.cat([other, 1 - other.sum(-1, keepdim=True)], -1)
    expected = T**2 * (p4 * (p4 / q4).log()).sum(-1).mean()
    ours = top_k_kd_loss(student, top_k(teacher, 4, T), temperature=T)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)
    assert ours < kd_loss(student, teacher, temperature=T)  # summing classes can only hide differences


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_classes_of_probability_zero(direction: str):
    student, teacher = logits(11, 3, 8), logits(12, 3, 8)
    narrow = kd_loss(student[:, :6].clone().requires_grad_(), teacher[:, :6], temperature=T, direction=direction)
    student[:, 6:] = teacher[:, 6:] = -torch.inf
    student.requires_grad_()
    wide = kd_loss(student, teacher, temperature=T, direction=direction)
    torch.testing.assert_close(wide, narrow)
    (gradient,) = torch.autograd.grad(wide, student)
    assert torch.isfinite(gradient).all()
    assert (gradient[:, 6:] == 0).all()


def test_equal_distributions_have_no_divergence():
    logs = logits(13, 4, 7).log_softmax(-1)
    for direction in DIRECTIONS:
        torch.testing.assert_close(divergence(logs, logs, direction), torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="forward, reverse, js"):
        divergence(logs, logs, "sideways")  # type: ignore[arg-type]


def test_no_rows_give_zero_and_a_zero_gradient():
    student = logits(14, 3, 5).requires_grad_()
    loss = kd_loss(student, logits(15, 3, 5), rows=torch.tensor([], dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_half_precision_is_computed_in_float32():
    student, teacher = logits(16, 4, 50), logits(17, 4, 50)
    exact = kd_loss(student.bfloat16().double(), teacher.bfloat16().double(), temperature=T)
    half = student.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = kd_loss(half, teacher.bfloat16(), temperature=T)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)
    ours.backward()
    assert half.grad.dtype == torch.bfloat16


def test_scored_rows():
    z = torch.zeros(2, 4, 3)
    labels = torch.tensor([[5, 6, -100, 7], [-100, -100, 1, -100]])
    assert scored_rows(z, labels).tolist() == [0, 1, 3, 6]
    assert scored_rows(z, labels, shift=True).tolist() == [0, 2, 5]
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert scored_rows(z, None, mask, shift=True).tolist() == [0, 4, 5, 6]
    assert scored_rows(z, None).tolist() == list(range(8))
    assert scored_rows(torch.zeros(3, 2), torch.tensor([0, 1, 1])).tolist() == [0, 1, 2]


class CountLarge(TorchDispatchMode):
    """Counts the tensors of at least ``size`` elements that operations allocate."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.storages = size, set()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.numel() >= self.size:
            self.count += out.untyped_storage().data_ptr() not in known
        return out


class PeakSaved(torch.autograd.graph.saved_tensors_hooks):
    """The largest number of elements that were saved for a backward pass at one time."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        outer = self

        class Held:
            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor = tensor
                outer.now += tensor.numel()
                outer.peak = max(outer.peak, outer.now)

            def __del__(self) -> None:
                outer.now -= self.tensor.numel()

        super().__init__(Held, lambda held: held.tensor)


def test_no_softmax_of_the_whole_vocabulary_is_stored():
    student, teacher = (logits(seed, 64, 500, dtype=torch.float32) for seed in (18, 19))
    student.requires_grad_()
    size = student.numel()

    def costs(loss) -> tuple[int, float]:
        saved = PeakSaved()
        with CountLarge(size) as large, saved:
            result = loss()
        assert result.requires_grad
        return large.count, saved.peak / size

    plain = costs(
        lambda: F.kl_div(
            F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1), log_target=True, reduction="batchmean"
        )
    )
    ours = costs(lambda: kd_loss(student, teacher, temperature=T, chunk_elements=size // 32))
    assert ours[0] == 1  # the gradient
    assert ours[1] < 1.2  # the gradient, and one chunk on the way
    assert plain[0] >= 5
    assert plain[1] >= 2
