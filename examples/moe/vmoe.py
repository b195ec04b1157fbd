"""V-MoE beside its dense twin on CIFAR-10: accuracy against inference FLOPs, and who gets the slots of experts.

    python examples/moe/vmoe.py --data ../shared/data/cifar10 --output model_cards/moe
    python examples/moe/vmoe.py --data ../shared/data/cifar10 --output vmoe --size tiny --seeds 1      # a trial
    python examples/moe/vmoe.py --data ../shared/data/cifar10 --pack FOLDER      # one file, for another machine
    python examples/moe/vmoe_page.py model_cards/moe

Vision transformers of several widths are trained from scratch, dense and with mixtures (8 experts, top 2, capacity
1.05) in every second layer; those of one width in every layer, too, so that dropping has a price. Models of one seed
see equal images in equal steps. Learning rates are chosen on 1,000 images that are split off the training set; the test
set is read by final models alone. Then the mixtures run with other capacities, by position and by priority.

Seeds are trained in rounds, and the results are written after each. With ``--limit`` no round begins that would not end
in time. On a GPU every training step is one CUDA graph, captured once; the trainings of a round run at the same time,
each on a stream of its own.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from cifar import Schedule, load, pack, pixels
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification
from vmoe_training import Training, start, train_all

import hf_optim

EXPERTS, TOP_K, CLASSES, HELD_BACK, GROUP = 8, 2, 10, 1000, 500
TUNING_SEED, IMAGE_SEEDS = 1000, 3
FACTORS = (0.1, 0.25, 0.5, 0.75, 1.05, EXPERTS / TOP_K)
GROUPS = ("batch", "image")
EVERY = {"dense": 0, "vmoe": 2, "every_layer": 1}
ORDERS = {"by position": False, "by priority": True}
SIZES: dict[str, dict[str, Any]] = {
    "gpu": {
        "dense": (64, 96, 128, 192), "vmoe": (64, 96), "every_layer": (96,), "depth": 4, "patch": 4, "batch": 128,
        "steps": 2000, "rates": (5e-4, 1e-3, 2e-3), "seeds": 16, "parallel": 4,
    },
    "cpu": {
        "dense": (32, 48, 64), "vmoe": (32, 48), "every_layer": (48,), "depth": 4, "patch": 8, "batch": 64,
        "steps": 1500, "rates": (1e-3, 2e-3, 4e-3), "seeds": 3, "parallel": 1,
    },
    "tiny": {
        "dense": (32, 48), "vmoe": (32,), "every_layer": (32,), "depth": 2, "patch": 8, "batch": 32, "steps": 20,
        "rates": (1e-3, 2e-3), "seeds": 2, "parallel": 2,
    },
}  # fmt: skip


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


# -- what is measured -------------------------------------------------------------------------------------------------
@torch.no_grad()
def is_right(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Return which images are classified right, bool ``[n]``, in batches of ``GROUP``."""
    batches = zip(images.split(GROUP), labels.split(GROUP), strict=True)
    return torch.cat([model(pixel_values=pixels(part)).logits.argmax(-1) == truth for part, truth in batches])


def settings(groups: tuple[str, ...]) -> dict[str, tuple[float, bool, str]]:
    """Return capacity factor, priority and group by name, such as ``batch/by priority/0.5``."""
    return {
        f"{group}/{order}/{factor:g}": (factor, priority, group)
        for group in groups
        for order, priority in ORDERS.items()
        for factor in FACTORS
    }


def examined(model: Any, images: Tensor, labels: Tensor, groups: tuple[str, ...]) -> dict[str, Tensor]:
    """Return which test images a mixture classifies right, by group, order and capacity factor."""
    found = {}
    for name, given in settings(groups).items():
        set_capacity(model, *given)
        found[name] = is_right(model, images, labels)
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
    """Choose learning rates for dense and sparse models of one width, by accuracy on images held back."""
    training, (images, labels) = tuple(part[:-HELD_BACK] for part in data), (part[-HELD_BACK:] for part in data)
    width = size["vmoe"][-1]
    tries = [(kind, rate) for kind in ("dense", "vmoe") for rate in size["rates"]]
    schedule = Schedule(TUNING_SEED, steps, size["batch"], len(training[0]), str(images.device))
    runs = [Training(build(width, size, TUNING_SEED, EVERY[kind]), training, schedule, rate) for kind, rate in tries]  # type: ignore[arg-type]
    start(runs, [build(width, size, TUNING_SEED, EVERY[kind]) for kind, _ in tries])
    train_all(runs)
    found: dict[str, Any] = {"width": width, "steps": steps, "held_back": HELD_BACK, "dense": {}, "vmoe": {}}
    for (kind, rate), run in zip(tries, runs, strict=True):
        found[kind][f"{rate:g}"] = round(float(is_right(run.model, images, labels).float().mean()), 4)
    return found


class Study:
    """The results of all trainings, written after each round."""

    def __init__(self, path: Path, results: dict[str, Any], size: dict[str, Any], test: tuple[Tensor, Tensor]) -> None:
        self.path, self.results, self.size, self.test = path, results, size, test
        self.counts: dict[str, Tensor] = {}

    def add(self, kind: str, width: int, seed: int, model: Any) -> None:
        """Measure a trained model. Settings within images are those of the first ``IMAGE_SEEDS`` seeds alone."""
        row: dict[str, Any] = {"width": width, "seed": seed, "parameters": model.num_parameters()}
        if kind == "dense":
            found, row["flops"] = {"": is_right(model, *self.test)}, flops(width, self.size)
        else:
            found = examined(model, *self.test, GROUPS if seed < IMAGE_SEEDS else GROUPS[:1])
            row["flops"] = {f"{factor:g}": flops(width, self.size, factor, EVERY[kind]) for factor in FACTORS}
        shares = {name: round(float(right.float().mean()), 4) for name, right in found.items()}
        row["accuracy"] = shares[""] if kind == "dense" else _nested(shares)
        self.results[kind].append(row)
        for name, right in found.items():
            if not name.startswith("image"):
                key = f"{kind}/{width}/{name}".rstrip("/")
                self.counts[key] = self.counts.get(key, 0) + right.to(torch.uint8).cpu()  # type: ignore[operator]
        if kind == "vmoe" and width == self.size["vmoe"][-1] and "picture" not in self.results:
            self.results["picture"] = dropped_patches(model, *self.test, 0.25)

    def write(self) -> None:
        """Write everything so far; for each setting the number of seeds that classify each test image right."""
        right = {name: base64.b64encode(count.numpy().tobytes()).decode() for name, count in self.counts.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self.results, "right": right}, indent=1) + "\n", encoding="utf-8")


def _nested(shares: dict[str, float]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, share in shares.items():
        group, order, factor = name.split("/")
        found.setdefault(group, {}).setdefault(order, {})[factor] = share
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="a folder with train.parquet and test.parquet")
    parser.add_argument("--output", type=Path, default=Path("model_cards/moe"))
    parser.add_argument("--size", choices=SIZES, help="of models and trainings; by default that for the device")
    parser.add_argument("--steps", type=int, help="of every training")
    parser.add_argument("--seeds", type=int, help="trainings of every model")
    parser.add_argument("--parallel", type=int, help="seeds that are trained at the same time")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds: no round begins that would end later")
    parser.add_argument("--pack", type=Path, help="write the data into one file in this folder, and end")
    args = parser.parse_args(argv)
    if args.pack is not None:
        print(pack(args.data, args.pack))
        return
    begin = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES[args.size or ("gpu" if device == "cuda" else "cpu")]
    steps, seeds, parallel = args.steps or size["steps"], args.seeds or size["seeds"], args.parallel or size["parallel"]
    train, test = (tuple(part.to(device) for part in load(args.data, split)) for split in ("train", "test"))
    tuning = tune(train, max(10, steps // 3), size)  # type: ignore[arg-type]
    print(f"{time.perf_counter() - begin:.0f} s: {json.dumps(tuning)}", flush=True)
    rates = {kind: float(max(tuning[kind], key=tuning[kind].get)) for kind in ("dense", "vmoe")}
    training = tuple(part[:-HELD_BACK] for part in train)
    results = {
        "experts": EXPERTS, "top_k": TOP_K, "depth": size["depth"], "patch": size["patch"], "steps": steps,
        "batch": size["batch"], "train_images": len(training[0]), "test_images": len(test[0]),
        "group_images": GROUP, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "tuning": tuning, "rates": rates, **{kind: [] for kind in EVERY},
    }  # fmt: skip
    study = Study(args.output / "vmoe.json", results, size, test)  # type: ignore[arg-type]
    plan = [(kind, width) for kind in EVERY for width in size[kind]]
    schedules = [Schedule(n, steps, size["batch"], len(training[0]), device) for n in range(min(parallel, seeds))]
    slots = [(kind, width, schedule) for schedule in schedules for kind, width in plan]
    rate_of = {**rates, "every_layer": rates["vmoe"]}
    runs = [
        Training(build(width, size, 0, EVERY[kind]), training, schedule, rate_of[kind])  # type: ignore[arg-type]
        for kind, width, schedule in slots
    ]
    first, longest = 0, 0.0
    while first < seeds and time.perf_counter() - begin + longest < args.limit:
        since = time.perf_counter()
        here = schedules[: seeds - first]
        for number, schedule in enumerate(here):
            schedule.become(Schedule(first + number, steps, size["batch"], len(training[0]), device))
        places = [(kind, width, first + number) for number in range(len(here)) for kind, width in plan]
        start(runs[: len(places)], [build(width, size, seed, EVERY[kind]) for kind, width, seed in places])
        ready = time.perf_counter()
        train_all(runs[: len(places)])
        trained = time.perf_counter()
        for place, run in zip(places, runs, strict=False):
            study.add(*place, run.model)
        study.write()
        longest, first = max(longest, time.perf_counter() - since), first + len(here)
        print(
            f"{time.perf_counter() - begin:.0f} s: {first} seeds; the last {len(here)} took {ready - since:.0f} s to "
            f"begin, {trained - ready:.0f} to train, {time.perf_counter() - trained:.0f} to measure",
            flush=True,
        )
    print(study.path, flush=True)


if __name__ == "__main__":
    main()
