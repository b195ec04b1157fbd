"""GPTQ of two blocks in Llama-3-8B's shape with the calibration data shared by GPUs: seconds a block, and equal codes.

    torchrun --nproc-per-node 1 examples/gpu/several/calibration.py --home DIR      # writes its codes into DIR
    torchrun --nproc-per-node 2 examples/gpu/several/calibration.py --home DIR

Random weights, the same on every rank, and 128 rows of 2,048 random tokens; each rank takes its share of the rows, and
rounds some of the layers of a block. Batches are summed in float64, and the sums rounded once (``precision: mixed``),
so that they hardly depend on how the rows are shared. Runs with several ranks compare codes and scales with those of
one. Writes ``$OUT/calibration-RANKS.json``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import CUDA, DTYPE, TINY, join, leave, now, say, slowest, write
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import hf_optim

SIZES = (
    {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    if TINY
    else {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
)
ROWS, LENGTH, AT_ONCE = (8, 32, 2) if TINY else (128, 2048, 4)
RECIPE = [{"technique": "gptq", "bits": 4, "group_size": 32 if TINY else 128, "precision": "mixed"}]
VOCABULARY = 4096


def build(device: torch.device) -> Any:
    """Return the model on the device, with the same weights on every rank."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            config = LlamaConfig(**SIZES, num_hidden_layers=2, vocab_size=VOCABULARY, max_position_embeddings=LENGTH)
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.5)
    return model


def batches() -> list[dict[str, torch.Tensor]]:
    """Return all calibration rows; hf_optim gives each rank its share."""
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(AT_ONCE)]


def codes_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the packed words and the scales of a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {key: value for key, value in load_file(path).items() if "weight_packed" in key or "scale" in key}
    return found


def compare(one: dict[str, torch.Tensor], several: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the share of equal 4-bit codes, of all layers and of the worst, and whether scales are equal."""
    if one.keys() != several.keys():
        raise AssertionError("the checkpoints have different tensors")
    equal, total, worst, scales = 0, 0, 1.0, True
    for key, value in one.items():
        if "weight_packed" not in key:
            scales = scales and torch.equal(value, several[key])
            continue
        changed = value ^ several[key]
        differing = sum(int(((changed >> 4 * place) & 15).ne(0).sum()) for place in range(8))
        count = value.numel() * 8
        equal, total, worst = equal + count - differing, total + count, min(worst, 1 - differing / count)
    return {"codes": total, "equal_share": equal / total, "equal_share_of_worst_layer": worst, "scales_equal": scales}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    device = join(180.0)
    ranks = dist.get_world_size()
    results: dict[str, Any] = {"rows": ROWS, "tokens_a_row": LENGTH, "sizes": SIZES, "passes": []}
    for turn in ("first", "again"):  # the first compiles
        model = build(device)
        dist.barrier()
        began = now()
        model = hf_optim.optimize(model, RECIPE, batches(), device=device)
        whole = slowest(now() - began)
        stage = hf_optim.run_of(model).record.stages[0]
        wanted = ("blocks", "seconds_per_block", "slowest_block_seconds", "tokens_per_second")
        entry = {"turn": turn, "seconds": round(whole, 3), **{key: stage[key] for key in wanted if key in stage}}
        if CUDA:
            entry["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        results["passes"].append(entry)
        say(f"{ranks} ranks: {entry}")
        write(f"calibration-{ranks}", results)
        if turn == "first":
            if dist.get_rank() == 0:
                began = time.perf_counter()
                model.save_pretrained(args.home / f"gptq-{ranks}")
                say(f"saved in {time.perf_counter() - began:.1f} s")
            dist.barrier()
        del model
    if ranks > 1 and dist.get_rank() == 0 and (args.home / "gptq-1").is_dir():
        results["beside_one_rank"] = compare(codes_of(args.home / "gptq-1"), codes_of(args.home / f"gptq-{ranks}"))
        say(results["beside_one_rank"])
        write(f"calibration-{ranks}", results)
    leave()


if __name__ == "__main__":
    main()
