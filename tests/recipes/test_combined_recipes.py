"""Recipes of several techniques: each keeps the effects of those before it, and stock transformers loads the result."""

from __future__ import annotations

import pytest
import torch
from datasets import load_dataset
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

import hf_optim
from hf_optim.recipes.traits import QUANTIZED, SPARSE, SPARSE_NM
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit.pruning.masks import has_nm_pattern

RECIPE = [
    {"technique": "nm", "keep": 2, "group": 4},
    {"technique": "logit_kd"},
    {"technique": "gptq", "bits": 4, "group_size": 32},
]


@pytest.mark.real_model
def test_2of4_under_distillation_then_gptq_on_a_real_model(shared_models, shared_data, tmp_path, stock):
    home = shared_models / "babyllama-1m"
    tokenizer = AutoTokenizer.from_pretrained(home)
    rows = load_dataset("json", data_files=str(shared_data / "tinystories" / "calibration.jsonl"), split="train")
    texts = list(rows["text"])[:64]
    ids = [tokenizer(text, truncation=True, max_length=128)["input_ids"] for text in texts]
    calibration = torch.tensor([row[:96] for row in ids if len(row) >= 96][:16])

    model = AutoModelForCausalLM.from_pretrained(
        home, optim_config=RECIPE, calibration=calibration, tokenizer=tokenizer
    )
    run = hf_optim.run_of(model)
    assert str(run.stage) == "[nm, logit_kd]"

    def loss() -> float:
        with torch.no_grad():
            return float(run.model.eval()(calibration, labels=calibration).loss)

    pruned = loss()
    args = TrainingArguments(
        str(tmp_path / "training"), max_steps=12, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = hf_optim.OptimTrainer(
        model=model, args=args, train_dataset=[{"input_ids": row} for row in ids], data_collator=collator
    )
    trainer.train()

    # The end of training finished the stage and ran the next one, since its data was available.
    assert run.finished
    assert {SPARSE_NM, QUANTIZED} <= run.traits
    assert loss() < pruned
    assert len(run.nm_patterns) == 35
    for name, (keep, group) in run.nm_patterns.items():
        module = run.model.get_submodule(name.removesuffix(".weight"))
        assert has_nm_pattern(module.weight.detach(), keep, group)
        assert module.quantization_scheme.weights.num_bits == 4

    run.model.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = run.model(calibration).logits
    name, logits = stock.logits(tmp_path / "out", "AutoModelForCausalLM", {"input_ids": calibration})
    assert name == "LlamaForCausalLM"
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    "steps",
    [
        [{"technique": "smoothquant"}, {"technique": "gptq", "group_size": None, "activations": "int8"}],
        [{"technique": "magnitude", "sparsity": 0.5}, {"technique": "obq", "group_size": 16}],
        [{"technique": "nm"}, {"technique": "gptq", "bits": 3, "group_size": 16}, {"technique": "lkd", "steps": 3}],
        [{"technique": "nm"}, {"technique": "zeroquant"}],
    ],
    ids=lambda steps: ", ".join(step["technique"] for step in steps),
)
def test_post_training_techniques_compose(steps, tmp_path, stock):
    ids = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    model = hf_optim.optimize(tiny_llama(), steps, calibration=ids)
    run = hf_optim.run_of(model)
    for trait in run.traits:
        assert holds(trait, run)
    assert QUANTIZED in run.traits
    assert (SPARSE_NM in run.traits or SPARSE in run.traits) == (steps[0]["technique"] in ("nm", "magnitude"))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(stock.logits(tmp_path, "AutoModelForCausalLM", {"input_ids": ids})[1], model(ids).logits)
