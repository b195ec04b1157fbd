"""Compress a checkpoint that is larger than memory: the shape of Llama-3-8B, 16 GB of random weights.

Writes the checkpoint shard by shard (dimensions of Llama-3-8B: width 4096, 32 layers, 14336 in the MLP, 32 query and 8
key/value heads, 128256 tokens), then runs ``hf-optim compress --driver streamed`` on it in a child process with limited
memory, and prints the seconds per block and the peak memory. Calibration data are random token ids, so no tokenizer is
needed; a recipe without data (``rtn``) only streams the weights. All blocks have the same shape, so a few of them
(``--layers``) say what each of the 32 takes.

The limit applies to the process's own memory (``RssAnon``, and ``RssShmem``, which holds pinned buffers). It is checked
every 20 ms, and a process beyond it is killed. Limits of the system (``RLIMIT_DATA``, ``RLIMIT_AS``) count address
space, including the files that safetensors maps to read their headers and the ranges that a GPU driver reserves, so
they would reject mappings that take no memory. Pages of mapped files (``RssFile``) are reported but not counted,
because the system may drop them.

    python examples/compress_8b_shape.py --recipe rtn                       # a CPU; 16 GB + 5 GB of disk
    python examples/compress_8b_shape.py --recipe gptq --samples 128        # a GPU
    python examples/compress_8b_shape.py --recipe gptq --layers 2 --samples 4 --seq-len 64
    python examples/compress_8b_shape.py --recipe signround --layers 2 --batch-size 8 --limit 14    # a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

GIB = 2**30
WIDTH, INNER, HEADS, KEY_VALUE_HEADS, VOCABULARY = 4096, 14336, 32, 8, 128256
RECIPES: dict[str, list[dict[str, Any]] | None] = {
    "rtn": [{"technique": "rtn", "bits": 4, "group_size": 128}],
    "gptq": [{"technique": "gptq", "bits": 4, "group_size": 128}],
    "gptq-recursion": [{"technique": "gptq", "bits": 4, "group_size": 128, "refine": 0}],
    # The settings of the paper and of AutoRound's default: 200 signed steps of 8 sequences a block.
    "signround": [{"technique": "signround", "bits": 4, "group_size": 128}],
    "w4a16-best": None,
}
"""Steps by name; None for those of the recipe of that name that hf_optim ships."""


def steps_of(name: str) -> list[dict[str, Any]]:
    """Return the steps of one of ``RECIPES``."""
    from hf_optim import OptimConfig

    return RECIPES[name] or OptimConfig.load(name).to_dict()["steps"]


def summary(name: str, results: dict[str, Any]) -> str:
    """Return one line: seconds a block, and the peak of memory on the device and of the process."""
    stage = results["stage"]
    return (
        f"{name}: {stage['seconds_per_block']:.2f} s a block ({stage['blocks']} blocks, the slowest "
        f"{stage['slowest_block_seconds']:.2f} s), peak {stage['peak_memory_bytes'] / GIB:.2f} GiB "
        f"({stage['peak_memory_of']}), {results['peak_own_memory_gib']:.2f} GiB of own memory on the host"
    )


def shard_shapes(layers: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the shapes of the tensors of each shard, by name: the embeddings, one shard per block, norm and head."""
    keys = WIDTH * KEY_VALUE_HEADS // HEADS
    yield {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for number in range(layers):
        shapes = {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (keys, WIDTH),
            "self_attn.v_proj": (keys, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
        }
        yield {f"model.layers.{number}.{name}.weight": shape for name, shape in shapes.items()}
    yield {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def fill_(tensor: torch.Tensor, pool: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fill a tensor with slices of a pool of random numbers, which is much faster than sampling billions of them."""
    flat = tensor.view(-1)
    at = 0
    while at < len(flat):
        start = int(torch.randint(len(pool) // 2, (), generator=generator))
        size = min(len(pool) - start, len(flat) - at)
        flat[at : at + size] = pool[start : start + size]
        at += size
    return tensor


def write_checkpoint(home: Path, layers: int) -> int:
    """Write the checkpoint with one shard in memory at a time; return its size in bytes."""
    from transformers import LlamaConfig

    home.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(home)
    index, total = {}, 0
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(1 << 22).normal_(0.0, 0.02, generator=generator).to(torch.bfloat16)
    for number, shapes in enumerate(shard_shapes(layers), 1):
        name = f"model-{number:05d}-of-{layers + 2:05d}.safetensors"
        tensors = {}
        for key, shape in shapes.items():
            empty = torch.empty(shape, dtype=torch.bfloat16)
            tensors[key] = empty.fill_(1.0) if len(shape) == 1 else fill_(empty, pool, generator)
            total += empty.nbytes
        index |= dict.fromkeys(tensors, name)
        save_file(tensors, home / name, metadata={"format": "pt"})
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (home / "model.safetensors.index.json").write_text(text)
    return total


def resident_memory(process: int) -> dict[str, int]:
    """Return the resident bytes of a process by kind: ``RssAnon``, ``RssShmem``, ``RssFile``."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if line.startswith("Rss"))
    return {name: int(rest.split()[0]) * 1024 for name, rest in pairs}


def run_with_limit(command: list[str], limit: int) -> dict[str, int]:
    """Run a command with limited memory, and return its peak memory by kind, in bytes.

    Exits if the command fails or exceeds the limit.
    """
    peaks: dict[str, int] = {}
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            now = resident_memory(process.pid)
            own = now.get("RssAnon", 0) + now.get("RssShmem", 0)
            for name, value in {**now, "own": own}.items():
                peaks[name] = max(peaks.get(name, 0), value)
            if own > limit:
                process.kill()
                sys.exit(f"killed: compress used {own / GIB:.2f} GiB of memory; the limit is {limit / GIB:.2f} GiB")
            time.sleep(0.02)
    if process.returncode:
        sys.exit(f"compress failed with exit status {process.returncode}")
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path("8b-shape"), help="directory for checkpoint and result")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--recipe", choices=RECIPES, default="rtn")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--limit", type=float, default=6.0, help="GiB of host memory")
    parser.add_argument("--device", default=None)
    parser.add_argument("--spill", action="store_true", help="keep activations on disk")
    parser.add_argument("--record", type=Path, help="file to write the results to, as JSON")
    parser.add_argument("--keep", action="store_true", help="keep the files; an existing checkpoint is always used")
    args = parser.parse_args()
    source, output = args.home / "model", args.home / "result"
    args.home.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        started = time.perf_counter()
        total = write_checkpoint(source, args.layers)
        print(f"wrote {total / GIB:.2f} GiB of weights in {time.perf_counter() - started:.0f} s", flush=True)
    shutil.rmtree(output, ignore_errors=True)  # of a run before that kept its files
    calibration = {"samples": args.samples, "seq_len": args.seq_len, "batch_size": args.batch_size}
    recipe = args.home / "recipe.json"
    recipe.write_text(json.dumps({"steps": steps_of(args.recipe), "calibration": calibration}))
    command = [sys.executable, "-m", "hf_optim.cli", "compress", str(source), "--recipe", str(recipe)]
    command += ["--output", str(output), "--driver", "streamed"]
    command += ["--calibration", "random"] if args.recipe != "rtn" else []
    command += ["--device", args.device] if args.device else []
    command += ["--spill", str(args.home)] if args.spill else []
    started = time.perf_counter()
    peaks = run_with_limit(command, int(args.limit * GIB))
    record = json.loads((output / "hf_optim.json").read_text())
    results = {
        "recipe": record["recipe"]["steps"],
        "calibration": calibration,
        "versions": record["versions"],
        "seconds": round(time.perf_counter() - started, 1),
        "limit_gib": args.limit,
        "peak_own_memory_gib": round(peaks["own"] / GIB, 3),
        **{f"peak_{name}_gib": round(value / GIB, 3) for name, value in sorted(peaks.items()) if name != "own"},
        "checkpoint_gib": round(sum(f.stat().st_size for f in source.glob("*.safetensors")) / GIB, 3),
        "result_gib": round(sum(f.stat().st_size for f in output.glob("*.safetensors")) / GIB, 3),
        "free_disk_gib": round(shutil.disk_usage(args.home).free / GIB, 1),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "stage": record["stages"][0],
    }
    print(json.dumps(results, indent=2))
    print(summary(args.recipe, results))
    if args.record:
        args.record.write_text(json.dumps(results, indent=2) + "\n")
    if not args.keep:
        shutil.rmtree(source)
        shutil.rmtree(output)


if __name__ == "__main__":
    main()
