"""Teachers of a distillation: loading one, making sure that it speaks the student's language, asking it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError


def load(source: str, label: str) -> nn.Module:
    """A teacher from a path or Hub id, as the class that its configuration names, in the dtype of its checkpoint.

    ``label`` names the step in messages. Raises ``ModelError``.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source)
        name = (config.architectures or ["model without `architectures`"])[0]
        cls = getattr(transformers, name, None)
        if cls is None:
            raise ModelError(
                f"{label}: the teacher {source} is a {name}, a class that transformers does not have; load it yourself "
                "and set hf_optim.run_of(model).state(step).teacher"
            )
        return cls.from_pretrained(source, dtype="auto", use_safetensors=True)
    except OSError as error:
        raise ModelError(f"{label}: the teacher {source!r} cannot be loaded: {error}") from error


def freeze(teacher: nn.Module, device: torch.device) -> nn.Module:
    """The teacher in evaluation mode, without gradients, on ``device`` unless its owner placed it on an accelerator."""
    teacher.eval().requires_grad_(False)
    if getattr(teacher, "hf_device_map", None) is None and device_of(teacher).type == "cpu":
        teacher.to(device)
    return teacher


@torch.no_grad()
def logits(teacher: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The teacher's logits for a batch of the student's, on the teacher's device. It gets what its forward knows."""
    device = device_of(teacher)
    known = inspect.signature(teacher.forward).parameters
    given = {name: value for name, value in inputs.items() if name in known and name != "labels"}
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    encodes = getattr(getattr(teacher, "config", None), "is_encoder_decoder", False)
    if encodes and "decoder_input_ids" not in given and "labels" in inputs:
        shift: Any = teacher.prepare_decoder_input_ids_from_labels
        given["decoder_input_ids"] = shift(inputs["labels"].to(device))
    if "use_cache" in known:
        given["use_cache"] = False
    return teacher(**given).logits


def require_same_classes(student: nn.Module, teacher: nn.Module, label: str) -> None:
    """Raise ``ModelError`` if the two predict another number of classes."""
    mine, theirs = classes_of(student), classes_of(teacher)
    if None not in (mine, theirs) and mine != theirs:
        raise ModelError(
            f"{label}: the teacher predicts {theirs} classes and the student {mine}; logits can be compared only over "
            "one vocabulary (or one set of labels): take a teacher of the same family"
        )


def require_same_tokenizer(student: Any, teacher: Any, label: str) -> None:
    """Raise ``ModelError`` if two tokenizers number tokens differently.

    Each is a tokenizer, or a path or Hub id beside which one may lie; what has none is not compared.
    """
    mine, theirs = (tokenizer_at(x) if isinstance(x, str) else x for x in (student, teacher))
    if not (hasattr(mine, "get_vocab") and hasattr(theirs, "get_vocab")):
        return
    ours, others = mine.get_vocab(), theirs.get_vocab()
    for token in sorted(ours.keys() | others.keys()):
        if ours.get(token) != others.get(token):
            raise ModelError(
                f"{label}: teacher and student have different tokenizers ({token!r} is {others.get(token)} in the "
                f"teacher's, {ours.get(token)} in the student's); logits can be compared only over one vocabulary"
            )


def tokenizer_at(source: str) -> Any:
    """The tokenizer that lies beside a checkpoint, or None."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source) if source else None
    except (OSError, ValueError, KeyError):
        return None


def predicts_next(model: Any) -> bool:
    """Whether the logits at ``t`` belong to the label at ``t + 1``: true of decoders that generate."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


def classes_of(model: Any) -> int | None:
    """How many classes the logits have: of the vocabulary, or of the labels; None where that cannot be told."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        return int(head.weight.shape[0])
    config = getattr(model, "config", None)
    return int(config.num_labels) if config is not None else None


def fingerprint(model: nn.Module) -> str:
    """A hash of a few values of every parameter, to tell one teacher from another."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        few = parameter.detach().reshape(-1)[:16].double().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {few.tolist()}".encode())
    return digest.hexdigest()[:16]


def device_of(model: nn.Module) -> torch.device:
    """Where a model's (first) weights are."""
    return next(model.parameters()).device
