"""Teachers of a distillation: loading, placement, compatibility with the student, and the forward pass."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, ModelError, RecipeError
from ...trust.bounds import first_line
from ...trust.files import require_regular
from ...trust.weights import checked_weights
from ..checkpoint.model_config import load_config
from ..checkpoint.placement import load_placed
from ..distributed import fsdp
from ..topology.block_lists import blocks

SAME, OFFLOAD = "same", "offload"
SAMPLED_BYTES = 2**16  # of each end of a file that is hashed


def load(source: str, label: str) -> nn.Module:
    """Load a teacher from a path or Hub id, with the class in its configuration and the dtype of its checkpoint.

    A recipe names the teacher, so code that comes with it never runs: the caller can set a teacher of such a class.
    ``label`` is the name of the step in messages. Raises ``ModelError``, and ``CheckpointError`` for weights that are
    not safetensors files of the teacher in good order.
    """
    with _teacher_errors(source, label):
        source, config, cls = _resolve(source)
        files = checked_weights(source, named=getattr(config, "transformers_weights", None))
        stock: Any = functools.partial(
            cls.from_pretrained, source, config=config, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
        return load_placed(stock, config, files, source)[0]


def load_skeleton(source: str, label: str) -> nn.Module:
    """Return the teacher of ``load`` on the meta device; no weights are read. Raises the same errors for what it is."""
    with _teacher_errors(source, label), torch.device("meta"):
        source, config, cls = _resolve(source)
        skeleton: Any = cls(config)
        return skeleton


def _resolve(source: str) -> tuple[str, Any, Any]:
    """Return the expanded path or Hub id of a teacher, its configuration and its class."""
    import transformers
    from transformers import PreTrainedModel

    source, given = os.path.expanduser(source), source
    if _looks_like_path(given) and not os.path.isdir(source):
        raise ModelError("no such folder")
    config = load_config(source)
    name = str((config.architectures or ["model without `architectures`"])[0])
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        why = f"it is a {name}, which is not a model class of transformers; "
        raise ModelError(
            f"{why}load it yourself and set hf_optim.run_of(model).state(step).teacher",
            cli=f"{why}from Python, hf_optim.run_of(model).state(step).teacher takes any module",
        )
    return source, config, cls


@contextlib.contextmanager
def _teacher_errors(source: str, label: str) -> Iterator[None]:
    """Name the step and the teacher in errors of loading it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{label}: the teacher {source!r} cannot be loaded: {error}") from error
    except (OSError, ModelError) as error:
        raise ModelError(f"{label}: the teacher {source!r} cannot be loaded: {first_line(error)}") from error


def freeze(teacher: nn.Module, device: torch.device, where: str = SAME) -> nn.Module:
    """Put the teacher in evaluation mode on its device, without gradients, and return it.

    Args:
        teacher: the teacher.
        device: the device of the student.
        where: ``"same"``: the device of the student, unless the teacher is already on an accelerator; ``"offload"``:
            host memory, with blocks moved to the device of the student one at a time; or the name of a device
            (``"cpu"`` computes there).

    Raises:
        ModelError: the device does not exist, or the teacher is dispatched over several devices.
    """
    teacher.eval().requires_grad_(False)
    dispatched = getattr(teacher, "hf_device_map", None) is not None
    if where == SAME:
        if not dispatched and input_device(teacher).type == "cpu":
            teacher.to(device)
        return teacher
    if dispatched:
        raise ModelError(
            f"the teacher is dispatched over devices by its device_map: leave device at {SAME!r}, not {where!r}"
        )
    if where == OFFLOAD:
        return offload(teacher, device)
    try:
        return teacher.to(torch.device(where))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ModelError(f"the teacher cannot be put on device {where!r}: {reason}") from error


def check_device(where: str, step: str) -> None:
    """Raise ``RecipeError`` unless ``where`` is ``same``, ``offload``, or a device of torch."""
    if where in (SAME, OFFLOAD):
        return
    try:
        torch.device(where)
    except RuntimeError as error:
        raise RecipeError(
            f"{step}: device must be {SAME!r}, {OFFLOAD!r}, or a device such as 'cpu' or 'cuda:1', not {where!r}"
        ) from error


def offload(teacher: nn.Module, device: torch.device) -> nn.Module:
    """Keep the blocks of the teacher in host memory; each is on ``device`` only while it runs.

    All other modules are moved to ``device``. The weights do not change, so they are not copied back. If the device is
    the CPU, nothing is moved.
    """
    if device.type == "cpu" or getattr(teacher, "_hf_optim_offloaded", False):
        return teacher
    found = [block.module for block in blocks(teacher)]
    inside = {id(t) for block in found for t in _tensors(block)}
    for tensor in _tensors(teacher):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)
    for block in found:
        host = [(t, t.data.cpu().pin_memory()) for t in _tensors(block)]  # pinned: copies overlap with computation
        _move_to_host(host)
        block.register_forward_pre_hook(lambda module, args, host=host: _move_to_device(host, device))
        block.register_forward_hook(lambda module, args, output, host=host: _move_to_host(host))
    object.__setattr__(teacher, "_hf_optim_offloaded", True)
    object.__setattr__(teacher, "_hf_optim_device", device)
    return teacher


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _move_to_device(host: list[tuple[Tensor, Tensor]], device: torch.device) -> None:
    for tensor, kept in host:
        tensor.data = kept.to(device, non_blocking=True)


def _move_to_host(host: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, kept in host:
        tensor.data = kept


def forward_logits(teacher: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return the teacher's logits for a batch of the student, on the teacher's device."""
    return forward(teacher, inputs).logits


@torch.no_grad()
def forward(teacher: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Return the teacher's outputs for a batch of the student, on the teacher's device.

    Inputs that its forward does not accept, and labels, are left out.
    """
    device = input_device(teacher)
    accepted = inspect.signature(teacher.forward).parameters
    given = {name: value for name, value in inputs.items() if name in accepted and name != "labels"}
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    is_encoder_decoder = getattr(getattr(teacher, "config", None), "is_encoder_decoder", False)
    if is_encoder_decoder and "decoder_input_ids" not in given and "labels" in inputs:
        shift: Any = teacher.prepare_decoder_input_ids_from_labels
        given["decoder_input_ids"] = shift(inputs["labels"].to(device))
    if "use_cache" in accepted:
        given["use_cache"] = False
    return teacher(**given)


def require_same_classes(student: nn.Module, teacher: nn.Module, label: str) -> None:
    """Raise ``ModelError`` if student and teacher predict different numbers of classes."""
    mine, theirs = num_classes(student), num_classes(teacher)
    if None not in (mine, theirs) and mine != theirs:
        raise ModelError(
            f"{label}: the teacher predicts {theirs} classes and the student {mine}; logits can be compared only over "
            "one vocabulary (or one set of labels): take a teacher of the same family"
        )


def require_same_tokenizer(student: Any, teacher: Any, label: str) -> bool:
    """Raise ``ModelError`` if two tokenizers number tokens differently; return False if one of them is missing.

    Each is a tokenizer, or the path or Hub id of a checkpoint that may include one.
    """
    mine, theirs = (load_tokenizer(x) if isinstance(x, str) else x for x in (student, teacher))
    if not (hasattr(mine, "get_vocab") and hasattr(theirs, "get_vocab")):
        return False
    ours, others = mine.get_vocab(), theirs.get_vocab()
    for token in sorted(ours.keys() | others.keys()):
        if ours.get(token) != others.get(token):
            raise ModelError(
                f"{label}: teacher and student have different tokenizers ({token!r} is {others.get(token)} in the "
                f"teacher's, {ours.get(token)} in the student's); logits can be compared only over one vocabulary"
            )
    return True


def load_tokenizer(source: str) -> Any:
    """Load the tokenizer of a checkpoint; return None if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(os.path.expanduser(source), trust_remote_code=False) if source else None
    except (OSError, ValueError, KeyError):
        return None


def predicts_next_token(model: Any) -> bool:
    """Return True if the logits at ``t`` predict the label at ``t + 1``, as in decoders that generate."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


def num_classes(model: Any) -> int | None:
    """Return the number of classes of the logits: vocabulary size or number of labels; None if unknown."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        return int(head.weight.shape[0])
    config = getattr(model, "config", None)
    return int(config.num_labels) if config is not None else None


def is_copy(model: nn.Module, teacher: nn.Module) -> bool:
    """Return True if a model is certain to equal its teacher: the same module classes, and equal tensors.

    Return False if this is uncertain: for submodules with hooks, and for weights that are sharded over ranks.
    """
    kinds = [{name: type(module) for name, module in one.named_modules()} for one in (model, teacher)]
    if kinds[0] != kinds[1]:
        return False
    inside = [module for module in model.modules() if module is not model]
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in inside):
        return False
    ours, theirs = ({**dict(one.named_parameters()), **dict(one.named_buffers())} for one in (model, teacher))
    if ours.keys() != theirs.keys() or fsdp.has_sharded_parameters(model):
        return False
    return all(_equal(tensor, theirs[name]) for name, tensor in ours.items())


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other.to(one.device))


def hash_parameters(model: nn.Module) -> str:
    """Return a hash of a few values of every parameter, which identifies a teacher."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        few = parameter.detach().reshape(-1)[:16].double().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {few.tolist()}".encode())
    return digest.hexdigest()[:16]


def hash_files(source: str) -> str:
    """Return what identifies the teacher that is currently at a path or Hub id, without reading all of its weights.

    For a folder, a hash of its configuration and of name, size, header, and the first and last 64 KiB of data of every
    safetensors file; for a Hub id, the commit in the local cache, or else the id itself. Raises ``CheckpointError`` for
    files that are not regular files of the folder.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return _commit_of(source) or source
    require_regular(folder)
    digest = hashlib.sha256()
    config = folder / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            length = file.read(8)
            header = file.read(min(int.from_bytes(length, "little"), size))
            digest.update(length + header + file.read(SAMPLED_BYTES))
            file.seek(max(file.tell(), size - SAMPLED_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _commit_of(source: str) -> str | None:
    """Return the commit of a Hub id in the local cache of huggingface_hub, or None; the Hub is not contacted."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        return extract_commit_hash(cached_file(source, "config.json", local_files_only=True), None)
    except (OSError, ValueError):
        return None


def _looks_like_path(source: str) -> bool:
    return source.startswith((os.sep, "./", "../", "~")) or source.count(os.sep) > 1


def input_device(model: nn.Module) -> torch.device:
    """Return the device of a model's inputs: that of its first parameter."""
    return getattr(model, "_hf_optim_device", None) or next(model.parameters()).device
