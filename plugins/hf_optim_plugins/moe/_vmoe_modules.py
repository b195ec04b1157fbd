"""The mixture layer of V-MoE (2106.05974), and the base of a vision transformer that has some.

This file is stored with checkpoints, behind ``capacity`` and ``plan`` of hf_optim's toolkit, so it imports only torch
and transformers. For a token x, with E experts of which k are chosen::

    l  = W x + s N(0, I)            s = noise / E in training, 0 otherwise
    g  = softmax(l),                y = sum over the k largest g_e of  g_e FFN_e(x)

The gates of the chosen experts are not scaled to 1, unless ``normalize`` is set. Of T tokens an expert computes at most
C k T / E; what finds no slot is dropped, and passes by the residual connection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from hf_optim.toolkit.experts import capacity, slot_positions
from hf_optim.toolkit.modules import MixturesInDense, grouped_where_it_fits, read_own_loss, watch_own_loss


def squared_variation(values: Tensor) -> Tensor:
    """Return the squared coefficient of variation of ``values`` ``[E]``, with the variance of a population."""
    return values.var(correction=0) / values.mean().square()


def importance_loss(probabilities: Tensor) -> Tensor:
    """Return the squared variation of the experts' importance, their summed probabilities.

    probabilities: ``[T, E]``, the softmax of the logits without noise. 0 if all experts are equally important.
    """
    return squared_variation(probabilities.sum(0))


def load_loss(logits: Tensor, noisy: Tensor, top_k: int, deviation: float) -> Tensor:
    """Return the squared variation of the experts' load, which unlike counts has a gradient.

    The load of an expert is the mean probability that its noisy logit would be among the k largest, if its own noise
    were drawn again: Phi((l_e - t) / s), where t is the k-th largest of the noisy logits of the token.

    Args:
        logits: ``[T, E]``, without noise.
        noisy: ``[T, E]``.
        top_k: k.
        deviation: s, above 0.
    """
    threshold = noisy.topk(top_k, dim=-1).values[:, -1:]
    return squared_variation(torch.special.ndtr((logits - threshold) / deviation).mean(0))


def slots_of(rounding: str, factor: float, tokens: int, top_k: int, experts: int) -> int:
    """Return the slots of an expert for a group of ``tokens``, at least 1; ``tokens`` if nothing can be dropped."""
    return max(1, capacity(rounding, factor, tokens, top_k, experts))


@grouped_where_it_fits
@use_experts_implementation(has_gate=False, has_bias=True)
class Experts(nn.Module):
    """E feed-forward layers in the layout of transformers' interface for experts, which may run them on its kernels.

    ``up_proj`` ``[E, F, d]``, ``down_proj`` ``[E, d, F]``, and their biases. An expert number of E means "computed by
    none": such pairs cost nothing.

    Args:
        config: of the model; names the activation and the implementation.
        experts: E.
        hidden: d.
        inner: F.
    """

    def __init__(self, config: Any, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.act_fn = ACT2FN[config.hidden_act]
        self.up_proj = nn.Parameter(torch.empty(experts, inner, hidden))
        self.up_proj_bias = nn.Parameter(torch.zeros(experts, inner))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden))
        self.most: int | None = None
        """An upper bound of the pairs of one expert, known without reading tensors."""
        for weight in (self.up_proj, self.down_proj):
            nn.init.normal_(weight, std=getattr(config, "initializer_range", 0.02))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return ``[T, d]`` for tokens ``[T, d]``, their experts int64 ``[T, k]`` and gates ``[T, k]``.

        Every expert has a table of slots, so that all experts are two batched products.
        """
        count, width = self.num_experts, hidden.shape[1]
        computed = top_k_index < count
        places = slot_positions(top_k_index, computed, count)
        slots = self.most
        if slots is None:
            # In a traced graph the largest number of tokens is unknown.
            traced = torch.compiler.is_compiling() or type(places) is not Tensor or places.is_meta
            slots = len(hidden) if traced else max(1, int(places.max()) + 1)
        nowhere = count * slots
        places = torch.where(computed, top_k_index * slots + places, nowhere).reshape(-1)
        pairs = hidden.unsqueeze(1).expand(*top_k_index.shape, width).reshape(-1, width)
        table = hidden.new_zeros(nowhere + 1, width).index_copy(0, places, pairs)
        inner = torch.baddbmm(
            self.up_proj_bias.unsqueeze(1), table[:-1].view(count, slots, width), self.up_proj.transpose(1, 2)
        )
        outer = torch.baddbmm(self.down_proj_bias.unsqueeze(1), self.act_fn(inner), self.down_proj.transpose(1, 2))
        rows = torch.cat([outer.reshape(nowhere, width), outer.new_zeros(1, width)]).index_select(0, places)
        weighted = rows.view(*top_k_index.shape, width) * top_k_weights.unsqueeze(-1)
        return weighted.sum(1).to(hidden.dtype)


class Mixture(nn.Module):
    """A mixture of experts in place of the feed-forward part of a layer.

    Attributes:
        loss: the weighted importance and load losses of the last forward in training, or None.
    """

    def __init__(self, config: Any, settings: dict[str, Any], hidden: int, inner: int) -> None:
        super().__init__()
        self.settings = checked(settings)
        self.router = nn.Linear(hidden, self.settings["experts"], bias=False)
        nn.init.normal_(self.router.weight, std=0.02)
        self.experts = Experts(config, self.settings["experts"], hidden, inner)
        # Only with this flag do all releases of transformers leave out pairs whose expert is none.
        self.experts._is_expert_parallel = True  # type: ignore[assignment]
        self.loss: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``[B, N, d]`` for ``hidden`` ``[B, N, d]``."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        chosen, gates = self.choose(tokens)
        kept = self.kept(chosen, gates, hidden.shape[0])
        if kept is not None:
            chosen = torch.where(kept, chosen, self.settings["experts"])
            gates = torch.where(kept, gates, 0)
        return self.experts(tokens, chosen, gates).view_as(hidden)

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts int64 ``[T, k]`` and gates ``[T, k]`` of ``tokens`` ``[T, d]``, the largest gate first."""
        own = self.settings
        logits = self.router(tokens)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        noisy, deviation = logits, own["noise"] / own["experts"]
        if self.training:
            if deviation:
                noisy = logits + deviation * torch.randn_like(logits)
            self.loss = own["importance_loss"] * importance_loss(logits.softmax(-1))
            if deviation and own["load_loss"]:
                self.loss = self.loss + own["load_loss"] * load_loss(logits, noisy, own["top_k"], deviation)
        gates, chosen = noisy.softmax(-1).topk(own["top_k"], dim=-1)
        return chosen, gates / gates.sum(-1, keepdim=True) if own["normalize"] else gates

    def kept(self, chosen: Tensor, gates: Tensor, images: int) -> Tensor | None:
        """Return bool ``[T, k]``, False for pairs that are dropped; None if all are computed."""
        own, (tokens, top_k) = self.settings, chosen.shape
        factor = own["train_capacity"] if self.training and own["train_capacity"] is not None else own["capacity"]
        groups = images if own["group"] == "image" else 1
        size = tokens // groups
        slots = slots_of(own["rounding"], factor, size, top_k, own["experts"])
        self.experts.most = None if slots >= size else slots * groups
        if slots >= size:
            return None
        positions = slot_positions(
            chosen,
            torch.ones_like(chosen, dtype=torch.bool),
            own["experts"],
            groups=torch.arange(tokens, device=chosen.device) // size if groups > 1 else None,
            priority=gates.detach()[:, 0] if own["batch_priority"] else None,
        )
        return positions < slots

    def __getstate__(self) -> dict[str, Any]:
        # A loss belongs to a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "loss": None}


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a mixture. Raises ``ValueError`` for numbers with which it cannot compute."""
    experts, top_k = settings["experts"], settings["top_k"]
    if not (isinstance(experts, int) and isinstance(top_k, int) and 1 <= top_k <= experts < 2**31):
        raise ValueError(f"top_k must be from 1 to the number of experts: top_k {top_k}, experts {experts}")
    for key in ("capacity", "train_capacity", "noise", "importance_loss", "load_loss"):
        value = settings[key]
        if value is None and key == "train_capacity":
            continue
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{key} must be a finite number of at least 0, not {value!r}")
        if value == 0 and key.endswith("capacity"):
            raise ValueError(f"{key} must be above 0")
    return settings


class MixtureModel(MixturesInDense):
    """Base of a model class whose feed-forward parts named in ``config.vmoe`` are mixtures.

    In training the losses of the routers are part of the loss that the model returns for labels. Where a loss is
    computed outside of the model, ``router_loss`` has to be added to it.
    """

    replaced_field = "vmoe"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        field = getattr(self.config, self.replaced_field, None) or {}  # type: ignore[attr-defined]
        if field.get("importance_loss") or field.get("load_loss"):
            watch_own_loss(self, kwargs, "the losses of the routers", "model.router_loss()")
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def replacement(self, module: nn.Module, entry: Any, field: dict[str, Any]) -> nn.Module:
        settings = {key: value for key, value in field.items() if key != "modules"}
        return Mixture(self.config, settings, entry["hidden"], entry["inner"])  # type: ignore[attr-defined]

    def capacity_problem(self, priority: str) -> str:
        """Return why no other capacity applies to the experts."""
        return (
            'has a capacity of its own: change config.vmoe["capacity"], "batch_priority" or "group", and pass config= '
            "to from_pretrained"
        )

    def router_loss(self) -> Tensor | None:
        """Return the importance and load losses of the last forward in training, weighted and summed over layers.

        Each forward has its losses once: a second call returns None.
        """
        read_own_loss(self)
        mixtures = [module for module in self.modules() if isinstance(module, Mixture)]  # type: ignore[attr-defined]
        losses = [mixture.loss for mixture in mixtures if mixture.loss is not None]
        for mixture in mixtures:
            mixture.loss = None
        return torch.stack(losses).sum() if losses else None

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """The loss of the head, with that of the routers in training."""
        task: Any = super().loss_function  # type: ignore[misc]

        def loss(labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            found = task(labels, *args, **kwargs)
            routers = self.router_loss() if self.training else None  # type: ignore[attr-defined]
            if routers is None:
                return found
            # With a number of items the loss is the batch's share of an optimizer step, and so is that of the routers.
            items = kwargs.get("num_items_in_batch")
            return found + (routers if items is None else routers * (len(labels) / items)).to(found.device)

        return loss

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        PreTrainedModel.loss_function.fset(self, value)  # type: ignore[attr-defined]
