r"""V-MoE: a vision transformer in which some feed-forward layers are mixtures of experts.

    l = W x + s N(0, I),    g = softmax(l),    y = sum over the k largest g_e of  g_e FFN_e(x),    s = noise / E

The noise is drawn in training only. The gates of the chosen experts are those of the softmax over all E, not scaled to
1. Of a group of T tokens each expert computes at most C k T / E; the others of its tokens pass by the residual
connection. With batch priority the slots go to the tokens with the largest gate (section 4.1).

In training two losses balance the experts (appendix A.2), with ``CV^2(v) = Var(v) / Mean(v)^2`` over the experts::

    importance = CV^2( sum_t softmax(W x_t)_e )
    load       = CV^2( mean_t Phi( ((W x_t)_e - threshold_t) / s ) )

``threshold_t`` is the k-th largest noisy logit of token t. They are summed over layers, and are part of the loss that
the model returns in training mode, so that every ``Trainer`` minimizes them, with this package and without it.

Riquelme et al., "Scaling Vision with Sparse Mixture of Experts", arXiv 2106.05974.

The experts start as copies of the dense layer (sparse upcycling, 2212.05055), or at random, to be trained from
scratch. As the gates of k < E experts sum to less than 1, copies do not compute what the dense model computes, unless
``normalize`` is set or k = E. No class of transformers is a ViT with experts, so the checkpoint brings its own code.
Its experts are on transformers' interface for experts: by default two batched products over tables of slots, and any
implementation that is chosen there (``set_experts_implementation``).
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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
from hf_optim.checkpoints.remote_code import RemoteCode, convert, converted_skeleton, generate, joined, stock_class
from hf_optim.toolkit import experts
from hf_optim.toolkit.modules import coded_experts, grouped_experts, mixtures_in_dense, own_loss, replace

from . import _vmoe_modules

UP, DOWN = "fc1", "fc2"
STACKS = {"up_proj": f"{UP}.weight", "down_proj": f"{DOWN}.weight"}
"""Stacked matrices of the experts, and the dense matrices that they are copies of."""


def code_of_toolkit() -> list[Any]:
    """Return the modules of the toolkit that travel with a checkpoint, in the order of their imports."""
    found = (inspect.getmodule(part) for part in (experts.capacity, experts.slot_positions))
    return [coded_experts, grouped_experts, own_loss, replace, mixtures_in_dense, *found]


@technique(
    "vmoe",
    family="moe",
    paper=Paper("2106.05974", "Scaling Vision with Sparse Mixture of Experts", 2021),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.MOE, traits.QUANTIZED},
        adds={traits.MOE},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"experts", "expert capacity"},
    ),
    reload=Reload.REMOTE_CODE,
)
class VMoE(Technique):
    """Turn feed-forward layers of a vision transformer into mixtures of experts with a capacity.

    Attributes:
        experts: E, experts per mixture.
        top_k: k, experts per token.
        every: 2 makes every second layer a mixture (the second, the fourth ...), 1 all of them, and so on.
        last: only the last so many of these layers; null is all.
        capacity: the capacity factor C in evaluation. From E / k on nothing is dropped.
        train_capacity: that of training; null is the same.
        batch_priority: give slots to the tokens with the largest gate; otherwise by position.
        group: the tokens that compete for slots: those of the ``batch``, or of each ``image``.
        rounding: how C k T / E becomes a number of slots, as in ``capacity_routing``.
        normalize: scale the gates of the chosen experts to 1, so that copies compute what the dense layer does.
        noise: E times the standard deviation of the noise on the router's logits in training.
        importance_loss: weight of the importance loss.
        load_loss: weight of the load loss, which needs noise.
        start: experts start as ``copies`` of the dense layer, or at ``random``.
        expert_noise: standard deviation of noise on copies, relative to that of each weight matrix.
        router_std: standard deviation of the router's weights at the start.
        seed: of router, random experts and noise on copies.
    """

    experts: int = option(8, low=1, high=2**31 - 1)
    top_k: int = option(2, low=1)
    every: int = option(2, low=1)
    last: int | None = option(None, low=1)
    capacity: float = option(1.05, above=0.0, high=1e4)
    train_capacity: float | None = option(None, above=0.0, high=1e4)
    batch_priority: bool = False
    group: Literal["batch", "image"] = "batch"
    rounding: Literal["round", "ceil", "floor", "vmoe", "tutel", "nllb"] = "round"
    normalize: bool = False
    noise: float = option(1.0, low=0.0)
    importance_loss: float = option(0.005, low=0.0)
    load_loss: float = option(0.005, low=0.0)
    start: Literal["copies", "random"] = "copies"
    expert_noise: float = option(0.0, low=0.0)
    router_std: float = option(0.02, low=0.0)
    seed: int = option(0, low=0)

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="vmoe",
        source=joined(*code_of_toolkit(), _vmoe_modules),
        field=_vmoe_modules.MixtureModel.replaced_field,
        model_base=_vmoe_modules.MixtureModel.__name__,
    )

    def validate(self) -> None:
        if self.top_k > self.experts:
            raise RecipeError(f"vmoe: top_k ({self.top_k}) cannot exceed experts ({self.experts})")
        if self.load_loss and not self.noise:
            raise RecipeError(
                "vmoe: the load loss is a probability under the noise of the router, so with noise: 0 there is none; "
                "set load_loss: 0"
            )
        if self.start == "random" and self.expert_noise:
            raise RecipeError("vmoe: expert_noise is for experts that start as copies")

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"experts": 4, "capacity": 0.75, "batch_priority": True, "expert_noise": 0.1})

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        self._chosen(model, label)

    def model_after(self, model: PreTrainedModel, label: str) -> PreTrainedModel:
        chosen = self._chosen(model, label)
        modules = {name: self._entry(layer) for name, layer in chosen.items()}
        return converted_skeleton(model, self.remote_code, {**self.settings(), "modules": modules})

    def _entry(self, layer: nn.Module) -> dict[str, int]:
        inner, hidden = layer.get_parameter(f"{UP}.weight").shape
        return {"hidden": hidden, "inner": inner}

    def _chosen(self, model: PreTrainedModel, label: str) -> dict[str, nn.Module]:
        """Return the feed-forward parts to replace, by name. Raises ``ModelError`` if there are none."""
        found = feed_forwards(model)
        if not found:
            raise ModelError(
                f"{label}: {type(model).__name__} is not a vision transformer with feed-forward layers of two linear "
                "layers (ViT, DeiT, DINOv2, ViT-MSN, I-JEPA), so there is nothing to turn into experts"
            )
        names = list(found)[self.every - 1 :: self.every]
        if not names:
            raise ModelError(f"{label}: every={self.every} selects none of the {len(found)} layers")
        if self.last is not None and self.last > len(names):
            raise ModelError(f"{label}: last={self.last}, but every={self.every} selects {len(names)} layers only")
        return {name: found[name] for name in (names if self.last is None else names[-self.last :])}

    def settings(self) -> dict[str, Any]:
        """Return the settings of the mixtures, as the configuration of the checkpoint has them."""
        keys = ("experts", "top_k", "capacity", "train_capacity", "batch_priority", "group", "rounding", "normalize")
        return {key: getattr(self, key) for key in (*keys, "noise", "importance_loss", "load_loss")}

    @hookimpl
    def transform_model(self, run: Run) -> None:
        model = run.model
        chosen = self._chosen(model, run.label(self))
        before = model.num_parameters()
        made = generate(self.remote_code, stock_class(type(model.config)))  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.seed)
        modules = {}
        for name, layer in chosen.items():
            modules[name] = entry = self._entry(layer)
            with torch.device("meta"):
                mixture = made.Mixture(model.config, self.settings(), entry["hidden"], entry["inner"])
            self._fill(mixture, layer, model.config, generator)
            replace.replace_module(model, name, mixture.train(layer.training))
        convert(model, self.remote_code, {**self.settings(), "modules": modules})
        self._move_masks(run, list(chosen))
        run.rename(lambda name: expert_names(name, modules, self.experts))
        run.cover(self, [f"{name}.experts" for name in chosen])
        run.report(
            self,
            experts=self.experts,
            top_k=self.top_k,
            layers=len(chosen),
            parameters_before=before,
            parameters_after=model.num_parameters(),
            active_parameters=active_parameters(model, self.top_k),
        )

    def _fill(self, mixture: Any, layer: nn.Module, config: Any, generator: torch.Generator) -> None:
        """Replace the empty parameters of a mixture by those it starts with, in the dtype and place of ``layer``."""
        own = mixture.experts
        for stack, dense in STACKS.items():
            weight = layer.get_parameter(dense)
            stacked = copies(weight.detach(), self.experts)
            if self.start == "random":
                std = getattr(config, "initializer_range", 0.02)
                stacked.copy_(torch.randn(stacked.shape, generator=generator) * std)
            elif self.expert_noise:
                drawn = torch.randn(stacked.shape, generator=generator).to(stacked)
                # Zeros stay, so that pruned stays pruned.
                stacked.add_(drawn * (self.expert_noise * weight.detach().float().std()).to(weight) * (stacked != 0))
            set_parameter(own, stack, stacked, weight)
            bias = layer.get_parameter(dense.replace("weight", "bias"))
            stacked = copies(bias.detach(), self.experts)
            set_parameter(own, f"{stack}_bias", stacked.zero_() if self.start == "random" else stacked, bias)
        up = layer.get_parameter(f"{UP}.weight")
        router = torch.randn(self.experts, up.shape[1], generator=generator) * self.router_std
        set_parameter(mixture.router, "weight", router.to(up.detach()), up)

    def _move_masks(self, run: Run, layers: list[str]) -> None:
        """Turn masks and N:M patterns of the dense weights into those of the copies; random experts have none."""
        for layer in layers:
            for stack, dense in STACKS.items():
                mask = run.masks.pop(f"{layer}.{dense}", None)
                pattern = run.nm_patterns.pop(f"{layer}.{dense}", None)
                if mask is not None and self.start == "copies":
                    run.masks[f"{layer}.experts.{stack}"] = copies(mask, self.experts)
                if pattern is not None and self.start == "copies":
                    run.nm_patterns[f"{layer}.experts.{stack}"] = pattern

    def contract(self) -> Contract:
        own = self.spec.contract
        if self.start == "copies":
            return own
        return Contract(needs=own.needs, forbids=own.forbids, adds=own.adds, owns=own.owns)

    def recompute(self, case: Any) -> dict[str, Any]:
        mixture = case.config["vmoe"]
        stacks = [value.numel() for name, value in case.after.named_parameters() if ".experts." in name]
        old, new = (sum(p.numel() for p in model.parameters()) for model in (case.before, case.after))
        return {
            "experts": mixture["experts"],
            "top_k": mixture["top_k"],
            "layers": sum(name.endswith(".router.weight") for name in case.tensors),
            "parameters_before": old,
            "parameters_after": new,
            "active_parameters": new - sum(stacks) + sum(stacks) * mixture["top_k"] // mixture["experts"],
        }

    @hookimpl
    def export(self, run: Run, directory: Any, card: Card) -> None:
        reported = run.reported(self)
        training = "" if self.train_capacity is None else f" ({self.train_capacity:g} in training)"
        order = "to the tokens with the largest gate" if self.batch_priority else "by position"
        among = "of a batch, so a prediction depends on the other images of its batch" if self.group == "batch" else ""
        card.paragraph(
            "Mixture of experts",
            f"The feed-forward parts of {reported['layers']} layers are mixtures of {reported['experts']} experts, of "
            f"which each token chooses {reported['top_k']}: {reported['parameters_before']:,} parameters became "
            f"{reported['parameters_after']:,}, of which {reported['active_parameters']:,} take part for one token. "
            f"Experts started {'as copies of the dense layer' if self.start == 'copies' else 'at random'}. Capacity "
            f"factor {self.capacity:g}{training}, slots given {order}, among the tokens "
            f"{among or 'of an image'}. In training mode the loss includes the importance and load losses of the "
            "routers.",
        )


def feed_forwards(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the feed-forward parts of a vision transformer's layers by name, in their order; empty for others.

    A part has two linear layers with biases, from the hidden width and back, and an activation between them.
    """
    if getattr(model, "main_input_name", "") != "pixel_values":
        return {}
    found = {}
    for name, module in model.named_modules():
        up: Any = getattr(module, UP, None)
        down: Any = getattr(module, DOWN, None)
        both = type(up) is nn.Linear and type(down) is nn.Linear and up.bias is not None and down.bias is not None
        active = hasattr(module, "activation_fn") or hasattr(module, "activation")  # DINOv2 before 5.24
        if both and active and up.weight.shape == down.weight.shape[::-1]:
            found[name] = module
    return found


def copies(weight: Tensor, count: int) -> Tensor:
    """Return ``count`` copies of ``weight``, stacked in memory of their own: ``[count, ...]``."""
    return weight.unsqueeze(0).repeat(count, *[1] * weight.dim())


def set_parameter(module: nn.Module, name: str, value: Tensor, like: nn.Parameter) -> None:
    """Set a parameter that is trained if ``like`` is."""
    module.register_parameter(name, nn.Parameter(value, requires_grad=like.requires_grad))


def active_parameters(model: nn.Module, top_k: int) -> int:
    """Return how many parameters take part in the computation of one token."""
    stacks = [(p.numel(), len(p)) for name, p in model.named_parameters() if ".experts." in name]
    return sum(p.numel() for p in model.parameters()) - sum(n // count * (count - top_k) for n, count in stacks)


def expert_names(name: str, layers: Any, count: int) -> list[str]:
    """Return the new names of a module of the dense model: for a linear layer the matrices that hold its copies."""
    layer, _, leaf = name.rpartition(".")
    for stack, dense in STACKS.items():
        if layer in layers and dense == f"{leaf}.weight":
            return [f"{layer}.experts.{index}.{stack}" for index in range(count)]
    return [name]


@hookimpl
def register_techniques(register) -> None:
    register(VMoE)
