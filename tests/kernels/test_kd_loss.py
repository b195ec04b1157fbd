"""hf_optim::kd_rows: the specification, the kernels against it in float64, their gradients, and the loss of heads."""

from __future__ import annotations

import pytest
import torch
from interpreting import BOUND, on_triton, relative

from hf_optim_kernels.kd_loss import linear, naive, op

pytest.importorskip("triton")

T, BETA = 2.5, 0.3
EVERY = pytest.mark.parametrize("direction", naive.DIRECTIONS)


def logits(seed: int, *shape: int, device="cpu", dtype=torch.float64, scale: float = 3.0) -> torch.Tensor:
    drawn = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale
    return drawn.to(device, dtype)


def formula(student, teacher, direction, rows=None, temperature=T, beta=BETA):
    """The definition with plain logarithms, in float64, over dense rows."""
    s, t = (x.reshape(-1, x.shape[-1]) for x in (student, teacher.double()))
    s, t = (s, t) if rows is None else (s[rows], t[rows])
    p, q = (t / temperature).softmax(-1), (s / temperature).softmax(-1)
    if direction == "forward":
        return temperature**2 * (p * (p / q).log()).sum(-1).mean()
    if direction == "reverse":
        return temperature**2 * (q * (q / p).log()).sum(-1).mean()
    m = beta * p + (1 - beta) * q
    found = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    return temperature**2 * found.mean()


def compared(student, teacher, direction, tolerance=2e-6, bound=None, **options):
    """Loss and gradient of the operator beside the formula's, for the very numbers that the inputs hold."""
    ours = student.detach().clone().requires_grad_()
    exact = student.detach().double().requires_grad_()
    rows = options.get("rows")
    loss = op.kd_loss(ours, teacher.clone(), temperature=T, direction=direction, beta=BETA, **options)
    wanted = formula(exact, teacher, direction, rows)
    (3 * loss).backward()
    (3 * wanted).backward()
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), wanted, rtol=tolerance, atol=1e-7)
    assert ours.grad.dtype == student.dtype
    assert relative(ours.grad, exact.grad) < (bound or BOUND[student.dtype] * 4)
    return ours.grad


@EVERY
@pytest.mark.parametrize("rows", [None, [0, 3, 5]])
def test_the_specification_is_the_formula(direction, rows):
    rows = None if rows is None else torch.tensor(rows)
    compared(logits(0, 2, 3, 11), logits(1, 2, 3, 11), direction, tolerance=1e-12, bound=1e-11, rows=rows)


@EVERY
def test_gradcheck(direction):
    student, teacher = logits(2, 4, 6).requires_grad_(), logits(3, 4, 6)
    options = {"temperature": T, "direction": direction, "beta": BETA, "rows": torch.tensor([0, 3])}
    assert torch.autograd.gradcheck(lambda s: op.kd_loss(s, teacher, **options), student)


@EVERY
def test_the_operator_passes_pytorchs_own_checks(direction):
    kept = torch.tensor([True, False, True])
    student = logits(4, 3, 7, dtype=torch.float32).requires_grad_()
    args = (student, logits(5, 3, 7, dtype=torch.float32), kept, T, direction, BETA, False)
    torch.library.opcheck(op.kd_rows, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    losses, statistics = op.kd_rows(*args)
    found = (*args[:3], statistics, torch.ones_like(losses), *args[3:6])
    torch.library.opcheck(op.kd_gradient, [x.detach() if isinstance(x, torch.Tensor) else x for x in found])


def test_the_teachers_memory_takes_the_gradient_once():
    student, teacher = logits(6, 4, 9).requires_grad_(), logits(7, 4, 9)
    loss = op.kd_loss(student, teacher, overwrite_teacher=True)
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert gradient.data_ptr() == teacher.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, student)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\) and teacher logits \(2, 6\)"):
        op.kd_loss(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="forward, reverse, js"):
        op.kd_loss(torch.zeros(2, 5), torch.zeros(2, 5), direction="sideways")
    with pytest.raises(ValueError, match="cannot be compared"):
        linear.fused_linear_kd_loss(torch.zeros(2, 5), torch.zeros(7, 5), torch.zeros(3, 4), torch.zeros(7, 4))


# -- the kernels -----------------------------------------------------------------------------------------------------
@on_triton
@EVERY
@pytest.mark.parametrize("shape", [(3, 5), (2, 16), (1, 4096), (2, 5003), (2, 3, 9001)], ids=str)
def test_shapes(device, direction, shape):
    args = (logits(seed, *shape, device=device, dtype=torch.float32) for seed in (8, 9))
    compared(*args, direction, bound=2e-5)


@on_triton
@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("overwrite", [False, True])
def test_half_precision_is_computed_in_float32(device, direction, dtype, overwrite):
    student, teacher = (logits(seed, 5, 700, device=device, dtype=dtype) for seed in (10, 11))
    compared(student, teacher, direction, overwrite_teacher=overwrite, rows=torch.tensor([0, 2, 4], device=device))


@on_triton
@EVERY
def test_rows_that_do_not_count(device, direction):
    student, teacher = (logits(seed, 6, 130, device=device, dtype=torch.float32) for seed in (12, 13))
    student[1] = teacher[3] = torch.nan  # not even looked at
    rows = torch.tensor([0, 2, 5], device=device)
    ours = student.clone().requires_grad_()
    loss = op.kd_loss(ours, teacher, temperature=T, direction=direction, beta=BETA, rows=rows)
    loss.backward()
    torch.testing.assert_close(loss.double(), formula(student.double(), teacher, direction, rows), rtol=2e-6, atol=0)
    assert (ours.grad[[1, 3, 4]] == 0).all()
    nothing = op.kd_loss(ours, teacher, rows=rows[:0])
    assert nothing == 0
    assert (torch.autograd.grad(nothing, ours)[0] == 0).all()


@on_triton
@EVERY
def test_classes_of_probability_zero(device, direction):
    student, teacher = (logits(seed, 3, 5000, device=device, dtype=torch.float32) for seed in (14, 15))
    narrow = formula(student[:, :4990].double(), teacher[:, :4990], direction)
    for z in (student, teacher):
        z[:, 4990:] = -torch.inf
    student.requires_grad_()
    loss = op.kd_loss(student, teacher, temperature=T, direction=direction, beta=BETA)
    loss.backward()
    torch.testing.assert_close(loss.double(), narrow, rtol=2e-6, atol=0)
    assert torch.isfinite(student.grad).all()
    assert (student.grad[:, 4990:] == 0).all()


@on_triton
@EVERY
def test_a_whole_step_of_minus_infinity(device, direction):
    """The first 4096 columns, which one step of a row's program reads, are not possible."""
    student, teacher = (logits(seed, 2, 4300, device=device, dtype=torch.float32) for seed in (16, 17))
    student[:, :4096] = teacher[:, :4096] = -torch.inf
    loss = op.kd_loss(student.requires_grad_(), teacher, temperature=T, direction=direction, beta=BETA)
    wanted = formula(student.detach()[:, 4096:].double(), teacher[:, 4096:], direction)
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(gradient).all()


@on_triton
def test_only_the_divergence_that_is_infinite_is(device):
    student, teacher = (logits(seed, 2, 40, device=device, dtype=torch.float32) for seed in (18, 19))
    student[:, 3], teacher[:, 7] = -torch.inf, -torch.inf  # each leaves out a class of the other's
    found = {d: float(op.kd_loss(student, teacher, direction=d)) for d in naive.DIRECTIONS}
    assert found["forward"] == found["reverse"] == torch.inf
    wanted = naive.losses(student.double(), teacher.double(), None, 1.0, "js", 0.5).mean()
    assert found["js"] == pytest.approx(float(wanted), rel=2e-6)


@on_triton
@EVERY
def test_equal_distributions(device, direction):
    student = logits(20, 3, 5000, device=device, dtype=torch.float32)
    shifted = student + 5.0
    same = op.kd_loss(student.requires_grad_(), student.detach().clone(), direction=direction)
    assert abs(float(same.detach())) < 1e-7
    assert torch.autograd.grad(same, student)[0].abs().max() < 1e-7
    assert abs(float(op.kd_loss(student.detach(), shifted, direction=direction))) < 1e-5


@on_triton
@EVERY
def test_extreme_logits(device, direction):
    """One class has all the probability: the exponentials of the others underflow."""
    student, teacher = (logits(seed, 2, 4500, device=device, dtype=torch.float32, scale=30.0) for seed in (21, 22))
    student[0, 4400] = teacher[0, 30] = 9e4
    ours = student.clone().requires_grad_()
    loss = op.kd_loss(ours, teacher, temperature=T, direction=direction, beta=BETA)
    wanted = naive.losses(student.double(), teacher.double(), None, T, direction, BETA).mean()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, ours)
    ones = torch.full((2,), 0.5, dtype=torch.float64, device=device)
    exact = naive.gradient(student.double(), teacher.double(), None, ones, T, direction, BETA)
    # Of numbers up to T: a distribution of one class has a gradient that is rounding of nothing.
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-6)


@on_triton
@EVERY
def test_rows_in_one_piece_need_not_touch(device, direction):
    student, teacher = (logits(seed, 4, 300, device=device, dtype=torch.float32)[:, :270] for seed in (23, 24))
    compared(student, teacher, direction, bound=2e-5, overwrite_teacher=True)


# -- hidden states and heads -----------------------------------------------------------------------------------------
def heads(device="cpu", dtype=torch.float64, N=7, V=33, widths=(8, 12)):
    tensors = [logits(30 + i, *shape, device=device, dtype=dtype, scale=1.0) for i, shape in enumerate(
        [(N, widths[0]), (V, widths[0]), (N, widths[1]), (V, widths[1])]
    )]  # fmt: skip
    return [tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:]]


@EVERY
@pytest.mark.parametrize("chunk", [33, 66, 10**9])
def test_heads_fused_with_the_loss(direction, chunk):
    h, w, h_t, w_t = heads()
    rows = torch.tensor([0, 2, 3, 6])
    options = {"temperature": T, "direction": direction, "beta": BETA}
    ours = linear.fused_linear_kd_loss(h, w, h_t, w_t, rows=rows, chunk_elements=chunk, **options)
    wanted = formula(h @ w.T, h_t @ w_t.T, direction, rows)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-6, atol=0)
    found, exact = (torch.autograd.grad(5 * loss, (h, w)) for loss in (ours, wanted))
    for one, other in zip(found, exact, strict=True):
        assert relative(one, other) < 1e-6


@on_triton
@EVERY
def test_heads_on_the_kernels(device, direction):
    h, w, h_t, w_t = heads(device, torch.float32, N=5, V=200)
    ours = linear.fused_linear_kd_loss(
        h, w, h_t, w_t, direction=direction, temperature=T, beta=BETA, chunk_elements=400
    )
    wanted = formula(h.double() @ w.double().T, h_t.double() @ w_t.double().T, direction)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=0)
    found, exact = (torch.autograd.grad(loss, (h, w)) for loss in (ours, wanted))
    for one, other in zip(found, exact, strict=True):
        assert relative(one, other) < 1e-4


@pytest.mark.gpu
@EVERY
@pytest.mark.parametrize("V", [32000, 128256])
def test_large_vocabularies_on_a_device(direction, V):
    student, teacher = (logits(seed, 64, V, device="cuda", dtype=torch.bfloat16) for seed in (25, 26))
    compared(student, teacher, direction, tolerance=1e-5, overwrite_teacher=True)
