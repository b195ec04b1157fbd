"""Models with random weights for timing, built on the device block by block, so that at most one block is dense."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

from ...compressed.packed.accelerate import accelerate
from ...compressed.schemes import scheme
from ...compressed.state import store
from ...errors import OptimError
from ...toolkit import topology
from .peers import GROUP, prune24

SCHEMES = ("dense", "w4a16", "w8a8", "2:4", "2:4-w4a16")
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    },
}


def resolve_config(model: str) -> PreTrainedConfig:
    """Return the configuration of a shape in ``SHAPES``, a Hub id or a directory. No weights are read."""
    if model in SHAPES:
        return LlamaConfig(**SHAPES[model], tie_word_embeddings=False)
    from ...toolkit.checkpoint.model_config import load_config

    return load_config(model)


@torch.no_grad()
def build(model: str, scheme_name: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """Build a causal language model with random weights under a scheme of ``SCHEMES``, on its kernels.

    Each block is materialized, quantized and accelerated before the next one, so that at most one is dense at a time.
    The output head and the embeddings stay dense. The model has no eos token, so that it never stops early. Raises
    ``OptimError`` for an unknown scheme.
    """
    if scheme_name not in SCHEMES:
        raise OptimError(f"no scheme {scheme_name!r}; the schemes are {', '.join(SCHEMES)}")
    torch.manual_seed(seed)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(resolve_config(model), dtype=dtype, trust_remote_code=False)
    built.eval().requires_grad_(False)
    for block in [b.module for b in topology.blocks(built)]:
        _materialize(built, block, device)
        for layer in topology.linears(block).values():
            _compress(layer, scheme_name)
        if scheme_name != "dense":
            with warnings.catch_warnings():
                # The results name the layers that stay dense, so no warning is needed here.
                warnings.simplefilter("ignore")
                accelerate(block)
    _materialize(built, built, device)
    built.tie_weights()
    if scheme_name != "dense":
        accelerate(built)
    built.generation_config = GenerationConfig()
    return built


def _materialize(model: PreTrainedModel, part: nn.Module, device: torch.device) -> None:
    """Give storage and values to every module of ``part`` that is still on the meta device."""
    for module in part.modules():
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in held):
            module.to_empty(device=device, recurse=False)
            init: Any = model._init_weights
            init(module)


def _compress(layer: nn.Module, scheme_name: str) -> None:
    """Replace the random weight of a layer by random codes of the scheme, or prune it."""
    weight: Tensor = layer.get_parameter("weight")
    if scheme_name == "2:4":
        weight.copy_(prune24(weight))
    elif scheme_name in ("w4a16", "2:4-w4a16"):
        grouped = weight.shape[1] % GROUP == 0
        strategy, size = ("group", GROUP) if grouped else ("channel", None)
        grid = scheme(4, strategy=strategy, group_size=size)  # type: ignore[arg-type]
        codes, scale = _random_codes(weight, 4, size or weight.shape[1])
        store(layer, grid, prune24(codes) if scheme_name == "2:4-w4a16" else codes, scale)
    elif scheme_name == "w8a8":
        store(layer, scheme(8, activations="int8"), *_random_codes(weight, 8, weight.shape[1]))


def _random_codes(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return int8 codes ``[out, in]`` and scales ``[out, groups]`` of a weight with a realistic standard deviation."""
    rows, columns = weight.shape
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, weight.shape, dtype=torch.int8, device=weight.device)
    step = 0.02 * 3**0.5 / half
    scale = (0.5 + torch.rand(rows, columns // group_size, device=weight.device)) * step
    return codes, scale.to(weight.dtype)


def tensor_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers; shared ones count once."""
    tensors = {
        id(t): t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
    }
    return sum(t.numel() * t.element_size() for t in tensors.values())


def bytes_read_per_step(model: PreTrainedModel) -> int:
    """Return the bytes that a decoding step must read: all weights except an untied embedding table."""
    inputs: Any = model.get_input_embeddings()
    outputs: Any = model.get_output_embeddings()
    inputs, outputs = inputs.weight, outputs.weight
    embedding = 0 if inputs is outputs else inputs.numel() * inputs.element_size()
    return tensor_bytes(model) - embedding
