"""Tensor parallel of packed layers on the GPUs of a host: the same outputs as one GPU, then milliseconds a token.

    python examples/gpu/tensor_parallel.py make 8b-w4a16 --home DIR           # checkpoints with random weights
    torchrun --nproc-per-node 1 examples/gpu/tensor_parallel.py time 8b-w4a16 --home DIR --output one.json
    torchrun --nproc-per-node 2 examples/gpu/tensor_parallel.py time 8b-w4a16 --home DIR --output two.json
    torchrun --nproc-per-node 2 examples/gpu/tensor_parallel.py links --home DIR --output links.json

The run with one rank writes its logits and tokens into the folder of the checkpoint; runs with several ranks compare
theirs first. Ways: ``stock`` is transformers' ``generate`` with its growing cache, ``door`` is ``hf_optim.generate``
with a captured step. Dense checkpoints are cut by transformers itself. ``links`` times the collectives of one token, and
all-to-all exchanges of 1 KiB to 64 MiB. ``TINY=1`` runs on a CPU with gloo, to try the script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM

import hf_optim

TINY = bool(os.environ.get("TINY"))
VOCABULARY = 32768
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 8},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 4},
}
PROMPT, NEW, CALLS = (8, 6, 1) if TINY else (128, 48, 3)
LIMIT = timedelta(seconds=60)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def make(name: str, home: Path) -> None:
    """Write a checkpoint: ``8b-w4a16``, ``8b-w8a8``, ``8b-dense``, ``70b-w4a16``, ..."""
    from hf_optim.evaluation.bench import models

    shape, scheme = name.split("-")
    full = {**SHAPES[shape], "num_key_value_heads": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 8192}
    models.SHAPES[shape] = {**models.SHAPES["tiny"], "num_attention_heads": 4} if TINY else full
    began = time.perf_counter()
    model = models.build(shape, scheme, torch.float32 if TINY else torch.bfloat16, device())
    with torch.no_grad():  # logits of random weights of this size are all alike
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.weight.normal_(std=0.5 if part is model.get_input_embeddings() else 0.05)
    model.save_pretrained(home / name, max_shard_size="2GB")
    print(f"{name}: {size_of(home / name) / 1e9:.2f} GB, {time.perf_counter() - began:.0f} s", flush=True)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def load(name: str, home: Path) -> Any:
    options: dict[str, Any] = {"dtype": torch.float32 if TINY else torch.bfloat16}
    if dist.get_world_size() > 1:
        options["tp_plan"] = "auto"
    elif torch.cuda.is_available():
        options["device_map"] = {"": device()}
    if not name.endswith("dense"):
        options["optim_config"] = "auto"
    return AutoModelForCausalLM.from_pretrained(home / name, **options)


def synchronized() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def prompts(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(3, 500 if TINY else VOCABULARY, (batch, PROMPT), generator=generator).to(device())


@torch.no_grad()
def compared(model: Any, folder: Path) -> dict[str, Any]:
    """Return how far logits and greedy tokens are from those of one rank; the run with one rank writes them."""
    ids = prompts(2)
    logits = model(ids).logits.float().cpu()
    inputs = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 16}
    tokens = model.generate(ids, **inputs).cpu()[:, PROMPT:]
    path = folder / "one_rank.pt"
    if dist.get_world_size() == 1:
        torch.save({"logits": logits, "tokens": tokens}, path)
        return {}
    one = torch.load(path, weights_only=True)
    same = (tokens == one["tokens"]).int().cumprod(dim=1).sum(dim=1)
    mine = torch.tensor([float(logits.double().sum())], dtype=torch.float64, device=device())
    each = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(each, mine)
    return {
        "relative_error_of_logits": float((logits - one["logits"]).norm() / one["logits"].norm()),
        "same_first_choice": float((logits.argmax(-1) == one["logits"].argmax(-1)).float().mean()),
        "equal_tokens_of_16": same.tolist(),
        "ranks_have_equal_logits": all(bool(torch.equal(each[0], other)) for other in each),
    }


def seconds(model: Any, way: str, batch: int, new: int) -> float:
    ids = prompts(batch)
    inputs = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new}
    began = synchronized()
    if way == "door":
        with warnings.catch_warnings():
            warnings.simplefilter("error", hf_optim.GenerationWarning)
            hf_optim.generate(model, ids, **inputs, mode="eager" if TINY else "captured")
    else:
        model.generate(ids, **inputs)
    return synchronized() - began


def rows_of(name: str, home: Path) -> list[dict[str, Any]]:
    ranks = dist.get_world_size()
    began = synchronized()
    model = load(name, home)
    about: dict[str, Any] = {"name": name, "ranks": ranks, "load_s": round(synchronized() - began, 1)}
    if torch.cuda.is_available():
        about["gib_after_load"] = round(torch.cuda.memory_allocated() / 2**30, 2)
        about["peak_gib_of_load"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if not name.endswith("dense"):
        about["runs_on"] = hf_optim.report(model).summary[:400]
    about |= compared(model, home / name)
    rows = [about]
    for way in ("stock", "door"):
        for batch in (1, 8):
            try:
                first = seconds(model, way, batch, NEW)
                short = statistics.median(seconds(model, way, batch, 1) for _ in range(CALLS))
                whole = statistics.median(seconds(model, way, batch, NEW) for _ in range(CALLS))
            except Exception as error:
                rows.append({"name": name, "ranks": ranks, "way": way, "batch": batch, "error": str(error)[:300]})
                continue
            step = (whole - short) / (NEW - 1) * 1e3
            row = {"name": name, "ranks": ranks, "way": way, "batch": batch, "ms_per_token": round(step, 3)}
            rows.append({**row, "first_call_s": round(first, 1), "first_token_ms": round(short * 1e3, 2)})
    return rows


def links() -> list[dict[str, Any]]:
    """Return the microseconds of collectives of one token, in a row and captured, and of exchanges by size."""
    from hf_optim.toolkit.distributed import grid_of, route_from

    rows: list[dict[str, Any]] = []
    world = dist.get_world_size()
    dtype = torch.float32 if TINY else torch.bfloat16
    for width in (4096, 8192):
        for count in (1, 8, 1024):
            x = torch.zeros(count, width, dtype=dtype, device=device())
            y = torch.zeros(world * count * width // world, dtype=dtype, device=device())
            part = x.view(-1)[: x.numel() // world]
            for what, run in (
                ("all_reduce", lambda x=x: dist.all_reduce(x)),
                ("all_gather", lambda y=y, part=part: dist.all_gather_into_tensor(y, part)),
            ):
                rows.append({"what": what, "bytes": x.numel() * x.element_size(), "us": microseconds(run)})
    grid = grid_of(None, "flat")
    for power in range(10, 17 if TINY else 27, 2):
        data = torch.zeros(2**power // 4, dtype=torch.float32, device=device()).view(world, -1)
        route = route_from([[1] * world] * world, grid)
        again = [torch.empty_like(data)]
        dist.all_to_all_single(again[0], data)
        rows.append(
            {
                "what": "exchange (flat)",
                "bytes": 2**power,
                "us": microseconds(lambda route=route, data=data: route.forth(data)),
                "us_of_all_to_all_single": microseconds(
                    lambda out=again[0], data=data: dist.all_to_all_single(out, data)
                ),
                "equal": bool(torch.equal(route.forth(data), again[0])),
            }
        )
    return rows


def microseconds(run: Any, count: int = 20) -> float:
    for _ in range(3):
        run()
    found = []
    for _ in range(3):
        began = synchronized()
        for _ in range(count):
            run()
        found.append((synchronized() - began) / count)
    return round(min(found) * 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", "time", "links"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if args.what == "make":
        for name in args.names:
            make(name, args.home)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", timeout=LIMIT, device_id=device())
    else:
        dist.init_process_group("gloo", timeout=LIMIT)
    rows: list[dict[str, Any]] = links() if args.what == "links" else []
    for name in args.names:
        try:
            rows += rows_of(name, args.home)
        except Exception:
            rows.append({"name": name, "ranks": dist.get_world_size(), "error": traceback.format_exc()[-900:]})
        if dist.get_rank() == 0:
            write(args.output, rows)
            print(json.dumps([row for row in rows if row.get("name") == name], indent=None), flush=True)
    if dist.get_rank() == 0:
        write(args.output, rows)
    dist.destroy_process_group()


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"device": name, "ranks": dist.get_world_size(), "torch": torch.__version__}
    about |= {"transformers": transformers.__version__, "prompt": PROMPT, "new_tokens": NEW, "shapes": SHAPES}
    path.write_text(json.dumps({**about, "vocabulary": VOCABULARY, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
