"""A pretrained language model under fixed patterns of attention: held-out perplexity before and after a short training.

    python examples/attention/patterns.py --model ../shared/models/babyllama-1m --data ../shared/data/tinystories \\
        --output model_cards/attention

Every pattern is put on the same model, measured, trained for the same batches in the same order, and measured again,
beside the dense model with the same training. Which keys a pattern can use at all is computed apart, exactly: in a
Llama with random weights in float64, the gradient of the last token's output by each embedding is zero where no path
leads, in one layer and through several. ``--data`` is a folder with train.jsonl, calibration.jsonl and eval.jsonl.
Takes about 6 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import patterns_page
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_optim
from hf_optim.evaluation.evaluate import perplexity

LENGTH, BATCH = 256, 8
SPARSE = {"technique": "sparse_transformer", "stride": 16}
FIXED = {**SPARSE, "vertices": 4}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "local 64": {"technique": "local", "window": 64},
    "local 16": {"technique": "local", "window": 16},
    "blockwise 64": {"technique": "blockwise", "block": 64},
    "blockwise 64, half the heads shifted": {"technique": "blockwise", "block": 64, "shifts": [0, 1]},
    "strided 4": {"technique": "strided", "stride": 4},
    "strided 16, window 16": {"technique": "strided", "stride": 16, "window": 16},
    "dilated 16 x 2": {"technique": "dilated", "window": 16, "dilation": [2]},
    "dilated 16 x 1 to 8 by head": {"technique": "dilated", "window": 16, "dilation": [1, 1, 2, 2, 4, 4, 8, 8]},
    "sparse_transformer strided": {**SPARSE, "pattern": "strided"},
    "sparse_transformer fixed": FIXED,
    "sparse_transformer fixed, by head": {**FIXED, "steps": "heads"},
    "sparse_transformer fixed, by layer": {**FIXED, "steps": "layers"},
}
DEPTHS = (1, 2, 5)


def sequences(tokenizer: Any, path: Path, count: int) -> Tensor:
    """Return the texts of a file as token ids, int64 ``[n, LENGTH]``; at most ``count`` rows."""
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    ids: list[int] = []
    for text in texts:
        if len(ids) >= count * LENGTH:
            break
        ids += tokenizer(text).input_ids
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)[:count]


def train(model: Any, rows: Tensor, args: argparse.Namespace) -> None:
    """Train a model in place, on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=BATCH, learning_rate=args.lr, seed=0,
            lr_scheduler_type="cosine", warmup_steps=args.steps // 10, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        examples = [{"input_ids": row, "labels": row} for row in rows]
        kind = Trainer if args.dense else hf_optim.OptimTrainer
        kind(model=model, args=settings, train_dataset=examples).train()


def measure(step: dict[str, Any] | None, rows: Tensor, held_out: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Return the perplexity of one variant before and after training, and how much of full attention it computes."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    share = 1.0
    if step is not None:
        model = hf_optim.optimize(model, [step])
        share = hf_optim.run_of(model).record.steps["0"]["share_of_attention"]
    before = perplexity(model.eval(), held_out, BATCH)["perplexity"]
    args.dense = step is None
    train(model, rows, args)
    after = perplexity(model.eval(), held_out, BATCH)["perplexity"]
    return {"share": round(share, 4), "before": round(before, 4), "after": round(after, 4)}


def reach(step: dict[str, Any] | None, layers: int) -> list[int]:
    """Return the distances of the keys on which the last token's output depends, in a model of random weights."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=8, max_position_embeddings=LENGTH,
        )
    ).double().eval()  # fmt: skip
    if step is not None:
        model = hf_optim.optimize(model, [step])
    embeddings = model.get_input_embeddings()(torch.arange(LENGTH)[None] % 16).detach().requires_grad_()
    output = model(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
    (gradient,) = torch.autograd.grad(output.square().sum(), embeddings)
    places = gradient[0].abs().amax(-1).nonzero()[:, 0]
    return sorted(LENGTH - 1 - place for place in places.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path, help="a folder with the three files of texts")
    parser.add_argument("--output", type=Path, default=Path("model_cards/attention"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--sequences", type=int, default=32, help="held-out sequences of 256 tokens")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    wanted = args.steps * BATCH
    rows = torch.cat([sequences(tokenizer, args.data / f"{name}.jsonl", wanted) for name in ("train", "calibration")])
    rows, held_out = rows[:wanted], sequences(tokenizer, args.data / "eval.jsonl", args.sequences)
    results: dict[str, Any] = {
        "steps": args.steps,
        "trained_tokens": args.steps * BATCH * LENGTH,
        "held_out_tokens": held_out.numel(),
        "length": LENGTH,
        "depths": DEPTHS,
        "reach": {name: [reach(step, layers) for layers in DEPTHS] for name, step in VARIANTS.items()},
        "variants": {},
    }
    for name, step in VARIANTS.items():
        results["variants"][name] = measure(step, rows, held_out, args)
        print(name, json.dumps(results["variants"][name]), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "patterns.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    patterns_page.write(args.output)


if __name__ == "__main__":
    main()
