"""Columns of prepared data: every input that the model's forward takes is kept, from every container."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from tiny_models import tiny_llama, tiny_t5

from hf_optim import DataConfig, DataError
from hf_optim.data.calibration_set import build_calibration_data
from hf_optim.data.forward_inputs import forward_inputs

IDS = torch.arange(3, 51).view(6, 8)
COLUMNS = {"input_ids": IDS, "position_ids": (torch.arange(8) % 4).expand(6, 8), "unknown": IDS}


def containers(columns, folder):
    from datasets import Dataset

    made = Dataset.from_dict({key: value.tolist() for key, value in columns.items()})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return {
        "list": [dict(columns)],
        "dataset": made,
        "torch": made.with_format("torch"),
        "numpy": made.with_format("numpy"),
        "loader": torch.utils.data.DataLoader(made.with_format("torch"), batch_size=6),
        "file": str(file),
    }


@pytest.mark.parametrize("kind", ["list", "dataset", "torch", "numpy", "loader", "file"])
def test_every_container_keeps_what_the_forward_takes(tmp_path, caplog, kind):
    model = tiny_llama()
    with caplog.at_level(logging.WARNING, "hf_optim"):
        source = containers(COLUMNS, tmp_path)[kind]
        made = build_calibration_data(source, model_config=model.config, model=model, data=DataConfig(samples=6))
    assert sorted(made.batches[0]) == ["input_ids", "position_ids"]
    assert torch.equal(torch.cat([b["position_ids"] for b in made]), COLUMNS["position_ids"])
    lines = [record.message for record in caplog.records if "does not take" in record.message]
    assert len(lines) == 1
    assert "unknown" in lines[0]


@pytest.mark.parametrize("kind", ["dataset", "torch", "file"])
def test_a_decoder_mask_is_kept(tmp_path, kind):
    model = tiny_t5()
    columns = {"input_ids": IDS, "decoder_input_ids": IDS, "decoder_attention_mask": (IDS % 8 > 3).long()}
    made = build_calibration_data(containers(columns, tmp_path)[kind], model_config=model.config, model=model)
    assert torch.equal(made.batches[0]["decoder_attention_mask"], columns["decoder_attention_mask"])


def test_a_column_that_some_rows_lack_names_the_row():
    from datasets import Dataset

    rows = [{"input_ids": [3, 4], "position_ids": [0, 1]}, {"input_ids": [5, 6], "position_ids": None}]
    model = tiny_llama()
    with pytest.raises(DataError, match="row 1 has no 'position_ids'"):
        build_calibration_data(Dataset.from_list(rows), model_config=model.config, model=model)


def test_examples_of_unequal_length_do_not_share_a_batch():
    from datasets import Dataset

    rows = [{"input_ids": [3] * n, "position_ids": list(range(n))} for n in (4, 6, 4)]
    model = tiny_llama()
    made = build_calibration_data(Dataset.from_list(rows), model_config=model.config, model=model)
    assert [tuple(batch["position_ids"].shape) for batch in made] == [(1, 4), (1, 6), (1, 4)]


def test_labels_give_a_decoder_mask_and_are_kept_for_losses():
    model = tiny_t5()
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    source = [{"input_ids": IDS[:2], "labels": labels}]
    made = build_calibration_data(source, model_config=model.config, model=model)
    assert made.batches[0]["decoder_attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert made.batches[0]["decoder_input_ids"].tolist() == [[0, 5, 6], [0, 7, 0]]
    assert torch.equal(made.labels[0], labels)
    assert "labels" not in made.batches[0]


def test_an_argument_without_default_is_data_whatever_its_name():
    class Robot:
        main_input_name = "input_ids"

        def forward(self, input_ids, state, cache=None, mems=None):
            """Take the state of a robot, and two caches that a batch does not bring."""

    assert forward_inputs(Robot) == {"input_ids", "state", "labels"}
