"""Task-level mixtures: the sub-model of a task is the whole model with its routing pinned, as an ordinary T5."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch
from tiny_models import TINY, tiny_t5
from transformers import (
    AutoModelForSeq2SeqLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import hf_optim
from hf_optim import ModelError, OptimError, RecipeError
from hf_optim.cli import main
from hf_optim.testing.conformance_records import assert_card_follows, assert_recomputed, case_of
from hf_optim.toolkit import experts, topology
from hf_optim_plugins.moe import _task_moe_modules
from hf_optim_plugins.moe.task_moe import TaskMoE, spread

TEXT = {"input_ids": torch.arange(3, 27).reshape(2, 12), "decoder_input_ids": torch.arange(3, 13).reshape(2, 5)}
TASKS = ["de", "fr", "cs"]
VARIED = {"tasks": TASKS, "expert_noise": 0.5, "router_std": 1.0}


def task_moe(model=None, **fields):
    base = tiny_t5(num_decoder_layers=2).double() if model is None else model
    return hf_optim.optimize(base, [{"technique": "task_moe", **fields}])


def logits(model, tasks=None):
    extra = {} if tasks is None else {"task_ids": torch.tensor(tasks)}
    with torch.no_grad():
        return model(**TEXT, **extra).logits


def gated():
    return tiny_t5(feed_forward_proj="gated-gelu").double()


# -- the oracle -------------------------------------------------------------------------------------------------------
@pytest.mark.many(every=4)
@pytest.mark.parametrize(
    ("fields", "base"),
    [
        ({"top_k": 1}, {}),
        ({"top_k": 1, "normalize": False}, {}),
        ({"top_k": 2, "every": 2, "normalize": False}, {}),
        ({"top_k": 3, "where": "decoder"}, {"feed_forward_proj": "gated-gelu"}),
        ({"top_k": 2}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ],
    ids=str,
)
def test_the_sub_model_of_a_task_is_the_whole_model_with_the_task_pinned(fields, base):
    model = task_moe(tiny_t5(**base).double(), **VARIED, **fields)
    seen = []
    for number in (0, 2):
        whole = logits(model, [number, number])
        single = hf_optim.optimize(copy.deepcopy(model), [{"technique": "task_moe", "extract": TASKS[number]}])
        assert type(single) is T5ForConditionalGeneration
        assert not topology.has_experts(single)
        assert torch.allclose(logits(single), whole, rtol=0, atol=1e-12)
        assert single.config.d_ff == 48 * fields["top_k"]
        seen.append(whole)
    assert not torch.allclose(*seen, atol=1e-3)


def test_tasks_of_a_batch_are_routed_on_their_own():
    model = task_moe(**VARIED)
    mixed = logits(model, [2, 0])
    assert torch.allclose(mixed[0], logits(model, [2, 2])[0], atol=1e-12)
    assert torch.allclose(mixed[1], logits(model, [0, 0])[1], atol=1e-12)


@pytest.mark.parametrize("build", [lambda: tiny_t5().double(), gated], ids=["plain", "gated"])
@pytest.mark.parametrize("routing", ["task", "token"])
def test_copies_compute_what_the_dense_model_computes(build, routing):
    model = build()
    dense = logits(model)
    made = task_moe(model, tasks=TASKS, routing=routing)
    assert torch.allclose(logits(made, [0, 1] if routing == "task" else None), dense, rtol=0, atol=1e-12)


@torch.no_grad()
def test_routing_by_token_is_the_sum_over_the_largest_gates():
    model = task_moe(routing="token", expert_noise=0.5, router_std=1.0, normalize=False)
    layer = model.encoder.block[0].layer[-1].DenseReluDense
    rows = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros_like(rows)
    for t, row in enumerate(rows):
        gates, chosen = layer.router(row).softmax(-1).topk(2)
        for gate, e in zip(gates, chosen.tolist(), strict=True):
            expected[t] += gate * (layer.experts.down_proj[e] @ (layer.experts.up_proj[e] @ row).relu())
    assert torch.allclose(layer(rows[None])[0], expected, atol=1e-12)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm", "hf_optim"])
@pytest.mark.parametrize("build", [tiny_t5, lambda: gated().float()], ids=["plain", "gated"])
def test_every_implementation_of_experts_computes_the_same(name, build):
    model = task_moe(build(), **VARIED)
    expected = logits(model, [0, 2])
    if name == "hf_optim":
        for mixture in model.task_mixtures():
            mixture.experts.forward = lambda *args, own=mixture.experts: experts.expert_product(own, *args, True)
    else:
        model.set_experts_implementation(name)
    assert torch.allclose(logits(model, [0, 2]), expected, atol=1e-5)
    if name == "grouped_mm":
        single = hf_optim.optimize(model, [{"technique": "task_moe", "extract": "fr"}])
        assert torch.allclose(logits(single), logits(model, [1, 1]), atol=1e-5)


def test_tasks_start_with_different_experts():
    drawn = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    chosen = spread(drawn, 2).topk(2).indices.sort(-1).values
    assert chosen.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(spread(drawn, 2).sort(-1).values, drawn.sort(-1).values)
    assert spread(drawn[:, :3], 2).topk(2).indices.sort(-1).values.tolist() == [[0, 1], [0, 2], [1, 2]]


def test_which_layers():
    def found(**fields):
        model = task_moe(tiny_t5(num_layers=4, num_decoder_layers=2), tasks=TASKS, **fields)
        return [name.split(".layer.")[0] for name in model.config.task_moe["modules"]]

    encoder = [f"encoder.block.{n}" for n in range(4)]
    assert found() == [*encoder, "decoder.block.0", "decoder.block.1"]
    assert found(every=2) == ["encoder.block.1", "encoder.block.3", "decoder.block.1"]
    assert found(where="encoder", every=3) == ["encoder.block.2"]


def test_a_model_that_routes_by_task_is_traced():
    model = task_moe(**VARIED)
    assert topology.dummy_inputs(model)["task_ids"].tolist() == [0]
    assert "task_ids" not in topology.dummy_inputs(tiny_t5())
    assert set(topology.roles(model).values()) == {"output head"}
    routed = topology.roles(task_moe(routing="token"))
    assert routed["decoder.block.1.layer.2.DenseReluDense.router"] == "router"


# -- training ---------------------------------------------------------------------------------------------------------
def test_the_balance_loss_is_the_formula_and_leaves_padding_out():
    scores = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    chosen = scores.topk(2).indices
    shares = [sum(int((row == e).any()) for row in chosen) / 18 for e in range(4)]
    expected = 4 * sum(share * float(scores[:, e].mean()) for e, share in enumerate(shares))
    assert float(_task_moe_modules.balance_loss(scores, chosen)) == pytest.approx(expected, rel=1e-12)
    assert float(_task_moe_modules.balance_loss(torch.eye(4), torch.arange(4)[:, None])) == pytest.approx(1)
    base = tiny_t5(dropout_rate=0.0).double()
    model = task_moe(base, routing="token", router_std=1.0, where="encoder").train()
    losses = []
    for filler in (5, 6):
        ids, mask = TEXT["input_ids"].clone(), torch.ones(2, 12, dtype=torch.int64)
        ids[:, 8:], mask[:, 8:] = filler, 0
        model(input_ids=ids, attention_mask=mask, labels=TEXT["decoder_input_ids"])
        losses.append(torch.stack([mixture.loss for mixture in model.task_mixtures()]).detach())
    assert torch.allclose(*losses, rtol=1e-12)


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": TEXT["input_ids"][0], "labels": TEXT["decoder_input_ids"][0], "task_ids": index % 3}


@pytest.mark.parametrize("routing", ["task", "token"])
def test_a_stock_trainer_trains_it(routing, tmp_path):
    model = task_moe(tiny_t5(), **VARIED, routing=routing, balance_loss=100.0)
    args = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(model=model, args=args, train_dataset=Examples(), eval_dataset=Examples())
    trainer.train()
    routers = [name for name in before if name.endswith(("task_logits", "router.weight"))]
    assert len(routers) == 4
    assert all(not torch.equal(before[name], model.get_parameter(name)) for name in routers)
    first = float(next(row["loss"] for row in trainer.state.log_history if "loss" in row))
    assert (first > 300) == (routing == "token")  # four layers with a balance loss of 100 or more
    assert trainer.evaluate()["eval_loss"] < 20


def test_a_loss_that_is_computed_outside_of_the_model_warns_of_the_balance_loss(tmp_path):
    model = task_moe(tiny_t5(), tasks=TASKS, routing="token", balance_loss=0.01)
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, label_smoothing_factor=0.1, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    ids = TEXT["decoder_input_ids"]
    rows = [{**Examples()[index], "decoder_input_ids": ids[0]} for index in range(4)]
    with pytest.warns(UserWarning, match="without the balance losses of its routers"):
        Trainer(model=model, args=args, train_dataset=rows).train()
    found = model.train()(input_ids=TEXT["input_ids"], decoder_input_ids=ids)
    assert found.loss is None
    assert float(model.router_loss().detach()) == pytest.approx(0.04, rel=0.5)  # four layers, 1 at balance


def test_gradient_checkpointing_has_the_same_gradients():
    enable = "activation_checkpointing_enable"
    found = []
    for checkpointing in (False, True):
        model = task_moe(tiny_t5(dropout_rate=0.0).double(), **VARIED).train()
        if checkpointing:
            getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()
        model(
            input_ids=TEXT["input_ids"], labels=TEXT["decoder_input_ids"], task_ids=torch.tensor([0, 2])
        ).loss.backward()
        found.append(model.encoder.block[0].layer[-1].DenseReluDense.task_logits.grad)
    assert torch.allclose(*found, atol=1e-10)
    assert bool(found[0].abs().sum() > 0)


# -- inference --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fields", [{}, {"num_beams": 2}], ids=str)
def test_generate_takes_tasks_and_equals_the_sub_model(fields):
    model = task_moe(tiny_t5(), **VARIED)
    logits(model, [2, 2])  # what an earlier batch left does not count
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **fields}
    whole = model.generate(TEXT["input_ids"], task_ids=model.task_ids_of(["fr", "de"]), **settings)
    for row, task in enumerate(["fr", "de"]):
        single = hf_optim.optimize(copy.deepcopy(model), [{"technique": "task_moe", "extract": task}])
        assert torch.equal(single.generate(TEXT["input_ids"], **settings)[row], whole[row])


def test_missing_and_wrong_tasks_are_errors():
    model = task_moe(**VARIED)
    text = r"this model routes by task: pass task_ids, int64 \[batch\], of 0 \(de\), 1 \(fr\), 2 \(cs\)"
    for call in (lambda: model(**TEXT), lambda: model.generate(TEXT["input_ids"])):
        with pytest.raises(ValueError, match=text):
            call()
    for wrong in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match="task_ids must be of 0"):
            logits(model, wrong)
    with pytest.raises(ValueError, match=r"task_ids must be int64 \[batch\]"):
        logits(model, [0.0, 1.0])
    with pytest.raises(ValueError, match="a batch of 2 sequences needs as many task_ids, and there are 3"):
        logits(model, [0, 1, 2])
    with pytest.raises(ValueError, match="no task 'it': the model has de, fr, cs"):
        model.task_ids_of(["it"])
    assert "task_ids" in inspect.signature(model.forward).parameters


# -- checkpoints ------------------------------------------------------------------------------------------------------
def test_the_checkpoint_of_a_task_is_stock_and_its_record_follows_from_it(tmp_path):
    model = task_moe(tiny_t5(), **VARIED, every=2)
    model.save_pretrained(tmp_path / "whole")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "whole", trust_remote_code=True)
    assert torch.equal(logits(loaded, [1, 2]), logits(model, [1, 2]))
    single = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "whole", trust_remote_code=True, optim_config=[{"technique": "task_moe", "extract": "fr"}]
    )
    case = case_of(single, "t5", tmp_path / "fr", TaskMoE, before=model)
    assert_recomputed(case)
    assert_card_follows(case)
    record = json.loads((tmp_path / "fr" / "hf_optim.json").read_text())
    assert record["reload"] == "STOCK_DENSE"
    config = json.loads((tmp_path / "fr" / "config.json").read_text())
    assert config["model_type"] == "t5"
    assert not {"task_moe", "auto_map"} & config.keys()
    assert not list((tmp_path / "fr").glob("*.py"))
    stock = T5ForConditionalGeneration.from_pretrained(tmp_path / "fr")
    assert torch.equal(logits(stock), logits(single))
    assert stock.num_parameters() < model.num_parameters()


def test_the_commands_make_a_mixture_and_extract_a_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_t5().save_pretrained("t5")
    (tmp_path / "make.yaml").write_text("steps: [{technique: task_moe, tasks: [de, fr], expert_noise: 0.5}]")
    (tmp_path / "take.yaml").write_text("steps: [{technique: task_moe, extract: fr}]")
    assert main(["compress", "t5", "--recipe", "make.yaml", "--output", "both"]) == 0
    take = ["compress", "both", "--recipe", "take.yaml", "--output", "french", "--trust-remote-code"]
    assert main(take) == 0
    whole = AutoModelForSeq2SeqLM.from_pretrained("both", trust_remote_code=True)
    assert torch.allclose(
        logits(T5ForConditionalGeneration.from_pretrained("french")), logits(whole, [1, 1]), atol=1e-5
    )


def test_it_compiles_as_one_graph():
    model = task_moe(tiny_t5(), **VARIED, where="encoder")
    layer = model.encoder.block[0].layer[-1].DenseReluDense
    layer.task_ids, hidden = torch.tensor([0, 2]), torch.randn(2, 5, 32)
    with torch.no_grad():
        assert torch.allclose(torch.compile(layer, backend="eager", fullgraph=True)(hidden), layer(hidden), atol=1e-6)


def test_a_sub_model_is_compressed_like_any_t5():
    steps = [{"technique": "task_moe", "extract": "de"}, {"technique": "magnitude", "sparsity": 0.5}]
    single = hf_optim.optimize(task_moe(tiny_t5(), **VARIED), steps)
    assert 0.4 < float((single.encoder.block[0].layer[-1].DenseReluDense.wi.weight == 0).float().mean()) < 0.6


# -- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": TASKS, "experts": 2, "top_k": 3}, r"top_k \(3\) cannot exceed experts \(2\)"),
        ({}, "routing by task needs the names of the tasks"),
        ({"tasks": ["de", "de"]}, "names of the tasks must differ"),
        ({"tasks": TASKS, "start": "random", "expert_noise": 0.1}, "experts that start as copies"),
        ({"tasks": TASKS, "balance_loss": float("nan")}, "balance_loss"),
    ],
    ids=str,
)
def test_fields_that_make_no_mixture_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        task_moe(**fields)


def nllb_moe():
    return NllbMoeForConditionalGeneration(
        NllbMoeConfig(
            vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_experts=4, encoder_sparse_step=1,
            decoder_sparse_step=1, max_position_embeddings=64,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (nllb_moe, "NLLB-MoE cannot be the base: transformers .* runs only its experts 0 and 1"),
        (TINY["mixtral"], "does not support a model that routes tokens to experts"),
        (TINY["llama"], "has no feed-forward parts of a T5"),
    ],
    ids=["nllb-moe", "mixtral", "llama"],
)
def test_models_that_are_no_dense_t5_are_refused(build, message):
    with pytest.raises(OptimError, match=message):
        task_moe(build(), tasks=TASKS)


def test_layers_that_are_none_are_refused():
    with pytest.raises(ModelError, match="where=both and every=9 select no layer"):
        task_moe(tasks=TASKS, every=9)


def test_what_has_no_task_is_not_extracted():
    with pytest.raises(ModelError, match="was not made by task_moe"):
        task_moe(extract="de")
    with pytest.raises(ModelError, match="no task 'it'; the model has de, fr, cs"):
        task_moe(task_moe(**VARIED), extract="it")
    with pytest.raises(ModelError, match="routes by token, so all of its experts serve every task"):
        task_moe(task_moe(tasks=TASKS, routing="token"), extract="de")
