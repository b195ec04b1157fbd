"""Loading with the weights where they will be kept: never the whole model, and what is read is the checkpoint."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny_models import TINY, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import hf_optim
from hf_optim import ModelError, RecipeError, run_of
from hf_optim.testing.tiny_runs import inputs_for
from hf_optim.toolkit.offloading import files, find_state

CLASSES = {
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "mixtral": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
    "bert": AutoModelForSequenceClassification,
    "vit": AutoModelForImageClassification,
}
STEP = {"technique": "offload", "to": "disk", "threads": 2}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_dense_checkpoint(name, dtype, tmp_path, monkeypatch):
    TINY[name]().save_pretrained(tmp_path / "model")
    spilled = []
    former = files.SpillFile.append
    monkeypatch.setattr(files.SpillFile, "append", lambda self, memory: spilled.append(1) or former(self, memory))
    stock = CLASSES[name].from_pretrained(tmp_path / "model", dtype=dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs_for(stock).items()}
    model = CLASSES[name].from_pretrained(tmp_path / "model", dtype=dtype, optim_config=STEP)
    # What is stored as it is needed is read from the checkpoint; what is cast, or stacked from experts, is written.
    assert bool(spilled) == (dtype != torch.float32 or name == "mixtral")
    expected = stock(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    assert find_state(model) is not None
    assert model.state_dict().keys() == stock.state_dict().keys()
    model.save_pretrained(tmp_path / "out")
    again = CLASSES[name].from_pretrained(tmp_path / "out", dtype=dtype)
    assert torch.equal(again(**inputs).logits, expected)
    hf_optim.restore(model)
    assert torch.equal(model(**inputs).logits, expected)
    assert run_of(model).record.steps["0"]["blocks"]["disk"] == len(hf_optim.toolkit.topology.blocks(model))


@pytest.mark.many(every=4)
@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "W8A8"])
def test_a_compressed_checkpoint_is_packed_block_by_block(scheme, tmp_path):
    model = tiny_llama(num_hidden_layers=3, hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    step = {"technique": "rtn", "scheme": scheme} | ({"group_size": 32} if scheme == "W4A16" else {})
    step = {"technique": "rtn", "bits": 4, "group_size": 32} if scheme == "W4A16" else step
    hf_optim.optimize(model, step).save_pretrained(tmp_path / "packed")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", optim_config="auto")
    inputs = inputs_for(whole)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", optim_config=STEP)
    assert torch.equal(model(**inputs).logits, whole(**inputs).logits)
    kinds = [[type(m).__name__ for m in each.modules() if isinstance(m, torch.nn.Linear)] for each in (model, whole)]
    assert kinds[0] == kinds[1]
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", optim_config="auto")
    assert torch.equal(again(**inputs).logits, whole(**inputs).logits)


def test_after_other_steps_of_a_recipe(tmp_path):
    tiny_llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    quantize = {"technique": "rtn", "bits": 4, "group_size": 32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", optim_config=[quantize, STEP])
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model", optim_config=quantize)
    inputs = inputs_for(other)
    assert torch.equal(model(**inputs).logits, other(**inputs).logits)
    assert find_state(model) is not None
    assert [step.name for step in run_of(model).recipe.steps] == ["rtn", "offload"]


@pytest.mark.parametrize(
    ("device_map", "reason"),
    [
        ("auto", "device_map='auto' has accelerate place the weights"),
        ({"model": "cpu", "lm_head": 0}, "device_map spreads the model over 2 places"),
    ],
)
def test_a_device_map_that_spreads_is_refused(device_map, reason, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=reason):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", optim_config=STEP, device_map=device_map)


def test_what_a_load_refuses(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    for step, error, reason in (
        ({**STEP, "to": "cpu"}, ModelError, r"step 1 \(offload\): the model computes on the CPU"),
        ({**STEP, "host_memory": "1MB"}, ModelError, r"step 1 \(offload\): host_memory=\S+ \S+ is too little: .*least"),
        ([STEP, {"technique": "gmp"}], RecipeError, r"step 1 \(offload\) offloads the weights, and offloaded weights"),
        ([STEP, STEP], RecipeError, "keep only one of"),
    ):
        with pytest.raises(error, match=reason):
            AutoModelForCausalLM.from_pretrained(tmp_path / "model", optim_config=step)


CHILD = """
import sys, threading, time, torch
import hf_optim
from transformers import AutoModelForCausalLM, LlamaConfig
torch.set_grad_enabled(False)
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(key))
model = AutoModelForCausalLM.from_pretrained({small!r}, optim_config={step!r})  # imports everything
model(input_ids=torch.ones(1, 4, dtype=torch.long))
del model
open('/proc/self/clear_refs', 'w').write('5')
base = status('VmRSS')
model = AutoModelForCausalLM.from_pretrained({large!r}, optim_config={step!r} | {{'host_memory': {budget}}})
for _ in range(2):
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
plan = hf_optim.offload_plan(model)
print('PEAK', status('VmHWM') - base, plan.places.count('device'), sum(plan.sizes), plan.device_bytes)
"""


@pytest.mark.slow
def test_a_budget_of_host_memory_holds(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    tiny_llama().save_pretrained(tmp_path / "small")
    large = tiny_llama(num_hidden_layers=16, vocab_size=1000, **sizes)
    large.save_pretrained(tmp_path / "large", max_shard_size="300MB")
    total = sum(p.numel() * 4 for p in large.parameters())
    budget = 400_000_000
    code = CHILD.format(small=str(tmp_path / "small"), large=str(tmp_path / "large"), budget=budget, step=STEP)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, resident, blocks, device = map(int, done.stdout.split("PEAK")[1].split())
    assert total > 1_000_000_000
    assert blocks > 2 * budget
    assert resident > 0
    assert device <= budget
    assert peak <= budget + 60_000_000  # activations, and what the interpreter takes
