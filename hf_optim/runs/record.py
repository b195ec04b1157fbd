"""The record of a run: ``hf_optim.json`` beside the weights, from which the model card is rendered."""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..trust.bounds import shown
from ..trust.documents import read_mapping
from .record_checks import check_record

FILE_NAME = "hf_optim.json"
SCHEMA = 1
PACKAGES = ("hf-optim", "torch", "transformers", "compressed-tensors", "peft", "datasets", "triton")


@dataclass
class Record:
    """Everything needed to repeat a run and to judge its result, in plain JSON types.

    Attributes:
        recipe: the recipe as a mapping (``OptimConfig.to_dict()``).
        base_model: ``{"id", "revision", "class", "parameters", "dtype"}``, and ``license`` if its card names one.
        calibration: ``{"dataset", "split", "text_column", "samples", "seq_len", "tokens", "seed", "sha256"}``.
        stages: one mapping per stage: ``{"steps", "driver", "seconds", "peak_memory_bytes", "device"}``; that of a
            training also has ``data``, the name of what it read, if ``train_stage`` ran it.
        coverage: per step name: ``{"weights_touched", "weights_total", "share", "skipped": {reason: names},
            "left_alone": {role: {"reason", "names", "weights"}}}``; what was touched and what was left alone add up.
        steps: per index of a step (as a string): the metrics it reports (``Run.report``).
        measured: ``{"before": {...}, "after": {...}}``, the metrics of ``evaluation.evaluate``; if measured also
            ``control``, ``accelerated`` (the result on kernels, with ``kernels`` and ``kernel_layers``), ``evaluation``
            (the data), and ``timing`` (``{"what", "in_turn", "load_average", "cores"}``).
        reload: the name of the reload level.
        traits: names of the traits of the result.
        pruned: parameter name -> ``{"weights", "zeros", "pattern": [N, M]}`` of the parameters of which weights were
            pruned; ``pattern`` only where zeros follow one. By it a further recipe finds the zeros again.
        notes: warnings for the card: what could not be done, and why.
        sections: what steps add to the card beyond their metrics: paragraphs, tables, images.
        finished: False for a checkpoint from the middle of a recipe.
        weights: the SHA-256 of each weight file of a finished checkpoint, by name: others get no figures.
        versions: package versions, Python and platform.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    base_model: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    coverage: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    reload: str = "STOCK_DENSE"
    traits: list[str] = field(default_factory=list)
    pruned: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sections: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    weights: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def note(self, sentence: str) -> None:
        """Add a sentence to the notes, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def to_json(self) -> str:
        """Return the content of ``hf_optim.json``."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    def write(self, directory: Path) -> Path:
        """Write ``hf_optim.json`` into ``directory``, and return its path."""
        path = Path(directory) / FILE_NAME
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def read(cls, directory: Path) -> Record:
        """Read ``hf_optim.json`` of a checkpoint.

        The file is input: the author of the checkpoint wrote it. Keys that this version does not have are ignored.
        Raises ``CheckpointError`` if there is none, or if anything in it has another type than in records.
        """
        path = Path(directory) / FILE_NAME
        data = read_mapping(path, nonfinite=True)
        try:
            if data.get("schema") != SCHEMA:
                raise ValueError(f"it has schema {shown(data.get('schema'))}; this version reads {SCHEMA}")
            return cls(**check_record({f.name: data[f.name] for f in fields(cls) if f.name in data}))
        except ValueError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error


def public_name(source: Any) -> str:
    """Return a Hub id as it is; for a local path only the last component, so that no machine path is published."""
    text = os.fspath(source) if source is not None else ""
    return Path(text).resolve().name if text and Path(text).exists() else text


def public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe for the record: of a local data file only its name, and no directory of this machine."""
    data = recipe.get("calibration", {})
    return {
        **{key: value for key, value in recipe.items() if key != "spill"},
        **({"calibration": {**data, "dataset": public_name(data["dataset"])}} if data.get("dataset") else {}),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result, and the platform."""
    return dict(_versions())


@functools.cache  # reading them parses the metadata of each package
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
