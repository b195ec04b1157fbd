"""Feed-forward layers whose neurons are divided into experts, of which each token computes the few that a router names.

    y = sum over the chosen experts e of  W_down,e act(W_up,e x + b_e)   + b_down,     each with weight 1

The experts are on transformers' interface for experts, so each of its implementations computes them. A feed-forward
layer is not one module in every architecture (OPT, BERT), so two kinds of modules take the places of its linear layers:
an ``Inlet`` for each projection of the input, which passes on neurons of width zero and keeps the input, and a
``MoefiedFFN`` for the last projection, which computes the whole layer. What the model does between them, an activation,
is applied to nothing.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from hf_optim.toolkit.modules import ReplacedModules


class Inlet(nn.Module):
    """Takes the place of a projection of the input: keeps it for the ``MoefiedFFN`` and returns ``[..., 0]``."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.keeps = keeps
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.keeps:
            self.kept = x
        return x[..., :0]

    def take(self) -> Tensor:
        """Return what was kept, and release it. Raises ``RuntimeError`` if there is nothing."""
        x, self.kept = self.kept, None
        if x is None:
            raise RuntimeError("the feed-forward layer was called without its first projection")
        return x


@use_experts_implementation
class NeuronExperts(nn.Module):
    """The experts of one feed-forward layer, each with a part of its neurons, in transformers' stacked layout.

    Attributes:
        up_proj: ``[E, neurons, in]``; with a gate ``gate_up_proj`` ``[E, 2 neurons, in]``, the gate first.
        down_proj: ``[E, out, neurons]``.
        up_proj_bias, gate_up_proj_bias: ``[E, neurons]`` or ``[E, 2 neurons]``, if the layer has it.
    """

    def __init__(self, config: Any, sizes: tuple[int, int, int, int], gated: bool, about: dict[str, Any]) -> None:
        super().__init__()
        self.num_experts, neurons, width, out = sizes
        rows = 2 * neurons if gated else neurons
        self.up_name = "gate_up_proj" if gated else "up_proj"
        setattr(self, self.up_name, nn.Parameter(torch.empty(self.num_experts, rows, width, **about)))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, out, neurons, **about))

    @classmethod
    def build(
        cls, config: Any, sizes: tuple[int, int, int, int], act: str, gated: bool, bias: bool, about: dict[str, Any]
    ) -> NeuronExperts:
        """Return experts without values. ``sizes``: experts, neurons of each, width of the input and of the output."""
        made = cls(config, sizes, gated, about)
        made.act_fn = ACT2FN[act]
        made.has_gate, made.has_bias = gated, bias
        if bias:
            rows = getattr(made, made.up_name).shape[1]
            made.register_parameter(f"{made.up_name}_bias", nn.Parameter(torch.empty(sizes[0], rows, **about)))
        return made

    @property
    def down_proj_bias(self) -> Tensor:
        """Zeros ``[E, out]``: the bias of the whole layer is added once, by ``MoefiedFFN``."""
        return self.down_proj.new_zeros(1).expand(self.down_proj.shape[:2])

    def neurons(self, x: Tensor, expert: int) -> Tensor:
        """Return the activations ``[T, neurons]`` of one expert for ``x`` ``[T, in]``."""
        bias = getattr(self, f"{self.up_name}_bias")[expert] if self.has_bias else None
        inner = F.linear(x, getattr(self, self.up_name)[expert], bias)
        return self._apply_gate(inner) if self.has_gate else self.act_fn(inner)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute ``[T, out]`` expert by expert, for ``hidden_states`` ``[T, in]``, index and weights ``[T, k]``."""
        out = hidden_states.new_zeros(len(hidden_states), self.down_proj.shape[1])
        for expert in range(self.num_experts):
            tokens, choices = (top_k_index == expert).nonzero(as_tuple=True)
            if len(tokens):
                inner = self.neurons(hidden_states[tokens], expert)
                part = F.linear(inner, self.down_proj[expert]) * top_k_weights[tokens, choices, None]
                out = out.index_add(0, tokens, part.to(out.dtype))
        return out


class NeuronRouter(nn.Module):
    """Scores the experts of a feed-forward layer for each token.

    ``similarity``: the product of the normalized input with the center of each expert. ``mlp``: of its tanh a second
    matrix makes the scores. No gradient reaches it, since the chosen experts have weight 1.

    Attributes:
        centers: ``[E, in]``.
        mixing: ``[E, E]``, of an ``mlp``.
    """

    def __init__(self, experts: int, width: int, kind: str, about: dict[str, Any]) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.empty(experts, width, **about), requires_grad=False)
        if kind == "mlp":
            self.mixing = nn.Parameter(torch.empty(experts, experts, **about), requires_grad=False)
        else:
            self.register_parameter("mixing", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores ``[T, E]`` for ``x`` ``[T, in]``."""
        scores = F.linear(F.normalize(x, dim=-1), self.centers)
        return scores if self.mixing is None else F.linear(torch.tanh(scores), self.mixing)


class MoefiedFFN(nn.Module):
    """A whole feed-forward layer, in the place of its last projection.

    Attributes:
        active: how many experts each token computes.
        bias: ``[out]``, of the last projection, or None.
    """

    bias: nn.Parameter | None

    def __init__(self, config: Any, width: int, out: int, entry: dict[str, Any], about: dict[str, Any]) -> None:
        super().__init__()
        experts, self.active = entry["experts"], entry["active"]
        if not 1 <= self.active <= experts or entry["neurons"] % experts or entry["act"] not in ACT2FN:
            raise ValueError(f"config.moefication does not describe a feed-forward layer: {str(entry)[:200]}")
        sizes = (experts, entry["neurons"] // experts, width, out)
        self.router = NeuronRouter(experts, width, entry["router"], about)
        self.experts = NeuronExperts.build(config, sizes, entry["act"], entry["gated"], entry["bias"], about)
        self.register_parameter("bias", nn.Parameter(torch.empty(out, **about)) if entry["out_bias"] else None)
        self.inlet: list[Inlet] = []  # in a list, so that it is not registered twice

    @property
    def weight(self) -> Tensor:
        """The stacked last matrices: T5 reads the dtype of the projection that was here."""
        return self.experts.down_proj

    def choose(self, x: Tensor) -> Tensor:
        """Return the experts that each token computes, int64 ``[T, active]``, for ``x`` ``[T, in]``."""
        experts = self.experts.num_experts
        if self.active == experts:
            return torch.arange(experts, device=x.device).expand(len(x), experts)
        return self.router(x).topk(self.active, dim=-1).indices

    def forward(self, nothing: Tensor) -> Tensor:
        """Return ``[..., out]`` for the input ``[..., in]`` that the inlet keeps; ``nothing`` is ``[..., 0]``."""
        x = self.inlet[0].take()
        tokens = x.reshape(-1, x.shape[-1])
        chosen = self.choose(tokens)
        out = self.experts(tokens, chosen, tokens.new_ones(chosen.shape))
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], -1)


def connect(ffn: MoefiedFFN, inlet: Inlet) -> None:
    """Give a feed-forward layer its input."""
    ffn.inlet[:] = [inlet]


def choose_implementation(model: nn.Module, asked: str | None = None) -> None:
    """Set how experts are computed: as asked, or else by the grouped product, as transformers does by default.

    It does not take float64, or rows that are not a multiple of 16 bytes long: for those expert by expert.
    """
    stacks = [p for m in model.modules() if isinstance(m, NeuronExperts) for p in m.parameters() if p.dim() == 3]
    fused = all(
        p.dtype != torch.float64 and all(size * p.element_size() % 16 == 0 for size in p.shape[1:]) for p in stacks
    )
    model.config._experts_implementation_internal = asked or ("grouped_mm" if fused else "eager")


class MoefiedModules(ReplacedModules):
    """Base of a model class in which the feed-forward layers of ``config.moefication`` are divided into experts."""

    replaced_field = "moefication"

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        # The stock classes inside refuse any other implementation, since they have no experts themselves.
        asked, config._experts_implementation = config._experts_implementation, "eager"
        super().__init__(config, *inputs, **kwargs)
        choose_implementation(self, asked)  # type: ignore[arg-type]
        own = dict(self.named_modules())  # type: ignore[attr-defined]
        prefix = f"{getattr(self, 'base_model_prefix', '')}."
        settings = getattr(config, self.replaced_field, None) or {}
        for name, entry in settings.get("modules", {}).items():
            for down in (name, prefix + name, name.removeprefix(prefix)):
                if isinstance(own.get(down), MoefiedFFN):
                    inlet = entry["inlets"][0]
                    beside = (inlet, prefix + inlet, inlet.removeprefix(prefix))
                    connect(own[down], next(own[up] for up in beside if isinstance(own.get(up), Inlet)))

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers keeps the answer with the stock class that this one inherits from.
        return True

    def replacement(self, module: nn.Module, entry: Any, field: dict[str, Any]) -> nn.Module:
        if "experts" not in entry:
            return Inlet(entry["keeps"])
        weight: Any = module.weight
        out = weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[1]
        about = {"dtype": weight.dtype, "device": weight.device}
        return MoefiedFFN(self.config, entry["width"], out, entry, about)  # type: ignore[attr-defined]
