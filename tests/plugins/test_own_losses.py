"""A loss that a model adds to that of its head is not lost in silence where the loss is computed outside."""

from __future__ import annotations

import warnings

import pytest
import torch

import hf_optim
from hf_optim.testing import models

UNIVERSAL = {"technique": "universal_transformer", "steps": 2}
MODELS = {
    "routing_transformer": ("llama", [{"technique": "routing_transformer", "clusters": 2, "window": 5}]),
    "compressive_transformer": (
        "llama",
        [
            {
                "technique": "compressive_transformer",
                "segment": 16,
                "memory": 8,
                "compressed": 4,
                "ratio": 2,
                "loss": "attention",
            }
        ],
    ),
    "act": ("llama", [UNIVERSAL, {"technique": "act"}]),
    "vmoe": ("vit", [{"technique": "vmoe", "experts": 2, "top_k": 1}]),
}
TERMS = {
    "routing_transformer": lambda model: model.commitment_loss(),
    "compressive_transformer": lambda model: model.compression_loss(),
    "act": lambda model: model.pondered.cost,
    "vmoe": lambda model: model.router_loss(),
}


def converted(name):
    family, steps = MODELS[name]
    if family == "vit":
        model, inputs = models.tiny_vit(), {"pixel_values": torch.randn(2, 3, 16, 16)}
        labels = torch.tensor([0, 1])
        size = model.config.image_size
        inputs["pixel_values"] = torch.randn(2, 3, size, size)
    else:
        model, inputs = models.tiny_llama(), {"input_ids": torch.randint(1, 60, (2, 32))}
        labels = inputs["input_ids"]
    given = {"calibration": torch.randint(1, 60, (2, 32))} if name == "routing_transformer" else {}
    return hf_optim.optimize(model, {"steps": steps}, **given), inputs, labels


@pytest.mark.parametrize("name", MODELS)
def test_training_without_labels_warns_once_unless_the_term_is_read(name):
    model, inputs, labels = converted(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            model.eval()(**inputs)
            with torch.no_grad():
                model.train()(**inputs)
            model(**inputs, labels=labels)
        for _ in range(2):
            model(**inputs)
            term = TERMS[name](model)
            assert term.requires_grad
            assert float(term.detach()) > 0
        model(**inputs)
    with pytest.warns(UserWarning, match=r"label smoothing.*model\.\w+"):
        model(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)
