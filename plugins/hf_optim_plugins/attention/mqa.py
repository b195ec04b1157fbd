"""Multi-query and grouped-query attention: several query heads share one head of keys and values.

    head_h = softmax(Q_h K_g^T / sqrt(d)) V_g,      g = h // (H / G),      h = 0 .. H - 1

With G = 1 key/value head it is multi-query attention (Shazeer, arXiv 1911.02150), with 1 < G < H grouped-query
attention (Ainslie et al., arXiv 2305.13245). A cache holds G heads in place of H, and a decoding step reads that much
less. A trained model is converted by pooling the weights and biases that compute keys and values, over the consecutive
heads of each group,

    W_K,g = mean over h in group g of W_K,h,      b_K,g likewise,      W_V,g, b_V,g likewise,

and then trained on for a small share of its original steps (the paper: 5 %). The step itself trains nothing. Pooling
changes the outputs, unless the heads of a group are equal already. The heads of a rotary embedding are rotated alike,
so the mean of keys before the rotation is the mean after it. A norm of keys (Qwen3) is not linear: there the norm of
the mean takes the place of the mean of norms, which differs, and training makes up for it as for the rest.

Heads are found by what the model computes, in separate and in fused projections. How the checkpoint reloads:

- A class whose configuration has a number of key/value heads (Llama, Mistral, Qwen, Phi-3, Mixtral, EuroBERT ...) keeps
  its class with that number changed. GPT-2 with one head becomes GPT-BigCode, which is GPT-2 with multi-query
  attention. STOCK_ARCH.
- Others on transformers' ``AttentionInterface`` (OPT, GPT-NeoX, BERT, ViT, T5, GPT-2 with several) get their own class,
  whose code is saved with the checkpoint. REMOTE_CODE.

In each case it is checked, on the model, that it computes what the original computes with the equal heads repeated, and
that a cache holds G heads.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import Contract, ModelError, Paper, Reload, Run, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode, joined
from hf_optim.toolkit import topology
from hf_optim.toolkit.modules import main_output, relative_difference, remote_code_guard, replace, rounding_tolerance
from hf_optim.toolkit.topology import KeyValueHeads, NoInputsError, dummy_inputs

from . import _grouped_heads, _head_record
from ._head_conversion import Conversion, by_bigcode, by_stock_config
from ._own_heads import by_own_code
from ._pooling import MEAN, RANDOM, apply_masks_, make_equal_, make_masks_equal

if TYPE_CHECKING:
    from hf_optim import Card

UNSUPPORTED = {
    "falcon": "Falcon repeats shared heads before it caches them, so fewer of them save no memory",
    "bloom": "Bloom computes its attention itself, outside of transformers' AttentionInterface",
    "mpt": "MPT computes its attention itself, outside of transformers' AttentionInterface",
}
"""Model types that are refused, and why."""


@technique(
    "mqa",
    family="attention",
    paper=Paper("2305.13245", "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head", 2023),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.QUANTIZED, traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
    ),
    reload=Reload.STOCK_ARCH,
)
class Mqa(Technique):
    """Let groups of query heads share one key/value head, pooled from those of the trained model.

    The model has to be trained further afterwards: put ``logit_kd`` behind it, or train the result.

    Attributes:
        kv_heads: key/value heads of each attention afterwards, a divisor of their present number. 1 is multi-query
            attention. The present number leaves the model unchanged.
        pooling: what a shared head starts as: the ``mean`` of the heads of its group, the ``first`` of them, or
            ``random`` weights. The latter two are the comparisons of the paper, and worse.
        encoder: convert also the encoder of an encoder-decoder, whose keys and values are not read at each decoding
            step. The self- and cross-attention of its decoder are converted in any case, as in the paper.
        seed: of random weights.
    """

    kv_heads: int = option(1, low=1)
    pooling: Literal["mean", "first", "random"] = "mean"
    encoder: bool = False
    seed: int = option(0, low=0)

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="mqa",
        source=joined(replace, remote_code_guard, _grouped_heads),
        config_base=_grouped_heads.GroupedConfig.__name__,
        field=_grouped_heads.GroupedModules.replaced_field,
        model_base=_grouped_heads.GroupedModules.__name__,
    )

    def contract(self) -> Contract:
        # The mean of rows with N:M patterns has none.
        keeps = {traits.SPARSE} if self.pooling == MEAN else {traits.SPARSE, traits.SPARSE_NM}
        return dataclasses.replace(self.spec.contract, keeps=keeps)

    def changes_architecture(self) -> bool:
        return True

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        try:
            heads = self._heads(model, label)
        except NoInputsError:
            return  # calibration data may have them
        if any(len(one) != self.kv_heads for one in heads):
            self._conversion(model, heads, label)

    def _heads(self, model: PreTrainedModel, label: str) -> list[KeyValueHeads]:
        """Return the attentions to convert. Raises ``ModelError`` if there are none, or ``kv_heads`` does not fit."""
        found = topology.find_key_value_heads(topology.trace(model))
        if not self.encoder and model.config.is_encoder_decoder:
            decoder = {one.block for one in found if one.crosses}
            found = [one for one in found if one.block in decoder] if decoder else found
        if not found:
            refuse_known(model, label)
            raise ModelError(
                f"{label}: {type(model).__name__} has no attention whose key/value heads can be told apart (a norm "
                "over all heads, a latent vector in place of keys, or weights that layers share)"
            )
        for one in found:
            if len(one) % self.kv_heads:
                divisors = ", ".join(str(n) for n in range(1, len(one) + 1) if len(one) % n == 0)
                raise ModelError(
                    f"{label}: the {len(one)} key/value heads of {one.module} cannot be pooled into {self.kv_heads}; "
                    f"set kv_heads to a divisor: {divisors}"
                )
        return found

    def _conversion(self, model: PreTrainedModel, heads: list[KeyValueHeads], label: str) -> Conversion:
        """Return how the model gets fewer heads. Raises ``ModelError`` if it cannot. The model is not changed."""
        refuse_known(model, label)
        return (
            by_stock_config(model, heads, self.kv_heads, label)
            or by_bigcode(model, heads, self.kv_heads)
            or by_own_code(model, heads, self.kv_heads, self.remote_code, label)
        )

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        model, label = run.model, run.label(self)
        heads = self._heads(model, label)
        before = _head_record.sizes(model, heads)
        names = [part.layer for one in heads for part in (one.keys, one.values)]
        if all(len(one) == self.kv_heads for one in heads):
            run.record.reload = Reload.STOCK_ARCH.name
            run.cover(self, [], {"already has this number of key/value heads": sorted(set(names))})
            run.report(self, **_head_record.figures(before, before))
            return model
        conversion = self._conversion(model, heads, label)
        make_masks_equal(run, heads, self.kv_heads, self.pooling)
        std = initial_std(model.config)
        make_equal_(model, heads, self.kv_heads, self.pooling, std, self.seed)
        if self.pooling == RANDOM:
            apply_masks_(run, heads)
        expected = main_output(model, dummy_inputs(model))
        made = conversion.apply(run, model)
        self._verify(made, expected, heads, conversion, label)
        run.record.reload = conversion.reload.name
        run.cover(self, dict.fromkeys(conversion.new_name(name) for name in names))
        after = _head_record.sizes(
            made, topology.find_key_value_heads(topology.trace(made)), [h.consumer for h in heads]
        )
        run.report(self, **_head_record.figures(before, after))
        return made

    def _verify(
        self, made: PreTrainedModel, expected: Tensor, heads: list[KeyValueHeads], conversion: Conversion, label: str
    ) -> None:
        """Raise ``ModelError`` unless the model computes ``expected``, and a cache of it holds ``kv_heads`` heads."""
        found = main_output(made, dummy_inputs(made))
        gap = relative_difference(found, expected)
        if not gap <= rounding_tolerance(made):
            raise ModelError(
                f"{label}: {type(made).__name__} with {self.kv_heads} key/value heads does not compute what the "
                f"original computes with these heads repeated (relative difference {gap:.1e}); this architecture is "
                "not supported"
            )
        cached = _head_record.cached_heads(made)
        if cached and max(cached) > self.kv_heads and len(set(map(len, heads))) == 1:
            raise ModelError(
                f"{label}: {type(made).__name__} caches {max(cached)} heads of keys and values in place of "
                f"{self.kv_heads}, so sharing them saves no memory; this architecture is not supported"
            )

    def recompute(self, case: Any) -> dict[str, Any]:
        return _head_record.recompute(self, case)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        _head_record.write(run.reported(self), self.pooling, card)


def refuse_known(model: PreTrainedModel, label: str) -> None:
    """Raise ``ModelError`` for a model type that is known not to work."""
    if (why := UNSUPPORTED.get(model.config.model_type)) is not None:
        raise ModelError(f"{label}: {why}; this architecture is not supported")


def initial_std(config: PretrainedConfig) -> float:
    """Return the standard deviation of a weight at the start of training, as a configuration has it, or else 0.02."""
    own = config.get_text_config()
    found = (getattr(own, name, None) for name in ("initializer_range", "init_std"))
    return float(next((value for value in found if value), 0.02))


@hookimpl
def register_techniques(register) -> None:
    register(Mqa)
