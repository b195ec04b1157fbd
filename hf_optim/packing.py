"""Writing a quantized model as a compressed-tensors checkpoint, through transformers' hook for quantized models.

``quantizer_class()`` is what ``formats.attach_quantizer`` puts on a model: ``save_pretrained`` asks it for the state
dict. It packs module by module and leaves the model in memory as it is.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import CheckpointError
from .packed.coding import checkpoint_tensors
from .packed.linear import OPERAND, PackedLinear
from .quantized import quantized_modules, scheme_on
from .run import find_run

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import CompressedTensorsConfig

logger = logging.getLogger(__name__)


@functools.cache
def quantizer_class() -> type:
    """The quantizer of a model in the state of ``formats``; made when first needed."""
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    class StoredQuantizer(CompressedTensorsHfQuantizer):
        """Saves packed codes, and lets adapters train on top of the frozen weights."""

        use_fp8_kernel = False  # set by validate_environment, which runs only when transformers loads a checkpoint
        is_trainable = True
        is_qat_trainable = False  # type: ignore[assignment]  # transformers reads it as a property

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        def get_state_dict_and_metadata(self, model: Any, *args: Any) -> tuple[dict[str, torch.Tensor] | None, dict]:
            if getattr(model, "_hf_peft_config_loaded", False):
                return None, {}  # only the adapter is saved
            state, loose = packed_state_dict(model)
            if loose:
                logger.warning(
                    "%d of %d quantized weights have changed since they were quantized (a merged adapter, a cast) and "
                    "are saved as they are, in full: %s. Quantize again for a smaller checkpoint.",
                    len(loose),
                    len(quantized_modules(model)),
                    ", ".join(loose[:3]) + (", ..." if len(loose) > 3 else ""),
                )
            self._renew(model, set(loose))
            return state, {}

        def _renew(self, model: Any, loose: set[str]) -> None:
            # save_pretrained writes model.config after this call.
            schemes = stored_schemes(model, loose)
            if schemes:
                self.quantization_config = model.config.quantization_config = quantization_config(model, schemes)
            else:
                model.config.__dict__.pop("quantization_config", None)

    return StoredQuantizer


@torch.no_grad()
def packed_state_dict(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state dict of the compressed checkpoint, and the names of modules that no longer fit their grid.

    A layer that runs on a kernel gives its codes itself; no dense weight is made of it. Elsewhere the codes are
    recovered from the weights in float32, where that is exact: a weight is a code times a scale rounded to the model's
    dtype. Each packed module is decoded again, and must give the weight bit by bit; one that does not (somebody wrote
    into it) keeps its dense weight. So does one whose groups are of scattered columns: stock transformers would read
    its checkpoint without a word, and wrong.
    """
    state = dict(model.state_dict())
    loose = []
    for name, module in model.named_modules():
        if not isinstance(module, PackedLinear) and scheme_on(module) is None:
            continue
        prefix = f"{name}." if name else ""
        own = [*module._parameters, *module._buffers]
        local = {key: state.pop(prefix + key) for key in own if prefix + key in state}
        if isinstance(module, PackedLinear):
            for key in [key for key in state if key.startswith(f"{prefix}{OPERAND}.")]:
                del state[key]
            packed = _given(local, module)
        else:
            packed = pack(local, scheme_on(module))
        if packed is None:
            loose.append(name)
            weight = {"weight": module.decoded()} if isinstance(module, PackedLinear) else {}
            packed = {**{key: value for key, value in local.items() if not key.startswith("weight_")}, **weight}
        state.update({prefix + key: value for key, value in packed.items()})
    return state, loose


def _given(local: Mapping[str, torch.Tensor], module: PackedLinear) -> dict[str, torch.Tensor] | None:
    """The checkpoint's tensors of a layer on a kernel; None if compressed-tensors cannot express it."""
    scheme = scheme_on(module)
    if scheme is None:
        return {**local, "weight": module.decoded()}
    if module.packing.about.ordered:
        return None
    packed = {**local, **checkpoint_tensors(module.codes(), scheme)}
    if scheme.input_activations is not None and scheme.input_activations.symmetric:
        packed.pop("input_zero_point", None)
    return packed


def pack(local: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> dict[str, torch.Tensor] | None:
    """Compress the tensors of one module; None if they do not decode to its weight again."""
    if scheme.weights is None:
        return dict(local)
    if "weight_g_idx" in local:
        return None
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(str(getattr(scheme.format, "value", scheme.format)))
    wide = {key: value.float() if key in ("weight", "weight_scale") else value for key, value in local.items()}
    packed = compressor.compress(wide, scheme)
    packed["weight_scale"] = local["weight_scale"]
    decoded = compressor.decompress(packed, scheme)["weight"]
    return packed if torch.equal(decoded, local["weight"]) else None


def keep_readable(model: Any) -> None:
    """Store one code to a byte, under the name ``weight``, where transformers could not prepare a packed model.

    Before it reads weights, transformers initializes the modules. Some classes (T5) do that through ``module.weight``,
    which a packed linear does not have. Tried here on a twin without data.
    """
    packed = {n: m for n, m in quantized_modules(model).items() if scheme_on(m).format == "pack-quantized"}
    if not packed or _initializes_without_weights(model, packed):
        return
    for module in packed.values():
        scheme_on(module).format = "naive-quantized"
    sentence = (
        f"Codes are stored one to a byte: transformers cannot prepare a packed {type(model).__name__}, whose "
        "initialization reads the weights of its linears."
    )
    logger.warning(sentence)
    if (run := find_run(model)) is not None:
        run.record.note(sentence)


def _initializes_without_weights(model: Any, names: Iterable[str]) -> bool:
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"), torch.no_grad():
        twin = type(model)(config)
        for name in names:
            del twin.get_submodule(name).weight
        try:
            for module in twin.modules():
                twin._init_weights(module)
        except AttributeError as error:
            if "weight" not in str(error):
                raise
            return False
    return True


def stored_schemes(model: nn.Module, loose: Iterable[str] = ()) -> dict[str, QuantizationScheme]:
    """The scheme of every quantized module, by name; of a module with a dense weight, what is left of it."""
    schemes: dict[str, QuantizationScheme] = {name: scheme_on(m) for name, m in quantized_modules(model).items()}
    for name in loose:
        left = schemes.pop(name)
        if left.input_activations is not None:
            schemes[name] = left.model_copy(update={"weights": None, "format": "dense"})
    return schemes


def quantization_config(model: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> CompressedTensorsConfig:
    """The ``quantization_config`` of config.json: the schemes, and patterns that hit exactly their modules."""
    from transformers import CompressedTensorsConfig

    by_scheme: dict[str, tuple[QuantizationScheme, list[str]]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme.model_dump_json(exclude={"targets"}), (scheme, []))[1].append(name)
    targets, ignore = patterns(model, [names for _, names in by_scheme.values()])
    groups: dict[str, Any] = {
        f"group_{i}": {**scheme.model_dump(), "targets": found}
        for i, ((scheme, _), found) in enumerate(zip(by_scheme.values(), targets, strict=True))
    }
    formats = {str(getattr(s.format, "value", s.format)) for s, _ in by_scheme.values()}
    return CompressedTensorsConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=ignore,
    )


def patterns(model: nn.Module, groups: list[list[str]]) -> tuple[list[list[str]], list[str]]:
    """Target patterns per group of module names, and patterns to ignore, in compressed-tensors' language.

    The class ``Linear`` and an ignore list where all is quantized alike; else regular expressions without layer
    numbers; else plain names. The first form that hits exactly the groups is taken. Raises ``CheckpointError`` if
    none does.
    """
    named = dict(model.named_modules())
    chosen = {name for names in groups for name in names}
    others = [name for name, m in named.items() if isinstance(m, nn.Linear) and name not in chosen]
    general = [_generalize(names) for names in groups]
    forms: list[tuple[list[list[str]], list[str]]] = []
    if len(groups) == 1:
        forms += [([["Linear"]], others), ([["Linear"]], _generalize(others))]
        if len(others) > 8:
            forms.reverse()
    forms += [(general, []), ([sorted(names) for names in groups], [])]
    wanted = {name: i for i, names in enumerate(groups) for name in names}
    for targets, ignore in forms:
        if _hits(named, targets, ignore) == wanted:
            return targets, ignore
    raise CheckpointError("no compressed-tensors pattern tells the quantized modules of this model from the others")


def _generalize(names: Iterable[str]) -> list[str]:
    # Any prefix is admitted, so that the base model of a checkpoint, or a class with another head, matches as well.
    found = {r"re:(?:.*\.)?" + re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) + "$" for name in names}
    return sorted(found)


def _hits(named: Mapping[str, nn.Module], targets: list[list[str]], ignore: list[str]) -> dict[str, int]:
    from compressed_tensors.utils.match import is_match, match_targets

    group_of = {target: i for i, found in enumerate(targets) for target in found}
    hits = {}
    for name, module in named.items():
        matched = match_targets(name, module, list(group_of))
        if matched and isinstance(module, (nn.Linear, nn.Embedding)) and not is_match(name, module, ignore):
            hits[name] = group_of[matched[0]]
    return hits
