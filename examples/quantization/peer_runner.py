"""Quantize a model with llm-compressor or AutoRound, in the environment that has them.

    PYTHON peer_runner.py JOB

``JOB`` is a folder with ``job.json`` (method, model, auto_class, bits, group, symmetric, device) and
``calibration.safetensors`` (``input_ids`` and ``attention_mask``, int64 ``[n, length]``). Writes the model's
tensors with dequantized weights, ``weights.safetensors``, and ``result.json`` (seconds, memory, versions; or why it
failed). Imports nothing of hf_optim. ``beside_peers.py`` calls it.

Settings: llm-compressor searches ranges by squared error and orders columns by activation (``static``); AutoRound takes
200 steps of 8 sequences for each block, in float32; everything else as the tools have it. An encoder has no preset in
either: llm-compressor is told its blocks, and AWQ the one pair of layers that can be scaled exactly (values and the
projection after them); AutoRound gets padded sentences with their mask.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from measured_run import measured
from peer_cells import group_size_of
from torch import Tensor, nn

BATCH = 8


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks by name: the children of the model's lists of modules."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {f"{name}.{index}": block for name, found in lists for index, block in enumerate(found)}


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of the blocks by name."""
    return {
        f"{block}.{name}": module
        for block, found in blocks_of(model).items()
        for name, module in found.named_modules()
        if isinstance(module, nn.Linear)
    }


def batches_of_one_length(ids: Tensor, mask: Tensor, most: int = BATCH) -> Iterator[dict[str, Tensor]]:
    """Yield the sequences without their padding, at most ``most`` at once, all of a batch of one length."""
    lengths = mask.sum(-1)
    for length in lengths.unique().tolist():
        for rows in ids[lengths == length][:, :length].split(most):
            yield {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def llm_compressor(job: dict[str, Any], model: nn.Module, ids: Tensor, mask: Tensor) -> None:
    """Quantize by llm-compressor's GPTQ, or by its AWQ and rounding to nearest."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
    from torch.utils.data import DataLoader

    layers = linears_of(model)
    sizes: dict[int, list[str]] = {}
    for name, layer in layers.items():
        sizes.setdefault(group_size_of(layer.in_features, job["group"]) if job["group"] else 0, []).append(name)
    fields = {"num_bits": job["bits"], "type": "int", "symmetric": job["symmetric"], "observer": "mse"}
    groups = {}
    for size, names in sizes.items():
        strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
        groups[f"group_{size}"] = {"targets": names, "weights": {**fields, **strategy}}
    if job["method"] == "llm-compressor GPTQ":
        recipe: list[Any] = [GPTQModifier(config_groups=groups)]
    else:
        if not torch.cuda.is_available():
            # AWQ pins its caches, which torch refuses where no accelerator is.
            Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign, assignment]
        pair = [AWQMapping("re:.*attention.self.value$", ["re:.*attention.output.dense$"])]
        encoder = any(name.endswith("attention.self.value") for name in layers)
        recipe = [AWQModifier(mappings=pair if encoder else None), QuantizationModifier(config_groups=groups)]
    loader = DataLoader(list(batches_of_one_length(ids, mask)), batch_size=None)  # type: ignore[arg-type]
    kinds = sorted({type(block).__name__ for block in blocks_of(model).values()})
    oneshot(model=model, dataset=loader, recipe=recipe, sequential_targets=kinds)
    if job["method"] == "llm-compressor AWQ":
        round_weights(layers.values())  # the modifier keeps the scales, and rounds in the forward


def round_weights(layers: Iterable[nn.Linear]) -> None:
    """Round weights to the codes that their layers' scales and zero points give."""
    from compressed_tensors.quantization import fake_quantize

    with torch.no_grad():
        for layer in layers:
            zero = getattr(layer, "weight_zero_point", None)
            args = layer.quantization_scheme.weights
            layer.weight.copy_(fake_quantize(layer.weight, layer.weight_scale, zero, args))


def quantize_every_shape(bits: int) -> None:
    """Let AutoRound quantize layers with a side that 32 does not divide, which it keeps in 16 bits for its kernels."""
    from auto_round.compressors import layer_config_resolver

    resolve = layer_config_resolver.apply_layer_config_special_cases

    def resolved(layer_config: Any, *others: Any, **fields: Any) -> Any:
        found = resolve(layer_config, *others, **fields)
        for layer in layer_config.values():
            if layer["in_blocks"] and layer["bits"] == 16:
                layer.update({"bits": bits, "data_type": "int"})
        return found

    layer_config_resolver.apply_layer_config_special_cases = resolved


def auto_round(job: dict[str, Any], model: nn.Module, ids: Tensor, mask: Tensor) -> None:
    """Quantize by AutoRound with its default 200 steps a block."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    quantize_every_shape(job["bits"])
    padded = not bool(mask.all())
    if padded:  # AutoRound masks the last position of every sequence: let it be padding
        tokenizer = AutoTokenizer.from_pretrained(job["model"])
        ids = torch.cat([ids, torch.full_like(ids[:, :1], tokenizer.pad_token_id)], dim=1)
        mask = torch.cat([mask, torch.zeros_like(mask[:, :1])], dim=1)
        pairs = zip(ids.split(BATCH), mask.split(BATCH), strict=True)
        data: list[Any] = [{"input_ids": rows, "attention_mask": kept.clone()} for rows, kept in pairs]
    else:
        data, tokenizer = list(ids.split(BATCH)), AutoTokenizer.from_pretrained(job["model"])
    sizes = {name: group_size_of(layer.in_features, job["group"]) for name, layer in linears_of(model).items()}
    odd = {name: {"group_size": size} for name, size in sizes.items() if job["group"] and size != job["group"]}
    AutoRound(
        model,
        tokenizer,
        bits=job["bits"],
        group_size=job["group"] or -1,
        sym=job["symmetric"],
        layer_config=odd or None,
        dataset=data,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        iters=job["steps"],
        batch_size=BATCH,
        amp=False,
        device_map=job["device"],
        enable_torch_compile=False,
        seed=job["draw"],
    ).quantize()


DOORS: dict[str, tuple[str, Callable[..., None]]] = {
    "AutoRound": ("auto-round", auto_round),
    "llm-compressor GPTQ": ("llmcompressor", llm_compressor),
    "llm-compressor AWQ": ("llmcompressor", llm_compressor),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, help="a folder with job.json")
    folder = parser.parse_args().job
    if not (folder / "job.json").is_file():
        parser.error(f"{folder} has no job.json")
    import transformers
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    package, door = DOORS[job["method"]]
    result: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in (package, "torch", "transformers")}
    }
    data = load_file(folder / "calibration.safetensors")
    model = getattr(transformers, job["auto_class"]).from_pretrained(job["model"], dtype=torch.float32).eval()
    model.to(job["device"])
    names = list(model.state_dict())
    try:
        with measured(result, job["device"]):
            door(job, model, data["input_ids"], data["attention_mask"])
        found = model.state_dict()
        save_file({name: found[name].cpu().clone().contiguous() for name in names}, folder / "weights.safetensors")
    except Exception as error:  # what a tool refuses is a result
        result["failed"] = f"{type(error).__name__}: {error}"[:300]
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
