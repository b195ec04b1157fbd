"""The weight-only kernel against a float64 reference.

Triton decides at import whether it interprets, and other tests of the same process may have imported it. So the
tests of the Triton kernel on the CPU run in a process of their own (``test_the_triton_kernel_interpreted``), which
collects this file again with ``TRITON_INTERPRET=1``; with the marker ``gpu`` the same tests run on a CUDA device.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_optim_kernels.wna16 import cpu, layer, naive, op

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
DEVICES = ["cpu"] if INTERPRETED else [CUDA]
on_triton = pytest.mark.parametrize("device", DEVICES)
in_this_process = pytest.mark.skipif(INTERPRETED, reason="runs in the ordinary process")

# Rounding of the result, norm over norm. The interpreter cuts float32 to bfloat16 instead of rounding.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-11}
# rows, out, in, group; 172 columns and 33 or 70 rows fit no block, a group of 4 or 43 no half chunk.
SHAPES = [
    (1, 64, 256, 128),
    (16, 80, 128, 32),
    (3, 48, 96, 48),
    (2, 70, 172, 172),
    (5, 33, 172, 4),
    (17, 33, 172, 43),
]


def random_case(rows, out, columns, group, width, *, zero, dtype, device="cpu", seed=0):
    """Random operands, and the float64 result: ``(x, packed, scale, zero, bias, width, group), reference``."""
    g = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    codes = torch.randint(0, 2**width, (out, columns), generator=g)
    scale = torch.rand(groups, out, generator=g) * 0.1 + 0.01
    zeros = torch.randint(0, 2**width, (groups, out), generator=g) if zero else None
    bias = torch.randn(out, generator=g).to(dtype)
    x = torch.randn(rows, columns, generator=g).to(dtype)
    offset = 2 ** (width - 1) if zeros is None else spread(zeros.double(), group, columns)
    weight = (codes - offset) * spread(scale.double(), group, columns)
    reference = x.double() @ weight.T + bias.double()
    zeros = None if zeros is None else zeros.to(torch.int16).to(device)
    packed = naive.pack(codes, width, group).to(device)
    return (x.to(device), packed, scale.to(device), zeros, bias.to(device), width, group), reference.to(device)


def spread(values, group, columns):
    return values.repeat_interleave(group, 0)[:columns].T


def relative(y, reference):
    return float((y.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_is_undone_by_unpacking(shape, width):
    _, out, columns, group = shape
    codes = torch.randint(0, 2**width, (out, columns), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    packed = naive.pack(codes, width, group)
    assert packed.dtype == torch.uint8
    assert packed.shape[1] * 8 // width == naive.padded_columns(columns, group, width)
    assert torch.equal(naive.unpack(packed, width, group, columns), codes)


@in_this_process
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("width", [4, 8])
def test_the_specification_equals_float64(width, zero):
    for shape in SHAPES:
        for dtype in BOUND:
            arguments, reference = random_case(*shape, width, zero=zero, dtype=dtype)
            assert relative(naive.wna16(*arguments), reference) < BOUND[dtype]


# Every pair of a shape, a type, a width and a grid, not every combination: interpreting is slow.
CASES = [
    (shape, width, zero, dtype)
    for i, shape in enumerate(SHAPES)
    for j, dtype in enumerate(BOUND)
    for width, zero in ((4, (i + j) % 2 == 0), (8, (i + j) % 2 == 1))
]


@on_triton
@pytest.mark.parametrize(("shape", "width", "zero", "dtype"), CASES, ids=str)
def test_the_triton_kernel_equals_float64(shape, width, zero, dtype, device, monkeypatch):
    from hf_optim_kernels.wna16 import kernel

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    arguments, reference = random_case(*shape, width, zero=zero, dtype=dtype, device=device)
    for split in (1, 3):
        tiles = {**kernel.choose_tiles(shape[0], shape[1], shape[2], width), "SPLIT": split}
        assert relative(kernel.wna16(*arguments, tiles), reference) < BOUND[dtype]


@on_triton
def test_the_triton_kernel_over_several_tiles(device):
    arguments, reference = random_case(33, 70, 172, 43, 4, zero=True, dtype=torch.float32, device=device)
    assert relative(op.wna16(*arguments), reference) < 1e-6


@on_triton
@pytest.mark.parametrize("rows", range(1, 34))
def test_every_number_of_rows(rows, device):
    arguments, reference = random_case(rows, 20, 40, 40, 4, zero=True, dtype=torch.float32, device=device)
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
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # numpy, interpreting
def test_what_is_not_finite_propagates(device):
    (x, *rest), _ = random_case(3, 24, 64, 32, 4, zero=False, dtype=torch.float32, device=device)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    y, wanted = op.wna16(x, *rest), naive.wna16(x, *rest)
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y.isinf(), wanted.isinf())
    assert bool(y[0].isnan().all())
    assert not bool(y[1].isfinite().any())
    assert bool(y[2].isfinite().all())


@on_triton
def test_gradients(device):
    (x, packed, scale, zero, bias, width, group), _ = random_case(
        4, 24, 64, 32, 4, zero=True, dtype=torch.float32, device=device
    )
    x.requires_grad_()
    bias.requires_grad_()
    coefficients = torch.randn(4, 24, generator=torch.Generator().manual_seed(3)).to(device)
    (op.wna16(x, packed, scale, zero, bias, width, group) * coefficients).sum().backward()
    weight = naive.dequantize(packed, scale, zero, width, group, 64, torch.float64)
    assert relative(x.grad, coefficients.double() @ weight) < 1e-6
    assert relative(bias.grad, coefficients.double().sum(0)) < 1e-6


@on_triton
def test_the_operator_is_well_formed(device):
    arguments, _ = random_case(3, 24, 64, 32, 4, zero=True, dtype=torch.float32, device=device)
    arguments[0].requires_grad_()
    torch.library.opcheck(torch.ops.hf_optim.wna16.default, arguments)


@in_this_process
def test_the_operator_without_triton():
    arguments, reference = random_case(3, 24, 64, 32, 4, zero=True, dtype=torch.float32)
    assert relative(op.wna16(*arguments), reference) < 1e-6


@in_this_process
def test_the_triton_kernel_interpreted():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


# -- layers -----------------------------------------------------------------------------------------------------------
def quantized_linear(
    out, columns, *, bits=4, group=None, symmetric=True, dtype=torch.float32, bias=True, seed=0, **changes
):
    """A linear layer in the state of a decompressed checkpoint; ``changes`` are attributes of its weight scheme."""
    g = torch.Generator().manual_seed(seed)
    module = nn.Linear(columns, out, bias=bias).to(dtype).requires_grad_(False)
    held = group or columns
    weight = torch.randn(out, columns // held, held, generator=g)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        scale = (weight.abs().amax(-1, keepdim=True) / high).to(dtype)
        zero = torch.zeros_like(scale)
    else:
        weight = weight + 0.4
        least = weight.amin(-1, keepdim=True).clamp_max(0)
        scale = ((weight.amax(-1, keepdim=True) - least) / (high - low)).to(dtype)
        zero = (low - least / scale.float()).round().clamp(low, high)
    codes = ((weight / scale.float()).round() + zero).clamp(low, high)
    module.weight.copy_(((codes - zero).to(dtype) * scale).view(out, columns))
    if bias:
        module.bias.copy_(torch.randn(out, generator=g))
    module.register_buffer("weight_scale", scale[..., 0].clone())
    if not symmetric:
        module.register_buffer("weight_zero_point", zero[..., 0].to(torch.int8))
    args = {"type": "int", "num_bits": bits, "symmetric": symmetric, "group_size": group}
    weights = SimpleNamespace(**{**args, "strategy": "group" if group else "channel", **changes})
    module.quantization_scheme = SimpleNamespace(weights=weights, input_activations=None, output_activations=None)
    return module, codes.view(out, columns), scale[..., 0].float()


@in_this_process
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [(4, 32, True), (4, 43, False), (3, 32, True), (4, None, False), (8, None, True), (8, 4, False), (6, 32, False)],
)
def test_codes_are_recovered_exactly(bits, group, symmetric, dtype):
    columns = 172 if group in (43, 4) else 96
    module, codes, scale = quantized_linear(24, columns, bits=bits, group=group, symmetric=symmetric, dtype=dtype)
    found = layer.codes_of(module)
    offset = 8 if bits <= 4 else 128
    assert found.width == (4 if bits <= 4 else 8)
    steps = (found.codes.float() - offset - codes).abs()
    if bits == 8 and not symmetric and dtype == torch.bfloat16:
        # Too few digits to tell 255 steps apart: a code may be one off, and is then as near to the weight.
        assert float(steps.max()) <= 1
        grouped = module.weight.float().view(24, -1, 4)
        zero = module.weight_zero_point.float()[..., None]
        recovered = (found.codes.float().view_as(grouped) - 128 - zero) * scale[..., None]
        original = (codes.view_as(grouped) - zero) * scale[..., None]
        assert bool(((recovered - grouped).abs() <= (original - grouped).abs()).all())
    else:
        assert float(steps.max()) == 0
    assert torch.equal(found.scale, scale)
    assert (found.zero is None) == symmetric


@in_this_process
def test_a_group_of_zeros_with_scale_zero():
    module, _, _ = quantized_linear(16, 64, group=32)
    module.weight[3, :32] = 0
    module.weight_scale[3, 0] = 0
    found = layer.codes_of(module)
    assert bool((found.codes[3, :32] == 8).all())


@in_this_process
@pytest.mark.parametrize("delta", [1e-3, float("nan")])
def test_a_weight_off_its_grid_is_refused(delta):
    module, _, _ = quantized_linear(16, 64, group=32)
    module.weight[5, 9] += delta
    with pytest.raises(ValueError, match="not on the grid"):
        layer.bind(module)


@on_triton
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_layer_equals_the_module(symmetric, device):
    module, _, _ = quantized_linear(48, 172, group=43, symmetric=symmetric)
    module = module.to(device)
    bound = layer.PackedLinear(layer.codes_of(module), module.bias, module.weight.dtype)
    x = torch.randn(2, 3, 172, generator=torch.Generator().manual_seed(7)).to(device)
    # On a GPU the kernel is taken in graphs only.
    assert bound.takes(x) == (device == "cpu")
    taken = torch.compile(lambda x: bound(x) if bound.takes(x) else x, backend="eager", fullgraph=True)
    for other in (x.to(torch.bfloat16), x.new_zeros(layer.MOST_ROWS + 1, 172), x[:0]):
        assert torch.equal(taken(other), other)
    assert relative(taken(x), module.double()(x.double())) < 1e-6


# -- PyTorch's packed operators ---------------------------------------------------------------------------------------
CPU_CASES = [
    (4, 32, True, torch.bfloat16),
    (4, 128, False, torch.bfloat16),
    (4, None, True, torch.float32),
    (4, 64, True, torch.float32),
    (4, 64, False, torch.float32),
    (3, 64, True, torch.float16),
    (8, None, True, torch.float32),
    (8, None, True, torch.bfloat16),
]
packed_cpu = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in cpu.CAPABILITIES, reason="no packed operators on this CPU"
)


@in_this_process
@packed_cpu
@pytest.mark.parametrize(("bits", "group", "symmetric", "dtype"), CPU_CASES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_packed_operators_are_right(bits, group, symmetric, dtype, mean):
    module, _, _ = quantized_linear(1024, 1024, bits=bits, group=group, symmetric=symmetric, dtype=dtype)
    assert layer.serves("m", module) is None
    bound = layer.bind(module)
    exact = copy.deepcopy(module).double()
    for rows in (1, 3, 8):
        x = (torch.randn(rows, 1024, generator=torch.Generator().manual_seed(rows)) + mean).to(dtype)
        assert bound.takes(x)
        y = bound(x)
        assert y.dtype == dtype
        assert relative(y, exact(x.double())) < 4e-3


@in_this_process
@packed_cpu
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_operators_propagate_what_is_not_finite(bits):
    module, _, _ = quantized_linear(1024, 1024, bits=bits, group=32 if bits == 4 else None)
    bound = layer.bind(module)
    x = torch.randn(3, 1024)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    y, wanted = bound(x), module(x)
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y.isinf(), wanted.isinf())
    assert bool(y[2].isfinite().all())


@in_this_process
@packed_cpu
def test_packed_layers_take_few_rows_of_their_own_type():
    bound = layer.bind(quantized_linear(1024, 512, group=32)[0])
    x = torch.randn(2, 4, 512)
    assert bound.takes(x)
    assert bound(x).shape == (2, 4, 1024)
    assert bound.takes(x.transpose(0, 1))
    assert torch.equal(bound(x.transpose(0, 1)), bound(x).transpose(0, 1))
    assert not bound.takes(torch.randn(cpu.MOST_ROWS + 1, 512))
    assert not bound.takes(x[:0])
    assert not bound.takes(x.half())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not bound.takes(x)


@in_this_process
@packed_cpu
@pytest.mark.parametrize(
    ("shape", "settings", "reason"),
    [
        ((1024, 512), {"group": 16}, "groups of 16 columns"),
        ((1000, 1024), {"group": 32}, "1000 rows are no multiple of 16"),
        ((64, 64), {"group": 32}, "4,096 weights is faster dense"),
        ((1024, 512), {"bits": 8}, "524,288 weights is faster dense"),
        ((1024, 512), {"bits": 8, "group": 32}, "one scale a row"),
        ((1024, 512), {"bits": 8, "symmetric": False}, "zero points"),
        ((1024, 512), {"group": 32, "type": "float"}, "4-bit float codes"),
        ((1024, 512), {"group": 32, "strategy": "block"}, "scales per block"),
    ],
)
def test_what_is_not_served_says_why(shape, settings, reason):
    module, _, _ = quantized_linear(*shape, **settings)
    assert reason in layer.serves("m", module)


@in_this_process
@pytest.mark.parametrize(
    ("shape", "settings", "reason"),
    [
        ((4096, 4096), {"group": 128, "dtype": torch.bfloat16}, None),
        ((4096, 4096), {"group": 128, "dtype": torch.float16, "bits": 3}, None),
        ((4096, 4096), {"group": 128}, "16-bit activations"),
        ((4096, 4096), {"bits": 8, "dtype": torch.bfloat16}, "up to 4 bits"),
        ((4096, 4096), {"group": 8, "dtype": torch.bfloat16}, "no multiple of 16"),
        ((2048, 4096), {"group": 128, "dtype": torch.bfloat16}, "faster dense"),
    ],
    ids=str,
)
def test_what_a_gpu_serves(shape, settings, reason):
    settings = {"bits": 4, "group": None, **settings}
    module = nn.Linear(shape[1], shape[0], dtype=settings.get("dtype"), device="meta")
    strategy = "group" if settings["group"] else "channel"
    weights = SimpleNamespace(num_bits=settings["bits"], group_size=settings["group"], strategy=strategy)
    module.quantization_scheme = SimpleNamespace(weights=weights)
    found = layer._gpu_refusal(module)
    assert found is None if reason is None else reason in found


@in_this_process
def test_modules_that_are_not_served():
    assert layer.serves("m", nn.Linear(4, 4)) == ""
    module, _, _ = quantized_linear(1024, 512, group=32)
    module.quantization_scheme.input_activations = SimpleNamespace(num_bits=8)
    assert "input activations are quantized" in layer.serves("m", module)
    module, _, _ = quantized_linear(1024, 512, group=32)
    module.weight_g_idx = torch.zeros(512)
    assert "weight_g_idx" in layer.serves("m", module)
    module, _, _ = quantized_linear(1024, 512, group=32, dtype=torch.float64)
    assert "float64" in layer.serves("m", module)
    module, _, _ = quantized_linear(1024, 512, group=32)
    module.weight = nn.Parameter(module.weight.to("meta"))
    assert "offloaded" in layer.serves("m", module)
