"""The weight-only kernels against a float64 reference.

The tests of the Triton kernels run interpreted on a CPU, and on a CUDA device (see ``interpreting``).
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from interpreting import BOUND, EVERYWHERE, on_triton, relative

from hf_optim_kernels.common import tuning
from hf_optim_kernels.wna16 import layer, naive, op

# rows, out, in, group; 172 columns and 33 or 352 rows fit no block, groups of 48 no whole slice.
SHAPES = [
    (1, 64, 256, 128),
    (16, 80, 128, 32),
    (3, 48, 96, 48),
    (2, 352, 172, 172),
    (17, 33, 172, 172),
    (5, 40, 192, 16),
]


def random_case(rows, out, columns, group, width, *, zero, dtype, device="cpu", seed=0):
    """Random operands, and the float64 result: ``(x, packed, scale, zero, bias, semaphores, width, group), y``."""
    g = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    codes = torch.randint(0, 2**width, (out, columns), generator=g)
    scale = signed(torch.rand(groups, out, generator=g) * 0.1 + 0.01, zero, g)
    zeros = torch.randint(0, 2**width, (groups, out), generator=g) if zero else None
    bias = torch.randn(out, generator=g).to(dtype)
    x = torch.randn(rows, columns, generator=g).to(dtype)
    offset = 2 ** (width - 1) if zeros is None else spread(zeros.double(), group, columns)
    weight = (codes - offset) * spread(scale.double(), group, columns)
    reference = x.double() @ weight.T + bias.double()
    zeros = None if zeros is None else zeros.to(torch.uint8).to(device)
    packed = naive.pack(codes, width, group).to(device)
    semaphores = torch.zeros(64, dtype=torch.int32, device=device)
    return (x.to(device), packed, scale.to(device), zeros, bias.to(device), semaphores, width, group), reference.to(
        device
    )


def signed(scale, zero, generator):
    """Scales of symmetric grids may be negative; those beside zero points are not."""
    return scale if zero else scale * (torch.randint(0, 2, scale.shape, generator=generator) * 2 - 1)


def spread(values, group, columns):
    return values.repeat_interleave(group, 0)[:columns].T


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_is_undone_by_unpacking(shape, width):
    _, out, columns, group = shape
    codes = torch.randint(0, 2**width, (out, columns), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    packed = naive.pack(codes, width, group)
    assert packed.dtype == torch.int16
    assert packed.shape[1:] == (out, naive.slice_columns(group, columns))
    assert packed.shape[0] == -(-columns // naive.tile_columns(group, width, columns))
    assert torch.equal(naive.unpack(packed, width, columns), codes)


def test_groups_that_the_layout_does_not_have():
    with pytest.raises(ValueError, match="group size 43 is not a multiple of 16"):
        naive.pack(torch.zeros(4, 172, dtype=torch.uint8), 4, 43)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("width", [4, 8])
def test_the_specification_equals_float64(width, zero):
    for shape in SHAPES:
        for dtype in BOUND:
            (x, *weight), reference = random_case(*shape, width, zero=zero, dtype=dtype)
            assert relative(naive.wna16(x, naive.PackedTensors(*weight)), reference) < BOUND[dtype]


# Every pair of a shape, a type, a width and a grid, not every combination: interpreting is slow.
CASES = [
    (shape, width, zero, dtype)
    for i, shape in enumerate(SHAPES)
    for j, dtype in enumerate(BOUND)
    for width, zero in ((4, (i + j) % 2 == 0), (8, (i + j) % 2 == 1))
]


@pytest.mark.many
@on_triton
@pytest.mark.parametrize(("shape", "width", "zero", "dtype"), CASES, ids=str)
def test_the_triton_kernels_equal_float64(shape, width, zero, dtype, device, monkeypatch):
    from hf_optim_kernels.wna16 import launch

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    arguments, reference = random_case(*shape, width, zero=zero, dtype=dtype, device=device)
    x, weight = arguments[0], naive.PackedTensors(*arguments[1:])
    for split in (1, 3):
        tiles = {**launch.default(1, 64, 64), "BLOCK_M": 16, "SPLIT": split}
        assert relative(launch.fused(x, weight, tiles), reference) < BOUND[dtype]
        assert not bool(weight.semaphores.any())
    assert relative(launch.by_library(x, weight), reference) < 2 * BOUND[dtype]


@on_triton
def test_a_large_weight_is_decoded_in_parts(device, monkeypatch):
    from hf_optim_kernels.wna16 import launch

    arguments, reference = random_case(5, 300, 96, 48, 4, zero=True, dtype=torch.float32, device=device)
    x, weight = arguments[0], naive.PackedTensors(*arguments[1:])
    monkeypatch.setattr(launch, "MOST_BYTES", 128 * 96 * 4)
    monkeypatch.setattr(torch.nn.functional, "linear", None)  # not all at once
    assert relative(launch.by_library(x, weight), reference) < 1e-6


@on_triton
@pytest.mark.parametrize("rows", range(1, 34))
def test_every_number_of_rows(rows, device):
    arguments, reference = random_case(rows, 20, 48, 48, 4, zero=True, dtype=torch.float32, device=device)
    assert relative(op.wna16(*arguments), reference) < 1e-6


@on_triton
def test_a_kernel_that_does_not_compile_costs_speed_only(device, monkeypatch):
    from hf_optim_kernels.wna16 import launch, wide

    arguments, _ = random_case(40, 64, 256, 128, 4, zero=False, dtype=torch.float16, device=device)
    monkeypatch.setattr(wide, "is_available", lambda device: True)
    monkeypatch.setattr(wide, "_FAILED", set())
    monkeypatch.setattr(tuning, "_CHOSEN", {})
    monkeypatch.setattr(launch, "LEAST_WIDE_ROWS", 1)
    ours = launch.default(64, 64, 256)
    choose = lambda *_, **__: ours | {"KERNEL": "wide"} if wide.is_usable(torch.device(device)) else ours  # noqa: E731
    monkeypatch.setattr(launch.tuning, "choose", choose)
    x, weight = arguments[0], naive.PackedTensors(*arguments[1:])
    weight = weight._replace(scale=weight.scale.half())
    reference = naive.wna16(x.double(), weight)

    def product(*_):
        raise AttributeError("no warpgroup_mma")

    monkeypatch.setattr(wide, "product", product)
    assert wide.supports(x, weight)
    with pytest.warns(UserWarning, match="not used on .*: no warpgroup_mma"):
        y = launch.wna16(x, weight)
    assert relative(y, reference) < BOUND[torch.float16]
    assert not wide.supports(x, weight)
    assert relative(launch.wna16(x, weight), reference) < BOUND[torch.float16]


@on_triton
def test_many_rows_go_to_the_library(device, monkeypatch):
    from hf_optim_kernels.wna16 import launch

    monkeypatch.setattr(launch, "MOST_ROWS", 4)
    monkeypatch.setattr(launch, "fused", None)
    monkeypatch.setattr(tuning, "_CHOSEN", {})
    arguments, reference = random_case(5, 20, 48, 48, 4, zero=True, dtype=torch.float32, device=device)
    assert relative(op.wna16(*arguments), reference) < 1e-6


@on_triton
def test_no_rows_and_more_dimensions(device):
    (x, *rest), reference = random_case(6, 24, 64, 32, 4, zero=False, dtype=torch.float32, device=device)
    assert op.wna16(x[:0], *rest).shape == (0, 24)
    assert relative(op.wna16(x.view(2, 3, 64), *rest).view(6, 24), reference) < 1e-6


@on_triton
def test_inputs_need_not_be_contiguous(device):
    (x, *rest), reference = random_case(6, 24, 64, 32, 4, zero=True, dtype=torch.float32, device=device)
    for strided in (x.T.contiguous().T, torch.stack((x, x), 1)[:, 0], torch.stack((x, x), 2)[:, :, 1]):
        assert not strided.is_contiguous()
        assert relative(op.wna16(strided, *rest), reference) < 1e-6
    y = op.wna16(x.view(2, 3, 64).transpose(0, 1), *rest)
    assert relative(y.transpose(0, 1).reshape(6, 24), reference) < 1e-6


@on_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, interpreting
@pytest.mark.parametrize("zero", [False, True])
def test_what_is_not_finite_propagates(zero, device):
    (x, *rest), _ = random_case(3, 24, 64, 32, 4, zero=zero, dtype=torch.float32, device=device)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    y, wanted = op.wna16(x, *rest), naive.wna16(x, naive.PackedTensors(*rest))
    assert torch.equal(y.isfinite(), wanted.isfinite())
    assert bool(y[0].isnan().all())
    assert not bool(y[1].isfinite().any())
    assert bool(y[2].isfinite().all())
    if not zero:  # with zero points an infinite input gives NaN: infinities of both signs meet
        assert torch.equal(y.isinf(), wanted.isinf())


@on_triton
def test_gradients(device):
    (x, packed, scale, zero, bias, semaphores, width, group), _ = random_case(
        4, 24, 64, 32, 4, zero=True, dtype=torch.float32, device=device
    )
    x.requires_grad_()
    bias.requires_grad_()
    coefficients = torch.randn(4, 24, generator=torch.Generator().manual_seed(3)).to(device)
    (op.wna16(x, packed, scale, zero, bias, semaphores, width, group) * coefficients).sum().backward()
    packed_weight = naive.PackedTensors(packed, scale, zero, None, None, width, group)
    weight = naive.dequantize(packed_weight, 64, torch.float64)
    assert relative(x.grad, coefficients.double() @ weight) < 1e-6
    assert relative(bias.grad, coefficients.double().sum(0)) < 1e-6


@on_triton
def test_the_operators_are_well_formed(device):
    arguments, _ = random_case(3, 24, 64, 32, 4, zero=True, dtype=torch.float32, device=device)
    arguments[0].requires_grad_()
    torch.library.opcheck(torch.ops.hf_optim.wna16.default, arguments)
    _, packed, scale, zero, _, _, width, group = arguments
    torch.library.opcheck(
        torch.ops.hf_optim.wna16_dense.default, (packed, scale, zero, width, group, 64, torch.float32)
    )


def test_the_operator_without_triton():
    arguments, reference = random_case(3, 24, 64, 32, 4, zero=True, dtype=torch.float32)
    assert relative(op.wna16(*arguments), reference) < 1e-6


# -- packed weights ---------------------------------------------------------------------------------------------------
def found_codes(out, columns, group, bits, *, zero=False, order=None, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    groups = columns // group
    return SimpleNamespace(
        codes=torch.randint(0, 2**bits, (out, columns), generator=g, dtype=torch.uint8).to(device),
        scale=signed(torch.rand(out, groups, generator=g) + 0.1, zero, g).to(dtype).to(device),
        zero=torch.randint(0, 2**bits, (out, groups), generator=g, dtype=torch.uint8).to(device) if zero else None,
        order=None if order is None else order.to(device),
        input_scale=None,
        input_zero=None,
    )


def decoded(found, bits, group):
    """The weight [out, in] in float64, in the order of the input's columns."""
    zero = 2 ** (bits - 1) if found.zero is None else found.zero.double().repeat_interleave(group, 1)
    stored = (found.codes.double() - zero) * found.scale.double().repeat_interleave(group, 1)
    weight = torch.empty_like(stored)
    weight[:, slice(None) if found.order is None else found.order] = stored
    return weight


KINDS = [(4, 32, False), (4, 64, True), (3, 32, False), (3, 64, True), (2, 64, False), (8, 64, True), (6, 32, False)]


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize(("bits", "group", "zero"), KINDS)
@pytest.mark.parametrize("ordered", [False, True])
def test_the_operand_equals_the_weight_and_gives_its_codes_back(bits, group, zero, ordered, device):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5)) if ordered else None
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = found_codes(48, 64, group, bits, zero=zero, order=order, dtype=dtype, device=device)
    bias = torch.randn(48, dtype=dtype, device=device)
    packed_weight = layer.PackedWeight.from_codes(found, bits, group, dtype, bias)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(7)).to(device, dtype)
    reference = x.double() @ decoded(found, bits, group).T + bias.double()
    for subject in (packed_weight, copy.deepcopy(packed_weight)):
        for _ in range(2):  # the second call takes the plan that the first one made
            assert relative(subject(x), reference) < BOUND[dtype]
        with torch.inference_mode():
            assert relative(subject(x[:, ::2]), reference[:, ::2]) < BOUND[dtype]
    again = packed_weight.codes()
    for name in ("codes", "scale", "zero", "order"):
        was, now = getattr(found, name), getattr(again, name)
        assert (was is None) == (now is None), name
        assert was is None or (torch.equal(was, now) and was.dtype == now.dtype), name
    assert packed_weight.accepts(x)
    assert not packed_weight.accepts(x.double())


def test_operands_that_are_joined_give_their_outputs_side_by_side():
    parts = [found_codes(n, 64, 32, 4, zero=True, seed=n) for n in (16, 48, 8)]
    packed_weights = [layer.PackedWeight.from_codes(p, 4, 32, torch.float32, None) for p in parts]
    whole = layer.join(packed_weights)
    x = torch.randn(3, 64)
    assert relative(whole(x), torch.cat([x.double() @ decoded(p, 4, 32).T for p in parts], 1)) < 1e-6
    other = layer.PackedWeight.from_codes(found_codes(8, 64, 64, 4, zero=True), 4, 64, torch.float32, None)
    assert layer.join([*packed_weights, other]) is None


def test_an_operand_compiles_without_a_break_and_trains_what_is_before_it():
    found = found_codes(16, 64, 32, 4)
    packed_weight = layer.PackedWeight.from_codes(found, 4, 32, torch.float32, torch.zeros(16))
    x = torch.randn(2, 64, requires_grad=True)
    y = torch.compile(packed_weight, backend="aot_eager", fullgraph=True)(x)
    y.sum().backward()
    assert relative(x.grad, decoded(found, 4, 32).sum(0).expand(2, -1)) < 1e-6


def described(**changes):
    given = {
        "kind": "int", "bits": 4, "shape": (4096, 4096), "group_size": 128, "dtype": torch.bfloat16, "inputs": None,
        "device": torch.device("cuda"),
    }  # fmt: skip
    return SimpleNamespace(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "float"}, "^$"),
        ({"inputs": object()}, "^$"),
        ({"bits": 9}, "9-bit codes"),
        ({"dtype": torch.float32}, "float32 inputs are not supported, only float16, bfloat16"),
        ({"group_size": 43}, "group size 43 is not a multiple of 16"),
        ({"shape": (64, 64)}, "faster dense"),
        ({"device": torch.device("meta")}, "no kernel for meta devices"),
    ],
)
def test_what_is_not_served_is_said(changes, reason):
    import re

    assert re.search(reason, layer.supports(described(**changes)))
