"""The timing tools: they time what they are given, and see a wrong output."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import pytest
import torch

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.common.benchmark import Contender


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(benchmark, "device", lambda: torch.device("cpu"))


def sleeper(seconds):
    return lambda: time.sleep(seconds) or torch.zeros(1)


@pytest.mark.parametrize("timer", [benchmark.graph_time, benchmark.eager_time])
def test_a_time_is_that_of_one_call(timer):
    timing = timer([sleeper(0.001), sleeper(0.003)])
    assert 1900 < timing.us < 4000
    assert timing.spread >= 0


def test_host_time_is_that_of_one_call():
    assert 900 < benchmark.host_time(sleeper(0.001), 4).us < 3000


def test_a_median_is_not_moved_by_one_slow_call():
    calls = iter([0.02] + [0.0005] * 100)
    assert benchmark.graph_time([lambda: time.sleep(next(calls))]).us < 3000


def test_a_ceiling_of_a_cpu_is_its_fastest_time():
    times = iter([0.0] + [0.02] * 20 + [0.001] + [0.02] * 20)
    assert benchmark._time_of_ceiling(lambda: time.sleep(next(times))) < 5000


def test_the_copy_bandwidth_is_not_lowered_by_slow_copies(monkeypatch):
    monkeypatch.setattr(benchmark, "graph_time", lambda calls: benchmark.Timing(100.0, 3.0, 10.0))
    assert benchmark.copy_bandwidth(1000) == 2 * 1000 / 10.0
    assert benchmark.matmul_rate("bfloat16", 10) == 2 * 10**3 / 10.0
    monkeypatch.setattr(benchmark, "device", lambda: torch.device("cuda"))
    assert benchmark._time_of_ceiling(lambda: None) == 100.0


def test_relative_error():
    wanted = torch.randn(5, 7, dtype=torch.float64)
    assert benchmark.relative_error(wanted, wanted) == 0
    assert benchmark.relative_error(wanted * 1.5, wanted) == pytest.approx(0.5)
    unwritten = wanted.clone()
    unwritten[0, 0] = math.nan
    assert math.isnan(benchmark.relative_error(unwritten, wanted))


def test_a_contender_is_measured():
    x = torch.randn(3, 8)
    good = benchmark.measure(Contender("good", [lambda: x], 1, 1, x.double()))
    assert good["error"] == 0
    assert all(good[key] > 0 for key in ("graph_us", "eager_us", "host_us"))
    assert benchmark.measure(Contender("bad", [lambda: x * 2], 1, 1, x.double()))["error"] == pytest.approx(1)
    assert benchmark.measure(Contender("unknown", [lambda: x], 1, 1))["error"] is None


def test_ceilings_are_positive():
    assert benchmark.copy_bandwidth(1 << 16) > 0
    assert benchmark.matmul_rate("bfloat16", 32) > 0
    assert benchmark.matmul_rate("int8", 32) > 0


def test_copies_are_other_memory_and_equal(monkeypatch):
    monkeypatch.setattr(benchmark, "copies_for", lambda size: 3)
    tensor = torch.randn(4)
    copies = benchmark.copies_of((tensor,))
    assert len({copy[0].data_ptr() for copy in copies}) == 3
    assert all(torch.equal(copy[0], tensor) for copy in copies)
    layer = torch.nn.Linear(3, 2)
    modules = benchmark.modules_of(layer)
    assert modules[0] is layer
    assert len({m.weight.data_ptr() for m in modules}) == 3


def test_weight_only_contenders_are_right_and_there_is_a_bench_of_each():
    assert "wna16" in benchmark.operations()
    for M in (1, 5):
        for one in benchmark.bench_of("wna16").contenders(64, 256, M):
            assert benchmark.relative_error(one.calls[0](), one.reference) < 4e-3
            assert one.flops == 2 * M * 64 * 256
    assert one.bytes == 64 * 256 + 64 * 2


@pytest.mark.parametrize("op", benchmark.operations())
def test_every_operator_has_contenders(op):
    found = benchmark.bench_of(op).contenders(64, 256, 2)
    assert found
    for one in found:
        assert one.calls[0]().shape == (2, 64)
        assert one.bytes > 0
        assert one.reference is None or benchmark.relative_error(one.calls[0](), one.reference) < 0.05


@pytest.mark.gpu
def test_a_graph_is_faster_than_eager_for_small_kernels(monkeypatch):
    monkeypatch.undo()
    x = torch.randn(64, device="cuda")
    calls = [lambda: x + 1] * 20
    assert benchmark.graph_time(calls).us < benchmark.eager_time(calls).us
    assert benchmark.copies_for(1 << 20) > 2


def test_contenders_of_every_operator_are_built_without_triton():
    program = (
        "import importlib, sys\n"
        "sys.modules['triton'] = None  # as on a machine where it is not installed\n"
        "from hf_optim_kernels.common import benchmark\n"
        "for op in sys.argv[1:]:\n"
        "    importlib.import_module(f'hf_optim_kernels.{op}.bench')\n"
        "for op in ('wna16', 'sparse24', 'sparse_attention', 'w8a8'):\n"
        "    assert importlib.import_module(f'hf_optim_kernels.{op}.bench').contenders(64, 64, 4)[0].calls[0]().shape\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *benchmark.operations()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
