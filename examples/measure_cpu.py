"""Time compressed models on a CPU: the original, the stock reload of the checkpoint, and the accelerated reload.

Two small models: the bundled Llama (forward of a text, and greedy ``generate``) and a BERT of MiniLM-L6's shape with
random weights. The three variants are timed in turns, so that other load on the machine affects all of them alike; the
minimum is the time of the work itself. Prints a table and writes JSON.

    python examples/measure_cpu.py --threads 2 --output cpu.json
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, PreTrainedModel

import hf_optim
from hf_optim.cli.jobs import demo_corpus
from hf_optim.cli.jobs.demo import bundled_model

SCHEMES: dict[str, dict[str, Any]] = {
    "w8a8": {"technique": "rtn", "bits": 8, "activations": "int8"},
    "w4a16": {"technique": "rtn", "bits": 4, "group_size": 32, "observer": "mse"},
}
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
NEW_TOKENS = 50


def load_llama() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32).eval()


def build_minilm() -> PreTrainedModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**MINILM)).eval()


def time_in_turns(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, float]]:
    """Return the minimum and median milliseconds of each call, over at least five turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(taken.values()))) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {n: {"min_ms": round(min(t), 3), "median_ms": round(statistics.median(t), 3)} for n, t in taken.items()}


def generate_greedily(model: Any, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def workloads(name: str) -> dict[str, Callable[[Any], Any]]:
    """Return the calls to time for a model, by description."""
    if name == "minilm":
        ids = {(b, n): torch.randint(1000, 30000, (b, n)) for b in (1, 8) for n in (32, 128)}
        return {f"forward {b} x {n}": lambda m, i=i: m(i) for (b, n), i in ids.items()}
    text = demo_ids()
    calls: dict[str, Callable[[Any], Any]] = {f"forward 1 x {n}": lambda m, n=n: m(text[:, :n]) for n in (16, 64, 256)}
    for batch in (1, 8):
        ids = text[:, :20].expand(batch, -1).contiguous()
        calls[f"generate {batch} x {NEW_TOKENS}"] = lambda m, ids=ids: generate_greedily(m, ids, NEW_TOKENS)
    return calls


def demo_ids() -> torch.Tensor:
    """Return the first 256 tokens of the held-out demo corpus, ``[1, 256]``."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    return tokenizer(next(iter(demo_corpus.texts("held_out"))), return_tensors="pt").input_ids[:, :256]


def reload(folder: str, name: str, dtype: torch.dtype) -> PreTrainedModel:
    auto = AutoModel if name == "minilm" else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype).eval()


def output_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    out = model(ids)
    return (out.logits if "logits" in out else out.last_hidden_state).double()


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of ``b``, to three digits."""
    return float(f"{float((a - b).norm() / b.norm()):.2e}")


def agreement(name: str, models: dict[str, Any]) -> dict[str, Any]:
    """Compare the outputs of the models with each other, and with the stock reload computed in float64."""
    ids = demo_ids()[:, :64] if name == "llama" else torch.arange(1000, 1064)[None]
    stock, accelerated = models["stock"], models["accelerated"]
    reference, result = output_of(stock, ids), output_of(accelerated, ids)
    exact = output_of(copy.deepcopy(stock).double(), ids)
    errors: dict[str, Any] = {
        "accelerated_against_stock": relative_error(result, reference),
        "accelerated_against_float64": relative_error(result, exact),
        "stock_against_float64": relative_error(reference, exact),
        "stock_against_original": relative_error(reference, output_of(models["original"], ids)),
    }
    if name == "llama":
        texts = [generate_greedily(m, demo_ids()[:, :20], 200) for m in (stock, accelerated)]
        errors["greedy_200_identical"] = bool(torch.equal(*texts))
    return errors


def measure(name: str, scheme: str, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Compress a model, and measure the agreement and the times of its three variants."""
    make = {"llama": load_llama, "minilm": build_minilm}[name]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", hf_optim.KernelWarning)
        hf_optim.optimize(make(), [SCHEMES[scheme]]).save_pretrained(folder)
        models = {"original": make().to(dtype), "stock": reload(folder, name, dtype)}
        models["accelerated"] = hf_optim.accelerate(reload(folder, name, dtype))
    runs: dict[str, int] = {}
    for row in hf_optim.report(models["accelerated"]):
        label = row.kernel or f"dense: {row.reason}"
        runs[label] = runs.get(label, 0) + 1
    result: dict[str, Any] = {
        "model": name,
        "scheme": scheme,
        "dtype": str(dtype).removeprefix("torch."),
        "runs_on": runs,
    }
    result["agreement"] = agreement(name, models)
    result["times"] = {}
    for work, call in workloads(name).items():
        times = time_in_turns({n: lambda m=m, call=call: call(m) for n, m in models.items()}, seconds)
        result["times"][work] = times
        shown = "  ".join(f"{n} {t['min_ms']:9.2f}" for n, t in times.items())
        print(f"{name:6} {scheme:5} {result['dtype']:8} {work:16} {shown}", flush=True)
    print(json.dumps(result["agreement"]), json.dumps(runs), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of timing per row")
    parser.add_argument("--models", nargs="+", default=["llama", "minilm"], choices=["llama", "minilm"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "vnni": torch.cpu._is_vnni_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "threads": args.threads,
    }
    with torch.inference_mode():
        cases = [(m, s, getattr(torch, d)) for d in args.dtypes for m in args.models for s in SCHEMES]
        rows = [measure(*case, args.seconds) for case in cases]
    with open(args.output, "w", encoding="utf-8") as file:
        json.dump({"about": about, "rows": rows}, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
