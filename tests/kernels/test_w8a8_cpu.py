"""The int8 product of PyTorch on a CPU against compressed-tensors' rule of quantization in float64 sums."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_optim_kernels.w8a8 import cpu

pytestmark = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="measured with AVX512-VNNI alone")

# Rounding of scales and result, norm over norm.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = [(1, 64, 256), (8, 352, 172), (33, 352, 172), (2, 5, 7), (3, 1, 1)]
GRIDS = [(dynamic, symmetric) for dynamic in (True, False) for symmetric in (True, False)]


def random_weight(
    out, columns, *, bits=8, zero=False, dynamic=True, symmetric=True, dtype=torch.float32, bias=True, seed=0
):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out, columns), generator=g).to(torch.uint8)
    found = SimpleNamespace(
        codes=codes,
        scale=torch.rand(out, 1, generator=g).add(0.01).to(dtype),
        zero=torch.randint(0, 2**bits, (out, 1), generator=g).to(torch.uint8) if zero else None,
        order=None,
        input_scale=None if dynamic else torch.tensor([0.02], dtype=dtype),
        input_zero=None if dynamic or symmetric else torch.tensor([-9], dtype=torch.int8),
    )
    return SimpleNamespace(
        name="layer",
        shape=(out, columns),
        dtype=dtype,
        device=torch.device("cpu"),
        kind="int",
        bits=bits,
        group_size=columns,
        symmetric=not zero,
        ordered=False,
        inputs=SimpleNamespace(type="int8", dynamic=dynamic, symmetric=symmetric),
        sparse24=False,
        bias=torch.randn(out, generator=g).to(dtype) if bias else None,
        codes=lambda: found,
    )


def random_input(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decoded(weight):
    found = weight.codes()
    zero = 2.0 ** (weight.bits - 1) if found.zero is None else found.zero.double()
    return (found.codes.double() - zero) * found.scale.double()


def reference(weight, x):
    """Fake quantization step by step in the type of ``x``; sums in float64."""
    found, inputs = weight.codes(), weight.inputs
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    zero = torch.zeros_like(low)
    if not inputs.dynamic:
        scale = found.input_scale
        zero = zero if found.input_zero is None else found.input_zero.to(x.dtype)
    elif inputs.symmetric:
        scale = torch.maximum(-low, high) / 127.5
    else:
        scale = (high - low) / 255
        zero = (-128 - low / scale).clamp(-128, 127).round()
    codes = (x / scale + zero).clamp(-128, 127).round()
    y = ((codes.double() - zero.double()) * scale.double()) @ decoded(weight).T
    return y if weight.bias is None else y + weight.bias.double()


def apart(y, wanted):
    return float((y.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("dynamic", "symmetric"), GRIDS)
@pytest.mark.parametrize(("rows", "out", "columns"), SHAPES)
def test_it_is_the_fake_quantized_product(rows, out, columns, dynamic, symmetric, dtype):
    weight = random_weight(out, columns, dynamic=dynamic, symmetric=symmetric, dtype=dtype)
    assert cpu.unsupported_reason(weight) is None
    x = random_input(rows, columns, dtype=dtype)
    y = cpu.prepack(weight)(x)
    assert y.dtype == dtype
    assert y.shape == (rows, out)
    assert apart(y, reference(weight, x)) < BOUND[dtype]


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize(("dynamic", "symmetric"), GRIDS)
def test_weights_with_zero_points_and_fewer_bits(bits, dynamic, symmetric):
    weight = random_weight(48, 96, bits=bits, zero=True, dynamic=dynamic, symmetric=symmetric)
    x = random_input(5, 96)
    assert apart(cpu.prepack(weight)(x), reference(weight, x)) < BOUND[torch.float32]


def test_no_bias_more_dimensions_and_strided_inputs():
    weight = random_weight(48, 96, bias=False)
    packed_weight = cpu.prepack(weight)
    x = random_input(2, 96, 6).transpose(1, 2)
    assert apart(packed_weight(x), reference(weight, x)) < BOUND[torch.float32]
    x = random_input(4, 192)[:, ::2]
    assert apart(packed_weight(x), reference(weight, x)) < BOUND[torch.float32]
    assert packed_weight(random_input(96)).shape == (48,)
    assert packed_weight(random_input(3, 0, 96)).shape == (3, 0, 48)


@pytest.mark.parametrize(("dynamic", "symmetric"), GRIDS)
def test_the_largest_sums_are_exact(dynamic, symmetric):
    weight = random_weight(3, 8192, dynamic=dynamic, symmetric=symmetric, bias=False)
    weight.codes().codes.zero_()
    x = -torch.ones(2, 8192)
    assert apart(cpu.prepack(weight)(x), reference(weight, x)) < BOUND[torch.float32]


@pytest.mark.parametrize(("dynamic", "symmetric"), GRIDS)
def test_rows_of_zeros_give_the_bias(dynamic, symmetric):
    weight = random_weight(48, 96, zero=True, dynamic=dynamic, symmetric=symmetric)
    y = cpu.prepack(weight)(torch.zeros(3, 96))
    assert torch.equal(y, weight.bias.expand(3, 48))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("dynamic", "symmetric"), GRIDS)
def test_a_row_that_is_not_finite_stays_visible_and_alone(dynamic, symmetric, value):
    weight = random_weight(48, 96, dynamic=dynamic, symmetric=symmetric)
    packed_weight, x = cpu.prepack(weight), random_input(4, 96)
    expected = packed_weight(x)
    x[1, 7] = value
    y = packed_weight(x)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2, 3]], expected[[0, 2, 3]])
    assert not packed_weight(x[1]).isfinite().any()


def test_the_codes_come_back_bit_for_bit():
    for bits, zero, dynamic in ((8, False, True), (8, True, False), (3, True, False)):
        weight = random_weight(7, 33, bits=bits, zero=zero, dynamic=dynamic, symmetric=False, dtype=torch.bfloat16)
        wanted, found = weight.codes(), copy.deepcopy(cpu.prepack(weight)).codes()
        for name in ("codes", "scale", "zero", "order", "input_scale", "input_zero"):
            a, b = getattr(wanted, name), getattr(found, name)
            assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name


def test_the_state_of_one_operand_loads_into_another():
    packed_weight = cpu.prepack(random_weight(48, 96, seed=0))
    other = cpu.prepack(random_weight(48, 96, seed=5))
    x = random_input(4, 96)
    assert not torch.equal(packed_weight(x), other(x))
    other.load_state_dict(packed_weight.state_dict())
    assert torch.equal(packed_weight(x), other(x))


@pytest.mark.parametrize("zero", [True, False])
def test_joined_operands_give_their_outputs_side_by_side(zero):
    parts = [cpu.prepack(random_weight(n, 96, zero=zero, symmetric=False, seed=n)) for n in (48, 16, 7)]
    whole = cpu.join(parts)
    x = random_input(5, 96)
    assert torch.equal(whole(x), torch.cat([part(x) for part in parts], -1))


def test_operands_with_other_inputs_do_not_join():
    first = cpu.prepack(random_weight(48, 96, dynamic=False))
    other = random_weight(48, 96, dynamic=False)
    other.codes().input_scale.mul_(2)
    assert cpu.join([first, cpu.prepack(other)]) is None
    assert cpu.join([first, cpu.prepack(random_weight(48, 96))]) is None
    assert cpu.join([first, cpu.prepack(random_weight(48, 96, dynamic=False, bias=False))]) is None


def test_the_gradient_goes_straight_through_and_trains_an_adapter():
    weight = random_weight(48, 96, zero=True)
    packed_weight = cpu.prepack(weight)
    x = random_input(2, 3, 96).requires_grad_()
    grad = random_input(2, 3, 48, seed=3)
    y = packed_weight(x)
    assert torch.equal(y, packed_weight(x.detach()))
    y.backward(grad)
    assert apart(x.grad, grad.double() @ decoded(weight)) < BOUND[torch.float32]

    down, up = nn.Linear(96, 4, bias=False), nn.Linear(4, 48, bias=False)
    (packed_weight(x.detach()) + up(down(x.detach()))).square().sum().backward()
    assert float(up.weight.grad.abs().sum()) > 0


def test_it_traces_into_one_graph():
    weight = random_weight(48, 96, dynamic=False, symmetric=False)
    packed_weight, x = cpu.prepack(weight), random_input(4, 96)
    traced = torch.compile(packed_weight, fullgraph=True, backend="eager", dynamic=False)
    assert torch.equal(traced(x), packed_weight(x))


def test_it_takes_its_own_type_alone():
    packed_weight = cpu.prepack(random_weight(48, 96))
    assert packed_weight.accepts(random_input(1, 96))
    assert not packed_weight.accepts(random_input(1, 96, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "float"}, "8-bit float codes"),
        ({"bits": 16}, "16-bit int codes"),
        ({"inputs": None}, "int8 inputs"),
        ({"inputs": SimpleNamespace(type="float8", dynamic=True, symmetric=True)}, "int8 inputs"),
        ({"group_size": 32}, "group size 32"),
        ({"ordered": True}, "reordered"),
        ({"shape": (8, 1 << 17), "group_size": 1 << 17}, "131072 columns"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(change, reason):
    weight = random_weight(48, 96)
    weight.__dict__.update(change)
    assert reason in cpu.unsupported_reason(weight)


def test_a_cpu_without_vnni_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert "VNNI" in cpu.unsupported_reason(random_weight(48, 96))


def test_codes_are_those_of_the_specification():
    from hf_optim_kernels.w8a8 import naive

    x = random_input(64, 384) * torch.logspace(-3, 3, 64)[:, None]
    for symmetric in (True, False):
        packed_weight = cpu.prepack(random_weight(16, 384, symmetric=symmetric))
        codes, scale, zero = packed_weight._quantize(x, None)
        wanted, wanted_scale, wanted_zero = naive.quantize(x, False, symmetric)
        assert torch.equal(codes, wanted)
        assert torch.equal(scale.flatten(), wanted_scale)
        assert zero is None or torch.equal(zero.flatten(), wanted_zero)
