"""The mixtures of experts of transformers that have the attention and norms of a dense class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import ModelError


@dataclass(frozen=True)
class Native:
    """The mixture-of-experts class of transformers with the attention, norms and feed-forward layers of a dense class.

    Attributes:
        model_type: the target's.
        mixes: True if dense and expert layers may alternate (``decoder_sparse_step``, ``mlp_only_layers``).
        jitters: True if its routers have noise on their input in training (``router_jitter_noise``).
        shares: True if its layers have a shared expert.
    """

    model_type: str
    mixes: bool = False
    jitters: bool = False
    shares: bool = False

    def fields(self, config: PretrainedConfig, step: Any) -> dict[str, Any]:
        """Return the fields of the target's configuration that the dense one lacks; ``step`` is the technique's."""
        fields: dict[str, Any] = {
            "num_experts_per_tok": step.top_k,
            "router_aux_loss_coef": step.aux_loss,
            "output_router_logits": False,
            "sliding_window": getattr(config, "sliding_window", None),
        }
        if not self.mixes:
            return {**fields, "num_local_experts": step.experts, "router_jitter_noise": step.router_jitter}
        if self.shares:
            fields["shared_expert_intermediate_size"] = step.shared_width
        return {
            **fields,
            "num_experts": step.experts,
            "moe_intermediate_size": config.intermediate_size,
            "decoder_sparse_step": step.every,
            "mlp_only_layers": sorted(step.dense_layers),
            "norm_topk_prob": True,
        }


NATIVE = {
    "llama": Native("mixtral", jitters=True),
    "mistral": Native("mixtral", jitters=True),
    "qwen2": Native("qwen2_moe", mixes=True, shares=True),
    "qwen3": Native("qwen3_moe", mixes=True),
}


def find_native(model: PreTrainedModel, step: Any, label: str) -> Native:
    """Return the native class for ``model``. Raises ``ModelError`` with what is supported, or why this model is not."""
    native = NATIVE.get(model.config.model_type)
    if native is None:
        raise ModelError(
            f"{label}: no class of transformers has the attention of {type(model).__name__} and experts; "
            f"supported: {', '.join(sorted(NATIVE))}"
        )
    asked = f"every={step.every}" if step.every != 1 else f"dense_layers={list(step.dense_layers)}"
    if (step.every != 1 or step.dense_layers) and not native.mixes:
        raise ModelError(
            f"{label}: {native.model_type} has experts in every layer, so {asked} cannot be expressed for "
            f"{model.config.model_type} (it can for {_those_with('mixes')}); leave it out"
        )
    if step.router_jitter and not native.jitters:
        raise ModelError(
            f"{label}: the routers of {native.model_type} have no noise, so router_jitter cannot be expressed for "
            f"{model.config.model_type} (it can for {_those_with('jitters')}); leave it out"
        )
    layers = model.config.num_hidden_layers
    if beyond := [index for index in step.dense_layers if index >= layers]:
        raise ModelError(f"{label}: dense_layers has {beyond[0]}, but the last of the {layers} layers is {layers - 1}")
    if not set(range(step.every - 1, layers, step.every)) - set(step.dense_layers):
        raise ModelError(f"{label}: every={step.every} and dense_layers select none of the {layers} layers")
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise ModelError(f"{label}: {native.model_type} has no layers with their own window")
    return native


def _those_with(ability: str) -> str:
    return ", ".join(sorted(name for name, native in NATIVE.items() if getattr(native, ability)))
