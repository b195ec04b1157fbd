"""Adaptive attention spans: each head learns how far back it looks, and keys beyond are neither computed nor kept.

    A_ij = m(i - j) exp(s_ij) / sum_k m(i - k) exp(s_ik),      m(x) = clamp((z S - x) / R + 1, 0, 1) for x < S

Sukhbaatar, Grave, Bojanowski, Joulin, "Adaptive Attention Span in Transformers", arXiv 1905.07799, section 2.2: a soft
mask m with a ramp of R tokens, whose length z S, up to the largest span S, is learned for each head. The loss has the
penalty ``coefficient * S * mean of z`` over the heads of a layer, summed over layers, and z is brought back to 0 to 1
after each step.

- In the paper and in the authors' code a query does not see itself, and x is 0 for the token before it. The queries of
  transformers' models do: here x is the distance i - j, 0 for the query itself. So every row sees something, and a span
  of z S covers one token less of the past.
- The paper's equation has no epsilon; the authors' code divides by the sum + 1e-8, which changes a weight by at most
  1e-8 of the sum of m times softmax. Here it is the equation: with z S at least the length, attention is the dense
  model's, to the last bit.
- The authors train from scratch and start at z = 0 (``init``); a pretrained model starts at 1, where nothing changes.
  In both cases a key at distance R or more from a head at z = 0 is off, nearer ones are partly on.
- In an encoder the distance counts on both sides.

What is off is left out: prefill computes the blocks within the longest support of each head, and caches hold for each
group of key/value heads what its longest head can see. A checkpoint keeps z and the ramp, exactly as trained. With
``fix``, or ``model.fix_spans()`` at any time, each head gets the window ``ceil(z S + R)`` (at most S), which holds all
that the ramp leaves on, and weighs it fully; the change of the loss is measured and written to the record.

The code is saved with the checkpoint: no class of transformers has windows by head. REMOTE_CODE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from hf_optim import Card, Contract, ModelError, Paper, Reload, Run, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode, convert, joined, require_own_code
from hf_optim.toolkit.attention import (
    BY_DISTANCE,
    FIELD,
    STORED,
    Band,
    context_length,
    hidden_states,
    probe,
    prove,
    require_on_interface,
    require_self_attention,
)
from hf_optim.toolkit.topology import dummy_inputs

from . import _span_mask, _span_model
from ._span_figures import Keys, figures_of
from ._span_loss import mean_loss

TERM = "span"  # name of the penalty in the log


@technique(
    "adaptive_span",
    family="adaptive",
    paper=Paper("1905.07799", "Adaptive Attention Span in Transformers", 2019),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION, traits.QUANTIZED},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
    trains=True,
)
class AdaptiveSpan(Technique):
    """Train the attention span of each head, with a penalty on long ones.

    Attributes:
        max_span: S, the longest span in tokens; None: the context of the model.
        ramp: R, over how many tokens the mask falls from 1 to 0.
        coefficient: of the penalty in the loss; 2e-6 in the authors' scripts. 0 leaves spans to the task alone.
        init: z at the start, from 0 to 1; the authors' models, which are trained from scratch, start at 0.
        span_lr: learning rate of z, which has no weight decay; None: that of the Trainer, at which spans of a
            pretrained model hardly move.
        fix: make windows of the spans when training ends, and measure the loss before and after.
    """

    max_span: int | None = option(None, low=1, high=_span_model.LONGEST)
    ramp: int = option(32, low=1, high=_span_model.LONGEST)
    coefficient: float = option(2e-6, low=0.0)
    init: float = option(1.0, low=0.0, high=1.0)
    span_lr: float | None = option(0.005, above=0.0)
    fix: bool = False

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="adaptive_span",
        source=joined(*STORED, *BY_DISTANCE, _span_mask, _span_model),
        config_base=_span_model.AdaptiveSpanBase.__name__,
        field=FIELD,
        model_base=_span_model.AdaptiveSpanModel.__name__,
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"ramp": 3, "init": 0.1})

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        require_own_code(model, self.remote_code, label)
        require_on_interface(model, label)
        self._largest(model.config, label)

    def _largest(self, config: Any, label: str) -> int:
        """Return the longest span for a model. Raises ``ModelError`` if nothing says what it is."""
        context = context_length(config)
        if self.max_span is None and context is None:
            raise ModelError(
                f"{label}: {config.model_type} has no fixed context, which could be the longest span: set max_span"
            )
        if self.max_span is not None and context is not None and self.max_span > context:
            raise ModelError(f"{label}: max_span is {self.max_span}, and the model reads at most {context} tokens")
        return self.max_span or context  # type: ignore[return-value]

    @hookimpl
    def prepare_load(self, run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        require_self_attention(run.config, run.label(self), run.loaded_class)
        self._largest(run.config, run.label(self))
        return None

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        model, label = run.model, run.label(self)
        require_own_code(model, self.remote_code, label)
        inputs = dummy_inputs(model.base_model)  # type: ignore[arg-type]
        full = hidden_states(model, inputs)
        causal = prove(model, inputs, full, label).causal
        size = self._largest(model.config, label)
        modules = _span_model.attentions(model)
        with probe(model, Band(None, None)) as called:
            hidden_states(model, inputs)
        if set(called) != {id(module) for module in modules}:
            raise ModelError(
                f"{label}: other modules of {type(model).__name__} compute attention than those that say if they are "
                "causal; this architecture is not supported"
            )
        code = convert(model, self.remote_code, {"max_span": size, "ramp": self.ramp, "windows": None})
        code.set_up_attention()  # type: ignore[operator]
        model.attach_attention()  # type: ignore[operator]
        with torch.no_grad():
            for module in modules:
                module.span.z.fill_(self.init)  # type: ignore[operator, union-attr]
        run.record.reload = Reload.REMOTE_CODE.name
        state = run.state(self)
        width = model.dtype.itemsize
        state.keys = {
            id(module): Keys(each.heads, (each.key_width + each.value_width) * width)
            for module, each in ((module, called[id(module)]) for module in modules)
        }
        state.causal, state.context = causal, context_length(model.config) or full.shape[1]
        run.report(
            self,
            max_span=size,
            ramp=self.ramp,
            layers=len(modules),
            heads=sum(len(module.span.z) for module in modules),  # type: ignore[union-attr, arg-type, misc]
            context=state.context,
            fixed=False,
            model_class=type(model).__name__,
        )
        self._report(run)
        return model

    def _report(self, run: Run) -> None:
        """Report what the spans of the model save."""
        modules = _span_model.attentions(run.model)
        settings: Any = getattr(run.model.config, FIELD)
        if settings["windows"] is None:
            size, ramp = settings["max_span"], settings["ramp"]
            counts = [[_span_mask.support(z, size, ramp) for z in m.span.shares(True)] for m in modules]  # type: ignore
        else:
            counts = settings["windows"][: len(modules)]
        state = run.state(self)
        keys = [state.keys[id(module)] for module in modules]
        run.report(self, **figures_of(counts, keys, state.context, state.causal))

    # -- training -----------------------------------------------------------------------------------------------------
    @hookimpl
    def training_loss(
        self, run: Run, model: nn.Module, inputs: Mapping[str, Any], outputs: Any
    ) -> dict[str, Tensor] | None:
        if not self.coefficient:
            return None
        size = getattr(run.model.config, FIELD)["max_span"]
        return {TERM: self.coefficient * size * torch.stack([span.z.mean() for span in learned(model)]).sum()}

    def loss_items(self, run: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {TERM: 1}

    @hookimpl
    def parameter_groups(self, run: Run, model: nn.Module) -> list[dict[str, Any]] | None:
        rate = {} if self.span_lr is None else {"lr": self.span_lr}
        chosen = [span.z for span in learned(model) if span.z.requires_grad]
        return [{"params": chosen, "weight_decay": 0.0, **rate}] if chosen else None

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        return [ClampSpans(self, run)]

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        for span in learned(run.model):
            span.clamp_()
        if self.fix:
            batches = getattr(run.state(self), "batches", [])
            before = mean_loss(run.model, batches)
            run.model.fix_spans()  # type: ignore[operator]
            run.report(self, fixed=True)
            if before is not None:
                after = mean_loss(run.model, batches)
                run.report(
                    self,
                    perplexity_as_trained=math.exp(before),
                    perplexity_fixed=math.exp(after),  # type: ignore[arg-type]
                    perplexity_on=f"{len(batches)} batches of the {run.state(self).source} data",
                )
        self._report(run)

    def recompute(self, case: Any) -> dict[str, Any]:
        settings, config = case.config["attention_pattern"], case.config
        size, ramp = settings["max_span"], settings["ramp"]
        spans = [case.tensors[name].tolist() for name in sorted(case.tensors) if name.endswith(".span.z")]
        counts = [[sum(x < z * size + ramp for x in range(size)) for z in layer] for layer in spans]
        context = config["max_position_embeddings"]
        causal = "CausalLM" in config["architectures"][0]
        pairs, seen = 0, 0
        for layer in counts:
            for count in layer:
                for i in range(context):
                    pairs += i + 1 if causal else context
                    seen += sum(abs(i - j) < count and (j <= i or not causal) for j in range(context))
        every = [min(count, context) for layer in counts for count in layer]
        found = {
            "max_span": size,
            "ramp": ramp,
            "layers": len(counts),
            "heads": len(every),
            "context": context,
            "fixed": settings["windows"] is not None,
            "mean_span": sum(every) / len(every),
            "longest_spans": [min(max(layer), context) for layer in counts],
            "share_of_attention": seen / pairs,
            "model_class": config["architectures"][0],
        }
        if not causal:
            return found
        with torch.no_grad():
            out = case.stored(torch.full((1, context), 5), use_cache=True)
        layers = (out.get("cache") or out.past_key_values).layers
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        width = config["hidden_size"] // config["num_attention_heads"]
        full = len(counts) * heads * context * 2 * width * case.stored.dtype.itemsize
        return {**found, "cache_bytes": sum(layer.held_bytes() for layer in layers), "full_cache_bytes": full}

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        if not figures:
            return
        kind = (
            "windows, fixed after training" if figures["fixed"] else f"learned, with a ramp of {figures['ramp']} tokens"
        )
        text = (
            f"The {figures['heads']} heads of {figures['layers']} attentions look back {figures['mean_span']:.0f} "
            f"tokens on average, of at most {figures['max_span']} ({kind}). At {figures['context']} tokens they see "
            f"{figures['share_of_attention']:.1%} of the keys of full attention"
        )
        if "cache_bytes" in figures:
            text += (
                f", and a cache holds {figures['cache_bytes']:,} bytes of keys and values of a row, in place of "
                f"{figures['full_cache_bytes']:,}"
            )
        if "perplexity_fixed" in figures:
            text += (
                f". Fixing the windows changed the perplexity on {figures['perplexity_on']} from "
                f"{figures['perplexity_as_trained']:.4g} to {figures['perplexity_fixed']:.4g}"
            )
        card.paragraph("Adaptive spans", f"{text}.")
        rows = [[number, span] for number, span in enumerate(figures["longest_spans"])]
        card.table("Longest span by layer", ["layer", "tokens"], rows)


def learned(model: nn.Module) -> list[Any]:
    """Return the learned spans of a model, also of one that is wrapped for training or came with a checkpoint."""
    return [module for module in model.modules() if type(module).__name__ == _span_mask.HeadSpans.__name__]


class ClampSpans(TrainerCallback):
    """Brings spans back to 0 to 1 after each step, and keeps a few batches to measure fixed windows on."""

    def __init__(self, step: AdaptiveSpan, run: Run) -> None:
        self.step, self.run = step, run

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for span in learned(self.run.model):
            span.clamp_()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step.fix:
            held_out = kwargs.get("eval_dataloader")
            found = some_batches(held_out or kwargs.get("train_dataloader"))
            kept = self.run.state(self.step)
            kept.batches, kept.source = found, "evaluation" if held_out else "training"


def some_batches(loader: Any, most: int = 8) -> list[Any]:
    """Return the first batches of a data loader; random numbers that it draws are taken back."""
    found: list[Any] = []
    if loader is None:
        return found
    with torch.random.fork_rng(devices=[]):
        for batch in loader:
            found.append(batch)
            if len(found) == most:
                break
    return found


@hookimpl
def register_techniques(register) -> None:
    register(AdaptiveSpan)
