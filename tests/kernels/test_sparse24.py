"""The 2:4 kernels against a float64 reference.

The tests of the Triton kernels run interpreted on a CPU, and on a CUDA device (see ``interpreting``).
"""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from interpreting import BOUND, EVERYWHERE, on_triton, relative

from hf_optim_kernels.sparse24 import layer, naive, op
from hf_optim_kernels.sparse24 import tiles as configs
from hf_optim_kernels.sparse24.naive import PackedTensors

ROW = 1 << 20
# width, group, zero points.
GRIDS = [(16, ROW, False), (8, ROW, False), (8, ROW, True), (4, 128, True), (4, 32, False), (4, ROW, True)]
# rows, out, in: whole chunks of 256 columns, and sizes that fit nothing.
SHAPES = [(1, 40, 256), (5, 33, 172), (17, 20, 260)]


def product(x, *weight):
    return op.linear(x, PackedTensors(*weight))


def mask_of(out, columns, generator, kept=2):
    scores = torch.rand(out, columns // 4, 4, generator=generator)
    return (scores.argsort(-1).argsort(-1) < kept).view(out, columns)


def random_weight(out, columns, width, group, zero, dtype, seed=0):
    """``(numbers, kept, scale, zero, group, offset), W`` with W float64; some 2:4 groups keep one column or none."""
    g = torch.Generator().manual_seed(seed)
    kept = mask_of(out, columns, g) & (torch.rand(out, columns, generator=g) > 0.05)
    if width == 16:
        numbers = (torch.randn(out, columns, generator=g) * kept).to(dtype)
        return (numbers, numbers != 0, None, None, columns, 0), numbers.double()
    offset, size = 1 << (width - 1), min(group, columns)
    groups = -(-columns // size)
    scale = (torch.rand(groups, out, generator=g) * 0.1 + 0.01).to(dtype)
    points = torch.randint(0, 2**width, (groups, out), generator=g, dtype=torch.uint8) if zero else None
    full = torch.full((groups, out), offset, dtype=torch.uint8) if points is None else points
    spread = full.T.repeat_interleave(size, 1)[:, :columns]
    numbers = torch.where(kept, torch.randint(0, 2**width, (out, columns), generator=g, dtype=torch.uint8), spread)
    weight = (numbers.double() - spread) * scale.double().T.repeat_interleave(size, 1)[:, :columns]
    return (numbers, numbers != spread, scale, points, size, offset), weight


def random_case(rows, out, columns, width, group, zero, dtype, device="cpu", seed=0):
    """Arguments of the operator and the float64 result."""
    (numbers, kept, scale, points, size, offset), weight = random_weight(out, columns, width, group, zero, dtype, seed)
    g = torch.Generator().manual_seed(seed + 1)
    bias = torch.randn(out, generator=g).to(dtype)
    x = torch.randn(rows, columns, generator=g).to(dtype)
    reference = x.double() @ weight.T + bias.double()
    semaphores = torch.zeros(configs.SEMAPHORES, dtype=torch.int32)
    tensors = [x, *naive.pack(numbers, kept, width), scale, points, bias, semaphores]
    moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
    return (*moved, width, size, offset), reference.to(device)


# -- the format -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("width", "group", "zero"), GRIDS)
@pytest.mark.parametrize("columns", [256, 172, 4])
def test_packing_is_undone_by_unpacking(width, group, zero, columns):
    (numbers, kept, *_), _ = random_weight(33, columns, width, group, zero, torch.bfloat16)
    values, bits = naive.pack(numbers, kept, width)
    assert bits.shape == (33, naive.stored_groups24(columns) // 2)
    assert values.numel() * values.element_size() == 33 * naive.stored_groups24(columns) * 2 * width // 8
    found, at = naive.unpack(values, bits, width, columns)
    assert torch.equal(found[kept], numbers[kept])
    assert not bool((kept & ~at).any())
    assert bool((at.view(33, -1, 4).sum(-1) == 2).all())


def test_every_pattern_of_a_group():
    patterns = torch.tensor([[(i >> p) & 1 for p in range(4)] for i in range(16)], dtype=torch.bool)
    numbers = torch.arange(1, 65).view(16, 4).to(torch.float16)
    few = patterns.sum(1) <= 2
    values, bits = naive.pack(numbers[few] * patterns[few], patterns[few], 16)
    found, _ = naive.unpack(values, bits, 16, 4)
    assert torch.equal(found, numbers[few] * patterns[few])
    for pattern, row in zip(patterns[~few], numbers[~few], strict=True):
        with pytest.raises(ValueError, match="more than two"):
            naive.pack(row[None], pattern[None], 16)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_the_specification_equals_float64(dtype):
    for shape in SHAPES:
        for grid in GRIDS:
            arguments, reference = random_case(*shape, *grid, dtype)
            # Without a GPU or the interpreter, the operator is the specification.
            assert relative(product(*arguments), reference) < BOUND[dtype]


# -- the kernels ------------------------------------------------------------------------------------------------------
PATHS = {
    "row": configs.config("row", 1, 16, 32, 1, 4, 2),
    "row split": configs.config("row", 1, 32, 16, 2, 4, 2),
    "dot": configs.config("dot", 16, 32, 32, 1, 4, 2),
    "dot split": configs.config("dot", 16, 64, 16, 3, 4, 2),
    "dense": configs.DENSE,
}


@pytest.fixture
def poisoned(monkeypatch):
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    fill = lambda t: t.fill_(float("nan")) if t.is_floating_point() else t  # noqa: E731
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


# Every pair of a shape, a grid and a type, not every combination: interpreting is slow.
CASES = [
    (shape, grid, (torch.bfloat16, torch.float16)[(i + j) % 2])
    for i, shape in enumerate(SHAPES)
    for j, grid in enumerate(GRIDS)
]


@pytest.mark.many
@on_triton
@pytest.mark.parametrize(("shape", "grid", "dtype"), CASES, ids=str)
def test_every_path_equals_float64(shape, grid, dtype, device, poisoned):
    from hf_optim_kernels.sparse24 import launch

    arguments, reference = random_case(*shape, *grid, dtype, device)
    for name, config in PATHS.items():
        if name.startswith("row") and shape[0] > 5:
            continue  # interpreting every row by itself is slow
        y = launch.sparse24(arguments[0], PackedTensors(*arguments[1:]), config)
        # A weight that was scaled one by one is rounded once more.
        bound = BOUND[dtype] * (1.5 if grid[0] != 16 else 1)
        assert relative(y, reference) < bound, name
        assert not bool(arguments[6].any()), name


@on_triton
@pytest.mark.parametrize("rows", [*range(1, 34)])
def test_every_number_of_rows(rows, device):
    arguments, reference = random_case(rows, 18, 40, 16, ROW, False, torch.float16, device)
    assert relative(product(*arguments), reference) < BOUND[torch.float16]


@on_triton
def test_split_sums_are_the_same_every_time(device):
    from hf_optim_kernels.sparse24 import launch

    arguments, _ = random_case(4, 40, 1024, 16, ROW, False, torch.float16, device)
    config = configs.config("dot", 16, 32, 32, 4, 4, 2)
    first = launch.sparse24(arguments[0], PackedTensors(*arguments[1:]), config)
    for _ in range(3 if device == "cpu" else 50):
        assert torch.equal(launch.sparse24(arguments[0], PackedTensors(*arguments[1:]), config), first)


@on_triton
def test_more_tiles_than_semaphores_are_not_split(device):
    from hf_optim_kernels.sparse24 import launch

    (x, *tensors, _, width, group, offset), reference = random_case(3, 40, 512, 16, ROW, False, torch.float16, device)
    semaphores = torch.zeros(1, dtype=torch.int32, device=device)
    config = configs.config("dot", 16, 32, 32, 2, 4, 2)
    y = launch.sparse24(x, PackedTensors(*tensors, semaphores, width, group, offset), config)
    assert relative(y, reference) < BOUND[torch.float16]


@on_triton
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[3]], ids=str)
def test_no_rows_more_dimensions_and_strides(grid, device):
    (x, *rest), reference = random_case(6, 24, 64, *grid, torch.float16, device)
    bound = 1.5 * BOUND[torch.float16]
    assert product(x[:0], *rest).shape == (0, 24)
    assert product(x.view(2, 3, 64)[:, :0], *rest).shape == (2, 0, 24)
    assert relative(product(x.view(2, 3, 64), *rest).view(6, 24), reference) < bound
    shifted = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(6, 64)  # not aligned to 16 bytes
    views = (x.T.contiguous().T, torch.stack((x, x), 1)[:, 0], torch.stack((x, x), 2)[:, :, 1], shifted)
    for strided in views:
        assert relative(product(strided, *rest), reference) < bound
    y = product(x.view(2, 3, 64).transpose(0, 1), *rest)
    assert relative(y.transpose(0, 1).reshape(6, 24), reference) < bound


@on_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, interpreting
@pytest.mark.parametrize("path", ["row split", "dot split", "dense"])
def test_what_is_not_finite_propagates(path, device):
    from hf_optim_kernels.sparse24 import launch

    (x, *rest), _ = random_case(3, 24, 64, 16, ROW, False, torch.float16, device)
    weight = PackedTensors(*rest)
    dense = naive.dequantize(weight, 64, torch.float64)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    y = launch.sparse24(x, weight, PATHS[path])
    wanted = x.double() @ dense.T  # a pruned weight times infinity is NaN, as in the dense product
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y.isinf(), wanted.isinf())
    assert bool(y[1].isnan().any())
    assert bool(y[1].isinf().any())


@on_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_is_decompressed_as_it_was(dtype, device):
    (numbers, kept, *_), _ = random_weight(33, 172, 16, ROW, False, dtype)
    values, bits = (tensor.to(device) for tensor in naive.pack(numbers, kept, 16))
    assert torch.equal(op.weight_of(values, bits, None, None, 16, 172, 0, 172, dtype).cpu(), numbers)


# -- the operator -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[4]], ids=str)
def test_gradients(grid, device):
    # Values of 16 bits serve inputs of 16 bits alone; codes those of 32 bits too, by the specification.
    dtype = torch.float16 if grid[0] == 16 else torch.float32
    (x, values, bits, scale, zero, bias, *rest), _ = random_case(4, 24, 64, *grid, dtype, device)
    x.requires_grad_()
    bias.requires_grad_()
    coefficients = torch.randn(4, 24, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    (torch.ops.hf_optim.sparse24(x, values, bits, scale, zero, bias, *rest) * coefficients).sum().backward()
    packed_weight = PackedTensors(values, bits, scale, zero, None, None, *rest[1:])
    weight = naive.dequantize(packed_weight, 64, torch.float64)
    assert relative(x.grad, coefficients.double() @ weight) < BOUND[dtype]
    assert relative(bias.grad, coefficients.double().sum(0)) < BOUND[dtype]


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("grid", GRIDS[:4:3], ids=str)
def test_the_operator_is_well_formed(grid, device):
    arguments, _ = random_case(3, 24, 64, *grid, torch.float16, device)
    arguments[0].requires_grad_()
    torch.library.opcheck(torch.ops.hf_optim.sparse24.default, arguments)
    _, values, bits, scale, zero, _, _, width, group, offset = arguments
    weight = (values, bits, scale, zero, width, group, offset, 64, torch.float16)
    torch.library.opcheck(torch.ops.hf_optim.sparse24_weight.default, weight)


def test_inputs_of_another_width_are_refused():
    (x, *rest), _ = random_case(3, 24, 256, 16, ROW, False, torch.float16)
    for columns in (260, 258):
        with pytest.raises(ValueError, match="columns"):
            product(x.new_zeros(3, columns), *rest)


# -- layers -----------------------------------------------------------------------------------------------------------
def weight_as_told(out, columns, width, group, zero, dtype, *, bias=True, seed=0, **changes):
    """A weight as the host describes it, its codes, and float64 values."""
    (numbers, _, scale, points, size, _), value = random_weight(out, columns, width, group, zero, dtype, seed)
    codes = SimpleNamespace(
        codes=numbers, scale=None if scale is None else scale.T.contiguous(),
        zero=None if points is None else points.T.contiguous(), order=None, input_scale=None, input_zero=None,
    )  # fmt: skip
    told = {
        "name": "m", "shape": (out, columns), "dtype": dtype, "device": torch.device("cpu"),
        "kind": "dense" if width == 16 else "int", "bits": width, "group_size": size, "symmetric": points is None,
        "ordered": False, "inputs": None, "sparse24": True, "codes": lambda: codes,
        "bias": torch.randn(out, generator=torch.Generator().manual_seed(seed + 5)).to(dtype) if bias else None,
    }  # fmt: skip
    return SimpleNamespace(**{**told, **changes}), codes, value


def same(found, wanted):
    as_bits = lambda t: t.view(torch.int16) if t.is_floating_point() else t  # noqa: E731
    for name in ("codes", "scale", "zero"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None) == (other is None), name
        assert one is None or (one.dtype == other.dtype and torch.equal(as_bits(one), as_bits(other))), name


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("columns", [256, 172])
def test_codes_come_back_bit_for_bit(grid, columns):
    weight, codes, _ = weight_as_told(24, columns, *grid, torch.bfloat16)
    bound = layer.prepack(weight)
    same(bound.codes(), codes)
    again = layer.prepack(weight)
    again.load_state_dict(copy.deepcopy(bound).state_dict())
    same(again.codes(), codes)


def test_negative_zeros_come_back():
    weight, codes, _ = weight_as_told(24, 172, 16, ROW, False, torch.bfloat16)
    g = torch.Generator().manual_seed(9)
    codes.codes = torch.randn(24, 172, generator=g).to(torch.bfloat16) * mask_of(24, 172, g)
    assert bool((codes.codes.view(torch.int16) == -(2**15)).any())
    same(layer.prepack(weight).codes(), codes)


@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[2]], ids=str)
def test_a_weight_that_is_not_two_of_four_is_refused(grid):
    weight, codes, _ = weight_as_told(24, 64, *grid, torch.float16)
    codes.codes[3, 8:11] = codes.codes[3, 8:11] + 1
    codes.codes[3, 8:11] = torch.where(codes.codes[3, 8:11] == 0, 1, codes.codes[3, 8:11])
    if codes.zero is not None:
        codes.codes[3, 8:11] = (codes.zero[3, 0].int() + 1) % 256
    with pytest.raises(ValueError, match="more than two"):
        layer.prepack(weight)


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_layer_equals_the_weight(grid, device):
    weight, _, value = weight_as_told(48, 172, *grid, torch.float16)
    bound = layer.prepack(weight).to(device)
    x = torch.randn(2, 3, 172, generator=torch.Generator().manual_seed(7)).half().to(device)
    wanted = x.double() @ value.T.to(device) + weight.bias.double().to(device)
    assert relative(bound(x), wanted) < 1.5 * BOUND[torch.float16]
    assert bound.accepts(x)
    assert not bound.accepts(x.float())
    y = bound(x.clone().requires_grad_())
    assert y.requires_grad
    compiled = torch.compile(bound, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(x), wanted) < 1.5 * BOUND[torch.float16]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_joined_operands(grid, bias):
    told = [weight_as_told(out, 172, *grid, torch.float16, bias=bias, seed=out) for out in (24, 8, 8)]
    bound = [layer.prepack(weight) for weight, _, _ in told]
    whole = layer.join(bound)
    x = torch.randn(3, 172, generator=torch.Generator().manual_seed(7)).half()
    assert torch.equal(whole(x), torch.cat([part(x) for part in bound], -1))
    assert torch.equal(whole.codes().codes, torch.cat([codes.codes for _, codes, _ in told]))
    other = layer.prepack(weight_as_told(8, 172, *grid, torch.float16, bias=not bias)[0])
    assert layer.join([*bound, other]) is None


def test_negative_zeros_of_joined_operands():
    first, codes, _ = weight_as_told(8, 172, 16, ROW, False, torch.float16)
    second, others, _ = weight_as_told(8, 172, 16, ROW, False, torch.float16, seed=1)
    codes.codes = torch.where(codes.codes == 0, -0.0, codes.codes)
    whole = layer.join([layer.prepack(first), layer.prepack(second)]).codes()
    same(whole, SimpleNamespace(codes=torch.cat((codes.codes, others.codes)), scale=None, zero=None))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sparse24": False}, "^$"),
        ({"kind": "float"}, "float codes"),
        ({"dtype": torch.float32}, "float32 inputs"),
        ({"ordered": True}, "not adjacent"),
        ({"shape": (24, 174)}, "multiple of 4"),
        ({"group_size": 8}, "multiple of 16"),
        ({"bits": 9}, "9-bit"),
        ({"inputs": SimpleNamespace(type="int8")}, "inputs are quantized"),
        ({}, "run faster"),
        ({"kind": "dense", "bits": 16}, "cpu devices"),
    ],
)
def test_what_is_not_served_is_told_why(changes, reason):
    weight, _, _ = weight_as_told(24, 256, 4, 32, False, torch.float16)
    assert re.search(reason, layer.supports(SimpleNamespace(**{**vars(weight), **changes})))


@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336), (4096, 4096), (1024, 172), (8, 4)])
@pytest.mark.parametrize("rows", [1, 2, 16, 64, 128, 256, 8192])
def test_configurations_fit_their_semaphores_and_columns(shape, rows):
    N, K = shape
    for config in [configs.default(N, K, rows, False), *configs.candidates(N, K, rows)]:
        assert config.keys() == configs.DENSE.keys()
        if config["path"] in ("row", "dot"):
            assert naive.HALF % config["FOURS"] == 0
            tiles = -(-N // config["BLOCK_N"]) * -(-rows // config["BLOCK_M"])
            assert config["SPLIT"] == 1 or tiles <= configs.SEMAPHORES
            assert 1 <= config["SPLIT"] <= max(1, naive.stored_groups24(K) // 128)
