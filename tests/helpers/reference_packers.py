"""Checkpoints in the layouts of GPTQ, AWQ and compressed-tensors, written from scratch: codes in, tensors out.

Nothing here comes from hf_optim: numpy integers, and bits put one by one where the formats say.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors.torch import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_bits(codes, bits):
    """[rows, n] in [0, 2^bits) -> int32 [rows, ceil(n * bits / 32)], least significant bit first."""
    rows, count = codes.shape
    words = -(-count * bits // 32)
    flat = np.zeros((rows, words * 32), dtype=np.uint8)
    for bit in range(bits):
        flat[:, bit : count * bits : bits] = (codes >> bit) & 1
    return torch.from_numpy(np.packbits(flat, axis=1, bitorder="little").view("<i4").copy())


class Grid:
    """Random codes, scales and zero points of a layer, and the dense weight they stand for (float64)."""

    def __init__(self, rng, rows, columns, bits, size, symmetric, scattered=False):
        self.bits, self.size, self.columns = bits, size or columns, columns
        groups = columns // self.size
        self.codes = rng.integers(0, 2**bits, (rows, columns))
        self.scale = (rng.uniform(0.5, 1.5, (rows, groups)) / 2**bits / columns**0.5 * 4).astype(np.float16)
        self.zero = np.full((rows, groups), 2 ** (bits - 1)) if symmetric else rng.integers(0, 2**bits, (rows, groups))
        self.g_idx = np.arange(columns) // self.size
        if scattered:
            rng.shuffle(self.g_idx)
        self.dense = (self.codes - self.zero[:, self.g_idx]) * self.scale.astype(np.float64)[:, self.g_idx]


def gptq(grid, less_one=True):
    zero = (grid.zero.T - int(less_one)) % 2**grid.bits
    return {
        "qweight": pack_bits(grid.codes.T.copy().T, grid.bits).T.contiguous(),
        "qzeros": pack_bits(zero, grid.bits),
        "scales": torch.from_numpy(grid.scale.T.copy()),
        "g_idx": torch.from_numpy(grid.g_idx.astype(np.int32)),
    }


def awq(grid):
    def words(matrix):
        mixed = matrix.reshape(len(matrix), -1, 8)[..., AWQ_ORDER].reshape(matrix.shape)
        return pack_bits(mixed, 4)

    return {
        "qweight": words(grid.codes.T.copy()),
        "qzeros": words(grid.zero.T.copy()),
        "scales": torch.from_numpy(grid.scale.T.copy()),
    }


def compressed_tensors(grid, form, symmetric, scattered=False):
    offset = 2 ** (grid.bits - 1)
    parts = {"weight_scale": torch.from_numpy(grid.scale.copy())}
    signed = torch.from_numpy((grid.codes - offset).astype(np.int8))
    if form == "pack-quantized":
        parts["weight_packed"] = pack_bits(grid.codes, grid.bits)
        parts["weight_shape"] = torch.tensor(signed.shape)
    else:
        parts["weight"] = signed
    if not symmetric and form == "pack-quantized":
        parts["weight_zero_point"] = pack_bits(grid.zero.T.copy(), grid.bits).T.contiguous()
    elif not symmetric:
        parts["weight_zero_point"] = torch.from_numpy((grid.zero - offset).astype(np.int8))
    if scattered:
        parts["weight_g_idx"] = torch.from_numpy(grid.g_idx.astype(np.int32))
    return parts


def write(model, folder, layers, config, shards=1):
    """A checkpoint of ``model`` in which ``layers`` (name -> tensors) stand in place of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    for name, parts in layers.items():
        del state[f"{name}.weight"]
        state |= {f"{name}.{key}": value for key, value in parts.items()}
    names = sorted(state)
    index = {}
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({key: state[key] for key in names[i::shards]}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names[i::shards], file)
    if shards > 1:
        text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    plain = model.config.to_dict() | {"quantization_config": config, "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(plain, default=str), encoding="utf-8")
    return folder
