"""The source of a model: a checkpoint on the Hub or on disk, how it is loaded, and its size there."""

from __future__ import annotations

import copy
import functools
import logging
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, ModelError, OptimError
from ..evaluation.sizes import bytes_on_disk, parameter_bytes
from ..runs.progress import stage
from ..runs.record import public_name
from ..toolkit.checkpoint.model_config import load_config, model_class
from ..toolkit.checkpoint.placement import NewHeads, load_placed
from ..trust.bounds import first_line
from ..trust.code import may_run
from ..trust.weights import checked_weights
from .hub import commit_of, local_directory
from .read_errors import readable_errors

log = logging.getLogger(__name__)

PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json",
                   "spiece.model", "preprocessor_config.json", "processor_config.json")  # fmt: skip


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint, and how it is loaded.

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
    def load_kwargs(self) -> dict[str, Any]:
        """The keyword arguments for loading the configuration, the tokenizer and the weights."""
        return {"revision": self.revision, "trust_remote_code": may_run(self.trust_remote_code)}

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration, loaded once; copy it before changing it. Raises ``ModelError`` if there is none."""
        return load_config(self.model, self.trust_remote_code, self.revision)

    def weight_files(self) -> tuple[Path, ...]:
        """Return the safetensors files of the weights, after checking them. Raises ``CheckpointError``.

        Call it before transformers opens any of them. Files on the Hub are downloaded.
        """
        named = getattr(self.config, "transformers_weights", None)
        return checked_weights(self.model, named=named, revision=self.revision)

    def pinned(self) -> ModelSource:
        """Return this source with ``revision`` resolved to a commit; a local directory is returned unchanged."""
        config = self.config  # downloading it resolves the revision
        commit = commit_of(self.model, self.revision)
        if commit is None:
            return self
        pinned = replace(self, revision=commit)
        vars(pinned)["config"] = config
        return pinned


def place_weights(
    source: ModelSource, files: tuple[Path, ...], new_heads: NewHeads, **given: Any
) -> tuple[Any, dict[str, Any]]:
    """Load the model from ``files`` with the stock method, and return it with transformers' account of its tensors.

    ``given`` are further arguments of the stock method. Raises as it does, and as ``load_placed``.
    """
    stock = functools.partial(
        model_class(source.config).from_pretrained,
        source.model,
        config=copy.deepcopy(source.config),
        dtype=source.dtype if source.dtype == "auto" else getattr(torch, source.dtype),
        use_safetensors=True,
        **given,
        **source.load_kwargs,
    )
    return load_placed(stock, source.config, files, source.model, new_heads=new_heads)


def load_model(source: ModelSource, new_heads: NewHeads = NewHeads.NONE) -> Any:
    """Load the model, in evaluation mode; ``new_heads`` are the heads that the checkpoint may lack.

    Raises ``ModelError`` if it cannot be loaded, and ``CheckpointError`` if the weights are not those of the model.
    """
    files = source.weight_files()
    try:
        with readable_errors(source.model), stage(name_of_load(source.model)):
            model, _ = place_weights(source, files, new_heads)
    except OptimError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {source.model}: {first_line(error)}") from error
    return model.eval()


def name_of_load(source: Any) -> str:
    """Return what is shown while a checkpoint is loaded; one that is being written has no name of its own yet."""
    name = public_name(source)
    return f"loading {name}" if name and not name.startswith(".") else "loading"


def load_processor(source: ModelSource, cls: type[PreTrainedModel]) -> Any:
    """Load the tokenizer of a checkpoint (the image processor for models that take pixels), or return None."""
    return find_processor(source.model, getattr(cls, "main_input_name", "input_ids"), **source.load_kwargs)


def find_multimodal_processor(home: str, **load_kwargs: Any) -> Any:
    """Return the processor for texts and images in a checkpoint, under the rules of ``find_processor``, or None."""
    from transformers import AutoProcessor

    load_kwargs["trust_remote_code"] = may_run(load_kwargs.get("trust_remote_code"))
    try:
        return AutoProcessor.from_pretrained(home, **load_kwargs) if home else None
    except (MemoryError, OptimError):
        raise
    except Exception as error:
        log.warning("the processor in %s is not used: %s", home, first_line(error, typed=True))
        return None


def checkpoint_bytes(source: ModelSource, model: nn.Module) -> int:
    """Return the bytes of the weights on disk, or of ``model`` in memory if the files are not on this machine."""
    home = local_directory(source.model, source.revision)
    try:
        return bytes_on_disk(home) if home is not None else parameter_bytes(model)
    except CheckpointError:
        return parameter_bytes(model)


def resolve_device(name: str | None) -> torch.device | None:
    """Return the device with this name; for None the CUDA device, or None if there is none.

    Raises ``ModelError`` if the device does not exist.
    """
    if name is not None:
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"device {name!r} is not available: {first_line(error)}") from error
    return torch.device("cuda") if torch.cuda.is_available() else None


def find_processor(home: str, main_input: str = "input_ids", **load_kwargs: Any) -> Any:
    """Return the tokenizer (for models that take pixels, the image processor) in a checkpoint.

    None if there is none; one that cannot be read is named in a warning. Code that comes with it runs only with
    ``trust_remote_code=True``.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    loader = AutoImageProcessor if main_input == "pixel_values" else AutoTokenizer
    load_kwargs["trust_remote_code"] = may_run(load_kwargs.get("trust_remote_code"))
    try:
        return loader.from_pretrained(home, **load_kwargs) if home else None
    except (MemoryError, OptimError):
        raise
    except Exception as error:  # the tokenizers library raises Exception itself; images may need torchvision
        if has_processor(home):
            log.warning("the tokenizer or processor in %s is not used: %s", home, first_line(error, typed=True))
        return None


def has_processor(directory: str | os.PathLike[str]) -> bool:
    """Return True if a directory has files of a tokenizer or processor."""
    return any(os.path.isfile(os.path.join(directory, name)) for name in PROCESSOR_FILES)
