"""PR-MoE: the dense model at the start, its two coefficients and gates, and the load-balancing loss."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_optim
from hf_optim import ModelError, OptimConfig, OptimError, RecipeError
from hf_optim.testing.tiny_runs import inputs_for
from hf_optim_plugins.moe.pr_moe import balance, counted_tokens, pyramid, take_routed


def turn(model, *more, **fields):
    return hf_optim.optimize(model, [{"technique": "pr_moe", "experts": [2, 3], **fields}, *more])


def logits(model, seed=9):
    with torch.no_grad():
        return model(**inputs_for(model, seed=seed)).logits


def layers_of(model):
    return {name: m for name, m in model.named_modules() if type(m).__name__ == "ResidualMoE"}


@pytest.mark.many
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("build", [tiny_llama, tiny_opt, tiny_gpt2, tiny_bert, tiny_t5])
def test_copies_with_a_gate_of_one_are_the_dense_model(build, residual):
    expected = logits(build().double())
    model = turn(build().double(), residual=residual)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-7)  # gates and coefficients are float32
    counts = [ffn.experts.num_experts for ffn in layers_of(model).values()]
    assert counts == ([2, 2, 3, 3] if build is tiny_t5 else [2, 3])
    assert all((ffn.mlp is not None) is residual for ffn in layers_of(model).values())


@pytest.mark.parametrize("gate", ["one", "probability"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_opt])
def test_a_layer_computes_its_formula(build, gate):
    model = turn(build(), gate=gate, noise=0.5, seed=3)
    name, ffn = next(iter(layers_of(model).items()))
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ffn.coefficient.normal_(generator=torch.Generator().manual_seed(1))
        ffn.router.normal_(generator=torch.Generator().manual_seed(2))
        ffn.inlet[0](x)
        found = ffn(x[:, :0])
        dense = build().get_submodule(name.rpartition(".")[0]) if build is tiny_llama else build()
        for row, out in zip(x, found, strict=True):
            p = (ffn.router @ row).softmax(0)
            e, c = int(p.argmax()), (ffn.coefficient @ row + ffn.coefficient_bias).softmax(0)
            if build is tiny_llama:
                part = dense(row[None])[0]
                expert = ffn.experts.down_proj[e] @ ffn.experts.neurons(row[None], e)[0]
            else:
                layer = dense.model.decoder.layers[0]
                part = layer.fc2(torch.relu(layer.fc1(row)))
                inner = torch.relu(ffn.experts.up_proj[e] @ row + ffn.experts.up_proj_bias[e])
                expert = ffn.experts.down_proj[e] @ inner + ffn.experts.down_proj_bias[e]
            expected = c[0] * part + c[1] * (p[e] if gate == "probability" else 1.0) * expert
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert len({ffn.experts.down_proj[e].sum().item() for e in range(2)}) == 2  # noise made them differ


def test_every_experts_implementation_computes_the_same():
    model = turn(tiny_opt(), noise=0.5)
    expected = logits(model)
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_pyramids_and_every_second_layer():
    assert pyramid((4, 8), 4) == [4, 4, 8, 8]
    assert pyramid((4, 8), 5) == [4, 4, 4, 8, 8]
    assert pyramid((16,), 3) == [16, 16, 16]
    model = turn(tiny_llama(num_hidden_layers=4), every=2)
    found = {name: ffn.experts.num_experts for name, ffn in layers_of(model).items()}
    assert found == {"model.layers.1.mlp.down_proj": 2, "model.layers.3.mlp.down_proj": 3}
    assert hf_optim.run_of(model).record.steps["0"]["layers"] == found


# -- training ---------------------------------------------------------------------------------------------------------
def test_the_load_balancing_loss_is_its_formula():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    chosen = p.argmax(-1, keepdim=True)
    f, mean = torch.tensor([0.5, 0.25, 0.25]), p.mean(0)
    torch.testing.assert_close(balance(p, chosen, None), 3 * (f * mean).sum())
    uniform = torch.full((3, 3), 1 / 3)
    assert float(balance(uniform, torch.arange(3)[:, None], None)) == pytest.approx(1.0)
    certain = torch.tensor([[1.0, 0.0, 0.0]] * 4)
    assert float(balance(certain, torch.zeros(4, 1, dtype=torch.long), None)) == pytest.approx(3.0)
    counted = torch.tensor([True, True, False, True])
    torch.testing.assert_close(balance(p, chosen, counted), balance(p[counted], chosen[counted], None))


def test_padding_is_found_in_the_mask_of_as_many_tokens():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert counted_tokens({"attention_mask": mask}, 6).tolist() == [True, True, False, True, False, False]
    assert counted_tokens({"attention_mask": mask}, 5) is None
    assert counted_tokens({"decoder_attention_mask": mask, "attention_mask": mask[:1]}, 6).sum() == 3


@pytest.mark.parametrize("gate", ["one", "probability"])
def test_gradients_reach_router_coefficients_and_chosen_experts(gate):
    model = turn(tiny_llama(), gate=gate, noise=0.3).train()
    batch = inputs_for(model, seed=1)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    ffn = next(iter(layers_of(model).values()))
    for parameter in (ffn.router, ffn.coefficient, ffn.experts.down_proj, ffn.mlp.down.weight):
        assert float(parameter.grad.abs().sum()) > 0
    assert len(take_routed(model)) == 2
    assert take_routed(model) == []
    model.eval()
    logits(model)
    assert take_routed(model) == []


@pytest.mark.slow
def test_training_balances_the_load(tmp_path):
    batch = inputs_for(tiny_llama(), seed=3, rows=8)
    rows = [{"input_ids": ids, "labels": ids} for ids in batch["input_ids"]]
    loads = {}
    for aux_loss in (0.0, 1.0):
        model = turn(tiny_llama(), experts=[4], gate="probability", noise=0.3, router_std=0.5, aux_loss=aux_loss)
        settings = TrainingArguments(
            str(tmp_path), max_steps=20, per_device_train_batch_size=8, learning_rate=3e-3, report_to=[], use_cpu=True,
            save_strategy="no", logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = hf_optim.OptimTrainer(model=model, args=settings, train_dataset=rows)
        trainer.train()
        assert ("balance" in trainer.state.log_history[0]) is (aux_loss > 0)
        model.train()(**batch)
        loads[aux_loss] = max(float(balance(*routed, None).detach()) for routed in take_routed(model))
    assert loads[1.0] < loads[0.0] - 0.05
    assert loads[1.0] < 1.15


def test_a_plain_trainer_is_refused_since_it_has_no_load_balancing_loss(tmp_path):
    model = turn(tiny_llama())
    with pytest.raises(OptimError, match="OptimTrainer"):
        Trainer(
            model=model,
            args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
            train_dataset=[],
            callbacks=hf_optim.callbacks(model),
        )


def test_routers_with_a_learning_rate_of_their_own(tmp_path):
    model = turn(tiny_llama(), {"technique": "logit_kd", "alpha": 0.5}, router_lr=0.01)
    batch = inputs_for(model, seed=3, rows=4)
    rows = [{"input_ids": ids, "labels": ids} for ids in batch["input_ids"]]
    settings = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = hf_optim.OptimTrainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    assert sum(len(g["params"]) for g in trainer.optimizer.param_groups if g["lr"] == 0.01) == 6


# -- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("experts", [[], [0, 4], [1], [70000]])
def test_numbers_of_experts_that_make_no_sense_are_refused(experts):
    with pytest.raises(RecipeError, match=r"pr_moe: experts are numbers from 1 to 65536"):
        OptimConfig.parse([{"technique": "pr_moe", "experts": experts}])


def test_more_numbers_than_layers_are_refused():
    with pytest.raises(ModelError, match="experts has 3 numbers for 2 layers"):
        turn(tiny_llama(), experts=[2, 3, 4])


def test_a_selection_of_no_layer_is_refused():
    with pytest.raises(ModelError, match="every=3 select none of them"):
        turn(tiny_llama(), every=3)


def test_pruned_models_are_refused():
    with pytest.raises(RecipeError, match="would destroy sparse"):
        hf_optim.optimize(tiny_llama(), [{"technique": "magnitude"}, {"technique": "pr_moe"}])


def test_it_reloads_and_a_router_that_does_not_fit_is_refused(tmp_path):
    model = hf_optim.release(turn(tiny_opt(), noise=0.3))  # untrained
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(logits(again), logits(model))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"experts": 2', '"experts": 5'))
    with pytest.raises((RuntimeError, OptimError), match=r"mismatch|shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
