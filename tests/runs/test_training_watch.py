"""A pruned model, or one that waits for training, that is trained without callbacks is noticed at the first step."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_optim
from hf_optim import CheckpointError, OptimTrainer
from hf_optim.runs import training_watch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(3, 60, (4, 8), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]
LOST = "LlamaForCausalLM was pruned, and this training runs without hf_optim's callbacks"
IDLE = "waits for training, and this training of LlamaForCausalLM runs without its callbacks"
STARTS = (
    "[gmp] starts when training starts: train with hf_optim.OptimTrainer, or with "
    "Trainer(callbacks=hf_optim.callbacks(model))"
)


def pruned():
    return hf_optim.optimize(tiny_llama(), {"technique": "magnitude"})


def waiting(**changes):
    return hf_optim.optimize(tiny_llama(), {"technique": "gmp", **changes})


def train(model, folder, cls=Trainer, **given):
    args = TrainingArguments(
        folder, max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-2
    )
    cls(model=model, args=args, train_dataset=ROWS, **given).train()


def loop(model, steps=2, optimizer=None):
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def told(caplog, text):
    return [record for record in caplog.records if text in record.getMessage() and record.levelno == logging.WARNING]


def test_a_model_that_waits_says_so_once_in_python(tmp_path, caplog):
    tiny_llama().save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, optim_config={"technique": "gmp"})
    assert [record.getMessage() for record in told(caplog, "starts when training starts")] == [STARTS]
    caplog.clear()
    hf_optim.optimize(tiny_llama(), [{"technique": "logit_kd"}])  # a stock Trainer has no callback for its loss
    assert told(caplog, "[logit_kd] starts when training starts: train with hf_optim.OptimTrainer")
    assert "callbacks" not in caplog.text


def test_a_caller_that_trains_itself_is_not_told(caplog):
    model = hf_optim.optimize(tiny_llama(), {"technique": "gmp"}, announce=False)
    loop(model)
    assert not caplog.records


@pytest.mark.parametrize("trainer", ["stock", "loop"])
@pytest.mark.parametrize(("build", "text"), [(pruned, LOST), (waiting, IDLE)], ids=["pruned", "waiting"])
def test_training_without_callbacks_is_noticed_once(build, text, trainer, tmp_path, caplog):
    model = build()
    train(model, tmp_path) if trainer == "stock" else loop(model)
    (record,) = told(caplog, text)
    assert "hf_optim.OptimTrainer, or with Trainer(callbacks=hf_optim.callbacks(model))" in record.getMessage()
    loop(model)
    assert len(told(caplog, text)) == 1


@pytest.mark.parametrize("build", [pruned, waiting])
@pytest.mark.parametrize("cls", [Trainer, OptimTrainer])
def test_training_with_callbacks_is_not(build, cls, tmp_path, caplog):
    before = set(training_watch._watched)  # models of other tests
    model = build()
    train(model, tmp_path, cls, **({"callbacks": hf_optim.callbacks(model)} if cls is Trainer else {}))
    assert not told(caplog, LOST)
    assert not told(caplog, IDLE)
    assert len(set(training_watch._watched) - before) <= 1
    loop(model)  # a later training without them is
    assert told(caplog, LOST)


def test_what_trains_no_pruned_weight_is_not(caplog):
    model = pruned()
    with torch.no_grad():
        model.train()(input_ids=IDS)
    model.eval()(input_ids=IDS, labels=IDS).loss.backward()  # a gradient, and no step
    model.zero_grad()
    hf_optim.optimize(tiny_llama(1), {"technique": "gptq"}, calibration=[{"input_ids": IDS}])
    loop(tiny_llama(2))
    loop(model, optimizer=torch.optim.SGD([model.lm_head.weight], lr=0.1))  # a head on a frozen body
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    loop(adapted)
    assert not caplog.records


def test_adapters_on_a_model_that_waits_are_not(caplog):
    model = waiting()
    caplog.clear()
    loop(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    assert not caplog.records


def test_the_error_at_saving_names_the_cause_first(tmp_path):
    model = pruned()
    loop(model)
    with pytest.raises(CheckpointError, match=r"and 13 more parameters have weights where they were pruned") as e:
        model.save_pretrained(tmp_path)
    text = str(e.value)
    assert "was trained without hf_optim's callbacks, which keep pruned weights at zero. Train with" in text
    assert text.index("callbacks=hf_optim.callbacks(model)") < text.index("merge_adapters") < text.index("release")

    model = pruned()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(CheckpointError, match=r"up_proj.weight has weights .*hf_optim's callbacks, or adapters"):
        model.save_pretrained(tmp_path)


def test_a_released_model_is_trained_as_it_is(caplog):
    loop(hf_optim.release(pruned()))
    assert not caplog.records


def test_a_watched_model_is_freed_at_once_and_the_hook_goes_with_it():
    gc.collect()
    before = set(training_watch._watched)
    model = pruned()
    reference = weakref.ref(model)
    assert len(training_watch._watched) == len(before) + 1
    gc.disable()
    try:
        del model
        assert reference() is None
        assert set(training_watch._watched) == before
        assert (training_watch._handle is None) == (not before)
    finally:
        gc.enable()


def test_an_optimizer_is_looked_at_once():
    class Counting(torch.optim.SGD):
        looked = 0

        @property
        def param_groups(self):
            type(self).looked += 1
            return self.groups

        @param_groups.setter
        def param_groups(self, groups):
            self.groups = groups

    kept, other = pruned(), tiny_llama(1)
    optimizer = Counting(other.parameters(), lr=0.1)
    Counting.looked = 0
    for _ in range(3):
        training_watch._look(optimizer)
    assert Counting.looked == 1
    del kept
