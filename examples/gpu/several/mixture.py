"""A model of Qwen3-30B-A3B's width and four layers, its experts divided among GPUs: transformers' ways and ours.

    torchrun --nproc-per-node 2 examples/gpu/several/mixture.py --home DIR

transformers (from 5.23) exchanges tokens by its own ``all_to_all`` or sums the outputs of all ranks (``all_reduce``);
``hierarchical_all_to_all`` and ``tutel`` take the place of the first. Each rank has tokens of its own, except under
``all_reduce``, where all ranks have the same ones; times are those of a forward and of a forward with backward, in
bfloat16, random weights. Logits of our orders must be bitwise those of our flat exchange. Writes ``$OUT/mixture.json``.
"""

from __future__ import annotations

import argparse
import gc
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from ranks import CUDA, DTYPE, TINY, join, leave, on_all, say, timed, write
from tensor_parallel import QWEN3_30B_A3B, SMALL_MOE

from hf_optim.toolkit.experts import Exchange, attach_exchange, detach_settings, expert_exchange

TOKENS = (16,) if TINY else (256, 2048, 8192)
VOCABULARY = 512 if TINY else 4096


def saved(home: Path, device: torch.device) -> Path:
    """Write the checkpoint on rank 0, and return its folder on all ranks."""
    folder = home / "mixture"
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPE)
        with torch.device(device):
            sizes = {**(SMALL_MOE if TINY else QWEN3_30B_A3B), "vocab_size": VOCABULARY}
            model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, max_position_embeddings=8192))
        torch.set_default_dtype(before)
        model.save_pretrained(folder)
        del model
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    dist.barrier()
    return folder


def loaded(folder: Path, implementation: str, shared: bool) -> Any:
    """Load the model with its experts divided; ``shared``: all ranks have the same tokens."""
    from transformers.distributed import DistributedConfig

    world = dist.get_world_size()
    placed = DistributedConfig(
        ep_size=world, ep_implementation=implementation, **({"tp_size": world} if shared else {"fsdp_size": world})
    )
    return transformers.Qwen3MoeForCausalLM.from_pretrained(folder, distributed_config=placed, dtype=DTYPE)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def measure(model: Any, way: str, results: dict[str, Any], device: torch.device, shared: bool) -> None:
    for count in TOKENS:
        rank = 0 if shared else dist.get_rank()
        random = torch.Generator().manual_seed(rank)
        ids = torch.randint(3, VOCABULARY, (max(1, count // 1024), min(count, 1024)), generator=random).to(device)
        row: dict[str, Any] = {"way": way, "tokens_a_rank": count, "tokens_are_shared": shared}

        def both(ids: torch.Tensor = ids) -> None:
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        def forward(ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)

        # The adaptive way times each of its choices in its first calls.
        for _ in range(14 if way.startswith("tutel") and not TINY else 1):
            forward()
        row["forward_ms"] = timed(forward, 3, 3) * 1e3
        for _ in range(14 if way.startswith("tutel") and not TINY else 1):
            both()
        row["forward_backward_ms"] = timed(both, 3, 3) * 1e3
        results["rows"].append(row)
        say(f"{way}, {count} tokens: {row['forward_ms']:.2f} ms, with backward {row['forward_backward_ms']:.2f} ms")
        write("mixture", results)


def own_ways(model: Any, results: dict[str, Any], device: torch.device, stock: torch.Tensor, ids: torch.Tensor) -> None:
    """Compare and time our exchanges in the place of transformers' own."""
    world = dist.get_world_size()
    flat = None
    locals_ = sorted({1, world, max(1, world // 2)})
    for local in locals_:
        for order in ("flat", "intra_first", "inter_first"):
            attach_exchange(model, Exchange(order=order, ranks_per_node=local))
            found = logits_of(model, ids)
            flat = found if flat is None else flat
            same = on_all(torch.equal(found, flat))
            error = float((found.float() - stock.float()).norm() / stock.float().norm())
            entry = {"way": f"{order} {world // local}x{local}", "bitwise_as_flat": same, "error_to_stock": error}
            results["checks"].append(entry)
            say(entry)
            if (order == "flat" and local == world) or (order != "flat" and 1 not in (local, world // local)):
                measure(model, f"hierarchical_all_to_all, {entry['way']}", results, device, False)
            detach_settings(model)
    attach_exchange(model, Exchange(kind="adaptive", ranks_per_node=locals_[-1]))
    found = logits_of(model, ids)
    error = float((found.float() - stock.float()).norm() / stock.float().norm())
    results["checks"].append({"way": "tutel", "error_to_stock": error})
    measure(model, "tutel", results, device, False)
    results["tutel_choices"] = next(iter(expert_exchange(model).values()))
    write("mixture", results)
    detach_settings(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    device = join()
    results: dict[str, Any] = {"shape": SMALL_MOE if TINY else QWEN3_30B_A3B, "checks": [], "rows": []}
    try:
        from transformers.distributed import expert_parallel  # noqa: F401
    except ImportError as error:
        results["refused"] = f"transformers {transformers.__version__} has no exchange between experts: {error}"
        say(results["refused"])
        write("mixture", results)
        leave()
        return
    folder = saved(args.home, device)
    own = torch.randint(3, VOCABULARY, (1, 32), generator=torch.Generator().manual_seed(9 + dist.get_rank())).to(device)
    for implementation, shared in (("all_to_all", False), ("all_reduce", True)):
        model = None
        try:
            model = loaded(folder, implementation, shared)
            stock = logits_of(model, own)
            measure(model, f"transformers {implementation}", results, device, shared)
            if implementation == "all_to_all":
                own_ways(model, results, device, stock, own)
        except Exception:
            results["rows"].append({"way": implementation, "error": traceback.format_exc()[-900:]})
            say(results["rows"][-1]["error"])
        write("mixture", results)
        del model
        gc.collect()
    leave()


if __name__ == "__main__":
    main()
