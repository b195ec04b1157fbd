"""Rotary positions stretched to a longer context, by the fields that transformers has for them."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import ModelError
from hf_optim.toolkit.modules import replace

METHODS = ("linear", "ntk", "dynamic", "yarn")


def rotary_parameters(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return ``rope_parameters`` of a configuration; None if it has none."""
    found = getattr(config, "rope_parameters", None)
    return dict(found) if isinstance(found, dict) and found else None


def scaled(config: PretrainedConfig, method: str, length: int, label: str) -> tuple[dict[str, Any], int]:
    """Return ``rope_parameters`` and ``max_position_embeddings`` for ``length`` positions.

    ``linear`` divides positions by the factor (Chen et al., arXiv 2306.15595). ``ntk`` raises the base to
    ``theta * factor ** (d / (d - 2))``, so that the lowest frequency is divided by the factor and the highest stays.
    ``dynamic`` does so by the length of each input, and changes nothing up to the old length; transformers takes that
    from ``max_position_embeddings``, so that stays. ``yarn`` is Peng et al., arXiv 2309.00071.

    Raises ``ModelError`` for positions that are scaled already, or differ between layers.
    """
    old = rotary_parameters(config)
    assert old is not None
    if old.get("rope_type", "default") != "default":
        raise ModelError(
            f"{label}: the rotary positions of this model are scaled already ({str(old['rope_type'])[:40]!r})"
        )
    if any(isinstance(value, dict) for value in old.values()):
        raise ModelError(f"{label}: rotary positions that differ between layers are not supported")
    before = config.max_position_embeddings
    factor = length / before
    if method == "ntk":
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = int(head * old.get("partial_rotary_factor", 1.0))
        return {**old, "rope_theta": float(old["rope_theta"] * factor ** (width / (width - 2)))}, length
    new = {**old, "rope_type": method, "factor": factor}
    if method == "yarn":
        new["original_max_position_embeddings"] = before
    return new, before if method == "dynamic" else length


def rescale(model: PreTrainedModel, parameters: dict[str, Any], positions: int, label: str) -> None:
    """Set ``rope_parameters`` and ``max_position_embeddings``, and replace the rotary modules, in place.

    Raises ``ModelError``, and leaves the model unchanged, if it has no such modules or cannot make them.
    """
    config = model.config
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, "inv_freq")]
    if not found:
        raise ModelError(
            f"{label}: {type(model).__name__} has no module that computes rotary positions from rope_parameters; this "
            "architecture is not supported"
        )
    before = {name: getattr(config, name, None) for name in ("rope_parameters", "max_position_embeddings", "head_dim")}
    config.rope_parameters, config.max_position_embeddings = parameters, positions
    if before["head_dim"] is None and "head_dim" in vars(config):
        config.head_dim = config.hidden_size // config.num_attention_heads  # transformers' yarn reads it
    try:
        made = [(name, type(module)(config).to(module.inv_freq.device)) for name, module in found]  # type: ignore
    except Exception as error:
        for name, value in before.items():
            if name in vars(config):
                setattr(config, name, value)
        raise ModelError(f"{label}: {type(model).__name__} cannot scale its rotary positions so: {error}") from error
    for (name, module), (_, new) in zip(found, made, strict=True):
        replace.replace_module(model, name, new.train(module.training))
