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
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..errors import MissingRecipe, RecipeError
from ..trust.bounds import shown
from ..trust.documents import MAX_RECIPE_BYTES, parse_json, parse_yaml, read_text, shown_path
from .catalogue import catalogue
from .composition import Stage, compose, split_stages
from .contract import Reload
from .field_checks import did_you_mean
from .schemes import SCHEMES, find_scheme, is_scheme, technique_of
from .technique import Technique
from .training_fields import parse_training
from .traits import FLOAT_WEIGHTS, Trait

log = logging.getLogger(__name__)

DRIVERS = ("auto", "whole_model", "blockwise", "streamed")
KEYS = ("steps", "calibration", "training", "driver", "spill", "description")
SUFFIXES = (".yaml", ".yml", ".json")
MAX_STEPS = 100
# The largest values of `calibration:`. A larger one is a mistake, and would be found when memory is full.
MAX_SAMPLES, MAX_SEQ_LEN, MAX_SEED = 10**9, 10**8, 2**63 - 1
MAX_NAME = 1000


@dataclass(frozen=True)
class DataConfig:
    """Which text (or other input) to read, and how much of it.

    Attributes:
        dataset: a Hub id or a local text / json / jsonl / csv / tsv / parquet file.
        split: the split of a Hub dataset; local files have one, ``train``.
        text_column: the column with the text; None finds ``text``, ``sentence``, ``content`` or the only string column.
        chat: render conversations (a column ``messages`` or ``conversations``, or the one that ``text_column`` names)
            by the model's chat template, one sequence each; None does so if the data has no column of texts.
        samples: number of sequences of ``seq_len`` tokens; None takes everything.
        seq_len: tokens per sequence; None takes the model's context length, 2048 at most.
        seed: seed of the random sample.
        batch_size: sequences that go through the model at once; fewer need less memory on the accelerator.
    """

    dataset: str | None = None
    split: str = "train"
    text_column: str | None = None
    chat: bool | None = None
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
                    f"calibration has no key {shown(key)}{did_you_mean(key, known)} (it has {', '.join(known)})"
                )
        config = cls(**data)
        for name, most, optional in (
            ("samples", MAX_SAMPLES, True),
            ("seq_len", MAX_SEQ_LEN, True),
            ("batch_size", MAX_SAMPLES, False),
        ):
            value = getattr(config, name)
            if not (optional and value is None) and not _is_whole(value, 1, most):
                raise RecipeError(
                    f"calibration: {name} must be a whole number >= 1, at most {most}, not {shown(value)}"
                )
        if not _is_whole(config.seed, 0, MAX_SEED):
            raise RecipeError(f"calibration: seed must be a whole number >= 0, below 2^63, not {shown(config.seed)}")
        if config.chat is not None and not isinstance(config.chat, bool):
            raise RecipeError(f"calibration: chat must be true or false, not {shown(config.chat)}")
        for name in ("dataset", "split", "text_column"):
            value = getattr(config, name)
            if not (value is None and name != "split"):
                _require_text(f"calibration: {name}", value)
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
        if not isinstance(self.driver, str) or self.driver not in DRIVERS:
            raise RecipeError(f"driver must be one of {', '.join(DRIVERS)}, not {shown(self.driver)}")
        if self.spill is not None:
            _require_text("spill", self.spill)
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

    def with_calibration(self, **fields: Any) -> OptimConfig:
        """Return this recipe with other fields of its calibration data: ``with_calibration(samples=32, seq_len=512)``.

        Raises ``RecipeError`` for a field that ``DataConfig`` does not have, and for a wrong value.
        """
        return dataclasses.replace(self, calibration=DataConfig.from_dict({**vars(self.calibration), **fields}))

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
        path of a YAML or JSON file; the name of a shipped recipe, of a technique or of a scheme (``W4A16``). Raises
        ``RecipeError``.
        """
        if isinstance(source, OptimConfig):
            return source
        if isinstance(source, Technique):
            return cls(steps=(source,))
        if isinstance(source, Mapping):
            return cls._from_mapping(source)
        if isinstance(source, (str, Path)):
            return cls.load(source)
        if isinstance(source, Sequence) and not isinstance(source, (bytes, bytearray)):
            return cls(steps=tuple(_parse_step(item, i) for i, item in enumerate(source)))
        raise RecipeError(
            "pass the recipe as a name, a path, a mapping or a list of steps, not as a value of type "
            f"{type(source).__name__}"
        )

    @classmethod
    def load(cls, source: str | Path) -> OptimConfig:
        """Read a recipe file, or a shipped recipe, a technique or a scheme by its name. Raises ``RecipeError``."""
        path = Path(source)
        if path.suffix.lower() in SUFFIXES:
            if not os.path.lexists(path):
                raise MissingRecipe(f"no recipe file {shown_path(source)!r}")
            text = read_text(path, error=MissingRecipe, max_bytes=MAX_RECIPE_BYTES)
            return cls._from_text(text, str(path), path.stem)
        shipped = shipped_recipes()
        if str(source) in shipped:
            return cls._from_text(shipped[str(source)].read_text(encoding="utf-8"), str(source), str(source))
        if str(source) in catalogue().names():
            return dataclasses.replace(cls(steps=(catalogue().get(str(source))(),)), name=str(source))
        if is_scheme(str(source)):
            return dataclasses.replace(cls(steps=(_step_of_scheme(str(source)),)), name=str(source).upper())
        if other := _instead_of_a_name(str(source)):
            raise MissingRecipe(f"no recipe {shown(str(source))}: {other}")
        hint = did_you_mean(str(source), [*shipped, *catalogue().names(), *SCHEMES])
        near = f"techniques: {catalogue().names_near(str(source))}; or a .yaml file"
        if not hint:
            near = f"shipped: {', '.join(sorted(shipped))}; schemes: {', '.join(sorted(SCHEMES))}; {near}"
        raise MissingRecipe(f"no recipe {shown(str(source))}{hint} ({near})")

    @classmethod
    def _from_text(cls, text: str, path: str, name: str) -> OptimConfig:
        if path.lower().endswith(".json"):
            data = parse_json(text, path, error=RecipeError)
        else:
            data = parse_yaml(text, path, error=RecipeError, what="a plain YAML or JSON recipe")
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
                hint = did_you_mean(key, [*KEYS, "technique"])
                raise RecipeError(f"a recipe has no key {shown(key)}{hint} (it has {', '.join(KEYS)})")
        steps = data.get("steps")
        if steps is None:
            raise RecipeError("add `steps:` to the recipe, a list of mappings with `technique:`")
        if not isinstance(steps, Sequence) or isinstance(steps, (str, bytes, bytearray)):
            raise RecipeError(f"`steps:` must be a list of mappings with `technique:`, not {shown(steps)}")
        if len(steps) > MAX_STEPS:
            raise RecipeError(f"the recipe has {len(steps):,} steps; at most {MAX_STEPS} are read")
        calibration = {} if data.get("calibration") is None else data["calibration"]
        training = {} if data.get("training") is None else data["training"]
        description = "" if data.get("description") is None else data["description"]
        if not isinstance(description, str):
            raise RecipeError(f"`description:` must be text, not {shown(description)}")
        for key, value in (("calibration", calibration), ("training", training)):
            if not isinstance(value, Mapping):
                raise RecipeError(f"`{key}:` must be a mapping, not {shown(value)}")
        return cls(
            steps=tuple(_parse_step(item, i) for i, item in enumerate(steps)),
            calibration=DataConfig.from_dict(calibration),
            training=parse_training(training),
            driver="auto" if data.get("driver") is None else data["driver"],
            spill=data.get("spill"),
            description=description,
        )


def _instead_of_a_name(text: str) -> str:
    """Return what to write in place of a text that is not a name: a folder, a recipe itself, several names; else ""."""
    if not text.strip():
        return "it is empty; `hf-optim list` shows the names"
    if text.lower() == "auto":
        return 'optim_config="auto" (in small letters) loads a compressed checkpoint on kernels; it is not a recipe'
    if os.path.isdir(text):
        return "it is a folder; name a recipe, or a .yaml or .json file"
    if text.lstrip().startswith(("{", "[")):
        return (
            "write a recipe that is not a name into a .yaml or .json file (in Python, pass it as a mapping or a list)"
        )
    if "," in text:
        return "several steps are a list, in a .yaml or .json file (in Python, a list)"
    return ""


def _step_of_scheme(name: str) -> Technique:
    """Return the step of a scheme that stands alone. Raises ``RecipeError`` if it might mean a shipped recipe."""
    key, scheme = find_scheme(name)
    if key.lower() in shipped_recipes():
        if name != key:
            raise RecipeError(
                f"{shown(name)} could be the shipped recipe {key.lower()} or the scheme {key}: write one of them"
            )
        size = f", groups of {scheme.group_size} inputs" if scheme.group_size else ""
        log.info("%s is the scheme (%s%s); the shipped recipe is %s", key, technique_of(key), size, key.lower())
    return catalogue().get(technique_of(key)).from_dict({"scheme": key})


def _parse_step(item: Any, index: int) -> Technique:
    if isinstance(item, Technique):
        return item
    if isinstance(item, str) and is_scheme(item) and item not in catalogue().names():
        return _step_of_scheme(item)
    if isinstance(item, str):
        item = {"technique": item}
    if isinstance(item, Mapping) and "technique" in item and not isinstance(item["technique"], str):
        raise RecipeError(f"step {index + 1}: `technique:` must be a name, not {shown(item['technique'])}")
    if not isinstance(item, Mapping) or "technique" not in item:
        raise RecipeError(f"step {index + 1} must be a mapping with `technique:`, not {shown(item)}")
    fields = {key: value for key, value in item.items() if key != "technique"}
    if any(not isinstance(key, str) or len(key) > MAX_NAME for key in fields):
        raise RecipeError(f"step {index + 1} has a key that is not the name of a field: {shown(list(fields))}")
    try:
        return catalogue().get(item["technique"]).from_dict(fields)
    except RecipeError as error:
        raise RecipeError(f"step {index + 1}: {error}") from error


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _require_text(what: str, value: Any) -> None:
    """Raise ``RecipeError`` unless a value is a text that a name or a path can be."""
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_NAME or not value.isprintable():
        raise RecipeError(f"{what} must be text of 1 to {MAX_NAME} printable characters, not {shown(value)}")


def shipped_recipes() -> dict[str, Any]:
    """Return the recipes that ship with hf_optim: name -> readable resource."""
    folder = resources.files("hf_optim.recipes") / "shipped"
    return {Path(f.name).stem: f for f in folder.iterdir() if f.name.endswith(".yaml")}
