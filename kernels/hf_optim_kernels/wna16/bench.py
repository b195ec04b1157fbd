"""Times ``hf_optim::wna16`` beside the dense product and PyTorch's int4 operator, on a CUDA device.

    python -m hf_optim_kernels.wna16.bench [--shape 14336x4096] [--rows 1 16 64] [--sweep]

Each shape is first checked against float64 on fresh random inputs, the output poisoned before. A time is the median
of replays of a CUDA graph that goes over several copies of the weight, together larger than the L2 cache, divided by
their number. The floor is the bytes of the packed weight and its scales over the copy bandwidth measured in the same
run. ``--sweep`` times every tile shape of ``TILES`` and prints the best ones.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from functools import partial

import torch
import triton
from torch import Tensor

from . import naive, op
from .kernel import choose_tiles
from .kernel import wna16 as run_kernel

GROUP = 128
L2_BYTES = 256 << 20
TILES = [
    {"BLOCK_N": n, "SPLIT": split, "num_warps": warps, "num_stages": stages}
    for n, split, warps, stages in itertools.product((32, 64, 128), (1, 2, 4), (4, 8), (3, 5))
]


def random_layer(N: int, K: int, width: int = 4, zero: bool = False, dtype: torch.dtype = torch.bfloat16):
    """Random ``(packed, scale, zero)`` for a weight [N, K] on the device, groups of ``GROUP``."""
    codes = torch.randint(0, 2**width, (N, K), device="cuda", dtype=torch.uint8)
    scale = (torch.rand(K // GROUP, N, device="cuda") * 0.01 + 0.001).to(dtype)
    zeros = torch.randint(0, 2**width, scale.shape, device="cuda", dtype=torch.int16) if zero else None
    return naive.pack(codes, width, GROUP), scale, zeros


def graph_time(calls: list[Callable[[], object]], replays: int = 30) -> float:
    """Median microseconds of one call, over replays of a graph that makes all ``calls`` one after the other."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[5:])


def eager_time(call: Callable[[], object], calls: int = 200) -> float:
    """Microseconds of one call when the host launches each."""
    for _ in range(10):
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / calls


def copy_bandwidth() -> float:
    """Bytes a microsecond of a large copy, read and write counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_time([lambda: target.copy_(source)], 15)


def relative_error(y: Tensor, x: Tensor, layer: tuple[Tensor, Tensor, Tensor | None], width: int = 4) -> float:
    """Norm of the difference to float64 over its norm; NaN where an output was not written."""
    weight = naive.dequantize(layer[0], layer[1], layer[2], width, GROUP, x.shape[-1], torch.float64)
    reference = x.double() @ weight.T
    return float((y.double() - reference).norm() / reference.norm())


def copies_of(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The tensors and clones of them, together larger than the L2 cache."""
    size = sum(t.numel() * t.element_size() for t in tensors)
    return [tensors] + [tuple(t.clone() for t in tensors) for _ in range(min(64, L2_BYTES // size))]


def torch_int4(N: int, K: int) -> tuple[Tensor, Tensor]:
    """A random weight in the layout of ``aten::_weight_int4pack_mm``."""
    codes = torch.randint(0, 256, (N, K // 2), device="cuda", dtype=torch.uint8)
    scales = torch.rand(K // GROUP, N, 2, device="cuda").to(torch.bfloat16)
    return torch.ops.aten._convert_weight_to_int4pack(codes, 8), scales


def compare(N: int, K: int, rows: list[int], bandwidth: float, search: bool) -> None:
    """Print a line per number of rows: this kernel, the dense product, PyTorch's int4 operator, and the floor."""
    packed, scale, _ = random_layer(N, K)
    layers = copies_of((packed, scale))
    dense = copies_of((torch.randn(N, K, device="cuda", dtype=torch.bfloat16),))
    peers = copies_of(torch_int4(N, K))
    floor = (packed.numel() + scale.numel() * scale.element_size()) / bandwidth
    print(f"\nN={N} K={K} group {GROUP}, microseconds, floor {floor:.1f}")
    print("    M  wna16  dense  torch4  dense/wna16  of floor  wna16 eager  dense eager  rel. error  tiles")
    for M in rows:
        x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        tiles = best_tiles(x, layers) if search else choose_tiles(M, N, K, 4)
        ours, plain, peer = partial(_ours, x, tiles), partial(torch.nn.functional.linear, x), partial(_torch4, x)
        error = relative_error(ours(packed, scale), x, (packed, scale, None))
        time, dense_time, peer_time = time_each(ours, layers), time_each(plain, dense), time_each(peer, peers)
        eager = eager_time(partial(op.wna16, x, packed, scale, None, None, 4, GROUP))
        dense_eager = eager_time(partial(plain, *dense[0]))
        print(
            f"{M:5d} {time:6.1f} {dense_time:6.1f} {peer_time:7.1f} {dense_time / time:12.2f} {floor / time:9.0%} "
            f"{eager:12.1f} {dense_eager:12.1f} {error:11.1e}  {' '.join(map(str, tiles.values()))}",
            flush=True,
        )


def _ours(x: Tensor, tiles: dict[str, int], packed: Tensor, scale: Tensor) -> Tensor:
    return run_kernel(x, packed, scale, None, None, 4, GROUP, tiles)


def _torch4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)


def time_each(run: Callable[..., object], layers: list[tuple[Tensor, ...]], replays: int = 30) -> float:
    """``graph_time`` of ``run`` over the copies of a layer."""
    return graph_time([partial(run, *layer) for layer in layers], replays)


def best_tiles(x: Tensor, layers: list[tuple[Tensor, ...]]) -> dict[str, int]:
    """The fastest of ``TILES`` for this input."""
    M, K, N = *x.shape, layers[0][0].shape[0]
    found = []
    for tile in TILES:
        full = {"BLOCK_M": choose_tiles(M, N, K, 4)["BLOCK_M"], **tile}
        try:
            found.append((time_each(partial(_ours, x, full), layers, 12), full))
        except triton.runtime.errors.OutOfResources as error:
            print(f"{full}: {error}")
    return min(found, key=lambda pair: pair[0])[1]


def check() -> None:
    """Raise unless the kernel is right on several shapes, types and grids, on poisoned memory."""
    worst: dict[str, float] = {}
    for dtype, bound in ((torch.bfloat16, 4e-3), (torch.float16, 5e-4), (torch.float32, 1e-6)):
        for (N, K), M, width, zero in itertools.product(
            ((352, 384), (1000, 1024), (4096, 4096)), (1, 5, 16, 33), (4, 8), (False, True)
        ):
            layer = random_layer(N, K, width, zero)
            x = torch.randn(M, K, device="cuda").to(dtype)
            # The caching allocator hands this block to the output next.
            torch.full((M, N), float("nan"), dtype=dtype, device="cuda")
            error = relative_error(op.wna16(x, *layer, None, width, GROUP), x, layer, width)
            worst[str(dtype)] = max(worst.get(str(dtype), 0.0), error)
            if not error < bound:
                raise AssertionError(f"{dtype} N={N} K={K} M={M} width {width} zero {zero}: relative error {error:.2e}")
    print("right on every shape; worst relative error", {k: f"{v:.1e}" for k, v in worst.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", action="append", help="OUTxIN; may stand several times")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--sweep", action="store_true", help="take the fastest tile shape of TILES")
    options = parser.parse_args()
    shapes = [tuple(map(int, s.split("x"))) for s in options.shape or ["14336x4096", "4096x4096", "4096x14336"]]
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    check()
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e6:.2f} TB/s")
    for N, K in shapes:
        compare(N, K, options.rows, bandwidth, options.sweep)


if __name__ == "__main__":
    main()
