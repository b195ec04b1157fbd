"""hf_optim::dense_row: the specification, the kernel, its settings, and what it does not take."""

from __future__ import annotations

import pytest
import torch
from interpreting import BOUND, EVERYWHERE, on_triton, relative

pytest.importorskip("triton")

from absent_device import launches_on

from hf_optim_kernels.common import tuning
from hf_optim_kernels.dense_row import bench, launch, naive, op

SHAPES = {"even": (64, 128), "odd-rows": (37, 64), "padded-row": (19, 72), "one-row": (1, 16), "wide": (9, 2304)}
DTYPES = (torch.float16, torch.bfloat16)


def tensors(shape, dtype, device):
    N, K = SHAPES[shape]
    random = torch.Generator().manual_seed(N)
    parts = (torch.randn(size, generator=random) for size in ((1, 1, K), (N, K), (N,)))
    return tuple(part.to(device, dtype) for part in parts)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device", EVERYWHERE)
def test_products(device, shape, dtype, biased):
    x, weight, bias = tensors(shape, dtype, device)
    bias = bias if biased else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = op.dense_row(x, weight, bias)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    assert relative(found, expected) < BOUND[dtype]


@on_triton
@pytest.mark.parametrize("config", launch.candidates(64)[:1] + launch.candidates(64)[1::7], ids=str)
def test_every_setting_computes_the_same(device, config):
    x, weight, bias = tensors("odd-rows", torch.float16, device)
    found = launch.dense_row(x.reshape(-1), weight, bias, config)
    assert relative(found, naive.dense_row(x.reshape(-1), weight, bias)) < BOUND[torch.float16]


@on_triton
def test_rows_are_divided_evenly_and_none_is_left_out(device):
    weight = torch.eye(64, dtype=torch.float16, device=device)
    x = torch.arange(64, dtype=torch.float16, device=device)
    for programs in (1, 2, 3, 8):
        config = {**launch.default(64), "programs": programs, "rows": 1}
        assert torch.equal(launch.dense_row(x, weight, None, config), x)


def test_a_weight_beyond_the_bounds_of_shared_memory_is_not_configured():
    for channels in (64, 4096, 14336, 28672, 32768):
        for config in launch.candidates(channels):
            size = 2 * (1 << (channels - 1).bit_length())
            assert size * config["rows"] * (config["stages"] - 1) * config["programs"] <= launch.SHARED_BYTES


def test_the_key_of_a_launch_names_what_its_code_depends_on(monkeypatch):
    monkeypatch.setattr(tuning, "choose", lambda *given, **more: launch.default(given[1][1]))
    with launches_on(launch) as made:
        for dtype in DTYPES:
            x, weight, bias = (torch.empty(size, dtype=dtype, device="cuda") for size in ((64,), (4096, 64), (4096,)))
            for given in (None, bias):
                launch.dense_row(x, weight, given)
    assert len({each["key"] for each in made}) == len(made) == 4
    constants = made[0]["constants"]
    assert [constants[name] for name in ("EARLY", "LINES", "FULL")] == [True, 64, True]


@pytest.mark.parametrize(
    ("weight", "bias", "why"),
    [
        (torch.zeros(1024, 1024), None, "float32"),
        (torch.zeros(1024, 1024, dtype=torch.float16), torch.zeros(1024), "float16"),
        (torch.zeros(2048, 1024, dtype=torch.float16).T, None, "rows"),
        (torch.zeros(1024, 1028, dtype=torch.float16), None, "1028 channels"),
        (torch.zeros(64, 32776, dtype=torch.float16), None, "32776 channels"),
        (torch.zeros(64, 64, dtype=torch.float16), None, "small"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(weight, bias, why):
    assert why in op.unsupported(weight, bias)
    assert op.unsupported(torch.zeros(1024, 1024, dtype=torch.float16), None) is None


def test_more_rows_than_one_are_refused():
    weight = torch.zeros(16, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="one row of 8 channels"):
        op.dense_row(torch.zeros(2, 8, dtype=torch.float16), weight, None)


def test_the_operator_can_be_traced():
    x, weight, bias = tensors("even", torch.float16, "cpu")
    torch.library.opcheck(op.dense_row, (x, weight, bias), test_utils=("test_schema", "test_faketensor"))


def test_rows_beyond_one_are_timed_with_the_library_alone(monkeypatch):
    monkeypatch.setattr(op, "LEAST_NUMBERS", 1)
    assert [each.name for each in bench.contenders(32, 16, 1, torch.float16)] == ["dense_row", "dense"]
    assert [each.name for each in bench.contenders(32, 16, 2, torch.float16)] == ["dense"]
    (tunable,) = bench.tunables(32, 16, torch.float16)
    assert tunable.candidates(1)
    assert not tunable.candidates(2)
