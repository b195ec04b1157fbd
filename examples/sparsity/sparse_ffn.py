"""Sparse feed-forward layers: held-out loss by N, from scratch and converted, and the time of a layer on a CPU.

    python examples/sparsity/sparse_ffn.py --model ../shared/models/babyllama-1m --data ../shared/data/tinystories \\
        --output model_cards/sparsity

- ``scratch``: OPT models (ReLU) with dense feed-forward layers and with blocks of N units, of the same size, seed, data
  and number of steps.
- ``converted``: the model (SwiGLU), converted on calibration data: before and after fine-tuning, beside the dense model
  after the same fine-tuning, and beside a conversion with units in their given order.
- ``times``: a ReLU layer of float32 for one token, by N and bits, beside the dense layer; one thread.

``--data`` is a folder with calibration.jsonl, train.jsonl and eval.jsonl; the last is held out. ``--parts`` names what
to run; the results of other parts are kept. Training uses a GPU if there is one: two minutes, on a CPU core an hour.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import hf_optim
from hf_optim_plugins.sparsity import _sparse_ffn_modules

SCRATCH, CONVERTED, TIMED = (4, 8, 16), (2, 4, 8), (4, 8, 16, 32, 64)
LENGTH, BATCH, SEED = 128, 16, 0
CUDA = torch.cuda.is_available()
WIDTH, UNITS = 4096, 16384
BITS = (16, 8, 4)


def rows_of(tokenizer: Any, path: Path, length: int) -> Tensor:
    """Return the stories of a file, joined and cut into rows ``[n, length]``."""
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    ids = [i for text in texts for i in (tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False))]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


@torch.no_grad()
def loss_of(model: Any, rows: Tensor) -> float:
    """Return the loss of next tokens, nats."""
    model.eval()
    losses = []
    for ids in rows.to(model.device).split(BATCH):
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
        losses.append(F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none"))
    return round(float(torch.cat(losses).mean()), 4)


def trained(model: Any, rows: Tensor, steps: int, rate: float, batch: int = BATCH) -> Any:
    """Train by transformers' own Trainer: a sparse layer needs nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=rate, seed=SEED, use_cpu=not CUDA,
            lr_scheduler_type="cosine", warmup_steps=steps // 20, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_steps=50, weight_decay=0.0,
        )  # fmt: skip
        examples = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model=model, args=settings, train_dataset=examples, data_collator=default_data_collator).train()
    return model.eval()


def device_name() -> str:
    return torch.cuda.get_device_name() if CUDA else "cpu"


def scratch(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Return losses of models of one size, by N."""
    train, held_out = (rows_of(tokenizer, args.data / f"{name}.jsonl", LENGTH) for name in ("train", "eval"))
    found: dict[str, Any] = {
        "device": device_name(),
        "steps": args.steps,
        "rows": len(train),
        "held_out_tokens": held_out[:200].numel(),
    }
    for block in (1, *SCRATCH):
        torch.manual_seed(SEED)
        config = OPTConfig(
            vocab_size=len(tokenizer), hidden_size=96, ffn_dim=384, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=LENGTH, word_embed_proj_dim=96, dropout=0.0, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        model, record = OPTForCausalLM(config), {}
        if block > 1:
            step = {"technique": "sparse_ffn", "block": block, "start": "random", "kernel_scaling": True}
            model = hf_optim.optimize(model, [step])
            record = hf_optim.run_of(model).record.steps["0"]
            model = hf_optim.release(model)
        model = trained(model, train, args.steps, 3e-3)
        found[str(block)] = {
            "loss": loss_of(model, held_out[:200]),
            "parameters": model.num_parameters(),
            "computed_share": record.get("computed_share", 1.0),
        }
        print("scratch", block, found[str(block)], flush=True)
    return found


def converted(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Return losses of the converted model, before and after fine-tuning."""
    length = 2 * LENGTH
    train, held_out, calibration = (
        rows_of(tokenizer, args.data / f"{name}.jsonl", length) for name in ("train", "eval", "calibration")
    )
    held_out = held_out[:100]
    load = lambda: AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)  # noqa: E731
    batches = [{"input_ids": ids} for ids in calibration[:64].split(BATCH)]
    tuned = lambda model: loss_of(trained(model, train, args.tuning, 5e-4, BATCH // 2), held_out)  # noqa: E731
    found: dict[str, Any] = {"device": device_name(), "steps": args.tuning, "held_out_tokens": held_out.numel()}
    found["dense"] = {"before": loss_of(load(), held_out), "after": tuned(load())}
    print("converted", found, flush=True)
    for block in CONVERTED:
        step = {"technique": "sparse_ffn", "block": block, "rank": 32}
        given = hf_optim.optimize(load(), [{**step, "arrangement": "given"}], calibration=batches)
        model = hf_optim.optimize(load(), [step], calibration=batches)
        record = hf_optim.run_of(model).record.steps["0"]
        own: dict[str, Any] = {
            key: record[key] for key in ("kept", "kept_at_best", "agrees", "zeros", "computed_share")
        }
        own |= {"given_kept": hf_optim.run_of(given).record.steps["0"]["kept"], "given": loss_of(given, held_out)}
        own |= {"before": loss_of(model, held_out), "after": tuned(hf_optim.release(model))}
        coded = copy.deepcopy(model)
        for bits in (8, 4):
            if bits == 4:
                coded = copy.deepcopy(model)
            coded.encode_units(bits, None if bits == 8 else 32)
            own[f"after_{bits}_bits"] = loss_of(coded, held_out)
        found[str(block)] = own
        print("converted", block, own, flush=True)
    return found


@torch.no_grad()
def times(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Return milliseconds of a layer for one token and up to 8."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    settings = {"width": WIDTH, "neurons": UNITS, "out": WIDTH, "act": "relu", "gated": False, "bias": False,
                "out_bias": False, "controller_bias": False, "controller_output": False, "temperature": 0.1,
                "hard_share": 0.3, "gather_rows": 8, "group": None, "bits": 16}  # fmt: skip
    dense = _sparse_ffn_modules.SparseFFN({**settings, "block": 1, "rank": 0}).eval()
    flat = dense.down.t().contiguous()
    inputs = torch.randn(16, 8, WIDTH)
    size = 2 * UNITS * WIDTH
    found: dict[str, Any] = {
        "width": WIDTH, "units": UNITS, "threads": 1, "load": round(os.getloadavg()[0], 1),
        "dense_ms": {
            str(n): least(lambda x: F.linear(F.relu(F.linear(x, dense.up)), flat), inputs[:, :n]) for n in (1, 8)
        },
        "rows": [],
    }  # fmt: skip
    print("times", found, flush=True)
    for block in reversed(TIMED):
        for bits in BITS:
            ffn = _sparse_ffn_modules.SparseFFN({**settings, "block": block, "rank": WIDTH // block}).eval()
            if bits < 16:
                ffn.encode_(bits, None if bits == 8 else 128)
            codes = {16: 4.0, 8: 1.0, 4: 0.5 + 4 / 128}[bits]  # bytes; those of a controller are 4
            read = 2 * (UNITS // block) * WIDTH * codes + 4 * (WIDTH // block) * (WIDTH + UNITS)
            row: dict[str, Any] = {"block": block, "bits": bits, "bound": round(4 * size / read, 2)}
            row["ms"] = {str(n): least(ffn, inputs[:, :n]) for n in ((1, 2, 4, 8) if bits == 16 else (1,))}
            row["ratio"] = round(found["dense_ms"]["1"] / row["ms"]["1"], 2)
            if bits == 16:
                ffn.entry["gather_rows"] = 0
                row["masked_ms"] = {str(n): least(ffn, inputs[:, :n]) for n in (1, 8)}
            found["rows"].append(row)
            print("times", row, flush=True)
    return found


def least(call: Callable[[Tensor], Any], inputs: Tensor, passes: int = 3) -> float:
    """Return the milliseconds of a call, the median over the inputs; of several passes, the quickest.

    Other work on the machine takes time from all of them.
    """
    medians = []
    for _ in range(passes):
        spans = []
        for x in inputs:
            begun = time.perf_counter()
            call(x)
            spans.append(time.perf_counter() - begun)
        medians.append(statistics.median(spans))
    return round(1e3 * min(medians), 3)


PARTS = {"scratch": scratch, "converted": converted, "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tuning", type=int, default=200)
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    args = parser.parse_args()
    path = args.output / "sparse_ffn.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for part in args.parts:
        results[part] = PARTS[part](args, tokenizer)
        args.output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
