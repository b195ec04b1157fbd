"""The benchmark command: rows, goals, slower rows, files, the time limit, and whole models."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from hf_optim.cli import main
from hf_optim.errors import OptimError
from hf_optim.evaluation.bench import decode, environment, model_runner, models, op_runner, peers, roofline, table
from hf_optim.evaluation.bench.goals import find_decode_goal, find_goal
from hf_optim.evaluation.bench.results import DecodeResult, OpResult, Results

H100 = {"copy": 3e6, "bfloat16": 797e6, "int8": 975e6}
BYTES = 14336 * 4096 // 2 + 14336 * 32 * 2


def row(contender="w4a16", role="ours", **more):
    problem = {
        "op": "wna16",
        "N": 14336,
        "K": 4096,
        "M": 1,
        "dtype": "bfloat16",
        "bytes": BYTES,
        "flops": 2 * 14336 * 4096,
    }
    floor = BYTES / 3e6
    return OpResult(**{**problem, "contender": contender, "role": role, "graph_us": 15.0, "floor_us": floor, **more})


def results(*rows, device="NVIDIA H100 80GB HBM3", ceilings=H100, **more):
    return Results(device, "580", {"torch": "2.11"}, ceilings, "2026-11-22", "hf-optim bench", list(rows), **more)


def test_what_was_measured_is_kept_when_a_run_is_interrupted(tmp_path, monkeypatch):
    counts = []

    def measured(op, N, K, M, *rest):
        counts.append(M)
        if len(counts) == 3:
            raise KeyboardInterrupt
        yield row(M=M, N=N, K=K)

    monkeypatch.setattr(op_runner, "_time_contenders", measured)
    asked = ["bench", "--op", "wna16", "--shape", "64x64", "--output", str(tmp_path), "--rows"]
    assert main([*asked, "1", "16", "64"]) == 130
    assert [kept.M for kept in Results.load(tmp_path).rows] == [1, 16]
    counts[:] = [0] * 3
    main([*asked, "64", "--append"])
    assert [kept.M for kept in Results.load(tmp_path).rows] == [1, 16, 64]


def test_a_goal_on_its_own_card_is_in_microseconds():
    assert find_goal(row(graph_us=15.9), results()).met is True
    assert find_goal(row(graph_us=16.1), results()).met is False
    assert find_goal(row(graph_us=None), results()).met is None
    assert find_goal(row("dense", "dense"), results()) is None
    assert find_goal(row(M=2), results()) is None


def test_a_goal_on_another_card_is_the_same_share_of_the_floor():
    card = results(device="NVIDIA H200", ceilings={**H100, "copy": 4.5e6})
    # 10.1 us of 16 there; here the floor is 6.7 us, so the goal is 10.7 us.
    floor = BYTES / 4.5e6
    assert find_goal(row(graph_us=floor * 16 / (BYTES / 3e6) * 0.99, floor_us=floor), card).met is True
    assert find_goal(row(graph_us=floor * 16 / (BYTES / 3e6) * 1.01, floor_us=floor), card).met is False


def test_goals_of_decoding():
    fast = DecodeResult("llama-3-8b", "w4a16", "static", 1, ms=3.0)
    assert find_decode_goal(fast, results()).met is True
    assert find_decode_goal(fast, results(device="H200", ceilings={**H100, "copy": 4.5e6})).met is False
    assert find_decode_goal(dataclasses.replace(fast, batch=2), results()) is None


def test_slower_rows_are_marked_and_failures_are_published():
    slow = row(graph_us=60.0, error=1e-3)
    dense = row("dense", "dense", graph_us=55.0, bytes=4 * BYTES)
    lean = row("a leaner peer", "peer", graph_us=10.0, bytes=BYTES // 2)
    broken = row("broken", "peer", graph_us=None, failure="TypeError: no | such kernel")
    page = table.render(results(slow, dense, lean, broken, left_out=["w8a8 1x1 with 4 rows"]))
    assert table.faster_contenders(slow, results(slow, dense, lean)) == ["dense"]
    assert table.faster_contenders(row(graph_us=55.5), results(row(), dense)) == []
    assert "**dense**" in page
    assert "TypeError: no / such kernel" in page
    assert "w8a8 1x1 with 4 rows" in page
    assert "**missed**" in page
    assert table.speedup_over_dense(slow, results(slow, dense)) == pytest.approx(55 / 60)


def test_a_time_below_its_floor_is_marked_and_explained():
    floor = BYTES / 3e6
    within = results(row(), decode=[DecodeResult("tiny", "dense", "static", 1, ms=2.0, floor_ms=1.0)])
    assert "†" not in table.render(within)
    page = table.render(results(row(graph_us=floor / 2.43), row("dense", "dense", graph_us=floor * 2)))
    assert "| 243 % † |" in page
    assert "| 50 % |" in page
    assert page.count("†: faster than the floor") == 1
    fast = results(decode=[DecodeResult("tiny", "dense", "static", 1, ms=2.0, floor_ms=2.5)])
    assert "| 125 % † |" in table.render(fast)
    assert "†: faster than the floor" in table.render(fast)
    # Noise of the measured ceilings is not an event.
    assert "†" not in table.render(results(row(graph_us=floor / 1.01)))


def texts_of_roofline(monkeypatch, tmp_path, found):
    kept = []
    monkeypatch.setattr(roofline, "save", lambda figure, path: kept.append(figure) or path)
    roofline.roofline(found, tmp_path / "roofline.png")
    (figure,) = kept
    return figure.get_suptitle(), [note.get_text() for axes in figure.axes for note in axes.texts]


def test_the_roofline_explains_points_above_it_and_labels_equal_ceilings_once(monkeypatch, tmp_path):
    title, labels = texts_of_roofline(monkeypatch, tmp_path, results(row()))
    assert title == "NVIDIA H100 80GB HBM3"
    assert labels == ["bfloat16", "int8"]
    equal = {"copy": 3e6, "bfloat16": 793e6, "int8": 793e6}
    title, labels = texts_of_roofline(monkeypatch, tmp_path, results(row(graph_us=1.0), ceilings=equal))
    assert "above the lines: the weight was read from caches" in title
    assert labels == ["bfloat16, int8"]


def test_results_come_back_from_their_file(tmp_path):
    found = results(
        row(error=float("nan")), decode=[DecodeResult("tiny", "dense", "static", 1, ms=2.0, kernels={"a": 3})]
    )
    table.publish(found, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "README.md", "roofline.png"}
    again = Results.load(tmp_path)
    assert again.rows[0].error is None
    assert dataclasses.replace(again.rows[0], error=0) == dataclasses.replace(found.rows[0], error=0)
    assert again.decode == found.decode
    json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("text", ["{", '{"schema": 99}', '{"schema": 1}'])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(OptimError):
        Results.load(tmp_path)


def test_results_are_merged_by_problem():
    old = results(row(graph_us=20.0), row("dense", "dense"))
    new = results(row(graph_us=15.0))
    assert [(r.contender, r.graph_us) for r in new.merged_after(old).rows] == [("dense", 15.0), ("w4a16", 15.0)]
    with pytest.raises(OptimError, match="device"):
        new.merged_after(results(row(), device="another"))


def test_a_run_has_ours_and_dense_and_is_right():
    found = results(ceilings={"copy": 1e4, "bfloat16": 1e5, "int8": 1e5})
    op_runner.run_ops(found, ["wna16"], [(64, 256)], [2])
    assert [r.role for r in found.rows] == ["ours", "ours", "dense"]
    for one in found.rows:
        assert one.failure == ""
        assert one.error < 4e-3
        assert one.graph_us > 0
        assert one.floor_us > 0


def test_a_failing_peer_is_a_row(monkeypatch):
    def prepare(weight):
        raise RuntimeError("no such layout")

    broken = peers.Peer("broken", None, ("wna16",), 4, prepare)
    absent = peers.Peer("absent", "no_such_package_here", ("wna16",), 4, prepare)
    monkeypatch.setattr(peers, "PEERS", (broken, absent))
    found = results()
    op_runner.run_ops(found, ["wna16"], [(64, 256)], [1], with_peers=True)
    assert found.rows[-1].failure == "RuntimeError: no such layout"
    assert "absent" not in {r.contender for r in found.rows}


def test_nothing_starts_after_the_time_limit():
    found = results()
    op_runner.run_ops(found, ["wna16"], [(64, 256)], [1, 2], deadline=environment.Deadline(0.0, -1.0))
    model_runner.run_models(found, "tiny", deadline=environment.Deadline(0.0, -1.0))
    assert found.rows == found.decode == found.prefill == []
    assert len(found.left_out) == 2 + len(models.SCHEMES)


def test_int4_codes_and_pruning():
    weight = torch.randn(8, 256)
    codes, scale, offset = peers.quantize_int4(weight)
    again = (codes.view(8, 2, 128).float() - 8) * scale[..., None] + offset[..., None]
    assert (again.view(8, 256) - weight).abs().max() <= scale.max() / 2 + 1e-6
    assert (peers.prune24(weight).view(-1, 4) != 0).sum(1).eq(2).all()


# Which schemes have a CPU kernel is tested elsewhere.
@pytest.mark.filterwarnings("ignore:these layers run on dense kernels")
@pytest.mark.parametrize("scheme", models.SCHEMES)
def test_a_model_is_built_under_every_scheme(scheme):
    made = models.build("tiny", scheme, torch.float32, torch.device("cpu"))
    assert not any(t.is_meta for t in (*made.parameters(), *made.buffers()))
    fresh = type(made)(made.config)
    torch.testing.assert_close(made.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)
    ids = torch.randint(0, 512, (2, 9))
    logits = made(ids).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0
    if scheme == "2:4":
        assert (made.model.layers[1].mlp.up_proj.weight.view(-1, 4) != 0).sum(1).le(2).all()


@pytest.mark.parametrize("mode", decode.CPU_MODES)
def test_decoding_is_timed(mode, caplog):
    found = results()
    caplog.set_level("INFO", "hf_optim")
    model_runner.run_models(found, "tiny", ["dense"], model_runner.ModelBenchSettings([mode], [2], 6), torch.float32)
    (one,) = found.decode
    assert one.failure == ""
    assert caplog.messages[-1] == f"{one.name}: {one.ms:.2f} ms"
    assert 0 < one.ms <= one.overall_ms * 6
    assert one.batch == 2
    assert one.weights_gb > 0


def test_what_a_cpu_does_not_compile_is_said_and_not_measured(caplog):
    found = results()
    settings = model_runner.ModelBenchSettings(["unguarded"], [2], 6)
    model_runner.run_models(found, "tiny", ["dense"], settings, torch.float32)
    assert "compiles no generation on a CPU" in found.decode[0].failure


def test_a_scheme_that_cannot_be_built_is_a_row():
    found = results()
    model_runner.run_models(found, "tiny", ["w5a5"], model_runner.ModelBenchSettings(["static"], prompts=[9]))
    assert "no scheme 'w5a5'" in found.decode[0].failure
    assert "no scheme 'w5a5'" in found.prefill[0].failure


@pytest.mark.filterwarnings("ignore:these layers run on dense kernels")
def test_prefill_is_timed_and_compared_with_the_dense_model(tmp_path):
    found = results()
    model_runner.run_models(
        found, "tiny", ["dense", "2:4"], model_runner.ModelBenchSettings([], [2], prompts=[9, 33]), torch.float32
    )
    assert [(row.scheme, row.batch, row.tokens) for row in found.prefill] == [
        (scheme, 2, tokens) for scheme in ("dense", "2:4") for tokens in (9, 33)
    ]
    assert [row.failure for row in found.prefill] == [""] * 4
    assert all(row.ms > 0 for row in found.prefill)
    found.save(tmp_path)
    assert Results.load(tmp_path).prefill == found.prefill
    again = dataclasses.replace(found, prefill=found.prefill[:1]).merged_after(found)
    assert sorted(again.prefill, key=str) == sorted(found.prefill, key=str)
    dense, sparse = found.prefill[0], found.prefill[2]
    line = next(line for line in table.render(found).splitlines() if "| 2:4 | 2 | 9 |" in line)
    assert f"| {sparse.ms:.2f} | {18e3 / sparse.ms:.0f} | {dense.ms / sparse.ms:.2f} |" in line


def test_results_from_before_prefill_are_read(tmp_path):
    data = results().to_json()
    del data["prefill"]
    assert Results.from_json(data).prefill == []


def test_the_command(tmp_path, capsys):
    quick = ["bench", "--op", "wna16", "--shape", "64x256", "--rows", "1"]
    assert main([*quick, "--output", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {r["contender"] for r in printed["rows"]} == {"w4a16", "w8a16", "dense"}
    assert str(tmp_path) not in printed["command"]
    (tmp_path / "README.md").unlink()
    assert main(["bench", "--render", str(tmp_path)]) == 0
    assert "w4a16" in (tmp_path / "README.md").read_text()
    assert main(["bench", "--op", "nothing"]) == 2
    assert "no operator 'nothing'" in capsys.readouterr().err
    assert main(["bench", "--list"]) == 0
    assert "bitsandbytes" in capsys.readouterr().out


def cpu_results(*rows, **more):
    return Results(
        "a CPU, 2 threads", "", {"torch": "2.11"}, {"copy": 2.9e3, "int8": 1e5}, "2026-11-22", "c", list(rows), **more
    )


def test_a_page_of_a_cpu_has_only_columns_that_mean_something_there():
    timed = {"eager_us": 17.0, "host_us": 16.0, "spread": 0.25, "error": 1e-3}
    fast = row(graph_us=1234.5, **timed)
    decode = [DecodeResult("tiny", "w4a16", "dynamic", 1, ms=2.0, floor_ms=1.0, weights_gb=0.5, warmup_s=1.0)]
    page = table.render(cpu_results(fast, row("dense", "dense", graph_us=2000.0, **timed), decode=decode))
    heads = [line for line in page.splitlines() if line.startswith(("| M |", "| model |"))]
    assert heads == [
        "| model | scheme | cache | batch | ms per token | overall | weights GB | warm-up s |",
        "| M | contender | us | spread | x dense | error |",
    ]
    assert "| 1 | **w4a16** | 1,234.5 | 25 % | 1.62 | 1.0e-03 |" in page
    assert "None of hf_optim's 1 measurements was slower than the dense product or another library." in page
    assert "copy 2.9 GB/s" in page
    assert "graph" not in page
    assert "floor" not in page


def test_the_page_says_in_words_how_many_measurements_lost():
    slow, dense = row(graph_us=60.0), row("dense", "dense", graph_us=55.0, bytes=4 * BYTES)
    broken = row("w8a16", graph_us=None, failure="no kernel")
    page = table.render(results(slow, dense, broken))
    assert (
        "1 of hf_optim's 2 measurements was slower than the dense product or another library (last column); 1 failed."
        in page
    )
    assert (
        "| M | contender | graph us | spread | eager us | host us | % of floor | x dense | error | goal | lost to |"
        in page
    )


def test_a_run_in_which_all_of_ours_failed_is_an_error(monkeypatch, capsys):
    def broken(*_):
        raise ImportError("no module 'triton'")

    monkeypatch.setattr(environment.timing_tools().bench_of("wna16"), "contenders", broken)
    assert main(["bench", "--op", "wna16", "--shape", "64x256", "--rows", "1"]) == 2
    printed = capsys.readouterr()
    assert "All of hf_optim's 1 measurements failed: nothing is compared." in printed.out
    assert "hf-optim: all 1 measurements failed, the first with: ImportError: no module 'triton'" in printed.err


def test_the_layers_of_a_model_are_counted_by_kernel():
    kernels = {"int4 (CPU), 4-bit codes": 10, "int4 (CPU), 4-bit codes, with k_proj, v_proj": 5, "dense": 1}
    page = table.render(cpu_results(decode=[DecodeResult("tiny", "w4a16", "static", 1, ms=2.0, kernels=kernels)]))
    assert "| 15 int4 (CPU), 1 dense |" in page


def test_generate_is_timed_on_a_cpu_as_the_loop_that_runs_there(monkeypatch):
    """Both numbers are medians over the steps of a call: the rest of a call, and a pause in it, is not a step's."""
    model = models.build("tiny", "dense", torch.float32, torch.device("cpu"))
    seen = []
    monkeypatch.setattr(decode.StepTimer, "step_ms", lambda self: seen.append(len(self.times)) or 7.0)
    graph, dynamic = (decode.measure(model, mode, 1, 12) for mode in ("graph", "dynamic"))
    assert graph["ms"] == dynamic["ms"] == 7.0
    assert set(seen) == {12}
    assert 0 < graph["first_ms"] < graph["warmup_s"] * 1e3 + 1e3


def test_the_legend_of_the_roofline_is_beside_the_points(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(roofline, "save", lambda figure, path: kept.append(figure) or path)
    roofline.roofline(results(row(), row("dense", "dense"), row(M=64)), tmp_path / "roofline.png")
    (figure,) = kept
    figure.canvas.draw()
    for axes in figure.axes:
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
