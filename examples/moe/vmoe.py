"""V-MoE beside its dense twin on CIFAR-10: accuracy against inference FLOPs, and who gets the slots of experts.

    python examples/moe/vmoe.py --data ../shared/data/cifar10 --output model_cards/moe
    python examples/moe/vmoe.py --data ../shared/data/cifar10 --output model_cards/moe --every-layer   # then
    python examples/moe/vmoe.py --data ../shared/data/cifar10 --output vmoe --size tiny --seeds 1      # a trial
    python examples/moe/vmoe_page.py model_cards/moe

Vision transformers of several widths are trained from scratch, dense and with a mixture in every second layer (8
experts, top 2, capacity 1.05), for equally many steps on equal batches of images. Learning rates are chosen for both on
1,000 images that are split off the training set; the test set is read once, at the end. Then the mixtures run with
other capacities, by position and by priority, among the tokens of a batch and of each image. ``--every-layer`` adds
models of the middle width whose feed-forward layers are all mixtures, so that dropping has a price.

On a GPU every training step is one CUDA graph, and all trainings run at once, each on a stream of its own.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

import hf_optim

EXPERTS, TOP_K, CLASSES, HELD_BACK, GROUP = 8, 2, 10, 1000, 500
FACTORS = (0.1, 0.25, 0.5, 0.75, 1.05, EXPERTS / TOP_K)
GROUPS = ("batch", "image")
EVERY = {"dense": 0, "vmoe": 2, "every_layer": 1}
ORDERS = {"by position": False, "by priority": True}
SIZES: dict[str, dict[str, Any]] = {
    "gpu": {"widths": (96, 128, 192), "depth": 4, "patch": 4, "batch": 256, "steps": 1000, "rates": (5e-4, 1e-3, 2e-3)},
    "cpu": {"widths": (32, 48, 64), "depth": 4, "patch": 8, "batch": 64, "steps": 2000, "rates": (1e-3, 2e-3, 4e-3)},
    "tiny": {"widths": (32, 48), "depth": 2, "patch": 8, "batch": 32, "steps": 20, "rates": (1e-3, 2e-3)},
}


# -- data -------------------------------------------------------------------------------------------------------------
def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return the images uint8 ``[n, 3, 32, 32]`` and classes int64 ``[n]`` of a split.

    From ``cifar10.npz`` if the folder has one (arrays ``train_images``, ``train_labels`` ...), otherwise from parquet
    files of JPEG images.
    """
    packed = folder / "cifar10.npz"
    if packed.exists():
        with np.load(packed) as arrays:
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    else:
        from datasets import Image, load_dataset

        rows = load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train")
        rows = rows.cast_column("image", Image())
        images = np.stack([np.asarray(picture.convert("RGB")) for picture in rows["image"]])
        labels = np.asarray(rows["label"])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()


def pixels(images: Tensor) -> Tensor:
    """Return images as the model reads them, float ``[n, 3, 32, 32]``."""
    return (images.float() / 255 - 0.47) / 0.25


def augmented(images: Tensor) -> Tensor:
    """Return images ``[B, 3, 32, 32]``, each shifted by up to 4 pixels, every second one mirrored."""
    count, device = len(images), images.device
    padded = functional.pad(images, (4, 4, 4, 4), mode="reflect")
    steps = torch.arange(32, device=device)
    rows = torch.randint(0, 9, (count, 1), device=device) + steps
    columns = torch.randint(0, 9, (count, 1), device=device) + steps
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns, columns.flip(1))
    one = torch.arange(count, device=device).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[one, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


# -- models -----------------------------------------------------------------------------------------------------------
def build(width: int, size: dict[str, Any], seed: int, every: int = 0) -> Any:
    """Return a ViT with random weights, dense or with mixtures in every ``every``-th layer."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=32, patch_size=size["patch"], hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=size["depth"], num_attention_heads=width // 16, num_labels=CLASSES,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    if every:
        step = {
            "technique": "vmoe", "experts": EXPERTS, "top_k": TOP_K, "start": "random", "seed": seed, "every": every,
        }  # fmt: skip
        model = hf_optim.release(hf_optim.optimize(model, [step]))
    return model


def mixtures(model: Any) -> dict[str, Any]:
    """Return the mixture layers of a model, by name; empty for a dense one."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "kept")}


def set_capacity(model: Any, factor: float, priority: bool, group: str) -> None:
    """Set the capacity with which the mixtures run in evaluation."""
    for mixture in mixtures(model).values():
        mixture.settings.update(capacity=factor, batch_priority=priority, group=group)


def flops(width: int, size: dict[str, Any], factor: float = 0.0, every: int = 0) -> int:
    """Return the floating-point operations for one image; ``factor`` is the capacity of mixtures in every n-th layer.

    Two for each multiplication of a matrix product. Every slot of an expert counts, filled or not.
    """
    depth, patch = size["depth"], size["patch"]
    tokens = (32 // patch) ** 2 + 1
    attention = tokens * 4 * width**2 + 2 * tokens**2 * width
    forward = tokens * 8 * width**2
    sparse = depth // every if every else 0
    share = min(factor, EXPERTS / TOP_K) * TOP_K
    extra = sparse * (forward * (share - 1) + tokens * width * EXPERTS)
    return round(2 * ((tokens - 1) * 3 * patch**2 * width + depth * (attention + forward) + extra + width * CLASSES))


# -- training ---------------------------------------------------------------------------------------------------------
class Training:
    """One training of one model: ``step`` is everything from drawing a batch to the update of the weights."""

    def __init__(self, model: Any, data: tuple[Tensor, Tensor], batch: int, steps: int, rate: float) -> None:
        self.model, self.images, self.labels = model.to(data[0].device).train(), *data
        self.batch, self.steps, self.rate = batch, steps, rate
        self.done = torch.zeros((), device=data[0].device)
        self.lr = torch.tensor(rate, device=data[0].device)
        on_gpu = data[0].is_cuda
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.lr if on_gpu else rate, weight_decay=0.05, fused=True, capturable=on_gpu
        )
        self.stream = torch.cuda.Stream() if on_gpu else None
        self.graph: Any = None

    def step(self) -> None:
        """Train on one batch. Nothing in it waits for the device."""
        warm = self.steps // 20 + 1
        falling = 0.5 + 0.5 * torch.cos(math.pi * (self.done - warm).clamp(min=0) / (self.steps - warm))
        self.lr.copy_(self.rate * torch.minimum((self.done + 1) / warm, falling))
        if self.stream is None:
            self.optimizer.param_groups[0]["lr"] = float(self.lr)
        chosen = torch.randint(0, len(self.images), (self.batch,), device=self.images.device)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, self.images.is_cuda, cache_enabled=False):
            inputs = augmented(pixels(self.images[chosen]))
            loss = self.model(pixel_values=inputs, labels=self.labels[chosen]).loss
        loss.backward()
        self.optimizer.step()
        self.done += 1

    def capture(self) -> None:
        """Capture ``step`` as one graph, after three steps that set everything up."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.step()


def train_all(trainings: list[Training]) -> float:
    """Run trainings of equally many steps side by side; return the seconds."""
    begin = time.perf_counter()
    if trainings[0].stream is not None:
        for one in trainings:
            one.capture()
        torch.cuda.synchronize()
        print(f"  captured {len(trainings)} in {time.perf_counter() - begin:.1f} s", flush=True)
    for _ in range(trainings[0].steps - (3 if trainings[0].graph else 0)):
        for one in trainings:
            if one.graph is None:
                one.step()
            else:
                with torch.cuda.stream(one.stream):
                    one.graph.replay()
    if trainings[0].stream is not None:
        torch.cuda.synchronize()
    for one in trainings:
        one.model.eval()
        one.graph = None
    return time.perf_counter() - begin


@torch.no_grad()
def accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are classified right, in batches of ``GROUP``."""
    right = [
        (model(pixel_values=pixels(part)).logits.argmax(-1) == truth).sum()
        for part, truth in zip(images.split(GROUP), labels.split(GROUP), strict=True)
    ]
    return round(float(torch.stack(right).sum()) / len(labels), 4)


# -- what is measured -------------------------------------------------------------------------------------------------
def capacities(model: Any, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the accuracy by group, order and capacity factor."""
    found: dict[str, Any] = {}
    for group in GROUPS:
        for order, priority in ORDERS.items():
            for factor in FACTORS:
                set_capacity(model, factor, priority, group)
                value = accuracy(model, images, labels)
                found.setdefault(group, {}).setdefault(order, {})[f"{factor:g}"] = value
    return found


@torch.no_grad()
def dropped_patches(model: Any, images: Tensor, labels: Tensor, factor: float) -> dict[str, Any]:
    """Return, for the first image of each class, which patches no expert computes, by order and layer.

    Slots are given among the tokens of a batch of ``GROUP`` images. A string with a character per patch, row by row:
    ``1`` is a patch that at least one expert computes.
    """
    shown = [int((labels == number).nonzero()[0]) for number in range(CLASSES)]
    others = [index for index in range(len(images)) if index not in shown][: GROUP - CLASSES]
    # Among the others in the batch, not all at its beginning, where positions are never dropped.
    places = torch.arange(CLASSES) * (GROUP // CLASSES) + GROUP // CLASSES // 2
    order = torch.empty(GROUP, dtype=torch.long)
    order[places] = torch.tensor(shown)
    order[[place for place in range(GROUP) if place not in set(places.tolist())]] = torch.tensor(others)
    batch = images[order.to(images.device)]
    found: dict[str, Any] = {"factor": factor, "orders": {}}
    for name, priority in ORDERS.items():
        set_capacity(model, factor, priority, "batch")
        seen: dict[str, Tensor] = {}

        def look(module: Any, args: Any, layer: str, seen: dict[str, Tensor] = seen) -> None:
            tokens = args[0].reshape(-1, args[0].shape[-1])
            chosen, gates = module.choose(tokens)
            kept = module.kept(chosen, gates, len(args[0]))
            seen[layer] = torch.ones_like(chosen, dtype=torch.bool) if kept is None else kept

        handles = [
            mixture.register_forward_pre_hook(lambda module, args, layer=layer: look(module, args, layer))
            for layer, mixture in mixtures(model).items()
        ]
        model(pixel_values=pixels(batch))
        for handle in handles:
            handle.remove()
        found["orders"][name] = {
            layer: ["".join("01"[int(x)] for x in row[1:]) for row in kept.any(1).view(GROUP, -1)[places].cpu()]
            for layer, kept in seen.items()
        }
    found["images"] = [base64.b64encode(batch[p].permute(1, 2, 0).cpu().numpy().tobytes()).decode() for p in places]
    return found


def tune(data: tuple[Tensor, Tensor], steps: int, size: dict[str, Any]) -> dict[str, Any]:
    """Choose learning rates for dense and sparse models of the middle width, by accuracy on images held back."""
    training = tuple(part[:-HELD_BACK] for part in data)
    held = tuple(part[-HELD_BACK:] for part in data)
    width = size["widths"][len(size["widths"]) // 2]
    tries = [(kind, rate) for kind in ("dense", "vmoe") for rate in size["rates"]]
    runs = [
        Training(build(width, size, 0, EVERY[kind]), training, size["batch"], steps, rate)  # type: ignore[arg-type]
        for kind, rate in tries
    ]
    seconds = train_all(runs)
    found: dict[str, Any] = {"width": width, "steps": steps, "held_back": HELD_BACK, "dense": {}, "vmoe": {}}
    for (kind, rate), run in zip(tries, runs, strict=True):
        found[kind][f"{rate:g}"] = accuracy(run.model, *held)
    print(f"tuned in {seconds:.1f} s: {json.dumps(found)}", flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="a folder with train.parquet and test.parquet")
    parser.add_argument("--output", type=Path, default=Path("model_cards/moe"))
    parser.add_argument("--size", choices=SIZES, help="of models and trainings; by default that for the device")
    parser.add_argument("--steps", type=int, help="of every training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every model")
    parser.add_argument(
        "--every-layer", action="store_true", help="add models with mixtures in every layer to an earlier vmoe.json"
    )
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES[args.size or ("gpu" if device == "cuda" else "cpu")]
    steps, seeds = args.steps or size["steps"], args.seeds
    train, test = (tuple(part.to(device) for part in load(args.data, split)) for split in ("train", "test"))
    training, path = tuple(part[:-HELD_BACK] for part in train), args.output / "vmoe.json"
    if args.every_layer:
        results = json.loads(path.read_text(encoding="utf-8"))
        steps, seeds = results["steps"], len({row["seed"] for row in results["vmoe"]})
        kinds = [("every_layer", size["widths"][len(size["widths"]) // 2])]
        results["every_layer"] = []
    else:
        tuning = tune(train, max(10, steps // 3), size)  # type: ignore[arg-type]
        rates = {kind: float(max(tuning[kind], key=tuning[kind].get)) for kind in ("dense", "vmoe")}
        results = {
            "experts": EXPERTS, "top_k": TOP_K, "depth": size["depth"], "patch": size["patch"], "steps": steps,
            "batch": size["batch"], "train_images": len(training[0]), "test_images": len(test[0]),
            "group_images": GROUP, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "tuning": tuning, "rates": rates, "dense": [], "vmoe": [],
        }  # fmt: skip
        kinds = [("dense", width) for width in size["widths"]] + [("vmoe", width) for width in size["widths"][:-1]]
    plan = [(kind, width, seed) for seed in range(seeds) for kind, width in kinds]
    rate_of = {**results["rates"], "every_layer": results["rates"]["vmoe"]}
    runs = [
        Training(build(width, size, seed, EVERY[kind]), training, size["batch"], steps, rate_of[kind])  # type: ignore[arg-type]
        for kind, width, seed in plan
    ]
    seconds = train_all(runs)
    for (kind, width, seed), run in zip(plan, runs, strict=True):
        row: dict[str, Any] = {"width": width, "seed": seed, "parameters": run.model.num_parameters()}
        if kind == "dense":
            row |= {"flops": flops(width, size), "accuracy": accuracy(run.model, *test)}  # type: ignore[arg-type]
        else:
            row["flops"] = {f"{factor:g}": flops(width, size, factor, EVERY[kind]) for factor in FACTORS}
            row["accuracy"] = capacities(run.model, *test)  # type: ignore[arg-type]
        results[kind].append(row)
        print(kind, json.dumps(row), flush=True)
    if not args.every_layer:
        widest = plan.index(("vmoe", size["widths"][-2], 0))
        results["picture"] = dropped_patches(runs[widest].model, *test, 0.25)  # type: ignore[arg-type]
    args.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{path} after {seconds:.1f} s of training", flush=True)


if __name__ == "__main__":
    main()
