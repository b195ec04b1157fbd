"""Launches that are recorded once and replayed: with a launcher that notes its arguments, and with the interpreter."""

from __future__ import annotations

import copy
import ctypes
from types import SimpleNamespace

import pytest
import torch

from hf_optim_kernels.common import benchmark, launch_plan
from hf_optim_kernels.common.launch import RECORDER, Compiled, _all_of
from hf_optim_kernels.common.launch_plan import MOST_PLANS, PlannedLinear

GRID, STREAM = (1, 2, 3), 7
# What a launcher takes before the arguments of the kernel, and after them: the constants.
HEAD, TAIL = [*GRID, STREAM, "function", "metadata", None, None, None], [16]
made = []
COMPILED = Compiled(
    SimpleNamespace(run=lambda *a: made.append(list(a)), function="function", packed_metadata="metadata"), {"BLOCK": 16}
)


@pytest.fixture(autouse=True)
def without_a_device(monkeypatch):
    """A layer takes tensors of the CPU for those of a CUDA device; ``made`` has the arguments of replayed launches."""
    made.clear()
    monkeypatch.setattr(launch_plan, "current_device", lambda: None)
    monkeypatch.setattr(launch_plan, "current_stream", lambda index: STREAM)
    monkeypatch.setattr(launch_plan, "_capturing", lambda: False)
    monkeypatch.setattr(launch_plan, "_shared", {})


def launch(*args):
    """What ``common.launch.launch`` does but for the launch itself."""
    if RECORDER.log is not None:
        RECORDER.log.append((COMPILED, GRID, args))


class OnDevice(torch.Tensor):
    is_cuda = True


class Layer(PlannedLinear):
    """``call(x)``."""

    def __init__(self, call):
        super().__init__()
        self.register_buffer("weight", torch.zeros(4, 4))
        self.dtype, self.call, self.computed = torch.float32, call, 0

    def compute(self, x):
        self.computed += 1
        return self.call(self, x)


def zeros(*shape):
    return torch.zeros(shape).as_subclass(OnDevice)


def test_a_plan_makes_the_same_launches():
    def call(layer, x):
        y, held, more = torch.empty(8), torch.empty(3), torch.empty(5)
        launch(x, layer.weight[1:], held, more[1:], 5)
        launch(held, x[1:], y)
        return y.view(2, 4)

    layer, x, other = Layer(call), zeros(2, 4), zeros(2, 4)
    layer.planned(x)
    y = layer.planned(other)
    first, second = made
    assert layer.computed == 1
    assert first[:9] == second[:9] == HEAD
    assert first[-1:] == second[-1:] == TAIL
    first, second = first[9:-1], second[9:-1]
    assert first[:2] == [other.data_ptr(), layer.weight[1:].data_ptr()]
    assert first[3] == first[2] + launch_plan.ALIGNMENT + 4
    assert first[4] == 5
    assert second == [first[2], other[1:].data_ptr(), y.data_ptr()]
    assert y.shape == (2, 4)
    assert not launch_plan._shared  # another thread may launch between the two


def test_what_is_more_than_launches_has_no_plan():
    x = torch.zeros(2, 4)

    def launches():
        y = torch.empty(2, 4)
        launch(x, y)
        return y

    def more_than_launches():
        launch_plan.prevent_recording()
        return launches()

    def decode_and_multiply():
        weight = torch.empty(4, 4)
        launch(weight)
        return x @ weight

    def a_part_of_what_is_written():
        y = torch.empty(3, 4)
        launch(x, y)
        return y[:2]

    assert launch_plan.record(launches, x, [])[1] is not None
    for call in (more_than_launches, decode_and_multiply, a_part_of_what_is_written, lambda: x):
        assert launch_plan.record(call, x, [])[1] is None


@pytest.mark.parametrize("split", [True, False])
def test_partial_sums_of_one_launch_are_in_memory_of_the_stream(split):
    def call(layer, x):
        y = torch.empty(2, 4)
        launch(x, layer.weight, y, torch.empty(16) if split else y, 3)
        return y

    layer, x, other = Layer(call), zeros(2, 4), zeros(2, 4)
    layer.planned(x)
    outputs = [layer.planned(other) for _ in range(2)]
    for y, arguments in zip(outputs, made, strict=True):
        partial = launch_plan._shared[None, STREAM].data_ptr() if split else y.data_ptr()
        assert arguments == [*HEAD, other.data_ptr(), layer.weight.data_ptr(), y.data_ptr(), partial, 3, *TAIL]
    assert outputs[0].data_ptr() != outputs[1].data_ptr()


def test_captured_launches_have_their_own_memory(monkeypatch):
    def call(layer, x):
        y = torch.empty(2, 4)
        launch(x, y, torch.empty(16))
        return y

    layer, x = Layer(call), zeros(2, 4)
    layer.planned(x)
    layer.planned(x)
    monkeypatch.setattr(launch_plan, "_capturing", lambda: True)
    layer.planned(x)
    outside, captured = made
    assert outside[11] == launch_plan._shared[None, STREAM].data_ptr() != captured[11]


def doubled(layer, x):
    y = torch.empty(x.shape)
    launch(x, layer.weight, y)
    return y


def test_a_layer_keeps_a_plan_per_shape():
    layer, x = Layer(doubled), zeros(2, 4)
    for _ in range(3):
        layer.planned(x)
    assert (layer.computed, len(made)) == (1, 2)
    strided, unaligned = zeros(4, 2).T, zeros(9)[1:].view(2, 4)
    for other in (strided, unaligned, x.double(), torch.zeros(2, 4)):
        layer.planned(other)
    assert (layer.computed, len(made)) == (5, 2)
    layer.planned(zeros(9)[1:].view(8))
    assert list(layer.plans) == [x.shape]
    for rows in range(2 * MOST_PLANS):
        layer.planned(zeros(rows, 1, 4))
    assert len(layer.plans) == MOST_PLANS


def test_a_plan_is_for_one_device(monkeypatch):
    layer, x = Layer(doubled), zeros(2, 4)
    layer.planned(x)
    monkeypatch.setattr(launch_plan, "current_device", lambda: 1)
    layer.planned(x)
    assert (layer.computed, len(made)) == (2, 0)


def test_a_plan_is_forgotten_when_buffers_move():
    layer, x = Layer(doubled), zeros(2, 4)
    layer.planned(x)
    assert copy.deepcopy(layer).plans == {}
    assert layer.plans
    assert layer.double().plans == {}
    layer.planned(x)
    layer.renew()
    assert layer.plans == {}


# -- every layer, interpreted -----------------------------------------------------------------------------------------
class Interpreted:
    """A launch by addresses, as a device makes it, run by Triton's interpreter."""

    def __init__(self, kernel, args, constants, options):
        self.kernel, self.constants, self.options = kernel, constants, options
        self.function = self.metadata = None
        self.tail = tuple(constants.values())
        self.kinds = [(a.dtype, a.untyped_storage().nbytes()) if isinstance(a, torch.Tensor) else None for a in args]

    arguments = Compiled.arguments

    def run(self, *given):
        addressed = zip(given[9:], self.kinds, strict=False)  # the constants follow
        args = [value if kind is None else at_address(value, *kind) for value, kind in addressed]
        self.kernel[given[:3]](*args, **self.constants, **self.options)


def at_address(address, dtype, size):
    if not size:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_byte * size).from_address(address), dtype=torch.int8).view(dtype)


def interpreted_launch(kernel, grid, args, constants, *, key, **options):
    kernel[grid](*args, **constants, **options)
    if RECORDER.log is not None:
        RECORDER.log.append((Interpreted(kernel, args, constants, options), grid, args))


def wna16_layer():
    from hf_optim_kernels.wna16 import layer

    codes = benchmark.codes_of(torch.randint(0, 16, (40, 256), dtype=torch.uint8), torch.rand(40, 2) + 0.1)
    return layer.PackedWeight.from_codes(codes, 4, 128, torch.float32, torch.randn(40))


def codebook_layer():
    from hf_optim_kernels.codebook import bench, layer

    return layer.prepack(bench.random_module(40, 256, 3, torch.float32))


def w8a8_layer():
    from hf_optim_kernels.w8a8 import bench

    return bench.random_weight(40, 256, torch.float32, False)


def llm_int8_layer():
    from hf_optim_kernels.llm_int8 import layer

    return layer.LLMInt8Linear.from_linear(torch.nn.Linear(256, 40))


def sparse24_layer():
    from hf_optim_kernels.sparse24 import bench

    return bench.random_weight(40, 256, 16, torch.float16)[0]


@pytest.mark.interpreted
@pytest.mark.parametrize("make", [wna16_layer, codebook_layer, w8a8_layer, llm_int8_layer, sparse24_layer])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_replayed_layer_computes_the_same(make, rows, monkeypatch):
    monkeypatch.setattr(benchmark, "device", lambda: torch.device("cpu"))
    for name in ("common.splitk", "w8a8.launch", "w8a8.quantize", "llm_int8.launch"):
        monkeypatch.setattr(f"hf_optim_kernels.{name}.launch", interpreted_launch)
    torch.manual_seed(0)
    layer = make()
    first, x = (torch.randn(rows, 256).to(layer.dtype).as_subclass(OnDevice) for _ in range(2))
    x[0, 5] *= 20
    layer.planned(first)
    assert len(layer.plans[x.shape].steps) == (2 if make in (w8a8_layer, llm_int8_layer) and rows > 1 else 1)
    computed = layer.compute(x)
    monkeypatch.setattr(layer, "compute", None)
    for _ in range(2):
        assert torch.equal(layer.planned(x), computed)
    assert not layer.semaphores.any()


def test_a_launch_names_every_constant():
    """A launcher counts the constants, defaults among them, and only where a compiled kernel is launched again."""
    kernel = SimpleNamespace(arg_names=["x", "N", "BLOCK", "FORMAT"], __name__="_some_kernel")
    assert list(_all_of(kernel, (1, 2), {"FORMAT": 0, "BLOCK": 64})) == ["BLOCK", "FORMAT"]
    with pytest.raises(TypeError, match="_some_kernel: the constants FORMAT are missing"):
        _all_of(kernel, (1, 2), {"BLOCK": 64})
    with pytest.raises(TypeError, match="OTHER"):
        _all_of(kernel, (1, 2), {"BLOCK": 64, "FORMAT": 0, "OTHER": 1})
