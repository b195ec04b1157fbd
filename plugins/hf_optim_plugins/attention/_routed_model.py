"""Attention within clusters in the models of transformers: its settings, its centroids and what a cache keeps.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_optim.toolkit.attention import (
    PART,
    Call,
    LearnedAttachment,
    LearnedConfig,
    LearnedModel,
    TensorState,
    attentions,
    chosen,
    whole,
)
from hf_optim.toolkit.modules import read_own_loss, watch_own_loss

from ._centroids import Centroids, directions
from ._cluster_kernel import nearest_by_kernel
from ._routed_attention import kept_of_clusters, last_of_clusters, near_tokens, one_step, top_of_clusters

FORMS = ("last", "top", "top_leaking")
NORMALIZATIONS = ("layer_norm", "l2")
SAMPLES = 1024  # of a batch, from which centroids are fitted


@dataclass(frozen=True)
class Routing:
    """The settings of routed attention, as they stand in ``config.json``.

    Attributes:
        form: ``last``, ``top``, or ``top_leaking`` for a causal model whose clusters are chosen over the whole row.
        clusters: of each key head.
        window: keys that a query sees in its cluster.
        local_heads: key heads, from the first on, that see near tokens instead.
        local_window: how near these are: fewer than so many positions away.
        normalize: ``layer_norm`` or ``l2``, before distances.
        scores: of the ``model``'s queries and keys, or of ``normalized`` ones.
        keys: the model's ``own``, or its ``queries``.
        unrouted: what a query in no cluster gets: ``zero`` or the keys of the ``nearest``.
        fit: centroids follow ``both`` queries and keys, or ``keys``.
        decay: of the moving average.
        commitment: factor of the commitment loss.
        seed: of random directions and of k-means.
        key_heads, head_width: of the model.
    """

    form: str
    clusters: int
    window: int
    local_heads: int
    local_window: int
    normalize: str
    scores: str
    keys: str
    unrouted: str
    fit: str
    decay: float
    commitment: float
    seed: int
    key_heads: int
    head_width: int

    @classmethod
    def of(cls, settings: Any) -> Routing:
        """Return the settings. Raises ``ValueError`` for others."""
        if not isinstance(settings, Mapping):
            raise ValueError("routed attention needs config.attention_pattern")
        heads = whole(settings, "key_heads", low=1, high=4096)
        made = cls(
            form=chosen(settings, "form", FORMS),
            clusters=whole(settings, "clusters", low=1, high=65536),
            window=whole(settings, "window", low=1),
            local_heads=whole(settings, "local_heads", high=heads),
            local_window=whole(settings, "local_window", low=1),
            normalize=chosen(settings, "normalize", NORMALIZATIONS),
            scores=chosen(settings, "scores", ("model", "normalized")),
            keys=chosen(settings, "keys", ("own", "queries")),
            unrouted=chosen(settings, "unrouted", ("zero", "nearest")),
            fit=chosen(settings, "fit", ("both", "keys")),
            decay=_number(settings, "decay", 1.0),
            commitment=_number(settings, "commitment", 1e6),
            seed=whole(settings, "seed"),
            key_heads=heads,
            head_width=whole(settings, "head_width", low=1, high=65536),
        )
        unknown = sorted(str(name)[:40] for name in settings if name not in {each.name for each in fields(cls)})
        if unknown:
            raise ValueError(f"routed attention has settings that it does not know: {unknown[:4]}")
        return made


def _number(settings: Mapping[str, Any], name: str, high: float) -> float:
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
        raise ValueError(f"routed attention has {name}={str(value)[:40]!r}, not a number from 0 to {high:g}")
    return float(value)


class RoutedAttachment(LearnedAttachment):
    """The attention function of routed attention."""

    title = "routed attention"

    def read(self, settings: Mapping[str, Any]) -> Routing:
        return Routing.of(settings)

    def build_part(self, settings: Mapping[str, Any], layer: int) -> nn.Module | None:
        routing = self.read(settings)
        heads = routing.key_heads - routing.local_heads
        return RoutedPart(routing, heads, layer)

    def compute_call(self, part: nn.Module | None, call: Call) -> tuple[Tensor, TensorState | None]:
        return part.attention(call)  # type: ignore[union-attr, operator]


class RoutedPart(nn.Module):
    """What is added to an attention: the centroids of its routed heads.

    Attributes:
        centroids: None if all heads are local.
    """

    centroids: Centroids | None

    def __init__(self, routing: Routing, heads: int, layer: int) -> None:
        super().__init__()
        self.routing, self.heads = routing, heads
        if heads:
            sizes = heads, routing.clusters, routing.head_width
            self.centroids = Centroids(*sizes, routing.decay, routing.seed * 4096 + layer)
        else:
            self.centroids = None

    def attention(self, call: Call) -> tuple[Tensor, TensorState | None]:
        """Return the output ``[R, H, P, D]`` and the state, as ``LearnedAttachment.compute_call`` does."""
        routing, groups = self.routing, call.key.shape[1]
        if (groups, call.key.shape[3]) != (routing.key_heads, routing.head_width):
            raise ValueError(
                f"routed attention is for {routing.key_heads} key heads of width {routing.head_width}, and got "
                f"{groups} of {call.key.shape[3]}"
            )
        if call.causal and routing.form == "top":
            raise ValueError("the top tokens of a cluster depend on later ones, and this attention is causal")
        if not call.causal and routing.form == "last":
            raise ValueError("this attention is not causal, and its last keys of a cluster are those of a causal one")
        if routing.form == "top_leaking" and call.keeps:
            raise ValueError("later tokens change the clusters of earlier ones in this model: set use_cache=False")
        shared, local = call.query.shape[1] // groups, routing.local_heads
        query, key, value = call.query, call.key, call.value
        if query.dtype != value.dtype or key.dtype != value.dtype:  # under autocast
            query, key = query.to(value.dtype), key.to(value.dtype)
        outs, kept = [], TensorState()
        if local:
            given = query[:, : local * shared], key[:, :local], value[:, :local]
            outs.append(self._local(call, *given, kept))
        if self.centroids is not None:
            given = query[:, local * shared :], key[:, local:], value[:, local:]
            outs.append(self._routed(call, *given, self.centroids, kept))
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0], kept if call.keeps else None

    def _local(self, call: Call, query: Tensor, key: Tensor, value: Tensor, kept: TensorState) -> Tensor:
        width = self.routing.local_window
        if not call.causal:
            return near_tokens(query, key, value, call.valid, width, call.scale, call.dropout)
        zeros = torch.zeros((), dtype=torch.int64, device=query.device)
        own = zeros.expand(query.shape[:3]), zeros.expand(key.shape[:3])
        return _with_state(call, query, key, value, own, width, 1, "local", kept)

    def _routed(
        self, call: Call, query: Tensor, key: Tensor, value: Tensor, centroids: Centroids,
        kept: TensorState,
    ) -> Tensor:  # fmt: skip
        routing = self.routing
        if routing.keys == "queries":
            if query.shape[1] != key.shape[1]:
                raise ValueError("keys are queries only where each query head has a key head of its own")
            key = query
        plain = self._by_kernel(query, key, centroids)
        if plain is not None:
            return _with_state(call, query, key, value, plain, routing.window, routing.clusters, "routed", kept)
        at = [directions(part, routing.normalize) for part in (query, key)]
        if routing.scores == "normalized":  # to the norm sqrt(D), as layer normalization does
            query, key = ((part * part.shape[-1] ** 0.5).to(query.dtype) for part in at)
        self._observe(call, at, centroids)
        if centroids.collected is not None:
            out = _all_tokens(call, query, key, value)
            if call.keeps:
                _with_state(
                    call,
                    query,
                    key,
                    value,
                    self._nearest(at, centroids),
                    routing.window,
                    routing.clusters,
                    "routed",
                    kept,
                )
            return out
        if routing.form == "last":
            own = self._nearest(at, centroids)
            return _with_state(call, query, key, value, own, routing.window, routing.clusters, "routed", kept)
        with torch.no_grad():
            near = tuple(centroids.near(part).transpose(2, 3) for part in at)
        return top_of_clusters(
            query, key, value, near, call.valid, routing.window, call.scale, call.dropout,  # type: ignore[arg-type]
            causal=call.causal, nearest=routing.unrouted == "nearest",
        )  # fmt: skip

    @torch.no_grad()
    def _by_kernel(self, query: Tensor, key: Tensor, centroids: Centroids) -> tuple[Tensor, Tensor] | None:
        """Return the clusters of queries and keys where nothing else reads their directions; None elsewhere."""
        routing = self.routing
        if self.training or centroids.collected is not None or routing.form != "last" or routing.scores != "model":
            return None
        weight = centroids.used()
        found = [nearest_by_kernel(part, weight, routing.normalize) for part in (query, key)]
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    @torch.no_grad()
    def _nearest(self, at: list[Tensor], centroids: Centroids) -> tuple[Tensor, Tensor]:
        found = [centroids.near(part).argmax(-1) for part in at]
        return found[0], found[1]

    def _observe(self, call: Call, at: list[Tensor], centroids: Centroids) -> None:
        """Let the centroids learn from the directions of queries ``[R, H, P, D]`` and keys ``[R, G, P, D]``."""
        if not self.training and centroids.collected is None:
            return
        groups = at[1].shape[1]
        parts = at if self.routing.fit == "both" and self.routing.keys == "own" else at[1:]
        # [R, H, P, D] as points of G heads: [G, R * H / G * P, D]
        points = torch.cat([part.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 3) for part in parts], 1)
        valid = None
        if call.valid is not None:
            shape = [(part.shape[0], groups, part.shape[1] // groups, part.shape[2]) for part in parts]
            each = [call.valid[:, None, None].expand(size).transpose(0, 1).flatten(1) for size in shape]
            valid = torch.cat(each, 1)
        if centroids.collected is not None:
            kept = points if valid is None else points[:, valid[0]]
            centroids.collected.append(kept[:, :: max(1, -(-kept.shape[1] // SAMPLES))].detach())
            return
        centroids.observe(points, valid, self.routing.commitment > 0)


def _with_state(
    call: Call, query: Tensor, key: Tensor, value: Tensor, own: tuple[Tensor, Tensor], width: int, clusters: int,
    name: str, kept: TensorState,
) -> Tensor:  # fmt: skip
    """Return ``last_of_clusters`` after the state of the call, and put the state after it into ``kept``."""
    names = [f"{name}_{part}" for part in ("key", "value", "count")]
    earlier = None
    if call.state is not None:
        earlier = call.state[names[0]], call.state[names[1]], call.state[names[2]]
    valid = call.valid
    if earlier is not None and query.shape[2] == 1 and valid is None:
        out = one_step(query, key, value, own[0].long(), earlier, call.scale)
    else:
        out = last_of_clusters(query, key, value, own, valid, width, clusters, call.scale, call.dropout, earlier)
    if call.keeps:
        after = kept_of_clusters(key, value, own[1].long(), valid, width, clusters, earlier)
        kept.update(zip(names, after, strict=True))
    return out


def _all_tokens(call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return full attention over the new tokens."""
    shared = query.shape[1] != key.shape[1]
    seen = None
    if call.valid is not None:
        seen = call.valid[:, None, None] | ~call.valid.any(1)[:, None, None, None]
        if call.causal:
            place = torch.arange(query.shape[2], device=query.device)
            seen = seen & (place[:, None] >= place)
    return functional.scaled_dot_product_attention(
        query, key, value, seen, call.dropout, is_causal=call.causal and seen is None, scale=call.scale,
        enable_gqa=shared,
    )  # fmt: skip


ATTACHMENT = RoutedAttachment("hf_optim_routing_transformer")


class RoutedConfig(LearnedConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT


class RoutedModel(LearnedModel):
    """Base of the model classes: the commitment loss is added to the loss of a model in training."""

    can_detach = False  # where keys are queries, stock scores mean nothing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        found = self._routings()
        factor = found[0].routing.commitment if found else 0
        if factor:
            watch_own_loss(self, kwargs, "the commitment loss", f"{factor} * model.commitment_loss()")
        as_tuple = isinstance(out, tuple)
        loss = getattr(out, "loss", None)
        if as_tuple and kwargs.get("labels") is not None:
            loss = out[0]
        if not self.training or loss is None:  # type: ignore[attr-defined]
            return out
        term = self.commitment_loss()
        if term is None:
            if factor and loss.requires_grad:
                raise ValueError(
                    "the commitment loss has no gradient under reentrant gradient checkpointing: set "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}, or commitment to 0'
                )
            return out
        term = factor * term.to(loss.device)
        items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
        if items is not None and isinstance(labels, Tensor):
            # The loss is then a sum over this part of a batch, divided by the tokens of the whole.
            term = term * (labels != -100).sum() / items
        whole_loss = loss + term.to(loss)
        if as_tuple:
            return (whole_loss, *out[1:])
        out["loss"] = whole_loss
        return out

    def commitment_loss(self) -> Tensor | None:
        """Return the mean over layers of the commitment of the last forward in training, without its factor.

        Each forward has it once: a second call returns None.
        """
        read_own_loss(self)
        found = self._routings()
        terms = [part.centroids.commitment for part in found if part.centroids.commitment is not None]
        for part in found:
            part.centroids.commitment = None
        return torch.stack([each.to(terms[0].device) for each in terms]).mean() if terms else None

    def _routings(self) -> list[Any]:
        parts = [getattr(module, PART, None) for module in attentions(self)]  # type: ignore[arg-type]
        return [part for part in parts if getattr(part, "centroids", None) is not None]
