"""Axial attention on a vision transformer, and compressed attention on a language model, beside the dense ones.

    python examples/attention/grids.py --shared ../shared --output model_cards/attention
    python examples/attention/grids.py --shared ../shared --output grids --steps 20 --recovery 5 --texts 8   # a trial
    python examples/attention/grids_page.py model_cards/attention

1. Vision transformers of 8 x 8 patches are trained from scratch on CIFAR-10 with full and with axial attention (rows
   and columns by layer, by head, and both in each head), for equally many steps from equal weights: accuracy on the
   test images, read once, and pairs of tokens. Then the time of a forward on the CPU against the size of images.
2. babyllama-1m is converted to compressed attention, and trained for a short recovery on stories, as a dense control
   is: perplexity on held-out stories against the stride, before and after, and the bytes of the cache.
3. babyllama-1m reads windows of twice its context with scaled rotary positions, without training.

``--parts`` runs some of ``times``, ``compressed``, ``positions`` and ``axial``, and keeps the others of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stories import CONTEXT, cache_bytes, perplexity, recovered, windows
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

import hf_optim

AXES = ("layers", "heads", "union")
PATCH, WIDTH, DEPTH, BATCH, RATE = 4, 48, 4, 64, 2e-3
GRIDS = (8, 16, 32, 48, 64, 96)  # patches a side
SEEDS = (0,)
COMPRESSIONS = ((3, 0), (4, 0), (4, 16), (8, 16))  # stride, local
PARTS = ("times", "compressed", "positions", "axial")


# -- axial ------------------------------------------------------------------------------------------------------------
def images(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return the images of a split of CIFAR-10, float ``[n, 3, 32, 32]``, and their classes, int64 ``[n]``."""
    from datasets import Image, load_dataset

    rows = load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train")
    rows = rows.cast_column("image", Image())
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in rows["image"]])
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.47) / 0.25, torch.tensor(rows["label"])


def vision_model(axes: str, side: int, layers: int = DEPTH, seed: int = 0) -> Any:
    """Return a ViT of ``side * side`` patches with random weights, with full attention if ``axes`` is ``full``."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=side * PATCH, patch_size=PATCH, hidden_size=WIDTH, intermediate_size=4 * WIDTH,
        num_hidden_layers=layers, num_attention_heads=4, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    return model if axes == "full" else hf_optim.optimize(model, [{"technique": "axial", "axes": axes}])


def trained(model: Any, data: tuple[Tensor, Tensor], steps: int, seed: int) -> Any:
    """Train a model on batches that depend on the seed alone; images are mirrored and shifted by up to 4 pixels."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / (steps // 20 + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        chosen = torch.randint(0, len(data[0]), (BATCH,), generator=generator)
        padded = functional.pad(data[0][chosen], (4, 4, 4, 4), mode="reflect")
        down, right = torch.randint(0, 9, (2,), generator=generator).tolist()
        batch = padded[:, :, down : down + 32, right : right + 32]
        flipped = torch.rand(BATCH, generator=generator) < 0.5
        batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
        loss = model(pixel_values=batch, labels=data[1][chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Any, data: tuple[Tensor, Tensor]) -> float:
    """Return the share of images that are classified right."""
    parts = zip(data[0].split(250), data[1].split(250), strict=True)
    right = sum(int((model(pixel_values=part).logits.argmax(-1) == truth).sum()) for part, truth in parts)
    return round(right / len(data[1]), 4)


def pairs(axes: str, side: int) -> int:
    """Return the pairs of tokens that a layer of a ViT computes, the mean over heads and two layers."""
    tokens = side * side
    seen = {"full": tokens**2, "union": tokens * (2 * side - 1)}.get(axes, tokens * side)
    return seen + 2 * tokens + 1  # the class token sees all and is seen by all


@torch.no_grad()
def times(side: int, repeats: int) -> dict[str, Any]:
    """Return the median milliseconds of a forward of two layers, and the range of the middle half, in turn."""
    models = {axes: vision_model(axes, side, layers=2).eval() for axes in ("full", *AXES)}
    image = torch.randn(1, 3, side * PATCH, side * PATCH)
    taken: dict[str, list[float]] = {axes: [] for axes in models}
    for turn in range(repeats + 1):
        for axes, model in models.items():
            begin = time.perf_counter()
            model(pixel_values=image)
            if turn:
                taken[axes].append(1000 * (time.perf_counter() - begin))
    return {
        axes: {
            "median": round(statistics.median(each), 2),
            "quarters": [round(q, 2) for q in (np.quantile(each, 0.25), np.quantile(each, 0.75))],
        }
        for axes, each in taken.items()
    }


# -- compressed -------------------------------------------------------------------------------------------------------


def language(shared: Path, texts: int, steps: int) -> dict[str, Any]:
    """Return perplexities and bytes of babyllama-1m by stride and local part, and of the dense model."""
    home = shared / "models" / "babyllama-1m"
    tokenizer = AutoTokenizer.from_pretrained(home)
    held = windows(tokenizer, shared / "data" / "tinystories" / "eval.jsonl", texts)
    train = windows(tokenizer, shared / "data" / "tinystories" / "train.jsonl", 4 * steps)
    rows = []
    for stride, local in ((1, 0), *COMPRESSIONS):
        model = AutoModelForCausalLM.from_pretrained(home).eval()
        if stride > 1:
            model = hf_optim.optimize(model, [{"technique": "compressed", "stride": stride, "local": local}])
        row = {
            "stride": stride,
            "local": local,
            "cache_bytes": cache_bytes(model, held),
            "before": perplexity(model, held),
        }
        if stride > 1:
            report = hf_optim.run_of(model).record.steps["0"]
            row |= {name: report[name] for name in ("share_of_attention", "share_of_cache", "weights_added")}
        row["after"] = perplexity(recovered(model, train, steps), held)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {"held_out_tokens": held.numel(), "steps": steps, "batch": 4, "context": CONTEXT, "rows": rows}


def positions(shared: Path, texts: int) -> dict[str, Any]:
    """Return perplexities of babyllama-1m on windows of its context and of twice that, by how positions are scaled."""
    home = shared / "models" / "babyllama-1m"
    held = windows(AutoTokenizer.from_pretrained(home), shared / "data" / "tinystories" / "eval.jsonl", texts)
    held = held[: len(held) // 2 * 2]
    rows = []
    for method in ("none", "linear", "ntk", "dynamic", "yarn"):
        model = AutoModelForCausalLM.from_pretrained(home).eval()
        if method != "none":
            step = {"technique": "extend_positions", "length": 2 * CONTEXT, "method": method}
            model = hf_optim.optimize(model, [step])
        long = held.view(-1, 2 * CONTEXT)
        rows.append({"method": method, "short": perplexity(model, held), "long": perplexity(model, long)})
        print(json.dumps(rows[-1]), flush=True)
    return {"held_out_tokens": held.numel(), "context": CONTEXT, "length": 2 * CONTEXT, "rows": rows}


def vision(shared: Path, steps: int) -> dict[str, Any]:
    """Return the accuracy of vision transformers trained with full and with axial attention."""
    train, test = (images(shared / "data" / "cifar10", split) for split in ("train", "test"))
    rows = []
    for seed in SEEDS:
        for axes in ("full", *AXES):
            model = trained(vision_model(axes, 8, seed=seed), train, steps, seed)
            rows.append({"axes": axes, "seed": seed, "accuracy": accuracy(model, test), "pairs": pairs(axes, 8)})
            print(json.dumps(rows[-1]), flush=True)
    return {
        "train_images": len(train[1]), "test_images": len(test[1]), "steps": steps, "batch": BATCH, "patch": PATCH,
        "width": WIDTH, "depth": DEPTH, "rows": rows,
    }  # fmt: skip


def against_size(repeats: int) -> dict[str, Any]:
    """Return pairs of tokens and times of a forward against the size of images."""
    rows = []
    for side in GRIDS:
        row = {"side": side, "tokens": side * side + 1, "load": round(os.getloadavg()[0], 1)}
        row |= {
            "pairs": {axes: pairs(axes, side) for axes in ("full", *AXES)},
            "times": times(side, repeats * max(1, 1024 // side**2)),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {"layers": 2, "width": WIDTH, "patch": PATCH, "threads": 1, "repeats": repeats, "rows": rows}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", required=True, type=Path, help="folder with data/cifar10 and models/babyllama-1m")
    parser.add_argument("--output", type=Path, default=Path("model_cards/attention"))
    parser.add_argument("--steps", type=int, default=250, help="of each vision transformer")
    parser.add_argument("--recovery", type=int, default=60, help="steps of each language model")
    parser.add_argument("--texts", type=int, default=48, help="held-out windows of 256 tokens")
    parser.add_argument("--repeats", type=int, default=5, help="of each time")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "grids.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run = {
        "times": lambda: against_size(args.repeats),
        "compressed": lambda: language(args.shared, args.texts, args.recovery),
        "positions": lambda: positions(args.shared, args.texts),
        "axial": lambda: vision(args.shared, args.steps),
    }
    for part in args.parts:
        results[part] = run[part]()
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
