"""A small language model on stories: windows of tokens, perplexity, the bytes of its cache, and a short recovery."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer, TrainingArguments

CONTEXT = 256


def windows(tokenizer: Any, path: Path, count: int) -> Tensor:
    """Return stories, each after a bos token, joined and cut into windows ``[n, 256]`` of tokens."""
    stories = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    tokens: list[int] = []
    for story in stories:
        tokens += [tokenizer.bos_token_id, *tokenizer(story, add_special_tokens=False)["input_ids"]]
        if len(tokens) >= count * CONTEXT:
            break
    whole = len(tokens) // CONTEXT
    return torch.tensor(tokens[: whole * CONTEXT]).view(whole, CONTEXT)[:count]


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor) -> float:
    """Return the perplexity of tokens 2 to n of each window."""
    total = 0.0
    for part in tokens.to(model.device).split(8):
        logits = model.eval()(part, use_cache=False).logits[:, :-1]
        total += float(functional.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum"))
    return round(math.exp(total / (tokens.numel() - len(tokens))), 4)


@torch.no_grad()
def cache_bytes(model: Any, tokens: Tensor) -> int:
    """Return the bytes of keys and values that a row of tokens leaves in the cache."""
    made = model(tokens[:1], use_cache=True)
    layers = (getattr(made, "cache", None) or made.past_key_values).layers
    return sum(
        layer.nbytes()
        if hasattr(layer, "nbytes")
        else sum(p.numel() * p.element_size() for p in (layer.keys, layer.values))
        for layer in layers
    )


def recovered(model: Any, tokens: Tensor, steps: int) -> Any:
    """Train a model on windows of tokens with the Trainer of transformers."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-4, lr_scheduler_type="cosine",
            warmup_steps=steps // 10, report_to=[], use_cpu=True, save_strategy="no", logging_strategy="no",
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in tokens]
        Trainer(model=model, args=args, train_dataset=data).train()
    return model.eval()
