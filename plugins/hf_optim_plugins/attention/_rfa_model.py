"""Random feature attention in the models of transformers.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_optim.toolkit.attention import Call, LearnedAttachment, LearnedConfig, LearnedModel, TensorState, whole

from ._feature_draws import Drawn, count_forward, fill_, gaussian_features, generator_for
from ._linear_kernel import TrigSums
from ._rfa_attention import rfa_attention

GATE_BEGINS = 5.0  # the bias of a new gate: g = 0.993, a memory of about 150 tokens


@dataclass(frozen=True)
class RfaSettings:
    """What the configuration says of random feature attention; see the fields of the technique."""

    features: int
    tau: float
    floor: float
    gate: bool
    draws: int
    seed: int
    key_heads: int
    head_width: int


class RfaFeatures(Drawn):
    """The random features of one attention, and its gate.

    Attributes:
        pool: drawn features ``[max(draws, key heads), features, width]``, of variance 1.
        used: int64 ``[key heads]``: those of the pool that training uses; evaluation uses the first.
        sigma: learned scale ``[key heads, width]``.
        gate_weight, gate_bias: ``[key heads, width]`` and ``[key heads]``, of a gated attention.
    """

    pool: Tensor
    used: Tensor

    def __init__(self, settings: RfaSettings, layer: int) -> None:
        super().__init__(1 if settings.draws else 0)
        self.settings, self.layer = settings, layer
        heads, width = settings.key_heads, settings.head_width
        self.register_buffer("pool", torch.empty(max(settings.draws, heads), settings.features, width))
        self.register_buffer("used", torch.arange(heads))
        self.sigma = nn.Parameter(torch.empty(heads, width))
        if settings.gate:
            self.gate_weight = nn.Parameter(torch.empty(heads, width))
            self.gate_bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the pool to the draws of the seed, scales to 1, and gates to one for all tokens."""
        fill_(self.sigma, torch.ones_like(self.sigma))
        if self.settings.gate:
            fill_(self.gate_weight, torch.zeros_like(self.gate_weight))
            fill_(self.gate_bias, torch.full_like(self.gate_bias, GATE_BEGINS))
        fill_(self.draws, torch.zeros_like(self.draws))
        if not self.pool.is_meta:
            fill_(self.used, torch.arange(len(self.used)))
            generator = generator_for(self.settings.seed, self.layer)
            many, features, width = self.pool.shape
            fill_(self.pool, gaussian_features(many, features, width, generator))

    def draw(self, number: int) -> None:
        """Choose the features that training uses, by the seed, the layer and the number of the draw."""
        generator = generator_for(self.settings.seed, self.layer, number + 1)
        self.used = torch.randperm(len(self.pool), generator=generator)[: len(self.used)].to(self.used)

    def weight(self) -> Tensor:
        """Return W, ``[key heads, features, width]``; in a backward that computes a forward again, W of that one."""
        if self.training and self.settings.draws:
            return self.pool[self.forwards.value(lambda: self.used)]
        return self.pool[: len(self.sigma)]

    def scale(self) -> Tensor:
        """Return sigma / tau, ``[key heads, width]``, float32 or float64."""
        return self.sigma.to(torch.promote_types(self.sigma.dtype, torch.float32)) / self.settings.tau

    def log_gate(self, value: Tensor) -> Tensor | None:
        """Return the logarithm of g for values ``[R, G, P, D]``, ``[R, G, P]``; None without a gate."""
        if not self.settings.gate:
            return None
        dtype = torch.promote_types(value.dtype, torch.float32)
        scores = torch.einsum("rgpd,gd->rgp", value.to(dtype), self.gate_weight.to(dtype))
        return functional.logsigmoid(scores + self.gate_bias.to(dtype)[:, None])


class RfaAttachment(LearnedAttachment):
    """The attention function around ``rfa_attention``."""

    title = "random feature attention"

    def read(self, settings: Mapping[str, Any]) -> RfaSettings:
        """Return the settings. Raises ``ValueError`` for any others."""
        gate = settings.get("gate")
        if not isinstance(gate, bool):
            raise ValueError(f"random feature attention has gate={str(gate)[:40]!r}, not true or false")
        found = RfaSettings(
            features=whole(settings, "features", low=1, high=65536),
            tau=_above_zero(settings, "tau"),
            floor=_above_zero(settings, "floor"),
            gate=gate,
            draws=whole(settings, "draws", high=65536),
            seed=whole(settings, "seed"),
            key_heads=whole(settings, "key_heads", low=1, high=4096),
            head_width=whole(settings, "head_width", low=1, high=4096),
        )
        if unknown := sorted(str(name)[:40] for name in set(settings) - set(vars(found))):
            raise ValueError(f"random feature attention has settings that it does not know: {unknown[:4]}")
        return found

    def build_part(self, settings: Mapping[str, Any], layer: int) -> nn.Module:
        """Return the features of an attention."""
        return RfaFeatures(self.read(settings), layer)

    def compute_call(self, part: Any, call: Call) -> tuple[Tensor, TensorState | None]:
        """Return the output of a call, and its sums. ``part`` has the attributes of ``RfaFeatures``."""
        if part.settings.gate and not call.causal:
            raise ValueError("the gate forgets earlier tokens, which a model that is not causal does not order")
        state = None if call.state is None else TrigSums(*(call.state[name] for name in TrigSums._fields))
        with torch.autocast(call.query.device.type, enabled=False):
            gate = part.log_gate(call.value)
            out, state = rfa_attention(
                call.query, call.key, call.value, part.weight(), part.scale(), call.causal, part.settings.floor, gate,
                call.valid, state, call.keeps,
            )  # fmt: skip
        return out, None if state is None else TensorState(state._asdict())


def _above_zero(settings: Mapping[str, Any], name: str) -> float:
    """Return a number of the settings. Raises ``ValueError`` unless it is finite and above 0."""
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"random feature attention has {name}={str(value)[:40]!r}, not a number above 0")
    return float(value)


ATTACHMENT = RfaAttachment("hf_optim_rfa")


class RfaBase(LearnedConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT


class RfaModel(LearnedModel):
    """Base of the model classes: forwards in training are counted, each of which chooses features."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        count_forward(self)  # type: ignore[arg-type]
        return super().__call__(*args, **kwargs)
