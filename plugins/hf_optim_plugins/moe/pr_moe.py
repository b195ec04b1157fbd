"""PR-MoE: a dense layer for every token and one expert beside it, with more experts in later layers.

    y = c0(x) FFN(x) + c1(x) g_e(x) FFN_e(x),     e = argmax p(x),  p = softmax(W_r x),  (c0, c1) = softmax(W_c x + b_c)

*Residual*: the expert corrects the dense layer, at the cost of top-2 routing in products and of top-1 in exchanged
tokens. *Pyramid*: experts help more in later layers, so these have more of them. The load-balancing loss is
``E sum_e f_e P_e``, with the share f of tokens that choose e and its mean probability P, which is 1 for equal load.

Rajbhandari et al., "DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI
Scale", arXiv 2201.05596, section 4. The paper trains from scratch, and its gate g is the probability p_e. Here the
layers of a dense model are upcycled: the dense part is the layer, and the experts start as copies. With ``gate: one``
the gate is 1, with the gradient of log p_e, so the model computes what the dense one does: the coefficients sum to 1.
With ``gate: probability`` it does not, since p_e < 1.

The result has its own code, saved with the checkpoint: no class of transformers has two coefficients and other numbers
of experts in each layer. The experts themselves are on transformers' interface for experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_optim import Contract, ModelError, Paper, RecipeError, Reload, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode, convert, converted_skeleton, generate, joined, require_own_code
from hf_optim.toolkit import topology
from hf_optim.toolkit.modules import (
    coded_experts,
    feed_forward_inlets,
    grouped_experts,
    main_output,
    relative_difference,
    replace,
    rounding_tolerance,
    thread_values,
)
from hf_optim.toolkit.topology import (
    FeedForward,
    NoInputsError,
    dummy_inputs,
    find_feed_forwards,
    inlet_entries,
    place_layer,
    weight_out_in,
)

from . import _inlet_layers, _residual_layers
from ._copies import copies, perturb_
from ._neuron_stacks import input_parts

if TYPE_CHECKING:
    from hf_optim import Card, Run

MOST = 65536  # experts of a layer


@technique(
    "pr_moe",
    family="moe",
    paper=Paper("2201.05596", "DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training", 2022),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.MOE, traits.QUANTIZED},
        adds={traits.MOE},
        owns={"experts"},
    ),
    reload=Reload.REMOTE_CODE,
    trains=True,
)
class PRMoE(Technique):
    """Turn feed-forward layers into a dense part and one of several experts, more of them in later layers, and train.

    Attributes:
        targets: the last linear layers of the feed-forward layers to turn, by class, name or pattern.
        skip: patterns of such layers to leave dense.
        experts: numbers of experts, from the first layers to the last: ``[4, 8]`` gives the first half 4 and the second
            half 8; one number gives all layers the same.
        every: 1 takes every layer, 2 every second one (the second, the fourth ...), and so on.
        residual: keep the dense part. False: one expert per token and nothing else, a uniform or pyramid MoE.
        gate: what an expert's output is multiplied by: ``one``, or the router's ``probability``, as in the paper.
        router_std: standard deviation of the routers' weights at the start. The coefficients start equal.
        router_lr: learning rate of routers and coefficients; None leaves them in the Trainer's groups.
        aux_loss: coefficient of the load-balancing loss in training; 0 switches it off.
        noise: standard deviation of Gaussian noise on the experts' weights, relative to that of each weight matrix; 0
            leaves the experts equal and the model exact.
        seed: of routers and noise.
    """

    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()
    experts: tuple[int, ...] = (4, 8)
    every: int = option(1, low=1)
    residual: bool = True
    gate: Literal["one", "probability"] = "one"
    router_std: float = option(0.02, low=0.0)
    router_lr: float | None = option(None, above=0.0)
    aux_loss: float = option(0.01, low=0.0)
    noise: float = option(0.0, low=0.0)
    seed: int = option(0, low=0)

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="pr_moe",
        source=joined(
            coded_experts, grouped_experts, replace, thread_values, feed_forward_inlets, _inlet_layers, _residual_layers
        ),
        field=_residual_layers.ResidualModules.replaced_field,
        model_base=_residual_layers.ResidualModules.__name__,
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"experts": [2, 3]})

    def validate(self) -> None:
        if not self.experts or any(not 1 <= count <= MOST for count in self.experts) or max(self.experts) < 2:
            raise RecipeError(
                f"pr_moe: experts are numbers from 1 to {MOST}, of which one is at least 2, not {list(self.experts)!r}"
            )

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        try:
            self._layers(model, label)
        except NoInputsError:
            return  # calibration data may have them

    def _layers(self, model: PreTrainedModel, label: str) -> tuple[dict[str, int], list[FeedForward], dict[str, Any]]:
        """Return name -> experts, the layers to turn, and what is left dense, by reason. Raises ``ModelError``."""
        found, skipped = find_feed_forwards(topology.trace(model))
        named = topology.select_layers(model, self.targets, self.skip)
        chosen = [layer for layer in found if layer.down in named][self.every - 1 :: self.every]
        if not chosen:
            why = "; ".join(f"{names[0]}: {reason}" for reason, names in skipped.items())
            raise ModelError(
                f"{label}: {type(model).__name__} has no feed-forward layer to turn: {len(found)} consist of two or "
                f"three linear layers of one block with one of transformers' activations between them, and targets, "
                f"skip and every={self.every} select none of them" + (f" ({why})" if why else "")
            )
        if len(self.experts) > len(chosen):
            raise ModelError(
                f"{label}: experts has {len(self.experts)} numbers for {len(chosen)} layers; give at most one for each"
            )
        require_own_code(model, self.remote_code, label)
        counts = pyramid(self.experts, len(chosen))
        return {layer.down: count for layer, count in zip(chosen, counts, strict=True)}, chosen, skipped

    def model_after(self, model: PreTrainedModel, label: str) -> PreTrainedModel:
        counts, layers, _ = self._layers(model, label)
        entries = {layer.down: self._entry(model, layer, counts[layer.down]) for layer in layers}
        field = {"experts": max(counts.values()), "modules": {**inlet_entries(layers), **entries}}
        return converted_skeleton(model, self.remote_code, field)

    def _entry(self, model: PreTrainedModel, layer: FeedForward, experts: int) -> dict[str, Any]:
        """Return what the configuration says of a layer."""
        parts = input_parts(model, layer)
        last_bias = model.get_submodule(layer.down).bias
        return {
            "experts": experts,
            "neurons": len(layer),
            "width": parts[0][0].shape[1],
            "act": layer.activation,
            "gated": layer.gate is not None,
            "bias": last_bias is not None or any(bias is not None for _, bias in parts),
            "residual": self.residual,
            "gate": self.gate,
            "inlets": list(layer.producers),
        }

    @hookimpl
    @torch.no_grad()
    def transform_model(self, run: Run) -> None:
        model, label = run.model, run.label(self)
        counts, layers, skipped = self._layers(model, label)
        before, inputs = model.num_parameters(), dummy_inputs(model)
        exact = not self.noise and self.gate == "one"
        expected = main_output(model, inputs) if exact else None
        code: Any = generate(self.remote_code, type(model.config))  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.seed)
        entries: dict[str, Any] = {}
        for layer in layers:
            self._turn(model, layer, counts[layer.down], code, entries, generator)
        convert(model, self.remote_code, {"experts": max(counts.values()), "modules": entries})
        code.choose_implementation(model)
        if expected is not None:
            gap = relative_difference(main_output(model, inputs), expected)
            if not gap <= rounding_tolerance(model):
                raise ModelError(
                    f"{label}: {type(model).__name__} does not compute what the dense model computes (relative "
                    f"difference {gap:.1e}); this architecture is not supported"
                )
        run.cover(self, [f"{name}.experts" for name in counts], skipped)
        run.report(
            self,
            layers=counts,
            residual=self.residual,
            parameters_before=before,
            parameters_after=model.num_parameters(),
            active_parameters=model.num_parameters() - idle_parameters(model),
        )

    def _turn(
        self, model: PreTrainedModel, layer: FeedForward, experts: int, code: Any, entries: dict[str, Any],
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        """Replace the linear layers of a feed-forward layer, and add their entries of the configuration."""
        last: Any = model.get_submodule(layer.down)
        parts, down = input_parts(model, layer), weight_out_in(last).detach()[:, layer.columns]
        rows, entry = parts[0][0], self._entry(model, layer, experts)
        biased = entry["bias"]
        about = {"dtype": rows.dtype, "device": rows.device}
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws values, which are replaced below
            made = code.ResidualMoE(model.config, rows.shape[1], down.shape[0], entry, about)
        dense = {made.experts.up_name: torch.cat([weight for weight, _ in parts]), "down_proj": down}
        if biased:
            zeros = rows.new_zeros(len(layer))
            dense[f"{made.experts.up_name}_bias"] = torch.cat([zeros if b is None else b for _, b in parts])
            dense["down_proj_bias"] = down.new_zeros(len(down)) if last.bias is None else last.bias.detach()
        for name, weight in dense.items():
            stacked = copies(weight, experts)
            if self.noise and not name.endswith("_bias"):
                perturb_(stacked, self.noise, generator)
            made.experts.get_parameter(name).copy_(stacked)
        made.router.copy_((torch.randn(made.router.shape, generator=generator) * self.router_std).to(made.router))
        if made.mlp is not None:
            made.coefficient.zero_()
            made.coefficient_bias.zero_()
            for linear, name in ((made.mlp.up, made.experts.up_name), (made.mlp.down, "down_proj")):
                linear.weight.copy_(dense[name])
                if biased:
                    linear.bias.copy_(dense[f"{name}_bias"])
        entries |= {**inlet_entries([layer]), layer.down: entry}
        place_layer(model, layer, made, code.Inlet)

    # -- training -----------------------------------------------------------------------------------------------------
    @hookimpl
    def training_loss(
        self, run: Run, model: nn.Module, inputs: Mapping[str, Any], outputs: Any
    ) -> dict[str, Tensor] | None:
        if not self.aux_loss:
            return None
        terms = [balance(*routed, counted_tokens(inputs, len(routed[0]))) for routed in take_routed(model)]
        return {"balance": self.aux_loss * torch.stack(terms).mean()} if terms else None

    @hookimpl
    def parameter_groups(self, run: Run, model: nn.Module) -> list[dict[str, Any]] | None:
        if self.router_lr is None:
            return None
        ends = (".router", ".coefficient", ".coefficient_bias")
        chosen = [p for name, p in model.named_parameters() if name.endswith(ends) and p.requires_grad]
        return [{"params": chosen, "lr": self.router_lr}]

    def recompute(self, case: Any) -> dict[str, Any]:
        modules = case.config["pr_moe"]["modules"]
        counts = {name: entry["experts"] for name, entry in modules.items() if "experts" in entry}
        old, new = (sum(p.numel() for p in model.parameters()) for model in (case.before, case.after))
        stacks = {n: p.numel() for n, p in case.after.named_parameters() if ".experts." in n}
        idle = sum(stacks[n] * (c - 1) // c for name, c in counts.items() for n in stacks if n.startswith(f"{name}."))
        return {
            "layers": counts,
            "residual": any(name.endswith(".coefficient") for name, _ in case.after.named_parameters()),
            "parameters_before": old,
            "parameters_after": new,
            "active_parameters": new - idle,
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        if not figures:
            return
        dense = "a dense part and one expert" if figures["residual"] else "one expert"
        own = card.when(
            "Its code comes with the checkpoint (`trust_remote_code=True`); the experts run on any experts "
            "implementation of transformers.",
            reload=[Reload.REMOTE_CODE],
        )
        card.paragraph(
            "PR-MoE",
            f"{len(figures['layers'])} feed-forward layers were turned into experts, copies of the layer, of which a "
            f"token computes {dense}: {figures['parameters_before']:,} parameters became "
            f"{figures['parameters_after']:,}, of which {figures['active_parameters']:,} take part in a token.{own}",
        )
        rows = [[f"`{name}`", count] for name, count in sorted(figures["layers"].items())]
        card.table("Experts by layer", ["layer", "experts"], rows)


def pyramid(counts: tuple[int, ...], layers: int) -> list[int]:
    """Return the number of experts of each layer: equally many layers in turn for each count."""
    return [counts[index * len(counts) // layers] for index in range(layers)]


def take_routed(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return probabilities ``[T, E]`` and choices ``[T, 1]`` of the last forward, layer by layer, and release them."""
    found = []
    for module in model.modules():
        if isinstance(routed := vars(module).get("routed"), tuple):
            found.append(routed)
            module.routed = None  # type: ignore[assignment]
    return found


def counted_tokens(inputs: Mapping[str, Any], count: int) -> Tensor | None:
    """Return the attention mask as bool ``[T]``, if there is one for ``count`` tokens."""
    masks = (inputs.get(name) for name in ("attention_mask", "decoder_attention_mask"))
    fitting = [mask for mask in masks if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() == count]
    return fitting[0].reshape(-1).bool() if fitting else None


def balance(probabilities: Tensor, chosen: Tensor, counted: Tensor | None) -> Tensor:
    """Return ``E sum_e f_e P_e`` over tokens: 1 for equal load, E if all choose one expert with certainty.

    Args:
        probabilities: ``[T, E]``.
        chosen: int64 ``[T, 1]``.
        counted: bool ``[T]``, the tokens that are not padding; None for all.
    """
    if counted is not None:
        probabilities, chosen = probabilities[counted], chosen[counted]
    experts = probabilities.shape[1]
    share = torch.bincount(chosen.flatten(), minlength=experts).to(probabilities) / max(1, len(chosen))
    return experts * (share * probabilities.mean(0)).sum()


def idle_parameters(model: nn.Module) -> int:
    """Return how many parameters do not take part in the computation of one token."""
    idle = 0
    for module in model.modules():
        if type(module).__name__ == _residual_layers.ResidualMoE.__name__:
            experts: Any = module.experts
            idle += sum(p.numel() for p in experts.parameters()) * (experts.num_experts - 1) // experts.num_experts
    return idle


@hookimpl
def register_techniques(register) -> None:
    register(PRMoE)
