"""What the record and the card say of key/value heads, before and after."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from hf_optim import Reload
from hf_optim.toolkit import topology
from hf_optim.toolkit.modules import eval_mode
from hf_optim.toolkit.topology import KeyValueHeads, dummy_inputs

if TYPE_CHECKING:
    from hf_optim import Card

PAPERS = (
    "Multi-query attention is by Shazeer ([1911.02150](https://arxiv.org/abs/1911.02150)). Ainslie et al. pooled heads "
    "and trained the result for 5 % of the original steps."
)


def sizes(
    model: PreTrainedModel, heads: list[KeyValueHeads], consumers: Collection[str] | None = None
) -> dict[str, int]:
    """Return the numbers of heads and parameters, and the bytes of keys and values that a cache holds for one token.

    Args:
        consumers: output projections of the attentions that count; None for all ``heads``.

    The bytes of self-attention are per token of the text, those of cross-attention per token of the encoder; both are 0
    for a model that does not generate text.
    """
    counted = [one for one in heads if consumers is None or one.consumer in consumers]

    def cached(crosses: bool) -> int:
        chosen = [one for one in counted if one.crosses is crosses] if model.can_generate() else []
        rows = {part: model.get_submodule(part.layer) for one in chosen for part in (one.keys, one.values)}
        return sum(part.index.numel() * next(layer.parameters()).element_size() for part, layer in rows.items())

    return {
        "attention_layers": len(counted),
        "kv_heads": max(len(one) for one in counted),
        "query_heads": max(len(one) * one.query_heads for one in counted),
        "parameters": model.num_parameters(),
        "cache_bytes": cached(False),
        "cross_cache_bytes": cached(True),
    }


def figures(before: dict[str, int], after: dict[str, int]) -> dict[str, Any]:
    """Return the metrics of the record from the ``sizes`` of the model before and after, without caches of 0 bytes."""
    pairs = [name for name in ("kv_heads", "parameters", "cache_bytes", "cross_cache_bytes") if before[name]]
    return {
        "attention_layers": before["attention_layers"],
        "query_heads": before["query_heads"],
        **{f"{name}_{when}": side[name] for name in pairs for when, side in (("before", before), ("after", after))},
    }


@torch.no_grad()
def cached_heads(model: PreTrainedModel) -> list[int]:
    """Return the heads of keys that a cache of the model holds in each layer; empty if the model has no cache."""
    if not model.can_generate():
        return []
    with eval_mode(model):
        outputs = model(**dummy_inputs(model), use_cache=True)
    cache = getattr(outputs, "cache", None) or getattr(outputs, "past_key_values", None)
    cache = getattr(cache, "self_attention_cache", cache)
    keys = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", None) or ()]
    return [key.shape[1] for key in keys if key is not None and key.dim() == 4]


def recompute(step: Any, case: Any) -> dict[str, Any]:
    """Return the metrics from the two models: see ``hf_optim.testing.recompute``."""
    both = []
    for model in (case.before, case.after):
        found = topology.find_key_value_heads(topology.trace(model))
        decoder = {one.block for one in found if one.crosses}
        if decoder and not step.encoder:
            found = [one for one in found if one.block in decoder]
        both.append(sizes(model, found))
    return figures(*both)


def write(metrics: dict[str, Any], pooling: str, card: Card) -> None:
    """Write what was done to a card, from the metrics of the record."""
    if not metrics:
        return
    before, after, queries = metrics["kv_heads_before"], metrics["kv_heads_after"], metrics["query_heads"]
    if before == after:
        card.paragraph(
            "Key/value heads", f"The model already had {after} key/value heads for {queries} query heads: unchanged."
        )
        return
    made = {
        "mean": "is the mean of those of its group",
        "first": "is the first of its group",
        "random": "started from random weights",
    }[pooling]
    kind = "Multi-query attention" if after == 1 else "Grouped-query attention"
    own = card.when(
        "The checkpoint carries the code of its attention, which runs in plain transformers with "
        "`trust_remote_code=True`.",
        reload=[Reload.REMOTE_CODE],
    )
    card.paragraph(
        kind,
        f"{before} key/value heads for {queries} query heads became {after}, in {metrics['attention_layers']} "
        f"attention layers. Each {made}, weights and biases. This changed the outputs. The step itself did not train."
        f"{own} {PAPERS}",
    )
    rows = [["key/value heads", f"{before}", f"{after}"]]
    rows.append(["parameters", *(f"{metrics[f'parameters_{when}']:,}" for when in ("before", "after"))])
    for name, of in (("cache_bytes", "token"), ("cross_cache_bytes", "token of the encoder")):
        if f"{name}_before" in metrics:
            pair = [f"{metrics[f'{name}_{when}']:,}" for when in ("before", "after")]
            rows.append([f"cache, bytes per {of}", *pair])
    card.table("What sharing key/value heads changed", ["", "before", "after"], rows)
