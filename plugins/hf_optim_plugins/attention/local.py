"""Local attention: every token attends to the positions less than ``window`` away from its own.

    A = softmax(Q K^T / sqrt(d) + M) V,      M[i, j] = 0 if |i - j| < window and the model allows j, else -inf

In a causal model token i sees itself and the window - 1 tokens before it; in an encoder also the window - 1 after it.
With window >= n this is the model's full attention. After Beltagy et al., "Longformer: The Long-Document Transformer",
arXiv 2004.05150, section 3.1, without its global tokens: in a classifier, the first token also sees only its window.

How the checkpoint reloads depends on the model:

- A class whose configuration has ``sliding_window`` keeps its class, and Llama becomes Mistral, which is Llama with a
  window; the weights are the same tensors. STOCK_ARCH.
- With ``full_layers``, some layers keep full attention. Classes that read the kind of each layer from ``layer_types``
  (Qwen2, Gemma 2 ...) express that, and Llama and Mistral become Ministral. STOCK_ARCH.
- Any other model that takes its attention from ``AttentionInterface`` (GPT-2, OPT, BERT, ViT, a Llama with biases ...)
  gets its own class, whose code is saved with the checkpoint. REMOTE_CODE.

In both cases it is checked, on the model, that the window is the only change.

On cost: the window bounds the key/value cache of a decoder. Models with code of their own compute only the blocks of
the window, on a GPU by a kernel: time is linear in the sequence length. Stock classes do so with ``flex_attention`` on
CUDA and with FlashAttention; ``sdpa`` and ``eager`` apply the window as a mask and still compute the whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import Contract, ModelError, Paper, Reload, Run, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode
from hf_optim.toolkit.attention import FIELD, attends_to_the_far_end, hidden_states, is_causal
from hf_optim.toolkit.modules import relative_difference, rounding_tolerance, transplant
from hf_optim.toolkit.topology import NoInputsError, dummy_inputs

from . import _local_pattern
from ._attach import attach, remote_code_of

# Model types whose class, given a window, is that of another model type; and given windows in some layers only.
WITH_WINDOW = {"llama": "mistral"}
WITH_LAYER_TYPES = {"llama": "ministral", "mistral": "ministral"}


@technique(
    "local",
    family="attention",
    paper=Paper("2004.05150", "Longformer: The Long-Document Transformer", 2020),
    contract=Contract(
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION},
        adds={traits.LOCAL_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.STOCK_ARCH,
)
class Local(Technique):
    """Restrict the attention of every token to a sliding window.

    Attributes:
        window: positions per side that a token sees, its own included. At least 2, since a stock sliding cache cannot
            be empty.
        full_layers: layers that keep full attention, by index from 0: with one in every few, what is far away still
            reaches every position.
        implementation: the attention implementation of a stock class; ``auto`` leaves the choice to the call of
            ``from_pretrained``, or else to the model (``sdpa`` if it supports it). ``flex_attention`` skips the blocks
            outside the window, on CUDA. Models with code of their own have an implementation that does so everywhere.
    """

    window: int = option(512, low=2)
    full_layers: tuple[int, ...] = ()
    implementation: Literal["auto", "sdpa", "eager", "flex_attention"] = "auto"

    remote_code: ClassVar[RemoteCode] = remote_code_of("local", _local_pattern, _local_pattern.LocalBase.__name__)

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        refuse_cross_attention(model.config, label)
        refuse_pattern(model.config, label)
        layers = model.config.get_text_config().num_hidden_layers
        if any(not 0 <= layer < layers for layer in self.full_layers) or len(set(self.full_layers)) < len(
            self.full_layers
        ):
            raise ModelError(
                f"{label}: full_layers are different layers of the {layers} of the model, counted from 0, not "
                f"{list(self.full_layers)}"
            )
        if stock_config_class(model.config) is None and model.config.get_text_config() is not model.config:
            raise ModelError(
                f"{label}: a window does not reach the attention of {type(model).__name__}, whose parts have "
                "configurations of their own; this architecture is not supported"
            )
        try:
            inputs = dummy_inputs(model)
        except NoInputsError:
            return  # calibration data may have them
        if len(inputs) > 1:
            raise ModelError(
                f"{label}: {type(model).__name__} reads {' and '.join(inputs)} in parts with attention of their own; "
                "local attention is for decoder-only and encoder-only models"
            )

    @hookimpl
    def prepare_load(self, run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        refuse_cross_attention(run.config, run.label(self))
        refuse_pattern(run.config, run.label(self))
        stock = stock_config_class(run.config, bool(self.full_layers)) is not None
        return {"attn_implementation": self.implementation} if stock and self.implementation != "auto" else None

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        model, label = run.model, run.label(self)
        inputs = dummy_inputs(model)
        full = hidden_states(model, inputs)
        causal = is_causal(model, inputs, full)
        made = self._with_stock_class(model, inputs, full)
        if made is None:
            made = self._with_own_code(run, label)
        else:
            run.record.reload = Reload.STOCK_ARCH.name
        length = context_length(made, full)
        layers = made.config.get_text_config().num_hidden_layers
        share = attended_share(length, self.window, causal)
        run.report(
            self,
            window=self.window,
            layers=layers,
            full_layers=len(self.full_layers),
            context=length,
            share_of_attention=(share * (layers - len(self.full_layers)) + len(self.full_layers)) / layers,
            model_class=type(made).__name__,
        )
        return made

    def _with_stock_class(
        self, model: PreTrainedModel, inputs: dict[str, Tensor], full: Tensor
    ) -> PreTrainedModel | None:
        """Return the model as a stock class with a window, sharing its weights; None if there is no such class."""
        config_class = stock_config_class(model.config, bool(self.full_layers))
        if config_class is None:
            return None
        target = transplant.find_counterpart(type(model), type(model.config), config_class)
        if target is None:
            return None
        layers = model.config.get_text_config().num_hidden_layers

        def build(window: int, full_layers: Iterable[int] = ()) -> PreTrainedModel | None:
            fields = window_fields(model.config, config_class, window, frozenset(full_layers))
            made, spare = transplant.transplant(
                model, target, transplant.translate_config(model.config, config_class, **fields)
            )
            return made if not spare and not transplant.meta_tensor_names(made) else None

        # The extremes: a window of twice the dummy text changes nothing, nor does one of 1 that no layer has; in all
        # layers it isolates every token.
        wide, isolated = build(2 * full.shape[1]), build(1)
        unused = build(1, range(layers)) if self.full_layers else wide
        if wide is None or isolated is None or unused is None:
            return None
        same = max(relative_difference(hidden_states(one, inputs), full) for one in {wide, unused})
        if same > rounding_tolerance(model) or attends_to_the_far_end(isolated, inputs):
            return None
        return build(self.window, self.full_layers)

    def _with_own_code(self, run: Run, label: str) -> PreTrainedModel:
        """Give the model its own class with a window, in place, and return it."""
        if self.implementation != "auto":
            raise ModelError(
                f"{label}: {type(run.model).__name__} with a window has code and an attention implementation of its "
                f"own: leave out implementation={self.implementation}"
            )
        settings = {"window": self.window, "full_layers": list(self.full_layers)}
        return attach(run, self, self.remote_code, _local_pattern.ATTACHMENT, settings)

    def recompute(self, case: Any) -> dict[str, Any]:
        own = case.config.get(FIELD) or {}
        window = own.get("window") or case.config["sliding_window"]
        length, causal = case.config["max_position_embeddings"], "CausalLM" in case.config["architectures"][0]
        place = torch.arange(length)
        allowed = place[:, None] >= place if causal else torch.ones(length, length, dtype=torch.bool)
        near = allowed & ((place[:, None] - place).abs() < window)
        kinds = case.config.get("layer_types") or []
        layers = len(kinds) or case.config["num_hidden_layers"]
        full = len(own["full_layers"]) if own else kinds.count("full_attention")
        return {
            "window": window,
            "layers": layers,
            "full_layers": full,
            "context": length,
            "share_of_attention": ((layers - full) * int(near.sum()) / int(allowed.sum()) + full) / layers,
            "model_class": case.config["architectures"][0],
        }


def stock_config_class(config: PretrainedConfig, by_layer: bool = False) -> type[PretrainedConfig] | None:
    """Return the stock configuration class with ``sliding_window`` for this architecture, or None.

    ``by_layer``: the one with ``layer_types``, too.
    """
    own = type(config)()
    if hasattr(own, "sliding_window") and (not by_layer or getattr(own, "layer_types", None) is not None):
        return type(config)
    target = (WITH_LAYER_TYPES if by_layer else WITH_WINDOW).get(config.model_type)
    return transplant.config_class_of(target) if target is not None else None


def window_fields(
    config: PretrainedConfig, target: type[PretrainedConfig], window: int, full_layers: Set[int]
) -> dict[str, Any]:
    """Return the fields of a stock configuration class that make layers windowed, of those that it has."""
    fields: dict[str, Any] = {"sliding_window": window}
    known = target()
    if hasattr(known, "use_sliding_window"):
        fields["use_sliding_window"] = True
    if hasattr(known, "max_window_layers"):
        fields["max_window_layers"] = 0
    if getattr(known, "layer_types", None) is not None:
        kinds = ("sliding_attention", "full_attention")
        fields["layer_types"] = [kinds[layer in full_layers] for layer in range(config.num_hidden_layers)]
    return fields


def refuse_cross_attention(config: PretrainedConfig, label: str) -> None:
    """Raise ``ModelError`` for models with cross-attention, where the positions of two sequences do not compare."""
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise ModelError(
            f"{label}: {config.model_type} has cross-attention between two sequences, for which a window of positions "
            "means nothing; local attention is for decoder-only and encoder-only models"
        )


def refuse_pattern(config: PretrainedConfig, label: str) -> None:
    """Raise ``ModelError`` for models whose attention is sparse already."""
    if getattr(config, FIELD, None) is not None:
        raise ModelError(
            f"{label}: the attention of this {config.model_type} model has a pattern already, and a window would take "
            "its place: start from the model before that step"
        )


def context_length(model: PreTrainedModel, full: Tensor) -> int:
    """Return the maximal number of positions of the model, or those of the dummy input if it is not configured."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or full.shape[1]


def attended_share(length: int, window: int, causal: bool) -> float:
    """Return the pairs of positions inside the window, as a share of those that full attention computes."""
    full = length * (length + 1) // 2 if causal else length * length
    reach = min(window, length)
    one_sided = length * reach - reach * (reach - 1) // 2
    return (one_sided if causal else 2 * one_sided - length) / full


@hookimpl
def register_techniques(register) -> None:
    register(Local)
