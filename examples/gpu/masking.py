"""Masking on a GPU: exactness, time of the kernel beside PyTorch's own, its share of a training step, FSDP2.

OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/masking.py [SECTION ...]

The Trainer gets one GPU (it would wrap the model in DataParallel otherwise), FSDP2 all that are visible.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = (VISIBLE or "0").split(",")[0]
import torch
import triton
import triton.language as tl
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_optim
from hf_optim import masking, zeroing
from hf_optim.guarding import GradientGuard
from hf_optim.masking import MaskKeeper, stray_weights
from hf_optim_kernels import benching
from hf_optim_kernels.masked_step import kernel as kernels
from hf_optim_kernels.masked_step import naive
from hf_optim_kernels.masked_step import run as fused

warnings.simplefilter("ignore")
OUT = Path(os.environ.get("OUT", "."))
RESULT: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
DEVICE = torch.device("cuda")


def section(name):
    def run(function):
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            return
        print(f"== {name}", flush=True)
        try:
            RESULT[name] = function()
        except Exception:
            traceback.print_exc()
            RESULT[name] = {"failed": traceback.format_exc()[-800:]}
        print(json.dumps(RESULT[name], indent=1), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        (OUT / "masking.json").write_text(json.dumps(RESULT, indent=1))

    return run


@triton.jit
def blind_kernel(
    addresses, masks, sizes, owners, chunks, KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """The variant that never reads the weight: single stores where the mask is False."""
    p = tl.program_id(0)
    owner = tl.load(owners + p)
    at = tl.load(addresses + owner)
    size = tl.load(sizes + owner)
    begin = tl.load(chunks + p).to(tl.int64) * BLOCK
    tensor = tl.multiple_of(at.to(tl.pointer_type(KIND)) + begin, 16)
    mask = tl.multiple_of(tl.load(masks + owner).to(tl.pointer_type(tl.int8)) + begin, 16)
    i = tl.arange(0, BLOCK)
    inside = i < tl.where(at == 0, 0, size - begin)
    kept = tl.load(mask + i, inside, 1) != 0
    tl.store(tensor + i, tl.zeros([BLOCK], KIND), inside & (kept == 0))


def llama_shapes(layers=12, hidden=768, inner=2048):
    return [s for _ in range(layers) for s in [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]]


STOCK_LAUNCH = fused.launch


def _launch_keyed(block, warps):
    def launch(kernel, grid, args, constants, *, num_warps, num_stages, key):
        return STOCK_LAUNCH(
            kernel, grid, args, constants, num_warps=warps, num_stages=num_stages, key=(*key, block, warps)
        )

    return launch


SETS = {"llama-85M, 84 tensors": llama_shapes(), "2000 tensors of 128x256": [(128, 256)] * 2000}


@section("exact")
def _():
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, shapes in {**SETS, "odd": [(1,), (7, 3), (4097,), (129, 130), (4096, 3)]}.items():
            g = torch.Generator(DEVICE).manual_seed(0)
            tensors = [torch.randn(s, device=DEVICE, generator=g).to(dtype) for s in shapes]
            tensors[-1].view(-1)[0] = float("nan")
            masks = [torch.rand(s, device=DEVICE, generator=g) < 0.5 for s in shapes]
            expected = [t.clone() for t in tensors]
            naive.zero_(expected, masks)
            fused.Zeroing(masks)(tensors)
            kind = torch.int16 if dtype.itemsize == 2 else torch.int32
            same = all(torch.equal(a.view(kind), b.view(kind)) for a, b in zip(tensors, expected, strict=False))
            found[f"{dtype} {name}"] = same
            assert same
    return found


@section("kernel")
def _():
    """Microseconds on the device (graph), eager, and of the host alone."""
    rows = {}
    for name, shapes in SETS.items():
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [torch.randn(s, device=DEVICE).to(dtype) for s in shapes]
            masks = [torch.rand(s, device=DEVICE) < 0.5 for s in shapes]
            count = sum(t.numel() for t in tensors)
            ways = {"torch._foreach_mul_": lambda: torch._foreach_mul_(tensors, masks)}
            ways["masked_fill_ each"] = lambda: [t.masked_fill_(m, 0) for t, m in zip(tensors, masks, strict=False)]
            for block, warps in ((2048, 4), (4096, 4), (8192, 4), (8192, 8), (16384, 8)):
                for variant in ("read", "blind"):
                    fused.BLOCK, fused._WARPS = block, warps
                    fused.zero_kernel = kernels.zero_kernel if variant == "read" else blind_kernel
                    zero = fused.Zeroing(masks)

                    def call(zero=zero, block=block, warps=warps, variant=variant):
                        fused.BLOCK, fused._WARPS = block, warps
                        fused.zero_kernel = kernels.zero_kernel if variant == "read" else blind_kernel
                        fused.launch = _launch_keyed(block, warps)
                        zero(tensors)

                    ways[f"{variant} {block}/{warps}"] = call
            for way, call in ways.items():
                try:
                    graph = benching.graph_time([call]).us
                    eager, host = benching.eager_time([call]).us, benching.host_time(call).us
                    rows[f"{name} {dtype} {way}"] = {
                        "graph_us": round(graph, 1),
                        "eager_us": round(eager, 1),
                        "host_us": round(host, 1),
                        "TB/s (mask + read + write)": round(count * (1 + 2 * dtype.itemsize) / graph / 1e6, 2),
                    }
                except Exception as error:
                    rows[f"{name} {dtype} {way}"] = repr(error)[:200]
                print(name, dtype, way, rows[f"{name} {dtype} {way}"], flush=True)
    fused.BLOCK, fused._WARPS, fused.zero_kernel, fused.launch = 4096, 4, kernels.zero_kernel, STOCK_LAUNCH
    return rows


class Rows(torch.utils.data.Dataset):
    def __init__(self, count, length, vocabulary):
        self.ids = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


class Clock(TrainerCallback):
    """Wall time of a step once warm, and when each step ended."""

    def __init__(self, warm):
        self.warm, self.begun, self.ended, self.steps = warm, 0.0, 0.0, 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.warm:
            torch.cuda.synchronize()
            self.begun = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.ended, self.steps = time.perf_counter(), state.global_step - self.warm

    @property
    def ms(self):
        return 1e3 * (self.ended - self.begun) / self.steps


class Stopwatch:
    """What the hooks of a callback take: on the device by events, on the host by the clock."""

    def __init__(self, callback, names=("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")):
        self.spans, self.host, self.calls = [], 0.0, 0
        for name in names:
            setattr(callback, name, self._timed(getattr(callback, name), name == "on_step_end"))

    def _timed(self, hook, last):
        def call(*args, **kwargs):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            start = time.perf_counter()
            hook(*args, **kwargs)
            self.host += time.perf_counter() - start
            events[1].record()
            self.spans.append(events)
            self.calls += last

        return call

    def figures(self):
        torch.cuda.synchronize()
        spans = [a.elapsed_time(b) for a, b in self.spans]
        per = len(spans) // max(1, self.calls)
        steps = [sum(spans[i : i + per]) for i in range(0, len(spans), per)]
        return {
            "device_ms_a_step": round(statistics.median(steps), 3),
            "host_ms_a_step": round(1e3 * self.host / self.calls, 3),
        }


def model_of(dtype=torch.float32, layers=12):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype)


ONCE = [{"technique": "gmp", "sparsity": 0.5, "begin": 0, "end": 0}]


def train(
    kind, steps=60, warm=20, batch=8, length=1024, clock_parts=False, layers=12, optim="adamw_torch_fused", filter=True
):
    """kind: plain | stage | stage-foreach | stage-twice | stage-unguarded"""
    model = model_of(layers=layers)
    callbacks, run = [], None
    if kind != "plain":
        model = hf_optim.optimize(model, ONCE)
        run = hf_optim.run_of(model)
        callbacks = hf_optim.callbacks(model)
    zeroing._kernel.cache_clear()
    known, stay = zeroing.KERNEL, masking.STAY_AT_ZERO
    if kind == "stage-foreach":
        zeroing.KERNEL = "no_such_package"
    if kind in ("stage-twice", "stage-foreach"):
        masking.STAY_AT_ZERO = ()
    if kind == "stage-unguarded":
        callbacks = [c for c in callbacks if not isinstance(c, GradientGuard)]
    watches = {}
    if clock_parts:
        for callback in callbacks:
            if isinstance(callback, (MaskKeeper, GradientGuard)):
                watches[type(callback).__name__] = Stopwatch(callback)
    clock = Clock(warm)
    with tempfile.TemporaryDirectory() as home:
        args = TrainingArguments(
            output_dir=home,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=3e-4,
            report_to=[],
            bf16=True,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=0,
            optim=optim,
            weight_decay=0.1,
            logging_nan_inf_filter=filter,
        )
        trainer = Trainer(model=model, args=args, train_dataset=Rows(512, length, 32000), callbacks=[*callbacks, clock])
        trainer.train()
    zeroing.KERNEL, masking.STAY_AT_ZERO = known, stay
    zeroing._kernel.cache_clear()
    figures = {"ms_a_step": round(clock.ms, 3), **{name: watch.figures() for name, watch in watches.items()}}
    if run is not None:
        figures["stray"] = len(stray_weights(run))
        figures["masked_tensors"] = len(run.masks)
        assert not figures["stray"]
    return figures, model


@section("exact training")
def _():
    """Same bits (up to the sign of zeros) from the kernel in one pass, in two, and from foreach."""
    torch.use_deterministic_algorithms(False)
    weights = {}
    for kind in ("stage", "stage-twice", "stage-foreach"):
        _, model = train(kind, steps=8, warm=2, batch=2, length=256, layers=2)
        weights[kind] = {n: p.detach().clone() for n, p in model.named_parameters()}
    base = weights.pop("stage")
    return {
        kind: {
            "equal": all(bool((base[n] == other[n]).all()) for n in base),
            "largest difference": max(float((base[n] - other[n]).abs().max()) for n in base),
        }
        for kind, other in weights.items()
    }


@section("share of a step")
def _():
    """Each kind between two plain runs, since the clock drifts: its time over the mean of its neighbours'."""
    kinds, turns = ("stage", "stage-unguarded", "stage-foreach"), 5
    times = [("plain", train("plain", steps=40, warm=10)[0]["ms_a_step"])]
    for _turn in range(turns):
        for kind in kinds:
            for each in (kind, "plain"):
                times.append((each, train(each, steps=40, warm=10)[0]["ms_a_step"]))
                gc.collect()
                torch.cuda.empty_cache()
    ratios = {kind: [] for kind in kinds}
    for before, (kind, ms), after in zip(times[::2], times[1::2], times[2::2], strict=False):
        ratios[kind].append(ms / statistics.mean((before[1], after[1])))
    plain = [ms for kind, ms in times if kind == "plain"]
    return {
        "plain ms": [min(plain), statistics.median(plain), max(plain)],
        **{
            kind: {
                "over plain": f"{100 * (statistics.median(found) - 1):.2f} %",
                "each": [round(100 * (r - 1), 2) for r in found],
            }
            for kind, found in ratios.items()
        },
    }


@section("parts")
def _():
    return {kind: train(kind, clock_parts=True)[0] for kind in ("stage", "stage-twice", "stage-foreach")}


@section("accumulation and small batches")
def _():
    """Where masking costs most: a step of little work."""
    return {
        f"{kind} batch {batch}x{length}": train(kind, batch=batch, length=length)[0]["ms_a_step"]
        for batch, length in ((1, 512), (32, 1024))
        for kind in ("plain", "stage", "stage-foreach")
    }


FSDP = r"""
import os, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, AutoModelForCausalLM
import hf_optim
from hf_optim.masking import stray_weights
from hf_optim.toolkit import shards
HOME = Path(sys.argv[1])
def build():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
class Rows(torch.utils.data.Dataset):
    ids = torch.randint(0, 512, (64, 32), generator=torch.Generator().manual_seed(0))
    def __len__(self): return 64
    def __getitem__(self, i): return {"input_ids": self.ids[i], "labels": self.ids[i]}
def go(resume=None):
    model = hf_optim.optimize(build(), [{"technique": "gmp", "sparsity": 0.6, "initial": 0.2, "every": 1}])
    common = dict(output_dir=str(HOME / "t"), max_steps=6, per_device_train_batch_size=2, report_to=[], save_strategy="steps", save_steps=3,
                  logging_strategy="no", disable_tqdm=True, learning_rate=1e-2, weight_decay=0.1, seed=0)
    config = {"version": 2, "fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    try:
        args = TrainingArguments(fsdp=True, fsdp_config=config, **common)
    except Exception as error:
        print("fsdp=True:", error); args = TrainingArguments(fsdp="full_shard auto_wrap", fsdp_config=config, **common)
    trainer = Trainer(model=model, args=args, train_dataset=Rows(), callbacks=hf_optim.callbacks(model))
    trainer.train(resume_from_checkpoint=resume)
    run = hf_optim.run_of(model)
    assert stray_weights(run) == [] and run.finished, "stray"
    weights = {n: shards.whole(p.detach()).clone() for n, p in run.model.named_parameters()}
    return trainer, run, weights
trainer, run, weights = go()
kinds = {type(p).__name__ for p in run.model.parameters()}
_, again, resumed = go(str(HOME / "t" / "checkpoint-3"))
same = all(torch.equal(weights[n], resumed[n]) for n in weights)
masks = all(torch.equal(run.masks[n], again.masks[n]) for n in run.masks)
trainer.save_model(str(HOME / "final"))
dist.barrier()
if dist.get_rank() == 0:
    read = AutoModelForCausalLM.from_pretrained(HOME / "final")
    zeros = all(not read.get_parameter(n)[~m.cpu()].any() for n, m in run.masks.items())
    print("RESULT", {"ranks": dist.get_world_size(), "kinds": sorted(kinds), "masks equal": masks, "weights equal": same, "zeros on disk": zeros, "sparsity": run.record.steps["0"]["sparsity"]}, flush=True)
dist.destroy_process_group()
"""


@section("FSDP2 in the stock Trainer, by accelerate")
def _():
    with tempfile.TemporaryDirectory() as home:
        script = Path(home) / "fsdp.py"
        script.write_text(FSDP)
        env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        env |= {"CUDA_VISIBLE_DEVICES": VISIBLE} if VISIBLE else {}
        counted = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
        ranks = subprocess.run(counted, env=env, capture_output=True, text=True, check=True).stdout.strip()
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            ranks,
            str(script),
            home,
        ]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
        told = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        return {"told": told, "status": done.returncode, "end": "" if told else (done.stdout + done.stderr)[-3000:]}


@section("interpreted tests on this device")
def _():
    tests = ["tests/kernels/test_masked_step.py", "tests/host/test_masking.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return {"status": done.returncode, "end": done.stdout[-1500:]}


print("done", OUT / "masking.json")
