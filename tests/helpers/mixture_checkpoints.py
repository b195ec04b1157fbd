"""Checkpoints of mixtures with compressed experts, under the names of their architecture, as other tools write them."""

from __future__ import annotations

import numpy as np
import torch
from reference_packers import Grid, write
from transformers.core_model_loading import revert_weight_conversion


def write_mixture(model, folder, layout, config, bits, size, symmetric, scattered=False, only_experts=False):
    """Write ``model`` with random codes in place of the weights of its experts (and its other linears but the head).

    The model then has the dense weights that the codes stand for, in float64 rounded to its dtype.

    Args:
        layout: ``Grid -> tensors`` of a layer.
    """
    rng = np.random.default_rng(bits * 10 + (size or 7))
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    stored = {key: value.clone() for key, value in revert_weight_conversion(model, dict(state)).items()}
    layers = {}
    for key, value in stored.items():
        name = key.removesuffix(".weight")
        inside = "experts" in key
        plain = value.dim() == 2 and ("proj" in key and not only_experts)
        if not (inside or plain) or value.dim() != 2 or "shared_expert_gate" in key:
            continue
        grid = Grid(rng, *value.shape, bits, size, symmetric, scattered)
        layers[name] = layout(grid)
        stored[key] = torch.from_numpy(grid.dense).to(value.dtype)
    _load_dense(model, stored)
    keeper = _Stored(model, stored)
    write(keeper, folder, layers, config)
    return list(layers)


class _Stored:
    """What ``reference_packers.write`` reads of a model, with the names of the checkpoint."""

    def __init__(self, model, stored):
        self.config, self._stored = model.config, stored
        self.__class__ = type(type(model).__name__, (_Stored,), {})

    def state_dict(self):
        return dict(self._stored)


def _load_dense(model, stored):
    """Put the tensors of a checkpoint into the model: experts are stacked here, by hand."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in stored.items():
            target = key if key in own else key.replace("block_sparse_moe", "mlp")
            if target in own:
                own[target].copy_(value)
        for name, parameter in own.items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                continue
            base = name.rpartition(".")[0]
            for expert in range(len(parameter)):
                parameter[expert].copy_(_matrix(stored, base, expert, name.endswith("gate_up_proj")))


def _matrix(stored, base, expert, is_up):
    for home in (base, base.replace(".mlp.", ".block_sparse_moe.")):
        for gate, up, down in (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")):
            if f"{home}.{expert}.{gate}.weight" in stored:
                parts = (gate, up) if is_up else (down,)
                return torch.cat([stored[f"{home}.{expert}.{part}.weight"] for part in parts])
    raise KeyError(base)
