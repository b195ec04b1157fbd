"""Shared key/value heads after further training, and what a decoding step costs with them.

    python examples/attention/mqa.py --model ../shared/models/babyllama-1m --data ../shared/data/tinystories \\
        --output model_cards/attention

Three parts, on one CPU core, ten minutes together:

- A pretrained model is converted by ``mqa`` and trained for ``--steps`` steps on stories that are never repeated,
  beside the unconverted model and beside the converted architecture from random weights. How long the model was
  pretrained is not known (BabyLlama has 8 query heads over 4 key/value heads already, so 4 is where pooling starts).
- A small multi-head model is trained from scratch for a known number of steps, converted, and trained for 5 % more of
  them, the share of the GQA paper.
- A decoding step of a Llama of two layers with random weights, 32 heads of 64, is timed after ``--context`` tokens,
  with 32, 8 and 1 key/value heads.

``--data`` is a folder with train.jsonl, calibration.jsonl and eval.jsonl, texts under ``text``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import mqa_page
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import hf_optim
from hf_optim.evaluation.evaluate import perplexity
from hf_optim.training import OptimTrainer

BATCH, SHARE = 8, 0.05
SCRATCH_RATE, RATE, GENTLE_RATE = 3e-3, 6e-4, 5e-5
DISTILLED = {"technique": "logit_kd", "temperature": 1.0, "alpha": 1.0}


def windows(tokenizer: Any, paths: list[Path], length: int) -> Tensor:
    """Return the texts of files, each after a bos token, joined and cut: int64 ``[n, length]``."""
    texts = [json.loads(line)["text"] for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    bos = [tokenizer.bos_token_id]
    ids = [token for text in texts for token in bos + tokenizer(text, add_special_tokens=False).input_ids]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


class Held(TrainerCallback):
    """Measures the perplexity on held-out text after some of the steps of a training.

    Attributes:
        curve: step -> perplexity.
    """

    def __init__(self, rows: Tensor, at: set[int]) -> None:
        self.rows, self.at, self.curve = rows, at, dict[int, float]()

    def measure(self, model: Any, step: int) -> None:
        training = model.training
        self.curve[step] = round(perplexity(model.eval(), self.rows, BATCH)["perplexity"], 4)
        model.train(training)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.at:
            self.measure(model, state.global_step)


def train(
    model: Any, rows: Tensor, steps: int, rate: float, held: Held, trainer: type[Trainer] = Trainer
) -> dict[int, float]:
    """Train a model in place on the first rows, each once in an epoch; return the held-out perplexity along the way."""
    held.measure(model, 0)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=rate, seed=0, use_cpu=True,
            lr_scheduler_type="cosine", warmup_steps=max(1, steps // 10), weight_decay=0.0, report_to=[],
            save_strategy="no", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        examples = [{"input_ids": row, "labels": row} for row in rows]
        trainer(
            model=model, args=settings, train_dataset=examples, data_collator=default_data_collator, callbacks=[held]
        ).train()
    return held.curve


def cache_bytes(config: Any) -> int:
    """Return the bytes of keys and values that a float32 cache holds for one token."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4


def row_of(model: Any, curve: dict[int, float]) -> dict[str, Any]:
    """Return what the table says of a trained model."""
    return {
        "kv_heads": model.config.num_key_value_heads,
        "parameters": model.num_parameters(),
        "cache_bytes": cache_bytes(model.config),
        "start": curve[0],
        "end": curve[max(curve)],
        "curve": {str(step): value for step, value in sorted(curve.items())},
    }


def pretrained(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Convert and train the given model: the first part."""
    length = 256
    names = [args.data / f"{name}.jsonl" for name in ("train", "calibration")]
    rows = windows(tokenizer, names, length)[: args.steps * BATCH]
    held = windows(tokenizer, [args.data / "eval.jsonl"], length)[: args.windows]
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    present = base.config.num_key_value_heads
    variants: dict[str, Any] = {f"{present} (unconverted)": []}
    for kv in (kv for kv in (4, 2, 1) if kv < present):
        variants[f"{kv}, mean"] = [{"technique": "mqa", "kv_heads": kv}]
    variants |= {f"1, {way}": [{"technique": "mqa", "kv_heads": 1, "pooling": way}] for way in ("first", "random")}
    variants["1, mean, distilled"] = [{"technique": "mqa", "kv_heads": 1}, DISTILLED]
    variants["1, from random weights"] = None
    at = {max(1, args.steps * part // 20) for part in (1, 2, 5, 10, 20)}
    found: dict[str, Any] = {}
    for name, recipe in variants.items():
        rate = RATE if recipe else GENTLE_RATE  # a higher one makes the unconverted model worse
        if recipe is None:
            torch.manual_seed(0)
            config = copy.deepcopy(base.config)
            config.num_key_value_heads = 1
            model, rate = LlamaForCausalLM(config), SCRATCH_RATE
        else:
            model = copy.deepcopy(base)
            model = hf_optim.optimize(model, recipe) if recipe else model
        trainer = OptimTrainer if DISTILLED in (recipe or []) else Trainer
        curve = train(model, rows, args.steps, rate, Held(held, at), trainer)
        found[name] = row_of(model, curve)
        print("pretrained", name, json.dumps(found[name]), flush=True)
    return {
        "query_heads": base.config.num_attention_heads,
        "present": present,
        "steps": args.steps,
        "rates": {"converted": RATE, "unconverted": GENTLE_RATE, "random": SCRATCH_RATE},
        "tokens": rows.numel(),
        "held_out_tokens": held.numel(),
        "variants": found,
    }


def known_share(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Train a multi-head model, convert it, and train for 5 % more steps: the second part."""
    length = 128
    rows = windows(tokenizer, [args.data / f"{name}.jsonl" for name in ("train", "calibration")], length)
    held = windows(tokenizer, [args.data / "eval.jsonl"], length)[: 2 * args.windows]
    more = max(1, round(SHARE * args.scratch))

    def fresh(kv_heads: int) -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=4,
                num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=12, max_position_embeddings=256,
                tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=None,
            )
        )  # fmt: skip

    base = fresh(8)
    start = train(base, rows, args.scratch, SCRATCH_RATE, Held(held, {args.scratch}))[args.scratch]
    print("known share", start, flush=True)
    found: dict[str, Any] = {}
    for kv in (8, 4, 2, 1):
        model = hf_optim.optimize(copy.deepcopy(base), [{"technique": "mqa", "kv_heads": kv}])
        # The stories that it saw first come last: these are others.
        curve = train(model, rows.flip(0), more, RATE, Held(held, {more}))
        found[str(kv)] = row_of(model, curve)
        print("known share", kv, json.dumps(found[str(kv)]), flush=True)
    scratch = fresh(1)
    curve = train(scratch, rows, args.scratch + more, SCRATCH_RATE, Held(held, {args.scratch + more}))
    return {
        "steps": args.scratch,
        "more": more,
        "tokens": args.scratch * BATCH * length,
        "held_out_tokens": held.numel(),
        "base": start,
        "variants": found,
        "one_head_from_scratch": row_of(scratch, curve),
    }


@torch.no_grad()
def decoding(context: int, rounds: int) -> dict[str, Any]:
    """Time a decoding step with 32, 8 and 1 key/value heads after a long context: the third part."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=2048, intermediate_size=5632, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=32, head_dim=64, max_position_embeddings=context + 64,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    models, caches, times = {}, {}, {}
    for kv in (32, 8, 1):
        model = hf_optim.optimize(copy.deepcopy(base), [{"technique": "mqa", "kv_heads": kv}])
        cache = DynamicCache(config=model.config)
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.randn(1, kv, context, 64) for _ in range(2)), layer)
        models[kv], caches[kv], times[kv] = model, cache, []
    token = torch.zeros(1, 1, dtype=torch.int64)
    for turn in range(rounds + 1):  # in turn, since the speed of a machine drifts
        for kv, model in models.items():
            begun = time.perf_counter()
            model(token, past_key_values=caches[kv], use_cache=True)
            if turn:
                times[kv].append(1e3 * (time.perf_counter() - begun))
    found = {}
    for kv, each in times.items():
        held = sum(t.numel() * t.element_size() for layer in caches[kv].layers for t in (layer.keys, layer.values))
        low, _, high = quantiles(each, n=4)
        found[str(kv)] = {
            "ms": round(median(each), 2),
            "ms_low": round(low, 2),
            "ms_high": round(high, 2),
            "cache_bytes": held,
            "weights_bytes": 4 * models[kv].num_parameters(),
        }
        print("decoding", kv, json.dumps(found[str(kv)]), flush=True)
    return {
        "context": context,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "kv_heads": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="a causal language model with key/value heads, and its tokenizer"
    )
    parser.add_argument("--data", required=True, type=Path, help="a folder with the three files of texts")
    parser.add_argument("--output", type=Path, default=Path("model_cards/attention"))
    parser.add_argument("--steps", type=int, default=180, help="of training after conversion, first part")
    parser.add_argument("--scratch", type=int, default=500, help="of training from scratch, second part")
    parser.add_argument("--windows", type=int, default=96, help="held-out windows of 256 tokens")
    parser.add_argument("--context", type=int, default=16384, help="tokens before the timed step")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    results = {
        "decoding": decoding(args.context, args.rounds),
        "pretrained": pretrained(args, tokenizer),
        "known_share": known_share(args, tokenizer),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "mqa.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    mqa_page.write(args.output)


if __name__ == "__main__":
    main()
