"""Experts in the place of a feed-forward layer, whatever modules the layer is made of.

A feed-forward layer is not one module in every architecture (OPT, BERT), so two kinds of modules take the places of its
linear layers: an ``Inlet`` for each projection of the input, which passes on neurons of width zero and keeps the input,
and for the last projection a ``WholeLayer``, which computes the whole layer. What the model does between them, an
activation, is applied to nothing. The experts are on transformers' interface for experts, so each of its
implementations computes them.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from hf_optim.toolkit.modules import ByEitherName, CodedExperts, Inlet, ReplacedModules, connect, grouped_where_it_fits


@grouped_where_it_fits
@use_experts_implementation
class StackedExperts(nn.Module):
    """The experts of one feed-forward layer in transformers' stacked layout; ``build`` makes one.

    Attributes:
        up_proj: ``[E, neurons, in]``; with a gate ``gate_up_proj`` ``[E, 2 neurons, in]``, the gate first.
        down_proj: ``[E, out, neurons]``.
        up_proj_bias, gate_up_proj_bias, down_proj_bias: ``[E, rows]``, if the layer has biases.
    """

    down_proj_bias: Tensor
    act_fn: nn.Module
    _apply_gate: Any  # of the decorator

    def __init__(self, config: Any, sizes: tuple[int, int, int, int], gated: bool, about: dict[str, Any]) -> None:
        super().__init__()
        self.num_experts, neurons, width, out = sizes
        rows = 2 * neurons if gated else neurons
        self.up_name = "gate_up_proj" if gated else "up_proj"
        setattr(self, self.up_name, nn.Parameter(torch.empty(self.num_experts, rows, width, **about)))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, out, neurons, **about))

    @classmethod
    def build(
        cls, config: Any, sizes: tuple[int, int, int, int], entry: dict[str, Any], about: dict[str, Any]
    ) -> StackedExperts:
        """Return experts without values.

        Args:
            config: of the model; it says which implementation computes them.
            sizes: experts, neurons of each, width of the input and of the output.
            entry: of the layer in the configuration.
            about: dtype and device.
        """
        made = cls(config, sizes, entry["gated"], about)
        made.act_fn = ACT2FN[entry["act"]]
        made.has_gate, made.has_bias = entry["gated"], entry["bias"]
        for name in (f"{made.up_name}_bias", "down_proj_bias") if entry["bias"] else ():
            rows = getattr(made, name.removesuffix("_bias")).shape[1]
            if not hasattr(cls, name):
                made.register_parameter(name, nn.Parameter(torch.empty(sizes[0], rows, **about)))
        return made

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
                bias = self.down_proj_bias[expert] if self.has_bias else None
                part = F.linear(self.neurons(hidden_states[tokens], expert), self.down_proj[expert], bias)
                out = out.index_add(0, tokens, (part * top_k_weights[tokens, choices, None]).to(out.dtype))
        return out


class WholeLayer(nn.Module):
    """Base of the modules that compute a feed-forward layer in the place of its last projection.

    A subclass defines ``compute``, and has ``experts``.
    """

    experts: StackedExperts

    def __init__(self) -> None:
        super().__init__()
        self.inlet: list[Inlet] = []  # in a list, so that it is not registered twice

    @property
    def weight(self) -> Tensor:
        """The stacked last matrices: T5 reads the dtype of the projection that was here."""
        return self.experts.down_proj

    def compute(self, tokens: Tensor) -> Tensor:
        """Return ``[T, out]`` for ``tokens`` ``[T, in]``."""
        raise NotImplementedError

    def forward(self, nothing: Tensor) -> Tensor:
        """Return ``[..., out]`` for the input ``[..., in]`` that the inlet keeps; ``nothing`` is ``[..., 0]``."""
        x = self.inlet[0].take()
        return self.compute(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def choose_implementation(model: Any, asked: str | None = None) -> None:
    """Set how experts are computed: as asked, or else by the grouped product, as transformers does by default."""
    model.config._experts_implementation_internal = asked or "grouped_mm"


class FeedForwardModules(CodedExperts, ReplacedModules):
    """Base of a model class whose feed-forward layers are built from the entries of its configuration.

    The entry of a last projection has ``experts``, the ``width`` of its input and the names of its ``inlets``, of which
    the first keeps the input. A subclass sets ``replaced_field`` and defines ``whole_layer``.
    """

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        # The stock classes inside refuse any other implementation, since they have no experts themselves.
        asked, config._experts_implementation = config._experts_implementation, "eager"
        super().__init__(config, *inputs, **kwargs)
        choose_implementation(self, asked)
        modules = ByEitherName(self)  # type: ignore[arg-type]
        settings = getattr(config, self.replaced_field, None) or {}
        for name, entry in settings.get("modules", {}).items():
            layer = modules[name]
            if isinstance(layer, WholeLayer):
                inlet = modules[entry["inlets"][0]]
                if not isinstance(inlet, Inlet):
                    raise ValueError(f"config.{self.replaced_field}: nothing keeps the input of {name}")
                connect(layer, inlet)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers keeps the answer with the stock class that this one inherits from.
        return True

    def capacity_problem(self, priority: str) -> str:
        """Return why a capacity with this priority does not apply to the experts, or ``""``."""
        if priority == "position" or not self.has_equal_gates():
            return ""
        return "gives all chosen experts a gate of 1, so none is larger; use a capacity that goes by position"

    def has_equal_gates(self) -> bool:
        """Return True if the gates of all chosen experts are 1."""
        return True

    def whole_layer(self, out: int, entry: dict[str, Any], about: dict[str, Any]) -> WholeLayer:
        """Return the module of an entry; ``out`` is the width of its output, ``about`` its dtype and device."""
        raise NotImplementedError

    def replacement(self, module: nn.Module, entry: Any, field: dict[str, Any]) -> nn.Module:
        if "experts" not in entry:
            return Inlet(entry["keeps"])
        if entry["act"] not in ACT2FN or entry["experts"] < 1:
            raise ValueError(f"config.{self.replaced_field} does not describe a layer: {str(entry)[:200]}")
        weight: Any = module.weight
        out = weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[1]
        return self.whole_layer(out, entry, {"dtype": weight.dtype, "device": weight.device})
