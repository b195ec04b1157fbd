"""``OptimQuantizer``: hf_optim behind the quantizer interface of optimum (``optimum.quantization_base``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimum.quantization_base import OptimumQuantizer
from transformers import PreTrainedModel

from ..checkpoints.source import ModelSource, find_processor, load_model, load_processor
from ..errors import RecipeError
from ..recipes.config import OptimConfig
from .loading import optimize


class OptimQuantizer(OptimumQuantizer):
    """Runs any hf_optim recipe through optimum's ``from_pretrained`` and ``quantize``::

        quantizer = OptimQuantizer.from_pretrained("org/model")
        quantizer.quantize("model-w4a16", recipe="w4a16", calibration="calibration.jsonl")

    Attributes:
        model: the model; after ``quantize`` the optimized one.
        tokenizer: its tokenizer (or image processor), which is saved with it; None if it has none.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: PreTrainedModel | str | Path,
        file_name: str | None = None,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        tokenizer: Any = None,
    ) -> OptimQuantizer:
        """Return a quantizer for a checkpoint (a Hub id or a directory), or for a model in memory.

        Args:
            model_or_path: the model, its Hub id or its directory.
            file_name: not supported; the files of a transformers checkpoint have fixed names.
            revision, dtype, trust_remote_code: how a checkpoint is loaded.
            tokenizer: None loads the one in the checkpoint.

        Raises ``ModelError`` or ``CheckpointError`` if the model cannot be loaded, and ``RecipeError`` for
        ``file_name``.
        """
        _refuse_file_name("file_name", file_name)
        if isinstance(model_or_path, PreTrainedModel):
            home = getattr(model_or_path.config, "_name_or_path", "")
            return cls(model_or_path, tokenizer or find_processor(home, model_or_path.main_input_name))
        source = ModelSource(str(model_or_path), revision, dtype, trust_remote_code)
        model = load_model(source)
        return cls(model, tokenizer or load_processor(source, type(model)))

    def quantize(
        self,
        save_dir: str | Path,
        file_prefix: str | None = None,
        *,
        recipe: Any = "w8a8",
        calibration: Any = None,
        **kwargs: Any,
    ) -> Path:
        """Optimize the model and save it, with its record and model card. Returns the directory.

        Args:
            save_dir: the directory to write.
            file_prefix: not supported; transformers loads files with fixed names.
            recipe: anything that ``optim_config`` accepts, with steps that need no training.
            calibration: anything that ``hf_optim.optimize`` accepts.
            kwargs: arguments of ``save_pretrained``, such as ``max_shard_size``.

        Raises ``RecipeError`` if a stage trains, and whatever ``hf_optim.optimize`` raises.
        """
        _refuse_file_name("file_prefix", file_prefix)
        recipe = OptimConfig.parse(recipe)
        for stage in recipe.stages:
            if stage.trains:
                raise RecipeError(f"{stage.label} trains: use hf_optim.OptimTrainer, or `hf-optim compress`")
        self.model = optimize(self.model, recipe, calibration, tokenizer=self.tokenizer)
        self.model.save_pretrained(save_dir, **kwargs)
        return Path(save_dir)


def _refuse_file_name(argument: str, value: str | None) -> None:
    if value is not None:
        raise RecipeError(
            f"{argument}={value!r} is not supported: checkpoints have the file names that transformers loads"
        )
