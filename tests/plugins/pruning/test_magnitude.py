"""One-shot magnitude pruning: counts, orders, and the dense and sparse perplexity of a real model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_models import TINY, tiny_gpt2, tiny_llama

import hf_optim
from hf_optim import NumericalError, OptimConfig, RecipeError, run_of
from hf_optim.recipes.traits import SPARSE, SPARSE_NM
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit.pruning import masks
from hf_optim.toolkit.topology import expert_linears


def targeted(model):
    return run_of(model).covered(run_of(model).recipe.steps[-1])[0]


@pytest.mark.parametrize("family", TINY)
def test_every_layer_loses_exactly_its_share(family):
    model = TINY[family]()
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model = hf_optim.optimize(model, {"technique": "magnitude", "sparsity": 0.3})
    views = expert_linears(model)
    assert views.keys() <= targeted(model)
    names = {views[name].parameter_name if name in views else f"{name}.weight" for name in targeted(model)}
    assert names == set(run_of(model).masks)
    for name, parameter in model.named_parameters():
        if name not in names:
            assert torch.equal(parameter, dense[name])
            continue
        # Each expert is ranked alone.
        for now, before in (
            zip(parameter, dense[name], strict=True) if parameter.dim() == 3 else [(parameter, dense[name])]
        ):
            gone = now == 0
            assert int(gone.sum()) == masks.removed_count(now.numel(), 0.3)
            assert before[gone].abs().max() <= before[~gone].abs().min()
            assert torch.equal(now[~gone], before[~gone])
    assert SPARSE in run_of(model).traits
    assert holds(SPARSE, run_of(model))


@pytest.mark.parametrize("driver", ["whole_model", "blockwise"])
def test_global_pruning_cuts_all_layers_at_one_magnitude(driver):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(0.01)
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step = {"technique": "magnitude", "sparsity": 0.5, "scope": "global"}
    model = hf_optim.optimize(model, {"steps": [step], "driver": driver})
    names = [f"{name}.weight" for name in targeted(model)]
    magnitudes = torch.cat([dense[name].abs().flatten() for name in names])
    kept = torch.cat([(model.get_parameter(name) != 0).flatten() for name in names])
    assert int((~kept).sum()) == masks.removed_count(kept.numel(), 0.5)
    assert magnitudes[~kept].max() <= magnitudes[kept].min()
    assert not model.model.layers[0].mlp.up_proj.weight.any()


def test_targets_and_skip_choose_the_layers():
    step = {"technique": "magnitude", "targets": ["*.mlp.*", "lm_head"], "skip": ["re:.*layers.1.mlp.down_proj"]}
    model = hf_optim.optimize(tiny_llama(), step)
    assert targeted(model) == {
        "lm_head",
        *(f"model.layers.{i}.mlp.{kind}_proj" for i in (0, 1) for kind in ("gate", "up", "down")),
    } - {"model.layers.1.mlp.down_proj"}


def test_an_existing_pattern_survives():
    steps = [{"technique": "nm"}, {"technique": "magnitude", "sparsity": 0.7}]
    model = hf_optim.optimize(tiny_gpt2(), steps)
    run = run_of(model)
    assert SPARSE_NM in run.traits
    for name, (keep, group) in run.nm_patterns.items():
        assert masks.parameter_has_nm_pattern(model, name, keep, group)
        assert 1.0 - float(run.masks[name].double().mean()) == pytest.approx(0.7, abs=1e-3)


def test_existing_zeros_count():
    steps = [{"technique": "magnitude", "sparsity": 0.6}, {"technique": "magnitude", "sparsity": 0.2}]
    model = hf_optim.optimize(tiny_llama(), steps)
    once = hf_optim.optimize(tiny_llama(), steps[:1])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), once.parameters(), strict=True))


def test_finalize_zeroes_masked_weights_that_changed():
    model = hf_optim.optimize(tiny_llama(), {"technique": "magnitude"})
    run, step = run_of(model), run_of(model).recipe.steps[0]
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += 1.0
    step.finalize_model(run)
    assert torch.equal(weight == 0, before == 0)


def test_the_record_has_the_sparsity_of_every_layer():
    model = hf_optim.optimize(tiny_llama(), {"technique": "magnitude", "sparsity": 0.25})
    figures = run_of(model).record.steps["0"]
    assert figures["sparsity"] == 0.25
    assert set(figures["layers"]) == targeted(model)
    assert json.loads(json.dumps(figures)) == figures


class Pages:
    """A model card that records its calls."""

    def __init__(self):
        self.paragraphs, self.tables = {}, {}

    def paragraph(self, title, markdown):
        self.paragraphs[title] = markdown

    def table(self, title, header, rows):
        self.tables[title] = (header, rows)


def test_the_card_has_the_share_and_promises_no_speed_up(tmp_path):
    model = hf_optim.optimize(tiny_llama(), {"technique": "magnitude", "sparsity": 0.25})
    card = Pages()
    run_of(model).recipe.steps[0].export(run_of(model), tmp_path, card)
    (text,), ((header, rows),) = card.paragraphs.values(), card.tables.values()
    assert "25 %" in text
    assert ["model.layers.*.mlp.up_proj", "2", "3,072", "25.0 %", "25.0 %", "25.0 %"] in rows
    assert all(len(row) == len(header) for row in rows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, "must be < 1"),
        ({"sparsity": -0.1}, "must be >= 0"),
        ({"scope": "layers"}, "did you mean 'layer'"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        OptimConfig.parse([{"technique": "magnitude", **fields}])


def test_weights_that_are_not_finite_are_refused():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj\.weight: the weights of the model hold NaN"):
        hf_optim.optimize(model, "magnitude")


def perplexity(model, tokenizer, path):
    """Every story after bos, joined, cut into windows of the context; tokens 2..n of each window are scored."""
    ids = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids.append(tokenizer.bos_token_id)
        ids += tokenizer(json.loads(line)["text"], add_special_tokens=False, verbose=False)["input_ids"]
    width = model.config.max_position_embeddings
    windows = torch.tensor(ids[: len(ids) // width * width]).view(-1, width)
    total = 0.0
    with torch.no_grad():
        for batch in windows.split(16):
            logits = model(batch).logits[:, :-1].flatten(0, 1)
            total += torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (width - 1)))


@pytest.mark.real_model
def test_half_of_stories260k_costs_what_it_should(shared_models, shared_data):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_models / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder, optim_config="magnitude50", dtype=torch.float32)
    found = perplexity(model, AutoTokenizer.from_pretrained(folder), shared_data / "tinystories" / "eval.jsonl")
    assert found == pytest.approx(38.57, abs=0.01)  # 38.6 among the reference figures of the data; dense: 4.3563
