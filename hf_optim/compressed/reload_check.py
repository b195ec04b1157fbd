"""Checking before any work that stock transformers could load the compressed checkpoint that a step would write.

A step claims with its reload level that stock transformers reads its result. Whether it does depends on the class of
the model and on the version of transformers: some conversions of names cannot be combined with a quantizer, and some
modules are replaced by others in a compressed model. So the claim is tried: ``reload_problem`` puts a copy of the
model on the meta device into the quantized state, without values, and lets transformers load what would be saved.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from ..errors import ModelError, OptimError
from ..recipes.contract import Reload
from ..recipes.technique import Technique
from ..recipes.traits import QUANTIZED
from ..runs.progress import silenced
from ..runs.scope import Scope
from ..toolkit.checkpoint.placement import load_placed
from ..toolkit.topology.experts import ExpertLinear, fused_experts
from ..toolkit.topology.fake_model import copy_with_tensors
from ..toolkit.topology.selection import PatternError
from ..toolkit.topology.trace_cache import StructureCache, structure
from ..trust.code import is_stock
from .codec import scheme_on
from .dense_conversions import keep_model_names
from .experts import SCALE, attach_expert_schemes, expert_schemes, per_channel
from .float4 import GLOBAL, float4_format
from .quantization_config import quantization_config, stored_schemes
from .quantizer import packed_modules, packing_fits
from .schemes import embedding_scheme
from .schemes import scheme as make_scheme
from .state_dict import packed_state_dict
from .step_scheme import scheme_of_step
from .storability import FP8_REMEDY, storable, takes_embeddings, unstorable_pattern

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

log = logging.getLogger(__name__)

UNPACKED = "naive-quantized"


def require_reloadable(step: Technique, model: Any, label: str, own_code: bool = False) -> None:
    """Raise ``ModelError`` if stock transformers could not load the compressed checkpoint of ``model`` after ``step``.

    A step that does not write a compressed format passes, and so does one that finds no layers: it reports that itself.
    Of a class that is not one of transformers, or will not be, only the experts are checked.

    Args:
        step: a step of a recipe.
        model: the model as the step finds it; it may be on the meta device.
        label: the beginning of the message.
        own_code: the checkpoint will have code of its own, because of another step.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return  # it has quantized layers, which the step itself accepts or refuses
    if QUANTIZED not in step.contract().adds or step.reload() is not Reload.STOCK_FORMAT:
        return
    integer = getattr(step, "format", "int") == "int" and getattr(step, "bits", 8) is not None
    targets, skip = getattr(step, "targets", ("Linear",)), tuple(getattr(step, "skip", ()))
    symmetric = getattr(step, "symmetric", True)
    scope = Scope("", model, model)
    try:
        layers, _ = storable(
            scope, targets, skip, integer, label, experts=True, symmetric=symmetric, embeddings=takes_embeddings(step)
        )
        if why := unstorable_pattern(scope, targets, integer, takes_embeddings(step)):
            raise ModelError(f"{label}: in {type(model).__name__}, {why}")
    except PatternError as error:
        raise PatternError(f"{label}: {error} in {type(model).__name__}") from error
    except ModelError as error:
        raise ModelError(_without_fp8(str(error), scope, targets, skip)) from error
    scheme = scheme_of_step(step)
    if not layers or own_code or not is_stock(model) or not (problem := reload_problem(model, layers, scheme)):
        return
    if reload_problem(model, {}, scheme):
        log.warning(
            "%s could not be loaded by stock transformers, whatever is saved of it: %s", type(model).__name__, problem
        )
        return
    raise ModelError(
        f"{label}: stock transformers {transformers.__version__} could not load a compressed checkpoint of "
        f"{type(model).__name__}, so it is not made: {problem}. Use `hf-optim compress --dense`, which writes the "
        "same values as an ordinary checkpoint, or a technique that keeps floating-point weights"
    )


def _without_fp8(message: str, scope: Scope, targets: tuple[str, ...], skip: tuple[str, ...]) -> str:
    """Return an error of ``storable``, without the advice to use fp8 if stock transformers could not load that."""
    if message.endswith(FP8_REMEDY) and is_stock(scope.model):
        layers, _ = storable(scope, targets, skip, integer=False)
        if reload_problem(scope.model, layers, make_scheme(8, "float")):
            return message.removesuffix(FP8_REMEDY) + "Use a technique that keeps floating-point weights"
    return message


_problems = StructureCache()
"""What was found for recent structures, layers and schemes."""


def reload_problem(model: Any, layers: Mapping[str, Any], scheme: QuantizationScheme) -> str:
    """Return why stock transformers could not load ``model`` with these layers stored by a scheme, or ``""``.

    Args:
        model: the model; it is not changed.
        layers: linear layers and matrices of experts by name, as ``storable`` returns them; none for an ordinary
            checkpoint.
        scheme: how they are stored, with one scale for each channel.
    """
    # A structure leaves out what a loaded model converts when it is saved.
    key = (
        None if any(vars(module).get("_weight_conversions") for module in model.modules()) else structure(model, {}, ())
    )
    if key is not None:
        key = key, tuple((name, type(layer)) for name, layer in layers.items()), scheme.model_dump_json()
    problem: str = _problems.get(key, lambda: _tried(model, layers, scheme))
    return problem


@torch.no_grad()
def _tried(model: Any, layers: Mapping[str, Any], scheme: QuantizationScheme) -> str:
    try:
        config, state = _claimed(model, layers, scheme)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        log.debug("%s cannot be copied without its weights: %s", type(model).__name__, error)
        return ""
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            load_placed(
                functools.partial(_load, type(model), config, state, model.dtype), config, state, "its checkpoint"
            )
    except OptimError as error:
        return str(error)
    return ""


def _claimed(model: Any, layers: Mapping[str, Any], scheme: QuantizationScheme) -> tuple[Any, dict[str, Tensor]]:
    """Return the configuration and the state dict, without values, that would be saved."""
    skeleton: Any = copy_with_tensors(model, _on_meta)
    for name, layer in layers.items():
        if isinstance(layer, ExpertLinear):
            _claim_expert(skeleton.get_submodule(layer.experts_name), layer.parameter, scheme)
        else:
            _claim(skeleton.get_submodule(name), scheme)
    keep_model_names(skeleton)
    packed = packed_modules(skeleton)
    if packed and not packing_fits(skeleton, packed):
        for module in packed.values():
            scheme_on(module).format = UNPACKED
    config = copy.deepcopy(skeleton.config)
    if schemes := stored_schemes(skeleton):
        config.quantization_config = quantization_config(skeleton, schemes, model).to_dict()
    return config, _saved_names(skeleton, packed_state_dict(skeleton)[0])


def _load(
    cls: Any, config: Any, state: dict[str, Tensor], dtype: torch.dtype, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a state dict on the meta device with stock transformers; return the model and transformers' loading info."""
    model, info = cls.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, device_map={"": "meta"}, **kwargs
    )
    # Without the values of weight_shape, the width of a packed weight is only known up to the codes of one word.
    stacks = {f"{name}.{key}" for name, m in fused_experts(model).items() for key in m._parameters}
    info["mismatched_keys"] = {
        (name, stored, built)
        for name, stored, built in info["mismatched_keys"]
        if not (name in stacks and _padded(stored, built))
    }
    return model, info


def _padded(stored: Sequence[int], built: Sequence[int]) -> bool:
    """Return True if one size differs, by fewer values than a word of codes holds."""
    more = [a - b for a, b in zip(stored, built, strict=False) if a != b]
    return len(stored) == len(built) and len(more) == 1 and 0 < more[0] < 32


def _saved_names(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under the names that ``save_pretrained`` writes, without the names of tied weights."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return revert_weight_conversion(model, {name: value for name, value in state.items() if name not in tied})  # type: ignore[arg-type, return-value]


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _claim(module: nn.Module, scheme: QuantizationScheme) -> None:
    """Put a linear layer on the meta device into the quantized state."""
    weight: Any = module.weight
    scheme = embedding_scheme(scheme) if isinstance(module, nn.Embedding) else scheme.model_copy(deep=True)
    module.quantization_scheme = scheme
    if scheme.weights is not None:
        scale = weight.new_empty(len(weight), 1)
        _register(module, "weight_scale", scale)
        if float4_format(scheme.weights) == "nvfp4":
            _register(module, GLOBAL, weight.new_empty(1, dtype=torch.float32))
        if not scheme.weights.symmetric:
            _register(module, "weight_zero_point", torch.empty_like(scale, dtype=torch.int8))
    inputs = scheme.input_activations
    if inputs is not None and not inputs.dynamic:
        _register(module, "input_scale", weight.new_empty(1))
        if not inputs.symmetric:
            _register(module, "input_zero_point", weight.new_empty(1, dtype=torch.int8))


def _claim_expert(module: nn.Module, parameter: str, scheme: QuantizationScheme) -> None:
    known = expert_schemes(module)
    if parameter in known:
        return
    fused = module.get_parameter(parameter)
    rows = fused.shape[2] if getattr(module, "is_transposed", False) else fused.shape[1]
    _register(module, parameter + SCALE, fused.new_empty(len(fused), rows, 1))
    attach_expert_schemes(module, {**known, parameter: per_channel(scheme)})


def _register(module: nn.Module, name: str, tensor: Tensor) -> None:
    module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the load report and the progress bars of transformers and compressed-tensors."""
    from loguru import logger as log
    from transformers.utils import logging as theirs

    level = theirs.get_verbosity()
    theirs.set_verbosity(logging.CRITICAL)
    log.disable("compressed_tensors")
    try:
        with silenced(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.enable("compressed_tensors")
        theirs.set_verbosity(level)
