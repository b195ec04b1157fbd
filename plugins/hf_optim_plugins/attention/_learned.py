"""Give a model attention with learned parts, and prove on the model that it is reached."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import ModelError, NumericalError, Reload, Run, Technique, hookimpl
from hf_optim.checkpoints.remote_code import RemoteCode, convert, joined, require_own_code
from hf_optim.toolkit.attention import (
    FIELD,
    LEARNED,
    PART,
    STORED,
    LearnedAttachment,
    LearnedModel,
    add_parts,
    attentions,
    hidden_states,
    number_layers,
)
from hf_optim.toolkit.topology import dummy_inputs

from ._attach import context_length, prove, require_interface, require_self_attention
from ._key_sizes import key_sizes


def learned_code(name: str, pages: tuple[ModuleType, ...], config_base: str, model_base: str = "") -> RemoteCode:
    """Return the code that is stored with the models of a technique.

    Args:
        name: of the technique.
        pages: the modules with its mathematics and its ``LearnedAttachment``, each before those that import from it.
        config_base: name of the base of configuration classes in ``pages``.
        model_base: name of the base of model classes in ``pages``; empty for ``LearnedModel``.
    """
    return RemoteCode(
        name=name,
        source=joined(*STORED, *LEARNED, *pages),
        config_base=config_base,
        field=FIELD,
        model_base=model_base or LearnedModel.__name__,
    )


def require_finite(model: PreTrainedModel, inputs: Mapping[str, Any], full: Tensor, label: str) -> None:
    """Raise ``NumericalError`` if ``full``, what the body of a model makes of ``inputs``, holds infinite or NaN values.

    The error names the first module whose output does.
    """
    if bool(full.isfinite().all()):
        return
    found: list[str] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) and out else out
            if isinstance(first, Tensor) and not bool(first.isfinite().all()):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        hidden_states(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    raise NumericalError(
        f"{label}: the output of {found[0] if found else type(model).__name__} holds infinite or NaN values; check "
        "that the model computes finite outputs in this dtype (float16 overflows at 65504: use bfloat16 or float32)"
    )


class LearnedTechnique(Technique):
    """Base of the techniques that compute attention with learned parts.

    A subclass has the attachment, the code, ``settings`` and the reasons for models that it refuses.

    Attributes:
        attachment: the implementation, as it is registered.
        remote_code: what is stored with its models.
        not_causal: why it is for models that are not causal alone; empty if it is for both.
        only_causal: why it is for causal models alone; empty if it is for both.
    """

    attachment: ClassVar[LearnedAttachment]
    remote_code: ClassVar[RemoteCode]
    not_causal: ClassVar[str] = ""
    only_causal: ClassVar[str] = ""

    def settings(self, config: PretrainedConfig, sizes: Mapping[str, int], label: str) -> dict[str, Any]:
        """Return the settings for a model, as they go into its ``config.json``: plain JSON.

        Args:
            config: of the model.
            sizes: ``heads`` of queries, ``key_heads``, ``head_width``, ``layers``, and 1 or 0 for ``causal``.
            label: begins messages.

        Raises ``ModelError`` if the technique does not fit the model.
        """
        raise NotImplementedError

    def settings_of(self, model: PreTrainedModel, sizes: Mapping[str, int], label: str) -> dict[str, Any]:
        """Return ``settings``, where they need more than the configuration: names of modules of the model."""
        return self.settings(model.config, sizes, label)

    def initialize(self, run: Run, model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
        """Initialize the learned parts of a model from what it was, before its attention changes."""

    def figures(self, model: PreTrainedModel, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the record says beside settings, layers, context, added weights and class."""
        return {}

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        require_interface(model, self.remote_code, label)

    @hookimpl
    def prepare_load(self, run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        require_self_attention(run.config, run.label(self))
        return None

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        model, label = run.model, run.label(self)
        require_interface(model, self.remote_code, label)
        require_own_code(model, self.remote_code, label)
        inputs = dummy_inputs(model.base_model)  # type: ignore[arg-type]
        full = hidden_states(model, inputs)
        require_finite(model, inputs, full, label)
        # Experts round differently with other tokens beside them, so that a causal model may not look like one.
        causal = prove(model, inputs, full, label).causal or all(each.is_causal is True for each in attentions(model))
        kind = type(model).__name__
        if causal and self.not_causal:
            raise ModelError(f"{label}: {kind} is causal: {self.not_causal}")
        if not causal and self.only_causal:
            raise ModelError(f"{label}: {kind} is not causal: {self.only_causal}")
        text = model.config.get_text_config()
        key_heads, width = key_sizes(model, inputs, attentions(model), label)
        sizes = {
            "heads": text.num_attention_heads,
            "key_heads": key_heads,
            "head_width": width,
            "layers": text.num_hidden_layers,
            "causal": int(causal),
        }
        settings = self.settings_of(model, sizes, label)
        weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        try:
            self.attachment.read(settings)
            number_layers(model)
            add_parts(model, self.attachment, settings, device=weight.device, dtype=weight.dtype)
        except ValueError as error:
            raise ModelError(f"{label}: {error}") from None
        self.initialize(run, model, settings)
        convert(model, self.remote_code, dict(settings))
        model.attach_attention()  # type: ignore[operator]
        run.record.reload = Reload.REMOTE_CODE.name
        parts = [getattr(module, PART, None) for module in attentions(model)]
        added = {each: each.numel() for part in parts if part is not None for each in part.parameters()}
        run.report(
            self,
            **settings,
            layers=sizes["layers"],
            context=context_length(model.config) or full.shape[1],
            weights_added=sum(added.values()),
            model_class=type(model).__name__,
            **self.figures(model, settings),
        )
        return model
