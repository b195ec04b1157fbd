"""Recipes: an ordered list of steps, their data and their driver.

A recipe in YAML::

    steps:
      - technique: smoothquant
        alpha: 0.5
      - technique: rtn
        bits: 8
    calibration: {dataset: tinystories.jsonl, samples: 128, seq_len: 512}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError
from .catalogue import catalogue
from .composition import Stage, compose, split_stages
from .contract import Reload
from .field_checks import did_you_mean
from .technique import Technique
from .traits import FLOAT_WEIGHTS, Trait

DRIVERS = ("auto", "whole_model", "blockwise", "streamed")
KEYS = ("steps", "calibration", "training", "driver", "spill", "description")
SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class DataConfig:
    """Which text (or other input) to read, and how much of it.

    Attributes:
        dataset: a Hub id or a local text / json / jsonl / csv / tsv / parquet file.
        split: the split of a Hub dataset; local files have one, ``train``.
        text_column: the column with the text; None finds ``text``, ``sentence``, ``content`` or the only string column.
        samples: number of sequences of ``seq_len`` tokens; None takes everything.
        seq_len: tokens per sequence; None takes the model's context length, 2048 at most.
        seed: seed of the random sample.
        batch_size: sequences that go through the model at once; fewer need less memory on the accelerator.
    """

    dataset: str | None = None
    split: str = "train"
    text_column: str | None = None
    samples: int | None = 128
    seq_len: int | None = None
    seed: int = 0
    batch_size: int = 8

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DataConfig:
        """Build from the ``calibration:`` mapping of a recipe. Raises ``RecipeError``."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise RecipeError(
                    f"calibration has no key {key!r}{did_you_mean(key, known)} (it has {', '.join(known)})"
                )
        config = cls(**data)
        for name in ("samples", "seq_len", "batch_size"):
            value = getattr(config, name)
            if (value is not None or name == "batch_size") and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise RecipeError(f"calibration: {name} must be a whole number >= 1, not {value!r}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True)
class OptimConfig:
    """A recipe.

    Attributes:
        steps: the techniques, in order.
        calibration: where calibration data comes from, unless the caller passes it.
        training: arguments of ``transformers.TrainingArguments`` for stages that train, used by ``hf-optim compress``.
        driver: how calibration runs: ``whole_model``; ``blockwise``, with one block at a time on the accelerator;
            ``auto``, blockwise if the model has a sequence of blocks; ``streamed`` (for ``hf-optim compress``), with
            one block at a time in memory, so that the model may be larger than memory.
        spill: a directory where ``streamed`` stores the activations between blocks; None keeps them in host memory.
        description: one line for readers.
        name: the name it was loaded by.
    """

    steps: tuple[Technique, ...]
    calibration: DataConfig = DataConfig()
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    driver: str = "auto"
    spill: str | None = None
    description: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        if not self.steps:
            raise RecipeError("add at least one step: the recipe is empty")
        if self.driver not in DRIVERS:
            raise RecipeError(f"driver must be one of {', '.join(DRIVERS)}, not {self.driver!r}")
        if self.spill is not None and self.driver != "streamed":
            raise RecipeError(
                f"remove spill, or use driver: streamed: driver {self.driver} keeps activations in host memory"
            )

    @property
    def stages(self) -> list[Stage]:
        """The stages: the steps, split where a step calibrates after one that trains."""
        return split_stages(self.steps)

    def check(self, traits: Iterable[Trait] = (FLOAT_WEIGHTS,)) -> frozenset[Trait]:
        """Return the traits of the result for a model with ``traits``. Raises ``RecipeError`` if steps conflict."""
        return compose(self.steps, frozenset(traits))

    @property
    def reload(self) -> Reload:
        """The reload level of the result: of the levels of its steps, the one that is least stock."""
        levels = list(Reload)
        return levels[max(levels.index(step.reload()) for step in self.steps)]

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain JSON types; ``OptimConfig.parse`` reads it back."""
        data: dict[str, Any] = {"steps": [step.to_dict() for step in self.steps]}
        if self.calibration != DataConfig():
            data["calibration"] = self.calibration.to_dict()
        if self.training:
            data["training"] = dict(self.training)
        if self.driver != "auto":
            data["driver"] = self.driver
        if self.spill is not None:
            data["spill"] = self.spill
        if self.description:
            data["description"] = self.description
        return data

    def to_yaml(self) -> str:
        """Return the recipe as YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def parse(cls, source: Any) -> OptimConfig:
        """Build a recipe from anything that ``optim_config`` accepts.

        Accepted are an ``OptimConfig``; a technique; a list of techniques and mappings; a mapping with ``steps``; the
        path of a YAML or JSON file; the name of a shipped recipe or of a technique. Raises ``RecipeError``.
        """
        if isinstance(source, OptimConfig):
            return source
        if isinstance(source, Technique):
            return cls(steps=(source,))
        if isinstance(source, Mapping):
            return cls._from_mapping(source)
        if isinstance(source, (str, Path)):
            return cls.load(source)
        if isinstance(source, Sequence):
            return cls(steps=tuple(_parse_step(item, i) for i, item in enumerate(source)))
        raise RecipeError(
            f"pass the recipe as a name, a path, a mapping or a list of steps, not as a {type(source).__name__}"
        )

    @classmethod
    def load(cls, source: str | Path) -> OptimConfig:
        """Read a recipe file, or a shipped recipe or a technique by its name. Raises ``RecipeError``."""
        path = Path(source)
        if path.suffix.lower() in SUFFIXES:
            if not path.is_file():
                raise RecipeError(f"no recipe file {str(source)!r}")
            return cls._from_text(path.read_text(encoding="utf-8"), str(path), path.stem)
        shipped = shipped_recipes()
        if str(source) in shipped:
            return cls._from_text(shipped[str(source)].read_text(encoding="utf-8"), str(source), str(source))
        if str(source) in catalogue().names():
            return dataclasses.replace(cls(steps=(catalogue().get(str(source))(),)), name=str(source))
        hint = did_you_mean(str(source), [*shipped, *catalogue().names()])
        raise RecipeError(f"no recipe {str(source)!r}{hint} (shipped: {', '.join(sorted(shipped))}; or a .yaml file)")

    @classmethod
    def _from_text(cls, text: str, path: str, name: str) -> OptimConfig:
        try:
            # safe_load: a recipe may come from an untrusted source, and must not be able to construct objects.
            data = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError(f"{path} is not a plain YAML or JSON recipe: {error}") from error
        if isinstance(data, list):
            data = {"steps": data}
        if not isinstance(data, Mapping):
            raise RecipeError(f"{path} contains a value of type {type(data).__name__}, not a recipe")
        try:
            return dataclasses.replace(cls._from_mapping(data), name=name)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error

    @classmethod
    def _from_mapping(cls, data: Mapping[str, Any]) -> OptimConfig:
        if "technique" in data:
            return cls(steps=(_parse_step(data, 0),))
        for key in data:
            if key not in KEYS:
                raise RecipeError(f"a recipe has no key {key!r}{did_you_mean(key, KEYS)} (it has {', '.join(KEYS)})")
        steps = data.get("steps")
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            raise RecipeError("add `steps:` to the recipe, a list of mappings with `technique:`")
        calibration = data.get("calibration") or {}
        training = data.get("training") or {}
        for key, value in (("calibration", calibration), ("training", training)):
            if not isinstance(value, Mapping):
                raise RecipeError(f"`{key}:` must be a mapping, not {value!r}")
        return cls(
            steps=tuple(_parse_step(item, i) for i, item in enumerate(steps)),
            calibration=DataConfig.from_dict(calibration),
            training=dict(training),
            driver=data.get("driver", "auto"),
            spill=data.get("spill"),
            description=data.get("description", ""),
        )


def _parse_step(item: Any, index: int) -> Technique:
    if isinstance(item, Technique):
        return item
    if isinstance(item, str):
        item = {"technique": item}
    if not isinstance(item, Mapping) or not isinstance(item.get("technique"), str):
        raise RecipeError(f"step {index + 1} must be a mapping with `technique:`, not {item!r}")
    fields = {key: value for key, value in item.items() if key != "technique"}
    try:
        return catalogue().get(item["technique"]).from_dict(fields)
    except RecipeError as error:
        raise RecipeError(f"step {index + 1}: {error}") from error


def shipped_recipes() -> dict[str, Any]:
    """Return the recipes that ship with hf_optim: name -> readable resource."""
    folder = resources.files("hf_optim.recipes") / "shipped"
    return {Path(f.name).stem: f for f in folder.iterdir() if f.name.endswith(".yaml")}
