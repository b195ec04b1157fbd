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
from .experts import SCALE, checkpoint_modules, expert_schemes, forget_decoding, packed_experts, stored_scheme
from .packed.coding import checkpoint_tensors
from .packed.linear import OPERAND, PackedLinear
from .quantized import quantized_modules, scheme_on
from .run import find_run
from .toolkit.experts import stacks

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
            forget_decoding(model)
            state, loose = packed_state_dict(model)
            if loose:
                logger.warning(
                    "%d of %d quantized weights have changed since they were quantized (a merged adapter, a cast, "
                    "experts that transformers decoded) and are saved as they are, in full: %s. Quantize again for a "
                    "smaller checkpoint.",
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
def packed_state_dict(
    model: nn.Module, owner: nn.Module | None = None, inside: str = ""
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state dict of the compressed checkpoint, and the names of modules that no longer fit their grid.

    A layer that runs on a kernel gives its codes itself; no dense weight is made of it. Elsewhere the codes are
    recovered from the weights in float32, where that is exact: a weight is a code times a scale rounded to the model's
    dtype. Each packed module is decoded again, and must give the weight bit by bit; one that does not (somebody wrote
    into it) keeps its dense weight. So does one whose groups are of scattered columns: stock transformers would read
    its checkpoint without a word, and wrong.

    Experts are packed all or none: stock transformers reads them in no other way. If one no longer fits its grid, the
    whole checkpoint is dense.

    Args:
        model: a model, or a part of one.
        owner, inside: for a part, the model that it is of and the name that it has there: the names of experts in a
            checkpoint are a matter of the whole model.
    """
    state = dict(model.state_dict())
    loose = []
    experts = _packed_experts(model, owner or model, inside)
    as_they_are = experts is None
    for name, module in model.named_modules():
        if expert_schemes(module):
            _put_experts(state, name, module, experts)
            loose += [name] if experts is None else []
            continue
        if not isinstance(module, PackedLinear) and scheme_on(module) is None:
            continue
        prefix = f"{name}." if name else ""
        own = [*module._parameters, *module._buffers]
        local = {key: state.pop(prefix + key) for key in own if prefix + key in state}
        packed: dict[str, torch.Tensor] | None
        if isinstance(module, PackedLinear):
            for key in [key for key in state if key.startswith(f"{prefix}{OPERAND}.")]:
                del state[key]
            packed = None if as_they_are else _given(local, module)
        else:
            packed = None if as_they_are else pack(local, scheme_on(module))
        if packed is None:
            loose.append(name)
            weight = {"weight": module.decoded()} if isinstance(module, PackedLinear) else {}
            packed = {**{key: value for key, value in local.items() if not key.startswith("weight_")}, **weight}
        state.update({prefix + key: value for key, value in packed.items()})
    return state, loose


def _packed_experts(model: nn.Module, owner: Any, inside: str) -> dict[str, dict[str, torch.Tensor]] | None:
    """The checkpoint's tensors of every quantized stack of experts; None if one does not fit its grid any more."""
    integer = any(s.weights is not None and s.weights.type == "int" for s in map(scheme_on, model.modules()) if s)
    if integer and any(not expert_schemes(stack) for stack in stacks(model).values()):
        return None  # transformers decoded them while it loaded the checkpoint
    common = stored_scheme(model)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, module in model.named_modules():
        if common is not None and expert_schemes(module):
            packed = packed_experts(owner, ".".join(filter(None, (inside, name))), common)
            if packed is None:
                return None
            found[name] = {key.removeprefix(f"{inside}."): value for key, value in packed.items()}
    return found


def _put_experts(state: dict[str, torch.Tensor], name: str, stack: nn.Module, packed: Any) -> None:
    """Replace the tensors of a stack of experts by their packed form, or leave the decoded weights alone."""
    prefix = f"{name}." if name else ""
    for parameter in expert_schemes(stack):
        del state[f"{prefix}{parameter}{SCALE}"]
        if packed is not None:
            del state[prefix + parameter]
    state.update({} if packed is None else packed[name])


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
    packed = packed_modules(model)
    if packed and not _initializes_without_weights(model, packed):
        store_bytes(model, packed)


def packed_modules(model: Any, inside: str = "") -> dict[str, nn.Module]:
    """The quantized linears of a model whose codes are packed, by full name; only those inside the module ``inside``.

    Experts are none: they exist as linears in the checkpoint only.
    """
    holder = model.get_submodule(inside) if inside else model
    found = quantized_modules(holder).items()
    named = {f"{inside}.{name}" if inside and name else inside + name: m for name, m in found}
    return {n: m for n, m in named.items() if scheme_on(m).format == "pack-quantized" and not expert_schemes(m)}


def store_bytes(model: Any, packed: Mapping[str, nn.Module]) -> None:
    """Store the codes of these modules one to a byte, and note why on the model's record."""
    for module in packed.values():
        scheme_on(module).format = "naive-quantized"
    sentence = (
        f"Codes are stored one to a byte: transformers cannot prepare a packed {type(model).__name__}, whose "
        "initialization reads the weights of its linears."
    )
    if (run := find_run(model)) is not None:
        if sentence in run.record.notes:
            return
        run.record.note(sentence)
    logger.warning(sentence)


class Readability:
    """``keep_readable`` for a model that is quantized and written block by block: found out at the first block."""

    def __init__(self) -> None:
        self._readable: bool | None = None

    def settle(self, run: Any, name: str) -> None:
        """Settle how the codes of the module ``name`` are stored, before they are written."""
        packed = packed_modules(run.model, name)
        if not packed:
            return
        if self._readable is None:
            self._readable = _initializes_without_weights(run.model, packed)
        if not self._readable:
            store_bytes(run.model, packed)


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
    """The scheme of every quantized module, by name; of a module with a dense weight, what is left of it.

    Stacks of experts have the one scheme in which all of them are written.
    """
    schemes: dict[str, QuantizationScheme] = {name: scheme_on(m) for name, m in quantized_modules(model).items()}
    experts = stored_scheme(model)
    schemes |= {name: experts for name, m in model.named_modules() if experts is not None and expert_schemes(m)}
    for name in loose:
        left = schemes.pop(name)
        if left.input_activations is not None:
            schemes[name] = left.model_copy(update={"weights": None, "format": "dense"})
    return schemes


def quantization_config(model: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> CompressedTensorsConfig:
    """The ``quantization_config`` of config.json: the schemes, and patterns that hit exactly their modules."""
    from transformers import CompressedTensorsConfig

    by_scheme: dict[str, tuple[QuantizationScheme, list[str]]] = {}
    experts = {name: scheme for name, scheme in schemes.items() if expert_schemes(model.get_submodule(name))}
    for name, scheme in schemes.items():
        if name not in experts:
            by_scheme.setdefault(_key(scheme), (scheme, []))[1].append(name)
    targets, ignore = patterns(model, [names for _, names in by_scheme.values()])
    common = next(iter(experts.values()), None)
    if common is not None and (targets != [["Linear"]] or [*by_scheme] != [_key(common)]):
        # transformers takes the scheme of experts from the first group that has a pattern with this word.
        by_scheme = {"experts": (common, []), **by_scheme}
        targets = [expert_patterns(checkpoint_modules(model)), *targets]
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


def _key(scheme: QuantizationScheme) -> str:
    return scheme.model_dump_json(exclude={"targets"})


def expert_patterns(names: Iterable[str]) -> list[str]:
    """Patterns for experts by the end of their names: what is before it differs between model and checkpoint."""
    ends = sorted({re.sub(r"^.*?([^.]*experts[^.]*)\.\d+\.", r"\1.0.", name) for name in names})
    return [r"re:.*\b" + re.escape(end).replace(r"\.0\.", r"\.\d+\.", 1) + "$" for end in ends]


def patterns(model: nn.Module, groups: list[list[str]]) -> tuple[list[list[str]], list[str]]:
    """Target patterns per group of module names, and patterns to ignore, in compressed-tensors' language.

    The class ``Linear`` and an ignore list where all is quantized alike; else expressions without layer numbers; else
    one for each module. The first form that hits exactly the groups is taken. They hit the same modules in the base
    model, and under another head. Raises ``CheckpointError`` if none does.
    """
    named = dict(model.named_modules())
    chosen = {name for names in groups for name in names}
    others = [name for name, m in named.items() if isinstance(m, nn.Linear) and name not in chosen]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    bare = [[name.removeprefix(prefix) for name in names] for names in groups]
    spared = [name.removeprefix(prefix) for name in others]
    forms: list[tuple[list[list[str]], list[str]]] = []
    if len(groups) == 1:
        forms += [([["Linear"]], _exactly(spared)), ([["Linear"]], _generalize(spared))]
        if len(others) > 8:
            forms.reverse()
    forms += [([_generalize(names) for names in bare], []), ([_exactly(names) for names in bare], [])]
    wanted = {name: i for i, names in enumerate(groups) for name in names}
    for targets, ignore in forms:
        if _hits(named, targets, ignore) == wanted:
            return targets, ignore
    raise CheckpointError("no compressed-tensors pattern tells the quantized modules of this model from the others")


def _exactly(names: Iterable[str]) -> list[str]:
    # A head is named alike everywhere; what lies in the base model may have a prefix or not.
    return sorted(_anywhere(re.escape(name)) if "." in name else name for name in names)


def _generalize(names: Iterable[str]) -> list[str]:
    return sorted({_anywhere(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))) for name in names})


def _anywhere(pattern: str) -> str:
    return r"re:(?:.*\.)?" + pattern + "$"


def _hits(named: Mapping[str, nn.Module], targets: list[list[str]], ignore: list[str]) -> dict[str, int]:
    from compressed_tensors.utils.match import is_match, match_targets

    group_of = {target: i for i, found in enumerate(targets) for target in found}
    hits = {}
    for name, module in named.items():
        matched = match_targets(name, module, list(group_of))
        if matched and isinstance(module, (nn.Linear, nn.Embedding)) and not is_match(name, module, ignore):
            hits[name] = group_of[matched[0]]
    return hits
