"""The smallest run of a technique: recipe, data and training around it, on a tiny random model of an architecture."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

import hf_optim
from hf_optim import ModelError, OptimConfig, RecipeError, Technique
from hf_optim.recipes.catalogue import catalogue
from hf_optim.recipes.traits import FLOAT_WEIGHTS
from hf_optim.runs.run import run_of
from hf_optim.testing.models import TINY
from hf_optim.toolkit import topology

ARCHITECTURES = ("llama", "gpt2", "bert", "vit", "t5", "mixtral")
AUTO = {
    "bert": "AutoModelForSequenceClassification",
    "vit": "AutoModelForImageClassification",
    "t5": "AutoModelForSeq2SeqLM",
}
STEPS = 3


def recipe_for(cls: type[Technique]) -> OptimConfig:
    """Return ``cls.for_testing()``, preceded by techniques that add what it needs and followed by what it owes."""
    steps: list[Technique] = [cls.for_testing()]
    for trait in sorted(steps[0].contract().owes, key=str):
        provider = next(c for c in catalogue().all() if trait in c.spec.contract.adds and not c.spec.trains)
        steps.append(provider())
    needed = sorted(steps[0].contract().needs, key=str)
    for trait in needed:
        if trait != FLOAT_WEIGHTS:
            provider = next(c for c in catalogue().all() if trait in c.spec.contract.adds)
            steps.insert(0, provider())
    return OptimConfig(steps=tuple(steps))


def inputs_for(model: PreTrainedModel, seed: int = 0, rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Return a batch of random inputs for a model: ids ``[rows, length]`` int64, pixels ``[rows, C, H, W]`` float."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for key, value in topology.dummy_inputs(model).items():
        if value.is_floating_point():
            batch[key] = torch.randn((rows, *value.shape[1:]), generator=generator, dtype=value.dtype)
        elif key.endswith("input_ids"):
            batch[key] = torch.randint(3, 60, (rows, length), generator=generator)
        else:
            batch[key] = value[:1].expand(rows, *value.shape[1:])
    return batch


def training_examples(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Return eight random examples with labels."""
    examples = []
    for index in range(8):
        example = {key: value[0] for key, value in inputs_for(model, seed=index, rows=1).items()}
        classes = int(model.config.num_labels or 0) if is_classifier(model) else 0
        ids = example.get("decoder_input_ids", example.get("input_ids"))
        example["labels"] = torch.tensor(index % classes) if classes or ids is None else ids
        examples.append(example)
    return examples


def is_classifier(model: PreTrainedModel) -> bool:
    """Return True for a sequence or image classifier."""
    return "Classification" in type(model).__name__


def optimize_tiny(cls: type[Technique], model: PreTrainedModel, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Return the model after the smallest recipe, trained for a few steps if the recipe trains."""
    model = hf_optim.optimize(model, recipe_for(cls), calibration=[inputs_for(model, seed=s) for s in range(3)])
    while (stage := run_of(model).stage) is not None:
        model = train(model, folder / f"stage-{run_of(model).stage_index}")
        assert run_of(model).stage is not stage, "the stage did not end with its training"
    return model


def train(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    run = run_of(model)
    args = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    assert run.stage is not None
    plain = not any(s.implements(h) for s in run.stage.steps for h in ("training_loss", "parameter_groups"))
    examples = training_examples(model)
    if plain:
        trainer = Trainer(model=model, args=args, train_dataset=examples, callbacks=hf_optim.callbacks(model))  # type: ignore[arg-type]
    else:
        trainer = hf_optim.OptimTrainer(model=model, args=args, train_dataset=examples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return run.model.eval()


def loaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Save a model and load it again, as users have it: transformers then knows the names in its checkpoint."""
    model.save_pretrained(folder)
    again: PreTrainedModel = type(model).from_pretrained(folder).eval()
    for tensor in (*again.parameters(), *again.buffers()):
        tensor.data = tensor.data.clone()  # those of a mapped file may be unaligned, and sums then round differently
    return again


def attempt(cls: type[Technique], architecture: str, folder: Path) -> PreTrainedModel | None:
    """Return the optimized tiny model, or None if the technique refuses the architecture with a reason."""
    try:
        return optimize_tiny(cls, loaded(TINY[architecture](), folder / "source"), folder)
    except (ModelError, RecipeError) as refusal:
        text = str(refusal)
    assert len(text) > 30, f"a refusal must give the reason: {text}"
    assert re.search(r"step \d+ \(\w+\)", text), f"a refusal must name the step: {text}"
    return None


class Attempts:
    """The results of ``attempt``, each computed once for a file of tests. Tests share them and must not change them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._results: dict[tuple[type[Technique], str], PreTrainedModel | None] = {}

    def __call__(self, cls: type[Technique], architecture: str) -> PreTrainedModel | None:
        key = cls, architecture
        if key not in self._results:
            self._results[key] = attempt(cls, architecture, self._folder / f"{cls.spec.name}-{architecture}")
        return self._results[key]

    def first(self, cls: type[Technique]) -> tuple[str, PreTrainedModel]:
        """Return the first supported architecture and the optimized tiny model of it."""
        for name in ARCHITECTURES:
            model = self(cls, name)
            if model is not None:
                return name, model
        raise AssertionError(f"{cls.spec.name} supports none of {', '.join(ARCHITECTURES)}")
