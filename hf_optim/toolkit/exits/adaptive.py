"""The model at the depth that each row or token needs: rules that decide where to stop, and forwards that stop.

Elbayad et al., "Depth-Adaptive Transformer", arXiv 1910.10073, sections 3.1 and 3.2:

    confidence:              stop at the first exit with  max_v p(v | h_n) >= threshold
    classifier, multinomial: q = softmax(W s + b) from the first exit's state s; the exit is  argmax_n q(n)
    classifier, geometric:   stop at the first exit with  sigmoid(w_n h_n + b_n) >= threshold
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...trust.bounds import shown
from .attachment import require_exits
from .heads import ExitHeads
from .held import run_held
from .runs import run_blocks, run_to_exit

RULES = ("confidence", "classifier", "fixed")


@dataclass
class ExitOutput:
    """What a model gives whose rows or tokens stop at exits.

    Attributes:
        logits: of each row or token at its exit; None for a base model.
        last_hidden_state: the states after the blocks of the exits, ``[batch, tokens, width]``, before the final norm;
            of a base model, its output.
        exits: the exit of each row, int64 ``[batch]``, or of each token, ``[batch, tokens]``.
        layers: blocks that were used, of the same shape.
    """

    logits: Tensor | None
    last_hidden_state: Tensor
    exits: Tensor
    layers: Tensor

    def mean_layers(self, mask: Tensor | None = None) -> float:
        """Return the mean of ``layers``, over the tokens in a mask if it is of tokens."""
        used = self.layers.double()
        if mask is None or used.dim() == 1:
            return float(used.mean())
        return float((used * mask).sum() / mask.sum())


@torch.no_grad()
def forward_with_exits(
    model: nn.Module,
    *,
    rule: str = "confidence",
    threshold: float | None = None,
    exit_index: int | None = None,
    per_token: bool | None = None,
    **inputs: Any,
) -> ExitOutput:
    """Run a model in which rows or tokens stop at exits.

    Rows leave the batch at their exit: what is behind it is not computed for them. A token that has stopped keeps its
    state, which the others attend to, and is computed with its row until all have stopped: in a plain forward that
    saves time only then.

    Args:
        model: a model with exits, in evaluation mode.
        rule: ``confidence``: the largest probability of the exit's head reaches ``threshold``; ``classifier``: what the
            exits have learned; ``fixed``: all stop at ``exit_index``.
        threshold: of ``confidence``; of a classifier, the probability at which a ``geometric`` one stops (None: 0.5),
            or the mass up to an exit that is enough for a ``multinomial`` one (None: the most probable exit).
        exit_index: of ``fixed``.
        per_token: tokens stop, in place of rows; None: for language models, unless their classifier is for sequences.
        inputs: what the model's forward takes. The first dimension of all tensors is the batch.

    Raises ``ModelError`` for a model without exits, and a rule that does not fit its head or its classifier.
    """
    exits = require_exits(model)
    if model.training:
        raise ModelError("rows and tokens stop at exits in evaluation: call model.eval() first")
    _require_rule(exits, rule, threshold, exit_index)
    if rule == "fixed":
        index = exits.require_index(-1 if exit_index is None else exit_index)
        run = run_to_exit(model, index, **inputs)
        chosen = torch.full((len(run.hidden),), index, dtype=torch.int64, device=run.hidden.device)
        return _finished(exits, run.output, run.hidden, chosen)
    enough = 0.5 if threshold is None else threshold  # of a confident head, or of a geometric classifier
    if per_token is None:
        per_token = is_language_model(model) and not (rule == "classifier" and exits.settings.classifiers == "sequence")
    if per_token:
        return _tokens(exits, rule, threshold, enough, inputs)
    return _rows(exits, rule, threshold, enough, inputs)


def is_language_model(model: Any) -> bool:
    """Return True if a model's head reads each token alone: it has an output embedding, or labels tokens."""
    return model.get_output_embeddings() is not None or type(model).__name__.endswith("ForTokenClassification")


def pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean state over the tokens that a mask ``[batch, tokens]`` keeps, ``[batch, width]`` in float32."""
    states = hidden.float()
    if mask is None or mask.shape != hidden.shape[:2]:
        return states.mean(1)
    kept = mask.to(states.dtype)[..., None]
    return (states * kept).sum(1) / kept.sum(1).clamp_min(1)


def _require_rule(exits: ExitHeads, rule: str, threshold: float | None, exit_index: int | None) -> None:
    if rule not in RULES:
        raise ModelError(f"rule must be one of {', '.join(RULES)}, not {shown(rule)}")
    if (rule == "fixed") != (exit_index is not None):
        raise ModelError("rule fixed needs exit_index, and other rules choose the exit themselves: leave it out")
    if rule == "confidence" and threshold is None:
        raise ModelError("rule confidence needs a threshold: the probability that is enough to stop, such as 0.9")
    if threshold is not None and not threshold >= 0:
        raise ModelError(f"threshold must be a number from 0, not {shown(threshold)}")
    if rule == "classifier" and exits.classifier is None:
        raise ModelError("these exits have no classifier: train them with one, or use rule confidence or fixed")
    if rule == "confidence" and not exits.structure.has_head:
        raise ModelError(
            f"{type(exits.model).__name__} has no head whose probabilities could be confident: use rule fixed, or "
            "classifier"
        )


# -- rows -------------------------------------------------------------------------------------------------------------
def _rows(exits: ExitHeads, rule: str, threshold: float | None, enough: float, inputs: Mapping[str, Any]) -> ExitOutput:
    """Run rows to their exits; those that stop leave the batch."""
    model, rows = exits.model, _batch(inputs)
    if rule == "classifier" and exits.settings.classifiers != "sequence":
        raise ModelError("the classifier of these exits decides for each token: leave per_token out")
    live = torch.arange(rows, device=next(model.parameters()).device)
    found: dict[str, list[Tensor]] = {"rows": [], "exits": [], "hidden": [], "logits": []}
    hidden: Tensor | None = None
    wanted: Tensor | None = None  # the exit of each live row, if it is known at the first
    start = 0
    for index, layer in enumerate(exits.layers):
        given = select_rows(inputs, live, rows)
        run = run_blocks(model, start, layer, hidden, index, **given)
        hidden, start = run.hidden, layer + 1
        read, head = read_by_head(exits, run.output, hidden)
        if index == exits.count - 1:
            stops = torch.ones(len(live), dtype=torch.bool, device=hidden.device)
        elif rule == "confidence":
            stops = _confidence(exits, read) >= enough
        elif exits.settings.law == "geometric":
            state = pooled(hidden, given.get("attention_mask"))
            stops = exits.stop_logits(index, state).sigmoid() >= enough
        else:
            if wanted is None:
                logits = exits.stop_logits(0, pooled(hidden, given.get("attention_mask")))
                wanted = chosen_exit(logits, threshold)
            stops = wanted == index
        kept = stops.nonzero().flatten()
        found["rows"].append(live[kept])
        found["exits"].append(torch.full_like(live[kept], index))
        found["hidden"].append((hidden if head else read)[kept])
        if head:
            found["logits"].append(read[kept])
        left = (~stops).nonzero().flatten()
        if len(left) == 0:
            break
        hidden, live = hidden[left], live[left]
        wanted = None if wanted is None else wanted[left]
    order = torch.cat(found["rows"]).argsort()
    merged = {name: torch.cat(parts)[order] if parts else None for name, parts in found.items()}
    chosen, states = merged["exits"], merged["hidden"]
    assert chosen is not None
    assert states is not None
    return ExitOutput(merged["logits"], states, chosen, _layers(exits, chosen))


def select_rows(inputs: Mapping[str, Any], rows: Tensor, batch: int) -> dict[str, Any]:
    """Return inputs for some rows of a batch; what has another first dimension is for all of them."""
    if len(rows) == batch:
        return dict(inputs)
    return {
        name: value[rows.to(value.device)]
        if isinstance(value, Tensor) and value.dim() and len(value) == batch
        else value
        for name, value in inputs.items()
    }


def _batch(inputs: Mapping[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features"):
        if isinstance(inputs.get(name), Tensor):
            return len(inputs[name])
    raise ModelError("rows stop at exits in a batch: pass input_ids, inputs_embeds, pixel_values or another main input")


def read_by_head(exits: ExitHeads, output: Any, hidden: Tensor) -> tuple[Tensor, bool]:
    """Return the logits of an output and True, or, of a base model, its hidden state and False."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits, True
    state = getattr(output, "last_hidden_state", None)
    return (state if isinstance(state, Tensor) else hidden), False


def _confidence(exits: ExitHeads, logits: Tensor) -> Tensor:
    if logits.dim() != 2 or logits.shape[-1] < 2:
        raise ModelError(
            f"{type(exits.model).__name__} gives no probabilities of classes for a row: use rule classifier or "
            "fixed, or per_token=True for a language model"
        )
    return logits.float().softmax(-1).amax(-1)


def chosen_exit(logits: Tensor, mass: float | None) -> Tensor:
    """Return the exit that a multinomial classifier chooses, int64; ``mass`` is the probability that is enough.

    logits: ``[..., exits]``. Without ``mass`` it is the most probable exit.
    """
    if mass is None:
        return logits.argmax(-1)
    reached = logits.double().softmax(-1).cumsum(-1) >= mass
    reached[..., -1] = True
    return reached.int().argmax(-1)


# -- tokens -----------------------------------------------------------------------------------------------------------
def _tokens(
    exits: ExitHeads, rule: str, threshold: float | None, enough: float, inputs: Mapping[str, Any]
) -> ExitOutput:
    """Run tokens that stop at their exits, and keep their states from there on."""
    model = exits.model
    if not is_language_model(model):
        raise ModelError(
            f"the head of {type(model).__name__} does not read each token alone: its rows stop, not tokens"
        )
    if rule == "classifier" and exits.settings.classifiers != "token":
        raise ModelError("the classifier of these exits decides for whole sequences: leave per_token out")
    wanted: list[Tensor] = []

    def decide(index: int, hidden: Tensor) -> Tensor:
        if rule == "confidence":
            return exits.logits(index, hidden).float().softmax(-1).amax(-1) >= enough
        if exits.settings.law == "geometric":
            return exits.stop_logits(index, hidden).sigmoid() >= enough
        if not wanted:
            wanted.append(chosen_exit(exits.stop_logits(0, hidden), threshold))
        return wanted[0] == index

    run = run_held(model, decide, **inputs)
    logits = run.output.logits
    for index in range(exits.count - 1 if len(exits.own) else 0):
        stopped = run.exits == index
        if stopped.any():
            logits = logits.clone()
            logits[stopped] = exits.logits(index, run.hidden[stopped])
    return ExitOutput(logits, run.hidden, run.exits, _layers(exits, run.exits))


def _finished(exits: ExitHeads, output: Any, hidden: Tensor, chosen: Tensor) -> ExitOutput:
    read, head = read_by_head(exits, output, hidden)
    return ExitOutput(read if head else None, hidden if head else read, chosen, _layers(exits, chosen))


def _layers(exits: ExitHeads, chosen: Tensor) -> Tensor:
    return torch.tensor(exits.layers, device=chosen.device)[chosen] + 1
