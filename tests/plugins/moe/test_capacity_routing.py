"""``capacity_routing`` and ``batch_priority_routing``: refusals, training, decoding, checkpoints, record, card."""

from __future__ import annotations

import json

import pytest
import tiny_mixtures
import torch
from capped_oracle import is_registered, without_other_users
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, MixtralForCausalLM, Trainer, TrainingArguments

import hf_optim
from hf_optim import CheckpointError, ModelError, OptimConfig, RecipeError
from hf_optim.cli.jobs.measuring import may_have_kernels, runs_on_kernels
from hf_optim.cli.jobs.timed_models import kernels_of
from hf_optim.evaluation.comparison import comparison_notes
from hf_optim.evaluation.evaluate import perplexity
from hf_optim.testing.conformance_records import assert_card_follows, assert_recomputed, case_of
from hf_optim.testing.models import TINY
from hf_optim.toolkit.experts import routing_of
from hf_optim_plugins.moe.batch_priority_routing import BatchPriorityRouting
from hf_optim_plugins.moe.capacity_routing import CapacityRouting

BOTH = pytest.mark.parametrize("cls", [CapacityRouting, BatchPriorityRouting])
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(autouse=True)
def alone():
    with without_other_users():
        yield


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def capped(cls=BatchPriorityRouting, kind="mixtral", **fields):
    return hf_optim.optimize(tiny_mixtures.build(kind), [cls(**{"measure": False, "capacity": 0.5, **fields})])


def shares(model):
    return [load.dropped_share for load in hf_optim.expert_load(model, reset=True).values()]


# -- what is refused --------------------------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"capacity": 0}, "capacity must be > 0"),
        ({"capacity": -1.0}, "capacity must be > 0"),
        ({"capacity": float("nan")}, "capacity must be a finite number"),
        ({"capacity": float("inf")}, "capacity must be a finite number"),
        ({"train_capacity": 0.0}, "train_capacity must be > 0"),
        ({"rounding": "up"}, "rounding must be one of 'round', 'ceil', 'floor', 'vmoe', 'tutel', 'nllb'"),
        ({"group": "token"}, "group must be one of 'batch', 'sequence'"),
        ({"min_slots": 0}, "min_slots must be >= 1"),
        ({"dropless_below": -1}, "dropless_below must be >= 0"),
    ],
)
def test_wrong_fields(cls, fields, text):
    with pytest.raises(RecipeError, match=text):
        cls(**fields)


def test_wrong_priorities():
    with pytest.raises(RecipeError, match="priority must be one of 'top1', 'sum'"):
        BatchPriorityRouting(priority="position")


@pytest.mark.many
@BOTH
@pytest.mark.parametrize(
    ("build", "text"),
    [
        (tiny_llama, "LlamaForCausalLM has no experts; `upcycle` makes"),
        (lambda: tiny_mixtures.build("nllb-moe"), "NllbMoe.* only its experts 0 and 1, whatever the router chooses"),
        (lambda: tiny_mixtures.build("jetmoe"), "the experts of JetMoeForCausalLM .* do not run through transformers'"),
        (lambda: tiny_mixtures.build("dbrx"), "the experts of DbrxForCausalLM do not run through transformers'"),
        (lambda: tiny_mixtures.build("mixtral", num_experts_per_tok=5), "choose 5 of only 4 experts"),
    ],
    ids=["dense", "nllb", "jetmoe", "dbrx", "k-above-E"],
)
def test_models_without_experts_on_the_interface(cls, build, text):
    for measure in (False, True):  # data that nobody gave are not asked for
        with pytest.raises(ModelError, match=rf"step 1 \({cls.spec.name}\).*{text}"):
            hf_optim.optimize(build(), [cls(measure=measure)])
    assert not is_registered()


def test_a_router_that_does_not_fit_its_experts():
    model = tiny_mixtures.build("mixtral")
    gate = model.model.layers[1].mlp.gate
    gate.weight = torch.nn.Parameter(gate.weight[:3])
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts has 3 outputs for 4 experts"):
        hf_optim.optimize(model, [CapacityRouting(measure=False)])


def test_two_capacities_in_one_recipe():
    with pytest.raises(RecipeError, match="expert capacity"):
        OptimConfig.parse([CapacityRouting(), BatchPriorityRouting()]).check()


def test_a_sum_of_normalized_gates_is_no_priority():
    with pytest.raises(ModelError, match="normalizes the gates of the chosen experts"):
        capped(priority="sum")
    assert any(shares_after(capped(kind="qwen3_moe", priority="sum")))  # norm_topk_prob is False


def shares_after(model):
    logits(model)
    return shares(model)


# -- running ----------------------------------------------------------------------------------------------------------
@BOTH
def test_results_are_deterministic_and_permuted_tokens_keep_their_experts_under_priority(cls):
    first, second = capped(cls), capped(cls)
    assert torch.equal(logits(first), logits(second))
    moved = IDS.flip(0)
    same = torch.allclose(logits(first, moved).flip(0), logits(first), atol=1e-5)
    assert same == (cls is BatchPriorityRouting)


@BOTH
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_padding_on_the_left(cls, cache):
    model = capped(cls, "qwen3_moe")
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    ids = torch.arange(3, 21).reshape(2, 9)
    arguments = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    if cache == "static":
        arguments |= {"cache_implementation": "static", "disable_compile": True}
    found = []
    for filling in (50, 51):
        hf_optim.expert_load(model, reset=True)
        found.append(model.generate(ids.masked_fill(mask == 0, filling), **arguments)[:, 9:])
        for load in hf_optim.expert_load(model, reset=True).values():
            assert sum(load.chosen) == 2 * (14 + 2 * 4)  # the prompt without padding, then four steps of two tokens
    assert torch.equal(*found)


@BOTH
def test_in_decoding_every_expert_has_a_slot(cls):
    model = capped(cls, capacity=0.01)
    hf_optim.expert_load(model, reset=True)
    cache = model(input_ids=IDS[:1], use_cache=True)
    assert all(share > 0.5 for share in shares(model))
    model.generate(IDS[:1, :1], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert cache.logits.isfinite().all()
    assert shares(model) == [0.0, 0.0]
    wide = capped(cls, capacity=0.01, dropless_below=41)
    assert shares_after(wide) == [0.0, 0.0]


def test_renormalized_gates_change_what_is_left():
    plain, scaled = capped(renormalize=False), capped(renormalize=True)
    assert not torch.allclose(logits(plain), logits(scaled), atol=1e-3)


@BOTH
def test_training_has_its_own_factor_and_trains_with_drops(cls, tmp_path):
    model = hf_optim.optimize(tiny_mixtures.build("mixtral"), [cls(measure=False, capacity=2.0, train_capacity=0.5)])
    before = model.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="steps",
        save_steps=3, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(3, 1)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=hf_optim.callbacks(model))
    trainer.train()
    assert all(share > 0.2 for share in shares(model))
    assert not torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, before)
    model.eval()
    assert shares_after(model) == [0.0, 0.0]
    stored = json.loads((tmp_path / "checkpoint-3" / "config.json").read_text())
    assert stored["hf_optim"]["routing"]["train_capacity"] == 0.5


# -- checkpoints ------------------------------------------------------------------------------------------------------
@BOTH
def test_stock_transformers_loads_it_without_a_capacity_and_auto_with_it(cls, tmp_path):
    dense = logits(tiny_mixtures.build("mixtral"))
    model = capped(cls)
    expected = logits(model)
    assert not torch.equal(expected, dense)
    model.save_pretrained(tmp_path)
    stock = MixtralForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(stock), dense)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
    assert torch.equal(logits(auto), expected)
    hf_optim.accelerate(stock)
    assert torch.equal(logits(stock), expected)
    for each in (stock, auto, model):
        hf_optim.restore(each)
        assert torch.equal(logits(each), dense)
    assert not is_registered()
    auto.save_pretrained(tmp_path / "again")  # restore takes the capacity from the model, not from its configuration
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", optim_config="auto")
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"capacity": 0}, "capacity must be above 0"),
        ({"capacity": True}, "capacity must be a finite number"),
        ({"capacity": "\x1b[31m"}, "capacity must be a finite number"),
        ({"capacity": 1.0, "rounding": ["ceil"]}, "rounding must be one of"),
        ({"capacity": 1.0, "min_slots": 10**30}, "min_slots must be an integer"),
        ({"capacity": 1.0, "kernel": "x"}, "unknown field 'kernel'"),
        ({}, "must be a mapping with a capacity"),
        ([1], "must be a mapping with a capacity"),
    ],
)
def test_a_malformed_entry_of_a_checkpoint_is_refused(tmp_path, entry, text):
    model = tiny_mixtures.build("mixtral")
    model.config.hf_optim = {"routing": entry}
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"config\.json: hf_optim\.routing.*{text}") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("held", [[1], "\x1b[31m", 3])
def test_what_stands_in_the_place_of_the_settings_is_not_overwritten(held):
    model = tiny_mixtures.build("mixtral")
    model.config.hf_optim = held
    with pytest.raises(CheckpointError, match=r"config\.json: hf_optim must be a mapping") as caught:
        hf_optim.optimize(model, [CapacityRouting(measure=False)])
    assert "\x1b" not in str(caught.value)


def test_the_experts_of_upcycle_and_quantized_experts_have_a_capacity(tmp_path):
    upcycled = hf_optim.optimize(tiny_llama(), ["upcycle", CapacityRouting(measure=False, capacity=0.5)])
    assert any(shares_after(upcycled))
    steps = [{"technique": "rtn", "bits": 4, "group_size": 16}, BatchPriorityRouting(measure=False)]
    for recipe in (steps, steps[::-1]):
        model = hf_optim.optimize(tiny_mixtures.build("mixtral"), recipe)
        expected = logits(model)
        assert any(shares(model))
        model.save_pretrained(tmp_path)
        auto = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
        assert torch.equal(logits(auto), expected)
        assert routing_of(auto) == routing_of(model)


# -- record and card --------------------------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize("fields", [{}, {"group": "sequence", "rounding": "vmoe", "capacity": 0.7}])
def test_what_is_dropped_on_calibration_data_is_recomputed_token_by_token(cls, fields, tmp_path):
    from hf_optim.testing.tiny_runs import inputs_for

    source = TINY["mixtral"]()
    batches = [inputs_for(source, seed=seed) for seed in range(3)]
    model = hf_optim.optimize(source, [cls(**{"capacity": 0.5, **fields})], calibration=batches)
    case = case_of(model, "mixtral", tmp_path, cls, before=TINY["mixtral"]())
    assert case.run.reported(case.step)["dropped"] > 0.05
    assert_recomputed(case)
    assert_card_follows(case)


def test_the_card_says_what_stock_transformers_computes(tmp_path):
    capped().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "**This computes the experts without their capacity**" in card
    assert 'from_pretrained(checkpoint, optim_config="auto")' in card
    assert "The class of the original, which ships in transformers." in card
    assert "slots given to the tokens with the largest gate first" in card
    record = json.loads((tmp_path / "hf_optim.json").read_text())
    assert record["reload"] == "STOCK_ARCH"


def test_compress_measures_the_result_without_and_with_its_capacity(tmp_path):
    model = capped()
    model.save_pretrained(tmp_path)
    assert may_have_kernels(hf_optim.run_of(model).record, model.config)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
    figures = kernels_of(auto)
    assert figures["kernels"].startswith("experts with capacity factor 0.5: 2")
    assert runs_on_kernels(figures)
    (note,) = comparison_notes({"accelerated": figures})
    assert "Stock transformers computes the experts without the capacity" in note
    hf_optim.restore(auto)
    assert not runs_on_kernels(kernels_of(auto))


def test_an_evaluation_counts_what_is_dropped():
    model = capped()
    logits(model)
    measured = perplexity(model, IDS)
    assert measured["dropped_share"] == pytest.approx(0.5, abs=0.05)
    hf_optim.restore(model)
    assert "dropped_share" not in perplexity(model, IDS)
