"""Measure the cost of masks per step of a stock Trainer: a Llama of 85 M weights, bf16 autocast, on one GPU.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/masking_in_training.py [WORD ...]

With words, only the sections that have one of them in their names run.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import warnings

import torch
from sections import Sections
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_optim
from hf_optim.runs.masking import stray_weights
from hf_optim.training import fused_masking, mask_callback
from hf_optim.training.mask_callback import MaskCallback
from hf_optim.training.nonfinite_callback import NonFiniteCallback

warnings.simplefilter("ignore")
section = Sections("masking-in-training.json")


class RandomTokens(torch.utils.data.Dataset):
    def __init__(self, count, length, vocabulary):
        self.ids = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


class StepTimer(TrainerCallback):
    """Measures the mean wall time of a step, after ``warm`` steps."""

    def __init__(self, warm):
        self.warm, self.started, self.ended, self.steps = warm, 0.0, 0.0, 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.warm:
            torch.cuda.synchronize()
            self.started = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.ended, self.steps = time.perf_counter(), state.global_step - self.warm

    @property
    def ms(self):
        return 1e3 * (self.ended - self.started) / self.steps


class HookTimer:
    """Times the hooks of a callback: on the device with events, on the host with the clock."""

    def __init__(self, callback, names=("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")):
        self.spans, self.host, self.calls = [], [], 0
        for name in names:
            setattr(callback, name, self._timed(getattr(callback, name), name == "on_step_end"))

    def _timed(self, hook, last):
        def call(*args, **kwargs):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            start = time.perf_counter()
            hook(*args, **kwargs)
            self.host.append(time.perf_counter() - start)
            events[1].record()
            self.spans.append(events)
            self.calls += last

        return call

    def times(self):
        """Return the median milliseconds per step."""
        torch.cuda.synchronize()
        spans = [a.elapsed_time(b) for a, b in self.spans]
        per = len(spans) // max(1, self.calls)
        steps, host = ([sum(times[i : i + per]) for i in range(0, len(times), per)] for times in (spans, self.host))
        return {
            "device_ms_a_step": round(statistics.median(steps), 3),
            "host_ms_a_step": round(1e3 * statistics.median(host), 3),
        }


def build_model(layers=12):
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
    return LlamaForCausalLM(config)


ONE_SHOT = [{"technique": "gmp", "sparsity": 0.5, "begin": 0, "end": 0}]


def train(kind, steps=60, warm=20, batch=8, length=1024, clock_parts=False, layers=12):
    """Train a model; return its times, and the model.

    ``kind`` is one of

    - ``plain``: without hf_optim;
    - ``stage``: with masks and the check for non-finite gradients;
    - ``stage-unguarded``: without that check;
    - ``stage-twice``: weights are also masked after the optimizer step;
    - ``stage-foreach``: as ``stage-twice``, without the kernel.
    """
    model = build_model(layers=layers)
    callbacks, run = [], None
    if kind != "plain":
        model = hf_optim.optimize(model, ONE_SHOT)
        run = hf_optim.run_of(model)
        callbacks = hf_optim.callbacks(model)
    fused_masking._kernel.cache_clear()
    kernel, stay_at_zero = fused_masking.KERNEL, mask_callback.STAY_AT_ZERO
    if kind == "stage-foreach":
        fused_masking.KERNEL = "no_such_package"
    if kind in ("stage-twice", "stage-foreach"):
        mask_callback.STAY_AT_ZERO = ()
    if kind == "stage-unguarded":
        callbacks = [c for c in callbacks if not isinstance(c, NonFiniteCallback)]
    timers = {}
    if clock_parts:
        for callback in callbacks:
            if isinstance(callback, (MaskCallback, NonFiniteCallback)):
                timers[type(callback).__name__] = HookTimer(callback)
    timer = StepTimer(warm)
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
            optim="adamw_torch_fused",
            weight_decay=0.1,
        )
        # With several GPUs, the Trainer would wrap the model in DataParallel.
        _ = args.device
        args._n_gpu = 1
        dataset = RandomTokens(512, length, 32000)
        Trainer(model=model, args=args, train_dataset=dataset, callbacks=[*callbacks, timer]).train()
    fused_masking.KERNEL, mask_callback.STAY_AT_ZERO = kernel, stay_at_zero
    fused_masking._kernel.cache_clear()
    results = {"ms_a_step": round(timer.ms, 3), **{name: each.times() for name, each in timers.items()}}
    if run is not None:
        results["stray"] = len(stray_weights(run))
        results["masked_tensors"] = len(run.masks)
        assert not results["stray"]
    return results, model


@section("exact training")
def _():
    """Compare the weights after training with the kernel in one pass, in two, and with foreach: equal up to -0."""
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
    """Time each kind between two plain runs, since clocks drift; return its time over the mean of the two."""
    kinds, turns = ("stage", "stage-unguarded", "stage-foreach"), 4
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
                "over plain": f"{100 * (statistics.median(values) - 1):.2f} %",
                "each": [round(100 * (ratio - 1), 2) for ratio in values],
            }
            for kind, values in ratios.items()
        },
    }


@section("parts")
def _():
    """Time the hooks of the callbacks."""
    return {kind: train(kind, clock_parts=True)[0] for kind in ("stage", "stage-twice", "stage-foreach")}


@section("accumulation and small batches")
def _():
    """Time steps with little work, where masking costs most."""
    return {
        f"{kind} batch {batch}x{length}": train(kind, batch=batch, length=length)[0]["ms_a_step"]
        for batch, length in ((1, 512), (32, 1024))
        for kind in ("plain", "stage", "stage-foreach")
    }
