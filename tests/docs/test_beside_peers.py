"""The comparison with other tools: its cells, how it goes on, its verdicts, and the page that follows from them."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from tiny_models import TINY, tiny_llama
from tiny_tokenizer import tiny_tokenizer

HOME = ROOT / "model_cards" / "quantization"
MODULES = ("peer_cells", "peer_verdicts", "peer_runner", "our_runner", "peer_subjects", "beside_peers_page")


@pytest.fixture
def parts(monkeypatch):
    """The modules of the example by name."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "quantization"))
    return {name: importlib.import_module(name) for name in MODULES}


def result(quality, **fields):
    return {"quality": quality, "processor_seconds": 2.0, "peak_bytes": 3e6, "versions": {"torch": "1"}, **fields}


def filled(parts, quality):
    """Results of all cells with groups; ``quality(cell)`` is the figure, or a reason."""
    cells = {}
    for cell in parts["peer_cells"].all_cells(groups=[32]):
        value = quality(cell)
        cells[cell.key] = {"failed": value} if isinstance(value, str) else result(value)
    return cells


# -- cells ------------------------------------------------------------------------------------------------------------
def test_the_telling_cells_come_first(parts):
    cells = parts["peer_cells"].all_cells()
    assert len({cell.key for cell in cells}) == len(cells) == 4 * 3 * 2 * 7 * 3
    first = cells[: 4 * 3 * 5]  # one draw of each method that is not left for later, the other tools' first
    assert {(cell.group, cell.draw) for cell in first} == {(32, 0)}
    assert {cell.method for cell in first[:24]} == {"AutoRound", "llm-compressor GPTQ"}
    assert all(cell.group is None for cell in cells[len(cells) // 2 :])
    assert {cell.bits for cell in cells if cell.symmetric} == {4, 3}


def test_groups_divide_the_width(parts):
    size = parts["peer_cells"].group_size_of
    assert [size(128, 32), size(172, 32), size(24, 32), size(7, None)] == [32, 4, 24, 7]


def test_patterns_name_something(parts):
    matching = parts["peer_cells"].matching
    assert matching(("gptq", "AutoRound"), ["A*"]) == ["AutoRound"]
    with pytest.raises(SystemExit, match="gptq; AutoRound"):
        matching(("gptq", "AutoRound"), ["awq"])


def test_results_go_on(parts, tmp_path):
    cells = parts["peer_cells"].all_cells()
    first, second, third = cells[:3]
    path = tmp_path / "found.json"
    results = parts["peer_cells"].Results(path)
    results.set_dense(first.subject, 2.0, "abc")
    results.add(first, result(2.5))
    results.add(second, {"failed": "it refused"})
    again = parts["peer_cells"].Results(path)
    assert again.cells == results.cells
    assert json.loads(path.read_text())["dense"] == {first.subject: {"quality": 2.0, "weights": "abc"}}
    assert list(again.missing([first, second, third])) == [third]
    assert list(again.missing([first, second, third], again=True)) == [second, third]
    with pytest.raises(SystemExit, match="of other weights"):
        again.set_dense(first.subject, 2.0, "abd")


# -- verdicts ---------------------------------------------------------------------------------------------------------
def test_a_win_is_by_the_means_and_a_clear_one_by_more_than_the_spread(parts):
    verdicts = parts["peer_verdicts"]

    def quality(cell):  # perplexity: a spread of 0.2 in every method
        base = {"best": 3.0, "AutoRound": 3.1, "llm-compressor GPTQ": 3.5}.get(cell.method, 4.0)
        return base + 0.1 * cell.draw

    found = verdicts.judge(filled(parts, quality), "babyllama-1m", 4, 32, "best")
    assert found.won
    assert not found.clear  # by 0.1 ahead of AutoRound
    behind = verdicts.judge(filled(parts, quality), "babyllama-1m", 4, 32, "gptq")
    assert not behind.won
    assert behind.worse == {"AutoRound": pytest.approx((3.2, 4.1)), "llm-compressor GPTQ": pytest.approx((3.6, 4.1))}
    # The same figures as correlations: higher is better.
    found = verdicts.judge(filled(parts, quality), "MiniLM, STS-B", 4, 32, "gptq")
    assert found.won
    assert not found.clear  # level with AWQ


def test_a_single_draw_of_ours_wins_nothing_clearly(parts):
    cells = filled(parts, lambda cell: 1.0 + 0.1 * cell.draw + 2.0 * (cell.method != "best"))
    judge = parts["peer_verdicts"].judge
    for key in [key for key in cells if "AWQ" in key and not key.endswith(" 0")]:
        del cells[key]  # a tool's spread is then ours
    assert judge(cells, "babyllama-1m", 4, 32, "best").clear
    for draw in (1, 2):
        del cells[f"babyllama-1m | 4 | 32 | best | {draw}"]
    found = judge(cells, "babyllama-1m", 4, 32, "best")
    assert found.won
    assert not found.clear


def test_only_draws_that_both_have_are_compared(parts):
    cells = filled(parts, lambda cell: 3.0 + cell.draw * (cell.method == "best"))
    assert parts["peer_verdicts"].judge(cells, "stories260k", 3, 32, "best").worse["AutoRound"] == (3.0, 4.0)
    for key in [key for key in cells if "AutoRound" in key and not key.endswith(" 0")]:
        del cells[key]
    assert "AutoRound" not in parts["peer_verdicts"].judge(cells, "stories260k", 3, 32, "best").worse


def test_what_is_not_measured_decides_nothing(parts):
    verdicts = parts["peer_verdicts"]

    def quality(cell):
        if cell.method == "AutoRound":
            return "ValueError: no such model"
        if cell.method.startswith("llm") and cell.subject == "SST-2 classifier":
            return "TypeError: not this one"
        return 1.0 if cell.method == "best" else 2.0

    cells = filled(parts, quality)
    found = {(v.subject, v.bits): v for v in verdicts.judge_all(cells, 32, "best")}
    assert found["babyllama-1m", 2].won  # against the two that can
    assert found["SST-2 classifier", 2].missing == parts["peer_cells"].PEERS  # none of them can: no win
    for key in [key for key in cells if "stories260k | 4" in key and "GPTQ" in key]:
        del cells[key]
    assert verdicts.judge(cells, "stories260k", 4, 32, "best").missing == ("llm-compressor GPTQ",)
    assert not verdicts.judge(cells, "stories260k", 4, None, "best").decided


@pytest.mark.parametrize(("won", "undecided", "state"), [(10, 0, "met"), (9, 3, "open"), (9, 0, "missed")])
def test_the_goal_is_met_missed_or_open(parts, won, undecided, state):
    verdict = parts["peer_verdicts"].Verdict
    made = [verdict("m", 4, (), {}, True)] * won + [verdict("m", 4, ("AutoRound",), {}, True)] * undecided
    made += [verdict("m", 4, (), {"AutoRound": (1.0, 2.0)}, False)] * (12 - len(made))
    assert f"is {state}." in parts["peer_verdicts"].goal(made)
    text = parts["peer_verdicts"].summary(made, 32, "best")
    assert f"in {won} of 12 cells, clearly better in {won}" in text
    assert ("not decided" in text) == bool(undecided)
    assert ("AutoRound 1.0000, ours 2.0000" in text) == (won + undecided < 12)


def test_the_bars_on_one_model_are_met_missed_or_open(parts):
    bars = parts["peer_verdicts"].bars

    def quality(cell):
        return {4: 2.246, 3: 2.32, 2: 2.9}[cell.bits] + 0.001 * cell.draw

    cells = filled(parts, quality)
    cells.pop("babyllama-1m | 2 | 32 | best | 1")
    for key in cells:
        if "| AutoRound |" in key:
            cells[key]["processor_seconds"] = 1.4
    cells["babyllama-1m | 4 | 32 | AutoRound | 0"] |= {"processor_seconds": 90.0, "machine": "another"}
    assert bars(cells) == [
        "- Perplexity of at most 2.248 at 4 bits: 2.2470 in 3 draws, met.",
        "- Perplexity of at most 2.315 at 3 bits: 2.3210 in 3 draws, missed.",
        "- Perplexity of at most 3.000 at 2 bits: 2.9010 in 2 draws, open.",
        "- No more time than AutoRound: 2 s in the median, 1 s, in 7 cells that one machine computed for both, missed.",
    ]
    assert bars({}) == [
        f"- Perplexity of at most {m} at {b} bits: not run, open."
        for b, m in ((4, "2.248"), (3, "2.315"), (2, "3.000"))
    ]


def test_what_is_better_than_the_model_itself_is_told(parts):
    cells = filled(parts, lambda cell: 2.0 + 0.01 * cell.draw)
    dense = {"babyllama-1m": {"quality": 2.02}, "MiniLM, STS-B": {"quality": 1.98}}
    above = parts["peer_verdicts"].above_dense
    assert above(cells, dense, ["gptq"]) == [
        f"MiniLM, STS-B at {bits} bits (1.9800): gptq 2.0100" for bits in (4, 3, 2)
    ]
    dense["MiniLM, STS-B"]["quality"] = 1.995  # within the spread
    assert above(cells, dense, ["gptq"]) == []


# -- the page ---------------------------------------------------------------------------------------------------------
def test_tables_have_means_spreads_and_reasons(parts):
    cells = filled(
        parts,
        lambda cell: "ValueError: odd" if cell.method.endswith("AWQ") else 2.0 + 0.01 * cell.draw + (not cell.ours),
    )
    cells.pop("babyllama-1m | 3 | 32 | gptq | 2")
    text = parts["beside_peers_page"].page({"cells": cells, "dense": {"babyllama-1m": {"quality": 1.5, "weights": ""}}})
    row = next(line for line in text.splitlines() if line.startswith("| ours: gptq "))
    assert row == "| ours: gptq | **2.0100 ± 0.0100** | **2.0050 ± 0.0050 (2)** | **2.0100 ± 0.0100** | 2 | 3 |"
    assert "| llm-compressor AWQ | not possible | not possible | not possible |  |  |" in text
    assert "- llm-compressor AWQ: ValueError: odd (babyllama-1m, groups of 32: 4, 3, 2 bits; stories260k" in text
    assert "Dense 1.5000; lower is better." in text


def test_one_method_alone_is_neither_the_best_nor_a_panel(parts):
    page = parts["beside_peers_page"]
    alone = {f"babyllama-1m | {bits} | channel | gptq | 0": result(2.0) for bits in (4, 3)}
    assert "| ours: gptq | 2.0000 (1) | 2.0000 (1) |  | 2 | 3 |" in page.page({"cells": alone, "dense": {}})
    assert not page._has_a_line(alone, "babyllama-1m", None)
    both = alone | {"babyllama-1m | 4 | channel | AutoRound | 0": result(3.0)}
    assert "| ours: gptq | **2.0000 (1)** | 2.0000 (1) |  | 2 | 3 |" in page.page({"cells": both, "dense": {}})
    assert page._has_a_line(both, "babyllama-1m", None)


def test_the_steps_of_the_best_recipe_are_told(parts):
    page = parts["beside_peers_page"].page
    step = {"technique": "signround", "bits": 3, "steps": 200}
    cells = {"babyllama-1m | 3 | 32 | best | 0": result(2.0, steps=[step])}
    text = page({"cells": cells, "dense": {}})
    assert "\n- 3 bits, groups of 32: `signround` with bits 3, steps 200 (babyllama-1m).\n" in text
    assert "gains of the norms" not in text
    step["tune_norms"] = True
    assert "They also learn the gains of the norms" in page({"cells": cells, "dense": {}})
    assert "batch_tokens" not in text
    step["batch_tokens"] = 256
    assert "none to windows of 256 tokens" in page({"cells": cells, "dense": {}})


def test_the_page_is_what_the_results_give(parts):
    found = parts["peer_cells"].Results(HOME / "beside_peers.json")
    made = parts["beside_peers_page"].page({"dense": found.dense, "cells": found.cells})
    assert (HOME / "beside_peers.md").read_text(encoding="utf-8") == made
    known = {cell.key for cell in parts["peer_cells"].all_cells()}
    assert set(found.cells) <= known


def test_the_plot_is_drawn_of_what_is_there(parts, tmp_path):
    cells = filled(parts, lambda cell: 2.0 + cell.draw)
    parts["beside_peers_page"].draw({"cells": cells, "dense": {}}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


# -- the runners ------------------------------------------------------------------------------------------------------
def test_blocks_and_lengths_are_found(parts):
    runner = parts["peer_runner"]
    model = TINY["bert"]()
    names = runner.linears_of(model)
    assert names
    assert all(".layer." in name for name in names)
    ids = torch.arange(60).view(12, 5)
    mask = (torch.arange(5) < torch.tensor([3] * 9 + [5] * 3)[:, None]).long()
    shapes = [tuple(batch["input_ids"].shape) for batch in runner.batches_of_one_length(ids, mask)]
    assert shapes == [(8, 3), (1, 3), (3, 5)]
    assert len(list(runner.batches_of_one_length(ids, mask, most=4))) == 4


def test_our_runner_returns_codes(parts, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    job = {
        "method": "gptq",
        "model": str(tmp_path / "model"),
        "auto_class": "AutoModelForCausalLM",
        "bits": 3,
        "group": 16,
        "symmetric": True,
        "draw": 0,
        "device": "cpu",
    }
    ids = torch.randint(len(tokenizer), (4, 12), generator=torch.Generator().manual_seed(0))
    parts["peer_subjects"].write_job(tmp_path, job, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    monkeypatch.setattr("sys.argv", ["our_runner.py", str(tmp_path)])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    parts["our_runner"].main()
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["seconds"] > 0
    assert found["peak_bytes"] >= 0
    tensors = load_file(tmp_path / "weights.safetensors")
    check = parts["peer_subjects"].check_codes
    with pytest.raises(ValueError, match=r"self_attn\.q_proj has \d+ values in a group of 16 inputs, not 8"):
        check(model, 3, 16)
    parts["peer_subjects"].put_weights(model, tensors)
    check(model, 3, 16)
    with pytest.raises(ValueError, match="not 4"):
        check(model, 2, 16)


def test_a_recipe_fits_its_cell(parts, tmp_path):
    steps_of = parts["our_runner"].steps_of
    recipe = tmp_path / "made.yaml"
    recipe.write_text("steps:\n  - {technique: signround, bits: 3, group_size: 32}\n")
    job = {"method": "best", "recipe": str(recipe), "bits": 3, "group": 32, "symmetric": True}
    assert steps_of(job)[0].group_size == 32
    assert steps_of({**job, "group": None})[0].group_size is None
    for wrong in ({"bits": 4}, {"group": 64}, {"symmetric": False}):
        with pytest.raises(SystemExit, match=f"{recipe.name}: a step has"):
            steps_of({**job, **wrong})


def test_tied_tensors_that_differ_are_refused(parts):
    model = tiny_llama(tie_word_embeddings=True)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts["peer_subjects"].put_weights(model, tensors)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="tied to another tensor"):
        parts["peer_subjects"].put_weights(model, tensors)
