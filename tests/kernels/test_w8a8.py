"""8-bit weights with 8-bit inputs against float64, and against compressed-tensors' own quantization.

The tests of the Triton kernels run interpreted on a CPU, and on a CUDA device (see ``interpreting``).
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from interpreting import BOUND, CUDA, on_triton, relative
from torch.nn import functional as F

from hf_optim.compressed.weights import Codes, InputQuantization, QuantizedWeight
from hf_optim_kernels.w8a8 import epilogues, layer, naive, op

GRIDS = [(False, True), (False, False), (True, True)]  # float8, symmetric
DECODE = {"BLOCK_N": 32, "BLOCK_K": 64, "SPLIT": 1, "num_warps": 4, "num_stages": 2, "PREQUANT": 0}
GROUPED = {
    "KERNEL": "grouped", "BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP": 8, "HALVES": 0, "FLATTEN": 0,
    "num_warps": 4, "num_stages": 2, "PARTS": 1,
}  # fmt: skip
CONFIGS = [
    DECODE,
    DECODE | {"SPLIT": 3},
    DECODE | {"PREQUANT": 1, "SPLIT": 2},
    GROUPED,
    GROUPED | {"PARTS": 3},
    GROUPED | {"KERNEL": "persistent"},
    GROUPED | {"KERNEL": "persistent", "HALVES": 1, "FLATTEN": 1},
]


def random_layer(out, columns, *, float8, dtype, device="cpu", seed=0):
    """``weight, w_scale, w_sum, bias`` as the operator takes them."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (out, columns), generator=g, dtype=torch.int8)
    sums = weight.sum(1, dtype=torch.int32)
    if float8:
        weight = torch.randn(out, columns, generator=g).to(naive.FLOAT8)
    scale = torch.rand(out, generator=g) * 0.1 + 0.01
    bias = torch.randn(out, generator=g).to(dtype)
    return tuple(t.to(device) for t in (weight, scale, sums, bias))


def random_input(rows, columns, dtype, device="cpu", seed=1):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.3
    return x.to(dtype).to(device)


def semaphores(out, device):
    return torch.zeros(-(-out // 16), dtype=torch.int32, device=device)


def exact(quantized, weight, scale, bias):
    """The float64 product of codes ``(codes, scale, zero)``."""
    codes, rows, zero = quantized
    return naive.multiply(codes, rows.double(), zero, weight, scale, bias, torch.float64)


def by_naive(x, *arguments):
    """``naive.quantize`` on the CPU: a CUDA device divides by a constant by multiplying with its reciprocal."""
    moved = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
    return tuple(t.to(x.device) for t in naive.quantize(x.cpu(), *moved))


def in_steps(found, wanted):
    """The largest difference of two sets of codes, in steps of their grid."""
    if found.dtype == torch.int8:
        return int((found.int() - wanted.int()).abs().max())
    bits = [t.view(torch.uint8).int() for t in (found, wanted)]
    ordered = [torch.where(b < 128, b, 128 - b) for b in bits]
    return int((ordered[0] - ordered[1]).abs().max())


# -- the specification ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("float8", "symmetric"), GRIDS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_codes_are_those_of_compressed_tensors(float8, symmetric, dynamic, dtype):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(
        num_bits=8, type="float" if float8 else "int", symmetric=symmetric, dynamic=dynamic,
        strategy="token" if dynamic else "tensor",
    )  # fmt: skip
    x = random_input(20, 172, dtype).view(4, 5, 172)
    x[1, 2] = 0
    x[3, 4] *= 1e-3
    if dynamic:
        scale, zero = compute_dynamic_scales_and_zp(x, args, None)
        given = (None, None)
    else:
        scale, zero = torch.tensor([0.011], dtype=dtype), torch.tensor([0 if symmetric else -7], dtype=torch.int8)
        given = (scale, None if symmetric else zero)
    # An asymmetric row of zeros is 0 / 0 there.
    wanted = fake_quantize(x, scale, zero, args).nan_to_num(0.0)
    codes, made, zeros = naive.quantize(x, float8, symmetric, *given)
    assert torch.equal(naive.dequantize(codes, made, zeros, dtype), wanted)
    assert codes.dtype == (naive.FLOAT8 if float8 else torch.int8)


@pytest.mark.parametrize(("float8", "symmetric"), GRIDS)
def test_the_specification_equals_float64(float8, symmetric):
    weight, scale, sums, bias = random_layer(33, 172, float8=float8, dtype=torch.float64)
    x = random_input(5, 172, torch.float64)
    codes, rows, zero = naive.quantize(x, float8, symmetric)
    values = codes.double() - (zero[:, None] if zero.numel() else 0)
    wanted = (values * rows[:, None]) @ (weight.double() * scale[:, None].double()).T + bias
    y = op.w8a8(x, weight, scale, sums, bias, None, None, semaphores(33, "cpu"), symmetric)
    assert relative(y, wanted) < 1e-14


# -- quantizing rows --------------------------------------------------------------------------------------------------
@on_triton
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(("float8", "symmetric"), GRIDS)
@pytest.mark.parametrize("static", [False, True])
def test_quantized_rows(float8, symmetric, static, dtype, device, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(77))
    x = random_input(7, 172, dtype, device)
    x[3] = 0
    given = (torch.tensor([0.013], device=device, dtype=dtype), None) if static else (None, None)
    if static and not symmetric:
        given = (given[0], torch.tensor([-9], device=device, dtype=torch.int8))
    codes, scale, zero, _ = epilogues.quantize_rows(x, float8, symmetric, *given)
    wanted, wanted_scale, wanted_zero = by_naive(x, float8, symmetric, *given)
    # The interpreter cuts to bfloat16, and rounds halves up in float8: the next code is as good there.
    cut = device == "cpu" and (float8 or dtype == torch.bfloat16)
    if device == "cpu" and float8:
        # It also loses the carry where a float8 is rounded up to a power of two.
        whole = wanted.view(torch.uint8) & 7 == 0
        codes, wanted = (torch.where(whole, 0, t.view(torch.uint8)).view(naive.FLOAT8) for t in (codes, wanted))
    assert in_steps(codes, wanted) <= (2 if cut else 0)
    assert torch.allclose(scale, wanted_scale, rtol=2**-7 if cut else 0, atol=0)
    assert zero.shape == wanted_zero.shape
    assert not zero.numel() or int((zero - wanted_zero).abs().max()) <= int(cut)


def produced(kind, x, other, third):
    if kind == "rms":
        return epilogues.rms_norm_quantize(x, other[0], 1e-5, False, True, None, None, True), naive.rms_norm(
            x, other[0], 1e-5
        )
    if kind == "layer":
        out = epilogues.layer_norm_quantize(x, other[0], third, 1e-5, False, True, None, None, True)
        return out, naive.layer_norm(x, other[0], third, 1e-5)
    out = epilogues.gated_quantize(x, other, kind, False, True, None, None, True)
    return out, naive.gated(x, other, kind)


@on_triton
@pytest.mark.parametrize("kind", ["rms", "layer", *naive.ACTIVATIONS])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_fused_quantization(kind, dtype, device):
    both = random_input(6, 344, dtype, device) * 2
    gate, up = both.view(2, 3, 344).split(172, -1)  # views of one, as a joined layer leaves them
    third = random_input(1, 172, dtype, device, seed=5)[0]
    (codes, scale, zero, row), wanted = produced(kind, gate, up[0] if kind in ("rms", "layer") else up, third)
    bound = 3 * BOUND[dtype]
    assert relative(row, wanted) < bound
    again = by_naive(row, False, True)
    assert torch.allclose(scale, again[1], rtol=2**-7 if device == "cpu" and dtype == torch.bfloat16 else 0, atol=0)
    assert in_steps(codes, again[0]) <= (2 if device == "cpu" and dtype == torch.bfloat16 else 0)
    assert zero.numel() == 0
    assert codes.shape == wanted.shape


@on_triton
def test_an_activation_without_a_factor(device):
    x = random_input(3, 40, torch.float32, device)
    codes, scale, _, kept = epilogues.gated_quantize(x, None, "gelu", False, True, None, None, False)
    assert kept.numel() == 0
    error = (codes.double() * scale[:, None] - F.gelu(x)).abs()
    assert bool((error <= 0.51 * scale[:, None]).all())  # half a step, and what float32 rounds
    with pytest.raises(ValueError, match="activation 'swish'"):
        epilogues.gated_quantize(x, None, "swish", False, True, None, None, False)


# -- products ---------------------------------------------------------------------------------------------------------
CASES = [
    (rows, out, columns, GRIDS[(i + j) % 3], dtype)
    for i, (rows, out, columns) in enumerate([(1, 48, 172), (5, 70, 64), (33, 40, 80)])
    for j, dtype in enumerate(BOUND)
    if rows < 33 or dtype != torch.bfloat16
]


@pytest.mark.many
@on_triton
@pytest.mark.parametrize(("rows", "out", "columns", "grid", "dtype"), CASES, ids=str)
def test_every_kernel_equals_float64(rows, out, columns, grid, dtype, device, monkeypatch):
    from hf_optim_kernels.w8a8 import launch, quantize

    float8, symmetric = grid
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(77))
    weight, scale, sums, bias = random_layer(out, columns, float8=float8, dtype=dtype, device=device)
    x = random_input(rows, columns, dtype, device)
    reference = exact(quantize.quantize_rows(x, float8, symmetric)[:3], weight, scale, bias)
    packed = naive.PackedTensors(weight, scale, sums, bias, semaphores(out, device))
    # Of float8, the tensor core's own accumulator has fewer digits than float32.
    bound = max(BOUND[dtype], 1e-3 if float8 and device != "cpu" else 0)
    for config in CONFIGS:
        y = launch.linear(x, packed, naive.InputGrid(None, None, symmetric), config)
        assert y.dtype == dtype
        assert relative(y, reference) < bound, config
        assert not bool(packed.semaphores.any()), config


@on_triton
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_inputs(symmetric, device):
    from hf_optim_kernels.w8a8 import launch

    weight, scale, sums, bias = random_layer(24, 64, float8=False, dtype=torch.float32, device=device)
    x = random_input(3, 64, torch.float32, device)
    given = torch.tensor([0.02], device=device), None if symmetric else torch.tensor([11], device=device).char()
    wanted = exact(by_naive(x, False, symmetric, *given), weight, scale, bias)
    for config in CONFIGS:
        packed = naive.PackedTensors(weight, scale, sums, bias, semaphores(24, device))
        y = launch.linear(x, packed, naive.InputGrid(*given, symmetric), config)
        assert relative(y, wanted) < 1e-6


@on_triton
@pytest.mark.parametrize("rows", [*range(1, 34), 64, 65])
def test_every_number_of_rows(rows, device):
    weight, scale, sums, bias = random_layer(20, 40, float8=False, dtype=torch.float32, device=device)
    x = random_input(rows, 40, torch.float32, device, seed=rows)
    quantized = by_naive(x, False)
    wanted = exact(quantized, weight, scale, bias)
    y = op.w8a8_codes(*quantized, weight, scale, sums, bias, semaphores(20, device), torch.float32)
    assert relative(y, wanted) < 1e-6
    # One program quantizes a row, whatever their number.
    if rows in (1, 2, 5, 16, 17, 33, 65):
        y = op.w8a8(x, weight, scale, sums, bias, None, None, semaphores(20, device), True)
        assert relative(y, wanted) < 1e-6


@on_triton
def test_odd_shapes(device):
    weight, scale, sums, bias = random_layer(352, 172, float8=False, dtype=torch.float32, device=device)
    for rows, symmetric in ((1, False), (2, True)):
        x = random_input(rows, 172, torch.float32, device)
        y = op.w8a8(x, weight, scale, sums, bias, None, None, semaphores(352, device), symmetric)
        assert relative(y, exact(by_naive(x, False, symmetric), weight, scale, bias)) < 1e-6


@on_triton
def test_no_rows_more_dimensions_and_strides(device):
    weight, scale, sums, _ = random_layer(24, 64, float8=False, dtype=torch.float32, device=device)
    x = random_input(6, 64, torch.float32, device)
    rest = (weight, scale, sums, None, None, None, semaphores(24, device), True)
    wanted = exact(by_naive(x, False), weight, scale, None)
    assert op.w8a8(x[:0], *rest).shape == (0, 24)
    assert relative(op.w8a8(x.view(2, 3, 64), *rest).view(6, 24), wanted) < 1e-6
    assert op.w8a8(x[0], *rest).shape == (24,)
    for strided in (x.T.contiguous().T, torch.stack((x, x), 1)[:, 0], torch.stack((x, x), 2)[:, :, 1]):
        assert not strided.is_contiguous()
        assert relative(op.w8a8(strided, *rest), wanted) < 1e-6
    turned = op.w8a8(x.view(2, 3, 64).transpose(0, 1), *rest).transpose(0, 1)
    assert relative(turned.reshape(6, 24), wanted) < 1e-6


@on_triton
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, interpreting
@pytest.mark.parametrize(("float8", "symmetric"), GRIDS)
@pytest.mark.parametrize("static", [False, True])
def test_what_is_not_finite_propagates(float8, symmetric, static, device):
    from hf_optim_kernels.w8a8 import launch

    weight, scale, sums, bias = random_layer(24, 64, float8=float8, dtype=torch.float32, device=device)
    x = random_input(3, 64, torch.float32, device)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    given = torch.tensor([0.02], device=device) if static else None
    zero = torch.tensor([3], device=device, dtype=torch.int8) if static and not symmetric else None
    for config in (DECODE, DECODE | {"PREQUANT": 1}, GROUPED):
        packed = naive.PackedTensors(weight, scale, sums, bias, semaphores(24, device))
        y = launch.linear(x, packed, naive.InputGrid(given, zero, symmetric), config)
        assert bool(y[0].isnan().all())
        assert not bool(y[1].isfinite().any())
        assert bool(y[2].isfinite().all())


@on_triton
def test_codes_that_were_made_before(device):
    weight, scale, sums, bias = random_layer(24, 64, float8=False, dtype=torch.bfloat16, device=device)
    for symmetric in (True, False):
        x = random_input(70, 64, torch.float32, device).view(2, 35, 64)
        codes, rows, zero = by_naive(x, False, symmetric)
        for part in (slice(0, 3), slice(0, 35)):
            given = codes[:, part], rows[:, part], zero[:, part] if zero.numel() else zero
            y = op.w8a8_codes(*given, weight, scale, sums, bias, semaphores(24, device), torch.float32)
            assert relative(y, exact(given, weight, scale, bias)) < 1e-6


@on_triton
def test_gradients_pass_straight_through(device):
    weight, scale, sums, bias = random_layer(24, 64, float8=False, dtype=torch.float32, device=device)
    x = random_input(4, 64, torch.float32, device).requires_grad_()
    bias.requires_grad_()
    coefficients = torch.randn(4, 24, generator=torch.Generator().manual_seed(3)).to(device)
    y = op.w8a8(x, weight, scale, sums, bias, None, None, semaphores(24, device), True)
    (y * coefficients).sum().backward()
    assert relative(x.grad, coefficients.double() @ (weight.double() * scale[:, None].double())) < 1e-6
    assert relative(bias.grad, coefficients.double().sum(0)) < 1e-6


@on_triton
def test_the_operators_are_well_formed(device):
    weight, scale, sums, bias = random_layer(24, 64, float8=False, dtype=torch.float32, device=device)
    x = random_input(3, 64, torch.float32, device)
    ops, check = torch.ops.hf_optim, torch.library.opcheck
    given = x.clone().requires_grad_()
    check(ops.w8a8.default, (given, weight, scale, sums, bias, None, None, semaphores(24, device), True))
    for symmetric in (True, False):
        codes, rows, zero, _ = epilogues.quantize_rows(x, False, symmetric, None, None)
        rest = (weight, scale, sums, bias, semaphores(24, device), torch.float32)
        check(ops.w8a8_codes.default, (codes, rows, zero, *rest))
        check(ops.quantize_rows.default, (x, False, symmetric, None, None))
        check(ops.rms_norm_quantize.default, (x, x[0], 1e-5, False, symmetric, None, None, True))
        check(ops.layer_norm_quantize.default, (x, x[0], None, 1e-5, True, True, None, None, symmetric))
        check(ops.gated_quantize.default, (x, x, "silu", False, symmetric, None, None, False))


def test_the_operators_without_triton():
    weight, scale, sums, bias = random_layer(24, 64, float8=True, dtype=torch.float32)
    x = random_input(3, 64, torch.float32)
    y = op.w8a8(x, weight, scale, sums, bias, None, None, semaphores(24, "cpu"), True)
    assert relative(y, exact(by_naive(x, True), weight, scale, bias)) < 1e-6
    codes, rows, zero, kept = epilogues.rms_norm_quantize(x, x[0], 1e-5, True, True, None, None, True)
    assert relative(kept, F.rms_norm(x, (64,), x[0], 1e-5)) < 1e-6
    y = op.w8a8_codes(codes, rows, zero, weight, scale, sums, bias, semaphores(24, "cpu"), torch.float32)
    assert relative(y, exact(by_naive(kept, True), weight, scale, bias)) < 1e-6


# -- layers -----------------------------------------------------------------------------------------------------------
def quantized_weight(out, columns, *, float8=False, symmetric=True, dynamic=True, device="cpu", bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (out, columns), generator=g, dtype=torch.uint8)
    if float8:
        codes = torch.randn(out, columns, generator=g).to(naive.FLOAT8)
    scale = torch.rand(out, 1, generator=g) + 0.1
    given = {} if dynamic else {"input_scale": torch.tensor([0.02], device=device)}
    if not dynamic and not symmetric:
        given["input_zero"] = torch.tensor([-5], dtype=torch.int8, device=device)
    found = Codes(codes.to(device), scale.to(device), None, **given)
    return QuantizedWeight(
        name="a.b", shape=(out, columns), dtype=torch.float32, device=torch.device(device),
        kind="float" if float8 else "int", bits=8, group_size=columns, symmetric=True, ordered=False,
        inputs=InputQuantization("float8" if float8 else "int8", dynamic, symmetric), sparse24=False,
        bias=torch.randn(out, generator=g).to(device) if bias else None, codes=lambda: found,
    )  # fmt: skip


@on_triton
@pytest.mark.parametrize(("float8", "symmetric"), GRIDS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_operand(float8, symmetric, dynamic, device):
    given = quantized_weight(24, 64, float8=float8, symmetric=symmetric, dynamic=dynamic, device=device)
    packed_weight, found, made = layer.PackedWeight.of(given), given.codes(), None
    made = packed_weight.codes()
    bits = [t.view(torch.uint8) for t in (made.codes, found.codes)]
    assert torch.equal(*bits)
    assert made.codes.dtype == found.codes.dtype
    assert torch.equal(made.scale, found.scale)
    assert (made.input_scale is None) == dynamic
    x = random_input(6, 64, torch.float32, device).view(2, 3, 64)
    values = found.codes.double() - (0 if float8 else 128)
    y = copy.deepcopy(packed_weight)(x)
    codes, rows, zero, _ = epilogues.quantize_rows(x, float8, symmetric, found.input_scale, found.input_zero)
    wanted = naive.dequantize(codes, rows, zero, torch.float64) @ (values * found.scale.double()).T + given.bias
    assert relative(y, wanted) < (1e-3 if float8 and device != "cpu" else 1e-6)
    assert torch.equal(packed_weight.quantized_forward(codes, rows, zero), y)
    recorded = packed_weight(x.clone().requires_grad_())
    assert recorded.requires_grad
    assert torch.equal(recorded, y)
    assert packed_weight.accepts(x)
    assert not packed_weight.accepts(x.half())


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("dynamic", [True, False])
def test_launches_that_are_kept(rows, dynamic, device, monkeypatch):
    """The second call of a shape goes by a plan, which the first one made; moving or copying a layer forgets it."""
    packed_weight = layer.PackedWeight.of(quantized_weight(48, 64, symmetric=False, dynamic=dynamic, device=device))
    first, x = (random_input(rows, 64, torch.float32, device, seed=s) for s in (1, 2))
    packed_weight(first)
    assert packed_weight.plans[x.shape] is not None
    computed = packed_weight.compute(x)
    monkeypatch.setattr(layer.op, "linear", None)  # a plan makes the launches by itself
    y = packed_weight(x)
    assert torch.equal(y, packed_weight.planned(x))
    assert torch.equal(y, computed)
    monkeypatch.undo()
    assert not bool(packed_weight.semaphores.any())
    unaligned = torch.empty(rows * 64 + 1, device=device)[1:].view(rows, 64).copy_(x)
    assert torch.equal(packed_weight(unaligned), y)
    assert torch.equal(packed_weight(x.T.contiguous().T), y)
    assert copy.deepcopy(packed_weight).plans == {}
    assert packed_weight.float().plans == {}


@on_triton
def test_joined_operands(device):
    parts = [layer.PackedWeight.of(quantized_weight(n, 64, float8=True, device=device, seed=n)) for n in (24, 8, 40)]
    joined = layer.join(parts)
    x = random_input(3, 64, torch.float32, device)
    assert relative(joined(x), torch.cat([part(x) for part in parts], -1)) < 1e-3
    assert layer.join([parts[0], layer.PackedWeight.of(quantized_weight(8, 64, device=device))]) is None
    assert layer.join([parts[0], layer.PackedWeight.of(quantized_weight(8, 64, float8=True, bias=False))]) is None
    static = [layer.PackedWeight.of(quantized_weight(8, 64, dynamic=False, device=device, seed=s)) for s in (1, 2)]
    assert layer.join(static) is not None
    static[1].input_scale *= 2
    assert layer.join(static) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"inputs": None}, ""),
        ({"bits": 4, "kind": "float"}, "4-bit float weights with int8 inputs"),
        ({"inputs": InputQuantization("float8", True, True)}, "8-bit int weights with float8 inputs"),
        ({"symmetric": False}, "zero points"),
        ({"group_size": 32}, "group size 32 is not supported"),
        ({"ordered": True}, "another order"),
        ({"device": torch.device("meta")}, "no kernel for meta devices"),
        ({"dtype": torch.float64}, "float64 inputs"),
    ],
)
def test_what_is_not_served_says_why(changes, reason):
    found = layer.supports(replace(quantized_weight(24, 64), **({"device": torch.device("cuda")} | changes)))
    assert reason in found
    assert bool(found) == bool(reason)


def test_compute_capability_decides(monkeypatch):
    pytest.importorskip("triton")
    on_cuda = {"device": torch.device("cuda")}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert layer.supports(replace(quantized_weight(24, 64), **on_cuda)) is None
    assert "float8 needs compute capability 8.9" in layer.supports(
        replace(quantized_weight(24, 64, float8=True), **on_cuda)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "int8 needs compute capability 8.0" in layer.supports(replace(quantized_weight(24, 64), **on_cuda))


def test_static_inputs_without_a_scale_are_refused():
    given = quantized_weight(24, 64)
    found = given.codes()
    with pytest.raises(ValueError, match="no scale"):
        layer.PackedWeight.of(replace(given, inputs=InputQuantization("int8", False, True)))
    half = Codes(found.codes, found.scale, None, input_scale=torch.ones(1))
    with pytest.raises(ValueError, match="no zero point"):
        layer.PackedWeight.of(replace(given, inputs=InputQuantization("int8", False, False), codes=lambda: half))


@pytest.mark.parametrize("float8", [False, True])
def test_candidates_and_defaults_have_the_same_names(float8):
    from hf_optim_kernels.w8a8 import tiles

    for N, K in ((14336, 4096), (4096, 14336), (352, 172)):
        for power in range(14):
            guess = tiles.default(1 << power, N, K, float8)
            found = tiles.candidates(1 << power, N, K, float8)
            assert found
            assert all(config.keys() == guess.keys() for config in found)


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_fewer_bits_take_a_byte_each(bits):
    g = torch.Generator().manual_seed(0)
    weight = quantized_weight(24, 64)
    found = replace(weight.codes(), codes=torch.randint(0, 2**bits, (24, 64), generator=g, dtype=torch.uint8))
    packed_weight = layer.PackedWeight.of(replace(weight, bits=bits, codes=lambda: found))
    assert torch.equal(packed_weight.codes().codes, found.codes)
    assert torch.equal(packed_weight.weight.int(), found.codes.int() - 2 ** (bits - 1))
    joined = layer.join([packed_weight, packed_weight])
    assert torch.equal(joined.codes().codes, torch.cat([found.codes, found.codes]))
    assert layer.join([packed_weight, layer.PackedWeight.of(weight)]) is None


@on_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "block"), [(64, 64), (96, 32)])
def test_rotated_inputs_are_quantized_in_the_pass_that_rotates_them(columns, block, dtype, device, monkeypatch):
    from hf_optim_kernels.hadamard import op as hadamard

    def packed(**other):
        return layer.PackedWeight.of(replace(quantized_weight(48, columns, device=device, **other), dtype=dtype))

    packed_weight = packed()
    x = torch.randn(2, 8, columns, generator=torch.Generator().manual_seed(3)).to(dtype).to(device)
    two_passes = packed_weight(hadamard.hadamard(x, block))
    monkeypatch.setattr(packed_weight, "planned", None)  # which would quantize
    assert torch.equal(packed_weight.rotated_forward(x, block), two_passes)
    assert packed_weight.rotated_forward(x[:, :7], block) is None  # few rows: two passes are as fast
    assert packed_weight.rotated_forward(x, 3 * columns) is None  # blocks that do not divide the columns overlap
    assert packed_weight.rotated_forward(x.float(), block) is None
    assert packed_weight.rotated_forward(x.clone().requires_grad_(), block) is None
    for other in ({"float8": True}, {"dynamic": False}, {"symmetric": False}):
        assert packed(**other).rotated_forward(x, block) is None
