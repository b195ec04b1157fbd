"""PyTorch's packed operators on a CPU against a float64 reference."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_optim_kernels.wna16 import cpu

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in cpu.CAPABILITIES, reason="no packed operators on this CPU"
)

# Norm over norm; both types run in bfloat16: the rounding of inputs, scales and result.
BOUND = 2**-8
# out, in, group of the weight (0: the row), bits, zero points
CASES = [
    (352, 128, 32, 4, True),
    (64, 256, 128, 4, False),
    (48, 384, 192, 4, True),
    (16, 96, 0, 4, False),
    (80, 256, 256, 3, False),
    (80, 128, 64, 2, True),
    (352, 176, 0, 8, False),
    (33, 96, 0, 6, False),
]


def random_weight(out, columns, group=0, bits=4, zero=False, *, dtype=torch.bfloat16, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    group = group or columns
    groups = columns // group
    sign = 1 if zero else torch.randint(0, 2, (out, groups), generator=g) * 2 - 1  # symmetric grids may have both
    found = SimpleNamespace(
        codes=torch.randint(0, 2**bits, (out, columns), generator=g).to(torch.uint8),
        scale=(torch.rand(out, groups, generator=g).add(0.5) * sign).to(dtype),
        zero=torch.randint(0, 2**bits, (out, groups), generator=g).to(torch.uint8) if zero else None,
        order=None,
        input_scale=None,
        input_zero=None,
    )
    return SimpleNamespace(
        name="layer",
        shape=(out, columns),
        dtype=dtype,
        device=torch.device("cpu"),
        kind="int",
        bits=bits,
        group_size=group,
        symmetric=not zero,
        ordered=False,
        inputs=None,
        sparse24=False,
        bias=torch.randn(out, generator=g).to(dtype) if bias else None,
        codes=lambda: found,
    )


def random_input(*shape, dtype=torch.bfloat16, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decoded(weight):
    found = weight.codes()
    spread = [
        None if t is None else t.double().repeat_interleave(weight.group_size, 1) for t in (found.scale, found.zero)
    ]
    zero = 2.0 ** (weight.bits - 1) if spread[1] is None else spread[1]
    return (found.codes.double() - zero) * spread[0]


def reference(weight, x):
    y = x.double() @ decoded(weight).T
    return y if weight.bias is None else y + weight.bias.double()


def apart(y, wanted):
    return float((y.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 33])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_product(case, rows, dtype):
    weight = random_weight(*case, dtype=dtype)
    assert cpu.unsupported_reason(weight) is None
    x = random_input(rows, weight.shape[1], dtype=dtype)
    y = cpu.prepack(weight)(x)
    assert y.dtype == dtype
    assert y.shape == (rows, weight.shape[0])
    assert apart(y, reference(weight, x)) < BOUND


@pytest.mark.parametrize("case", CASES)
def test_the_codes_come_back_bit_for_bit(case):
    weight = random_weight(*case, dtype=torch.float16)
    wanted, found = weight.codes(), copy.deepcopy(cpu.prepack(weight)).codes()
    for name in ("codes", "scale", "zero", "order"):
        a, b = getattr(wanted, name), getattr(found, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name


@pytest.mark.parametrize("bits", [4, 8])
def test_no_bias_more_dimensions_and_strided_inputs(bits):
    weight = random_weight(48, 96, bits=bits, bias=False)
    packed_weight = cpu.prepack(weight)
    x = random_input(2, 96, 6).transpose(1, 2)
    assert apart(packed_weight(x), reference(weight, x)) < BOUND
    x = random_input(4, 192)[:, ::2]
    assert apart(packed_weight(x), reference(weight, x)) < BOUND
    assert packed_weight(random_input(96)).shape == (48,)
    assert packed_weight(random_input(3, 0, 96)).shape == (3, 0, 48)


@pytest.mark.parametrize(("bits", "most"), [(4, cpu.INT4_MOST_ROWS), (8, cpu.INT8_MOST_ROWS)])
def test_where_dense_products_are_fast_many_rows_are_decoded(bits, most, monkeypatch):
    monkeypatch.setattr(cpu, "_multiplies_bfloat16", lambda: True)
    weight = random_weight(192, 96, bits=bits)
    packed_weight = cpu.prepack(weight)
    x = random_input(most + 1, 96)
    assert apart(packed_weight(x), reference(weight, x)) < BOUND
    monkeypatch.setattr(cpu, "DECODED", "not a number")
    packed_weight(x[1:])
    with pytest.raises(TypeError):
        packed_weight(x)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_visible_and_alone(bits, value):
    packed_weight, x = cpu.prepack(random_weight(48, 96, bits=bits)), random_input(4, 96)
    expected = packed_weight(x)
    x[1, 7] = value
    y = packed_weight(x)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("bits", [4, 8])
def test_the_gradient_is_that_of_the_weight_and_trains_an_adapter(bits):
    weight = random_weight(48, 96, bits=bits)
    packed_weight = cpu.prepack(weight)
    x = random_input(2, 3, 96).requires_grad_()
    grad = random_input(2, 3, 48, seed=3)
    y = packed_weight(x)
    assert torch.equal(y, packed_weight(x.detach()))
    y.backward(grad)
    assert apart(x.grad, grad.double() @ decoded(weight)) < BOUND

    down, up = nn.Linear(96, 4, bias=False).bfloat16(), nn.Linear(4, 48, bias=False).bfloat16()
    (packed_weight(x.detach()) + up(down(x.detach()))).square().sum().backward()
    assert float(up.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_it_traces_into_one_graph(bits):
    packed_weight, x = cpu.prepack(random_weight(48, 96, bits=bits)), random_input(4, 96)
    traced = torch.compile(packed_weight, fullgraph=True, backend="eager", dynamic=False)
    assert torch.equal(traced(x), packed_weight(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_joined_operands_give_their_outputs_side_by_side(bits):
    parts = [cpu.prepack(random_weight(n, 96, bits=bits, seed=n)) for n in (48, 16, 32)]
    x = random_input(5, 96)
    assert torch.equal(cpu.join(parts)(x), torch.cat([part(x) for part in parts], -1))
    assert cpu.join([parts[0], cpu.prepack(random_weight(48, 96, bits=bits, bias=False))]) is None
    assert cpu.join([parts[0], cpu.prepack(random_weight(48, 96, bits=3))]) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_the_state_of_one_operand_loads_into_another(bits):
    packed_weight, other = (cpu.prepack(random_weight(48, 96, bits=bits, seed=seed)) for seed in (0, 5))
    x = random_input(4, 96)
    assert not torch.equal(packed_weight(x), other(x))
    other.load_state_dict(packed_weight.state_dict())
    assert torch.equal(packed_weight(x), other(x))


@pytest.mark.parametrize(
    "case", [(352, 172, 0, 8, False), (33, 172, 43, 4, True), (70, 172, 4, 3, False), (5, 7, 0, 8, True)]
)
@pytest.mark.parametrize("ordered", [False, True])
def test_in_float32_it_is_dense_and_exact(case, ordered):
    weight = random_weight(*case, dtype=torch.float32)
    found, columns = weight.codes(), weight.shape[1]
    if ordered:
        weight.ordered = True
        found.order = torch.randperm(columns, generator=torch.Generator().manual_seed(7))
    assert cpu.unsupported_reason(weight) is None
    packed_weight = copy.deepcopy(cpu.prepack(weight))
    x = random_input(2, 9, columns, dtype=torch.float32).requires_grad_()
    stored = x.detach() if found.order is None else x.detach()[..., found.order]
    assert apart(packed_weight(x).detach(), reference(weight, stored)) < 1e-6
    packed_weight(x).sum().backward()
    wanted = decoded(weight).sum(0)
    got = x.grad[0, 0] if found.order is None else x.grad[0, 0][found.order]
    assert apart(got, wanted) < 1e-6
    for name in ("codes", "scale", "zero", "order"):
        a, b = getattr(found, name), getattr(packed_weight.codes(), name)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name
    assert packed_weight.accepts(x)
    assert not packed_weight.accepts(x.bfloat16())
    assert "dense" in packed_weight.label
    assert cpu.join([packed_weight, packed_weight]) is None


def test_float32_scales_that_lose_the_codes_are_refused_at_binding():
    weight = random_weight(48, 96, dtype=torch.float32)
    weight.codes().scale[3] = 0
    with pytest.raises(ValueError, match="codes cannot be recovered from float32 values"):
        cpu.prepack(weight)


def test_it_takes_its_own_type_alone():
    packed_weight = cpu.prepack(random_weight(48, 96))
    assert packed_weight.accepts(random_input(1, 96))
    assert not packed_weight.accepts(random_input(1, 96, dtype=torch.float16))


def test_scales_that_bfloat16_cannot_hold_are_refused_at_binding():
    # A weight of zeros and ones that is a rest of larger terms: 7 s - 6 s, which round apart.
    weight = random_weight(48, 96, zero=True)
    found = weight.codes()
    found.codes.fill_(15)
    found.zero.fill_(14)
    found.scale = torch.full((48, 1), 1 + 2**-8)
    with pytest.raises(ValueError, match="bfloat16 scales would change"):
        cpu.prepack(weight)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "float64 inputs"),
        ({"ordered": True}, "reordered"),
        ({"group_size": 48}, "group size 48"),
        ({"shape": (40, 96)}, "40 rows are not a multiple of 16"),
        ({"bits": 8, "group_size": 32}, "one scale per row"),
        ({"bits": 8, "symmetric": False}, "zero points"),
        ({"bits": 8, "shape": (352, 172), "group_size": 172}, "172 columns are not a multiple of 16"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(change, reason):
    weight = random_weight(48, 96)
    weight.__dict__.update(change)
    assert reason in cpu.unsupported_reason(weight)


def test_another_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "DEFAULT" in cpu.unsupported_reason(random_weight(48, 96))


@pytest.mark.parametrize(("out", "columns", "group", "bits", "zero"), [c for c in CASES if c[0] % 16 == 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_rows_are_multiplied_by_parts_of_the_decoded_weight(monkeypatch, out, columns, group, bits, zero, dtype):
    monkeypatch.setattr(cpu, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(cpu, "DECODED", 3 * 64 * columns)
    weight = random_weight(4 * out, columns, group, bits, zero, dtype=dtype)
    packed = cpu.prepack(weight)
    x = torch.randn(cpu.INT4_MOST_ROWS + 5, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ packed.decoded(torch.float64).T + weight.bias.double()
    assert float((packed(x).double() - expected).norm() / expected.norm()) < BOUND


@pytest.mark.parametrize("rows", [64, 128, 96, 48, 16])
def test_codes_are_taken_out_of_the_operators_layout(monkeypatch, rows):
    codes = torch.randint(0, 16, (rows, 96), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    assert torch.equal(cpu._unpack_int4(packed).int(), codes)
    monkeypatch.setattr(cpu, "_block_rows", lambda rows: 0)
    assert torch.equal(cpu._unpack_int4(packed).int(), codes)


@pytest.mark.parametrize("block", [None, 0])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_on_the_device_that_a_weight_has_moved_to(monkeypatch, bits, block):
    packed = cpu.prepack(random_weight(48, 96, bits=bits))
    packed.codes()  # what is known of the layout is that of the CPU
    if block is not None:
        monkeypatch.setattr(cpu, "_block_rows", lambda rows: block)
    found = packed.to("meta").codes()
    assert found.codes.shape == (48, 96)
    assert found.codes.device.type == found.scale.device.type == "meta"
