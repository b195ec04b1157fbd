"""A ViT classifier: train a tiny one, compress it to W8A8 and to W4A16, and compare accuracy, agreement and size.

    python examples/image_classifier.py                                          # drawn shapes, no data needed
    python examples/image_classifier.py --train train.parquet --test test.parquet --steps 1500
    python examples/image_classifier.py --train photos/train --test photos/test   # a folder of images per class

The default data is drawn on the fly: a filled circle, square, triangle or cross of random colour, size and place, with
noise. A parquet file needs a column of images and a column of labels (CIFAR-10 as on the Hub, for example). Images are
scaled to 32 x 32. ``w8a8`` needs no data; ``w4a16`` (GPTQ) is calibrated on training images. It prints (two CPU
cores)::

              accuracy  agreement      kB
    original       0.936      1.000    3291
    w8a8           0.934      0.998     953
    w4a16          0.936      0.998     643

"agreement" is the share of test images that get the same class as from the original. Each result is reloaded by stock
transformers before it is measured.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

import hf_optim

SIDE = 32
SHAPES = ("circle", "square", "triangle", "cross")
Images = tuple[torch.Tensor, torch.Tensor]  # pixel values [n, 3, SIDE, SIDE] in [-1, 1], class ids [n]


def draw_shapes(count: int, seed: int) -> Images:
    """Draw ``count`` images of the four shapes; return pixel values and classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    radius = 8 + 4 * torch.rand(count, 1, 1, generator=generator)
    center = SIDE / 2 + 6 * torch.rand(count, 2, 1, generator=generator) - 3
    x, y = torch.arange(SIDE).float() - center[:, 0, None], torch.arange(SIDE).float()[:, None] - center[:, 1, None]
    inside = torch.stack(
        [
            x**2 + y**2 < radius**2,
            (x.abs() < 0.85 * radius) & (y.abs() < 0.85 * radius),
            (y.abs() < radius) & (2 * x.abs() < y + radius),
            (torch.minimum(x.abs(), y.abs()) < 0.3 * radius) & (torch.maximum(x.abs(), y.abs()) < radius),
        ]
    )[labels, torch.arange(count)]
    colors = torch.rand(2, count, 3, 1, 1, generator=generator) * 0.5
    colors[0] += 0.5  # a bright shape on a dark ground
    noise = 0.3 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return (torch.where(inside[:, None], colors[0], colors[1]) + noise).clamp(0, 1) * 2 - 1, labels


def load_images(path: str, count: int) -> tuple[Images, list[str]]:
    """Load at most ``count`` images of a parquet file or of a folder per class; return them and the class names."""
    import numpy
    from datasets import ClassLabel, Image, load_dataset

    if Path(path).is_dir():
        data = load_dataset("imagefolder", data_dir=path, split="train").shuffle(seed=0)
    else:
        data = load_dataset("parquet", data_files=path, split="train")
    image, label = (
        next((n for n, f in data.features.items() if isinstance(f, kind)), None) for kind in (Image, ClassLabel)
    )
    image, label = image or "image", label or "label"
    rows = data.cast_column(image, Image()).select(range(min(count, len(data))))
    pixels = [numpy.asarray(row.convert("RGB").resize((SIDE, SIDE))) for row in rows[image]]
    classes = torch.tensor(rows[label])
    feature = data.features[label]
    names = list(feature.names) if isinstance(feature, ClassLabel) else [str(n) for n in range(int(classes.max()) + 1)]
    return (torch.from_numpy(numpy.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1, classes), names


def train_vit(images: Images, names: list[str], steps: int, folder: Path) -> Any:
    """Train a ViT of 0.8 M parameters (4 layers of width 128, patches of 8 x 8) from random weights."""
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=SIDE, patch_size=8, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=512, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
        )
    )  # fmt: skip
    arguments = TrainingArguments(
        str(folder / "training"),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        warmup_steps=steps // 10,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    rows = [{"pixel_values": pixels, "labels": label} for pixels, label in zip(*images, strict=True)]
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    model.save_pretrained(folder / "original")
    return model


@torch.no_grad()
def classes_of(model: Any, images: Images) -> torch.Tensor:
    """Return the predicted class ids, int64 ``[n]``."""
    model.eval()
    return torch.cat(
        [model(pixel_values=part.to(model.device)).logits.argmax(-1).cpu() for part in images[0].split(64)]
    )


def main(train: str | None, test: str | None, steps: int, count: int, output: Path) -> dict[str, dict[str, float]]:
    """Train, compress, reload and measure; print the table, and return its numbers by name of the model."""
    logging.set_verbosity_error()
    names = list(SHAPES)
    if train is None or test is None:
        learned, judged = draw_shapes(count, seed=1), draw_shapes(count // 4, seed=2)
    else:
        (learned, names), (judged, _) = load_images(train, count), load_images(test, count // 4)
    train_vit(learned, names, steps, output)
    # w4a16 is calibrated on batches of the model's own inputs.
    batches = [{"pixel_values": part} for part in learned[0][:128].split(32)]
    for recipe in ("w8a8", "w4a16"):
        dense = AutoModelForImageClassification.from_pretrained(output / "original")
        hf_optim.optimize(dense, recipe, calibration=batches).save_pretrained(output / recipe)
    figures: dict[str, dict[str, float]] = {}
    for name in ("original", "w8a8", "w4a16"):
        found = classes_of(AutoModelForImageClassification.from_pretrained(output / name), judged)
        original = found if name == "original" else original  # noqa: F821
        figures[name] = {
            "accuracy": float((found == judged[1]).float().mean()),
            "agreement": float((found == original).float().mean()),
            "kB": (output / name / "model.safetensors").stat().st_size / 1e3,
        }
    print(f"{'':<10}{'accuracy':>10}{'agreement':>11}{'kB':>8}")
    for name, row in figures.items():
        print(f"{name:<10}{row['accuracy']:>10.3f}{row['agreement']:>11.3f}{row['kB']:>8.0f}")
    return figures


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a tiny ViT, and compress it to W8A8 and W4A16.")
    parser.add_argument("--train", help="parquet file, or folder with a folder of images per class (default: drawn)")
    parser.add_argument("--test", help="the same, of other images")
    parser.add_argument("--steps", type=int, default=300, help="training steps of 64 images")
    parser.add_argument("--count", type=int, default=4000, help="training images at most; a quarter of it for the test")
    parser.add_argument("--output", type=Path, help="folder to keep the checkpoints in (default: a temporary one)")
    given = parser.parse_args(argv)
    if (given.train is None) != (given.test is None):
        parser.error("--train and --test belong together")
    return given


if __name__ == "__main__":
    given = parse()
    with tempfile.TemporaryDirectory() as folder:
        main(given.train, given.test, given.steps, given.count, given.output or Path(folder))
