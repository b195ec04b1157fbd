"""Sparse upcycling: every feed-forward layer becomes a mixture of experts that starts as copies of it.

    y = sum over the top k experts e of  g_e(x) * FFN_e(x),      g = softmax(W_r x), renormalized over the top k

With FFN_e = FFN for every e and the gates of the chosen experts summing to one, y = FFN(x): the model's function is
unchanged, for any router W_r, and training starts from the dense loss. The router is drawn from N(0, router_std^2);
noise on the experts makes them differ from the start, at the price of that exactness.

Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", arXiv 2212.05055.
The paper drops the renormalization for language models; here it is kept, as in the native classes. Its encoders route
by Expert Choice, its experts have a capacity, and every second layer becomes a mixture. Here, as in the native classes,
tokens choose their experts, and no expert has a capacity; every layer is a mixture unless ``every`` is set; and the
load-balancing loss is the native one, with its own coefficient.

The result is a class that ships in transformers, so its checkpoints need no other code. Attention and norms must be
those of the dense class: the target is Mixtral for Llama and Mistral, Qwen3-MoE for Qwen3, and Qwen2-MoE for Qwen2.
Every layer of the last also has a shared expert, which starts as one that adds zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback

from hf_optim import (
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
from hf_optim.toolkit.modules import output_difference, rounding_tolerance, transplant
from hf_optim.toolkit.topology import dummy_inputs

from ._copies import copies, perturb_
from ._native_mixtures import find_native

GATE, UP, DOWN = "gate_proj.weight", "up_proj.weight", "down_proj.weight"
ROUTER, GATE_UP, EXPERTS_DOWN = "gate.weight", "experts.gate_up_proj", "experts.down_proj"
SHARED, SHARED_GATE = "shared_expert", "shared_expert_gate.weight"


@technique(
    "upcycle",
    family="moe",
    paper=Paper("2212.05055", "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", 2022),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.MOE, traits.QUANTIZED},
        adds={traits.MOE},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"experts"},
    ),
    reload=Reload.STOCK_ARCH,
)
class Upcycle(Technique):
    """Turn each feed-forward layer into a mixture of experts that starts as copies of it.

    Attributes:
        experts: experts per layer.
        top_k: number of experts per token.
        every: 1 makes every layer a mixture, 2 every second one (the second, the fourth ...), and so on. More than
            1 needs a native class that mixes dense and expert layers (Qwen2, Qwen3).
        dense_layers: numbers of layers, from 0, that stay dense in addition; of the same classes.
        router_std: standard deviation of the router's weights at the start. 0 makes them zero: all experts have equal
            gates, and tokens choose the first ones until training tells them apart.
        router_jitter: in training, routers read their input times random numbers in [1 - jitter, 1 + jitter]. Only
            Mixtral does this.
        router_lr: learning rate of the routers; None leaves them in the Trainer's groups.
        aux_loss: coefficient of the load-balancing loss, written to ``config.router_aux_loss_coef``. It is part of the
            model's loss while a step of the same stage trains (``logit_kd``); otherwise ``output_router_logits`` is
            off, so that a loss measures only the text and inference computes nothing superfluous. Set it to True to
            train the result later.
        noise: standard deviation of Gaussian noise on the experts' weights, relative to that of each weight matrix; 0
            leaves the experts equal and the model exact.
        shared_width: neurons of the shared expert of a Qwen2-MoE, which starts as one that adds zero.
        seed: of router and noise.
    """

    experts: int = option(8, low=1)
    top_k: int = option(2, low=1)
    every: int = option(1, low=1)
    dense_layers: tuple[int, ...] = ()
    router_std: float = option(0.02, low=0.0)
    router_jitter: float = option(0.0, low=0.0, below=1.0)
    router_lr: float | None = option(None, above=0.0)
    aux_loss: float = option(0.001, low=0.0)
    noise: float = option(0.0, low=0.0)
    shared_width: int = option(8, low=1)
    seed: int = option(0, low=0)

    def validate(self) -> None:
        if any(index < 0 for index in self.dense_layers):
            raise RecipeError(f"upcycle: dense_layers are numbers from 0, not {list(self.dense_layers)!r}")
        if self.top_k > self.experts:
            raise RecipeError(f"upcycle: top_k ({self.top_k}) cannot exceed experts ({self.experts})")

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        self._target(model, label)

    def model_after(self, model: PreTrainedModel, label: str) -> PreTrainedModel:
        target, config = self._target(model, label)
        with torch.device("meta"):
            return target(config)

    def _target(self, dense: PreTrainedModel, label: str) -> tuple[type[PreTrainedModel], PretrainedConfig]:
        """Return the class and the configuration of the mixture. Raises ``ModelError`` if there is none."""
        native = find_native(dense, self, label)
        config_class = transplant.config_class_of(native.model_type)
        config = transplant.translate_config(dense.config, config_class, **native.fields(dense.config, self))
        target = transplant.find_counterpart(type(dense), type(dense.config), config_class)
        if target is None:
            raise ModelError(f"{label}: transformers has no {native.model_type} class for {type(dense).__name__}")
        return target, config

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        dense, label = run.model, run.label(self)
        target, config = self._target(dense, label)
        # A dense class has "eager" there, which would be kept. PyTorch's fused kernels do not support float64.
        config._experts_implementation = "eager" if dense.dtype == torch.float64 else None
        model, spare = transplant.transplant(dense, target, config)
        layers = self._fill_experts(model, spare, label)
        _move_masks(run, layers, self.experts)
        run.rename(lambda name: _expert_names(name, layers, self.experts))
        self._verify(dense, model, label)
        run.state(self).routers = [f"{name}.{ROUTER}" for name in layers]
        run.cover(self, [f"{name}.experts" for name in layers])
        run.report(
            self,
            experts=self.experts,
            top_k=self.top_k,
            layers=len(layers),
            parameters_before=dense.num_parameters(),
            parameters_after=model.num_parameters(),
            active_parameters=active_parameters(model, layers, self.experts, self.top_k),
        )
        return model

    @hookimpl
    def parameter_groups(self, run: Run, model: nn.Module) -> list[dict[str, Any]] | None:
        routers = tuple(getattr(run.state(self), "routers", ()))
        if self.router_lr is None or not routers:
            return None
        # Wrappers prefix the names, so only the ends are compared.
        chosen = [p for name, p in model.named_parameters() if name.endswith(routers) and p.requires_grad]
        return [{"params": chosen, "lr": self.router_lr}]

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        return [BalanceExperts()] if self.aux_loss else []

    def recompute(self, case: Any) -> dict[str, Any]:
        config = case.after.config
        experts = getattr(config, "num_local_experts", None) or config.num_experts
        stacks = [p.numel() for name, p in case.after.named_parameters() if ".experts." in name]
        old, new = (sum(p.numel() for p in model.parameters()) for model in (case.before, case.after))
        return {
            "experts": experts,
            "top_k": config.num_experts_per_tok,
            "layers": sum(name.endswith(f".{ROUTER}") for name, _ in case.after.named_parameters()),
            "parameters_before": old,
            "parameters_after": new,
            "active_parameters": new - sum(stacks) + sum(stacks) * config.num_experts_per_tok // experts,
        }

    def _fill_experts(self, model: PreTrainedModel, spare: dict[str, nn.Parameter], label: str) -> list[str]:
        """Fill the experts and the router of every mixture; return the names of the layers that became one."""
        generator = torch.Generator().manual_seed(self.seed)
        layers = [
            name.removesuffix("." + ROUTER)
            for name in transplant.meta_tensor_names(model)
            if name.endswith("." + ROUTER)
        ]
        for layer in layers:
            try:
                gate, up, down = (spare.pop(f"{layer}.{leaf}") for leaf in (GATE, UP, DOWN))
            except KeyError as error:
                raise ModelError(f"{label}: the dense model has no {error.args[0]}") from error
            stacked = {
                f"{layer}.{GATE_UP}": copies(torch.cat([gate.detach(), up.detach()]), self.experts),
                f"{layer}.{EXPERTS_DOWN}": copies(down.detach(), self.experts),
            }
            for name, weights in stacked.items():
                if self.noise:
                    perturb_(weights, self.noise, generator)
                transplant.set_tensor(model, name, nn.Parameter(weights, requires_grad=gate.requires_grad))
            router = torch.randn(self.experts, gate.shape[1], generator=generator) * self.router_std
            transplant.set_tensor(model, f"{layer}.{ROUTER}", nn.Parameter(router.to(gate)))
            self._fill_shared(model, layer, gate, generator)
        if spare:
            raise ModelError(
                f"{label}: {type(model).__name__} has no place for {', '.join(sorted(spare)[:4])}"
                f"{' and more' if len(spare) > 4 else ''}; a dense model with these weights cannot be upcycled exactly"
            )
        if unfilled := transplant.meta_tensor_names(model):
            raise ModelError(f"{label}: the dense model has nothing for {', '.join(unfilled[:4])}")
        return layers

    def _fill_shared(self, model: PreTrainedModel, layer: str, gate: nn.Parameter, generator: torch.Generator) -> None:
        """Fill the shared expert of a layer, if it has one: random rows, and zeros where it adds to the output."""
        for name in [name for name in transplant.meta_tensor_names(model) if name.startswith(f"{layer}.shared_")]:
            shape = model.get_parameter(name).shape
            zero = name in (f"{layer}.{SHARED}.{DOWN}", f"{layer}.{SHARED_GATE}")
            values = torch.zeros(shape) if zero else torch.randn(shape, generator=generator)
            std = getattr(model.config, "initializer_range", 0.02)
            transplant.set_tensor(model, name, nn.Parameter((values * std).to(gate)))

    def _verify(self, dense: PreTrainedModel, model: PreTrainedModel, label: str) -> None:
        if self.noise:
            return
        gap = output_difference(dense, model, dummy_inputs(dense))
        if not gap <= rounding_tolerance(dense):
            raise ModelError(
                f"{label}: {type(model).__name__} does not compute what {type(dense).__name__} computes (relative "
                f"difference {gap:.1e}): some field of its configuration has no counterpart"
            )


class BalanceExperts(TrainerCallback):
    """Enables the model's own load-balancing loss during training."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.config.output_router_logits = True

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.config.output_router_logits = False


def active_parameters(model: nn.Module, layers: list[str], experts: int, top_k: int) -> int:
    """Return how many parameters take part in the computation of one token."""
    total = sum(p.numel() for p in model.parameters())
    idle = sum(
        model.get_parameter(f"{layer}.{leaf}").numel() // experts * (experts - top_k)
        for layer in layers
        for leaf in (GATE_UP, EXPERTS_DOWN)
    )
    return total - idle


def _move_masks(run: Run, layers: list[str], experts: int) -> None:
    """Turn masks and N:M patterns of the dense weights into those of the experts."""
    for layer in layers:
        sources = {f"{layer}.{GATE_UP}": (GATE, UP), f"{layer}.{EXPERTS_DOWN}": (DOWN,)}
        for name, leaves in sources.items():
            masks = [run.masks.pop(f"{layer}.{leaf}", None) for leaf in leaves]
            patterns = [run.nm_patterns.pop(f"{layer}.{leaf}", None) for leaf in leaves]
            known = next((mask for mask in masks if mask is not None), None)
            if known is not None:
                whole = torch.cat([mask if mask is not None else torch.ones_like(known) for mask in masks])
                run.masks[name] = copies(whole, experts)
            if patterns[0] is not None and all(pattern == patterns[0] for pattern in patterns):
                run.nm_patterns[name] = patterns[0]


def _expert_names(name: str, layers: list[str], experts: int) -> list[str]:
    """Return the new names of a module of the dense model: for a projection the matrices that hold its copies."""
    layer, _, leaf = name.rpartition(".")
    for parameter, leaves in ((GATE_UP, (GATE, UP)), (EXPERTS_DOWN, (DOWN,))):
        if layer in layers and f"{leaf}.weight" in leaves:
            stack, _, matrix = parameter.partition(".")
            return [f"{layer}.{stack}.{index}.{matrix}" for index in range(experts)]
    return [name]


@hookimpl
def register_techniques(register) -> None:
    register(Upcycle)
