"""Expert capacity: every expert computes a limited number of the tokens that choose it; first come, first served.

    y[t] = sum over j of  g[t, j] * FFN_{e(t, j)}(x[t]) * [slot of (t, j) < capacity],    capacity = round(C k T / E)

T tokens of a group choose k of E experts each. The first choices of all tokens get slots before the second choices,
equal choices in the order of positions. A pair of token and expert without a slot adds nothing: the token passes by the
residual connection. With C >= E / k every expert has a slot for every token, and the layer is the one without a
capacity, to the bit.

Lepikhin et al., "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding", arXiv 2006.16668;
Fedus, Zoph, Shazeer, "Switch Transformers", arXiv 2101.03961. Published codes round differently: ``rounding``.

Differences: padding takes no slots, and T counts tokens, so padding changes no prediction; GShard and Switch count it.
Every expert has at least ``min_slots`` slots, since in decoding T is the batch size and C k T / E below one.

A capacity is not causal: whether a token is computed depends on later tokens of its sequence (their first choices
precede its second one, and T counts them) and on the other sequences of the batch. So the logits of a whole sequence
are not those of its decoding token by token.

The weights do not change, and no class of transformers has a capacity. The settings are kept in ``config.json``
(``"hf_optim": {"routing": ...}``), where stock transformers preserves them and does not read them: it computes the
model without a capacity. ``from_pretrained(..., optim_config="auto")`` and ``hf_optim.accelerate`` apply them,
``hf_optim.restore`` takes them away.
"""

from __future__ import annotations

from typing import Literal

from hf_optim import Paper, Reload, hookimpl, option, technique

from ._capacity import CONTRACT, CapacityTechnique


@technique(
    "capacity_routing",
    family="moe",
    paper=Paper("2006.16668", "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding", 2020),
    contract=CONTRACT,
    reload=Reload.STOCK_ARCH,
)
class CapacityRouting(CapacityTechnique):
    """Limit the tokens that each expert computes, first come, first served.

    Attributes:
        capacity: the capacity factor C. From E / k on nothing is dropped.
        train_capacity: the factor in training mode; null is the same.
        rounding: how C k T / E becomes a number of slots: ``round`` (V-MoE's formula), ``ceil`` (DeepSpeed), ``floor``
            (Mesh TensorFlow), ``vmoe`` (V-MoE's code: up to a multiple of 4), ``tutel`` (k floor(C ceil(T / E))), or
            ``nllb`` (ceil(C T), a fraction of the tokens).
        group: the tokens that compete: those of the ``batch``, or of each ``sequence``.
        renormalize: scale the gates that are left of a token to the sum that all had. Published models do not, except
            NLLB-MoE.
        min_slots: the least capacity of an expert.
        dropless_below: groups with fewer tokens drop nothing: with 64, decoding batches of up to 63 sequences.
        measure: count on calibration data what is dropped, for record and card. Without, the step needs no data.
    """

    capacity: float = option(1.25, above=0.0, high=1e4)
    train_capacity: float | None = option(None, above=0.0, high=1e4)
    rounding: Literal["round", "ceil", "floor", "vmoe", "tutel", "nllb"] = "round"
    group: Literal["batch", "sequence"] = "batch"
    renormalize: bool = False
    min_slots: int = option(1, low=1, high=2**31 - 1)
    dropless_below: int = option(0, low=0, high=2**31 - 1)
    measure: bool = True


@hookimpl
def register_techniques(register) -> None:
    register(CapacityRouting)
