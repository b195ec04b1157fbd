"""hf_optim::codebook_linear: the layout, the lookup's instructions, the kernels, and models on them."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from interpreting import BOUND, on_triton, relative

from hf_optim_kernels.codebook import bench, layer, naive, op

pytest.importorskip("triton")


def packed_weight_of(N, K, bits, dtype, device="cpu", seed=0, bias=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = bench.random_module(N, K, bits, dtype)
    codes = module.codes().to(device)
    module.codes = lambda: codes
    for name in ("centroids", "outliers", "outlier_counts", "outlier_columns"):
        setattr(module, name, getattr(module, name).to(device))
    module.bias = torch.linspace(-1, 1, N).to(device, dtype) if bias else None
    return module, layer.prepack(module)


def brute_force(module, x):
    """``x W^T + bias`` in float64 from the codes and the outliers themselves."""
    weight = module.centroids.double()[module.codes().long()]
    entry = 0
    for row, count in enumerate(module.outlier_counts.tolist()):
        for _ in range(count):
            weight[row, int(module.outlier_columns[entry])] = float(module.outliers[entry])
            entry += 1
    y = x.double() @ weight.T
    return y if module.bias is None else y + module.bias.double()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(3, 1), (5, 33), (7, 256), (2, 520)])
def test_packing_gives_the_codes_back(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = naive.pack(codes, bits)
    assert words.dtype == torch.int16
    assert torch.equal(naive.unpack(words, shape[1]), codes)


def test_the_layout_is_bits_wide_where_chunks_divide_the_columns():
    codes = torch.zeros(4, 4096, dtype=torch.uint8)
    assert naive.pack(codes, 3).numel() * 16 == 3 * codes.numel()
    assert naive.slice_columns(4096) == 32
    assert naive.slice_columns(768) == 16


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_specification_is_the_product_with_the_decoded_weight(bits):
    module, packed_weight = packed_weight_of(37, 100, bits, torch.float32, bias=True)
    x = torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(1))
    assert len(packed_weight.tensors().values) > 0
    assert relative(packed_weight(x), brute_force(module, x)) < BOUND[torch.float32]


def test_gradients_are_those_of_the_decoded_weight():
    module, packed_weight = packed_weight_of(9, 20, 3, torch.float32, bias=True)
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(2), requires_grad=True)
    bias = module.bias.clone().requires_grad_()
    y = op.codebook_linear(x, *packed_weight.tensors()._replace(bias=bias))
    y.square().sum().backward()
    twin, other = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    module.bias = None
    (twin @ brute_force(module, torch.eye(20)) + other).square().sum().backward()
    assert relative(x.grad, twin.grad) < 1e-5
    assert relative(bias.grad, other.grad) < 1e-5


def test_the_operator_passes_pytorchs_own_checks():
    _, packed_weight = packed_weight_of(9, 20, 3, torch.float32, bias=True)
    args = (torch.randn(4, 20), *packed_weight.tensors())
    torch.library.opcheck(op.codebook_linear, args, test_utils=("test_schema", "test_faketensor"))


class Machine:
    """Runs the few PTX instructions of ``lookup.text`` on Python numbers."""

    def __init__(self, packed_weights):
        self.held = dict(packed_weights)

    def read(self, name):
        return self.held[name] if name in self.held else int(name, 0)

    def run(self, text):
        for line in text.splitlines():
            match = re.fullmatch(r"([a-z0-9]+)\.[a-z.0-9]+ (.*);", line)
            if not match or match[1] == "reg":
                continue
            target, *names = match[2].split(", ")
            self.held[target] = getattr(self, match[1])(*[self.read(n) for n in names]) & 0xFFFFFFFF

    def mov(self, a):
        return a

    def shl(self, a, n):
        return a << n

    def shr(self, a, n):
        return a >> n

    def mul(self, a, b):
        return a * b

    def __getattribute__(self, name):
        return super().__getattribute__({"and": "both"}.get(name, name))

    def both(self, a, b):
        return a & b

    def lop3(self, a, b, c, table):
        found = 0
        for bit in range(32):
            index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
            found |= (table >> index & 1) << bit
        return found

    def prmt(self, a, b, selector):
        pool = [(b << 32 | a) >> 8 * i & 255 for i in range(8)]
        found = 0
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = pool[nibble & 7]
            found |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
        return found


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("first", range(4))
def test_the_instructions_look_up_the_right_numbers(bits, first):
    from hf_optim_kernels.codebook import lookup

    generator = torch.Generator().manual_seed(10 * bits + first)
    centroids = torch.randn(2**bits, generator=generator).bfloat16()
    codes = torch.randint(0, 2**bits, (2, 16), generator=generator)  # of two words, by plane
    registers = [int(r) & 0xFFFFFFFF for r in lookup.tables(centroids, torch.bfloat16)]
    operands = {f"${4 + bits + 2 * i + twin}": r for i, r in enumerate(registers) for twin in range(2)}
    for bit in range(bits):
        words = [sum(int(codes[w, p] >> bit & 1) << p for p in range(16)) for w in range(2)]
        operands[f"${4 + bit}"] = words[0] | words[1] << 16
    machine = Machine(operands)
    machine.run(lookup.text(bits, first))
    for q in range(4):
        pair = machine.held[f"${q}"]
        got = torch.tensor([pair & 0xFFFF, pair >> 16], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        assert torch.equal(got, centroids[codes[:, first + 4 * q]])


def test_the_operand_refuses_what_is_not_its_business():
    assert layer.supports(torch.nn.Linear(3, 3)) == ""
    module, packed_weight = packed_weight_of(8, 32, 3, torch.float32)
    module.holds_codes, module.shape, module.in_features = True, (8, 32), 32
    assert "cpu" in layer.supports(module)
    assert packed_weight.accepts(torch.zeros(1, 32))
    assert not packed_weight.accepts(torch.zeros(1, 32, dtype=torch.float16))
    assert not packed_weight.state_dict()
    twin = copy.deepcopy(packed_weight)
    assert torch.equal(twin.codes(), module.codes())


@on_triton
@pytest.mark.parametrize(
    ("N", "K", "M", "bits", "dtype"),
    [
        (37, 100, 5, 3, torch.float32),
        (64, 512, 1, 2, torch.float16),
        (70, 300, 9, 4, torch.bfloat16),
        (33, 40, 3, 7, torch.float32),
        (1, 8, 17, 8, torch.float16),
    ],
)
@pytest.mark.parametrize("split", [1, 2])
def test_the_fused_kernel(device, N, K, M, bits, dtype, split):
    from hf_optim_kernels.codebook import launch

    module, packed_weight = packed_weight_of(N, K, bits, dtype, device, bias=True)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    tiles = {"BLOCK_M": 16, "BLOCK_N": 32, "SPLIT": split, "EDGE": 32, "num_warps": 4, "num_stages": 2}
    y = launch.fused(x, packed_weight.tensors(), tiles)
    assert y.dtype == dtype
    assert relative(y, brute_force(module, x)) < BOUND[dtype]
    assert not packed_weight.semaphores.any()


@on_triton
@pytest.mark.parametrize(("N", "K", "bits"), [(70, 300, 3), (64, 512, 4), (5, 17, 6)])
def test_the_decoded_weight_is_exact(device, N, K, bits):
    from hf_optim_kernels.codebook import launch

    module, packed_weight = packed_weight_of(N, K, bits, torch.float16, device)
    wanted = brute_force(module, torch.eye(K, dtype=torch.float64, device=device)).T
    weight = packed_weight.tensors()
    assert torch.equal(launch.dense(weight, K, torch.float16).double(), wanted)
    assert torch.equal(launch.dense(weight, K, torch.float16, 2, 3).double(), wanted[2:5])


@on_triton
def test_many_rows_take_the_library_and_agree(device, monkeypatch):
    from hf_optim_kernels.codebook import launch

    module, packed_weight = packed_weight_of(300, 64, 3, torch.float32, device, bias=True)
    x = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(4)).to(device)
    monkeypatch.setattr(launch, "MOST_ROWS", 8)
    assert relative(packed_weight(x), brute_force(module, x)) < BOUND[torch.float32]
    monkeypatch.setattr(launch, "MOST_BYTES", 200 * 64)
    assert relative(packed_weight(x), brute_force(module, x)) < BOUND[torch.float32]
    assert packed_weight(x[:0]).shape == (0, 10, 300)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("M", [1, 16, 64, 256, 600])
def test_large_layers_on_a_device(bits, M):
    _, packed_weight = packed_weight_of(1536, 4096, bits, torch.bfloat16, "cuda")
    x = torch.randn(M, 4096, device="cuda").bfloat16()
    wanted = x.double() @ naive.dequantize(packed_weight.tensors(), 4096, torch.float64).T
    for _ in range(2):  # the second call takes the plan
        assert relative(packed_weight(x), wanted) < BOUND[torch.bfloat16]
