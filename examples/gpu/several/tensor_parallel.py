"""Packed layers and packed experts divided among GPUs: the outputs of one GPU, then milliseconds a token and memory.

    torchrun --nproc-per-node 1 examples/gpu/several/tensor_parallel.py --home DIR --make NAMES   # writes and times
    torchrun --nproc-per-node 2 examples/gpu/several/tensor_parallel.py --home DIR NAMES

NAMES are of 8b-w4a16, 8b-w8a8, 8b-dense, 70b-..., qwen3moe-w4a16: checkpoints with random weights, of Llama-3's widths
with 8 and 4 layers, and of Qwen3-30B-A3B's with 4. The run with one rank writes its logits and tokens beside the
checkpoint; runs with several compare theirs first. Ways: ``stock`` is transformers' ``generate`` with its growing
cache, ``door`` is ``hf_optim.generate`` with a captured step. Dense checkpoints are cut by transformers itself. A time
a token is that of a call for many tokens less one for a single one, each the least of three. Writes ``$OUT/NAME-RANKS.json`` for each name.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from ranks import CUDA, DTYPE, TINY, join, leave, now, say, slowest, write
from transformers import AutoModelForCausalLM, GenerationConfig

import hf_optim
from hf_optim.toolkit.distributed.peer_memory import peer_memory

VOCABULARY = 512 if TINY else 32768
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 8},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 4},
}
QWEN3_30B_A3B = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_hidden_layers": 4,
}  # fmt: skip
SMALL_MOE = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_experts": 8,
    "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
    "num_hidden_layers": 2,
}  # fmt: skip
PROMPT, NEW, CALLS = (8, 6, 1) if TINY else (128, 48, 3)


def make(name: str, home: Path, device: torch.device) -> None:
    """Write a checkpoint; logits of random weights of their usual size would all be alike, so embeddings are larger."""
    from hf_optim.evaluation.bench import models

    shape, scheme = name.split("-")
    if shape == "qwen3moe":
        sizes = {**(SMALL_MOE if TINY else QWEN3_30B_A3B), "vocab_size": VOCABULARY, "max_position_embeddings": 4096}
        torch.manual_seed(0)
        with torch.device(device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(DTYPE)
            model: Any = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes)).eval()
            torch.set_default_dtype(before)
        if scheme == "w4a16":
            group = 32 if TINY else 128
            model = hf_optim.optimize(model, [{"technique": "rtn", "bits": 4, "group_size": group}])
    else:
        full = {**SHAPES[shape], "num_key_value_heads": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 8192}
        models.SHAPES[shape] = {**models.SHAPES["tiny"], "num_attention_heads": 4} if TINY else full
        model = models.build(shape, scheme, DTYPE, device)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.5)
        model.get_output_embeddings().weight.normal_(std=0.05)
    model.generation_config = GenerationConfig()
    model.save_pretrained(home / name, max_shard_size="2GB")
    del model
    free()


def free() -> None:
    """Give memory back, so that it is not counted for the next model."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def load(name: str, home: Path, device: torch.device) -> Any:
    options: dict[str, Any] = {"dtype": DTYPE}
    if dist.get_world_size() > 1:
        options["tp_plan"] = "auto"
    elif CUDA:
        options["device_map"] = {"": device}
    if not name.endswith("dense"):
        options["optim_config"] = "auto"
    return AutoModelForCausalLM.from_pretrained(home / name, **options)


def prompts(batch: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(3, VOCABULARY, (batch, PROMPT), generator=generator).to(device)


def given(ids: torch.Tensor, new: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return {**settings, "attention_mask": torch.ones_like(ids), "max_new_tokens": new}


@torch.no_grad()
def compared(model: Any, folder: Path, device: torch.device) -> dict[str, Any]:
    """Return how far logits and greedy tokens are from those of one rank; the run with one rank writes them."""
    ids = prompts(2, device)
    logits = model(ids).logits.float()
    logits = (logits.full_tensor() if hasattr(logits, "full_tensor") else logits).cpu()
    tokens = model.generate(ids, **given(ids, 16)).cpu()[:, PROMPT:]
    path = folder / "one_rank.pt"
    if dist.get_world_size() == 1:
        torch.save({"logits": logits, "tokens": tokens}, path)
        return {}
    one = torch.load(path, weights_only=True)
    same = (tokens == one["tokens"]).int().cumprod(dim=1).sum(dim=1)
    mine = torch.tensor([float(logits.double().sum())], dtype=torch.float64)
    each = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(each, mine)
    return {
        "relative_error_of_logits": float((logits - one["logits"]).norm() / one["logits"].norm()),
        "same_first_choice": float((logits.argmax(-1) == one["logits"].argmax(-1)).float().mean()),
        "equal_tokens_of_16": same.tolist(),
        "ranks_have_equal_logits": all(bool(torch.equal(each[0], other)) for other in each),
    }


def seconds(model: Any, way: str, batch: int, new: int, device: torch.device) -> float:
    ids = prompts(batch, device)
    dist.barrier()
    began = now()
    if way == "door":
        with warnings.catch_warnings():
            warnings.simplefilter("error", hf_optim.GenerationWarning)
            hf_optim.generate(model, ids, **given(ids, new), mode="captured" if CUDA else "eager")
    else:
        model.generate(ids, **given(ids, new))
    return slowest(now() - began)


def measure(name: str, home: Path, device: torch.device, timed: bool) -> None:
    """Load, compare and time one checkpoint; write after each row, since a later one may fail."""
    ranks = dist.get_world_size()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    began = now()
    model = load(name, home, device)
    entry: dict[str, Any] = {"name": name, "ranks": ranks, "load_s": round(now() - began, 1)}
    if CUDA:
        entry["gib_after_load"] = round(torch.cuda.memory_allocated() / 2**30, 3)
        entry["peak_gib_of_load"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        torch.cuda.reset_peak_memory_stats()
    if not name.endswith("dense"):
        entry["runs_on"] = hf_optim.report(model).summary[:400]
    if ranks > 1 and CUDA:
        entry["small_sums"] = "NCCL" if peer_memory(device) is None else "one launch"
    entry |= compared(model, home / name, device)
    if not timed:
        return
    result = {"settings": {"prompt": PROMPT, "new_tokens": NEW, "vocabulary": VOCABULARY}, **entry, "rows": []}
    write(f"{name}-{ranks}", result)
    for way in ("stock", "door"):
        for batch in (1, 64) if name.startswith("qwen3moe") else (1, 8):
            row: dict[str, Any] = {"way": way, "batch": batch}
            try:
                row["first_call_s"] = round(seconds(model, way, batch, NEW, device), 2)
                short = min(seconds(model, way, batch, 1, device) for _ in range(CALLS))
                whole = min(seconds(model, way, batch, NEW, device) for _ in range(CALLS))
                step = (whole - short) / (NEW - 1)
                row |= {"ms_per_token": round(step * 1e3, 4), "tokens_per_s": round(batch / step, 1)}
                row["first_token_ms"] = round(short * 1e3, 2)
                row |= {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)} if CUDA else {}
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:400]
            result["rows"].append(row)
            write(f"{name}-{ranks}", result)
            say(f"{name} on {ranks}: {row}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--make", action="store_true", help="write the checkpoints first (one rank)")
    parser.add_argument("--untimed", action="store_true", help="write what others are compared with, and no figures")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    device = join()
    failed = []
    for name in args.names:
        try:
            if args.make:
                began = time.perf_counter()
                make(name, args.home, device)
                size = sum(path.stat().st_size for path in (args.home / name).glob("*.safetensors"))
                say(f"{name}: {size / 1e9:.2f} GB written in {time.perf_counter() - began:.0f} s")
            measure(name, args.home, device, not args.untimed)
        except Exception:
            failed.append(name)
            trace = traceback.format_exc()
            print(f"rank {os.environ['RANK']}: {name}: {trace}", flush=True)
            if dist.get_rank() == 0:
                write(f"{name}-{dist.get_world_size()}", {"name": name, "error": trace[-900:], "rows": []})
        free()
    leave()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
