"""Configurations predicted for shapes that no table has, their fit to measured times, and tuning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_optim_kernels.common import benchmark, calibrate, choice, tuner, tuning

SMALL = {"KERNEL": "grouped", "BLOCK_M": 64, "BLOCK_N": 64, "SPLIT": 1, "num_warps": 4}
LARGE = {"KERNEL": "grouped", "BLOCK_M": 128, "BLOCK_N": 256, "SPLIT": 1, "num_warps": 8}
SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096), (2560, 9728), (8192, 2048), (28672, 4096)]


def kind(config, terms, resident=1, latency=1.0, splits=(1, 2, 4)):
    return choice.Kind(config, "SPLIT", (65, 1024), (1, 10000), splits, resident, latency, terms)


def test_features_count_rounds_and_bytes():
    # 4 x 64 tiles in 2 parts on 132 multiprocessors: 512 programs.
    found = choice.features(SMALL, 256, 4096, 4096, 2, 132, 1, 1.0)
    assert found == pytest.approx((1, 1.048576, 16.777216, 2.097152, 4, 4 * 2.048))
    # Two programs at a time share a multiprocessor: 264 in the first round, 248 in the second.
    assert choice.features(SMALL, 256, 4096, 4096, 2, 132, 2, 1.0)[4:] == pytest.approx((2, 4 * 2.048))
    # One that is alone takes longer than half of what two take.
    assert choice.features(SMALL, 64, 4096, 4096, 1, 132, 2, 1.5)[4:] == pytest.approx((1, 1.5 * 4.096))
    assert choice.features({"path": "library"}, 128, 256, 1000, 1, 132, 1, 1.0)[4:] == (1, 1)


def test_the_least_predicted_time_is_chosen(monkeypatch):
    cheap = kind(SMALL, (1.0, 0, 0, 0, 0, 1.0))
    monkeypatch.setattr(choice, "kinds", lambda: {"op": (cheap, kind(LARGE, (1.0, 0, 0, 0, 0, 4.0)))})
    assert choice.best("op", 128, 4096, 4096, 132) == SMALL | {"SPLIT": 1}  # 128 programs: one round
    assert choice.best("op", 128, 1024, 4096, 132) == SMALL | {"SPLIT": 4}
    assert choice.best("op", 1024, 14336, 4096, 132)["BLOCK_M"] == 128  # 27 rounds, or 4 of four times the length
    assert choice.best("op", 1024, 14336, 4096, 132, lambda config: config != LARGE)["BLOCK_M"] == 64
    assert choice.best("op", 64, 4096, 4096, 132) is choice.best("another", 128, 4096, 4096, 132) is None


def test_more_parts_than_measured_are_not_predicted(monkeypatch):
    only = choice.Kind(SMALL, "SPLIT", (65, 1024), (100, 300), (1, 2, 4), 1, 1.0, (1.0, 0, 0, 0, 0, 1.0))
    monkeypatch.setattr(choice, "kinds", lambda: {"op": (only,)})
    assert [config["SPLIT"] for _, config in choice.ranked("op", 128, 1024, 4096, 132)] == [4, 1]  # 2 of 64 programs
    assert [config["SPLIT"] for _, config in choice.ranked("op", 128, 1024, 512, 132)] == [1]


def test_the_order_of_names_is_kept(monkeypatch):
    monkeypatch.setattr(choice, "kinds", lambda: {"op": (kind(SMALL, (1.0, 0, 0, 0, 0, 1.0)),)})
    assert list(choice.best("op", 128, 1024, 4096, 132)) == list(SMALL)


def made_up_times(truth):
    """Times that follow kinds exactly, on rows and shapes of a sweep."""
    return [
        {"op": "op", "N": N, "K": K, "M": M, "config": each.config | {"SPLIT": parts},
         "us": each.time(M, N, K, parts, 132)}
        for N, K in SHAPES for M in (128, 256, 512, 1024) for each in truth for parts in (1, 2, 4)
    ]  # fmt: skip


def test_a_fit_finds_the_times_it_was_made_from(tmp_path):
    truth = (kind(SMALL, (4.0, 0.5, 0, 0.2, 1.0, 2.0), 2, 1.3), kind(LARGE, (5.0, 0.5, 0, 0.2, 2.0, 7.0)))
    times = made_up_times(truth)
    found = calibrate.fit(times)
    for time in times:
        config, _, parts = calibrate.split_config(time["config"])
        fitted = next(each for each in found["op"] if each.config == config)
        assert fitted.time(time["M"], time["N"], time["K"], parts, 132) == pytest.approx(time["us"], rel=0.05)
    assert max(calibrate.regrets(times, found)["op"])[0] < 1.02
    path = tmp_path / "choice.json"
    path.write_text(calibrate.dumps(found))
    assert choice.loads(json.loads(path.read_text())) == found


def test_sweeps_are_read_without_failures(tmp_path, capsys):
    times = made_up_times((kind(SMALL, (4.0, 0.5, 0, 0.2, 1.0, 2.0)), kind(LARGE, (5.0, 0.5, 0, 0.2, 2.0, 7.0))))
    first, second, out = tmp_path / "first.json", tmp_path / "second.json", tmp_path / "choice.json"
    first.write_text(json.dumps({"times": times}))
    second.write_text(json.dumps({"times": [times[0] | {"us": "OutOfResources"}, times[1] | {"us": 7.0}]}))
    read = calibrate.read([first, second])
    assert len(read) == len(times) - 1
    assert read[0]["us"] == 7.0
    calibrate.report(read)
    assert "op" in capsys.readouterr().out
    out.write_text(calibrate.dumps(calibrate.fit(read)))
    assert {each.parts for each in choice.loads(json.loads(out.read_text()))["op"]} == {"SPLIT"}


def test_shipped_predictions_name_configurations_that_exist():
    from hf_optim_kernels.llm_int8 import tiles as llm
    from hf_optim_kernels.sparse24 import tiles as sparse
    from hf_optim_kernels.w8a8 import tiles as w8a8
    from hf_optim_kernels.wna16 import launch as wna16

    many = {
        "w4a16": list(wna16.LIBRARY),
        "w8a16": list(wna16.LIBRARY),
        "w8a8-int8": list(w8a8.default(256, 4096, 4096, False)),
        "w8a8-float8": list(w8a8.default(256, 4096, 4096, True)),
        "llm-int8": list(llm.default(256, 4096, 4096)),
        "sparse24": list(sparse.DENSE),
    }
    assert choice.kinds().keys() == many.keys()
    for op, names in many.items():
        for N, K in ((3584, 18944), (8192, 28672), (4608, 3584), (128, 512)):
            for M in (65, 192, 1000):
                ranked = choice.ranked(op, M, N, K, 132)
                assert ranked
                assert all(list(config) == names for _, config in ranked)
                assert all(math.isfinite(us) and us > 0 for us, _ in ranked)


@pytest.fixture
def layer(monkeypatch, tmp_path):
    """A layer with three configurations: one is right, one wrong, one does not run."""
    monkeypatch.setattr(benchmark, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(tuner, "device", lambda: torch.device("cpu"))
    weight = torch.randn(8, 16)

    def calls(x, config):
        if config["BLOCK"] == 3:
            raise RuntimeError("out of resources")
        return [lambda: x @ weight.T * (1 if config["BLOCK"] == 1 else 1.1)]

    return tuner.Tunable(
        "op", (8, 16), torch.float32, lambda rows: torch.randn(rows, 16), calls,
        lambda rows: [{"BLOCK": 2}, {"BLOCK": 3}, {"BLOCK": 1}], lambda x: x.double() @ weight.double().T,
    )  # fmt: skip


def test_wrong_configurations_are_not_timed(layer):
    (_, wrong), (_, failed), (_, right) = tuner.measure(layer, 4)
    assert wrong.startswith("wrong: relative error 1.0e-01")
    assert failed == "RuntimeError: out of resources"
    assert right > 0
    assert [config for config, _ in tuner.measure(layer, 4, [{"BLOCK": 1}])] == [{"BLOCK": 1}]


def test_tuning_remembers_the_fastest_that_is_right(layer, monkeypatch, tmp_path):
    assert "without a CUDA device" in layer.tune(4)
    monkeypatch.setenv("HF_OPTIM_CACHE", str(tmp_path))
    monkeypatch.setattr(tuner, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some Card 80GB")
    assert "{'BLOCK': 1}" in layer.tune(3)
    (path,) = tmp_path.rglob("*.json")
    assert json.loads(path.read_text()) == {"op 8x16x4 float32": {"BLOCK": 1}}
    tuning.table.cache_clear()


@pytest.mark.parametrize("op", ["wna16", "w8a8", "llm_int8", "sparse24"])
def test_products_that_are_tuned_have_candidates_that_compute_them(op, monkeypatch):
    monkeypatch.setattr(benchmark, "device", lambda: torch.device("cpu"))
    found = benchmark.bench_of(op).tunables(64, 256)
    assert found
    for one in found:
        tried = one.candidates(256)
        assert len(tried) > 4
        x = one.inputs(3)
        assert one.reference(x).shape == (3, 64)


def test_shipped_predictions_are_fitted_to_the_published_sweep():
    sweep = Path(__file__).parents[2] / "model_cards" / "kernels" / "sweeps" / "h200.json"
    assert calibrate.dumps(calibrate.fit(calibrate.read([sweep]))) == choice.FILE.read_text(encoding="utf-8")


def test_bench_tunes_every_kind_of_weight(caplog, monkeypatch):
    from hf_optim.evaluation.bench import op_runner
    from hf_optim.evaluation.bench.environment import Deadline

    monkeypatch.setattr(benchmark, "device", lambda: torch.device("cpu"))
    results = SimpleNamespace(left_out=[])
    with caplog.at_level("INFO"):
        op_runner.tune_ops(
            results, ["wna16", "codebook", "llm_int8"], [(64, 256)], [4], torch.bfloat16, Deadline.after(None)
        )
    assert [message.split(": ")[1] for message in caplog.messages] == ["w4a16", "w8a16", "llm-int8"]
    op_runner.tune_ops(results, ["wna16"], [(64, 256)], [4], torch.bfloat16, Deadline.after(-1.0))
    assert results.left_out == ["tuning of wna16 64x256 with 4 rows"]
