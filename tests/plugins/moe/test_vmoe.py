"""V-MoE: which layers become mixtures, training with any Trainer, checkpoints with their code, refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_models import TINY, tiny_vit
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from vmoe_models import DROPLESS, logits, mixtures, pictures, vmoe

import hf_optim
from hf_optim import CheckpointError, ModelError, OptimError, RecipeError
from hf_optim.cli import main
from hf_optim.toolkit import topology

ENABLE_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if hasattr(PreTrainedModel, name)
)


# -- the transformation -----------------------------------------------------------------------------------------------
def test_which_layers():
    def found(**fields):
        model = vmoe(tiny_vit(num_hidden_layers=6), experts=4, **fields)
        return [n for n, layer in enumerate(model.vit.layers) if hasattr(layer.mlp, "router")]

    assert found() == [1, 3, 5]
    assert found(every=1) == [0, 1, 2, 3, 4, 5]
    assert found(every=3) == [2, 5]
    assert found(last=2) == [3, 5]


def test_experts_are_copies_or_random_and_the_rest_is_shared():
    dense = tiny_vit()
    mlp, attention = dense.vit.layers[1].mlp, dense.vit.layers[1].attention.q_proj.weight
    model = vmoe(dense, experts=3)
    own = model.vit.layers[1].mlp.experts
    assert model.vit.layers[1].attention.q_proj.weight is attention
    for e in range(3):
        assert torch.equal(own.up_proj[e], mlp.fc1.weight)
        assert torch.equal(own.down_proj_bias[e], mlp.fc2.bias)
    noisy = vmoe(experts=3, expert_noise=0.1).vit.layers[1].mlp.experts.up_proj.detach()
    assert 0.05 < float((noisy - mlp.fc1.weight.detach()).std() / mlp.fc1.weight.detach().std()) < 0.15
    scratch = vmoe(experts=3, start="random").vit.layers[1].mlp.experts
    assert float(scratch.up_proj.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(scratch.up_proj[0], scratch.up_proj[1])
    assert not scratch.up_proj_bias.any()
    assert topology.roles(model)["vit.layers.1.mlp.router"] == "router"


def test_pruned_weights_stay_pruned():
    model = hf_optim.optimize(
        tiny_vit(), [{"technique": "magnitude"}, {"technique": "vmoe", "experts": 3, "expert_noise": 0.1}]
    )
    own = model.vit.layers[1].mlp.experts.up_proj
    assert 0.45 < float((own == 0).float().mean()) < 0.55
    assert set(hf_optim.run_of(model).masks) >= {"vit.layers.1.mlp.experts.up_proj"}


# -- training ---------------------------------------------------------------------------------------------------------
class Examples(torch.utils.data.Dataset):
    """Eight times the same picture, so that every batch has the same loss."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"pixel_values": pictures(1)[0], "labels": 1}


def train(model, folder, cls=Trainer, **fields):
    settings = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True,
        **{"learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 4, **fields},
    )  # fmt: skip
    trainer = cls(model=model, args=settings, train_dataset=Examples(), eval_dataset=Examples())
    trainer.train()
    return trainer


@pytest.mark.parametrize("cls", [Trainer, hf_optim.OptimTrainer])
@pytest.mark.parametrize("batch", [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}], ids=str)
def test_the_losses_reach_the_loss_of_trainers(cls, batch, tmp_path):
    fields = {"importance_loss": 100.0, "load_loss": 0.0, "noise": 0.0, "router_std": 1.0}
    model = vmoe(**DROPLESS, **fields)
    trainer = train(model, tmp_path, cls, learning_rate=0.0, **batch)
    with torch.no_grad():
        rows = {"pixel_values": pictures(1).expand(2, -1, -1, -1), "labels": torch.tensor([1, 1])}
        task = float(model.eval()(**rows).loss)
        model.train()(**{"pixel_values": rows["pixel_values"]})
        routers = float(model.router_loss())
    assert routers > 1
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert [float(value) for value in logged] == pytest.approx([task + routers] * 2, rel=1e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(task, rel=1e-3)


def test_gradient_checkpointing_has_the_same_gradients():
    def gradients(checkpointing):
        model = vmoe(**DROPLESS, importance_loss=1.0).train()
        if checkpointing:
            getattr(model, ENABLE_CHECKPOINTING)()
        torch.manual_seed(3)
        model(pixel_values=pictures(), labels=torch.arange(6) % 3).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


def test_a_model_is_copied_after_a_training_forward():
    model = vmoe(**DROPLESS).train()
    model(pixel_values=pictures())
    assert mixtures(model)[0].loss is not None
    assert mixtures(copy.deepcopy(model))[0].loss is None
    assert model.router_loss() is not None
    assert model.router_loss() is None


def test_it_compiles_as_one_graph():
    model = vmoe(experts=4, capacity=0.5, batch_priority=True, expert_noise=0.5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(pixel_values=pictures()).logits, logits(model), atol=1e-6)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("fields", [{"capacity": 0.5}, {"capacity": 0.5, "group": "image"}, {"capacity": 2.0}], ids=str)
def test_a_compiled_model_takes_batches_of_other_sizes(fields):
    model = vmoe(experts=4, batch_priority=True, expert_noise=0.5, **fields)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for count in (6, 2, 5):
            assert torch.allclose(compiled(pixel_values=pictures(count)).logits, logits(model, count), atol=1e-6)


# -- checkpoints ------------------------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path):
    model = vmoe(experts=4, capacity=0.5, expert_noise=0.5)
    model.save_pretrained(tmp_path / "vmoe")
    return model, tmp_path / "vmoe"


def test_the_capacity_of_a_checkpoint_can_be_changed_and_it_trains_on(saved, tmp_path):
    model, folder = saved
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.vmoe["capacity"] == 0.5
    config.vmoe["capacity"] = 2.0
    loaded = AutoModelForImageClassification.from_pretrained(folder, config=config, trust_remote_code=True)
    for layer in mixtures(model):
        layer.settings["capacity"] = 2.0
    assert torch.equal(logits(loaded), logits(model))
    train(loaded, tmp_path / "training")


def test_the_implementation_of_experts_can_be_named_when_loading(saved):
    model, folder = saved
    loaded = AutoModelForImageClassification.from_pretrained(
        folder, trust_remote_code=True, experts_implementation="grouped_mm"
    )
    assert loaded.config._experts_implementation == "grouped_mm"
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)


def test_a_model_of_the_class_is_made_from_its_configuration_alone(saved):
    _, folder = saved
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageClassification.from_config(config, trust_remote_code=True)
    own = mixtures(model)[0].experts
    assert float(own.up_proj.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert bool(torch.isfinite(logits(model.eval())).all())


def test_a_checkpoint_is_compressed_further_by_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vmoe(**DROPLESS).save_pretrained("vmoe")
    (tmp_path / "prune.yaml").write_text("steps: [{technique: magnitude, sparsity: 0.5}]")
    assert main(["compress", "vmoe", "--recipe", "prune.yaml", "--output", "out", "--trust-remote-code"]) == 0
    made = AutoModelForImageClassification.from_pretrained("out", trust_remote_code=True)
    zeros = made.vit.layers[0].attention.q_proj.weight == 0
    assert float(zeros.float().mean()) == pytest.approx(0.5, abs=0.02)
    assert bool(mixtures(made)[0].router.weight.all())


# -- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 2, "top_k": 3}, r"top_k \(3\) cannot exceed experts \(2\)"),
        ({"capacity": 0}, "capacity"),
        ({"capacity": float("nan")}, "capacity"),
        ({"train_capacity": float("inf")}, "train_capacity"),
        ({"noise": 0.0}, "the load loss is a probability under the noise"),
        ({"start": "random", "expert_noise": 0.1}, "experts that start as copies"),
        ({"group": "sequence"}, "group"),
    ],
    ids=str,
)
def test_fields_that_make_no_mixture_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        vmoe(**fields)


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (TINY["llama"], {}, "LlamaForCausalLM is not a vision transformer"),
        (TINY["t5"], {}, "is not a vision transformer"),
        (TINY["mixtral"], {}, "does not support a model that routes tokens to experts"),
        (tiny_vit, {"every": 3}, "every=3 selects none of the 2 layers"),
        (tiny_vit, {"last": 2}, "last=2, but every=2 selects 1 layers only"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_models_without_such_layers_are_refused(build, fields, message):
    with pytest.raises(OptimError, match=message):
        vmoe(build(), **fields)


def test_a_model_of_several_towers_is_refused():
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = {**small, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 64}, vision_config=vision, projection_dim=16))
    with pytest.raises(ModelError, match="is not a vision transformer"):
        vmoe(model)


def test_a_second_time_is_refused():
    with pytest.raises(OptimError, match="routes tokens to experts"):
        vmoe(vmoe(experts=4), experts=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 5}, "router|experts"),
        ({"top_k": 9}, "top_k must be from 1 to the number of experts"),
        ({"capacity": float("nan")}, "capacity must be a finite number"),
        ({"capacity": 0}, "capacity must be above 0"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_refused(saved, change, message):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["vmoe"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError, CheckpointError, ModelError), match=message):
        AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, optim_config="auto")
