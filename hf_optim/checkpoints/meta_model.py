"""A model on the meta device, exactly as transformers would load it: class, dtypes, ties, converted names.

transformers itself loads the checkpoint onto the meta device: it applies its renamings and conversions and reports what
is missing or has another shape, and no weight is read. Buffers that no checkpoint holds (rotary frequencies, position
ids) are then computed the way transformers computes them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..errors import ModelError, OptimError
from ..runs.progress import silenced
from ..toolkit.checkpoint.placement import NewHeads
from ..trust.bounds import first_line
from ..trust.weights import OTHER_FORMATS, PICKLES
from .hub import local_directory
from .read_errors import readable_errors
from .source import ModelSource, place_weights


@dataclass(frozen=True)
class MetaModel:
    """A model on the meta device, and where its weights are.

    Attributes:
        model: every parameter and persistent buffer is on the meta device; other buffers are real, on the CPU.
        files: the safetensors shards.
        missing: names of parameters and buffers that the checkpoint does not have.
        unexpected: tensors of the checkpoint that the model has no place for.
    """

    model: PreTrainedModel
    files: tuple[Path, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def build(source: ModelSource) -> MetaModel:
    """Build the meta model of a checkpoint. A Hub model is downloaded into the cache first if it is not there.

    Raises ``ModelError`` if there is no such model, and ``CheckpointError`` for pickles, truncated shards, and weights
    that are not those of the model (``toolkit.checkpoint.placement``); a head may be missing.
    """
    files = source.weight_files()
    try:
        with readable_errors(source.model), _quiet():
            model, info = place_weights(source, files, NewHeads.ALL, device_map={"": "meta"})
    except OptimError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"cannot load {source.model}: {first_line(error)}") from error
    compute_buffers(model)
    return MetaModel(model.eval(), files, tuple(sorted(info["missing_keys"])), tuple(sorted(info["unexpected_keys"])))


def is_local(source: ModelSource) -> bool:
    """Return True if weights of a checkpoint are on this machine, in a directory or in the Hub's cache.

    Those that ``build`` refuses count, too.
    """
    home = local_directory(source.model, source.revision)
    patterns = ("*.safetensors", "*.index.json", *PICKLES, *(pattern for pattern, _, _ in OTHER_FORMATS))
    return home is not None and any(any(home.glob(pattern)) for pattern in patterns)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bar and load report: nothing is loaded here, and problems are raised."""
    from transformers.utils import logging as theirs

    level = theirs.get_verbosity()
    theirs.set_verbosity(logging.ERROR)
    try:
        with silenced():
            yield
    finally:
        theirs.set_verbosity(level)


def compute_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint holds, through the initialization that transformers runs for them."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, key = name.rpartition(".")
        holder = model.get_submodule(path)
        holder._buffers[key] = torch.empty_like(buffer, device="cpu")
        holder._is_hf_initialized = False  # type: ignore[assignment]
    model.initialize_weights()
