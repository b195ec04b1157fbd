"""What is checked of one class: stock transformers alone, then each recipe."""

from __future__ import annotations

import dataclasses
import shutil
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import hf_optim

from ...errors import ModelError, OptimError, RecipeError
from ..stock import StockTransformers, first_output
from .configurations import tiny_config
from .inputs import random_inputs
from .recipes import RECIPES

MAX_PARAMETERS = 6_000_000
PASS, REFUSED, FAIL = "pass", "refused", "FAIL"
KERNEL_ERROR = 0.02
"""Largest relative error of a forward on kernels: they sum in another order, and quantize inputs of other roundings."""


@dataclasses.dataclass
class Result:
    """What came out for one class.

    Attributes:
        stock: why stock transformers alone cannot build, run, save and reload the class; empty if it can.
        recipes: recipe -> (outcome, reason).
        parameters: of the tiny model.
        seconds: wall-clock time.
    """

    stock: str = ""
    recipes: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    parameters: int = 0
    seconds: float = 0.0


class Unequal(Exception):
    """A reloaded model computes something else."""


def check_class(name: str, folder: Path, stock: StockTransformers, recipes: Iterable[str] = RECIPES) -> Result:
    """Return the result of a class.

    Args:
        name: of the class, in ``transformers``.
        folder: an empty folder to work in.
        stock: a process without hf_optim.
        recipes: keys of ``RECIPES``.
    """
    result, started = Result(), time.perf_counter()
    try:
        model = build(name)
        result.parameters = sum(parameter.numel() for parameter in model.parameters())
        require_stock(model, folder / "stock", stock)
    except Exception as error:
        result.stock = describe(error)
    else:
        batches = [random_inputs(model, seed) for seed in range(2)]
        for recipe in recipes:
            result.recipes[recipe] = check_recipe(type(model), folder / "stock", recipe, batches, folder / "out", stock)
            shutil.rmtree(folder / "out", ignore_errors=True)
    result.seconds = round(time.perf_counter() - started, 1)
    return result


def build(name: str) -> PreTrainedModel:
    """Build a tiny model, in evaluation mode. No two parameters have equal values, and none is all zeros or ones."""
    cls = getattr(transformers, name)
    config = tiny_config(cls.config_class, name)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in cls(config).parameters())
    if parameters > MAX_PARAMETERS:
        raise ValueError(f"the smallest configuration has {parameters:,} parameters")
    torch.manual_seed(0)
    model = cls(tiny_config(cls.config_class, name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():  # others (sinusoids) are not always saved
                parameter += 0.02 * torch.randn_like(parameter)
    return model


def require_stock(model: PreTrainedModel, folder: Path, stock: StockTransformers) -> None:
    """Save with stock ``save_pretrained``. Raises an error unless it is reloaded to equal outputs."""
    inputs = random_inputs(model, 99)
    expected = outputs(model, inputs)
    if not torch.isfinite(expected).all():
        raise ValueError("the output is not finite")
    require_equal(outputs(model, inputs), expected, "a second forward")
    model.save_pretrained(folder)
    _require_stock_reload(stock, folder, type(model).__name__, inputs, expected)


def check_recipe(
    cls: type[PreTrainedModel],
    source: Path,
    recipe: str,
    batches: list[dict[str, Tensor]],
    folder: Path,
    stock: StockTransformers | None,
) -> tuple[str, str]:
    """Return the outcome of a recipe on a checkpoint, and the reason. Without ``stock``, it is not reloaded there."""
    try:
        model = cls.from_pretrained(source, optim_config=RECIPES[recipe], calibration=batches)
    except (ModelError, RecipeError) as refusal:
        return REFUSED, describe(refusal)
    except Exception as error:
        return FAIL, f"optimizing: {describe(error)}"
    doing = "forward"
    try:
        _restored(model)
        inputs = random_inputs(model, 99)
        expected = outputs(model.eval(), inputs)
        doing = "saving"
        model.save_pretrained(folder)
        doing = "stock reload"
        if stock is not None:
            _require_stock_reload(stock, folder, cls.__name__, inputs, expected)
        doing = "auto"
        loaded = cls.from_pretrained(folder, optim_config="auto").eval()
        found = outputs(loaded, inputs)
        loaded = _restored(loaded)
        _require_close(loaded, found, inputs, expected)
        doing = "auto, restored"
        require_equal(outputs(loaded, inputs), expected, "the model")
    except Exception as error:
        return FAIL, f"{doing}: {describe(error)}"
    return PASS, ""


def _restored(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model off its kernels, which may add in another order."""
    hf_optim.restore(model)
    return model


def outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits of a model, or what it returns instead. Random numbers in a forward are the same ones."""
    # Tensors of a mapped file may be unaligned, and on some processors unaligned sums round differently.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return first_output(model(**{key: value.clone() for key, value in inputs.items()})).clone()


def require_equal(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise ``Unequal`` unless two outputs are equal to the bit."""
    if found.shape != expected.shape or not torch.equal(found, expected):
        raise Unequal(f"{what} differs by {_distance(found, expected):.2g} of the norm")


def _require_close(dense: PreTrainedModel, found: Tensor, inputs: dict[str, Tensor], expected: Tensor) -> None:
    """Raise ``Unequal`` if a forward on kernels differs by more than rounding changes in the model without kernels."""
    distance = _distance(found, expected)
    if distance > KERNEL_ERROR and distance > 4 * _rounding_error(dense, inputs, expected):
        raise Unequal(f"on kernels the output differs by {distance:.2g} of the norm")


def _rounding_error(model: PreTrainedModel, inputs: dict[str, Tensor], expected: Tensor) -> float:
    """Return how far the output moves if the parameters of norms change by a millionth, the most of three trials.

    Inputs in 8 bits turn a difference in the last bit into one of a step; small random models amplify it.
    """
    norms = [p for name, p in model.named_parameters() if "norm" in name.lower() and p.is_floating_point()]
    generator, errors = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for _ in range(3):
            kept = [parameter.clone() for parameter in norms]
            for parameter in norms:
                parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
            errors.append(_distance(outputs(model, inputs), expected))
            for parameter, value in zip(norms, kept, strict=True):
                parameter.copy_(value)
    return max(errors)


def _distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def _require_stock_reload(
    stock: StockTransformers, folder: Path, name: str, inputs: dict[str, Tensor], expected: Tensor
) -> None:
    reloaded = stock.load(folder, name, inputs)
    if reloaded.missing:
        raise Unequal(f"{len(reloaded.missing)} tensors are not in the checkpoint, such as {reloaded.missing[0]}")
    require_equal(reloaded.output, expected, "the reloaded model")


def describe(error: BaseException) -> str:
    """Return an error in one line; of one that is not of hf_optim, with the line of code that raised it."""
    text = " ".join(str(error).split())[:400]
    if isinstance(error, (OptimError, Unequal)):
        return f"{type(error).__name__}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "hf_optim" in frame.filename and "testing" not in frame.filename]
    shown = [*ours[-2:], *frames[-1:]]
    where = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in shown)
    return f"{type(error).__name__}: {text} ({where})"
