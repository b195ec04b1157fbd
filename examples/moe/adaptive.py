"""Time the ways of ``tutel`` across ranks, let it choose, and compare its choices with times measured again.

    python examples/moe/adaptive.py --output model_cards/moe/adaptive

Forks 2 and 4 ranks (gloo, on this machine), spreads the experts of a mixture layer over them, and calls it with few and
many tokens that choose experts evenly, skewed, or all the same rank. Two minutes on two CPU cores. Needs transformers
5.23.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import adaptive_page
import torch
import torch.distributed as dist
from torch import Tensor

from hf_optim.toolkit.experts import Exchange, attach_exchange, expert_exchange

EXPERTS, TOP_K, HIDDEN, INNER = 8, 2, 256, 512
TOKENS = (16, 256, 2048)
TRIALS = 4
LOADS = ("even", "skewed", "one rank")


def choose(load: str, tokens: int, seed: int) -> Tensor:
    """Return which experts tokens choose, int64 ``[tokens, k]``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(tokens, EXPERTS, generator=generator)
    favour = {"even": 0.0, "skewed": 0.25, "one rank": 10.0}[load]
    noise[:, :2] += favour
    return noise.topk(TOP_K).indices


def layer_across_ranks(folder: str, world: int) -> tuple[Any, Any]:
    """Return a model of one layer whose experts are spread over the ranks, and its module of experts."""
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        config = MixtralConfig(
            vocab_size=64, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K,
        )  # fmt: skip
        torch.manual_seed(0)
        MixtralForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    placed = DistributedConfig(fsdp_size=world, ep_size=world)
    model = MixtralForCausalLM.from_pretrained(folder, distributed_config=placed, dtype=torch.float32)
    names = attach_exchange(model, Exchange(kind="adaptive", ranks_per_node=world // 2, trials=TRIALS))
    return model, model.get_submodule(names[0])


def seconds(layer: Any, call: Any, rounds: int = 7) -> dict[str, float]:
    """Return the best time of each way, measured in turn; of each call the slowest rank counts."""
    found: dict[str, list[float]] = {}
    ways = layer.choices.ways
    for number in range(rounds + 1):
        for way in ways:
            layer.choices.ways = (way,)
            dist.barrier()
            start = time.perf_counter()
            call()
            spent = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(spent, op=dist.ReduceOp.MAX)
            if number:
                found.setdefault(str(way), []).append(float(spent))
    layer.choices.ways = ways
    return {way: min(times) for way, times in found.items()}


def measure(world: int, folder: str) -> list[dict[str, Any]]:
    """Return for each number of tokens and load what was chosen, and the times of all ways measured again."""
    from hf_optim.toolkit import compat

    model, experts = layer_across_ranks(f"{folder}/model", world)
    layer, rows = compat.ep_implementation_of(experts), []
    ways = layer.choices.ways
    for tokens in TOKENS:
        for load in LOADS:
            hidden = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank()))
            index, gates = choose(load, tokens, dist.get_rank()), torch.full((tokens, TOP_K), 1.0 / TOP_K)
            layer.choices.decisions.clear()
            with torch.no_grad():
                for _ in range((TRIALS + 1) * len(ways) + 1):
                    out = experts(hidden, index, gates)
                choice = next(iter(expert_exchange(model).values()))["choices"][-1]
                apart = 0.0
                for way in ways:
                    layer.choices.ways = (way,)
                    apart = max(apart, float((experts(hidden, index, gates) - out).abs().max()))
                layer.choices.ways = ways
                spent = seconds(layer, lambda: experts(hidden, index, gates))  # noqa: B023
                again = {way: 1e3 * one for way, one in spent.items()}
            rows.append(
                {"ranks": world, "tokens": tokens, "load": load, "largest_difference": apart, "again": again, **choice}
            )
    return rows


def on_ranks(world: int) -> list[dict[str, Any]]:
    """Fork the ranks, and return what rank 0 measures."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            child = os.fork()
            if not child:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
                store = dist.FileStore(f"{folder}/store", world)
                dist.init_process_group(
                    "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120)
                )
                rows = measure(world, folder)
                if rank == 0:
                    Path(folder, "found.json").write_text(json.dumps(rows))
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        return json.loads(Path(folder, "found.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("model_cards/moe/adaptive"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    busy = [os.getloadavg()[0]]
    for world in (2, 4):
        rows += on_ranks(world)
        print(f"{world} ranks measured", flush=True)
    busy.append(os.getloadavg()[0])
    sizes = {"experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "inner": INNER, "cores": os.cpu_count()}
    sizes |= {"trials": TRIALS, "load_average": [round(one, 1) for one in busy]}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "adaptive.json").write_text(
        json.dumps({**sizes, "measured": rows}, indent=1) + "\n", encoding="utf-8"
    )
    adaptive_page.write(args.output)


if __name__ == "__main__":
    main()
