"""The small story models and their text: windows of tokens, what a model loses on them, and short trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from toy_training import arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import hf_optim
from hf_optim import run_of


def windows(home: Path, data: Path, split: str, count: int, width: int = 256) -> Tensor:
    """Token ids [count, width], int64: the stories of a split one after the other, each after bos, cut into windows."""
    tokenizer = AutoTokenizer.from_pretrained(home)
    ids: list[int] = []
    for line in (data / "tinystories" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        ids.append(tokenizer.bos_token_id)
        ids += tokenizer(json.loads(line)["text"], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count * width:
            break
    return torch.tensor(ids[: count * width]).view(count, width)


def beginnings(data: Path, name: str, tokenizer: Any, count: int) -> list[dict[str, Tensor]]:
    """The first 48 tokens of stories, after bos."""
    rows = []
    for line in (data / "tinystories" / name).read_text(encoding="utf-8").splitlines()[:count]:
        ids = [tokenizer.bos_token_id, *tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids][:48]
        rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)})
    return rows


def rows(windows: Tensor) -> list[dict[str, Tensor]]:
    """What a trainer takes for windows [count, width]: every row with itself as labels, each [width], int64."""
    return [{"input_ids": row, "labels": row} for row in windows]


def perplexity(model: nn.Module, ids: Tensor) -> float:
    """On windows [count, width]; the tokens after the first of each are scored, and their mean is taken in float64."""
    losses = []
    with torch.no_grad():
        for batch in ids.split(16):
            out = model(batch).logits[:, :-1].flatten(0, 1)
            losses.append(nn.functional.cross_entropy(out, batch[:, 1:].flatten(), reduction="none"))
    return float(torch.cat(losses).double().mean().exp())


def mean_loss(model: nn.Module, ids: Tensor) -> float:
    """The model's own loss on windows [count, width], all at once."""
    with torch.no_grad():
        return model.eval()(ids, labels=ids).loss.item()


class Stories:
    """The smallest story model with windows to train and to judge it on."""

    def __init__(self, models: Path, data: Path, width: int = 48, held_out: int = 192) -> None:
        self.home = models / "stories260k"
        self.rows = rows(windows(self.home, data, "train", 960, width))
        self.held_out = windows(self.home, data, "eval", held_out, width)

    def load(self, recipe: Any = None) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.home, optim_config=recipe, dtype=torch.float32)

    def loss(self, model: nn.Module) -> float:
        """Cross-entropy on the held-out windows."""
        return mean_loss(model, self.held_out)

    def loss_after(self, recipe: Any, folder: Path, steps: int, **changes: Any) -> float:
        """The loss after training in a stock Trainer; ``sparsity`` is what the masks then leave out."""
        model = self.load(recipe)
        settings = {"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 3e-3}
        args = arguments(folder, **{**settings, **changes})
        Trainer(model=model, args=args, train_dataset=self.rows, callbacks=hf_optim.callbacks(model)).train()
        found = run_of(model).masks.values()
        self.sparsity = 1 - sum(int(m.sum()) for m in found) / sum(m.numel() for m in found)
        return self.loss(model)
