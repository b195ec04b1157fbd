"""Tiny models whose key/value heads are made equal by hand: what ``mqa`` is tested against.

Nothing of the technique is used: rows are written down by architecture.
"""

from __future__ import annotations

import torch
from tiny_models import TINY
from transformers import PreTrainedModel

import hf_optim
from hf_optim.testing.sweep.checks import build
from hf_optim.toolkit.topology import dummy_inputs

SEED = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 60, (2, 11), generator=SEED)
HEADS = 4
# Architecture -> how many key/value heads its tiny model has, and how the result reloads with 1 and with 2.
FAMILIES = {
    "llama": (2, ("STOCK_ARCH", None)),
    "qwen2": (2, ("STOCK_ARCH", None)),
    "mixtral": (2, ("STOCK_ARCH", None)),
    "phi3": (4, ("STOCK_ARCH", "STOCK_ARCH")),
    "qwen3": (4, ("STOCK_ARCH", "STOCK_ARCH")),
    "gpt2": (4, ("STOCK_ARCH", "REMOTE_CODE")),
    "opt": (4, ("REMOTE_CODE", "REMOTE_CODE")),
    "neox": (4, ("REMOTE_CODE", "REMOTE_CODE")),
    "bert": (4, ("REMOTE_CODE", "REMOTE_CODE")),
    "vit": (4, ("REMOTE_CODE", "REMOTE_CODE")),
    "t5": (4, ("REMOTE_CODE", "REMOTE_CODE")),
}
SWEPT = {"phi3": "Phi3ForCausalLM", "qwen3": "Qwen3ForCausalLM", "neox": "GPTNeoXForCausalLM"}


def tiny(family: str) -> PreTrainedModel:
    """Return a model in float64 whose parameters, biases too, are random."""
    model = (TINY[family]() if family in TINY else build(SWEPT[family])).double().eval()
    model.config._experts_implementation = "eager"  # the fused ones know no float64
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def projected(model: PreTrainedModel, family: str) -> list[list[torch.Tensor]]:
    """Return views of all keys' and values' weights and biases: for each, one view ``[rows, ...]`` per head.

    Written down by architecture, from its documentation: nothing of the technique is used.
    """
    kv = FAMILIES[family][0]
    names = {"bert": ("key", "value"), "t5": ("k", "v")}.get(family, ("k_proj", "v_proj"))
    found = []
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if family in ("gpt2", "phi3", "neox"):
            if leaf not in ("c_attn", "qkv_proj", "query_key_value"):
                continue
            width = model.config.hidden_size // HEADS
            for tensor in (module.weight.T if family == "gpt2" else module.weight, module.bias):
                if tensor is None:
                    continue
                if family == "neox":  # q, k, v of each head in turn
                    by_head = tensor.detach().view(HEADS, 3, width, *tensor.shape[1:])
                    found += [list(by_head[:, part]) for part in (1, 2)]
                else:  # all q, all k, all v
                    parts = tensor.detach().view(3, HEADS, width, *tensor.shape[1:])
                    found += [list(parts[part]) for part in (1, 2)]
        elif leaf in names and not name.startswith("encoder."):
            for tensor in (module.weight, module.bias):
                if tensor is not None:
                    found.append(list(tensor.detach().view(kv, -1, *tensor.shape[1:])))
    assert found
    return found


@torch.no_grad()
def equalize(model: PreTrainedModel, family: str, kv_heads: int) -> PreTrainedModel:
    """Write the mean of each group of heads into all heads of the group."""
    for heads in projected(model, family):
        size = len(heads) // kv_heads
        for first in range(0, len(heads), size):
            mean = torch.stack([h.clone() for h in heads[first : first + size]]).mean(0)
            for head in heads[first : first + size]:
                head.copy_(mean)
    return model


def share(model: PreTrainedModel, kv_heads: int, **fields) -> PreTrainedModel:
    return hf_optim.optimize(model, [{"technique": "mqa", "kv_heads": kv_heads, **fields}])


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    inputs = dummy_inputs(model)
    if "pixel_values" in inputs:
        return {"pixel_values": torch.randn(2, *inputs["pixel_values"].shape[1:], generator=SEED, dtype=model.dtype)}
    return dict.fromkeys(inputs, IDS)


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs) -> torch.Tensor:
    return model(**inputs).logits


def close(one, other, family, kernel="sdpa"):
    """Return True if equal in float64, except for stock eager softmaxes and norms that always run in float32."""
    single = family in ("mixtral", "qwen3") or kernel == "eager" or family in ("llama", "qwen2", "phi3", "t5")
    return torch.allclose(one, other, rtol=0, atol=1e-5 if single else 1e-12)
