"""Measure a checkpoint of 2.5 GB that runs from disk within a budget of host memory, on a CPU.

    python examples/offload_on_cpu.py [--folder /var/tmp] [--output model_cards/measurements/offload-cpu.json]

The weights are random. Each row is a process of its own: stock transformers with the whole model, then the model from
disk within a budget. Resident memory is the peak over loading and decoding, less what the interpreter had before; the
page cache is that of the machine, before and after. The bound is the streamed bytes over what the disk gave for the
same blocks without a model, with as many threads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CHILD = """
import json, sys, time, torch
import hf_optim
from transformers import AutoModelForCausalLM, LlamaForCausalLM
torch.set_grad_enabled(False)
source, budget, threads = sys.argv[1], sys.argv[2], 2
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith(key))
def cached():
    return next(int(l.split()[1]) * 1024 for l in open('/proc/meminfo') if l.startswith('Cached'))
base, pages = status('VmRSS'), cached()
started = time.perf_counter()
step = None if budget == 'none' else {'technique': 'offload', 'to': 'disk', 'host_memory': budget, 'threads': threads}
model = AutoModelForCausalLM.from_pretrained(source, optim_config=step, dtype=torch.bfloat16)
out = {'load_s': time.perf_counter() - started}
ids, times, tokens, cache = torch.arange(8)[None], [], [], {}
for _ in range(6):
    started = time.perf_counter()
    found = model(input_ids=ids, use_cache=True, **cache)
    times.append(time.perf_counter() - started)
    ids = found.logits[:, -1:].argmax(-1)
    tokens.append(int(ids))
    from hf_optim.toolkit.compat import CACHE
    cache = {CACHE: found[CACHE]}
out |= {'ms_per_token': 1000 * sorted(times[1:])[2], 'tokens': tokens, 'resident_peak': status('VmHWM') - base,
        'page_cache_growth': cached() - pages}
if step is not None:
    from hf_optim.toolkit.offloading import find_state
    plan, streamer = hf_optim.offload_plan(model), find_state(model).streamer
    started, rounds = time.perf_counter(), 2
    for _ in range(rounds):
        for n, stored in enumerate(streamer.stored):
            for part in streamer.reader.read(stored.pieces, streamer.memory_of(n)):
                part.result()
    seconds = (time.perf_counter() - started) / rounds
    out |= {'plan_bytes': plan.device_bytes + plan.readers, 'streamed_bytes': plan.streamed_bytes,
            'blocks': [plan.places.count(p) for p in ('device', 'disk')],
            'disk_gb_s': plan.streamed_bytes / seconds / 1e9,
            'bound_ms': 1000 * seconds, 'over_bound': out['ms_per_token'] / 1000 / seconds}
print('RESULT ' + json.dumps(out))
"""


def make(folder: Path, layers: int) -> int:
    """Write a checkpoint with random weights; return its bytes."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=32000, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    tile = torch.randn(1 << 22).mul_(0.02).bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
        else:
            flat = parameter.data.view(-1)
            for at in range(0, len(flat), len(tile)):
                flat[at : at + len(tile)] = tile[: len(flat) - at].roll(hash((name, at)) % len(tile))
    model.save_pretrained(folder, max_shard_size="500MB")
    return sum(p.numel() * p.element_size() for p in model.parameters())


def child(source: Path, budget: str) -> dict[str, Any]:
    """Measure one row in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), budget], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(lines[0][7:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default="/var/tmp")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--budgets", nargs="+", default=["700MB", "1500MB"])
    parser.add_argument("--output", default="model_cards/measurements/offload-cpu.json")
    given = parser.parse_args()
    source = Path(given.folder, "offload-on-cpu")
    try:
        size = make(source, given.layers)
        subprocess.run(["sync"], check=False)
        rows = {"stock": child(source, "none")}
        for budget in given.budgets:
            rows[budget] = child(source, budget)
            rows[budget]["equal_tokens"] = rows[budget]["tokens"] == rows["stock"]["tokens"]
    finally:
        shutil.rmtree(source, ignore_errors=True)
    result = {"bytes": size, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "rows": rows}
    Path(given.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
