"""Routing attention: tokens are clustered by online k-means, and a query attends within its cluster.

    A[i, j] = softmax over j in S_i of q_i k_j / sqrt(d),      S_i = {j : k_j is in a cluster of q_i}
    mu_c <- normalize(lambda mu_c + (1 - lambda) mean{x : x in c}),      x: normalized queries and keys of a batch

Roy, Saffar, Vaswani, Grangier, "Efficient Content-Based Sparse Attention with Routing Transformers", arXiv 2003.05997,
section 4 and algorithm 1. With n tokens, about sqrt(n) clusters and windows of n / clusters tokens, time and memory
are those of n^1.5 scores.

- Which tokens (``form``): ``top``, the paper's: in each cluster the ``window`` queries and the ``window`` keys nearest
  to its centroid, chosen over the whole row. A token is in none, one or several clusters, whose outputs are averaged;
  in none it gets 0 (``unrouted``: zero) or the keys of its nearest cluster. In a causal model this choice tells a token
  about later ones, so it is refused there unless ``leaks`` says that this is wanted. ``last``, for causal models: a
  query sees itself and the last ``window`` - 1 earlier keys whose nearest centroid is the query's own. Later tokens
  decide nothing, and a cache holds ``window`` - 1 keys of each cluster, however long the text.
- Local heads: the first half of the heads attends to near tokens, as in the paper (``local_heads``); the paper's local
  attention is by blocks, and this one a window.
- Distances are those of queries and keys after layer normalization without weights, which puts them on a sphere
  (``normalize``; ``l2`` leaves out the mean). Algorithm 1 has the normalized ones in the scores, too, and in causal
  models the queries in the place of the keys: ``scores: normalized`` and ``keys: queries``. By default scores are the
  model's own, which pretrained weights were trained for.
- Centroids: one set for each key head, and for the query heads that share it. The paper's line sums the points of a
  batch; here their mean moves the centroid, whatever the batch, and an empty cluster keeps its centroid. They follow
  the batches of training alone, in any trainer, and are saved with the model. ``init`` is k-means on calibration data,
  or on the first batch of training. ``commitment`` is the factor of mean |x - mu|^2, added to the loss in training.
- Models with rotary embeddings are clustered after the rotation.
- One cluster whose window is not below the length is the model's full attention.

The checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import (
    Card,
    Contract,
    ModelError,
    NumericalError,
    Paper,
    RecipeError,
    Reload,
    Run,
    Scope,
    Technique,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.checkpoints.remote_code import RemoteCode
from hf_optim.toolkit.attention import PART
from hf_optim.toolkit.modules import own_loss

from . import _centroids, _cluster_kernel, _query_blocks, _recomputed, _routed_attention, _routed_model
from ._attach import context_length, require_encoder
from ._centroids import fitted
from ._distilling import distill, told
from ._learned import LearnedTechnique, learned_code

LEAKS = (
    "the top tokens of a cluster are chosen with later ones in view, so that a token learns of the future. Use "
    'form="last", or leaks=true if that is wanted'
)
DEFAULT_CONTEXT = 1024  # of models that do not say theirs


@technique(
    "routing_transformer",
    family="attention",
    paper=Paper("2003.05997", "Efficient Content-Based Sparse Attention with Routing Transformers", 2020),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION, traits.QUANTIZED},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class RoutingTransformer(LearnedTechnique):
    """Attend within clusters of tokens that online k-means finds.

    Attributes:
        clusters: of each key head.
        window: keys that a query sees in a cluster; 0: the context of the model divided by ``clusters``, rounded up, as
            in the paper.
        form: ``last``, ``top``, or ``auto``: ``last`` for causal models and ``top`` for others.
        leaks: allow ``top`` in a causal model, where which tokens are in a cluster depends on later tokens.
        local_heads: key heads that attend to near tokens instead, with their query heads; ``half`` rounds down.
        local_window: they see the tokens fewer than so many positions away; 0: ``window``.
        unrouted: what ``top`` gives a query in no cluster: 0, or the keys of its ``nearest`` cluster.
        normalize: how queries and keys are normalized before distances.
        scores: of the model's queries and keys, or of the normalized ones.
        keys: the model's own, or the queries; these need as many key heads as query heads.
        fit: centroids follow queries and keys, or keys alone.
        init: fit centroids to calibration ``data``, or to the ``first_batch`` of a training.
        decay: of the centroids' moving average.
        commitment: factor of the commitment loss; 0 leaves it out.
        seed: of k-means, and of the random centroids before the first batch.
        distill_steps: optimizer steps in which each attention learns the outputs of the dense one, one for each batch
            of calibration data, around the fitted centroids; 0: none.
        distill_rate: highest learning rate of these steps.
    """

    clusters: int = option(16, low=1, high=65536)
    window: int = option(0, low=0, high=2**30)
    form: Literal["auto", "last", "top"] = "auto"
    leaks: bool = False
    local_heads: int | Literal["half"] = "half"
    local_window: int = option(0, low=0, high=2**30)
    unrouted: Literal["zero", "nearest"] = "zero"
    normalize: Literal["layer_norm", "l2"] = "layer_norm"
    scores: Literal["model", "normalized"] = "model"
    keys: Literal["own", "queries"] = "own"
    fit: Literal["both", "keys"] = "both"
    init: Literal["data", "first_batch"] = "data"
    decay: float = option(0.999, low=0.0, high=1.0)
    commitment: float = option(1e-4, low=0.0, high=1e6)
    seed: int = option(0, low=0, high=2**31 - 1)
    distill_steps: int = option(0, low=0)
    distill_rate: float = option(1e-3, above=0.0)

    attachment: ClassVar[_routed_model.RoutedAttachment] = _routed_model.ATTACHMENT
    remote_code: ClassVar[RemoteCode] = learned_code(
        "routing_transformer",
        (own_loss, _query_blocks, _recomputed, _cluster_kernel, _routed_attention, _centroids, _routed_model),
        config_base=_routed_model.RoutedConfig.__name__,
        model_base=_routed_model.RoutedModel.__name__,
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"clusters": 2, "window": 5})

    def validate(self) -> None:
        if isinstance(self.local_heads, int) and self.local_heads < 0:
            raise RecipeError(f"routing_transformer: local_heads must not be below 0, and is {self.local_heads}")
        if self.leaks and self.form != "top":
            raise RecipeError('routing_transformer: leaks is for form="top" alone: the other form does not leak')

        if self.distill_steps and self.init != "data":
            raise RecipeError('routing_transformer: distill_steps needs centroids that are fitted before: init="data"')

    def needs_data(self) -> bool:
        return self.init == "data"

    def needs_whole_model(self) -> bool:
        return self.distill_steps > 0

    def settings(self, config: PretrainedConfig, sizes: Mapping[str, int], label: str) -> dict[str, Any]:
        causal, heads = bool(sizes["causal"]), sizes["key_heads"]
        form: str = ("last" if causal else "top") if self.form == "auto" else self.form
        if form == "last" and not causal:
            raise ModelError(f'{label}: form="last" is for causal models, whose queries see earlier keys: use "top"')
        if form == "top" and causal:
            if not self.leaks:
                raise ModelError(f"{label}: this model is causal: {LEAKS}")
            form = "top_leaking"
        if self.leaks and not causal:
            raise ModelError(f"{label}: leaks is for causal models, and this one sees later tokens as it is")
        local = heads // 2 if self.local_heads == "half" else self.local_heads
        if local > heads:
            raise ModelError(f"{label}: local_heads={local}, and the model has {heads} key heads")
        if self.keys == "queries" and sizes["heads"] != heads:
            raise ModelError(
                f"{label}: keys can be the queries where each query head has a key head of its own, and this model has "
                f"{sizes['heads']} and {heads}"
            )
        context = context_length(config) or DEFAULT_CONTEXT
        window = self.window or -(-context // self.clusters)
        return {
            "form": form,
            "clusters": self.clusters,
            "window": window,
            "local_heads": local,
            "local_window": self.local_window or window,
            "normalize": self.normalize,
            "scores": self.scores,
            "keys": self.keys,
            "unrouted": self.unrouted,
            "fit": self.fit,
            "decay": self.decay,
            "commitment": self.commitment,
            "seed": self.seed,
            "key_heads": heads,
            "head_width": sizes["head_width"],
        }

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        super().check_model(model, label)
        if self.form == "top" and not self.leaks:
            require_encoder(model, LEAKS, label)

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        """Fit the centroids to queries and keys of calibration data, of which these heads see all tokens meanwhile."""
        if self.init != "data":
            return
        found = {
            name: module.get_submodule(PART).centroids
            for name, module in scope.module.named_modules()
            if hasattr(module, PART)
        }
        found = {name: each for name, each in found.items() if each is not None}
        try:
            for centroids in found.values():
                centroids.collected = []
            yield
            for name, centroids in found.items():
                if not centroids.collected:
                    raise ModelError(f"{run.label(self)}: no calibration token reached {name or scope.name}")
                points = torch.cat(centroids.collected, 1)
                if not bool(points.isfinite().all()):
                    raise NumericalError(
                        f"{run.label(self)}: queries or keys of {name or scope.name} are infinite or NaN on the "
                        "calibration data; check that the model computes finite outputs in this dtype"
                    )
                points = points[:, :: max(1, -(-points.shape[1] // _centroids.POINTS))]
                centroids.set(fitted(points, self.clusters, centroids.seed))
        finally:
            for centroids in found.values():
                centroids.collected = None
        if self.distill_steps:
            yield from distill(run, self, self.distill_steps, self.distill_rate, "all")

    def initialize(self, run: Run, model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
        if settings["form"] == "top_leaking":
            model.config.use_cache = False

    def figures(self, model: PreTrainedModel, settings: Mapping[str, Any]) -> dict[str, Any]:
        routed = settings["key_heads"] - settings["local_heads"]
        held = routed * settings["clusters"] * (settings["window"] - 1)
        held += settings["local_heads"] * (settings["local_window"] - 1)
        return {"cached_keys": held if settings["form"] == "last" else None}

    def recompute(self, case: Any) -> dict[str, Any]:
        settings = case.config["attention_pattern"]
        slots = [settings["local_window"] - 1] * settings["local_heads"]
        slots += [settings["clusters"] * (settings["window"] - 1)] * (settings["key_heads"] - settings["local_heads"])
        return {
            **settings,
            "layers": len(case.config["layer_types"]),
            "context": case.config["max_position_embeddings"],
            "weights_added": 0,
            "model_class": case.config["architectures"][0],
            "cached_keys": sum(slots) if "CausalLM" in case.config["architectures"][0] else None,
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        if not figures:
            return
        what = (
            f"at most {figures['window']} keys of its cluster, its own among them, and a cache holds "
            f"{figures['cached_keys']} keys in each layer"
            if figures["form"] == "last"
            else f"the {figures['window']} keys nearest to the centroid of each cluster that it is in"
        )
        leaks = " Clusters are chosen over the whole row of this causal model." if "leaking" in figures["form"] else ""
        card.paragraph(
            "Routing attention",
            f"In {figures['layers']} layers, tokens belong to {figures['clusters']} clusters of each head, and a query "
            f"sees {what}.{leaks} In {figures['local_heads']} of {figures['key_heads']} key heads it sees tokens fewer "
            f"than {figures['local_window']} positions away instead." + told(figures),
        )


@hookimpl
def register_techniques(register) -> None:
    register(RoutingTransformer)
