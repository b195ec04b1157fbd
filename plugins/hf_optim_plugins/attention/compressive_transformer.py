"""Compressive Transformer: what leaves the memory of earlier tokens is compressed, and kept longer.

    keys of a segment:  [ compressed memory: n_cm slots | memory: n_m tokens | the segment ],     slot = f_c(c tokens)

Rae, Potapenko, Jayakumar, Lillicrap, "Compressive Transformers for Long-Range Sequence Modelling", arXiv 1911.05507,
section 3. A text is read in segments (``segment``, n_s). A query sees its segment up to itself, the ``memory`` tokens
before the segment, and the ``compressed`` latest windows of ``ratio`` tokens before the memory, each made one. So it
reaches back ``memory + ratio * compressed`` tokens in a layer, and a cache holds at most ``segment + memory`` tokens
and ``compressed + (segment + memory) / ratio`` slots, whatever the length of the text. Segments and windows count from
the first token of a row that is not padding; ``ratio`` divides ``segment`` and ``memory``.

- What is compressed: the inputs of a layer, as in the paper, here those of its attention, behind the norm of models
  that have it first. A slot is projected to a key and a value by the weights of the layer, and has the position of its
  last token. The paper trains from scratch with the relative positions of Transformer-XL; here the model keeps its own,
  so a pretrained decoder can be converted. Its memory is that of ``transformer_xl`` with carried positions.
- f_c (``function``): a convolution with kernel and stride ``ratio``, from all channels to all, that begins as the mean
  (``conv``, the paper's best); ``mean`` or ``max`` of each channel, without weights. Not built: the paper's
  ``most-used`` and dilated convolutions.
- What trains the convolution (``loss``): ``attention``, the paper's best: the mean square of what the queries of a
  segment read from the tokens that leave the memory, less what they read from their windows. ``autoencoding``: what a
  decoder, a transposed convolution with weights of its own, gives back of the tokens. Neither reaches any other weight,
  and the gradient of the task does not reach the convolution, as in the paper. ``task``: it does, in rows of several
  segments, and there is no other loss. The loss is added to that of the task in training, by ``loss_weight``; the stock
  ``Trainer`` minimizes both.
- No gradient flows through the memory, nor from a slot to the tokens in it.
- With ``ratio: 1`` and the identity (an untrained convolution), and as many slots as there are tokens, nothing is lost:
  this is the dense model. So it is, to the bit, where a memory covers the text.

Rows of several segments are trained in one forward. The checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import (
    Card,
    Contract,
    ModelError,
    Paper,
    RecipeError,
    Reload,
    Run,
    Technique,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.checkpoints.remote_code import RemoteCode, convert, joined, require_own_code
from hf_optim.toolkit.attention import FIELD, STORED, hidden_states
from hf_optim.toolkit.modules import own_loss, relative_difference, rounding_tolerance
from hf_optim.toolkit.topology import dummy_inputs

from . import _compression, _compressive_cache, _compressive_model, _position_bound, _segment_walk
from ._attach import context_length, prove, require_interface, require_self_attention
from ._memory_checks import require_decoder, require_rotation, table_of

WHAT = "a memory of earlier segments"


@technique(
    "compressive_transformer",
    family="attention",
    paper=Paper("1911.05507", "Compressive Transformers for Long-Range Sequence Modelling", 2019),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION, traits.QUANTIZED},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class CompressiveTransformer(Technique):
    """Read texts in segments with a memory of earlier tokens, and a compressed memory of those before.

    Attributes:
        segment: tokens of a segment.
        memory: tokens before a segment that its queries see as they are.
        compressed: slots before the memory that they see.
        ratio: tokens of a slot; it divides ``segment`` and ``memory``.
        function: how tokens become a slot: ``conv``, ``mean`` or ``max``.
        loss: what trains the convolution: ``attention`` or ``autoencoding`` beside the task, or the ``task`` alone.
        loss_weight: of that loss.
    """

    segment: int = option(128, low=1, high=_compressive_model.LONGEST_MEMORY)
    memory: int = option(128, low=1, high=_compressive_model.LONGEST_MEMORY)
    compressed: int = option(128, low=1, high=_compressive_model.LONGEST_MEMORY)
    ratio: int = option(4, low=1, high=4096)
    function: Literal["conv", "mean", "max"] = "conv"
    loss: Literal["attention", "autoencoding", "task"] = "attention"
    loss_weight: float = option(1.0, low=0.0)

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="compressive_transformer",
        source=joined(
            *STORED, own_loss, _position_bound, _segment_walk, _compression, _compressive_cache, _compressive_model
        ),
        config_base=_compressive_model.CompressiveTransformerBase.__name__,
        field=FIELD,
        model_base=_compressive_model.CompressiveTransformerModel.__name__,
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"segment": 4, "memory": 2, "compressed": 3, "ratio": 2})

    def validate(self) -> None:
        for name in ("segment", "memory"):
            if getattr(self, name) % self.ratio:
                raise RecipeError(
                    f"compressive_transformer: ratio={self.ratio} does not divide {name}={getattr(self, name)}: a "
                    "segment and a memory are of whole windows"
                )

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        require_interface(model, self.remote_code, label)
        require_decoder(model, WHAT, label)
        self._require_fitting(model.config, label)

    def _require_fitting(self, config: PretrainedConfig, label: str) -> None:
        """Raise ``ModelError`` for distances that the model does not know."""
        require_self_attention(config, label)
        require_rotation(config, label)
        context, reach = context_length(config), self.segment + self.memory + self.ratio * self.compressed
        if context is not None and reach > context:
            raise ModelError(
                f"{label}: a segment of {self.segment:,} tokens, a memory of {self.memory:,} and {self.compressed:,} "
                f"slots of {self.ratio:,} make distances up to {reach - 1:,}, and the model has {context:,} positions: "
                "choose smaller ones, or put extend_positions before this step"
            )

    @hookimpl
    def prepare_load(self, run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        self._require_fitting(run.config, run.label(self))
        return None

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        model, label = run.model, run.label(self)
        require_own_code(model, self.remote_code, label)
        require_decoder(model, WHAT, label)
        inputs = dummy_inputs(model)
        full = hidden_states(model, inputs)
        if not prove(model, inputs, full, label).causal:
            raise ModelError(f"{label}: {type(model).__name__} is not causal, and {WHAT} is for decoders")
        table = table_of(model, label)
        _require_known_positions(model, table, label)
        settings = {
            **{name: getattr(self, name) for name in ("segment", "memory", "compressed", "ratio", "function", "loss")},
            "loss_weight": self.loss_weight,
            "table": table,
        }
        weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        before = model.num_parameters()
        convert(model, self.remote_code, settings)
        model.set_up_attention()  # type: ignore[operator]
        for module in model.modules():
            if hasattr(module, "compression"):
                module.compression.to(device=weight.device, dtype=weight.dtype)
        model.attach_attention()  # type: ignore[operator]
        short = {name: part[:, : self.segment] for name, part in inputs.items()}
        if relative_difference(hidden_states(model, short), full[:, : self.segment]) > rounding_tolerance(model):
            raise ModelError(f"{label}: {type(model).__name__} computes something else in its first segment")
        run.record.reload = Reload.REMOTE_CODE.name
        context = context_length(model.config) or full.shape[1]
        run.report(
            self,
            **settings,
            layers=model.config.get_text_config().num_hidden_layers,
            context=context,
            share_of_attention=share(context, settings),
            reach=self.segment + self.memory + self.ratio * self.compressed,
            weights_added=model.num_parameters() - before,
            model_class=type(model).__name__,
        )
        return model

    def recompute(self, case: Any) -> dict[str, Any]:
        settings, length = case.config[FIELD], case.config["max_position_embeddings"]
        size, memory, ratio, most = (settings[name] for name in ("segment", "memory", "ratio", "compressed"))
        seen = 0
        for i in range(length):
            first = i - i % size
            windows = [w for w in range(length // ratio) if (w + 1) * ratio <= first - memory]
            seen += len(windows[-most:]) + sum(1 for j in range(i + 1) if j >= first - memory)
        return {
            **settings,
            "layers": len(case.config["layer_types"]),
            "context": length,
            "share_of_attention": seen / (length * (length + 1) / 2),
            "reach": size + memory + ratio * most,
            "weights_added": sum(t.numel() for name, t in case.tensors.items() if ".compression." in name),
            "model_class": case.config["architectures"][0],
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        card.paragraph(
            "Compressed memory",
            f"Texts are read in segments of {figures['segment']:,} tokens. A query sees its segment, the "
            f"{figures['memory']:,} tokens before it as they are, and {figures['compressed']:,} slots before these, "
            f"each made of {figures['ratio']:,} tokens ({figures['function']}; {figures['weights_added']:,} weights): "
            f"{figures['reach']:,} tokens in all.",
        )


def share(length: int, settings: Mapping[str, Any]) -> float:
    """Return the keys and slots that queries see, as a share of the keys of full attention over ``length`` tokens."""
    place = torch.arange(length)
    begin = place // settings["segment"] * settings["segment"]
    tokens = place + 1 - (begin - settings["memory"]).clamp_min(0)
    slots = ((begin - settings["memory"]).clamp_min(0) // settings["ratio"]).clamp_max(settings["compressed"])
    return int((tokens + slots).sum()) / (length * (length + 1) / 2)


def _require_known_positions(model: PreTrainedModel, table: int, label: str) -> None:
    """Raise ``ModelError`` unless positions come from a table, or as rotations that the attention is given."""
    attentions = [module for module in model.modules() if hasattr(module, "is_causal")]
    given = all("position_embeddings" in inspect.signature(module.forward).parameters for module in attentions)
    if not table and not given:
        raise ModelError(
            f"{label}: {type(model).__name__} makes positions in a way that slots do not get theirs from; this "
            "architecture is not supported"
        )


@hookimpl
def register_techniques(register) -> None:
    register(CompressiveTransformer)
