"""Time dense layers of one row on their kernel: launches alone, then decoding steps with each part of it.

    PYTHONPATH=.:plugins:kernels python examples/gpu/one_row.py --output one_row.json [--only launches dense long mixture]

``launches``: what reads one row in a block of Llama-3-8B and of Qwen3-30B-A3B, in every configuration, beside the
library's products one after the other; replayed graphs over copies that are larger than the cache. The others are
models with random weights, decoded by ``hf_optim.generate`` in every way of ``WAYS``: all ways of a model are compiled
first, by two processes, and then timed in turn, alone on the GPU, several times. Milliseconds a token are the time from
the ninth token to the last, as a streamer sees them, so that no prefill is in it. ``--tiny`` tries the script on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import statistics
import time
import traceback
import warnings
from functools import partial
from typing import Any

WAYS: dict[str, tuple[str, ...]] = {
    "off": (),
    "products": ("products",),
    "joined": ("products", "gates", "joined"),
    # No parts of the others: the choice of experts in one launch (``generation.choices``), and attention that begins
    # before the launch before it has ended (``decode_attention.launch.AHEAD``).
    "choices": ("products", "gates", "joined", "choices"),
    "ahead": ("products", "gates", "joined", "ahead"),
}
# Prompt and new tokens.
MODELS = {"dense": (128, 128), "long": (30_000, 128), "mixture": (128, 128)}
FIRST = 8
# Rows of the weights of a launch, columns, and whether an activation is in it.
LAUNCHES: dict[str, tuple[tuple[int, ...], int, tuple[str, ...]]] = {
    "llama qkv": ((4096, 1024, 1024), 4096, ()),
    "llama o": ((4096,), 4096, ()),
    "llama gate, up": ((14336, 14336), 4096, ("act",)),
    "llama down": ((4096,), 14336, ()),
    "llama head": ((128256,), 4096, ()),
    "qwen3 qkv": ((4096, 512, 512), 2048, ()),
    "qwen3 o": ((2048,), 4096, ()),
    "qwen3 router": ((128,), 2048, ()),
    "qwen3 head": ((151936,), 2048, ()),
}
REPLAYS = 15


# -- launches alone ---------------------------------------------------------------------------------------------------
def calls_of(name: str, config: dict[str, Any] | None, more: tuple[str, ...], copies: Any) -> list[Any]:
    """Return calls of a launch on copies of its weights; with no configuration those of the library."""
    import torch
    from torch.nn import functional as F

    from hf_optim_kernels.dense_row import launch

    x = torch.randn(LAUNCHES[name][1], device=copies[0][0].device, dtype=torch.bfloat16)

    def library(weights: tuple[Any, ...]) -> Any:
        return [F.linear(x[None], weight) for weight in weights]

    if config is None:
        return [partial(library, weights) for weights in copies]
    act = 0 if "act" in more else -1
    return [partial(launch.dense_rows, x, weights, act=act, config=config) for weights in copies]


def copies_for(name: str, count: int | None = None) -> Any:
    """Return copies of a launch's weights, together larger than the cache."""
    import torch

    from hf_optim_kernels.common import benchmark

    sizes, K, _ = LAUNCHES[name]
    number = benchmark.copies_for(2 * K * sum(sizes)) if count is None else count
    made = {"device": benchmark.device(), "dtype": torch.bfloat16}
    return [tuple(torch.randn(size, K, **made) for size in sizes) for _ in range(number)]


def trials(name: str) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """Return configurations of a launch with what is in it, then the default without an activation, and again."""
    from hf_optim_kernels.dense_row import launch

    sizes, K, act = LAUNCHES[name]
    about = (K, 1 + len(act), sum(sizes))
    first = launch.default(*about)
    strided = [{**first, "strided": True, "programs": programs} for programs in (2, 3, 4)]
    found = [(config, act) for config in (*launch.candidates(*about), *strided)]
    without: list[tuple[str, ...]] = [()] if act else []
    return [*found, *((first, each) for each in without), (first, act)]  # the default again: the noise


def compile_launches(index: int, count: int) -> None:
    """Compile a share of the launches, so that Triton has them on disk."""
    import torch

    for name in LAUNCHES:
        copies = copies_for(name, 1)
        for config, more in trials(name)[index::count]:
            with contextlib.suppress(Exception):  # told when it is timed
                calls_of(name, config, more, copies)[0]()
        torch.cuda.synchronize()
        del copies


def time_launches(pipe: Any) -> None:
    from hf_optim_kernels.common import benchmark

    try:
        pipe.put(("launches", {"copy_bytes_us": round(benchmark.copy_bandwidth())}))
        for name, (sizes, K, _) in LAUNCHES.items():
            copies = copies_for(name)
            library = benchmark.graph_time(calls_of(name, None, (), copies), REPLAYS).us
            row: dict[str, Any] = {"launch": name, "megabytes": round(2e-6 * K * sum(sizes), 1)}
            row |= {"library_us": round(library, 2), "configs": []}
            for config, more in trials(name):
                try:
                    us: Any = round(benchmark.graph_time(calls_of(name, config, more, copies), REPLAYS).us, 2)
                except Exception as error:
                    us = f"{type(error).__name__}: {error}"[:200]
                row["configs"].append([us, more, config])
            del copies
            pipe.put(("launches", row))
    except BaseException:
        pipe.put(("launches", {"error": traceback.format_exc()[-800:]}))
    pipe.put(("launches", None))


# -- models -----------------------------------------------------------------------------------------------------------
class Clock:
    """A streamer that notes when tokens arrive."""

    def __init__(self) -> None:
        self.times: list[tuple[int, float]] = []

    def put(self, tokens: Any) -> None:
        self.times.append((tokens.numel(), time.perf_counter()))

    def end(self) -> None:
        pass

    def ms(self) -> float:
        """Return milliseconds a token behind the first ones."""
        seen, marks = 0, []
        for count, at in self.times[1:]:  # the first are those of the prompt
            seen += count
            marks.append((seen, at))
        marks = [mark for mark in marks if mark[0] > FIRST]
        return (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0]) * 1e3


def build(name: str, tiny: bool) -> Any:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from hf_optim.evaluation.bench import models

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if tiny else torch.bfloat16
    if name != "mixture":
        shape = dict(models.SHAPES["tiny" if tiny else "llama-3-8b"], max_position_embeddings=32768)
        models.SHAPES["timed"] = shape if tiny or name == "dense" else {**shape, "num_hidden_layers": 8}
        return models.build("timed", "dense", dtype, device)
    import hf_optim

    size = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "vocab_size": 151936}
    size |= {"num_experts_per_tok": 8, "num_hidden_layers": 12, "num_attention_heads": 32, "num_key_value_heads": 4}
    if tiny:
        size |= {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "vocab_size": 256}
        size |= {"num_experts_per_tok": 2, "num_hidden_layers": 2}
    config = Qwen3MoeConfig(
        **size, intermediate_size=6144, head_dim=128, norm_topk_prob=True, max_position_embeddings=4096, dtype=dtype
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        model = Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    hf_optim.accelerate(model)
    return model


class Ways:
    """A model with the sessions and compiled steps of several ways to decode it."""

    def __init__(self, name: str, ways: list[str], tiny: bool) -> None:
        import torch

        self.prompt, self.new = (16, 24) if tiny else MODELS[name]
        self.model = build(name, tiny)
        torch.manual_seed(0)
        self.ids = torch.randint(0, self.model.config.vocab_size, (1, self.prompt), device=self.model.device)
        self.kept: dict[str, Any] = {}
        self.tokens: dict[str, Any] = {}
        self.first_call: dict[str, float] = {}
        for way in ways:
            start = time.perf_counter()
            self.call(way)
            self.first_call[way] = round(time.perf_counter() - start, 1)

    def call(self, way: str) -> Clock:
        """Generate once in a way."""
        import torch

        import hf_optim
        from hf_optim.generation import capture, choices, one_row, sessions
        from hf_optim_kernels.decode_attention import launch as attention

        clock = Clock()
        held = [sessions._MODELS, capture._COMPILED]
        for table, own in zip(held, self.kept.get(way, (None, None)), strict=True):
            table.pop(self.model, None)
            if own is not None:
                table[self.model] = own
        one_row.USED = frozenset(WAYS[way]) & frozenset(one_row.PARTS)
        choices.ENABLED, attention.AHEAD = "choices" in WAYS[way], "ahead" in WAYS[way]
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error", hf_optim.GenerationWarning)
            self.tokens[way] = hf_optim.generate(
                self.model, self.ids, attention_mask=torch.ones_like(self.ids), do_sample=False,
                max_new_tokens=self.new, streamer=clock,
            )[0, self.prompt :].tolist()  # fmt: skip
        self.kept[way] = [table.get(self.model) for table in held]
        return clock

    def timed(self, way: str) -> dict[str, Any]:
        """Return milliseconds a token, the tokens, and why the step is not compiled if it is not."""
        ms = self.call(way).ms()
        made = [session for _, session in (self.kept[way][0] or {}).values()]
        reasons = [each.uncompiled for each in made if getattr(each, "uncompiled", None)]
        return {"ms": ms, "first_call_s": self.first_call[way], "tokens": self.tokens[way], "uncompiled": reasons}

    def profiled(self, way: str) -> dict[str, Any]:
        """Return microseconds and launches a token of each kernel."""
        from profiled_launches import kernels_a_token

        new = self.new

        def run(count: int) -> None:
            self.new = count
            self.call(way)

        try:
            return kernels_a_token(run)
        finally:
            self.new = new


def serve(name: str, ways: list[str], tiny: bool, pipe: Any) -> None:
    """Prepare ways, then time or profile those that are asked for."""
    try:
        from transformers.utils import logging

        logging.set_verbosity_error()
        warnings.simplefilter("ignore")
        made = Ways(name, ways, tiny)
        pipe.send("ready")
        while (wanted := pipe.recv()) is not None:
            what, way = wanted
            pipe.send(getattr(made, what)(way))
    except EOFError:
        pass
    except BaseException:
        pipe.send({"error": traceback.format_exc()[-900:]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--only", nargs="*", default=["launches", *MODELS])
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="also the kernels of a step, for the first and last way")
    parser.add_argument("--wait", type=float, default=150.0, help="seconds until those that are ready are timed")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    began = time.monotonic()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "3")  # of each of several processes
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {"launches": [], "steps": {}}

    def keep() -> None:
        import torch
        import transformers

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        about = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
        with open(args.output, "w") as file:
            json.dump({**about, **found}, file, indent=1)

    servers: dict[tuple[str, str], Any] = {}
    processes = []
    for name in [each for each in MODELS if each in args.only]:
        for ways in (args.ways[::2], args.ways[1::2]):
            if ways:
                ours, theirs = context.Pipe()
                processes.append(context.Process(target=serve, args=(name, ways, args.tiny, theirs), daemon=True))
                processes[-1].start()
                servers |= {(name, way): ours for way in ways}
    if "launches" in args.only and not args.tiny:
        count = max(1, (os.cpu_count() or 1) - len(processes))
        compiling = [context.Process(target=compile_launches, args=(i, count), daemon=True) for i in range(count)]
        for process in compiling:
            process.start()
        for process in compiling:
            process.join()
        print(f"launches compiled after {time.monotonic() - began:.0f} s", flush=True)
    ready = set()
    for pipe in dict.fromkeys(servers.values()):
        said = pipe.recv() if pipe.poll(max(0.1, args.wait - (time.monotonic() - began))) else "not ready in time"
        names = [" ".join(key) for key, each in servers.items() if each is pipe]
        print(", ".join(names), said, f"after {time.monotonic() - began:.0f} s", flush=True)
        ready |= {pipe} if said == "ready" else set()

    def ask(key: tuple[str, str], what: str) -> dict[str, Any]:
        if servers[key] not in ready:
            return {"error": "not prepared"}
        servers[key].send((what, key[1]))
        answer: dict[str, Any] = servers[key].recv() if servers[key].poll(60) else {"error": "no answer"}
        if "error" in answer:
            ready.discard(servers[key])
            print(*key, answer["error"], flush=True)
        return answer

    first: dict[str, list[int]] = {}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in servers}
    for _ in range(args.repeats):
        for key in sorted(servers, key=lambda key: (list(MODELS).index(key[0]), args.ways.index(key[1]))):
            if "ms" in (answer := ask(key, "timed")):
                times[key].append(answer.pop("ms"))
                tokens = answer.pop("tokens")
                pairs = zip(first.setdefault(key[0], tokens), tokens, strict=True)
                same = list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
                # Random weights have near ties, which roundings decide.
                answer["tokens_as_of_the_first_way"] = len(same)
                row = {"ms_per_token": round(statistics.median(times[key]), 4), **answer}
                row |= {"each": [round(ms, 4) for ms in times[key]]}
                found["steps"].setdefault(key[0], {})[key[1]] = row
        keep()
    for name, rows in found["steps"].items():
        for way, row in rows.items():
            print(name, way, row, flush=True)
    if args.profile:
        for key in servers:
            if key[1] in (args.ways[0], args.ways[-1]):
                found.setdefault("kernels_us_a_token", {})[" ".join(key)] = ask(key, "profiled")
        keep()
    for pipe in ready:
        pipe.send(None)
    for process in processes:
        process.join(5)
        process.terminate()
    if "launches" in args.only and not args.tiny:
        queue = context.Queue()
        process = context.Process(target=time_launches, args=(queue,), daemon=True)
        process.start()
        while (row := queue.get(timeout=90)[1]) is not None:
            found["launches"].append(row)
            keep()
            if "configs" not in row:
                print(row, flush=True)
                continue
            timed = sorted((each for each in row["configs"] if isinstance(each[0], float)), key=lambda each: each[0])
            default, wrong = row["configs"][0], [each for each in row["configs"] if isinstance(each[0], str)]
            print(
                row["launch"],
                f"library {row['library_us']}, default {default[0]}, again {row['configs'][-1][0]}, best",
                timed[:3],
                flush=True,
            )
            print(
                "   without activation:",
                [each for each in row["configs"] if each[1] != default[1]],
                wrong[:1],
                flush=True,
            )
    keep()
    print(f"done after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
