"""Figures of a model with exits: quality at each exit on held-out batches, and the layers that its classifier uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_optim import Card
from hf_optim.toolkit.exits import ExitHeads, chosen_exit, no_cache, record_states
from hf_optim.toolkit.modules import eval_mode

MOST_BATCHES = 8
StopLogits = Callable[[ExitHeads, Sequence[Tensor], Mapping[str, Any]], Tensor]


class KeepBatches(TrainerCallback):
    """Keeps a few batches of the evaluation set when training ends, to measure the exits on."""

    def __init__(self, step_state: Any) -> None:
        self._state = step_state

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loader = kwargs.get("eval_dataloader")
        kept: list[Any] = []
        with torch.random.fork_rng(devices=[]):
            for batch in loader if loader is not None else ():
                kept.append(batch)
                if len(kept) == MOST_BATCHES:
                    break
        self._state.batches = kept


@torch.no_grad()
def figures_by_exit(exits: ExitHeads, batches: Iterable[Mapping[str, Any]], stop_logits: StopLogits) -> dict[str, Any]:
    """Return the mean loss of each exit over batches with labels, and the mean layers that a classifier uses."""
    model, rows = exits.model, []
    layers: list[Tensor] = []
    with eval_mode(model):
        for batch in batches:
            given = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()} | no_cache(model)
            if "labels" not in given:
                continue
            with record_states(model) as states:
                outputs = [model(**given)]
            outputs = [*(exits.output(i, states[i], **given) for i in range(exits.count - 1)), *outputs]
            if any(each.get("loss") is None for each in outputs):
                continue
            rows.append([float(each.loss.mean()) for each in outputs])
            if exits.classifier is not None:
                layers.append(_layers_used(exits, stop_logits(exits, states, given), given))
    if not rows:
        return {}
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    found: dict[str, Any] = {"loss_by_exit": means, "measured_batches": len(rows)}
    if layers:
        found["mean_layers"] = float(torch.cat(layers).double().mean())
    return found


def _layers_used(exits: ExitHeads, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    if exits.settings.law == "multinomial":
        chosen = chosen_exit(logits, None)
    else:
        stops = torch.cat([logits >= 0, torch.ones_like(logits[..., :1], dtype=torch.bool)], -1)
        chosen = stops.int().argmax(-1)
    used = torch.tensor(exits.layers, device=chosen.device)[chosen] + 1
    mask = inputs.get("attention_mask")
    return used[mask.bool()] if used.dim() == 2 and isinstance(mask, Tensor) else used.flatten()


def measured_card(card: Card, figures: Mapping[str, Any]) -> None:
    """Write the figures that were measured on the evaluation set, if there are any, to a card."""
    if "loss_by_exit" not in figures:
        return
    blocks = figures["after_blocks"]
    rows = [
        [n, block + 1, f"{loss:.4g}"]
        for n, (block, loss) in enumerate(zip(blocks, figures["loss_by_exit"], strict=True))
    ]
    card.table(f"Loss by exit, on {figures['measured_batches']} batches held out", ["exit", "layers", "loss"], rows)
    if "mean_layers" in figures:
        card.paragraph(
            "Layers used", f"There, the classifier uses {figures['mean_layers']:.2f} of {figures['blocks']} layers."
        )
