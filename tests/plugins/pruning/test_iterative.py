"""Iterative magnitude pruning: fractions that compound to the target, weights that carry over, one small rate."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from real_stories import Stories
from round_training_runs import original_rates, train
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from toy_training import sentences

import hf_optim
from hf_optim import ModelError, OptimConfig, RecipeError, run_of
from hf_optim.lifecycle.stages import complete_stage
from hf_optim.recipes.traits import SPARSE, SPARSE_NM
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit.pruning import masks


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_fractions_compound_to_the_target_exactly(tmp_path, make, scope):
    """Every round of n leaves (1 - s)^(1/n) of the remaining weights; the last one ends exactly at s."""
    step = {"technique": "iterative", "sparsity": 0.8, "rounds": 4, "scope": scope}
    model = hf_optim.optimize(make(), step)
    seen = train(model, tmp_path, 12)
    run = run_of(model)
    for after in range(13):
        number = min(4, after // 3 + 1)
        share = 0.8 if number == 4 else 1 - 0.2 ** (number / 4)
        found = seen.masks[after]
        sizes = [mask.numel() for mask in found.values()]
        gone = [int((~mask).sum()) for mask in found.values()]
        expected = [masks.removed_count(size, share) for size in sizes]
        assert gone == expected if scope == "layer" else sum(gone) == masks.removed_count(sum(sizes), share)
        assert all(not seen.weights[after][name][~mask].any() for name, mask in found.items())
    assert SPARSE in run.traits
    assert holds(SPARSE, run)
    record = json.loads(json.dumps(run.record.steps["0"]))
    assert record["rounds"] == 4
    assert record["sparsities"] == pytest.approx([1 - 0.2 ** (r / 4) for r in (1, 2, 3, 4)], abs=1e-3)
    assert record["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_a_round_removes_the_currently_smallest_weights_and_keeps_the_rest(tmp_path):
    model = hf_optim.optimize(tiny_llama(), {"technique": "iterative", "rounds": 2})
    seen = train(model, tmp_path, 6)
    for name, trained in seen.before[3].items():
        mask = seen.masks[3].get(name, torch.ones_like(trained, dtype=torch.bool))
        assert torch.equal(seen.weights[3][name], trained * mask)
        if name in seen.masks[3]:
            assert torch.equal(mask, masks.layer_masks({"w": trained}, 0.5, {"w": seen.masks[2][name]})["w"])


@pytest.mark.many(every=4)
@pytest.mark.parametrize(
    ("fields", "rate"),
    [({}, 1.0), ({"rate": 0.3}, 0.3), ({"dense": True}, 0.1), ({"dense": True, "rate": 0.3}, 0.3)],
)
def test_retraining_has_one_rate(tmp_path, fields, rate):
    model = hf_optim.optimize(tiny_llama(), {"technique": "iterative", "rounds": 2, **fields})
    schedule = {"lr_scheduler_type": "cosine", "warmup_steps": 0.25}
    seen = train(model, tmp_path / "a", 36, **schedule)
    dense = original_rates(tiny_llama(), tmp_path / "b", 12, **schedule) if fields.get("dense") else []
    assert seen.rates == [*dense, *[1e-2 * rate] * (36 - len(dense))]


def test_retraining_keeps_the_last_rate_of_a_schedule_that_does_not_end_at_zero(tmp_path):
    model = hf_optim.optimize(tiny_llama(), {"technique": "iterative", "rounds": 1, "dense": True})
    seen = train(model, tmp_path, 8, lr_scheduler_type="constant")
    assert seen.rates == [1e-2] * 8


def test_an_existing_pattern_survives(tmp_path):
    model = hf_optim.optimize(tiny_gpt2(), [{"technique": "nm"}, {"technique": "iterative", "sparsity": 0.7}])
    train(model, tmp_path, 6)
    run = run_of(model)
    assert SPARSE_NM in run.traits
    assert all(masks.parameter_has_nm_pattern(model, name, *pattern) for name, pattern in run.nm_patterns.items())
    assert run.record.steps["1"]["sparsity"] == pytest.approx(0.7, abs=1e-3)


def test_stopping_early_warns_with_the_sparsity_reached(tmp_path, caplog):
    model = hf_optim.optimize(tiny_bert(), {"technique": "iterative", "sparsity": 0.75, "rounds": 2})
    run = run_of(model)
    (driver,) = (c for c in hf_optim.callbacks(model) if isinstance(c, hf_optim.RoundTraining))
    driver.rounds.next()
    complete_stage(run)
    assert re.search(r"step 1 \(iterative\).* round 1 of 2, with a sparsity of 0\.5000 instead of 0\.75", caplog.text)
    assert any("instead of 0.75" in note for note in run.record.notes)
    assert run.record.steps["0"]["sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("given", [{}, {"sparsity": 0.75, "rounds": 2, "targets": ["Linear"]}])
def test_a_custom_loop_is_on_the_record_and_the_card(tmp_path, caplog, given):
    """As documented: the rounds are those of the recipe's step, whether or not the arguments repeat them."""
    model = hf_optim.optimize(tiny_llama(), {"technique": "iterative", "sparsity": 0.75, "rounds": 2})
    run = run_of(model)
    caplog.clear()  # it says that it waits for training
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = {key: value[None] for key, value in sentences(1)[0].items()}
    rounds = hf_optim.Rounds(run, **given)
    while rounds.left:
        rounds.next()
        model(**batch).loss.backward()
        optimizer.step()
        rounds.keep()
    rounds.finish()
    assert not [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert run.finished
    record = run.record.steps["0"]
    assert (record["rounds"], record["sparsities"]) == (2, [0.5, 0.75])
    assert record["sparsity"] == pytest.approx(0.75, abs=1e-3)
    model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "sparsity after each: 50.0 %, 75.0 %" in text
    assert "75.0 % of the targeted weights are zero" in text
    assert json.loads((tmp_path / "saved" / "hf_optim.json").read_text())["finished"] is True


def test_rounds_that_contradict_the_recipe_are_refused():
    run = run_of(hf_optim.optimize(tiny_llama(), {"technique": "iterative", "sparsity": 0.75, "rounds": 2}))
    for name, value in {"sparsity": 0.8, "rounds": 3, "scope": "global", "skip": ["*.q_proj"]}.items():
        with pytest.raises(RecipeError, match=rf"step 1 \(iterative\) has {name}=.*: leave {name} out"):
            hf_optim.Rounds(run, **{name: value})
    other = run_of(hf_optim.optimize(tiny_llama(), {"technique": "gmp"}))
    with pytest.raises(RecipeError, match="give Rounds its rounds, which no step of the recipe has"):
        hf_optim.Rounds(other, sparsity=0.5)


@pytest.mark.parametrize("second", ["iterative", "lottery_ticket", "lr_rewinding"])
@pytest.mark.parametrize("first", ["iterative", "lottery_ticket", "lr_rewinding"])
def test_two_owners_of_the_rounds_are_refused(first, second):
    """Each divides the steps and sets the learning rate, so one of two would silently be ignored."""
    recipe = OptimConfig.parse([{"technique": first}, {"technique": second}])
    message = rf"keep only one of step 2 \({second}\) and step 1 \({first}\): both set '[a-z ]+'"
    with pytest.raises(RecipeError, match=message):
        recipe.check()


class Pages:
    """A model card that records its calls."""

    def __init__(self):
        self.paragraphs, self.tables = {}, {}

    def paragraph(self, title, markdown):
        self.paragraphs[title] = markdown

    def when(self, sentence, **conditions):
        return f" {sentence}"

    def table(self, title, header, rows):
        self.tables[title] = (header, rows)


@pytest.mark.parametrize("technique", ["iterative", "lottery_ticket", "lr_rewinding"])
def test_the_card_lists_the_rounds(tmp_path, technique):
    model = hf_optim.optimize(tiny_llama(), {"technique": technique, "sparsity": 0.75, "rounds": 2})
    train(model, tmp_path, 6)
    card = Pages()
    run_of(model).recipe.steps[0].export(run_of(model), tmp_path, card)
    (text,), ((header, rows),) = card.paragraphs.values(), card.tables.values()
    assert "after each: 50.0 %, 75.0 %" in text
    assert ["model.layers.*.mlp.up_proj", "2", "3,072", "75.0 %", "75.0 %", "75.0 %"] in rows
    assert all(len(row) == len(header) for row in rows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, "must be < 1"),
        ({"rounds": 0}, "rounds must be >= 1"),
        ({"rate": 0.0}, "rate must be > 0"),
        ({"scope": "layers"}, "did you mean 'layer'"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        OptimConfig.parse([{"technique": "iterative", **fields}])


def test_nothing_to_prune_is_an_error():
    model = hf_optim.optimize(tiny_llama(), {"technique": "iterative", "targets": ["*.up_proj"], "skip": ["*.mlp.*"]})
    with pytest.raises(ModelError, match=r"step 1 \(iterative\).*check targets and skip"):
        hf_optim.callbacks(model)


@pytest.mark.real_model
def test_rounds_are_better_than_one_shot(tmp_path, shared_models, shared_data):
    """Equal steps in all, and equal steps after the last pruning: those before it are under half a mask, or dense."""
    stories = Stories(shared_models, shared_data)
    constant = {"lr_scheduler_type": "constant"}
    step = {"technique": "iterative", "sparsity": 0.8}
    rounds = stories.loss_after([{**step, "rounds": 2}], tmp_path, 160, **constant)
    assert stories.sparsity == pytest.approx(0.8, abs=1e-3)
    one_shot = stories.loss_after([{**step, "rounds": 1, "dense": True, "rate": 1.0}], tmp_path, 160, **constant)
    assert stories.sparsity == pytest.approx(0.8, abs=1e-3)
    assert rounds < one_shot - 0.05
