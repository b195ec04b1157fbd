"""A trained confidence: for each exit, whether its token is the one that the full model would choose.

    c_l = sigmoid(w_l h_l + b_l),   label 1 if argmax of exit l = argmax of the last layer

The model is frozen. Binary cross-entropy, in which the positions with label 1 and those with label 0 of an exit have
the same weight together. It is minimized by L-BFGS: the problem is convex.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ...errors import CheckpointError, ModelError
from ...trust.files import require_inside
from ...trust.headers import read_header
from .settings import settings_of
from .stack import Stack, first

FILE = "early_exit_classifier.safetensors"
ATTRIBUTE = "_hf_optim_exit_classifier"
# Of the squared weights on normalized states: separable labels have no finite minimum.
DECAY = 1e-3
ITERATIONS = 100

Classifier = tuple[Tensor, Tensor]


@torch.no_grad()
def states_and_labels(stack: Stack, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return states ``[exits, positions, width]`` and labels ``[exits, positions]`` of the valid tokens of a batch.

    Args:
        stack: the blocks.
        tokens: ``[rows, T]``.
        mask: 0 for padding, or None.
    """
    states: dict[int, Tensor] = {}

    def passage(index: int, block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        states[index] = first(block(hidden, *args, **kwargs))
        return states[index]

    stack.forward(passage, tokens, mask, None, None)
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    last = stack.count - 1
    top = stack.logits(last, states[last][valid]).argmax(-1)
    labels = [stack.logits(layer, states[layer][valid]).argmax(-1) == top for layer in stack.layers]
    return torch.stack([states[layer][valid].float() for layer in stack.layers]), torch.stack(labels)


def fit(states: Tensor, labels: Tensor) -> Classifier:
    """Return weights ``[exits, width]`` and biases ``[exits]`` for states ``[exits, n, width]`` and labels."""
    mean, spread = states.mean(1, keepdim=True), states.std(1, keepdim=True).clamp_min(1e-6)
    inputs, targets = (states - mean) / spread, labels.float()
    share = targets.mean(1, keepdim=True).clamp(1e-6, 1 - 1e-6)
    weights = targets / (2 * share) + (1 - targets) / (2 * (1 - share))
    weight = torch.zeros(states.shape[0], states.shape[2], device=states.device, requires_grad=True)
    bias = torch.zeros(states.shape[0], device=states.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = torch.einsum("end,ed->en", inputs, weight) + bias[:, None]
        losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, weights, reduction="none")
        loss = losses.mean(1).sum() + DECAY * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    made = weight.detach() / spread[:, 0]
    return made, bias.detach() - (made * mean[:, 0]).sum(-1)


def set_classifier(model: Any, classifier: Classifier) -> str:
    """Give a model a classifier; return the checksum of its file."""
    vars(model)[ATTRIBUTE] = tuple(each.detach().cpu() for each in classifier)
    return hashlib.sha256(_content(model)).hexdigest()


def save_classifier(model: Any, directory: str | Path) -> None:
    """Write the classifier of a model beside its weights, if it has one."""
    if ATTRIBUTE in vars(model):
        (Path(directory) / FILE).write_bytes(_content(model))


def _content(model: Any) -> bytes:
    weight, bias = vars(model)[ATTRIBUTE]
    return save({"weight": weight.contiguous(), "bias": bias.contiguous()}, metadata={"format": "pt"})


def classifier_of(model: Any) -> Classifier:
    """Return the classifier of a model, from the folder of its checkpoint if it is not loaded yet.

    Raises ``ModelError`` if there is none, and ``CheckpointError`` for a file that is damaged or of another model.
    """
    if ATTRIBUTE not in vars(model):
        home = Path(str(getattr(model, "name_or_path", "") or ""))
        if not (home / FILE).is_file():
            raise ModelError(
                f"the exits have no trained classifier, and there is no {FILE} in the model's folder: apply calm with "
                "confidence classifier, or load the checkpoint from a folder that has the file"
            )
        path = require_inside(home, FILE)
        read_header(path, home)
        content = path.read_bytes()
        settings = settings_of(model.config)
        wanted = None if settings is None else settings.classifier
        if hashlib.sha256(content).hexdigest() != wanted:
            raise CheckpointError(f"{path} is not the file that config.json describes: its checksum is another")
        tensors = load(content)
        vars(model)[ATTRIBUTE] = (tensors["weight"], tensors["bias"])
    return vars(model)[ATTRIBUTE]
