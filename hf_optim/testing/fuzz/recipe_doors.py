"""Doors for recipes and for the arguments of a training."""

from __future__ import annotations

import copy
from pathlib import Path
from random import Random
from typing import Any

import transformers
import yaml

from ...cli.check import check
from ...lifecycle.loading import optimize
from ...recipes.config import DataConfig, OptimConfig
from ...recipes.training_fields import FIELDS
from ...training.fit import train_stage
from ..models import tiny_llama
from .door import Door
from .examples import STEPS, TRAINING, TRAINING_STEPS, Examples
from .mutations import VALUES, dumps, mutate_bytes, mutate_tree


def _write(tree: Any, home: Path, random: Random, damaged: float = 0.3) -> Path:
    path = home / random.choice(("r.yaml", "r.json"))
    if path.suffix == ".json":
        raw = dumps(tree)
    else:
        raw = yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")
    path.write_bytes(mutate_bytes(raw, random) if random.random() < damaged else raw)
    return path


def mutated_recipe(examples: Examples, home: Path, random: Random, few: bool = False) -> Path:
    """Write a mutated recipe; ``few`` takes only those that fit the tiny decoder."""
    listed = examples.recipes[: len(STEPS)] if few else examples.recipes
    return _write(mutate_tree(random.choice(listed), random), home, random)


def _parse(examples: Examples, home: Path, random: Random) -> None:
    OptimConfig.parse(mutated_recipe(examples, home, random)).check()


def _check(examples: Examples, home: Path, random: Random) -> None:
    check(mutated_recipe(examples, home, random), str(examples.dense))


def _apply(examples: Examples, home: Path, random: Random) -> None:
    path = mutated_recipe(examples, home, random, few=True)
    transformers.AutoModelForCausalLM.from_pretrained(
        examples.dense, optim_config=str(path), calibration=examples.batches, tokenizer=examples.tokenizer
    )


def _in_memory(examples: Examples, home: Path, random: Random) -> None:
    """Recipes of a caller: mappings with values that no file holds."""
    tree = mutate_tree(random.choice(examples.recipes[: len(STEPS)]), random)
    if random.random() < 0.5:
        tree = tree if isinstance(tree, dict) else {"steps": tree}
        tree[random.choice(sorted(tree) or ["steps"])] = random.choice(
            (object(), {1, 2}, b"x", range(3), len, float("nan"), 1j)
        )
    optimize(tiny_llama(), tree, examples.batches, tokenizer=examples.tokenizer)


def _value(kind: Any, random: Random) -> Any:
    """Return a value that an argument of this kind may have."""
    if hasattr(kind, "names"):
        return random.choice(kind.names)
    if hasattr(kind, "kinds"):
        return {name: _value(kind.kinds[name], random) for name in random.sample(sorted(kind.kinds), 1)}
    if not hasattr(kind, "low"):
        return random.random() < 0.5
    numbers = (kind.low, kind.high, kind.low + 1, (kind.low + kind.high) / 2)
    return random.choice([round(number) if isinstance(kind.low, int) else number for number in numbers])


def _train(examples: Examples, home: Path, random: Random) -> None:
    """A training of at most two steps whose arguments are mutated, or of values that each field may have."""
    training: dict[str, Any] = copy.deepcopy(dict(TRAINING))
    for name in random.sample(sorted(FIELDS), random.choice((1, 1, 2, 3))):
        training[name] = _value(FIELDS[name], random) if random.random() < 0.8 else random.choice(VALUES)
    steps = random.choice(TRAINING_STEPS)
    recipe = OptimConfig.parse(_write({"steps": steps, "training": training}, home, random, damaged=0.05))
    recipe.check()
    # Long trainings and many worker processes are what a recipe may say, and not what a fuzzer waits for.
    bounded: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True}
    arguments = {**recipe.training, **bounded}
    for name in ("dataloader_num_workers", "gradient_accumulation_steps", "dataloader_prefetch_factor"):
        if arguments.get(name):
            arguments[name] = min(arguments[name], 1)
    model = optimize(tiny_llama(), recipe, examples.batches)
    data = DataConfig(dataset=str(examples.texts), samples=4, seq_len=8)
    train_stage(model, examples.tokenizer, data, arguments)


DOORS = (
    Door("recipe", "parse", _parse),
    Door("recipe", "check", _check),
    Door("recipe", "from_pretrained", _apply),
    Door("recipe", "in memory", _in_memory),
    Door("training", "train", _train),
)
