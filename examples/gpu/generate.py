"""Check ``hf_optim.generate`` and its attention kernel, then time them beside transformers' loop and PyTorch's attention.

    PYTHONPATH=.:plugins:kernels python examples/gpu/generate.py --output generate.json

The kernel is compared with float64 and timed first, alone. Then models of Llama-3-8B's shape: each row of the plan is built, compiled and captured in a process of its own, all at once; then the processes are timed
one after the other, alone on the GPU. A row holds, of a model with random weights: milliseconds a token (the median of
calls for many tokens less that of calls for one), the time of a call for one token, and the time of the first call,
which compiles and captures. ``--tiny`` runs the same on a CPU, to try the script.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
import traceback
import warnings
from functools import partial
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """A row of the plan; ``vocabulary`` is the number of words, whose output head is read in every step."""

    name: str
    scheme: str
    layers: int
    prompt: int
    new: int
    batches: tuple[int, ...]
    ways: tuple[str, ...]
    vocabulary: int = 128_256


OURS = ("graph", "captured")
PLAN = [
    Entry("dense", "dense", 32, 128, 128, (1, 8), OURS),
    Entry("w4a16", "w4a16", 32, 128, 128, (1, 8), OURS),
    Entry("w8a8", "w8a8", 32, 128, 128, (1, 8), OURS),
    Entry("2:4-w4a16", "2:4-w4a16", 32, 128, 128, (1,), OURS),
    Entry("long", "dense", 8, 30_000, 64, (1,), (*OURS, "dynamic")),
    Entry("long-8", "dense", 8, 8_000, 64, (8,), (*OURS, "dynamic")),
    Entry("long-32000", "dense", 8, 30_000, 64, (1,), (*OURS, "dynamic"), 32_000),
    Entry("long-8-32000", "dense", 8, 8_000, 64, (8,), (*OURS, "dynamic"), 32_000),
    Entry("dense-stock", "dense", 32, 128, 64, (1,), ("static", "static-eager")),
    Entry("w4a16-stock", "w4a16", 32, 128, 64, (1, 8), ("static", "static-eager")),
    Entry("w8a8-stock", "w8a8", 32, 128, 64, (1,), ("static", "static-eager")),
    Entry("long-stock", "dense", 8, 30_000, 64, (1,), ("static",)),
    Entry("long-8-stock", "dense", 8, 8_000, 64, (8,), ("static",)),
]
CALLS = 4


class Timed:
    """One way to generate with one model and batch."""

    def __init__(self, model: Any, way: str, batch: int, prompt: int, new: int) -> None:
        import torch

        self.model, self.way, self.new = model, way, new
        torch.manual_seed(0)
        self.ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=model.device)

    def call(self, new: int) -> tuple[float, float | None]:
        """Return the seconds of a call, and in transformers' loop the median milliseconds between its steps."""
        import torch

        import hf_optim
        from hf_optim.evaluation.bench.decode import StepTimer

        torch.manual_seed(0)
        inputs = {"attention_mask": torch.ones_like(self.ids), "do_sample": False, "max_new_tokens": new}
        timer = StepTimer()
        synchronize()
        start = time.perf_counter()
        if self.way in ("graph", "captured"):
            mode = "auto" if self.way == "graph" else "captured"
            with warnings.catch_warnings():
                warnings.simplefilter("error", hf_optim.GenerationWarning)
                self.tokens = hf_optim.generate(self.model, self.ids, **inputs, mode=mode)
        else:
            cache = {} if self.way == "dynamic" else {"cache_implementation": "static"}
            if self.way == "static-eager":
                cache["disable_compile"] = True
            self.tokens = self.model.generate(self.ids, **inputs, **cache, logits_processor=[timer])
        synchronize()
        seconds = time.perf_counter() - start
        return seconds, timer.step_ms() if len(timer.times) > 8 else None

    def prepare(self) -> None:
        """Compile and capture."""
        self.first_call = self.call(self.new)[0]
        for _ in range(2 if self.way == "static" else 0):  # the third call records torch's CUDA graphs
            self.call(self.new)

    def measure(self) -> dict[str, Any]:
        """Return the figures of a row."""
        if self.way in ("graph", "captured"):
            short = statistics.median(self.call(1)[0] for _ in range(CALLS))
            whole = statistics.median(self.call(self.new)[0] for _ in range(CALLS))
            step = (whole - short) / (self.new - 1) * 1e3
        else:
            short = statistics.median(self.call(1)[0] for _ in range(2)) if self.way == "dynamic" else None
            step = statistics.median(self.call(self.new)[1] for _ in range(2))
        row = {"way": self.way, "batch": len(self.ids), "ms_per_token": round(step, 3)}
        row["first_call_s"] = round(self.first_call, 1)
        if short is not None:
            row["first_token_ms"] = round(short * 1e3, 1)
        return row


# batch, tokens, heads, key heads
ATTENTION = [
    (1, 32768, 32, 8),
    (16, 8192, 32, 8),
    (16, 32768, 32, 8),
    (1, 30000, 32, 8),
    (8, 8000, 32, 8),
    (1, 8192, 32, 32),
]


def check_attention() -> list[dict[str, Any]]:
    """Return rows of the attention kernel: its error, and its time beside PyTorch's attention without a mask."""
    import torch

    from hf_optim_kernels.common import benchmark
    from hf_optim_kernels.decode_attention import op

    attend = torch.nn.functional.scaled_dot_product_attention
    source = torch.empty(1 << 28, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy = benchmark.graph_time([partial(torch.add, source, 0, out=target)] * 8).us
    rows: list[dict[str, Any]] = [{"copy_tb_per_s": round(4 * source.numel() / copy / 1e6, 2)}]
    del source, target
    for batch, length, heads, groups in ATTENTION:
        parts = [torch.randn(batch, groups, length, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        query = torch.randn(batch, heads, 1, 128, device="cuda", dtype=torch.bfloat16)
        mask = torch.ones(batch, 1, 1, length, dtype=torch.bool, device="cuda")
        ranges = op.mask_ranges(mask)
        k, v = (part[:1].double().repeat_interleave(heads // groups, 1) for part in parts[:2])
        expected = attend(query[:1].double(), k, v)[:, :, 0]
        found = op.decode_attention(query, *parts[:2], mask, ranges, None, 128**-0.5, 0.0)[:1, 0]
        error = float((found.double() - expected).norm() / expected.norm())
        del k, v
        pairs = [(parts[0], parts[1]), (parts[2], parts[3])]
        ours = benchmark.graph_time(
            [partial(op.decode_attention, query, *pair, mask, ranges, None, 128**-0.5, 0.0) for pair in pairs * 2]
        ).us
        theirs = benchmark.graph_time([partial(attend, query, *pair, enable_gqa=True) for pair in pairs * 2]).us
        size = 2 * 2 * parts[0].numel()
        row = {"batch": batch, "tokens": length, "heads": heads, "key_heads": groups, "error": error}
        row |= {"decode_attention_us": round(ours, 1), "tb_per_s": round(size / ours / 1e6, 2)}
        rows.append({**row, "sdpa_enable_gqa_without_mask_us": round(theirs, 1)})
        print(rows[-1], flush=True)
        del parts, pairs
    return rows


def attention_rows(pipe: Any) -> None:
    try:
        pipe.put(check_attention())
    except BaseException:
        pipe.put([{"error": traceback.format_exc()[-600:]}])


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def work(entry: Entry, tiny: bool, turn: Any, pipe: Any) -> None:
    """Build and prepare the row of the plan; measure when it is this process's turn."""
    name, scheme, layers, prompt, new, batches, ways, vocabulary = entry
    try:
        import torch
        from transformers.utils import logging

        from hf_optim.evaluation.bench import models

        logging.set_verbosity_error()
        warnings.simplefilter("ignore")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        shape = dict(models.SHAPES["tiny" if tiny else "llama-3-8b"], max_position_embeddings=32768)
        models.SHAPES["timed"] = shape if tiny else {**shape, "num_hidden_layers": layers, "vocab_size": vocabulary}
        model = models.build("timed", scheme, torch.bfloat16 if not tiny else torch.float32, device)
        timed = [Timed(model, way, batch, prompt, new) for way in ways for batch in batches]
        for each in timed:
            try:
                each.prepare()
            except Exception as error:  # the other rows are still worth their time
                pipe.put(
                    (name, {"way": each.way, "batch": len(each.ids), "error": f"{type(error).__name__}: {error}"[:400]})
                )
                each.first_call = None
        pipe.put((name, "ready"))
        turn.wait()
        first: dict[int, Any] = {}
        for each in timed:
            if each.first_call is not None:
                row = {"name": name, "scheme": scheme, "layers": layers, "prompt": prompt, "new_tokens": new}
                row["vocabulary"] = model.config.vocab_size
                row |= each.measure()
                # Random weights have near ties, which roundings decide: how many tokens come before the first of them.
                tokens = first.setdefault(len(each.ids), each.tokens)
                same = (tokens == each.tokens)[:, prompt:].int().cumprod(dim=1).sum(dim=1)
                row["tokens_as_of_the_first_way"] = same.tolist()
                row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else None
                pipe.put((name, row))
    except BaseException:
        pipe.put((name, {"error": traceback.format_exc()[-600:]}))
    pipe.put((name, "done"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--only", nargs="*", help="names of rows of the plan")
    parser.add_argument("--ways", nargs="*", help="of graph, captured, static, static-eager, dynamic")
    parser.add_argument(
        "--wait", type=float, default=300.0, help="seconds until those that are ready are timed, beside the others"
    )
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--after", help="time nothing before this file exists: other work has the GPU until then")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    plan = [entry for entry in PLAN if not args.only or entry.name in args.only]
    if args.ways:
        plan = [entry._replace(ways=tuple(way for way in entry.ways if way in args.ways)) for entry in plan]
        plan = [entry for entry in plan if entry.ways]
    if args.tiny:
        plan = [
            entry._replace(scheme="dense", layers=2, prompt=16, new=12, ways=("graph", "dynamic")) for entry in plan[:2]
        ]
    import torch

    attention: list[dict[str, Any]] = []
    if torch.cuda.is_available() and not args.only:
        alone = context.Queue()
        process = context.Process(target=attention_rows, args=(alone,), daemon=True)
        process.start()
        attention = alone.get(timeout=120)
        process.join()
    pipe, turns, processes = context.Queue(), {}, {}
    for entry in plan:
        turns[entry.name] = context.Event()
        processes[entry.name] = context.Process(
            target=work, args=(entry, args.tiny, turns[entry.name], pipe), daemon=True
        )
        processes[entry.name].start()
    ready: list[str] = []
    rows: list[dict[str, Any]] = []
    done: set[str] = set()
    running: str | None = None
    while len(done) < len(plan) and time.monotonic() - began < args.limit:
        waited = time.monotonic() - began
        held = args.after is not None and not os.path.exists(args.after)
        if running is None and ready and not held and (len(ready) + len(done) == len(plan) or waited > args.wait):
            running = ready.pop(0)
            turns[running].set()
        try:
            name, message = pipe.get(timeout=1.0)
        except Exception:  # nothing yet
            continue
        if message == "ready":
            ready.append(name)
            print(f"{name} ready after {time.monotonic() - began:.0f} s", flush=True)
        elif message == "done":
            done.add(name)
            ready = [each for each in ready if each != name]
            running = None if running == name else running
        else:
            rows.append({"name": name, **message})
            print(rows[-1], flush=True)
            write(args.output, rows, attention)
    write(args.output, rows, attention)
    for process in processes.values():
        process.terminate()
    print(f"{len(done)} of {len(plan)} after {time.monotonic() - began:.0f} s")


def write(path: str, rows: list[dict[str, Any]], attention: list[dict[str, Any]]) -> None:
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
    with open(path, "w") as file:
        json.dump({**about, "shape": "llama-3-8b", "rows": rows, "attention": attention}, file, indent=1)


if __name__ == "__main__":
    main()
