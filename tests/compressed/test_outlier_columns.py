"""Outlier thresholds in a configuration, which may come from anyone: what does not describe them is refused."""

import math

import pytest
import torch

from hf_optim import CheckpointError
from hf_optim.compressed.outlier_columns import outlier_thresholds, set_outlier_threshold

UP = "layers.0.up"

MALFORMED = (
    5,
    "outliers",
    [1],
    {"outliers": 5},
    {"outliers": "ab"},
    {"outliers": {"a": 1}},
    {"outliers": [5]},
    {"outliers": [{}]},
    {"outliers": [{"threshold": "6", "modules": [UP]}]},
    {"outliers": [{"threshold": True, "modules": [UP]}]},
    {"outliers": [{"threshold": math.nan, "modules": [UP]}]},
    {"outliers": [{"threshold": -1.0, "modules": [UP]}]},
    {"outliers": [{"threshold": 10**400, "modules": [UP]}]},
    {"outliers": [{"threshold": 6.0, "modules": 5}]},
    {"outliers": [{"threshold": 6.0, "modules": [5]}]},
)


class Config:
    """Has what config.json has."""

    def __init__(self, held=None):
        self.hf_optim = held


def model_with(held):
    layer = torch.nn.ModuleDict({"up": torch.nn.Linear(2, 2), "down": torch.nn.Linear(2, 2)})
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
    model.config = Config(held)
    return model


@pytest.mark.parametrize("held", MALFORMED, ids=repr)
def test_a_configuration_that_does_not_describe_thresholds_is_refused_in_reading_and_writing(held):
    model = model_with(held)
    with pytest.raises(CheckpointError, match=r"config\.json: .*hf_optim"):
        outlier_thresholds(model, [UP])
    with pytest.raises(CheckpointError, match=r"config\.json: .*hf_optim"):
        set_outlier_threshold(model, [UP], 5.0)
    assert model.config.hf_optim is held


def test_other_settings_and_thresholds_stay_when_one_is_set():
    entry = {"threshold": 6, "modules": ["layers.*.up", "layers.*.down"]}
    model = model_with({"routing": {"capacity": 1.0}, "outliers": [entry]})
    set_outlier_threshold(model, [UP], None)
    assert model.config.hf_optim["routing"] == {"capacity": 1.0}
    assert outlier_thresholds(model, [UP, "layers.0.down"]) == {UP: math.inf, "layers.0.down": 6.0}
    assert entry == {"threshold": 6, "modules": ["layers.*.up", "layers.*.down"]}
