"""Configurations predicted for shapes that no table has, their fit to measured times, and tuning."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_optim_kernels.common import benchmark, calibrate, choice, tuner, tuning

SMALL = {"KERNEL": "grouped", "BLOCK_M": 64, "BLOCK_N": 64, "SPLIT": 1, "num_warps": 4}
LARGE = {"KERNEL": "grouped", "BLOCK_M": 128, "BLOCK_N": 256, "SPLIT": 1, "num_warps": 8}
SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096), (2560, 9728), (8192, 2048), (28672, 4096)]


def tile_of(config):
    return config["BLOCK_M"], config["BLOCK_N"]


def kind(config, terms, resident=1, latency=1.0, splits=(1, 2, 4)):
    return choice.Kind(config, tile_of(config), "SPLIT", (65, 1024), (1, 10000), splits, 9728, resident, latency, terms)


def test_features_count_rounds_and_bytes():
    # 4 x 64 tiles in 2 parts on 132 multiprocessors: 512 programs.
    found = choice.features(tile_of(SMALL), 256, 4096, 4096, 2, 132, 1, 1.0)
    assert found == pytest.approx((1, 1.048576, 16.777216, 2.097152, 4, 4 * 2.048))
    # Two programs at a time share a multiprocessor: 264 in the first round, 248 in the second.
    assert choice.features(tile_of(SMALL), 256, 4096, 4096, 2, 132, 2, 1.0)[4:] == pytest.approx((2, 4 * 2.048))
    # One that is alone takes longer than half of what two take.
    assert choice.features(tile_of(SMALL), 64, 4096, 4096, 1, 132, 2, 1.5)[4:] == pytest.approx((1, 1.5 * 4.096))
    assert choice.features((128, 256), 128, 256, 1000, 1, 132, 1, 1.0)[4:] == (1, 1)


def test_the_least_predicted_time_is_chosen(monkeypatch):
    cheap = kind(SMALL, (1.0, 0, 0, 0, 0, 1.0))
    monkeypatch.setattr(choice, "kinds", lambda: {"op": (cheap, kind(LARGE, (1.0, 0, 0, 0, 0, 4.0)))})
    assert choice.best("op", 128, 4096, 4096, 132) == SMALL | {"SPLIT": 1}  # 128 programs: one round
    assert choice.best("op", 128, 1024, 4096, 132) == SMALL | {"SPLIT": 4}
    assert choice.best("op", 1024, 14336, 4096, 132)["BLOCK_M"] == 128  # 27 rounds, or 4 of four times the length
    assert choice.best("op", 1024, 14336, 4096, 132, lambda config: config != LARGE)["BLOCK_M"] == 64
    assert choice.best("op", 64, 4096, 4096, 132) is choice.best("another", 128, 4096, 4096, 132) is None


def test_more_parts_than_measured_are_not_predicted(monkeypatch):
    only = choice.Kind(
        SMALL, tile_of(SMALL), "SPLIT", (65, 1024), (100, 300), (1, 2, 4), 4096, 1, 1.0, (1.0, 0, 0, 0, 0, 1.0)
    )
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


def test_the_tile_of_a_library_is_fitted(tmp_path):
    """Times rise where programs no longer fit on all multiprocessors at once: at another shape for each tile."""
    library = {"path": "library", "BLOCK_M": 0, "BLOCK_N": 0, "algorithm": 3}
    truth = choice.Kind(
        library, (64, 128), None, (65, 1024), (1, 10000), (1,), 14336, 1, 1.0, (6.0, 0.5, 0, 0, 2.0, 4.0)
    )
    times = [
        {"op": "op", "N": N, "K": K, "M": M, "config": library, "us": truth.time(M, N, K, 1, 132)}
        for N, K in SHAPES for M in (128, 256, 512, 1024)
    ]  # fmt: skip
    (found,) = calibrate.fit(times)["op"]
    assert found.tile == (64, 128)
    # So are those of a product that chooses for itself; of a dense one beside others they are not looked for.
    for name, tile in (("library", (64, 128)), ("torch", calibrate.LIBRARY_TILES[0])):
        chooses = [time | {"config": {"KERNEL": name, "BLOCK_M": 0, "BLOCK_N": 0}} for time in times]
        assert calibrate.fit(chooses)["op"][0].tile == tile


def test_columns_far_beyond_those_measured_are_left_to_kinds_that_were_measured_on_more(monkeypatch):
    fast, slow = kind(SMALL, (1.0, 0, 0, 0, 0, 1.0)), kind(LARGE, (1.0, 0, 0, 0, 0, 9.0))
    few, many = dataclasses.replace(fast, columns=4096), dataclasses.replace(slow, columns=14336)
    monkeypatch.setattr(choice, "kinds", lambda: {"op": (few, many), "alone": (few,)})
    assert choice.best("op", 128, 4096, 8192, 132)["BLOCK_M"] == 64
    assert choice.best("op", 128, 4096, 8193, 132)["BLOCK_M"] == 128
    assert choice.best("op", 128, 4096, 8193, 132, lambda config: config != LARGE)["BLOCK_M"] == 64
    assert choice.best("alone", 128, 4096, 28672, 132)["BLOCK_M"] == 64


def test_kernels_that_decode_for_every_block_of_rows_are_predicted_for_few():
    decodes = LARGE | {"KERNEL": "specialized"}
    truth = kind(decodes, (5.0, 0.5, 0, 0.2, 2.0, 7.0), splits=(1,))
    times = [
        {"op": "op", "N": N, "K": K, "M": M, "config": decodes, "us": truth.time(M, N, K, 1, 132)}
        for N, K in SHAPES for M in (512, 1024, 2048, 4096)
    ]  # fmt: skip
    kinds = calibrate.fit(times)
    assert kinds["op"][0].rows == (257, 1024)
    assert {where.split("M=")[1] for _, where in calibrate.regrets(times, kinds)["op"]} == {"512", "1024"}


def test_many_rows_are_predicted_beyond_those_measured():
    truth = kind(LARGE, (5.0, 0.5, 0, 0.2, 2.0, 7.0), splits=(1,))
    few = made_up_times((truth,))
    assert calibrate.fit(few)["op"][0].rows == (65, 1024)
    many = [
        {"op": "op", "N": N, "K": K, "M": M, "config": LARGE, "us": truth.time(M, N, K, 1, 132)}
        for N, K in SHAPES for M in (512, 4096)
    ]  # fmt: skip
    assert calibrate.fit(many)["op"][0].rows == (257, 16384)


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


def test_every_operator_that_is_timed_is_tuned():
    missing = [op for op in benchmark.operations() if not hasattr(benchmark.bench_of(op), "tunables")]
    assert missing == []


# Outputs and inputs of a layer as each operator reads them, and the shape of its reference with 3 rows.
OTHERS = {
    "codebook": ((64, 1024), (3, 64)), "dense_row": ((64, 4096), (64,)), "hadamard": ((64, 64), (3, 64)),
    "kd_loss": ((64, 64), (3, 64)), "sparse_ffn": ((64, 32), (3, 64)), "experts": ((32, 64), (3, 32)),
    "decode_attention": ((512, 96), (3, 512)), "kv_cache": ((512, 320), (3, 512)),
}  # fmt: skip


@pytest.mark.parametrize("op", OTHERS)
def test_settings_of_other_operators_compute_what_they_are_compared_with(op, monkeypatch):
    monkeypatch.setattr(benchmark, "device", lambda: torch.device("cpu"))
    (N, K), shape = OTHERS[op]
    rows = 1 if op == "dense_row" else 3
    for one in benchmark.bench_of(op).tunables(N, K, torch.float32 if op != "dense_row" else torch.float16):
        tried = one.candidates(rows)
        assert len(tried) > 1
        assert all(config.keys() == tried[0].keys() for config in tried)
        x = one.inputs(rows)
        wanted = one.reference(x)
        assert wanted.shape == shape
        if op == "dense_row":
            continue
        found = one.calls(x, tried[0])[0]() if op not in NEED_TRITON else None
        if found is not None:
            assert benchmark.relative_error(found, wanted) < 1e-5


# Their calls are launches, not operators with a specification for the CPU.
NEED_TRITON = ("codebook", "sparse_ffn")


def test_gradients_of_attention_under_a_pattern_are_tuned(monkeypatch):
    monkeypatch.setattr(benchmark, "device", lambda: torch.device("cpu"))
    found = benchmark.bench_of("sparse_attention").tunables(128, 40, torch.float32)
    assert [one.op.rsplit("_", 1)[1] for one in found] == ["forward", "queries", "keys"]
    for one in found:
        x = one.inputs(96)
        assert benchmark.relative_error(one.calls(x, one.candidates(96)[0])[0](), one.reference(x)) < 1e-5


def test_a_setting_that_is_forced_is_chosen_and_gone_afterwards():
    def choose():
        return tuning.choose("some-op", (1, 1), 1, torch.float16, torch.device("cpu"), lambda rows: {"N": 1})

    with tuning.forced("some-op", {"N": 2}):
        assert choose() == {"N": 2}
        with tuning.forced("some-op", {"N": 3}):
            assert choose() == {"N": 3}
        assert choose() == {"N": 2}
    assert choose() == {"N": 1}


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


def test_shipped_predictions_are_fitted_to_the_published_sweeps():
    sweeps = sorted((Path(__file__).parents[2] / "model_cards" / "kernels" / "sweeps").glob("*.json"))
    assert calibrate.dumps(calibrate.fit(calibrate.read(sweeps))) == choice.FILE.read_text(encoding="utf-8")


def test_what_the_choice_loses_on_layers_that_its_fit_has_not_seen():
    """The bounds are what the fit before lost, 1.066 and 1.051 in the mean with the same times, less a part."""
    sweeps = sorted((Path(__file__).parents[2] / "model_cards" / "kernels" / "sweeps").glob("*.json"))
    times = [time for time in calibrate.read(sweeps) if time["op"] in ("w4a16", "w8a16")]
    lost = {"w4a16": [], "w8a16": []}
    for shape in SHAPES:
        kinds = calibrate.fit([time for time in times if (time["N"], time["K"]) != shape])
        for op, each in calibrate.regrets([t for t in times if (t["N"], t["K"]) == shape], kinds).items():
            lost[op] += [value for value, _ in each]
    assert {op: len(each) for op, each in lost.items()} == {"w4a16": 32, "w8a16": 32}
    assert max(statistics.fmean(each) for each in lost.values()) < 1.03


def test_bench_tunes_every_kind_of_weight(caplog, monkeypatch):
    from hf_optim.evaluation.bench import op_runner
    from hf_optim.evaluation.bench.environment import Deadline

    monkeypatch.setattr(benchmark, "device", lambda: torch.device("cpu"))
    results = SimpleNamespace(left_out=[])
    with caplog.at_level("INFO"):
        op_runner.tune_ops(
            results, ["wna16", "dense_row", "llm_int8"], [(64, 256)], [4], torch.bfloat16, Deadline.after(None)
        )
    named = ["w4a16", "w8a16", "nvfp4", "mxfp4", "dense-row", "llm-int8"]
    assert [message.split(": ")[1] for message in caplog.messages] == named
    op_runner.tune_ops(results, ["wna16"], [(64, 256)], [4], torch.bfloat16, Deadline.after(-1.0))
    assert results.left_out == ["tuning of wna16 64x256 with 4 rows"]
