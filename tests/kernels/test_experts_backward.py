"""The gradients of a mixture of experts: the specification and the kernels against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from interpreting import BOUND, EVERYWHERE, on_triton, relative

pytest.importorskip("triton")

from hf_optim_kernels.experts import naive, naive_backward, op, training
from hf_optim_kernels.experts.naive import Gate, Weights
from hf_optim_kernels.experts.naive_backward import Needs
from hf_optim_kernels.experts.tiles import Tiles

GATES = {
    "silu": Gate(),
    "interleaved-clamped": Gate(naive.INTERLEAVED, naive.SILU, 1.702, 1.0, 0.8),
    "concatenated-clamped": Gate(naive.CONCATENATED, naive.SILU, 1.0, 0.0, 0.8),
    "gelu": Gate(naive.CONCATENATED, naive.GELU),
    "gelu-tanh": Gate(naive.INTERLEAVED, naive.GELU_TANH),
    "relu": Gate(naive.CONCATENATED, naive.RELU),
    "no-gate": Gate(naive.UNGATED, naive.RELU_SQUARED),
}
NAMES = Needs._fields
EXPERTS = 5


def case(gate, bias, transposed, dtype=torch.float64, device="cpu", tokens=9, d=48, inner=32, grid=False):
    """Hidden states, choices, weights and experts; the last expert has no token, and some pairs have no expert.

    With ``grid``, hidden states are whole numbers, first matrices and biases eighths: so are then their products, which
    16 bits hold without rounding.
    """
    random = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randn(size, generator=random, dtype=torch.float64).to(device, dtype)  # noqa: E731
    rows = inner if gate.layout == naive.UNGATED else 2 * inner
    eighths = lambda x: (8 * x).round() / 8 if grid else x  # noqa: E731
    up, down = eighths(draw(EXPERTS, rows, d) / d**0.5), draw(EXPERTS, d, inner) / inner**0.5
    biases = (eighths(draw(EXPERTS, rows)), draw(EXPERTS, d)) if bias else (None, None)
    if transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    chosen = torch.rand(tokens, EXPERTS - 1, generator=random).topk(3, dim=1).indices
    chosen[1::3, 1] = EXPERTS + 3
    chosen[2::4, 0] = -1
    weights = torch.rand(tokens, 3, generator=random).to(device, dtype)
    grad, hidden = draw(tokens, d), draw(tokens, d)
    return hidden.round() if grid else hidden, chosen.to(device), weights, Weights(up, down, *biases, transposed), grad


def by_autograd(hidden, chosen, weights, given, gate, grad):
    """Gradients of the specification's forward, in float64 on the CPU, by name, of what exists."""
    wide = [None if t is None else t.detach().cpu().double().requires_grad_() for t in (hidden, weights, *given[:4])]
    out = naive.mixture(wide[0], chosen.cpu(), wide[1], Weights(*wide[2:], given.transposed), gate)
    held = {name: t for name, t in zip(NAMES, wide, strict=True) if t is not None}
    return dict(zip(held, torch.autograd.grad(out, list(held.values()), grad.cpu().double()), strict=True))


def by_operator(hidden, chosen, weights, given, gate, grad, needs=NAMES):
    """Gradients of the operator, by name."""
    held = dict(zip(NAMES, (hidden, weights, *given[:4]), strict=True))
    held = {name: None if t is None else t.detach().clone() for name, t in held.items()}
    asked = {name: t.requires_grad_() for name, t in held.items() if t is not None and name in needs}
    hidden, weights, *matrices = held.values()
    out = op.training_mixture(hidden, chosen, weights, Weights(*matrices, given.transposed), gate)
    out.backward(grad)
    return {name: t.grad for name, t in asked.items()}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_specification_is_what_autograd_computes(gate, bias, transposed):
    given = case(GATES[gate], bias, transposed)
    expected = by_autograd(*given[:4], GATES[gate], given[4])
    found = naive.route(given[1], EXPERTS, 16)
    inner = naive.rows_product(given[0], given[3].matrices[0], given[3].up_bias, found, 3, False, 16)
    own = naive_backward.gradients(given[4], *given[:4], GATES[gate], inner, found, Needs())
    for name, value in expected.items():
        assert relative(getattr(own, name), value) < 1e-12, name
    assert [getattr(own, name) is None for name in NAMES] == [name not in expected for name in NAMES]


@pytest.mark.many
@on_triton
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("bias", "transposed"), [(False, False), (True, True)])
def test_kernels_compute_the_gradients(gate, bias, transposed, device):
    given = case(GATES[gate], bias, transposed, torch.float32, device)
    expected = by_autograd(*given[:4], GATES[gate], given[4])
    own = by_operator(*given[:4], GATES[gate], given[4])
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        assert own[name].isfinite().all(), name
        assert relative(own[name].cpu(), value) < 2 * BOUND[torch.float32], name
    for name in ("up", "down"):
        assert not own[name][-1].any(), f"{name}: an expert without tokens has a gradient"


@pytest.mark.many
@on_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["silu", "interleaved-clamped"])
def test_kernels_compute_the_gradients_in_16_bits(gate, dtype, device):
    # At a bound of the gate the gradient leaps, so a product within a rounding of it may have the one of either side.
    grid = gate != "silu"
    given = case(GATES[gate], True, grid, dtype, device, d=64, grid=grid)
    if grid:
        hidden, up, bias = (t.cpu().double() for t in (given[0], given[3].matrices[0], given[3].up_bias))
        products = torch.einsum("td,end->ten", hidden, up) + bias
        assert torch.equal(products.to(dtype).double(), products)
        assert float((products.abs() - GATES[gate].limit).abs().min()) > 0.02
    own = by_operator(*given[:4], GATES[gate], given[4])
    for name, value in by_autograd(*given[:4], GATES[gate], given[4]).items():
        assert own[name].dtype == dtype
        assert relative(own[name].cpu(), value) < 3 * BOUND[dtype], name


@on_triton
def test_tiles_cut_matrices_that_are_not_whole_multiples(device):
    given = case(Gate(), True, False, torch.float32, device, tokens=40, d=50, inner=23)
    expected = by_autograd(*given[:4], Gate(), given[4])
    inner, found = training.forward(*given[:4], Gate())[1:]
    own = training.backward(given[4], *given[:4], Gate(), inner, found, Needs(), Tiles(16, 32, 4, 2, group=2))
    for name, value in expected.items():
        assert relative(getattr(own, name).cpu(), value) < 2 * BOUND[torch.float32], name


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize(
    "needs",
    [
        ("hidden",),
        ("weights",),
        ("hidden", "weights"),
        ("up",),
        ("down",),
        ("up_bias", "down_bias"),
        ("down_bias", "hidden"),
    ],
)
def test_only_what_is_asked_for_is_computed(needs, device, monkeypatch):
    given = case(GATES["gelu"], True, False, torch.float32, device)
    filled = []
    outer = training.outer_product
    monkeypatch.setattr(training, "outer_product", lambda *args: filled.append(args[4].shape) or outer(*args))
    own = by_operator(*given[:4], GATES["gelu"], given[4], needs)
    assert set(own) == set(needs)
    expected = by_autograd(*given[:4], GATES["gelu"], given[4])
    for name in needs:
        assert relative(own[name].cpu(), expected[name]) < 2e-6, name
    if not {"up", "down"} & set(needs):  # frozen experts: no product of the size of their matrices
        assert all(shape[-1] == 16 for shape in filled)


@pytest.mark.parametrize("device", EVERYWHERE)
def test_gradients_where_no_expert_computes_or_no_token_is_there(device):
    for tokens in (0, 4):
        hidden, chosen, weights, given, grad = case(Gate(), True, False, torch.float32, device, tokens=max(1, tokens))
        hidden, chosen, weights, grad = (t[:tokens] for t in (hidden, chosen, weights, grad))
        own = by_operator(hidden, torch.full_like(chosen, EXPERTS), weights, given, Gate(), grad)
        assert all(value.shape == of.shape and not value.any()
                   for value, of in zip(own.values(), (hidden, weights, *given[:4]), strict=True))  # fmt: skip


@pytest.mark.parametrize("device", EVERYWHERE)
def test_operators_of_training_have_the_shapes_of_their_fakes(device):
    hidden, chosen, weights, given, grad = case(Gate(), True, False, torch.float32, device, d=16, inner=16)
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    parts = [t.requires_grad_() for t in (hidden, weights, *given[:4])]
    args = (parts[0], chosen, parts[1], *parts[2:], False, *Gate())
    torch.library.opcheck(torch.ops.hf_optim.experts_training, args, test_utils=utils)
    kept = [t.detach() for t in torch.ops.hf_optim.experts_training(*args)[1:]]
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    back = (grad, *plain, *kept, [True, False, True, True, True, False])
    torch.library.opcheck(torch.ops.hf_optim.experts_training_grad, back, test_utils=utils[:2])


@pytest.mark.parametrize("device", EVERYWHERE)
def test_a_compiled_training_step_has_no_break(device):
    hidden, chosen, weights, given, grad = case(Gate(), False, False, torch.float32, device, d=16, inner=16)
    expected = by_autograd(hidden, chosen, weights, given, Gate(), grad)

    def step(hidden, chosen, weights, up, down):
        return op.training_mixture(hidden, chosen, weights, Weights(up, down, None, None, False), Gate())

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    parts = [t.detach().clone().requires_grad_() for t in (hidden, weights, given.up, given.down)]
    compiled(parts[0], chosen, *parts[1:]).backward(grad)
    for name, part in zip(("hidden", "weights", "up", "down"), parts, strict=True):
        assert relative(part.grad.cpu(), expected[name]) < 2e-6, name


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("gate", ["silu", "concatenated-clamped"])
def test_numbers_that_are_not_numbers_stay_so(gate, device):
    hidden, chosen, weights, given, grad = case(GATES[gate], False, False, torch.float32, device)
    hidden[2] = float("nan")
    own = by_operator(hidden, chosen, weights, given, GATES[gate], grad)
    assert own["hidden"][2].isnan().all()
    assert own["hidden"][[0, 1, 3]].isfinite().all()
    assert own["up"].isnan().any()
    assert own["down"].isnan().any()


@on_triton
def test_equal_steps_have_equal_bits(device):
    given = case(Gate(), True, False, torch.float32, device)
    first, second = (by_operator(*given[:4], Gate(), given[4]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
