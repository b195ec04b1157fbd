"""Quantization-aware training: what is stored, ordinary checkpoints, exact resumption, and its effect."""

from __future__ import annotations

import copy
import json

import pytest
import real_stories
import torch
from exported import exported
from safetensors.torch import load_file
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_optim
from hf_optim import ModelError, OptimError, RecipeError, compressed, optimize, run_of
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit.modules.modes import eval_mode
from hf_optim.toolkit.pruning.masks import parameter_has_nm_pattern
from hf_optim.toolkit.quantization.fake_quant import FakeQuantLinear
from hf_optim_plugins.quantization.qat import QAT

IDS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(9))


def rows(count=32, width=12):
    tokens = torch.randint(3, 64, (count, width), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in tokens]


class Watch(TrainerCallback):
    """Logits before the stage ends, and the classes of the layers during it."""

    def __init__(self):
        self.active, self.logits = {}, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        fakes = [m for m in model.modules() if isinstance(m, FakeQuantLinear)]
        self.active[state.global_step] = bool(fakes) and all(m.active for m in fakes)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with eval_mode(model):
            self.logits = model(IDS).logits


def train(model, folder, steps=4, resume=None, ours=False, data=None, **more):
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
    }
    watch = Watch()
    given = {"model": model, "args": TrainingArguments(**{**settings, **more}), "train_dataset": data or rows()}
    if ours:
        trainer = hf_optim.OptimTrainer(**given, callbacks=[watch])
    else:
        trainer = Trainer(**given, callbacks=[watch, *hf_optim.callbacks(model)])
    trainer.train(resume_from_checkpoint=resume)
    model.eval()
    return watch


def same(first, second) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


SCHEMES = [
    {"bits": 3, "group_size": 16},
    {"bits": 4, "symmetric": False},
    {"bits": 8, "activations": "int8", "symmetric_activations": False},
    {"bits": 4, "strategy": "tensor", "observer": "mse"},
    {"format": "fp8", "bits": 8, "activations": "fp8"},
    {"bits": None, "activations": "int8"},
    {"bits": 2, "group_size": 16, "learn_scales": True, "observer": "mean"},
    {"bits": 4, "symmetric": False, "group_size": 8, "learn_scales": True},
    {"bits": 8, "activations": "int8", "dynamic": False, "learn_scales": True},
]


@pytest.mark.many
@pytest.mark.parametrize("fields", SCHEMES, ids=str)
def test_the_stored_model_equals_the_last_forward(fields, tmp_path):
    model = optimize(tiny_llama(), {"technique": "qat", **fields})
    watch = train(model, tmp_path, 2, gradient_accumulation_steps=2)
    assert run_of(model).finished
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, watch.logits)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, watch.logits)
    assert not any(isinstance(m, FakeQuantLinear) for m in model.modules())
    assert not any(name.endswith("_step") for name, _ in model.named_parameters())


def test_the_card_has_the_bits_and_the_number_of_layers(tmp_path):
    model = optimize(tiny_llama(), QAT(bits=3, learn_scales=True, activations="int8", skip=("*.down_proj",)))
    train(model, tmp_path)
    (text,) = exported(model).paragraphs.values()
    assert len(compressed.quantized_modules(model)) == 12
    assert {m.quantization_scheme.weights.num_bits for m in compressed.quantized_modules(model).values()} == {3}
    assert text.startswith("12 linear layers were trained with weights of 3 bits and int8 inputs in the forward pass")
    assert text.endswith("scales were learned (LSQ).")


def test_bfloat16_too(tmp_path):
    model = optimize(tiny_llama().bfloat16(), {"technique": "qat", "bits": 4, "group_size": 16, "learn_scales": True})
    watch = train(model, tmp_path, 2)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, watch.logits)


def test_without_learning_it_is_rounding(tmp_path):
    plain = optimize(tiny_llama(), {"technique": "rtn", "bits": 3, "group_size": 16})
    model = optimize(tiny_llama(), {"technique": "qat", "bits": 3, "group_size": 16})
    train(model, tmp_path, 1, learning_rate=0.0)
    assert same(model, plain)


def test_it_starts_at_begin(tmp_path):
    for begin in (3, 0.5):
        model = optimize(tiny_llama(), {"technique": "qat", "begin": begin})
        watch = train(model, tmp_path, 6)
        assert watch.active == {step: step >= 3 for step in range(6)}


@pytest.mark.many(every=4)
@pytest.mark.parametrize("fields", [{"bits": 3}, {"bits": 3, "learn_scales": True, "begin": 1}])
def test_a_checkpoint_is_ordinary_and_training_resumes_bit_exact(fields, tmp_path):
    step = {"technique": "qat", "group_size": 16, **fields}
    whole = optimize(tiny_llama(), step)
    train(whole, tmp_path / "a", 6, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2)
    saved = tmp_path / "a" / "checkpoint-3"
    assert load_file(saved / "model.safetensors").keys() == {
        k for k in tiny_llama().state_dict() if k != "lm_head.weight"
    } | ({"lm_head.weight"} & load_file(saved / "model.safetensors").keys())
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    stock = AutoModelForCausalLM.from_pretrained(saved)
    assert type(stock.model.layers[0].mlp.up_proj) is nn.Linear
    again = optimize(tiny_llama(), step)
    train(again, tmp_path / "a", 6, str(saved), gradient_accumulation_steps=2)
    assert same(whole, again)


def test_learned_scales_train_in_a_stock_trainer_and_their_own_rate_needs_ours(tmp_path):
    step = {"technique": "qat", "bits": 3, "group_size": 16, "learn_scales": True}
    scales = []
    for rate in (None, 0.0, 1e-2):
        model = optimize(tiny_llama(), {**step, "scale_learning_rate": rate} if rate is not None else step)
        if rate is not None:
            with pytest.raises(OptimError, match="sets its own optimizer groups"):
                hf_optim.callbacks(model)
        train(model, tmp_path, ours=rate is not None, weight_decay=0.1)
        scales.append(model.model.layers[0].mlp.up_proj.weight_scale.clone())
    start = optimize(tiny_llama(), {"technique": "rtn", "bits": 3, "group_size": 16})
    begun = start.model.layers[0].mlp.up_proj.weight_scale
    assert torch.equal(scales[1], begun)
    assert not torch.equal(scales[0], begun)
    assert (scales[2] - begun).abs().mean() > (scales[0] - begun).abs().mean() > 0


@pytest.mark.parametrize("shape", [(2, 3, 32), (4, 6, 32)])
def test_the_gradient_of_a_learned_input_scale_is_that_of_lsq(shape):
    """``1 / sqrt(N Q_P)`` times the sum over all values, with N the features of the layer whatever the batch."""
    model = optimize(tiny_llama(), QAT(bits=None, activations="int8", dynamic=False, learn_scales=True))
    run = run_of(model)
    layer = run.recipe.steps[0].prepare(run)["model.layers.0.mlp.gate_proj"].train()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    layer(x)  # the scale starts on the first batch
    weights = torch.randn(*shape[:-1], 48, generator=torch.Generator().manual_seed(2))
    (layer(x) * weights).sum().backward()
    step = layer.input_step.detach().double()
    scaled, incoming = x.double() / step, weights.double() @ layer.weight.detach().double()
    slope = torch.where(scaled <= -128, -128.0, torch.where(scaled >= 127, 127.0, scaled.round() - scaled))
    expected = (incoming * slope).sum() / (32 * 127) ** 0.5
    assert layer.input_step.grad.item() == pytest.approx(expected.item(), rel=1e-3)


def test_gradients_pass_the_rounding_and_stop_at_the_clamp():
    model = optimize(tiny_llama(), {"technique": "qat", "bits": 4, "activations": "int8"})
    hf_optim.callbacks(model)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(5, layer.in_features, requires_grad=True)
    slope = torch.randn(5, layer.out_features)
    (layer(x) * slope).sum().backward()
    assert torch.allclose(x.grad, slope @ layer.fake_weight(), atol=1e-5)
    rounded = compressed.input_quantizer(layer_scheme(model))(x.detach())
    assert torch.allclose(layer.weight.grad, slope.T @ rounded, atol=1e-5)


def layer_scheme(model):
    step = run_of(model).recipe.steps[0]
    return step.scheme(model.model.layers[0].mlp.up_proj.spec)


@pytest.mark.parametrize("order", [("qat", "logit_kd"), ("logit_kd", "qat")])
def test_the_teacher_of_one_stage_is_the_model_before_it(order, tmp_path):
    steps = {"qat": {"technique": "qat", "bits": 2}, "logit_kd": {"technique": "logit_kd", "alpha": 1.0}}
    model = optimize(tiny_llama(), [steps[name] for name in order])
    run = run_of(model)
    assert len(run.stages) == 1
    trainer_data = rows()
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            teacher = run.state(next(s for s in run.recipe.steps if s.name == "logit_kd")).teacher
            seen.append(any(isinstance(m, FakeQuantLinear) for m in teacher.modules()))
            with torch.no_grad():
                assert torch.equal(teacher(IDS).logits, tiny_llama().eval()(IDS).logits)

    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=4, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    hf_optim.OptimTrainer(model=model, args=args, train_dataset=trainer_data, callbacks=[Look()]).train()
    assert seen == [False, False]
    assert len(compressed.quantized_modules(model)) == 14
    assert not any("same distribution" in note for note in run.record.notes)


@pytest.mark.parametrize("first", [{"technique": "nm"}, {"technique": "magnitude", "sparsity": 0.5}])
def test_zeros_of_a_pruned_model_stay(first, tmp_path):
    model = optimize(
        tiny_llama(), [first, {"technique": "qat", "bits": 4, "group_size": 16, "symmetric": False}], calibration=IDS
    )
    train(model, tmp_path)
    run = run_of(model)
    assert {str(trait) for trait in run.traits} >= {"sparse", "quantized"}
    assert all(holds(trait, run) for trait in run.traits)
    for name, mask in run.masks.items():
        assert not model.get_parameter(name)[~mask].any()
    assert all(parameter_has_nm_pattern(model, name, 2, 4) for name in run.nm_patterns)


def test_tied_heads_are_left_out_and_others_quantized_on_request(tmp_path):
    model = optimize(tiny_llama(), {"technique": "qat", "targets": ["lm_head", "Linear"], "skip": ["*.o_proj"]})
    train(model, tmp_path, 1)
    names = compressed.quantized_modules(model)
    assert not any(name.endswith("o_proj") for name in names)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert ("lm_head" in names) != tied


def test_refusals():
    with pytest.raises(ModelError, match=r"step 1 \(qat\) found nothing .*Conv1D"):
        hf_optim.callbacks(optimize(tiny_gpt2(), QAT()))
    for fields, word in (
        ({"bits": None}, "quantizes nothing"),
        ({"observer": "mean"}, "observer mean"),
        ({"scale_learning_rate": 0.1}, "needs learn_scales"),
        ({"activations": "int8", "dynamic": False}, "dynamic: false"),
        ({"format": "fp8"}, "format fp8"),
        ({"strategy": "group"}, "group_size"),
        ({"begin": 1.5}, "begin"),
    ):
        with pytest.raises(RecipeError, match=word):
            QAT(**fields)


def test_a_custom_loop_with_the_callbacks():
    model = optimize(tiny_bert(), {"technique": "qat", "bits": 4})
    hf_optim.callbacks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model(IDS, labels=torch.zeros(4, dtype=torch.long)).loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(IDS).logits
        model = hf_optim.advance(model)
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.real_model
def test_it_beats_post_training_quantization_on_a_real_model(shared_models, shared_data, tmp_path):
    """babyllama-1m at 3 bits, on a small part of the evaluation text, after 40 steps towards the original model."""
    from hf_optim.evaluation.evaluate import perplexity

    home = shared_models / "babyllama-1m"
    held_out = real_stories.windows(home, shared_data, "eval", 16)
    dense = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).eval()
    grid = {"bits": 3, "group_size": 32}
    calibration = real_stories.windows(home, shared_data, "calibration", 16)
    found = {"gptq": optimize(copy.deepcopy(dense), {"technique": "gptq", **grid}, calibration=calibration)}
    step = {"technique": "qat", **grid, "learn_scales": True, "observer": "mse"}
    found["qat"] = optimize(copy.deepcopy(dense), [step, {"technique": "logit_kd", "temperature": 1.0, "alpha": 1.0}])
    data = real_stories.rows(real_stories.windows(home, shared_data, "train", 320))
    train(found["qat"], tmp_path, 40, ours=True, data=data, learning_rate=1e-4, per_device_train_batch_size=8)
    loss = {name: perplexity(model, held_out)["perplexity"] for name, model in found.items()}
    assert loss["qat"] < 0.97 * loss["gptq"]
