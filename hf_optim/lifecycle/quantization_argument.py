"""A recipe as transformers' own argument: ``from_pretrained(quantization_config=OptimQuantizationConfig(...))``.

The wrapper of ``from_pretrained`` takes the recipe, the data and the tokenizer out of it, and goes on as with
``optim_config``: the model and the checkpoint are the same, and the name of this configuration is never written. It is
registered with transformers, so that a call that does not go through the wrapper, and a checkpoint that claims this
name, is refused; transformers would skip a name it does not know, and leave the weights at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError, RecipeError
from ..recipes.config import OptimConfig

METHOD = "hf_optim"
AUTO = "auto"


@register_quantization_config(METHOD)
class OptimQuantizationConfig(QuantizationConfigMixin):
    """A recipe for ``from_pretrained(quantization_config=...)``; the same as its ``optim_config=``.

    Args:
        recipe: anything that ``optim_config`` accepts: an ``OptimConfig``, a technique, a list of techniques or
            mappings, a mapping, the path of a YAML or JSON file, or the name of a shipped recipe, of a technique or of
            a scheme; ``"auto"`` runs a compressed checkpoint on kernels.
        calibration: calibration data, see ``hf_optim.optimize``; None for what the recipe names.
        tokenizer: the tokenizer or processor for texts and images; None loads the one of the model's checkpoint.

    Raises ``RecipeError`` for a recipe that cannot be read.
    """

    def __init__(self, recipe: Any, calibration: Any = None, tokenizer: Any = None) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        automatic = isinstance(recipe, str) and recipe == AUTO
        self.recipe: str | OptimConfig = AUTO if automatic else OptimConfig.parse(recipe)
        self.calibration, self.tokenizer = calibration, tokenizer

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> NoReturn:
        """Raise ``CheckpointError``: a recipe is never read from a checkpoint."""
        raise CheckpointError(
            f"the quantization_config of this checkpoint names the method {METHOD!r}, which hf_optim never writes: "
            "its checkpoints are in the format compressed-tensors"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe in JSON types, without data and tokenizer."""
        return {
            "quant_method": METHOD,
            "recipe": self.recipe if isinstance(self.recipe, str) else self.recipe.to_dict(),
        }

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


@register_quantizer(METHOD)
class _Refused(HfQuantizer):
    """Raises where transformers meets the configuration without hf_optim's ``from_pretrained``."""

    def __new__(cls, *args: Any, **kwargs: Any) -> NoReturn:  # before abstract methods are looked for
        raise RecipeError(
            "OptimQuantizationConfig reached transformers' own loading, which cannot run a recipe: load with "
            "from_pretrained of a transformers class while hf_optim is imported, or pass optim_config="
        )


def take_recipe(kwargs: dict[str, Any], optim_config: Any) -> Any:
    """Return the ``optim_config`` of a call, with what an ``OptimQuantizationConfig`` in its arguments says.

    It is removed from ``kwargs``, which get its data and tokenizer.

    Args:
        kwargs: the arguments of ``from_pretrained``, with ``quantization_config``; changed in place.
        optim_config: the argument of that name, or None.

    Raises ``RecipeError`` if the call gives the recipe, the data or the tokenizer twice.
    """
    given = kwargs["quantization_config"]
    if isinstance(given, Mapping) and given.get("quant_method") == METHOD:
        raise RecipeError(f"pass hf_optim.OptimQuantizationConfig(...), not a mapping for {METHOD!r}")
    if not isinstance(given, OptimQuantizationConfig):
        return optim_config
    if optim_config is not None:
        raise RecipeError("optim_config and quantization_config both hold a recipe: pass one of them")
    del kwargs["quantization_config"]
    for name in ("calibration", "tokenizer"):
        value = getattr(given, name)
        if value is not None and kwargs.get(name) is not None:
            raise RecipeError(f"{name} is given both to OptimQuantizationConfig and to from_pretrained: pass it once")
        if value is not None:
            kwargs[name] = value
    return given.recipe
