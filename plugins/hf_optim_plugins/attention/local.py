"""Local attention: every token attends to the positions less than `window` away from its own.

    A = softmax(Q K^T / sqrt(d) + M) V,      M[i, j] = 0 if |i - j| < window and the model allows j, else -inf

In a causal model token i sees itself and the window - 1 tokens before it; in an encoder also the window - 1 after it.
With window >= n that is the attention of the model as it was. After Beltagy et al., "Longformer: The Long-Document
Transformer", arXiv 2004.05150, section 3.1, without its global tokens: in a classifier the first token, too, sees no
more than its window.

How the result comes back depends on the model:

- A class whose configuration has `sliding_window` keeps its class, and Llama becomes Mistral, which is Llama with a
  window; the weights are the same tensors. STOCK_ARCH.
- Any other model that takes its attention from `AttentionInterface` (GPT-2, OPT, BERT, ViT, a Llama with biases ...)
  gets a class of its own, whose code travels with the checkpoint. REMOTE_CODE.

Either way it is checked, on the model, that the window is all that changed.

On cost: the key/value cache of a decoder is bounded by the window. Time is linear in the sequence length only with a
kernel that skips blocks outside the window: `flex_attention` on CUDA, and FlashAttention for the stock classes.
`sdpa` and `eager` apply the window as a mask and still compute the whole matrix.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import Contract, ModelError, Paper, Reload, Run, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode, convert
from hf_optim.toolkit.modules import rounding_tolerance, transplant
from hf_optim.toolkit.topology import dummy_inputs

from . import _windowed_attention

# A class that is another one with a window.
WITH_WINDOW = {"llama": "mistral"}


@technique(
    "local",
    family="attention",
    paper=Paper("2004.05150", "Longformer: The Long-Document Transformer", 2020),
    contract=Contract(
        forbids={traits.LOCAL_ATTENTION},
        adds={traits.LOCAL_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.STOCK_ARCH,
)
class Local(Technique):
    """Every token attends to the positions less than a window away.

    Attributes:
        window: positions per side that a token sees, its own included. At least 2, since a stock sliding cache cannot
            be empty.
        implementation: the attention implementation; `auto` leaves the choice to the call of `from_pretrained`, or else
            to the model (`sdpa` where it can). `flex_attention` skips what lies outside the window, on CUDA.
    """

    window: int = option(512, low=2)
    implementation: Literal["auto", "sdpa", "eager", "flex_attention"] = "auto"

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="local",
        source=inspect.getsource(_windowed_attention),
        config_base=_windowed_attention.WindowedConfig.__name__,
        field="attention_window",
        default=4096,
    )

    @hookimpl
    def prepare_load(self, run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        refuse_cross_attention(run.config, run.label(self))
        chosen = None if self.implementation == "auto" else self.implementation
        if stock_config_class(run.config) is not None:
            return {"attn_implementation": chosen} if chosen else None
        # The caller's choice gets its window when the class is made. AutoModel puts it into the configuration.
        caller = load_kwargs.get("attn_implementation") or (run.loading and run.config._attn_implementation)
        if caller and chosen in (None, caller):
            return None
        state = run.state(self)
        state.before = run.config._attn_implementation
        run.config.attention_window = self.window
        return {"attn_implementation": _windowed_attention.PREFIX + (chosen or kernel_of(run.config))}

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        model, label = run.model, run.label(self)
        self._restore(run)
        refuse_cross_attention(model.config, label)
        inputs = dummy_inputs(model)
        full = hidden_states(model, inputs)
        causal = is_causal(model, inputs, full)
        made = self._stock(model, inputs, full)
        level = Reload.STOCK_ARCH
        if made is None:
            made, level = self._own(model, inputs, full, label), Reload.REMOTE_CODE
        run.record.reload = level.name
        length = context_length(made, full)
        layers = made.config.get_text_config().num_hidden_layers
        run.report(
            self,
            window=self.window,
            layers=layers,
            context=length,
            share_of_attention=attended_share(length, self.window, causal),
            model_class=type(made).__name__,
        )
        return made

    def _stock(self, model: PreTrainedModel, inputs: dict[str, Tensor], full: Tensor) -> PreTrainedModel | None:
        """The model as a stock class with a window, sharing its weights; None if there is no such class."""
        config_class = stock_config_class(model.config)
        if config_class is None:
            return None
        target = transplant.find_counterpart(type(model), type(model.config), config_class)
        if target is None:
            return None

        def build(window: int) -> PreTrainedModel | None:
            config = transplant.translate_config(model.config, config_class, **window_fields(model.config, window))
            made, spare = transplant.transplant(model, target, config)
            return made if not spare and not transplant.meta_tensor_names(made) else None

        # Twice the dummy text is out of reach, and 1 leaves each token alone: the two ends show what the window does.
        wide, alone = build(2 * full.shape[1]), build(1)
        if wide is None or alone is None or not only_the_window(full, wide, alone, inputs, rounding_tolerance(model)):
            return None
        return build(self.window)

    def _own(self, model: PreTrainedModel, inputs: dict[str, Tensor], full: Tensor, label: str) -> PreTrainedModel:
        """The model with a class of its own, in place. Raises `ModelError`, and leaves it alone, if that is in vain."""
        before, had = model.config._attn_implementation, hasattr(model.config, "attention_window")
        try:
            model.set_attn_implementation(_windowed_attention.implementation(self._kernel(model.config)))
        except ValueError as error:
            raise ModelError(f"{label}: {type(model).__name__} cannot take a windowed attention: {error}") from error
        try:
            model.config.attention_window = 2 * full.shape[1]
            wide = hidden_states(model, inputs)
            model.config.attention_window = 1
            lonely = leaks(model, inputs)
        finally:
            if not had:
                del model.config.attention_window
            model.set_attn_implementation(before)
        if lonely or relative(wide, full) > rounding_tolerance(model):
            raise ModelError(
                f"{label}: a window does not reach the attention of {type(model).__name__}, which does not take its "
                "mask from transformers' AttentionMaskInterface; this architecture is not supported"
            )
        chosen = _windowed_attention.implementation(self._kernel(model.config))
        convert(model, self.remote_code, self.window)
        model.config.bound_cache()
        model.set_attn_implementation(chosen)
        return model

    def _kernel(self, config: PretrainedConfig) -> str:
        return self.implementation if self.implementation != "auto" else kernel_of(config)

    def _restore(self, run: Run) -> None:
        """Undo what `prepare_load` asked for, so that the model can be compared with itself."""
        config, state = run.model.config, run.state(self)
        if hasattr(state, "before"):
            if (config._attn_implementation or "").startswith(_windowed_attention.PREFIX):
                run.model.set_attn_implementation(kernel_of(config) if state.before is None else state.before)
            config.__dict__.pop("attention_window", None)


def stock_config_class(config: PretrainedConfig) -> type[PretrainedConfig] | None:
    """The stock configuration class that can say `sliding_window` for this architecture; None without one."""
    if hasattr(type(config)(), "sliding_window"):
        return type(config)
    target = WITH_WINDOW.get(config.model_type)
    return transplant.config_class_of(target) if target is not None else None


def window_fields(config: PretrainedConfig, window: int) -> dict[str, Any]:
    """What makes a stock configuration windowed in every layer, where it has the fields."""
    fields: dict[str, Any] = {"sliding_window": window}
    if hasattr(config, "use_sliding_window"):
        fields["use_sliding_window"] = True
    if hasattr(config, "max_window_layers"):
        fields["max_window_layers"] = 0
    if getattr(config, "layer_types", None) is not None:
        fields["layer_types"] = ["sliding_attention"] * config.num_hidden_layers
    return fields


def kernel_of(config: PretrainedConfig) -> str:
    """The attention implementation that a configuration names, without a window; `sdpa` if it names none."""
    return (config._attn_implementation or "sdpa").removeprefix(_windowed_attention.PREFIX)


def refuse_cross_attention(config: PretrainedConfig, label: str) -> None:
    """Raise `ModelError` for models in which one sequence reads another one, where positions cannot be compared."""
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise ModelError(
            f"{label}: {config.model_type} has cross-attention between two sequences, for which a window of positions "
            "means nothing; local attention is for decoder-only and encoder-only models"
        )


def hidden_states(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states [1, T, d] of the model under its head, in evaluation mode."""
    body = model.base_model
    modes = [(module, module.training) for module in body.modules()]
    body.eval()
    extra = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    try:
        with torch.no_grad():
            return body(**inputs, **extra)[0].double()
    finally:
        for module, mode in modes:
            module.training = mode


def only_the_window(
    full: Tensor, wide: PreTrainedModel, alone: PreTrainedModel, inputs: dict[str, Tensor], tolerance: float
) -> bool:
    """Whether `wide` computes what the model did before, and in `alone` no position hears of another one."""
    return relative(hidden_states(wide, inputs), full) <= tolerance and not leaks(alone, inputs)


def leaks(model: PreTrainedModel, inputs: dict[str, Tensor]) -> bool:
    """Whether a change of the first input position shows at the last one, or the other way round.

    Beyond rounding, since experts see tokens in groups, and a matrix product rounds by its size.
    """
    tolerance = max(1e-5, 2 * torch.finfo(model.dtype).eps)
    before = hidden_states(model, inputs)
    first, last = changed(inputs, 0), changed(inputs, -1)
    far = [(hidden_states(model, first)[:, -1], before[:, -1]), (hidden_states(model, last)[:, 0], before[:, 0])]
    return any(relative(after, was) > tolerance for after, was in far)


def changed(inputs: dict[str, Tensor], position: int) -> dict[str, Tensor]:
    """The inputs with another token, or another corner of the picture, at the first (0) or last (-1) position."""
    name, value = next(iter(inputs.items()))
    value = value.clone()
    if value.is_floating_point():
        value[..., position, position] += 1.0
    else:
        value[:, position] = value[:, 1]
    return {**inputs, name: value}


def relative(values: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest value of `reference`."""
    scale = reference.abs().max().clamp_min(torch.finfo(reference.dtype).tiny)
    return float((values - reference).abs().max() / scale)


def is_causal(model: PreTrainedModel, inputs: dict[str, Tensor], full: Tensor) -> bool:
    """Whether the first position is blind to the last one; `full` are the hidden states for `inputs`."""
    return relative(hidden_states(model, changed(inputs, -1))[:, 0], full[:, 0]) == 0


def context_length(model: PreTrainedModel, full: Tensor) -> int:
    """Positions that the model is made for; those of the dummy input where the configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or full.shape[1]


def attended_share(length: int, window: int, causal: bool) -> float:
    """The pairs of positions inside the window, as a share of those that full attention computes."""
    full = length * (length + 1) // 2 if causal else length * length
    reach = min(window, length)
    one_sided = length * reach - reach * (reach - 1) // 2
    return (one_sided if causal else 2 * one_sided - length) / full


@hookimpl
def register_techniques(register) -> None:
    register(Local)
