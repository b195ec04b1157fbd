"""transformers' plans of tensor parallelism: the style of each module, and what a number of ranks can divide."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import ModelError
from ...trust.bounds import shown

ROW_STYLES = ("colwise",)
GATHERED_ROW_STYLES = ("colwise_gather_output", "colwise_rep")
COLUMN_STYLES = ("rowwise",)
SPLIT_STYLES = ("rowwise_split_input",)
CUT_STYLES = (*ROW_STYLES, *COLUMN_STYLES, *SPLIT_STYLES)
# Modules that every rank has whole, so that no exchange is needed around them.
WHOLE_STYLES = (
    "replicated",
    "replicated_with_grad_allreduce",
    "embedding_rowwise",
    "embedding_colwise",
)
# Experts are given to the ranks whole, whatever the plan does with their matrices.
EXPERT_STYLES = (
    "packed_colwise",
    "packed_rowwise",
    "moe_tp_experts",
    "grouped_gemm",
    "ep_dispatch_experts",
    "ep_router",
    "moe_identity_expert",
)
KNOWN = (
    *ROW_STYLES, *GATHERED_ROW_STYLES, *COLUMN_STYLES, *SPLIT_STYLES, *WHOLE_STYLES, *EXPERT_STYLES
)  # fmt: skip


def plan_of(model: Any, given: Any = "auto") -> dict[str, str]:
    """Return the style of modules of a model, by name with ``*`` for numbers: transformers' plan with changes.

    Args:
        model: it may be on the meta device.
        given: ``"auto"``, or a mapping of rules that replace those of the plan.

    Raises ``ModelError`` for a class without a plan, and for a rule of another style.
    """
    plan = dict(getattr(model, "tp_plan", None) or {})
    if isinstance(given, Mapping):
        plan |= {str(name): str(style) for name, style in given.items()}
    elif given != "auto":
        raise ModelError(f'tp_plan is {shown(given)}; pass "auto", or a mapping from names of modules to styles')
    if not plan:
        raise ModelError(
            f"transformers has no tensor parallel plan for {type(model).__name__}, so nothing says which of its layers "
            "can be cut: load it with one rank, give each rank its own part of the data, or pass tp_plan={name: style}"
        )
    for name, style in plan.items():
        if style not in KNOWN:
            raise ModelError(
                f"the plan of {type(model).__name__} has the style {shown(style)} for {name}, which hf_optim does not "
                f"cut packed layers by (it knows {', '.join(KNOWN)}): load the model with one rank"
            )
    return plan


def style_of(name: str, plan: Mapping[str, str]) -> str | None:
    """Return the style of a module, or None if the plan does not name it."""
    return plan.get(name) or plan.get(_pattern(name))


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def require_modules(model: Any, given: Any) -> None:
    """Raise ``ModelError`` for a rule of a call that names nothing of a model, and would change nothing."""
    if not isinstance(given, Mapping):
        return
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    known = {*names, *map(_pattern, names), *(getattr(model, "tp_plan", None) or {})}
    for name in given:
        if str(name) not in known:
            raise ModelError(
                f"tp_plan names {shown(str(name))}, and {type(model).__name__} has no such module: numbers of layers "
                "are written as *"
            )


def require_fitting_rules(model: Any, given: Any) -> None:
    """Raise ``ModelError`` if the rules of a call leave one layer whole and cut those that compute with it.

    Layers of one module (q, k, v and o; gate, up and down) hand each other parts of their width: either all of those
    that transformers' plan cuts are cut, each in the plan's direction, or none of them.
    """
    if not isinstance(given, Mapping):
        return
    stock, plan = dict(getattr(model, "tp_plan", None) or {}), plan_of(model, given)
    groups: dict[str, dict[str, bool]] = {}
    for name, _ in model.named_modules():
        before, after = style_of(name, stock), style_of(name, plan)
        if before not in CUT_STYLES or after is None:
            continue
        if after in CUT_STYLES and (before in ROW_STYLES) != (after in ROW_STYLES):
            raise ModelError(
                f"tp_plan gives {name} the style {after}, and the plan of {type(model).__name__} {before}, by which "
                f"the layers beside it are cut: leave it {before}, or give all of them the style 'replicated'"
            )
        parent, _, own = name.rpartition(".")
        groups.setdefault(parent, {})[own] = after in CUT_STYLES
    for parent, cut in groups.items():
        if len(set(cut.values())) > 1:
            whole = [name for name, is_cut in cut.items() if not is_cut]
            rest = [name for name, is_cut in cut.items() if is_cut]
            raise ModelError(
                f"tp_plan leaves {', '.join(whole)} of {parent} whole and cuts {', '.join(rest)}, whose widths do not "
                f"fit together then: give the style 'replicated' to all of {', '.join(cut)}, or to none"
            )


def require_divisible_heads(config: Any, plan: Mapping[str, str], ranks: int) -> None:
    """Raise ``ModelError`` if heads of attention cannot be divided among the ranks as the plan divides them."""
    if not any(style in ROW_STYLES and "attn" in name for name, style in plan.items()):
        return
    own = config.get_text_config(decoder=True)
    heads = getattr(own, "num_attention_heads", None)
    key_value = getattr(own, "num_key_value_heads", None)
    for what, count in (("attention heads", heads), ("key/value heads", key_value)):
        if isinstance(count, int) and count % ranks:
            both = [each for each in (heads, key_value) if isinstance(each, int)]
            possible = [number for number in range(2, count + 1) if not any(each % number for each in both)]
            few = f"{', '.join(map(str, possible))} ranks" if possible else "one rank"
            raise ModelError(
                f"{own.model_type} has {count} {what}, which {ranks} ranks cannot divide evenly (transformers does not "
                f"repeat them, either): use {few}, or give the attention of each rank whole with "
                'tp_plan={"model.layers.*.self_attn.q_proj": "replicated", ...} for q_proj, k_proj, v_proj and o_proj'
            )
