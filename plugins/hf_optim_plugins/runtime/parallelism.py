"""One model on several devices: each rank holds a part of every layer, packed weights included.

    rows:      W = [W_0; ...; W_{r-1}]   y_i = x W_i^T              q, k, v, gate, up: heads and channels stay on a rank
    columns:   W = [W_0, ..., W_{r-1}]   y = sum_i x_i W_i^T        o, down: one all-reduce
    experts:   rank i holds E / r whole experts                     one all-reduce

Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", arXiv
1909.08053: in a block, rows and then columns, so that attention and feed-forward cost one all-reduce each. Which layer
is cut how, transformers' own plans say (``base_model_tp_plan``). Ours: packed weights are cut with their scales and
zero points while they are read, so that no rank ever holds the whole; and where the columns of a quantized layer belong
together (one scale for each token's inputs, act-order, a group that would be split), its rows are cut and its input is
gathered instead, so that the result is bitwise that of one rank.

Not as in the paper: the embedding is whole on each rank (as in transformers' plans), and nothing is exchanged
asynchronously. The weights are unchanged; the setting is an entry of ``config.json``, which stock transformers ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_optim import Card, Contract, ModelError, Paper, Reload, Run, Technique, hookimpl, option, technique, traits
from hf_optim.toolkit.distributed import RankSetting, rank_setting_of, set_rank_setting, tensor_plan
from hf_optim.toolkit.topology import expert_stacks


@technique(
    "parallelism",
    family="runtime",
    paper=Paper("1909.08053", "Megatron-LM: Training Multi-Billion Parameter Language Models Using ...", 2019),
    contract=Contract(keeps={traits.SPARSE, traits.SPARSE_NM}, owns={"ranks"}),
    reload=Reload.STOCK_DENSE,
    parallel={"tensor": "yes", "expert": "yes"},
)
class Parallelism(Technique):
    """Divide the layers of a model among ranks when it is loaded; the weights are unchanged.

    Attributes:
        ranks: how many ranks the layers are divided among; 1 divides nothing.
        timeout: seconds without a sign of a rank after which all others end with an error that names it.
    """

    ranks: int = option(2, low=1, high=1024)
    timeout: float = option(30.0, low=2.0, high=3600.0)

    @property
    def setting(self) -> RankSetting:
        """What is kept in the configuration."""
        return RankSetting(self.ranks, float(self.timeout))

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        if self.ranks == 1:
            return
        if not type(model).__module__.startswith("transformers."):
            raise ModelError(
                f"{label}: {type(model).__name__} has code of its own, and transformers' plans are for its own classes"
            )
        try:
            plan = tensor_plan.plan_of(model)
            tensor_plan.require_divisible_heads(model.config, plan, self.ranks)
            for name, module in expert_stacks(model).items():
                count = int(module.num_experts)  # type: ignore[arg-type]
                if count % self.ranks:
                    raise ModelError(f"{name} has {count} experts, which {self.ranks} ranks cannot divide evenly")
            for name, rows, columns, style in planned(model, plan):
                size = columns if style in tensor_plan.COLUMN_STYLES else rows
                if size % self.ranks and style not in tensor_plan.GATHERED_ROW_STYLES:
                    raise ModelError(f"{name} has {size} channels to divide, which {self.ranks} ranks cannot")
        except ModelError as error:
            raise ModelError(f"{label}: {error}") from error

    def rank_setting(self) -> RankSetting | None:
        return self.setting if self.ranks > 1 else None

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        self.check_model(run.model, run.label(self))
        set_rank_setting(run.model.config, self.setting)
        run.report(self, **figures(run.model, self.ranks))

    def recompute(self, case: Any) -> dict[str, Any]:
        assert rank_setting_of(case.after.config) == self.setting
        return figures(case.after, self.ranks)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        if not metrics or self.ranks == 1:
            return
        experts = f" and the experts of {metrics['mixtures']} layers" if metrics["mixtures"] else ""
        stock = [level for level in Reload if level is not Reload.REMOTE_CODE]
        load = card.when('`from_pretrained(..., optim_config="auto")`', reload=stock) or card.when(
            '`from_pretrained(..., optim_config="auto", trust_remote_code=True)`', reload=[Reload.REMOTE_CODE]
        )
        card.paragraph(
            "Several ranks",
            f"Under `torchrun --nproc-per-node {self.ranks}`,{load} gives each "
            f"of {self.ranks} ranks a part of {metrics['layers_cut']} linear layers{experts}: "
            f"{metrics['weights_on_a_rank']} of {metrics['weights']} weights. The step changes no weight, and one "
            "process loads the model as before.",
        )


def planned(model: nn.Module, plan: Mapping[str, str]) -> list[tuple[str, int, int, str]]:
    """Return name, output channels, input channels and style of the linear layers that a plan cuts."""
    cut = (*tensor_plan.ROW_STYLES, *tensor_plan.GATHERED_ROW_STYLES, *tensor_plan.COLUMN_STYLES)
    found = []
    for name, module in model.named_modules():
        style = tensor_plan.style_of(name, plan)
        if style in (*cut, *tensor_plan.SPLIT_STYLES) and isinstance(module, nn.Linear):
            found.append((name, module.out_features, module.in_features, str(style)))
    return found


def figures(model: Any, ranks: int) -> dict[str, Any]:
    """Return what is reported: what is cut, and the weights of the linear layers and experts that a rank holds."""
    plan = tensor_plan.plan_of(model) if ranks > 1 else {}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False)
    whole, part, cut = 0, 0, 0
    layers = {
        name: (rows, columns)
        for name, rows, columns, _ in planned(model, plan)
        if not (tied and model.get_submodule(name) is head)
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            size = module.out_features * module.in_features
            divisible = name in layers and not (layers[name][0] % ranks and module is head)
            cut += divisible
            whole, part = whole + size, part + (size // ranks if divisible else size)
    stacks = expert_stacks(model)
    for module in stacks.values():
        size = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 3)
        whole, part = whole + size, part + size // ranks
    return {
        "layers_cut": cut,
        "mixtures": len(stacks) if ranks > 1 else 0,
        "weights": whole,
        "weights_on_a_rank": part,
    }


@hookimpl
def register_techniques(register) -> None:
    register(Parallelism)
