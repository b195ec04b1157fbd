"""The bar of a Trainer in the caller's own code stays the only one while it trains, and ours comes after it."""

from __future__ import annotations

import pytest
import torch
from terminal import bars_allowed, terminal
from tiny_models import tiny_llama
from transformers import Trainer, TrainingArguments

import hf_optim

RECIPE = {"steps": [{"technique": "gmp"}, {"technique": "rtn", "bits": 4, "group_size": 16}]}


@pytest.mark.parametrize("ours", [True, False], ids=["OptimTrainer", "Trainer with callbacks"])
def test_one_bar_at_a_time(tmp_path, monkeypatch, ours):
    model = hf_optim.optimize(tiny_llama(num_hidden_layers=2), RECIPE)
    ids = torch.randint(3, 50, (8, 16), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    with bars_allowed(monkeypatch), terminal() as seen:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no",
            disable_tqdm=False, logging_steps=1,
        )  # fmt: skip
        if ours:
            hf_optim.OptimTrainer(model=model, args=arguments, train_dataset=rows).train()
        else:
            Trainer(model=model, args=arguments, train_dataset=rows, callbacks=hf_optim.callbacks(model)).train()
    assert hf_optim.run_of(model).finished
    bars = [line for line in seen.screen if "%|" in line]
    assert len(bars) == 1, seen.screen
    assert "| 2/2" in bars[0]
    assert any(frame.startswith("quantizing: 1/2 blocks") for frame in seen.frames)
    assert not [line for line in seen.screen if "elapsed" in line]
    assert "Applying quantization" not in seen.written
    assert "\x1b[A" not in seen.written
