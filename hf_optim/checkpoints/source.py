"""Where a model comes from: a checkpoint on the Hub or on disk, how it is loaded, and what it weighs there."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import CheckpointError, ModelError, OptimError
from ..evaluation.sizes import bytes_on_disk, parameter_bytes
from ..toolkit.checkpoint.model_config import load_config, model_class
from .hub import commit_of, local_directory
from .read_errors import readable_errors


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint and how it is loaded.

    Attributes:
        model: a Hub id or the directory of a checkpoint.
        revision: branch, tag or commit of a Hub model.
        dtype: ``auto`` (the checkpoint's), or the name of a torch dtype.
        trust_remote_code: allow model code that comes with the checkpoint.
    """

    model: str
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that configuration, tokenizer and weights are loaded with alike."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration, loaded once; a caller that changes it takes a copy. Raises ``ModelError`` without one."""
        return load_config(self.model, self.trust_remote_code, self.revision)

    def pinned(self) -> ModelSource:
        """Return this source at the commit that its revision names now; a local directory is returned as it is."""
        config = self.config  # looks the revision up
        commit = commit_of(self.model, self.revision)
        if commit is None:
            return self
        pinned = replace(self, revision=commit)
        vars(pinned)["config"] = config
        return pinned


def load_model(source: ModelSource) -> Any:
    """The model, in evaluation mode. Raises ``ModelError`` or ``CheckpointError`` when it cannot be loaded."""
    dtype = source.dtype if source.dtype == "auto" else getattr(torch, source.dtype)
    try:
        with readable_errors(source.model):
            model = model_class(source.config).from_pretrained(
                source.model,
                config=copy.deepcopy(source.config),
                dtype=dtype,
                use_safetensors=True,
                **source.arguments,
            )
    except OptimError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {source.model}: {summarize_error(error)}") from error
    return model.eval()


def load_processor(source: ModelSource, cls: Any) -> Any:
    """The tokenizer (or, for models that read pixels, the image processor) beside a checkpoint; None without one."""
    return find_processor(source.model, getattr(cls, "main_input_name", "input_ids"), **source.arguments)


def checkpoint_bytes(source: ModelSource, model: Any) -> int:
    """Bytes of the weights as the original stores them, whatever they were loaded as."""
    home = local_directory(source.model, source.revision)
    try:
        return bytes_on_disk(home) if home is not None else parameter_bytes(model)
    except CheckpointError:
        return parameter_bytes(model)


def resolve_device(name: str | None) -> torch.device | None:
    """The device of that name; for None the CUDA device if there is one. Raises ``ModelError`` if it is not there."""
    if name is not None:
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"no device {name!r} here: {summarize_error(error)}") from error
    return torch.device("cuda") if torch.cuda.is_available() else None


def summarize_error(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def find_processor(home: str, main_input: str = "input_ids", **arguments: Any) -> Any:
    """The tokenizer (or, for models that read pixels, the image processor) beside a checkpoint, or None."""
    from transformers import AutoImageProcessor, AutoTokenizer

    reader = AutoImageProcessor if main_input == "pixel_values" else AutoTokenizer
    try:
        return reader.from_pretrained(home, **arguments) if home else None
    except (OSError, ValueError, KeyError):
        return None
