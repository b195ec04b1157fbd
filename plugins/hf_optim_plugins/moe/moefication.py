"""MoEfication: the neurons of a feed-forward layer become experts, and each token computes only a few of them.

    y = sum over the k experts e of largest score  of  W_down,e act(W_up,e x + b_e)   + b_down

The weights are those of the dense model, in another order. Neurons with similar weights are often active together, so
they are divided into experts of equal size by balanced k-means on the rows of the first matrix, each of length one. A
router learns, from activations on calibration data, which experts a token activates most: ``scores = W2 tanh(W1 x /
|x|)``. The chosen experts are summed with weight 1. With all of them on, the layer is the dense one.

Zhang, Lin, Liu, Li, Sun, Zhou, "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts", arXiv
2110.01786. The paper divides ReLU layers, of whose neurons most are zero for a token; a router then loses little. Other
activations (GELU, SwiGLU) are divided in the same way, by magnitude, and lose more: the record has the share of
activations that are zero, and the share of neurons that carry 95 % of their magnitude. Its experts have 32 neurons. Its
second way of dividing, of the graph of co-activation, is k-means on patterns of activation here.

The result has its own code, saved with the checkpoint: in the classes of transformers experts have gates, which would
scale them. The experts themselves are on transformers' interface for experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

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
from hf_optim.toolkit.statistics import sample_feed_forwards
from hf_optim.toolkit.topology import (
    FeedForward,
    NoInputsError,
    dummy_inputs,
    inlet_entries,
    place_layer,
    weight_out_in,
)

from . import _inlet_layers, _moefied_layers, _moefied_record
from ._neuron_clusters import activation_features, balanced_kmeans, means, weight_features
from ._neuron_router import covered_share, neuron_mass, train_router
from ._neuron_stacks import (
    computed_parameters,
    dense_parameters,
    fill_,
    input_parts,
    move_masks,
    new_names,
    stack_names,
)

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope

NEURONS = 32
"""Of an expert, in the paper."""


@technique(
    "moefication",
    family="moe",
    paper=Paper("2110.01786", "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts", 2021),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.MOE, traits.QUANTIZED},
        adds={traits.MOE},
        keeps={traits.SPARSE},
        owns={"experts"},
    ),
    reload=Reload.REMOTE_CODE,
)
class Moefication(Technique):
    """Divide the neurons of feed-forward layers into experts, of which each token computes a few.

    Attributes:
        targets: the last linear layers of the feed-forward layers to divide, by class, name or pattern.
        skip: patterns of such layers to leave dense.
        experts: experts of each layer, a divisor of its neurons; None makes experts of 32 neurons.
        active: how many experts each token computes: a number if whole, a share of all if a float.
        clustering: what experts have in common: ``weights`` of the first matrix, or activity on the same tokens
            (``coactivation``).
        router: ``mlp`` is trained on the calibration data; ``similarity`` compares the input with the experts' mean
            weights, and is not trained.
        tokens: size of the sample of calibration tokens for clusters and router; up to twice as many are kept.
        epochs: of the router.
        seed: of clusters and router.
    """

    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()
    experts: int | None = option(None, low=1)
    active: int | float = option(0.25, above=0)
    clustering: Literal["weights", "coactivation"] = "weights"
    router: Literal["mlp", "similarity"] = "mlp"
    tokens: int = option(4096, low=2)
    epochs: int = option(30, low=0)
    seed: int = option(0, low=0)

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="moefication",
        source=joined(
            coded_experts, grouped_experts, replace, thread_values, feed_forward_inlets, _inlet_layers, _moefied_layers
        ),
        field=_moefied_layers.MoefiedModules.replaced_field,
        model_base=_moefied_layers.MoefiedModules.__name__,
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"experts": 4, "active": 2, "epochs": 2})

    def validate(self) -> None:
        if isinstance(self.active, float) and self.active > 1:
            raise RecipeError(f"moefication: active is a share in (0, 1] or a whole number, not {self.active!r}")
        if isinstance(self.active, int) and self.experts is not None and self.active > self.experts:
            raise RecipeError(f"moefication: active ({self.active}) cannot exceed experts ({self.experts})")

    def needs_whole_model(self) -> bool:
        return True

    def changes_architecture(self) -> bool:
        return True

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        try:
            self._layers(model, label)
        except NoInputsError:
            return  # calibration data may have them

    def model_after(self, model: PreTrainedModel, label: str) -> PreTrainedModel | None:
        try:
            layers, _ = self._layers(model, label)
        except NoInputsError:
            return None
        entries = {layer.down: self._entry(model, layer, label) for layer in layers}
        most = max(entry["experts"] for entry in entries.values())
        return converted_skeleton(
            model, self.remote_code, {"experts": most, "modules": {**inlet_entries(layers), **entries}}
        )

    def _entry(self, model: PreTrainedModel, layer: FeedForward, label: str) -> dict[str, Any]:
        """Return what the configuration says of a divided layer."""
        experts, active = self._sizes(layer, label)
        parts = input_parts(model, layer)
        return {
            "experts": experts,
            "active": active,
            "neurons": len(layer),
            "width": parts[0][0].shape[1],
            "act": layer.activation,
            "router": self.router,
            "gated": layer.gate is not None,
            "bias": any(bias is not None for _, bias in parts),
            "out_bias": model.get_submodule(layer.down).bias is not None,
            "inlets": list(layer.producers),
        }

    def _layers(self, model: PreTrainedModel, label: str) -> tuple[list[FeedForward], dict[str, list[str]]]:
        """Return the feed-forward layers to divide, and what is left dense, by reason. Raises ``ModelError``."""
        chosen, skipped = topology.select_feed_forwards(model, self.targets, self.skip, label, "that can be divided")
        for layer in chosen:
            self._sizes(layer, label)
        require_own_code(model, self.remote_code, label)
        return chosen, skipped

    def _sizes(self, layer: FeedForward, label: str) -> tuple[int, int]:
        """Return the experts of a layer, and how many of them a token computes. Raises ``ModelError``."""
        neurons = len(layer)
        experts = self.experts or max(1, neurons // NEURONS)
        if neurons % experts or (self.experts is None and neurons % NEURONS):
            asked = f"experts of {NEURONS} neurons" if self.experts is None else f"{experts} experts"
            raise ModelError(
                f"{label}: the {neurons} neurons of {layer.down} cannot be divided into {asked}; set experts to a "
                f"divisor: {divisors(neurons)}"
            )
        active = self.active if isinstance(self.active, int) else max(1, round(self.active * experts))
        if active > experts:
            raise ModelError(f"{label}: active ({active}) cannot exceed the {experts} experts of {layer.down}")
        return experts, active

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        model, label = scope.model, run.label(self)
        layers, skipped = self._layers(model, label)
        samples, layers, unreached = yield from sample_feed_forwards(model, layers, label, self.tokens)
        skipped |= unreached
        expected = main_output(model, dummy_inputs(model))
        parameters = {layer.down: dense_parameters(model, layer) for layer in layers}
        made = self._divide(run, layers, samples)
        self._verify(model, made, expected, label)
        run.cover(self, [f"{name}.experts" for name in made], skipped)
        figures = run.state(self).figures
        del run.state(self).figures
        for name, ffn in made.items():
            own = computed_parameters(ffn)
            figures[name] |= {
                "parameters": parameters[name],
                "computed": own,
                "share": round(own / parameters[name], 6),
            }
        unused = sum(own["unused"] for own in figures.values())
        if unused:
            total = sum(own["experts"] for own in figures.values())
            run.warn(self, f"{unused} of {total} experts are chosen for no token of the calibration sample")
        run.report(self, layers=figures, **_moefied_record.totals(figures))

    @torch.no_grad()
    def _divide(self, run: Run, layers: list[FeedForward], samples: dict[str, Tensor]) -> dict[str, Any]:
        """Replace the linear layers of the feed-forward layers; return the new modules by name of the last one."""
        model, label = run.model, run.label(self)
        code: Any = generate(self.remote_code, type(model.config))  # type: ignore[arg-type]
        entries: dict[str, dict[str, Any]] = {}
        made: dict[str, Any] = {}
        stacks: dict[str, list[str]] = {}
        run.state(self).figures = {}
        for layer in layers:
            experts, active = self._sizes(layer, label)
            x = samples.pop(layer.down)
            parts = input_parts(model, layer)
            down = weight_out_in(model.get_submodule(layer.down))[:, layer.columns]
            mass = neuron_mass(x, (parts[0], parts[1] if len(parts) > 1 else None), ACT2FN[layer.activation])
            rows = parts[0][0]
            points = weight_features(rows) if self.clustering == "weights" else activation_features(mass, self.seed)
            labels = balanced_kmeans(points, experts, self.seed)
            order = labels.argsort(stable=True).view(experts, -1)
            entry = self._entry(model, layer, label)
            about = {"dtype": rows.dtype, "device": rows.device}
            ffn = code.MoefiedFFN(model.config, rows.shape[1], down.shape[0], entry, about)
            last: Any = model.get_submodule(layer.down)
            fill_(ffn, parts, down, last.bias, order)
            by_expert = mass[:, order].sum(-1)  # [T, experts]
            centers = means(weight_features(rows), labels, experts)
            if self.router == "mlp":
                first, second = train_router(x, by_expert, centers, active, self.epochs, self.seed, label)
                ffn.router.centers.copy_(first)
                ffn.router.mixing.copy_(second)
            else:
                ffn.router.centers.copy_(centers)
            chosen = ffn.choose(x)
            run.state(self).figures[layer.down] = {
                "experts": experts,
                "active": active,
                "activation": layer.activation,
                "tokens": len(x),
                **_moefied_record.activity(mass),
                "covered": round(covered_share(by_expert, chosen), 6),
                "covered_at_best": round(covered_share(by_expert, by_expert.topk(active, dim=-1).indices), 6),
                "unused": experts - len(chosen.unique()),
            }
            move_masks(run, layer, order)
            stacks |= stack_names(layer)
            entries |= {layer.down: entry, **inlet_entries([layer])}
            place_layer(model, layer, ffn, code.Inlet)
            made[layer.down] = ffn
        counts = {stack: entries[stack.rpartition(".experts.")[0]]["experts"] for stack in stacks}
        run.rename(lambda name: new_names(name, stacks, counts))
        convert(model, self.remote_code, {"experts": max(counts.values()), "modules": entries})
        code.choose_implementation(model)
        return made

    def _verify(self, model: PreTrainedModel, made: dict[str, Any], expected: Tensor, label: str) -> None:
        """Raise ``ModelError`` unless the model computes what the dense one did, with all experts on."""
        active = {name: ffn.active for name, ffn in made.items()}
        for ffn in made.values():
            ffn.active = ffn.experts.num_experts
        found = main_output(model, dummy_inputs(model))
        for name, ffn in made.items():
            ffn.active = active[name]
        gap = relative_difference(found, expected)
        if not gap <= rounding_tolerance(model):
            raise ModelError(
                f"{label}: with all experts on, {type(model).__name__} does not compute what the dense model computes "
                f"(relative difference {gap:.1e}); this architecture is not supported"
            )

    def recompute(self, case: Any) -> dict[str, Any]:
        return _moefied_record.recompute(case)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        _moefied_record.write(run.reported(self), card)


def divisors(number: int) -> str:
    """Return the divisors of a number above 1, as text; of many the middle ones are left out."""
    found = [str(n) for n in range(2, number + 1) if number % n == 0]
    return ", ".join(found if len(found) <= 12 else [*found[:6], "...", *found[-6:]])


@hookimpl
def register_techniques(register) -> None:
    register(Moefication)
