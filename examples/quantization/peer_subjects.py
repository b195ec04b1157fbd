"""Calibration data, measurement and checks of the models in the comparison with other tools."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from peer_cells import group_size_of
from peer_runner import linears_of
from subjects import Subject
from torch import Tensor

from hf_optim.data.datasets import load_examples

WINDOWS, LENGTH = 256, 256  # of a language model
SENTENCES, LONGEST = 512, 64  # of an encoder


def draw_calibration(subject: Subject, draw: int) -> dict[str, Tensor]:
    """Return draw number ``draw``: ``input_ids`` and ``attention_mask``, int64 ``[n, length]``.

    A language model gets 256 of the windows of 256 tokens into which all stories are cut, each story after bos; an
    encoder 512 sentences of 64 tokens at most, padded at the end.
    """
    if subject.metric == "perplexity":
        windows = _windows(subject)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(draw))
        ids = windows[order[:WINDOWS]]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    texts = [row[subject.calibration.text_column] for row in load_examples(subject.calibration, limit=None)]
    chosen = random.Random(draw).sample(texts, SENTENCES)
    found = subject.tokenizer(chosen, truncation=True, max_length=LONGEST, padding=True, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def _windows(subject: Subject) -> Tensor:
    """Return all windows of the calibration stories, ``[n, 256]``. Raises ``SystemExit`` if there are too few."""
    ids: list[int] = []
    for row in load_examples(subject.calibration, limit=None):
        ids.append(subject.tokenizer.bos_token_id)
        ids += subject.tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    if len(windows) < WINDOWS:
        raise SystemExit(
            f"{subject.calibration.dataset} gives {len(windows)} windows of {LENGTH} tokens; {WINDOWS} are needed"
        )
    return windows


def fingerprint(model: Any) -> str:
    """Return 12 digits of a hash of all tensors of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def put_weights(model: Any, tensors: dict[str, Tensor]) -> None:
    """Give a model the tensors of a quantized one. Raises ``ValueError`` if it has others then (tied ones differ)."""
    model.load_state_dict(tensors)
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor.cpu(), tensors[name].to(tensor.dtype)):
            raise ValueError(f"{name} is tied to another tensor in the original model; the quantized one has both")


def check_codes(model: Any, bits: int, group: int | None) -> None:
    """Check that each linear layer of the blocks has at most ``2^bits`` values in a group of inputs of an output.

    Raises ``ValueError`` naming the layer: the method left it unquantized, or used other groups.
    """
    for name, layer in linears_of(model).items():
        size = group_size_of(layer.in_features, group)
        values = layer.weight.detach().cpu().reshape(-1, size).sort(dim=1).values
        # The same code times the same scale may differ in the last bits, where a method folds it in another order.
        scale = values.abs().amax(dim=1, keepdim=True)
        distinct = 1 + (values.diff(dim=1) > 1e-4 * scale).sum(dim=1)
        if int(distinct.max()) > 2**bits:
            raise ValueError(f"{name} has {int(distinct.max())} values in a group of {size} inputs, not {2**bits}")


def write_job(folder: Path, job: dict[str, Any], data: dict[str, Tensor]) -> None:
    """Write what a runner reads."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in data.items()}, folder / "calibration.safetensors")
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
