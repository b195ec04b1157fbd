"""What a card may say of a checkpoint: facts of the result, and sentences that hold under conditions on them.

A step of a recipe knows what it did, not what the checkpoint is: a later step may store the weights in another format
or give the model another class. So every sentence about the checkpoint (how it is stored and loaded, whether it is
smaller or faster) carries a condition on the *result*: ``Claim`` for those of the host, ``Card.when`` for those of
steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...data.tasks import BASE, Task, task_of, task_of_auto_class
from ...recipes.contract import Reload
from ...recipes.traits import MOE, QUANTIZED, SPARSE, SPARSE_NM, Trait
from ...runs.record import Record
from ...trust.documents import read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
)
STOCK_LEVELS = frozenset({Reload.STOCK_FORMAT, Reload.STOCK_ARCH})


class Result:
    """Facts of a checkpoint: from its record, and from its files if they are at hand.

    Attributes:
        record: its record.
        directory: the checkpoint, or a folder with the record alone; None if there is none.
    """

    def __init__(self, record: Record, directory: Path | None = None) -> None:
        self.record = record
        self.directory = directory

    @property
    def reload(self) -> Reload:
        """How stock transformers loads it."""
        return Reload[self.record.reload]

    def has(self, *traits: Trait) -> bool:
        """Return True if the result has all of these traits."""
        return {str(trait) for trait in traits} <= set(self.record.traits)

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The ``config.json`` of the checkpoint, or None if it is not at hand."""
        if self.directory is None or not (self.directory / "config.json").exists():
            return None
        found = read_json(self.directory / "config.json", nonfinite=True)
        return found if isinstance(found, dict) else {}

    @property
    def is_compressed_tensors(self) -> bool:
        """True if the weights are stored in the format of compressed-tensors.

        From the checkpoint's configuration; without it, from the traits: a class of transformers reads quantized
        weights in no other format.
        """
        if self.config is not None:
            stored = self.config.get("quantization_config")
            return isinstance(stored, dict) and stored.get("quant_method") == "compressed-tensors"
        return self.has(QUANTIZED) and self.reload in STOCK_LEVELS

    @property
    def has_narrow_inputs(self) -> bool:
        """True if inputs of layers are quantized to integers of 4 bits, which no kernel multiplies."""
        return any(
            isinstance(one, Mapping) and (one.get("type"), one.get("num_bits")) == ("int", 4) for one in self._inputs()
        )

    @property
    def is_compressed_encoder_decoder(self) -> bool:
        """True if its encoder, which ``generate`` calls by itself, has compressed layers."""
        return self.is_compressed_tensors and (self.config or {}).get("is_encoder_decoder") is True

    @property
    def has_one_weight_scheme(self) -> bool:
        """True if all of its compressed layers have one scheme, for weights alone."""
        return self._inputs() == [None]

    def _inputs(self) -> list[Any]:
        """Return for each scheme of compressed-tensors how inputs are quantized; None for inputs as they are."""
        stored = (self.config or {}).get("quantization_config")
        groups = stored.get("config_groups") if isinstance(stored, Mapping) else None
        return [
            group.get("input_activations")
            for group in (groups.values() if isinstance(groups, Mapping) else ())
            if isinstance(group, Mapping)
        ]

    @property
    def has_capacity(self) -> bool:
        """True if its ``config.json`` states a capacity of experts, which stock transformers does not read."""
        held = (self.config or {}).get("hf_optim")
        return isinstance(held, Mapping) and held.get("routing") is not None

    def model_class(self) -> str:
        """Return the class that loads it, from its ``config.json`` or else that of the base model."""
        name: Any = self.record.base_model.get("class")
        listed = (self.config or {}).get("architectures")
        name = listed[0] if isinstance(listed, list) and listed else name
        return name if isinstance(name, str) and name.isidentifier() else ""

    def task(self) -> Task:
        """Return its task. A class whose code comes with the checkpoint has that of its auto class."""
        name = self.model_class()
        found = task_of(name)
        listed = (self.config or {}).get("auto_map")
        if found is BASE and isinstance(listed, dict):
            autos = [auto for auto, place in listed.items() if str(place).rpartition(".")[2] == name]
            found = next((task for auto in autos if (task := task_of_auto_class(auto)) is not BASE), BASE)
        return found

    def processor(self) -> str:
        """Return the auto class of its tokenizer or processor, and an empty string if it has none.

        From its files; if these are not at hand, the one that models of its task have.
        """
        if self.directory is None or self.config is None:
            return "AutoImageProcessor" if self.task().tag == "image-classification" else "AutoTokenizer"
        tokenizer = any((self.directory / name).exists() for name in TOKENIZER_FILES)
        if (self.directory / "processor_config.json").exists():
            return "AutoProcessor"
        kind = ""
        if (self.directory / "preprocessor_config.json").exists():
            found = read_json(self.directory / "preprocessor_config.json", nonfinite=True)
            audio = isinstance(found, dict) and "feature_extractor_type" in found
            kind = "AutoFeatureExtractor" if audio else "AutoImageProcessor"
        if tokenizer:
            return "AutoProcessor" if kind else "AutoTokenizer"
        return kind


@dataclass(frozen=True)
class Claim:
    """A sentence of Markdown that holds for a result with these properties.

    Attributes:
        text: the sentence.
        has, lacks: traits that the result has, and that it has not.
        reload: the reload levels for which it holds; any if empty.
        compressed: holds if the weights are stored in the format of compressed-tensors (True), or are not (False).
    """

    text: str
    has: frozenset[Trait] = frozenset()
    lacks: frozenset[Trait] = frozenset()
    reload: frozenset[Reload] = frozenset()
    compressed: bool | None = None

    def holds(self, result: Result) -> bool:
        """Return True if the sentence is true of a result."""
        return (
            result.has(*self.has)
            and not any(result.has(trait) for trait in self.lacks)
            and (not self.reload or result.reload in self.reload)
            and (self.compressed is None or self.compressed == result.is_compressed_tensors)
        )


def claims_of(result: Result, claims: Iterable[Claim]) -> list[str]:
    """Return the sentences that hold for a result."""
    return [claim.text for claim in claims if claim.holds(result)]


# What a reader must not expect of a checkpoint.
LIMITS = (
    Claim(
        "Stock transformers decodes the weights in the first forward pass: there the format saves bytes on disk, but "
        "neither time nor memory of inference, and may cost both. "
        '`optim_config="auto"` runs the layers on compressed weights where a kernel of hf_optim supports them.',
        compressed=True,
    ),
    Claim(
        "Zeros are stored and multiplied like other numbers: this sparsity alone saves neither bytes nor time.",
        has=frozenset({SPARSE}),
        lacks=frozenset({SPARSE_NM, QUANTIZED}),
    ),
    Claim(
        "Zeros are stored as codes like other weights: the sparsity saves no bytes and no time on top of the "
        "quantization.",
        has=frozenset({SPARSE, QUANTIZED}),
        lacks=frozenset({SPARSE_NM}),
    ),
    Claim(
        "The N:M zeros are stored; they save time only on kernels that skip them, such as hf_optim's for 2:4 on CUDA "
        '(`optim_config="auto"`).',
        has=frozenset({SPARSE_NM}),
        lacks=frozenset({QUANTIZED}),
    ),
    Claim(
        "The N:M zeros are stored as codes like other weights: they save no bytes on disk on top of the quantization, "
        "and time only on kernels that skip them.",
        has=frozenset({SPARSE_NM, QUANTIZED}),
    ),
    Claim(
        "The products of experts are dense, on every kernel: N:M zeros in experts save no time.",
        has=frozenset({SPARSE_NM, MOE}),
    ),
    Claim("All experts are held in memory; only those that a token is routed to are computed.", has=frozenset({MOE})),
    Claim(
        "The model's code comes with the checkpoint and runs with `trust_remote_code=True`: read it before.",
        reload=frozenset({Reload.REMOTE_CODE}),
    ),
)
