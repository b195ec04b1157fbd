"""Adapters on pruned and quantized models: training, saving, and merging back."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_gpt2, tiny_llama
from toy_training import ToyLoss, ToyRamp, arguments, begin, sentences
from transformers import Trainer

import hf_optim
from hf_optim import ModelError, OptimError
from hf_optim.runs.masking import apply_masks, stray_weights
from hf_optim.testing.trait_checks import holds
from hf_optim.training.peft import keep_masks, merge_adapters
from hf_optim.training.trainer import OptimTrainer

# peft asks a transformers model for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
BITS8 = {"technique": "rtn", "bits": 8}


def lora(model, **changes) -> PeftModel:
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "lora_dropout": 0.0, "init_lora_weights": True}
    return get_peft_model(model, LoraConfig(**{**settings, **changes}))


def pruned(builder=tiny_llama):
    return hf_optim.optimize(builder(), [{"technique": "nm"}])


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.stack([row["input_ids"] for row in sentences(4)])).logits


def train(model, folder, trainer_class=Trainer, **changes):
    callbacks = hf_optim.callbacks(model) if trainer_class is Trainer else None
    args = arguments(folder, learning_rate=5e-2, **changes)
    trainer_class(model=model, args=args, train_dataset=sentences(), callbacks=callbacks).train()
    return model


def base_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


def test_recovery_of_a_pruned_model_and_merge_under_the_masks(tmp_path):
    base = pruned()
    run = hf_optim.run_of(base)
    model = lora(base)
    frozen = base_weights(model)
    assert hf_optim.run_of(model) is run
    train(model, tmp_path)
    assert all(torch.equal(p, frozen[n]) for n, p in base_weights(model).items())
    assert stray_weights(run) == []
    layer = base.model.layers[0].mlp.up_proj
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    mask = run.masks["model.layers.0.mlp.up_proj.weight"]
    merged = merge_adapters(model)
    assert merged is base
    assert type(base.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert stray_weights(run) == []
    assert all(holds(trait, run) for trait in run.traits)
    torch.testing.assert_close(base.model.layers[0].mlp.up_proj.weight, expected * mask)
    (note,) = run.record.notes
    share = float(note.split()[2])
    assert 30 < share < 70  # 2:4, of an update that knows nothing of the masks


@pytest.mark.parametrize("builder", [tiny_llama, tiny_gpt2])
def test_adapters_trained_under_the_masks_merge_exactly(tmp_path, builder):
    base = pruned(builder)
    targets = TARGETS if builder is tiny_llama else ["c_attn", "c_fc"]
    model = keep_masks(lora(base, target_modules=targets, fan_in_fan_out=builder is tiny_gpt2))
    before = logits(model)
    train(model, tmp_path)
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=1e-2)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before)
    merged = merge_adapters(model)
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    assert stray_weights(hf_optim.run_of(merged)) == []
    assert hf_optim.run_of(merged).record.notes == []


def test_without_keep_masks_the_merged_model_is_another(tmp_path):
    model = train(lora(pruned()), tmp_path)
    trained = logits(model)
    assert not torch.allclose(logits(merge_adapters(model)), trained, atol=1e-2)


def test_keep_masks_refuses_what_it_cannot_hold():
    with pytest.raises(OptimError, match="has no masks"):
        keep_masks(lora(tiny_llama()))
    with pytest.raises(OptimError, match=r"q_proj: only a plain LoRA adapter without dropout"):
        keep_masks(lora(pruned(), lora_dropout=0.1))
    with pytest.raises(OptimError, match="use_dora=False"):
        keep_masks(lora(pruned(), use_dora=True))


def test_adapters_on_a_quantized_model(tmp_path):
    base = hf_optim.optimize(tiny_llama(), [BITS8])
    before = logits(base)
    model = lora(base)
    assert torch.equal(logits(model), before)  # B starts at zero
    assert type(base.model.layers[0].mlp.up_proj).__module__ == "peft.tuners.lora.layer"
    frozen = base_weights(model)
    train(model, tmp_path / "trainer")
    assert all(torch.equal(p, frozen[n]) for n, p in base_weights(model).items())
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=1e-3)
    with pytest.raises(OptimError, match=r"8 of the layers with adapters are quantized .*q_proj.* merge the adapter"):
        merge_adapters(model)
    torch.testing.assert_close(logits(model), trained, rtol=0, atol=0)  # nothing was merged
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(hf_optim.optimize(tiny_llama(), [BITS8]), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), trained)
    # The remedy that the message names.
    dense = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").merge_and_unload()
    assert hf_optim.run_of(hf_optim.optimize(dense, [BITS8])).finished


def test_merging_dense_adapters_of_a_partly_quantized_model_is_allowed():
    base = hf_optim.optimize(tiny_llama(), [{**BITS8, "targets": ["*.mlp.*"]}])
    model = lora(base, target_modules=["q_proj"], init_lora_weights=False)
    trained = logits(model)
    torch.testing.assert_close(logits(merge_adapters(model)), trained, rtol=1e-4, atol=1e-4)


def test_adapters_saved_by_peft_load_on_a_pruned_model(tmp_path):
    model = train(lora(pruned()), tmp_path / "trainer")
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(pruned(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("trainer_class", [Trainer, OptimTrainer])
def test_a_stage_trained_with_adapters_ends_with_the_merge(tmp_path, trainer_class, caplog):
    base = tiny_llama()
    steps = (ToyRamp(),) if trainer_class is Trainer else (ToyRamp(), ToyLoss())
    run = begin(base, *steps)
    model = lora(base)
    train(model, tmp_path, trainer_class, save_strategy="steps", save_steps=2)
    assert "hf_optim.merge_adapters(model)" in caplog.text
    assert not run.finished
    assert stray_weights(run) == []
    assert run.record.stages[0]["training_steps"] == 4
    merge_adapters(model)
    assert run.finished
    assert stray_weights(run) == []
    assert 0.25 < 1 - run.masks["model.layers.1.mlp.up_proj.weight"].float().mean() < 0.45


def test_masks_on_the_parts_of_an_adapter_are_refused():
    base = tiny_llama()
    run = begin(base, ToyRamp())
    lora(base)
    for part in ("base_layer", "lora_A.default"):
        name = f"model.layers.0.mlp.up_proj.{part}.weight"
        run.masks = {name: torch.ones_like(base.get_parameter(name), dtype=torch.bool)}
        with pytest.raises(ModelError, match=f"{part}.weight has a mask and is inside an adapter layer"):
            apply_masks(run)


def test_only_peft_models_of_a_run_merge():
    with pytest.raises(OptimError, match="not a LlamaForCausalLM"):
        merge_adapters(pruned())
    with pytest.raises(OptimError, match=r"of this LlamaForCausalLM none are known.*merge_and_unload\(\) merges it"):
        merge_adapters(lora(tiny_llama()))


@pytest.mark.filterwarnings("ignore::hf_optim.compressed.packed.packed_linear.KernelWarning")
@pytest.mark.parametrize("loading", [{}, {"optim_config": "auto"}], ids=["stock", "auto"])
@pytest.mark.parametrize("builder", [tiny_llama, tiny_gpt2])
def test_a_pruned_checkpoint_keeps_its_zeros_once_it_is_loaded(builder, loading, tmp_path):
    steps = [{"technique": "nm"}] if builder is tiny_llama else [{"technique": "magnitude", "targets": ["*mlp*"]}]
    hf_optim.optimize(builder(), steps).save_pretrained(tmp_path)
    targets = TARGETS if builder is tiny_llama else ["c_fc", "c_proj"]
    changes = {"target_modules": targets, "init_lora_weights": False, "fan_in_fan_out": builder is tiny_gpt2}

    def loaded():
        return lora(type(builder()).from_pretrained(tmp_path, **loading), **changes)

    stored = {name: parameter == 0 for name, parameter in loaded().get_base_model().named_parameters()}
    model = keep_masks(loaded())
    expected = logits(model)
    merged = merge_adapters(model)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    for held in (merged, merge_adapters(loaded())):
        zeros = {name: parameter == 0 for name, parameter in held.named_parameters() if name.endswith("weight")}
        former = {name.replace(".base_layer", ""): zero for name, zero in stored.items()}
        assert all(bool(zero[former[name]].all()) for name, zero in zeros.items())
        assert sum(int(former[name].sum()) for name in zeros) > 1000


def test_adapters_on_a_compressed_checkpoint_that_runs_on_kernels_are_not_merged(tmp_path):
    hf_optim.optimize(tiny_llama(), [{"technique": "nm"}, BITS8]).save_pretrained(tmp_path)
    model = lora(type(tiny_llama()).from_pretrained(tmp_path, optim_config="auto"), init_lora_weights=False)
    under = logits(keep_masks(model))
    with pytest.raises(OptimError, match="of the layers with adapters are quantized"):
        merge_adapters(model)
    assert torch.equal(logits(model), under)
