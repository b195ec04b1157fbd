"""MoEfication: the dense layer with all experts on, and the dense layer without the other neurons otherwise."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_models import DECODER, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    TrainingArguments,
)

import hf_optim
from hf_optim import ModelError, NumericalError, OptimConfig, RecipeError
from hf_optim.testing.tiny_runs import inputs_for
from hf_optim.toolkit import experts as toolkit_experts
from hf_optim_plugins.moe import _moefied_layers, moefication

MOE = {"technique": "moefication", "experts": 4, "active": 2, "epochs": 2}


def batches(model, count=2):
    return [inputs_for(model, seed=seed) for seed in range(count)]


def divide(model, *more, data=None, **fields):
    return hf_optim.optimize(model, [{**MOE, **fields}, *more], calibration=data or batches(model))


def logits(model, seed=9):
    with torch.no_grad():
        return model(**inputs_for(model, seed=seed)).logits


def layers_of(model):
    return {name: m for name, m in model.named_modules() if type(m).__name__ == "MoefiedFFN"}


def tiny_phi3():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Phi3ForCausalLM(Phi3Config(**DECODER)).eval()


@pytest.mark.many
@pytest.mark.parametrize("build", [tiny_llama, tiny_phi3, tiny_opt, tiny_gpt2, tiny_bert, tiny_t5])
def test_all_experts_on_is_the_dense_model(build):
    model = build().double()
    expected = logits(model)
    model = divide(model, active=4)
    assert len(layers_of(model)) == (4 if build is tiny_t5 else 2)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("build", [tiny_llama, tiny_opt])
def test_the_chosen_experts_are_the_dense_layer_without_the_other_neurons(build):
    dense = build().double()
    model = divide(copy.deepcopy(dense), active=1)
    name, ffn = next(iter(layers_of(model).items()))
    down = dense.get_submodule(name)
    gated = ffn.experts.has_gate
    first = dense.get_submodule(name.replace("down_proj", "gate_proj").replace("fc2", "fc1"))
    stack = ffn.experts.gate_up_proj[:, :12] if gated else ffn.experts.up_proj
    # Which neuron of the dense layer each neuron of an expert is: the one with its weights.
    origin = (stack.flatten(0, 1)[:, None] == first.weight[None]).all(-1).nonzero()[:, 1].view(4, 12)
    assert sorted(origin.flatten().tolist()) == list(range(48))
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        chosen = ffn.choose(x)
        neurons = F.silu(first(x)) * dense.model.layers[0].mlp.up_proj(x) if gated else F.relu(first(x))
        on = torch.zeros_like(neurons).scatter_(1, origin[chosen[:, 0]], 1.0)
        expected = F.linear(neurons * on, down.weight, down.bias)
        ffn.inlet[0](x)
        torch.testing.assert_close(ffn(x[:, :0]), expected, rtol=0, atol=1e-12)
        scores = F.normalize(x, dim=-1) @ ffn.router.centers.T
        assert torch.equal(chosen[:, 0], (torch.tanh(scores) @ ffn.router.mixing.T).argmax(-1))


@pytest.mark.parametrize("build", [tiny_llama, tiny_opt])
def test_every_experts_implementation_computes_the_same(build):
    model = divide(build())
    assert model.config._experts_implementation == "grouped_mm"
    expected = logits(model)
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    ffn = next(iter(layers_of(model).values()))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        index = ffn.choose(x)
        ones = torch.ones(index.shape)
        torch.testing.assert_close(
            toolkit_experts.expert_product(ffn.experts, x, index, ones, True), ffn.experts(x, index, ones)
        )


def test_the_weights_of_other_experts_are_not_read():
    model = divide(tiny_opt(), active=1)
    ffn = next(iter(layers_of(model).values()))
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        chosen = int(ffn.choose(x))
        others = [e for e in range(4) if e != chosen]
        for parameter in ffn.experts.parameters():
            parameter[others] = torch.nan
        for name in ("eager", "grouped_mm", "batched_mm"):
            model.config._experts_implementation = name
            ffn.inlet[0](x)
            assert torch.isfinite(ffn(x[:, :0])).all()


def test_decoding_with_a_cache_is_the_forward_of_the_whole_text():
    model = divide(tiny_llama())
    ids = inputs_for(model, seed=5, rows=1)["input_ids"]
    made = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        whole = model(made.sequences).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1), whole, rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_between_forwards_and_a_copy_has_its_own_input():
    model = divide(tiny_llama())
    expected, twin = logits(model), copy.deepcopy(model)
    for name, ffn in layers_of(twin).items():
        assert ffn.inlet[0] is twin.get_submodule(name.replace("down_proj", "gate_proj")) or ffn.inlet[0] is (
            twin.get_submodule(name.replace("down_proj", "up_proj"))
        )
        assert ffn.inlet[0].kept.is_empty()
    assert torch.equal(logits(twin), expected)
    with pytest.raises(RuntimeError, match="without its first projection"):
        next(iter(layers_of(model).values()))(torch.zeros(1, 0))


def test_experts_learn_and_the_router_does_not():
    model = divide(tiny_llama()).train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    batch = inputs_for(model, seed=1)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    ffn = next(iter(layers_of(model).values()))
    assert float(ffn.experts.gate_up_proj.grad.abs().sum()) > 0
    assert float(ffn.experts.down_proj.grad.abs().sum()) > 0
    assert not any(p.requires_grad for p in ffn.router.parameters())


# -- options ----------------------------------------------------------------------------------------------------------
def test_targets_skip_and_shares_of_experts():
    model = divide(tiny_llama(), active=0.5, experts=6, skip=("model.layers.1.*",))
    ((name, ffn),) = layers_of(model).items()
    assert name == "model.layers.0.mlp.down_proj"
    assert (ffn.experts.num_experts, ffn.active) == (6, 3)
    assert type(model.model.layers[1].mlp.down_proj) is torch.nn.Linear


@pytest.mark.parametrize("fields", [{"clustering": "coactivation"}, {"router": "similarity"}])
def test_other_clusters_and_routers(fields):
    model = divide(tiny_opt().double(), active=4, **fields)
    torch.testing.assert_close(logits(model), logits(tiny_opt().double()), rtol=0, atol=1e-10)
    if fields.get("router"):
        ffn = next(iter(layers_of(model).values()))
        centers = F.normalize(ffn.experts.up_proj.float(), dim=-1).mean(1)
        torch.testing.assert_close(ffn.router.centers.float(), centers)
        assert ffn.router.mixing is None


def test_experts_of_32_neurons_by_default():
    model = divide(tiny_llama(intermediate_size=96), experts=None)
    assert next(iter(layers_of(model).values())).experts.num_experts == 3


# -- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"active": 5}, r"active \(5\) cannot exceed experts \(4\)"),
        ({"active": 1.5}, r"active is a share in \(0, 1\] or a whole number"),
        ({"active": 0}, "active"),
        ({"experts": 0}, "experts"),
        ({"router": "linear"}, "router"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        OptimConfig.parse([{**MOE, **fields}])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 7}, r"48 neurons of model.layers.0.mlp.down_proj cannot be divided into 7 experts; set experts "
                         "to a divisor: 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        ({"experts": None}, "cannot be divided into experts of 32 neurons"),
        ({"experts": 4, "skip": ("*.down_proj",)}, "targets and skip select by the name of the last"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_divided_so_is_refused(fields, message):
    with pytest.raises(ModelError, match=message):
        divide(tiny_llama(), **fields)


def test_active_beyond_the_default_number_of_experts_is_refused():
    with pytest.raises(ModelError, match=r"cannot exceed the 3 experts of model.layers.0.mlp.down_proj"):
        divide(tiny_llama(intermediate_size=96), experts=None, active=4)


def test_a_model_without_recognised_layers_is_refused_by_name():
    config = AlbertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    with pytest.raises(ModelError, match="AlbertForMaskedLM has no feed-forward layer that can be divided"):
        divide(AlbertForMaskedLM(config).eval())


def test_an_unknown_activation_is_refused_with_the_layer():
    class Odd(torch.nn.Module):
        def forward(self, x):
            return x * torch.sin(x)

    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.act_fn = Odd()
    with pytest.raises(ModelError, match=r"layers.0.mlp.down_proj: between its linear layers is none of transformers'"):
        divide(model)


def test_weights_that_are_not_finite_are_refused_by_name():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(NumericalError, match=r"model.layers.1.mlp.up_proj.weight: the weights of the model hold NaN"):
        divide(model)


def test_experts_that_no_token_chooses_are_counted_and_warned_of(caplog):
    model = tiny_llama()
    divided = divide(model, data=[{"input_ids": torch.tensor([[3, 4]])}], experts=48, active=1)
    figures = hf_optim.run_of(divided).record.steps["0"]["layers"]
    assert all(own["unused"] >= 46 for own in figures.values())
    unused = sum(own["unused"] for own in figures.values())
    assert f"{unused} of 96 experts are chosen for no token of the calibration sample" in caplog.text


def test_a_checkpoint_whose_router_does_not_fit_is_refused(tmp_path):
    divide(tiny_llama()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    first = config["moefication"]["modules"]["model.layers.0.mlp.down_proj"]
    first["experts"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises((RuntimeError, hf_optim.OptimError), match=r"mismatch|shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    first["active"] = 9
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.moefication does not describe a layer"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


# -- composition ------------------------------------------------------------------------------------------------------
def test_pruned_weights_stay_pruned_in_their_experts():
    model = tiny_llama()
    model = hf_optim.optimize(
        model, [{"technique": "magnitude", "sparsity": 0.5}, {**MOE, "active": 4}], calibration=batches(model)
    )
    masks = hf_optim.run_of(model).masks
    experts = {name: mask for name, mask in masks.items() if ".experts." in name}
    assert len(experts) == 4
    for name, mask in experts.items():
        assert torch.equal(mask, model.get_parameter(name) != 0)
        assert 0.4 < float(mask.float().mean()) < 0.6
    assert not any(".up_proj.weight" in name for name in masks)


def test_distillation_recovers_towards_the_dense_model(tmp_path):
    dense, model = tiny_opt(), divide(tiny_opt(), {"technique": "logit_kd", "alpha": 1.0}, active=1)
    routers = {name: ffn.router.centers.clone() for name, ffn in layers_of(model).items()}
    batch = inputs_for(dense, seed=3, rows=8)

    def distance():
        with torch.no_grad():
            student, teacher = (m.eval()(**batch).logits.log_softmax(-1) for m in (model, dense))
        return float(F.kl_div(student, teacher, log_target=True, reduction="batchmean"))

    before = distance()
    rows = [{"input_ids": ids, "labels": ids} for ids in batch["input_ids"]]
    settings = TrainingArguments(
        str(tmp_path), max_steps=25, per_device_train_batch_size=8, learning_rate=3e-3, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    hf_optim.OptimTrainer(model=model, args=settings, train_dataset=rows).train()
    assert distance() < 0.6 * before
    for name, centers in routers.items():
        assert torch.equal(model.get_submodule(name).router.centers, centers)


def test_another_technique_with_code_of_its_own_is_refused():
    with pytest.raises(ModelError, match="MoeficationLlamaForCausalLM has code of its own, and gobo brings"):
        divide(tiny_llama(), {"technique": "gobo"})


def test_the_number_of_code_classes_that_travel():
    text = moefication.Moefication.remote_code.source
    assert "hf_optim" not in text.replace("hf_optim_", "")
    assert "@use_experts_implementation" in text  # transformers looks for this text
    assert _moefied_layers.MoefiedModules.__name__ in text
