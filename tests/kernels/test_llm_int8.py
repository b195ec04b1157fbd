"""LLM.int8() against float64: outlier columns in the input's type, the rest in int8.

The tests of the Triton kernels run interpreted on a CPU, and on a CUDA device (see ``interpreting``).
"""

from __future__ import annotations

import copy

import pytest
import torch
from interpreting import BOUND, CUDA, on_triton, relative
from torch import nn

from hf_optim_kernels.llm_int8 import layer, naive, op, tiles

DECODE = {"BLOCK_N": 32, "BLOCK_K": 64, "SPLIT": 1, "num_warps": 4, "num_stages": 2, "PREQUANT": 0}
GROUPED = {
    "KERNEL": "grouped", "BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP": 8, "FLATTEN": 0, "PREPARED": 0,
    "num_warps": 4, "num_stages": 2, "PARTS": 1,
}  # fmt: skip
CONFIGS = [
    DECODE,
    DECODE | {"SPLIT": 3},
    DECODE | {"SPLIT": 2, "PREQUANT": 1},
    GROUPED,
    GROUPED | {"PARTS": 3},
    GROUPED | {"KERNEL": "persistent", "PREPARED": 1},
]


def random_case(rows, out, columns, dtype, device="cpu", outliers=(), seed=0):
    """``x, weight, w_scale, bias``; ``outliers`` are (row, column) of ``x`` far above 6."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g)
    for i, (row, column) in enumerate(outliers):
        x[row, column] = 20.0 + i if i % 2 else -30.0
    weight = torch.randint(-127, 128, (out, columns), generator=g, dtype=torch.int8)
    scale = torch.rand(out, generator=g) * 0.1 + 0.01
    return tuple(t.to(device) for t in (x.to(dtype), weight, scale, torch.randn(out, generator=g).to(dtype)))


def semaphores(out, columns, device):
    return torch.zeros(tiles.semaphores_size(out, columns), dtype=torch.int32, device=device)


def in_float64(x, weight, scale, bias, threshold=6.0):
    """The paper's decomposition, element by element."""
    wide = x.double()
    marked = (wide.abs() > threshold).any(0)
    top = wide.abs().masked_fill(wide.abs() > threshold, 0).amax(1, keepdim=True)
    codes = (wide * 127 / top).round()
    inner = (codes * top / 127).masked_fill(marked, 0)
    y = (torch.where(marked, wide, inner) @ weight.double().T) * scale.double()
    return y if bias is None else y + bias.double()


def test_the_specification_equals_float64():
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-6), (torch.float16, 2**-11)):
        x, weight, scale, bias = random_case(5, 33, 172, dtype, outliers=[(2, 7), (4, 100), (4, 7)])
        assert relative(naive.llm_int8(x, weight, scale, bias, 6.0), in_float64(x, weight, scale, bias)) < bound


def test_every_column_an_outlier_is_the_product_itself():
    x, weight, scale, bias = random_case(5, 33, 172, torch.float64)
    exact = x @ (weight.double() * scale[:, None].double()).T + bias
    assert relative(naive.llm_int8(x, weight, scale, bias, 1e-9), exact) < 1e-14
    assert relative(naive.llm_int8(x, weight, scale, bias, 1e9), exact) > 1e-4


def test_outliers_apart_are_nearer_to_the_dense_product():
    x, weight, scale, _ = random_case(16, 64, 256, torch.float32, outliers=[(i, 9) for i in range(16)])
    dense = x.double() @ (weight.double() * scale[:, None].double()).T
    apart, together = (relative(naive.llm_int8(x, weight, scale, None, t), dense) for t in (6.0, 1e9))
    assert apart < together / 3


def test_the_weight_is_rounded_to_the_nearest_code():
    weight = torch.randn(24, 172, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    codes, scale = naive.quantize_weight(weight)
    assert bool(((naive.dequantize(codes, scale) - weight).abs() <= scale[:, None] * 0.5001).all())
    assert int(codes.abs().max()) == 127
    assert bool((codes[3] == 0).all())


# rows, out, columns, outliers; 40 outliers are more than two chunks of 16.
CASES = [
    (1, 48, 172, []),
    (1, 48, 172, [(0, 171)]),
    (5, 70, 64, [(2, 7), (4, 7), (0, 63)]),
    (33, 40, 80, [(i % 33, i * 2) for i in range(40)]),
]


@pytest.mark.many
@on_triton
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[:3]}-{len(case[3])}")
def test_every_kernel_equals_float64(case, dtype, device, monkeypatch):
    from hf_optim_kernels.llm_int8 import launch

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(77))
    rows, out, columns, outliers = case
    operands = random_case(rows, out, columns, dtype, device, outliers)
    reference = in_float64(*operands)
    weight = naive.PackedTensors(*operands[1:], semaphores(out, columns, device))
    for config in CONFIGS:
        y = launch.llm_int8(operands[0], weight, 6.0, config)
        assert y.dtype == dtype
        # A code at the middle between two may be the other one in float32: one step of one entry.
        assert relative(y, reference) < BOUND[dtype], config
        assert not bool(weight.semaphores.any()), config


@on_triton
@pytest.mark.parametrize("rows", [1, 5])
def test_spans_of_many_columns(rows, device):
    """A bit of the word that says where outliers are stands for 256 columns, multiplied 64 at a time."""
    from hf_optim_kernels.llm_int8 import launch

    found = [(i % rows, column) for i, column in enumerate((0, 255, 256, 8190, 8255, 8299))]
    operands = random_case(rows, 20, 8300, torch.float32, device, found)
    reference = in_float64(*operands)
    weight = naive.PackedTensors(*operands[1:], semaphores(20, 8300, device))
    for config in CONFIGS[:3]:
        y = launch.llm_int8(operands[0], weight, 6.0, config | {"BLOCK_K": 512})
        assert relative(y, reference) < 1e-6, config


@on_triton
def test_odd_shapes(device):
    operands = random_case(2, 352, 172, torch.float32, device, [(1, 171), (0, 3)])
    y = op.llm_int8(*operands, 6.0, semaphores(352, 172, device))
    assert relative(y, in_float64(*operands)) < 1e-6


@on_triton
@pytest.mark.parametrize("rows", [*range(1, 34, 4), 64, 65])
def test_numbers_of_rows(rows, device):
    x, weight, scale, bias = random_case(rows, 20, 40, torch.float32, device, [(rows // 2, 3)], seed=rows)
    y = op.llm_int8(x, weight, scale, bias, 6.0, semaphores(20, 40, device))
    assert relative(y, naive.llm_int8(x, weight, scale, bias, 6.0)) < 1e-6


@on_triton
def test_the_list_of_columns(device):
    from hf_optim_kernels.llm_int8 import launch

    x = torch.zeros(4, 50, device=device)
    x[0, 3], x[2, 3], x[3, 49], x[1, 10], x[1, 11] = 7.0, -8.0, float("nan"), 6.0, float("-inf")
    count = semaphores(8, 50, device)
    codes, scale, _, columns, number = launch.quantize(x, 6.0, count, 8)
    assert columns[: int(number)].tolist() == [3, 11, 49]
    assert not bool(count.any())
    assert scale.tolist() == pytest.approx([0, 6 / 127, 0, 0])
    assert codes[1, 10] == 127
    words = launch.quantize(x, 6.0, count, 8, span=4)[2]
    assert words.tolist() == [1, 1 << 2, 1, 1 << 12]


@on_triton
def test_no_rows_more_dimensions_and_strides(device):
    x, weight, scale, _ = random_case(6, 24, 64, torch.float32, device, [(1, 5)])
    rest = (weight, scale, None, 6.0, semaphores(24, 64, device))
    wanted = in_float64(x, weight, scale, None)
    assert op.llm_int8(x[:0], *rest).shape == (0, 24)
    assert op.llm_int8(x[0], *rest).shape == (24,)
    assert relative(op.llm_int8(x.view(2, 3, 64), *rest).view(6, 24), wanted) < 1e-6
    for strided in (x.T.contiguous().T, torch.stack((x, x), 1)[:, 0], torch.stack((x, x), 2)[:, :, 1]):
        assert not strided.is_contiguous()
        assert relative(op.llm_int8(strided, *rest), wanted) < 1e-6


@on_triton
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, interpreting
def test_what_is_not_finite_propagates(device):
    from hf_optim_kernels.llm_int8 import launch

    x, weight, scale, bias = random_case(3, 24, 64, torch.float32, device)
    weight = torch.where(weight == 0, 1, weight)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    dense = x.double() @ (weight.double() * scale[:, None].double()).T + bias.double()
    for config in CONFIGS:
        packed = naive.PackedTensors(weight, scale, bias, semaphores(24, 64, device))
        y = launch.llm_int8(x, packed, 6.0, config)
        assert torch.equal(y.isnan(), dense.isnan())
        assert torch.equal(y.isinf(), dense.isinf())


@on_triton
def test_gradients_pass_straight_through(device):
    x, weight, scale, bias = random_case(4, 24, 64, torch.float32, device, [(0, 1)])
    x.requires_grad_()
    bias.requires_grad_()
    coefficients = torch.randn(4, 24, generator=torch.Generator().manual_seed(3)).to(device)
    (op.llm_int8(x, weight, scale, bias, 6.0, semaphores(24, 64, device)) * coefficients).sum().backward()
    assert relative(x.grad, coefficients.double() @ (weight.double() * scale[:, None].double())) < 1e-6
    assert relative(bias.grad, coefficients.double().sum(0)) < 1e-6


@on_triton
def test_the_operator_is_well_formed(device):
    operands = random_case(3, 24, 64, torch.float32, device, [(0, 1)])
    operands[0].requires_grad_()
    torch.library.opcheck(torch.ops.hf_optim.llm_int8.default, (*operands, 6.0, semaphores(24, 64, device)))


@on_triton
def test_the_layer(device):
    torch.manual_seed(0)
    linear = nn.Linear(172, 48).to(device)
    made = copy.deepcopy(layer.LLMInt8Linear.from_linear(linear))
    x = torch.randn(2, 3, 172, generator=torch.Generator().manual_seed(1)).to(device)
    x[1, 1, 17] = 40.0
    assert relative(made(x), linear(x)) < 0.02
    wanted = naive.llm_int8(x, made.weight, made.w_scale, made.bias, 6.0)
    assert relative(made(x), wanted) < 1e-6
    assert made(x.clone().requires_grad_()).requires_grad
    assert made.accepts(x)
    assert not made.accepts(x.half())
    found = made.codes()
    assert torch.equal((found.codes.int() - 128).float() * found.scale, naive.dequantize(made.weight, made.w_scale))


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_launches_that_are_kept(rows, device):
    torch.manual_seed(0)
    made = layer.LLMInt8Linear.from_linear(nn.Linear(64, 48).to(device))
    first, x = (torch.randn(rows, 64, device=device) for _ in range(2))
    x[0, 7] = 30.0
    with torch.no_grad():
        made(first)
        assert made.plans[x.shape] is not None
        assert relative(made(x), naive.llm_int8(x, made.weight, made.w_scale, made.bias, 6.0)) < 1e-6
    assert not bool(made.semaphores.any())
    assert copy.deepcopy(made).plans == {}


@on_triton
def test_joined_layers(device):
    torch.manual_seed(0)
    parts = [layer.LLMInt8Linear.from_linear(nn.Linear(64, n).to(device)) for n in (24, 8)]
    x = torch.randn(3, 64, device=device)
    assert relative(layer.join(parts)(x), torch.cat([part(x) for part in parts], -1)) < 1e-6
    other = layer.LLMInt8Linear.from_linear(nn.Linear(64, 8).to(device), threshold=5.0)
    assert layer.join([parts[0], other]) is None
    assert layer.join([parts[0], nn.Linear(64, 8)]) is None


def test_what_a_layer_refuses():
    linear = nn.Linear(8, 4)
    with pytest.raises(ValueError, match="must not be negative"):
        layer.LLMInt8Linear.from_linear(linear, threshold=-1.0)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        layer.LLMInt8Linear.from_linear(linear)


def test_the_layer_without_triton():
    torch.manual_seed(0)
    linear = nn.Linear(172, 48)
    made = layer.LLMInt8Linear.from_linear(linear)
    x = torch.randn(2, 3, 172)
    assert relative(made(x), linear(x)) < 0.02
    assert made(x[:0]).shape == (0, 3, 48)


def test_candidates_and_defaults_have_the_same_names():
    pytest.importorskip("triton")
    from hf_optim_kernels.llm_int8 import tiles

    for N, K in ((14336, 4096), (4096, 14336), (352, 172)):
        for power in range(14):
            found = tiles.candidates(1 << power, N, K)
            assert found
            names = {frozenset(tiles.default(rows, N, K)) for rows in (1, 4096)}
            assert all(frozenset(config) in names for config in [tiles.default(1 << power, N, K), *found])
