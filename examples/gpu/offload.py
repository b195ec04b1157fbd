"""Measure offloading on a GPU: the link, equal outputs, and an 8B shape in 4 GiB, beside accelerate's hooks.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/offload.py [WORD ...]

Weights are random, since only bytes and equality count. ``TINY=1`` runs the same in small, on a CPU from disk. Times of a
token are medians of the steps after the first. With words, only the sections that have one of them in their names run.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from sections import Sections
from transformers import AutoConfig, AutoModelForCausalLM

import hf_optim
from hf_optim.toolkit.compat import CACHE
from hf_optim.toolkit.offloading.links import CpuLink, CudaLink, measure_link

TINY = bool(os.environ.get("TINY"))
DEVICE = "cpu" if TINY else "cuda"
FOLDER = Path(os.environ.get("SCRATCH", "/var/tmp/offload"))
GIB = 1 << 30
STARTED = time.perf_counter()
LIMIT = float(os.environ.get("LIMIT", "125"))
HOST = os.environ.get("HOST", "4GiB")  # beside some 1.6 GB of Python, CUDA and its libraries
section = Sections("offload-h200.json")
torch.set_grad_enabled(False)


def shape(layers=32):
    small = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    }
    large = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    return AutoConfig.for_model(
        "llama", num_hidden_layers=8 if TINY else layers, max_position_embeddings=8192, dtype=torch.bfloat16,
        tie_word_embeddings=False, **(small if TINY else large),
    )  # fmt: skip


def build(layers=32):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(shape(layers), dtype=torch.bfloat16).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    return model


def free():
    gc.collect()
    if not TINY:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def decode(model, tokens, cache=None, prompt=32):
    """Greedy tokens, and the median seconds of a step after the first."""
    ids = (torch.arange(prompt, device=DEVICE)[None] * 37) % 997
    times, found = [], []
    given = {} if cache is None else {CACHE: cache}
    for _ in range(tokens):
        started = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, **given)
        ids = out.logits[:, -1:].argmax(-1)
        found.append(int(ids))
        times.append(time.perf_counter() - started)
        given = {CACHE: out[CACHE]}
    return found, sorted(times[1:])[len(times[1:]) // 2]


def peak():
    return 0 if TINY else torch.cuda.max_memory_allocated()


def row(model, tokens, expected, budget=None, **more):
    """Decode with at most ``budget`` bytes of the device, and compare with the plan."""
    free()
    if not TINY:
        torch.cuda.reset_peak_memory_stats()
        if budget is not None:
            torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.get_device_properties(0).total_memory)
    try:
        found, seconds = decode(model, tokens)
    finally:
        if not TINY:
            torch.cuda.set_per_process_memory_fraction(1.0)
    plan = hf_optim.offload_plan(model)
    bound = plan.seconds
    result = {
        "equal_tokens": found == expected, "ms_per_token": 1000 * seconds, "streamed_bytes": plan.streamed_bytes,
        "link_gb_s": (plan.link or 0) / 1e9, "disk_gb_s": (plan.disk or 0) / 1e9, "bound_ms": 1000 * bound,
        "over_bound": seconds / bound, "plan_device_bytes": plan.device_bytes, "plan_host_bytes": plan.host_bytes,
        "peak_device_bytes": peak(), "blocks": [plan.places.count(p) for p in ("device", "host", "disk")],
        "ahead": plan.ahead, **more,
    }  # fmt: skip
    print(json.dumps(result), flush=True)
    return result


def time_left():
    return LIMIT - (time.perf_counter() - STARTED)


@section("link")
def link():
    made = CpuLink() if TINY else CudaLink(torch.device("cuda", 0))
    return {
        f"{size >> 20} MiB": [r / 1e9 for r in measure_link(made, size)] for size in (16 << 20, 64 << 20, 416 << 20)
    }


@section("small")
def small():
    """Equal outputs of every place, dense, packed and compiled."""
    result = {}
    model = build(8) if TINY else None
    if model is None:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llama", hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=4,
            num_hidden_layers=7, vocab_size=4096, dtype=torch.bfloat16,
        )  # fmt: skip
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(1, 900, (2, 40), device=DEVICE)
    for kind in ("dense", "W4A16"):
        if kind == "W4A16":
            step = {"technique": "rtn", "bits": 4, "group_size": 128, "symmetric": True}
            model = hf_optim.optimize(model, step, kernels=True)
        expected = model(input_ids=ids).logits
        tokens = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for to, more in (("cpu", {}), ("cpu", {"ahead": 3}), ("disk", {}), ("disk", {"host_memory": "100MB"})):
            if TINY and to == "cpu":
                continue
            hf_optim.offload(model, to, folder=FOLDER if to == "disk" else None, **more)
            same = [torch.equal(expected, model(input_ids=ids).logits) for _ in range(3)]
            again = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
            result[f"{kind} {to} {more}"] = [all(same), torch.equal(tokens, again), str(hf_optim.offload_plan(model))]
            print(kind, to, more, result[f"{kind} {to} {more}"], flush=True)
            hf_optim.offload_plan(model)
            from hf_optim.toolkit.offloading import restore_weights

            restore_weights(model)
            assert torch.equal(expected, model(input_ids=ids).logits)
        if kind == "dense" and not TINY:
            cache = hf_optim.offloaded_cache(model)
            again = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **{CACHE: cache})
            result["keys and values"] = torch.equal(tokens, again)
    return result


STATE: dict = {}


@section("8B")
def eight():
    """The whole model on the device, then 4 GiB of it from host memory, then accelerate with as much."""
    result = {}
    started = time.perf_counter()
    model = build()
    result["build_s"] = time.perf_counter() - started
    result["bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    expected, seconds = decode(model, 6)
    result["on the device"] = {"ms_per_token": 1000 * seconds}
    print(result, flush=True)
    started = time.perf_counter()
    if not TINY:
        hf_optim.offload(model, "cpu", device_memory="3.7GiB")
        result["pinned"] = row(model, 6, expected, 4 * GIB, offload_s=time.perf_counter() - started)
    else:
        hf_optim.offload(model, "disk", folder=FOLDER)
        result["disk"] = row(model, 6, expected)
    STATE["expected"] = expected
    started = time.perf_counter()
    hf_optim.restore(model)
    result["restore_s"] = time.perf_counter() - started
    STATE["model"] = model
    return result


@section("W4A16")
def packed():
    """The same model in 4 bits."""
    model = STATE.pop("model", None) or build()
    started = time.perf_counter()
    step = {"technique": "rtn", "bits": 4, "group_size": 128, "symmetric": True}
    model = hf_optim.optimize(model, step, kernels=True)
    result = {"quantize_s": time.perf_counter() - started}
    expected, seconds = decode(model, 6)
    result["on the device"] = {"ms_per_token": 1000 * seconds}
    print(result, flush=True)
    if not TINY:
        hf_optim.offload(model, "cpu", device_memory="2.9GiB")
        result["pinned"] = row(model, 8, [*expected, 0, 0])
        result["pinned"]["equal_tokens"] = decode(model, 6)[0] == expected
    del model
    free()
    return result


@section("accelerate")
def accelerated():
    """accelerate's hooks with as many blocks on the device, on the same random weights."""
    if TINY or time_left() < 25:
        return "left out: no time"
    from accelerate import dispatch_model

    model = build().to("cpu")  # its hooks would keep on the device what is there
    free()
    resident = {8, 24}
    device_map = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    device_map |= {f"model.layers.{i}": 0 if i in resident else "cpu" for i in range(32)}
    model = dispatch_model(model, device_map, main_device=0)
    free()
    torch.cuda.reset_peak_memory_stats()
    found, seconds = decode(model, 3)
    return {"equal_tokens": found == STATE.get("expected", [])[:3], "ms_per_token": 1000 * seconds,
            "peak_device_bytes": peak(), "resident_blocks": len(resident)}  # fmt: skip


CHILD = """
import json, os, sys, time, torch
sys.path.insert(0, {here!r})
import hf_optim
from transformers import AutoModelForCausalLM
torch.set_grad_enabled(False)
def cached():
    return next(int(l.split()[1]) * 1024 for l in open('/proc/meminfo') if l.startswith('Cached'))
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith(key))
if {device!r} != 'cpu':
    torch.zeros(1, device={device!r})
base, rss = cached(), status('VmRSS')
started = time.perf_counter()
step = {{'technique': 'offload', 'to': 'disk', 'device_memory': {budget!r}, 'host_memory': {host!r}, 'folder': {folder!r}}}
model = AutoModelForCausalLM.from_pretrained({source!r}, optim_config=step, device_map={device!r})
load = time.perf_counter() - started
from offload import row
out = row(model, 4, {expected!r}, load_s=load)
out |= {{'rss_before': rss, 'rss_peak': status('VmHWM'), 'page_cache_growth': cached() - base}}
out |= {{'rss_anonymous': status('RssAnon'), 'rss_files': status('RssFile')}}
print('RESULT ' + json.dumps(out))
"""


def write_rate(size=GIB // 2):
    """Bytes a second of a file that is written to the disk."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with open(FOLDER / "probe", "wb", buffering=0) as file:
        file.write(bytes(size))
        os.fsync(file.fileno())
    os.unlink(FOLDER / "probe")
    return size / (time.perf_counter() - started)


@section("disk")
def disk():
    """A checkpoint on disk, within 4 GiB of the device; weights in host memory within ``HOST``."""
    if time_left() < 25 and not TINY:
        return "left out: no time"
    rate = write_rate()
    # Writing, reading once while loading, and four passes.
    layers, host = (32, HOST) if 16.1e9 / rate + 35 < time_left() else (12, "2GiB")
    print(f"disk: {rate / 1e9:.2f} GB/s written, {layers} layers, {time_left():.0f} s left", flush=True)
    model = build(layers)
    expected, _ = decode(model, 4)
    started = time.perf_counter()
    model.save_pretrained(FOLDER / "model", max_shard_size="4GB")
    written = time.perf_counter() - started
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    del model
    free()
    for file in (FOLDER / "model").glob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    code = CHILD.format(
        here=str(Path(__file__).parent), budget=None if TINY else "4GiB", host=None if TINY else host,
        folder=str(FOLDER), source=str(FOLDER / "model"), device=DEVICE, expected=expected,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, "none"], capture_output=True, text=True, timeout=max(20, time_left())
    )
    print(done.stdout[-1500:], done.stderr[-1500:], flush=True)
    line = next((each for each in done.stdout.splitlines() if each.startswith("RESULT ")), "RESULT {}")
    return {
        "write_gb_s": rate / 1e9,
        "host_memory": host,
        "bytes": size,
        "write_s": written,
        "layers": layers,
        **json.loads(line[7:]),
    }


if __name__ == "__main__":
    print(json.dumps(section.result, indent=1))
