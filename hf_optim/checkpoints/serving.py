"""Which servers read a checkpoint: its configuration and headers against the rules of ``serving_rules``.

Nothing is loaded and no server is needed. A verdict says what the server's loader does with the checkpoint, not whether
the server has the architecture.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..trust.bounds import shown
from ..trust.documents import read_mapping, require_mapping
from ..trust.headers import TensorInfo, read_header
from ..trust.hub_access import require_findable
from ..trust.lookup import Where
from ..trust.weights import checked_weights
from .serving_layers import EXPERT, Layer, QuantizedCheckpoint, read_quantized
from .serving_rules import FUSED, PER_CHANNEL, SERVERS, Rule, Scheme, Server


@dataclass(frozen=True)
class Verdict:
    """What one server does with a checkpoint.

    Attributes:
        server, version: the server, and the version whose source the rules are from.
        reads: True if it loads the checkpoint, False if not, None if there are no rules for its format.
        reasons: why not.
        notes: what to know if it does.
        command: the command that serves the checkpoint.
    """

    server: str
    version: str
    reads: bool | None
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""


@dataclass(frozen=True)
class ServingReport:
    """The verdicts of all servers on one checkpoint.

    Attributes:
        schemes: the quantization schemes of the checkpoint, in words; empty if it is dense.
        architecture: the class that ``config.json`` names.
        basis: what the verdicts are based on.
        verdicts: one for each server.
    """

    schemes: tuple[str, ...]
    architecture: str
    basis: str
    verdicts: tuple[Verdict, ...]


def check_serving(source: str | os.PathLike[str], revision: str | None = None) -> ServingReport:
    """Return what vLLM, SGLang and TGI do with a checkpoint.

    Of a directory, the configuration and the headers of the weights are read; of a Hub id, the configuration alone.
    Raises ``CheckpointError`` if they are missing or corrupt, or if compressed-tensors refuses the configuration, and
    ``ModelError`` for a Hub id that is neither cached nor can be asked for.
    """
    name = os.fspath(source)
    local = os.path.isdir(name)
    if not local and (os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise CheckpointError(f"{name} is not the directory of a checkpoint")
    require_findable(name, revision)
    path = Where(name, "", {"revision": revision}).find("config.json")
    if path is None:
        raise CheckpointError(f"{name} has no config.json")
    config = read_mapping(path, f"config.json of {name}", nonfinite=True)
    files = checked_weights(name, named=config.get("transformers_weights")) if local else ()
    verdicts = serving_support(config, [entry for file in files for entry in read_header(file, name)], name)
    listed = config.get("architectures")
    architecture = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else "its model"
    what = "the headers of the weights" if local else "not the weights, which are not on this machine"
    basis = f"Rules from reading the servers' sources, held against config.json and {what}; no server was run."
    return ServingReport(tuple(schemes_in(config)), shown(architecture)[1:-1], basis, tuple(verdicts))


def serving_support(
    config: Mapping[str, Any], tensors: Iterable[TensorInfo] = (), path: str = "DIRECTORY"
) -> list[Verdict]:
    """Return the verdict of each server on a configuration and the headers of its tensors.

    Args:
        config: the content of ``config.json``.
        tensors: the tensors of the checkpoint; without them, only the configuration is judged.
        path: the checkpoint, for the commands.

    Raises ``CheckpointError`` for a configuration that compressed-tensors refuses.
    """
    stored = config.get("quantization_config")
    method = require_mapping(stored, "quantization_config").get("quant_method") if stored is not None else None
    checkpoint = None
    if method == "compressed-tensors":
        checkpoint = read_quantized(require_mapping(stored, "quantization_config"), list(tensors))
    verdicts = []
    for server in SERVERS:
        notes: dict[str, None] = {}
        known = True
        if needs_own_code(config):
            reasons = [f"its model type {shown(config.get('model_type'))} needs the code in the checkpoint"]
        elif checkpoint is not None:
            reasons = list(dict.fromkeys(_problems(server, checkpoint, notes)))
        elif isinstance(method, str) and method in _layouts(server):
            reasons = _layout_problems(server, method, require_mapping(stored, "quantization_config"))
        else:
            known, reasons = stored is None, []
            if not known:
                notes[f"no rules for quant_method {shown(method)}"] = None
        reasons += [] if known is False else _rope_problems(server, config)
        command = server.command.format(path=path)
        reads = None if not known else not reasons
        verdicts.append(Verdict(server.name, server.version, reads, tuple(reasons), tuple(notes), command))
    return verdicts


def needs_own_code(config: Mapping[str, Any]) -> bool:
    """Return True if no class of transformers loads the model: its code is in the checkpoint."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return "auto_map" in config and str(config.get("model_type")) not in CONFIG_MAPPING_NAMES


def _problems(server: Server, checkpoint: QuantizedCheckpoint, notes: dict[str, None]) -> Iterator[str]:
    if checkpoint.sparse and server.sparsity_refused:
        yield f"{server.sparsity_refused}, and this configuration has one for some layers"
    experts = any(layer.expert for layer in checkpoint.layers)
    if experts and server.experts_refused:
        yield server.experts_refused
    for scheme in dict.fromkeys(checkpoint.targets.values()):
        if server.one_format and scheme.format != checkpoint.format:
            yield (
                f"it reads one format for all groups, and this configuration has {checkpoint.format} with "
                f"{scheme.format} inside"
            )
        used = [layer for layer in checkpoint.layers if layer.quantized and checkpoint.scheme_of(layer) == scheme]
        if not used and checkpoint.layers:
            continue
        yield from _scheme_problems(server, scheme, any(layer.expert for layer in used), notes)
    yield from _layer_problems(server, checkpoint)
    yield from _fused_problems(server, checkpoint)


def _scheme_problems(server: Server, scheme: Scheme, expert: bool, notes: dict[str, None]) -> Iterator[str]:
    rule = (server.expert_rules if expert and server.expert_rules else server.rules).get(scheme.kind)
    if rule is None:
        yield f"it has no {'kernel for experts' if expert else 'scheme'} for {scheme.label}"
        return
    if rule.refused:
        yield f"{scheme.label}: {rule.refused}"
        return
    inputs = scheme.inputs
    if scheme.bits not in rule.bits:
        yield f"{scheme.label}: it reads {_list(rule.bits)} bits"
    if not scheme.symmetric and scheme.bits not in rule.zero_point_bits:
        yield f"{scheme.label}: it reads no zero points of such weights; compress with symmetric: true"
    if scheme.strategy not in rule.strategies or scheme.dynamic:
        yield f"{scheme.label}: it reads scales per {_list(rule.strategies)}"
    if rule.group_sizes and scheme.group_size not in rule.group_sizes:
        sizes = _list(size for size in rule.group_sizes if size != PER_CHANNEL)
        yield f"{scheme.label}: it reads groups of {sizes}, or one scale per channel"
    if scheme.actorder is not None and (
        scheme.actorder not in server.orders or (server.order_needs_groups and scheme.group_size == PER_CHANNEL)
    ):
        yield f"{scheme.label}: it does not read weights with actorder {scheme.actorder}"
    if inputs is not None and not inputs.dynamic:
        if not rule.static_inputs or inputs.strategy != "tensor":
            yield f"{scheme.label}: it reads no static scales of inputs per {inputs.strategy}"
    elif inputs is not None and scheme.kind == "W8A8" and inputs.strategy != "token":
        yield f"{scheme.label}: it reads dynamic scales of inputs per token"
    usual = (not rule.usual_bits or scheme.bits in rule.usual_bits) and (
        not rule.usual_groups or scheme.group_size in rule.usual_groups
    )
    if rule.unusual and not usual:
        notes[f"{scheme.label}: {rule.unusual}"] = None
    if rule.note:
        notes[rule.note] = None


def _layer_problems(server: Server, checkpoint: QuantizedCheckpoint) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    fused = _fused_outputs(checkpoint)
    for layer in checkpoint.layers:
        head = layer.name.rpartition(".")[2] == "lm_head"
        scheme = checkpoint.scheme_of(layer)
        if layer.quantized and scheme is None:
            found.setdefault("has codes, and no target of quantization_config names it", []).append(layer.name)
        elif layer.quantized and scheme is not None:
            if head and server.head_by_name and checkpoint.by_name(layer.name) is None:
                found.setdefault(
                    "is quantized by the target Linear, which reaches no output head: name it in a target, or leave it "
                    "out (skip: lm_head)",
                    [],
                ).append(layer.name)
            for problem in _shape_problems(server, layer, scheme, fused.get(layer.name, 0)):
                found.setdefault(problem, []).append(layer.name)
        elif not any(part.isdigit() for part in layer.name.split(".")):
            continue  # outside the blocks: heads and projections, which each model of a server builds in its own way
        elif scheme is not None:
            found.setdefault(
                "is stored dense, and quantization_config does not ignore it: it would be read as codes", []
            ).append(layer.name)
        elif server.all_matched and not checkpoint.ignored(layer.name):
            found.setdefault("is not quantized, and is neither a target nor in ignore", []).append(layer.name)
    for problem, names in found.items():
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        yield f"{shown(names[0])[1:-1]}{more} {problem}"


def _shape_problems(server: Server, layer: Layer, scheme: Scheme, fused: int) -> Iterator[str]:
    inputs, outputs = _size(layer, scheme)
    local = layer.tensors or {}
    if scheme.kind.startswith("packed"):
        packed = local.get("weight_packed")
        if packed is None:
            yield "is to be packed, and the checkpoint has no weight_packed of it"
            return
        if scheme.group_size != PER_CHANNEL and packed.shape[1] != math.ceil(inputs * scheme.bits / 32):
            yield (
                f"has {packed.shape[1]} words of codes a row, where {inputs} inputs of {scheme.bits} bits take "
                f"{math.ceil(inputs * scheme.bits / 32)} (packed by another version of compressed-tensors, or groups "
                "that do not divide the inputs)"
            )
        points = local.get("weight_zero_point")
        if not scheme.symmetric and (points is None or points.shape[:1] != (math.ceil(outputs * scheme.bits / 32),)):
            yield "has zero points that are not packed along its outputs"
    elif "weight_packed" in local and scheme.format not in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        yield f"has packed codes, and its format is {scheme.format}"
    rule = server.rules.get(scheme.kind, Rule())
    if rule.shapes and not layer.expert and not _fits(rule, inputs, fused or outputs):
        pairs = " or ".join(f"{a} inputs and {b} outputs" for a, b in rule.shapes)
        size = f"{inputs} inputs and {fused or outputs} outputs{' (fused)' if fused else ''}"
        yield f"has {size}: it reads multiples of {pairs}"


def _fits(rule: Rule, inputs: int, outputs: int) -> bool:
    return any(inputs % a == 0 and outputs % b == 0 for a, b in rule.shapes)


def _size(layer: Layer, scheme: Scheme) -> tuple[int, int]:
    """Return the inputs and outputs of a layer; of packed codes, the inputs follow from the scales or the words."""
    local = layer.tensors or {}
    if layer.inputs or "weight_packed" not in local:
        return layer.inputs, layer.outputs
    scale, packed = local["weight_scale"], local["weight_packed"]
    if scheme.group_size != PER_CHANNEL and len(scale.shape) == 2:
        return scale.shape[1] * scheme.group_size, layer.outputs
    return packed.shape[1] * 32 // max(1, scheme.bits), layer.outputs


def _fused_outputs(checkpoint: QuantizedCheckpoint) -> dict[str, int]:
    """Return the outputs of the matrix that a projection becomes a part of, by the name of the projection."""
    by_name = {layer.name: layer for layer in checkpoint.layers}
    found: dict[str, int] = {}
    for name in by_name:
        parent, _, leaf = name.rpartition(".")
        parts = next((parts for parts in FUSED if leaf in parts), ())
        layers = [by_name[other] for part in parts if (other := f"{parent}.{part}") in by_name]
        if len(layers) > 1:
            found[name] = sum(layer.outputs for layer in layers)
    return found


def _fused_problems(server: Server, checkpoint: QuantizedCheckpoint) -> Iterator[str]:
    by_name = {layer.name: layer for layer in checkpoint.layers}
    parents = dict.fromkeys(layer.name.rpartition(".")[0] for layer in checkpoint.layers if not layer.expert)
    for parent in parents:
        for parts in FUSED:
            layers = [by_name[name] for part in parts if (name := f"{parent}.{part}") in by_name]
            if len(layers) < 2:
                continue
            if len({checkpoint.scheme_of(layer) if layer.quantized else None for layer in layers}) > 1:
                yield (
                    f"{parent}: it fuses {', '.join(parts)} into one matrix, and they have different schemes here (a "
                    "recipe that leaves one out, or gives them different bits)"
                )
                return
            named = server.class_before_parts and checkpoint.by_class() and checkpoint.by_name(layers[0].name)
            if named and checkpoint.targets["Linear"] != checkpoint.scheme_of(layers[0]):
                yield f"{parent}: it takes the scheme of the target Linear for {', '.join(parts)}, which is another"
                return
    experts: dict[str, set[Scheme | None]] = {}
    for layer in checkpoint.layers:
        if found := EXPERT.match(f"{layer.name}."):
            experts.setdefault(found[1], set()).add(checkpoint.scheme_of(layer) if layer.quantized else None)
    for name, schemes in experts.items():
        if len(schemes) > 1:
            yield f"{name}: it fuses the experts of a layer, and they have different schemes here"
            return


def _layouts(server: Server) -> dict[str, Mapping[int, tuple[int, ...]]]:
    """Return the group sizes that a server reads, by bits, for checkpoints in the layouts of GPTQ and AWQ."""
    from transformers.utils.quantization_config import QuantizationMethod

    return {QuantizationMethod.GPTQ.value: server.gptq, QuantizationMethod.AWQ.value: server.awq}


def _layout_problems(server: Server, method: str, stored: Mapping[str, Any]) -> list[str]:
    """Judge a checkpoint in the layout of GPTQ or AWQ, by its bits and group size."""
    from transformers.utils.quantization_config import QuantizationMethod

    bits, size = stored.get("bits"), stored.get("group_size")
    if type(bits) is not int or type(size) is not int:
        raise CheckpointError(f"quantization_config of quant_method {method} has no whole numbers bits and group_size")
    sizes = _layouts(server)[method].get(bits)
    problems = []
    if sizes is None or size not in sizes:
        problems.append(f"it has no kernel for {method.upper()} with {bits} bits in groups of {size}")
    if method == QuantizationMethod.GPTQ and stored.get("sym") is False and not server.gptq_zero_points:
        problems.append("it reads no zero points in the layout of GPTQ (sym: false)")
    return problems


def _rope_problems(server: Server, config: Mapping[str, Any]) -> list[str]:
    """Find rotary settings that an old transformers would replace by its defaults, without a word."""
    rope = config.get("rope_parameters")
    if not server.flat_rope or not isinstance(rope, Mapping):
        return []
    usual = rope.get("rope_theta") in (None, 10000, 10000.0) and rope.get("rope_type", "default") == "default"
    if usual or "rope_theta" in config:
        return []
    return [
        "it has transformers 4.51, which does not read rope_parameters and takes a rope_theta of 10000: write "
        "rope_theta (and rope_scaling) into config.json"
    ]


def _list(values: Iterable[Any]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def schemes_in(config: Mapping[str, Any]) -> list[str]:
    """Return the schemes of a configuration in words, for the head of a report; empty for a dense checkpoint."""
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping):
        return []
    if stored.get("quant_method") != "compressed-tensors":
        return [shown(stored.get("quant_method"))]
    return [scheme.label for scheme in dict.fromkeys(read_quantized(stored, []).targets.values())]
