"""Tiny V-MoEs for the tests."""

from __future__ import annotations

import torch
from tiny_models import tiny_vit

import hf_optim

DROPLESS = {"experts": 4, "top_k": 2, "capacity": 2.0}


def pictures(count=6, dtype=torch.float32, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vmoe(model=None, **fields):
    return hf_optim.optimize(tiny_vit() if model is None else model, [{"technique": "vmoe", **fields}])


def logits(model, count=6):
    with torch.no_grad():
        return model(pixel_values=pictures(count, model.dtype)).logits


def mixtures(model):
    return [module for module in model.modules() if hasattr(module, "kept")]
