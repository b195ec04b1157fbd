"""Babyllama-1m with exits after all of its blocks: trains them on stories, and measures the loss at each exit.

    python examples/adaptive/train_exits.py --shared ../shared --output babyllama-exits
    python examples/adaptive/train_exits.py --shared ../shared --output trial --steps 20 --texts 8   # a trial

The recipe is the shipped ``depth-adaptive``: all blocks are trained, with the mean of the losses of all exits, which
the model's own final norm and head read. The output is an ordinary checkpoint with its exits beside it, and
``exits.json`` with the loss by exit on held-out stories, before and after. 600 steps take about five minutes of one
core.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import hf_optim

CONTEXT, BATCH, STEPS, RATE = 256, 4, 600, 5e-4


def windows(tokenizer: Any, path: Path, count: int | None) -> Tensor:
    """Return stories, each after a bos token, joined and cut into windows ``[n, 256]`` of tokens."""
    stories = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    tokens: list[int] = []
    for story in stories:
        tokens += [tokenizer.bos_token_id, *tokenizer(story, add_special_tokens=False)["input_ids"]]
        if count is not None and len(tokens) >= count * CONTEXT:
            break
    whole = len(tokens) // CONTEXT
    return torch.tensor(tokens[: whole * CONTEXT]).view(whole, CONTEXT)[:count]


@torch.no_grad()
def losses_by_exit(model: Any, tokens: Tensor) -> list[float]:
    """Return the mean loss of tokens 2 to n of each window, at each exit of a model."""
    exits: Any = hf_optim.exits_of(model)
    total = [0.0] * exits.count
    for part in tokens.split(8):
        for index in range(exits.count):
            logits = hf_optim.run_to_exit(model, index, input_ids=part, use_cache=False).output.logits[:, :-1]
            total[index] += float(
                functional.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum")
            )
    return [round(each / (tokens.numel() - len(tokens)), 4) for each in total]


def train_exits(
    shared: Path, steps: int = STEPS, seed: int = 0, held_out: Tensor | None = None, **changes: Any
) -> tuple[Any, dict[str, Any]]:
    """Return babyllama-1m with trained exits, and what the training gave.

    Args:
        shared: the folder with models/babyllama-1m and data/tinystories.
        steps: of 4 windows of 256 tokens.
        seed: of the order of the windows.
        held_out: windows to measure on, before and after; None does not measure.
        changes: fields of the step ``depth_adaptive`` that differ from the shipped recipe.
    """
    home = shared / "models" / "babyllama-1m"
    tokenizer = AutoTokenizer.from_pretrained(home)
    train = windows(tokenizer, shared / "data" / "tinystories" / "train.jsonl", None)
    model = AutoModelForCausalLM.from_pretrained(home).eval()
    recipe = hf_optim.OptimConfig.parse("depth-adaptive").to_dict()
    recipe["steps"][0] |= changes
    model = hf_optim.optimize(model, recipe, tokenizer=tokenizer)
    found: dict[str, Any] = {"steps": steps, "batch": BATCH, "context": CONTEXT, "rate": RATE, "seed": seed}
    if held_out is not None:
        found |= {"held_out_tokens": held_out.numel(), "before": losses_by_exit(model, held_out)}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="cosine",
            warmup_steps=steps // 20, report_to=[], use_cpu=True, save_strategy="no", logging_strategy="no",
            disable_tqdm=True, seed=seed,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in train]
        hf_optim.OptimTrainer(model=model, args=args, train_dataset=data).train()
    model = hf_optim.run_of(model).model.eval()
    found["seconds"] = round(time.perf_counter() - started, 1)
    if held_out is not None:
        found["after"] = losses_by_exit(model, held_out)
        found["perplexity"] = [round(math.exp(loss), 4) for loss in found["after"]]
    return model, found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", required=True, type=Path, help="the folder with models and data")
    parser.add_argument("--output", required=True, type=Path, help="where the checkpoint goes")
    parser.add_argument("--figures", type=Path, help="where exits.json goes; the checkpoint by default")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--texts", type=int, default=96, help="held-out windows of 256 tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    home = args.shared / "models" / "babyllama-1m"
    held = windows(AutoTokenizer.from_pretrained(home), args.shared / "data" / "tinystories" / "eval.jsonl", args.texts)
    model, found = train_exits(args.shared, args.steps, args.seed, held)
    model.save_pretrained(args.output)
    path = (args.figures or args.output) / "exits.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
