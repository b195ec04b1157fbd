"""The kernels for warp-group instructions, which the interpreter cannot run: against float64, on a Hopper card."""

from __future__ import annotations

import pytest
import torch

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.wna16 import launch as wna16_launch
from hf_optim_kernels.wna16 import layer as wna16_layer
from hf_optim_kernels.wna16 import naive as wna16_naive
from hf_optim_kernels.wna16 import specialized as wna16_specialized
from hf_optim_kernels.wna16 import wide as wna16_wide

TILES = [
    (128, 256, 1, 8, 2), (128, 128, 3, 8, 3), (128, 128, 2, 4, 3), (256, 128, 1, 8, 2), (64, 128, 2, 4, 3),
    (16, 64, 4, 4, 3),
]  # fmt: skip
NAMES = ("KERNEL", "BLOCK_M", "BLOCK_N", "SPLIT", "num_warps", "num_stages")
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def wide_tiles(tiles):
    return dict(
        zip(("KERNEL", "BLOCK_M", "BLOCK_N", "SPLIT", "num_warps", "num_stages"), ("wide", *tiles), strict=True)
    )


def random_layer(N, K, bits, group, has_zero, has_bias, dtype):
    codes = torch.randint(0, 2**bits, (N, K), device="cuda", dtype=torch.uint8)
    scale = (torch.rand(N, K // group, device="cuda") + 0.1).to(dtype)
    zero = torch.randint(0, 2**bits, (N, K // group), device="cuda", dtype=torch.uint8) if has_zero else None
    bias = torch.randn(N, device="cuda").to(dtype) if has_bias else None
    return wna16_layer.PackedWeight.from_codes(benchmark.codes_of(codes, scale, zero), bits, group, dtype, bias)


KINDS = [
    (4, 128, False, False, torch.bfloat16),
    (4, 64, True, True, torch.bfloat16),
    (3, 192, False, True, torch.float16),
    (4, 256, True, False, torch.float16),
    (4, 1344, True, True, torch.bfloat16),
    (8, 1344, False, False, torch.bfloat16),
    (8, 128, True, True, torch.bfloat16),
    (8, 1344, True, False, torch.float16),
]


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("number", range(len(KINDS)))
def test_wide_products_of_codes(number, shift):
    bits, group, has_zero, has_bias, dtype = KINDS[number]
    tiles = TILES[(number + shift) % len(TILES)]
    N, K = 528, 1344 if 1344 % group == 0 else 1536
    torch.manual_seed(0)
    layer = random_layer(N, K, bits, group, has_zero, has_bias, dtype)
    weight = layer.tensors()
    exact = wna16_naive.dequantize(weight, K, torch.float64)
    for M in (1, 37, 128, 300):
        x = torch.randn(M, K, device="cuda").to(dtype)
        assert wna16_wide.supports(x, weight)
        wanted = x.double() @ exact.T + (0 if layer.bias is None else layer.bias.double())
        torch.full((M, N), float("nan"), dtype=dtype, device="cuda")
        y = wna16_launch.product(x, weight, wide_tiles(tiles))
        assert benchmark.relative_error(y, wanted) < (4e-3 if dtype == torch.bfloat16 else 6e-4)
        assert torch.equal(wna16_launch.product(x, weight, wide_tiles(tiles)), y)
        assert not layer.semaphores.any()


SPECIALIZED = [(256, 128, 1, 4, 4), (128, 256, 1, 4, 5), (128, 128, 3, 4, 6), (256, 128, 2, 4, 5), (64, 256, 2, 4, 6)]


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("number", range(len(KINDS)))
def test_products_of_specialized_warps(number, shift):
    bits, group, has_zero, has_bias, dtype = KINDS[number]
    tiles = dict(zip(NAMES, ("specialized", *SPECIALIZED[(number + shift) % len(SPECIALIZED)]), strict=True))
    # The last unit of 256 columns is not full, and the last tile of rows of the weight is neither.
    N, K = 528, 1344 if 1344 % group == 0 else 1536
    torch.manual_seed(0)
    layer = random_layer(N, K, bits, group, has_zero, has_bias, dtype)
    weight = layer.tensors()
    exact = wna16_naive.dequantize(weight, K, torch.float64)
    for M in (1, 37, 128, 300):
        x = torch.randn(M, 2 * K, device="cuda").to(dtype)[:, :K]  # rows that do not lie behind each other
        assert wna16_specialized.supports(x, weight)
        wanted = x.double() @ exact.T + (0 if layer.bias is None else layer.bias.double())
        torch.full((M, N), float("nan"), dtype=dtype, device="cuda")
        y = wna16_launch.product(x, weight, tiles)
        assert benchmark.relative_error(y, wanted) < (4e-3 if dtype == torch.bfloat16 else 6e-4)
        assert torch.equal(wna16_launch.product(x, weight, tiles), y)
        assert not layer.semaphores.any()


@hopper
@pytest.mark.gpu
def test_layers_of_specialized_warps_follow_their_inputs(monkeypatch):
    """A descriptor holds the address of the inputs: nothing may be kept from a call before."""
    tiles = dict(zip(NAMES, ("specialized", *SPECIALIZED[0]), strict=True))
    monkeypatch.setattr(wna16_launch.tuning, "choose", lambda *_, **__: tiles)
    layer = random_layer(256, 512, 4, 128, False, False, torch.bfloat16)
    exact = wna16_naive.dequantize(layer.tensors(), 512, torch.float64)
    for _ in range(3):
        x = torch.randn(200, 512, device="cuda").bfloat16()
        assert benchmark.relative_error(layer(x), x.double() @ exact.T) < 4e-3
    graph, x = torch.cuda.CUDAGraph(), torch.randn(200, 512, device="cuda").bfloat16()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randn(200, 512, device="cuda"))
    graph.replay()
    assert benchmark.relative_error(y, x.double() @ exact.T) < 4e-3


def test_specialized_warps_refuse_other_weights():
    """On this device, or with 4-bit floats, the kernel says so instead of reading what is not there."""
    found = torch.zeros(16, 64, dtype=torch.uint8)
    layer = wna16_layer.PackedWeight.from_codes(
        benchmark.codes_of(found, torch.ones(16, 1).bfloat16(), None), 4, 64, torch.bfloat16, None
    )
    weight = layer.tensors()._replace(format=1)
    tiles = dict(zip(NAMES, ("specialized", *SPECIALIZED[0]), strict=True))
    with pytest.raises(ValueError, match="whole codes of 4 or 8 bits"):
        wna16_launch.product(torch.zeros(65, 64).bfloat16(), weight, tiles)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_products_of_sparse_weights(tiles, dtype):
    from hf_optim_kernels.sparse24 import bench, launch, wide
    from hf_optim_kernels.sparse24 import tiles as sparse_tiles

    m, n, split, warps, ring = tiles
    config = sparse_tiles.config("wide", m, n, 0, split, warps, min(ring, 2 if n * m > 1 << 13 else 3))
    for N, K in ((528, 1344), (256, 1000)):
        module, weight = bench.random_weight(N, K, 16, dtype)
        for M in (1, 37, 128, 300):
            x = torch.randn(M, K, device="cuda").to(dtype)
            assert wide.supports(x, module.tensors())
            wanted = x.double() @ weight.T
            torch.full((M, N), float("nan"), dtype=dtype, device="cuda")
            y = bench.run(module, x, config)
            assert benchmark.relative_error(y, wanted) < (4e-3 if dtype == torch.bfloat16 else 6e-4)
            assert torch.equal(launch.sparse24(x, module.tensors(), config), y)
            assert not module.semaphores.any()
