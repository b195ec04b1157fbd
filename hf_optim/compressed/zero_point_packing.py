"""Packing the codes and zero points of an asymmetric checkpoint, in a form that stock transformers reads.

Its ordinary way prepares the tensors of a layer on the meta device first, where compressed-tensors (0.20) leaves the
zero points unpacked: int8 ``[out, groups]``, and a file with int32 ``[out * bits / 32, groups]`` is refused. Its other
way, ``dequantize`` in the ``quantization_config``, prepares nothing, and decodes each layer as it is read. That key is
part of config.json, and readers that do not know it ignore it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError

WEIGHT, ZERO = ".weight", ".weight_zero_point"
PACKED = "pack-quantized"


def pack_zero_points(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Write a copy of a checkpoint with integer codes and zero points of a byte each, in which both are packed.

    Stock transformers (5.20 to 5.24) decodes it while loading, with the same values; ``"auto"`` runs it on kernels.

    Args:
        source: a directory that ``save_pretrained`` wrote, all quantized layers with one scheme: integers of 2 to 8
            bits, asymmetric, per channel or group, inputs not quantized.
        output: a directory that does not exist yet.

    Returns ``output``.

    Raises ``CheckpointError`` for any other checkpoint: transformers decodes all layers by the first scheme.
    """
    folder, target = Path(source), Path(output)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    bits = _bits(config.get("quantization_config") or {}, folder)
    if target.exists():
        raise CheckpointError(f"{target} exists already: name a new directory")
    target.mkdir(parents=True)
    total = 0
    places: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state = _packed(path, bits)
        save_file(state, target / path.name, metadata={"format": "pt"})
        places |= dict.fromkeys(state, path.name)
        total += sum(tensor.nbytes for tensor in state.values())
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copy2(path, target / path.name)
    index = target / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}), encoding="utf-8")
    stored = config["quantization_config"]
    stored |= {"format": PACKED, "dequantize": True}
    for group in stored["config_groups"].values():
        group["format"] = PACKED
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return target


def _bits(stored: Any, folder: Path) -> int:
    groups = list((stored.get("config_groups") or {}).values())
    weights = groups[0].get("weights") or {} if len(groups) == 1 else {}
    fits = (
        weights.get("type") == "int"
        and weights.get("symmetric") is False
        and weights.get("strategy") in ("group", "channel")
        and not groups[0].get("input_activations")
        and (groups[0].get("format") or stored.get("format")) == "naive-quantized"
    )
    if not fits:
        raise CheckpointError(
            f"{folder} is not a checkpoint with one scheme of asymmetric integers per channel or group, one code a "
            "byte, whose inputs are not quantized: only such a one can be packed"
        )
    return int(weights["num_bits"])


def _packed(path: Path, bits: int) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    state = {}
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for name in sorted(names):
            tensor = file.get_tensor(name)
            layer = name.removesuffix(WEIGHT)
            if name.endswith(ZERO):
                state[name] = pack_to_int32(tensor, bits, packed_dim=0).contiguous()
            elif tensor.dtype == torch.int8 and name.endswith(WEIGHT):
                if layer + ZERO not in names:
                    raise CheckpointError(f"{path.name} has {name} without its zero points: they are in another file")
                state[f"{layer}.weight_packed"] = pack_to_int32(tensor, bits)
                state[f"{layer}.weight_shape"] = torch.tensor(tensor.shape)
            else:
                state[name] = tensor
    return state
