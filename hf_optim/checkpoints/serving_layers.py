"""The compressed-tensors configuration of a checkpoint and its linear layers, as the loaders of servers see them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..trust.bounds import first_line, shown
from ..trust.headers import TensorInfo
from ..trust.patterns import compile_pattern
from .serving_rules import PER_CHANNEL, Activations, Scheme

MAX_TARGETS = 20_000
_FLOATS = ("F64", "F32", "F16", "BF16")
# 2-D weights that no server builds as a quantizable linear layer.
_NOT_LINEAR = re.compile(r"embed|norm|\bshared$|\bwte$|\bwpe$|router|\bgate$|conv|relative", re.IGNORECASE)
EXPERT = re.compile(r"(.*?\bexperts)\.\d+\.")


@dataclass(frozen=True)
class Layer:
    """A linear layer of a checkpoint, or an expert's: its name, whether it has codes, and its shape (0: unknown)."""

    name: str
    quantized: bool
    inputs: int = 0
    outputs: int = 0
    tensors: Mapping[str, TensorInfo] | None = None

    @property
    def expert(self) -> bool:
        return bool(EXPERT.match(f"{self.name}."))


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A compressed-tensors configuration, and the layers of the checkpoint."""

    format: str
    targets: Mapping[str, Scheme]
    ignore: Sequence[str]
    layers: Sequence[Layer]
    sparse: bool
    matches: Callable[[str, str], bool]

    def ignored(self, name: str) -> bool:
        return any(self.matches(pattern, name) for pattern in self.ignore)

    def by_name(self, name: str) -> str | None:
        return next((target for target in self.targets if self.matches(target, name)), None)

    def by_class(self) -> str | None:
        return "Linear" if "Linear" in self.targets else None

    def scheme_of(self, layer: Layer) -> Scheme | None:
        if self.ignored(layer.name):
            return None
        found = self.by_name(layer.name) or self.by_class()
        return self.targets[found] if found is not None else None


def read_quantized(stored: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> QuantizedCheckpoint:
    targets: dict[str, Scheme] = {}
    parsed = _parse(stored)
    common = _text(parsed.format)
    for group in parsed.config_groups.values():
        if isinstance(group, list) or group.weights is None:
            continue
        scheme = _scheme(group, _text(group.format) if getattr(group, "format", None) else common)
        targets |= dict.fromkeys(group.targets, scheme)
    ignore = list(parsed.ignore or ())
    if len(targets) + len(ignore) > MAX_TARGETS:
        raise CheckpointError(f"quantization_config has more than {MAX_TARGETS:,} targets and patterns to ignore")
    sparsity = stored.get("sparsity_config")
    sparse = isinstance(sparsity, Mapping) and bool(sparsity.get("targets"))
    return QuantizedCheckpoint(common, targets, ignore, _layers(tensors), sparse, _matcher([*targets, *ignore]))


def _parse(stored: Mapping[str, Any]) -> Any:
    """Validate a configuration with the installed compressed-tensors, which publishes the schema."""
    from compressed_tensors.quantization import QuantizationConfig

    try:
        return QuantizationConfig.model_validate(dict(stored))
    except Exception as error:  # pydantic's errors, and those of the validators
        reasons: list[Any] = getattr(error, "errors", list)()
        where = " > ".join(str(part) for part in reasons[0]["loc"][:4]) if reasons else ""
        what = reasons[0]["msg"] if reasons else first_line(error, typed=True)
        raise CheckpointError(
            f"quantization_config does not follow the schema of compressed-tensors: {shown(where)}: {what}"
        ) from error


def _scheme(group: Any, format: str) -> Scheme:
    weights, inputs = group.weights, group.input_activations
    return Scheme(
        format=format,
        bits=weights.num_bits,
        type=_text(weights.type),
        strategy=_text(weights.strategy),
        group_size=weights.group_size if weights.group_size else PER_CHANNEL,
        symmetric=bool(weights.symmetric),
        dynamic=bool(weights.dynamic),
        actorder=_text(weights.actorder) if weights.actorder is not None else None,
        inputs=None
        if inputs is None
        else Activations(
            inputs.num_bits, _text(inputs.type), _text(inputs.strategy), bool(inputs.symmetric), bool(inputs.dynamic)
        ),
    )


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


def _matcher(patterns: Iterable[str]) -> Callable[[str, str], bool]:
    """Return a function that tells whether a target or pattern names a module, as the servers match: from its start."""
    compiled = {}
    for pattern in dict.fromkeys(patterns):
        if pattern.startswith("re:"):
            try:
                compiled[pattern] = compile_pattern(pattern[3:])
            except ValueError as error:
                raise CheckpointError(f"quantization_config: {error}") from error
    return lambda pattern, name: bool(compiled[pattern].match(name)) if pattern in compiled else pattern == name


def _layers(tensors: Sequence[TensorInfo]) -> list[Layer]:
    by_module: dict[str, dict[str, TensorInfo]] = {}
    for tensor in tensors:
        module, _, own = tensor.key.rpartition(".")
        by_module.setdefault(module, {})[own] = tensor
    layers = []
    for name, local in by_module.items():
        weight = local.get("weight_packed", local.get("weight"))
        if weight is None or len(weight.shape) != 2:
            continue
        scale = local.get("weight_scale")
        if scale is None and (weight.type not in _FLOATS or _NOT_LINEAR.search(name)):
            continue
        packed = "weight_packed" in local
        layers.append(Layer(name, scale is not None, 0 if packed else weight.shape[1], weight.shape[0], local))
    return layers
