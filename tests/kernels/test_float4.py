"""The weight-only kernels on 4-bit floats, NVFP4 and MXFP4, against a float64 reference.

The assembly of the decoding runs on a CUDA device only; here its instructions are computed one by one.
"""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from interpreting import BOUND, EVERYWHERE, on_triton, relative
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_optim_kernels.common.codes import Codes
from hf_optim_kernels.common.support import can_run_triton
from hf_optim_kernels.packed_experts import layer as experts_layer
from hf_optim_kernels.wna16 import decode, float4, layer, naive, op

NVFP4, MXFP4 = float4.NVFP4, float4.MXFP4
FORMATS = pytest.mark.parametrize("format", [NVFP4, MXFP4], ids=["nvfp4", "mxfp4"])
NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
# rows, out, in; 33 and 80 rows fit no block, 96 columns no k-tile of MXFP4, 48 none of NVFP4.
SHAPES = {NVFP4: [(1, 33, 48), (5, 80, 272), (40, 64, 64)], MXFP4: [(1, 33, 96), (5, 80, 288), (40, 64, 128)]}


def byte_value(byte: int, format: int) -> float:
    if format == MXFP4:
        return 2.0 ** (byte - 127)
    exponent, mantissa = byte >> 3, byte & 7
    return mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def random_codes(out, columns, format, seed=0, rows_apart=False):
    """Random codes, and the weight ``[out, in]`` that they stand for, in float64."""
    g = torch.Generator().manual_seed(seed)
    groups = columns // float4.GROUPS[format]
    patterns = torch.randint(0, 16, (out, columns), generator=g, dtype=torch.uint8)
    low, high = (8, 100) if format == NVFP4 else (112, 122)
    scale = torch.randint(low, high, (out, groups), generator=g, dtype=torch.uint8)
    if format == NVFP4:
        scale[:4, 0] = torch.tensor([1, 7, 126, 0])  # subnormal numbers, the largest, and zero
    shared = torch.full((out, 1), 370.0) if format == NVFP4 else None
    if shared is not None and rows_apart:
        shared[out // 2 :] = 90.0
    numbers = torch.tensor([*NUMBERS, *(-n for n in NUMBERS)], dtype=torch.float64)[patterns.long()]
    factors = torch.tensor([[byte_value(int(b), format) for b in row] for row in scale], dtype=torch.float64)
    factors = factors if shared is None else factors / shared.double()
    weight = (numbers.view(out, groups, -1) * factors[..., None]).view(out, columns)
    kind = torch.float8_e4m3fn if format == NVFP4 else torch.float8_e8m0fnu
    return Codes(patterns, scale.view(kind), None, global_scale=shared), weight


def same(a: Codes, b: Codes) -> bool:
    bytes_of = lambda t: t.contiguous().view(torch.uint8)  # noqa: E731
    shared = (a.global_scale is None) == (b.global_scale is None) and (
        a.global_scale is None or torch.equal(a.global_scale, b.global_scale)
    )
    return shared and torch.equal(a.codes, b.codes) and torch.equal(bytes_of(a.scale), bytes_of(b.scale))


def described(found, format, dtype=torch.bfloat16, device="cpu"):
    shape = tuple(found.codes.shape)
    return SimpleNamespace(
        kind="float4", bits=4, group_size=float4.GROUPS[format], shape=shape, dtype=dtype, symmetric=True,
        device=torch.device(device), ordered=False, inputs=None, bias=None, codes=lambda: found,
    )  # fmt: skip


@FORMATS
def test_all_bytes_of_scales(format):
    count = 127 if format == NVFP4 else 255  # the next one is NaN
    found = float4.scale_numbers(torch.arange(count, dtype=torch.uint8), format, torch.float64)
    assert found.tolist() == [byte_value(byte, format) for byte in range(count)]


@FORMATS
def test_packing_is_undone_by_unpacking(format):
    for _, out, columns in SHAPES[format]:
        found, weight = random_codes(out, columns, format, rows_apart=True)
        packed = layer.PackedWeight.from_codes(found, 4, float4.GROUPS[format], torch.bfloat16, None)
        assert same(packed.codes(), found)
        assert packed.packed.numel() * 4 <= out * (columns + 255)
        wide = naive.dequantize(packed.tensors(), columns, torch.float64)
        assert torch.allclose(wide, weight, rtol=1e-12, atol=0)


@FORMATS
def test_every_scale_is_stored(format):
    count = 128 if format == NVFP4 else 256  # the last one is NaN
    scale = torch.arange(count, dtype=torch.uint8).view(2, -1)
    words = float4.pack_scales(scale, format)
    assert words.shape == (-(-count // 2 * float4.GROUPS[format] // 256), 2, 64 // float4.GROUPS[format])
    assert torch.equal(float4.unpack_scales(words, format, count // 2), scale)


def test_the_sign_of_a_scale_moves_to_its_codes():
    found, weight = random_codes(5, 96, NVFP4)
    signed = found.scale.view(torch.uint8).clone()
    signed[:, 1::2] |= 128
    sign = torch.ones(6).double()
    sign[1::2] = -1
    packed = layer.PackedWeight.from_codes(
        Codes(found.codes, signed.view(float4.E4M3), global_scale=found.global_scale), 4, 16, torch.bfloat16, None
    )
    expected = (weight.view(5, 6, 16) * sign[:, None]).view(5, 96)
    assert torch.equal(naive.dequantize(packed.tensors(), 96, torch.float64), expected)


@pytest.mark.many
@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@FORMATS
def test_products(format, dtype, device):
    for rows, out, columns in SHAPES[format]:
        found, weight = random_codes(out, columns, format, rows_apart=True)
        g = torch.Generator().manual_seed(2)
        x, bias = torch.randn(rows, columns, generator=g).to(dtype), torch.randn(out, generator=g).to(dtype)
        packed = layer.PackedWeight.from_codes(found, 4, float4.GROUPS[format], dtype, bias).to(device)
        y = op.linear(x.to(device), packed.tensors()).cpu()
        assert relative(y, x.double() @ weight.T + bias.double()) <= 2 * BOUND[dtype]
        assert not packed.semaphores.any()


@on_triton
@pytest.mark.parametrize("split", [1, 2])
@FORMATS
def test_tiles_give_the_same_product(format, split, device):
    from hf_optim_kernels.wna16 import launch

    rows, out, columns = SHAPES[format][1]
    found, weight = random_codes(out, columns, format)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)).to(device)
    packed = layer.PackedWeight.from_codes(found, 4, float4.GROUPS[format], torch.float32, None).to(device)
    tiles = dict(zip(launch._TILE_NAMES, ("fused", 16, 32, split, 4, 2), strict=True))
    y = launch.fused(x, packed.tensors(), tiles)
    assert relative(y.cpu(), x.double().cpu() @ weight.T) <= 1e-6


@on_triton
@FORMATS
def test_the_decoded_weight(format, device):
    from hf_optim_kernels.wna16 import launch

    _, out, columns = SHAPES[format][1]
    found, weight = random_codes(out, columns, format, rows_apart=True)
    packed = layer.PackedWeight.from_codes(found, 4, float4.GROUPS[format], torch.float32, None).to(device)
    dense = launch.dense(packed.tensors(), columns, torch.float32).cpu()
    assert torch.allclose(dense.double(), weight, rtol=3e-7, atol=0)
    part = launch.dense(packed.tensors(), columns, torch.float32, 16, 40).cpu()
    assert torch.equal(part, dense[16:56])


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cpu_decodes_in_parts(format, dtype, monkeypatch):
    from hf_optim_kernels.wna16 import float4_cpu

    monkeypatch.setattr(float4_cpu, "DECODED", 16 * 288)
    rows, out, columns = SHAPES[format][1]
    found, weight = random_codes(out, columns, format, rows_apart=True)
    assert layer.supports(described(found, format, dtype)) is None
    packed = layer.prepack(described(found, format, dtype))
    assert same(packed.codes(), found)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    decoded = weight.to(torch.float32).to(torch.bfloat16).to(dtype)
    # float64 differs from float32 by where a number that lies between two of bfloat16 is rounded to.
    assert relative(packed.decoded(dtype), decoded) <= 1e-4
    y = packed(x)
    assert y.dtype == dtype
    assert relative(y, x.double() @ packed.decoded(torch.float64).T) <= BOUND[dtype] * 4
    leaf = x.clone().requires_grad_()
    packed(leaf).sum().backward()
    assert relative(leaf.grad, packed.decoded(torch.float64).sum(0).expand(rows, -1)) <= BOUND[dtype] * 4


@FORMATS
def test_a_cpu_multiplies_after_a_layer_of_fake_tensors_has(format):
    """Tracing a model runs its layers on fake tensors; nothing of these may stay."""
    _, out, columns = SHAPES[format][1]
    found, weight = random_codes(out, columns, format)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer.prepack(described(found, format, torch.float32))(torch.ones(2, columns))
    y = layer.prepack(described(found, format, torch.float32))(torch.eye(columns))
    assert type(y) is torch.Tensor
    assert relative(y.T, weight) <= 2**-9


def test_gradients_are_those_of_the_decoded_weight():
    found, weight = random_codes(33, 96, NVFP4)
    packed = layer.PackedWeight.from_codes(found, 4, 16, torch.float32, torch.zeros(33))
    x = torch.randn(3, 96, requires_grad=True)
    packed(x).sum().backward()
    assert relative(x.grad, weight.sum(0).expand(3, -1)) <= 1e-6


@FORMATS
def test_joined_rows_keep_their_own_global_scale(format):
    parts = [random_codes(out, 96, format, seed=out) for out in (32, 48)]
    packed = [layer.PackedWeight.from_codes(f, 4, float4.GROUPS[format], torch.float32, None) for f, _ in parts]
    joined = layer.join(packed)
    x = torch.randn(3, 96)
    assert relative(joined(x), x.double() @ torch.cat([w for _, w in parts]).T) <= 1e-6
    other = layer.PackedWeight.from_codes(
        random_codes(32, 96, 3 - format)[0], 4, 48 - float4.GROUPS[format], torch.float32, None
    )
    assert layer.join([packed[0], other]) is None


def test_what_is_not_such_a_format_is_refused():
    found, _ = random_codes(33, 96, NVFP4)
    odd = described(found, NVFP4)
    odd.group_size = 48
    assert "neither NVFP4 nor MXFP4" in layer.supports(odd)
    odd = described(found, NVFP4, torch.float64)
    assert "float64" in layer.supports(odd)


def run_assembly(text: str, word: int, half: str, given: list[int]) -> list[int]:
    """Compute the four results of the decoding of one 32-bit word, instruction by instruction."""
    registers = {"$4": word} | {f"${5 + index}": value for index, value in enumerate(given)}
    read = lambda name: registers[name] if name in registers else int(name, 16 if "x" in name else 10)  # noqa: E731
    for line in re.findall(r"^\s*(\w[\w.]*) (.*);$", text, re.M):
        name, operands = line[0], [operand.strip() for operand in line[1].split(",")]
        if name == ".reg" or name.startswith("reg"):
            continue
        into, *rest = operands
        values = [read(each) for each in rest]
        if name == "and.b32":
            found = values[0] & values[1]
        elif name == "shl.b32":
            found = values[0] << values[1]
        elif name == "shr.u32":
            found = values[0] >> values[1]
        elif name == "lop3.b32":
            assert values[3] == 0xEA
            found = (values[0] & values[1]) | values[2]
        elif name == "mov.b32":
            found = values[0]
        elif name == "mad.lo.u32":
            found = values[0] * values[1] + values[2]
        elif name == "prmt.b32":
            both = (values[0] | values[1] << 32).to_bytes(8, "little")
            found = sum(both[values[2] >> (4 * place) & 15] << (8 * place) for place in range(4))
        else:
            assert name == f"fma.rn.{half}x2", name
            dtype = torch.bfloat16 if half == "bf16" else torch.float16
            pair = [torch.tensor([v & 0xFFFF, v >> 16], dtype=torch.int32).to(torch.int16).view(dtype) for v in values]
            wide = (pair[0].double() * pair[1].double() + pair[2].double()).to(dtype)
            low, high = (int(v) & 0xFFFF for v in wide.view(torch.int16))
            found = low | high << 16
        registers[into] = found & 0xFFFFFFFF
    return [registers[f"${index}"] for index in range(4)]


ASSEMBLIES = {
    "nvfp4-bf16": (decode.NVFP4_BF16, NVFP4, torch.bfloat16), "nvfp4-fp16": (decode.NVFP4_FP16, NVFP4, torch.float16),
    "mxfp4-bf16": (decode.MXFP4_BF16, MXFP4, torch.bfloat16), "plain-fp16": (decode.FLOATS_FP16, 0, torch.float16),
}  # fmt: skip


@pytest.mark.parametrize("name", ASSEMBLIES)
def test_the_assembly_decodes_every_pattern_in_every_place(name):
    text, format, dtype = ASSEMBLIES[name]
    half = name[-4:]
    patterns = torch.arange(16, dtype=torch.uint8)
    rows = [[1, 7, 126, 0], [8, 56, 119, 120]] if format == NVFP4 else [[127, 120, 130, 0]] * 2
    scales, held = torch.tensor(rows, dtype=torch.uint8), [0, 0]
    if format:
        held = float4.pack_scales(scales.repeat_interleave(64 // float4.GROUPS[format], 1), format)[0, :, 0].tolist()
    # Two neighbouring columns with different patterns in all places.
    for row, low in itertools.product(range(2), range(16)):
        codes = torch.stack([patterns.roll(low + 3 * place)[:2] for place in range(4)])  # [slice, column]
        words = sum(float4.place_bits(codes[index], index) for index in range(4))
        scale_word = held[row] & 0xFFFFFFFF
        if format == MXFP4:  # what ``scale_factor`` makes of them
            given = [max((scale_word >> (8 * place) & 255) << 7, 0x40) * 0x10001 for place in range(4)]
        else:
            given = [scale_word] * 2
        found = run_assembly(text.value, int(words[0]) | int(words[1]) << 16, half.replace("fp", "f"), given)
        for index, value in enumerate(found):
            got = torch.tensor([value & 0xFFFF, value >> 16], dtype=torch.int32).to(torch.int16).view(dtype)
            scale = byte_value(int(scales[row, index]), format) if format else 1.0
            wanted = float4.numbers(codes[index]).double() * scale
            if format == MXFP4 and scale < 2.0**-126:  # 0.5 times it is no number of bfloat16
                assert torch.allclose(got.double(), wanted, rtol=0, atol=2.0**-128)
            else:
                assert torch.equal(got.double() * (float4.FACTOR if format == NVFP4 else 1), wanted), (row, low, index)


class Mixture:
    """Random experts of 4-bit floats, and their matrices in float64."""

    def __init__(self, format, d=64, inner=96, experts=3):
        made = {}
        for side, shape in (("up", (2 * inner, d)), ("down", (d, inner))):
            for expert in range(experts):
                made[side, expert] = random_codes(*shape, format, seed=expert + 7 * len(side))
        self.dense = {key: weight for key, (_, weight) in made.items()}
        self.codes = {key: found for key, (found, _) in made.items()}
        up, down = (described(self.codes[side, 0], format, torch.float32) for side in ("up", "down"))
        self.description = SimpleNamespace(
            name="experts", count=experts, up=up, down=down, activation="silu",
            codes=lambda side, expert: [self.codes[side, expert]],
        )  # fmt: skip
        self.count = experts

    def expected(self, x, chosen, weights):
        out = torch.zeros(x.shape, dtype=torch.float64)
        for token, (numbers, gates) in enumerate(zip(chosen.tolist(), weights.tolist(), strict=True)):
            for number, gate in zip(numbers, gates, strict=True):
                if number < self.count:
                    first, second = (self.dense["up", number] @ x[token].double()).chunk(2)
                    out[token] += gate * (self.dense["down", number] @ (torch.nn.functional.silu(first) * second))
        return out


@pytest.mark.many
@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("tokens", [1, 21])
@FORMATS
def test_experts(format, tokens, device):
    mixture = Mixture(format)
    assert experts_layer.supports(mixture.description) is None
    packed = experts_layer.PackedExperts(mixture.description).to(device)
    for side in ("up", "down"):
        for expert in range(mixture.count):
            (found,) = packed.cpu().codes(side, expert)
            assert same(found, mixture.codes[side, expert])
    packed = packed.to(device)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 64, generator=g)
    chosen = torch.stack([torch.randperm(3, generator=g)[:2] for _ in range(tokens)])
    chosen[tokens // 2, 1] = 3
    weights = torch.rand(tokens, 2, generator=g)
    y = packed(x.to(device), chosen.to(device), weights.to(device), None)
    bound = 3e-6
    plain = relative(y.cpu(), mixture.expected(x, chosen, weights))
    if not can_run_triton(packed.up_packed):  # without kernels the matrices are rounded to bfloat16
        mixture.dense = {key: weight.float().to(torch.bfloat16).double() for key, weight in mixture.dense.items()}
        bound = 1e-4  # where float32 and float64 lie on different sides of a middle between two numbers
    rounded = relative(y.cpu(), mixture.expected(x, chosen, weights))
    assert rounded <= bound, f"{plain:.1e} without rounding"


def test_experts_count_tiles_where_they_are_moved(monkeypatch):
    packed = experts_layer.PackedExperts(Mixture(MXFP4).description)
    device = SimpleNamespace(runs=False)
    monkeypatch.setattr(experts_layer, "can_run_triton", lambda codes: device.runs)
    assert packed.to("cpu").semaphores.numel() == 1
    device.runs = True
    assert packed.to("cpu").semaphores.numel() == experts_layer.SEMAPHORES


def test_experts_of_another_group_size_are_refused():
    mixture = Mixture(NVFP4)
    mixture.description.down.group_size = 48
    assert "neither NVFP4 nor MXFP4" in experts_layer.supports(mixture.description)
