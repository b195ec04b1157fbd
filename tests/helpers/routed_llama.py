"""A mixture whose router and shared-expert gate are plain linear layers, under names that say nothing."""

from __future__ import annotations

import torch
from tiny_models import tiny_llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM


class Routed(nn.Module):
    """Two of four experts for each token, and an expert for all tokens behind a gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Linear(width, 4, bias=False)
        self.b = nn.ModuleList(self._expert(width) for _ in range(4))
        self.c = self._expert(width)
        self.d = nn.Linear(width, 1, bias=False)
        self.chosen: Tensor | None = None

    @staticmethod
    def _expert(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, hidden: Tensor) -> Tensor:
        probabilities = self.a(hidden).softmax(-1)
        factors, self.chosen = probabilities.topk(2, dim=-1)
        factors = torch.zeros_like(probabilities).scatter(-1, self.chosen, factors)
        result = torch.sigmoid(self.d(hidden)) * self.c(hidden)
        for index, expert in enumerate(self.b):
            result = result + factors[..., index : index + 1] * expert(hidden)
        return result


class RoutedLlama(LlamaForCausalLM):
    """A Llama with these mixtures in place of its feed-forward layers."""

    def __init__(self, config) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Routed(config.hidden_size)
        self.post_init()

    def chosen(self, **inputs: Tensor) -> Tensor:
        """Return the experts that each layer chooses ``[L, B, T, 2]``."""
        with torch.no_grad():
            self(**inputs)
        return torch.stack([layer.mlp.chosen for layer in self.model.layers])


def routed_llama() -> RoutedLlama:
    """Return a tiny random model whose routers and gates are not trained."""
    config = tiny_llama().config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RoutedLlama(config).eval()
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.a.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
        layer.mlp.a.requires_grad_(False)
        layer.mlp.d.requires_grad_(False)
    return model


ROUTING = tuple(f"model.layers.{index}.mlp.{name}" for index in (0, 1) for name in ("a", "d"))
