"""Universal Transformer: a few shared blocks, applied step after step, in place of a stack of different ones.

    H_t = Block(H_{t-1} + P + T_t),    P[i, 2j] = sin(i / 10000^(2j/d)),   P[i, 2j+1] = cos(i / 10000^(2j/d)),
    t = 1 ... steps                    T_t[2j]  = sin(t / 10000^(2j/d)),   T_t[2j+1]  = cos(t / 10000^(2j/d))

Dehghani, Gouws, Vinyals, Uszkoreit, Kaiser, "Universal Transformers", arXiv 1807.03819, section 2.1: i and t count from
1, and both signals are added at every step. The authors' code (tensor2tensor) counts from 0, and has all sines before
all cosines. The paper trains from scratch; here a pretrained model is converted, and keeps what is around its blocks:
its embeddings with their positions, its rotation of queries and keys, its last norm.

- The blocks are tied: each group of layers becomes the mean of its blocks, or one of them, and the result needs
  training. Sines of amplitude 1 are large beside the states of most pretrained models: ``scale`` multiplies them, and
  ``learned`` signals begin at zero. With ``none`` for both, one group, equal blocks and as many steps as layers, the
  model computes what it did before.
- ``groups`` above 1 shares G blocks: each by ``steps / G`` steps in a row, or all in turn with ``order: cycle``.
- A decoder's cache has keys and values for each step, as for each layer before.
- Halting of single tokens is another step of the recipe, ``act``.

How the checkpoint reloads: with its own code, REMOTE_CODE. With ``convert_to: albert``, a BERT becomes transformers'
ALBERT, which shares its blocks in the same way, without signals. STOCK_ARCH.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

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
from hf_optim.checkpoints.remote_code import RemoteCode, convert, joined, require_own_code
from hf_optim.toolkit.modules import (
    main_output,
    mixed_classes,
    relative_difference,
    remote_code_guard,
    rounding_tolerance,
    tied_blocks,
)
from hf_optim.toolkit.topology import dummy_inputs

from . import _stock_albert, _universal_model
from ._attach import context_length
from ._tied_layers import Layers, find_layers, require_one_stack, set_depth, tie_weights

MOST = tied_blocks.MOST_STEPS


@technique(
    "universal_transformer",
    family="attention",
    paper=Paper("1807.03819", "Universal Transformers", 2018),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.QUANTIZED, traits.TIED_BLOCKS, traits.MOE},
        adds={traits.TIED_BLOCKS},
        owns={"depth"},
    ),
    reload=Reload.REMOTE_CODE,
)
class UniversalTransformer(Technique):
    """Tie the blocks of a model to one, or to a few, applied step after step.

    Attributes:
        steps: how many times a block is applied; None: as many as the model has layers.
        groups: how many blocks there are.
        order: of the groups over layers and steps: ``consecutive`` ones, as in ALBERT, or in a ``cycle``.
        initial: what a block begins as: the ``mean`` of its group's blocks, or one of them, counted from 0. Blocks with
            experts have no mean.
        position_signal: what says at each step where a token is. ``learned``: for each position of the model's context.
        step_signal: what says which step it is.
        scale: factor of both signals; the paper has 1.
        convert_to: ``albert`` makes transformers' ALBERT of a BERT, with both signals ``none`` and consecutive groups.
    """

    steps: int | None = option(None, low=1, high=MOST)
    groups: int = option(1, low=1, high=MOST)
    order: Literal["consecutive", "cycle"] = "consecutive"
    initial: int | Literal["mean"] = "mean"
    position_signal: Literal["sinusoidal", "learned", "none"] = "sinusoidal"
    step_signal: Literal["sinusoidal", "learned", "none"] = "sinusoidal"
    scale: float = option(1.0, low=0.0, high=1e5)
    convert_to: Literal["albert"] | None = None

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="universal_transformer",
        source=joined(remote_code_guard, mixed_classes, tied_blocks, _universal_model),
        config_base=_universal_model.UniversalBase.__name__,
        field=tied_blocks.FIELD,
        model_base=_universal_model.UniversalModel.__name__,
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"steps": 3, "step_signal": "learned"})

    def validate(self) -> None:
        if isinstance(self.initial, int) and not 0 <= self.initial < MOST:
            raise RecipeError(f"universal_transformer: initial is mean, or the number of a block, not {self.initial}")
        if self.steps is not None and self.groups > self.steps:
            raise RecipeError(
                f"universal_transformer: {self.groups} groups cannot all be applied in {self.steps} steps"
            )
        if self.convert_to and (self.position_signal, self.step_signal) != ("none", "none"):
            raise RecipeError(
                "universal_transformer: ALBERT adds no signals to its steps: set position_signal and step_signal to "
                "none, or leave out convert_to"
            )
        if self.convert_to and self.order != "consecutive":
            raise RecipeError("universal_transformer: the groups of ALBERT are consecutive: leave out order")

    def contract(self) -> Contract:
        # Experts of the same number in two layers have nothing in common, so their mean is nothing; one layer is.
        own = self.spec.contract
        return own if self.initial == "mean" else replace(own, forbids=own.forbids - {traits.MOE})

    def reload(self) -> Reload:
        return Reload.STOCK_ARCH if self.convert_to else Reload.REMOTE_CODE

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        self._layers(model, label)

    def _layers(self, model: PreTrainedModel, label: str) -> Layers:
        """Return the layers to tie. Raises ``ModelError`` for a model whose layers cannot be."""
        require_one_stack(model.config, label)
        if self.convert_to:
            _stock_albert.require_stock(model, label)
        else:
            require_own_code(model, self.remote_code, label)
        layers = find_layers(model, label)
        if self.groups > len(layers.blocks):
            raise ModelError(f"{label}: {self.groups} groups of {len(layers.blocks)} layers; take at most one for each")
        least = min(len(group) for group in layers.grouped(self.groups, self.order))
        if isinstance(self.initial, int) and self.initial >= least:
            raise ModelError(f"{label}: initial is {self.initial}, and a group has {least} layers, counted from 0")
        if self.position_signal == "learned" and context_length(model.config) is None:
            raise ModelError(
                f"{label}: {model.config.model_type} has no fixed context, so there is no number of learned positions; "
                "take sinusoidal ones"
            )
        return layers

    def _settings(self, model: PreTrainedModel, layers: Layers) -> dict[str, Any]:
        learned = self.position_signal == "learned"
        return {
            "blocks": layers.name,
            "steps": self.steps or len(layers.blocks),
            "groups": self.groups,
            "order": self.order,
            "position": self.position_signal,
            "step": self.step_signal,
            "scale": self.scale,
            "width": model.config.get_text_config().hidden_size,
            "context": (context_length(model.config) or 0) if learned else 0,
        }

    @hookimpl
    def prepare_load(self, run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        require_one_stack(run.config, run.label(self))
        return None

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        model, label = run.model, run.label(self)
        layers = self._layers(model, label)
        settings, before = self._settings(model, layers), model.num_parameters()
        inputs = dummy_inputs(model)
        chosen = tie_weights(layers, layers.grouped(self.groups, self.order), self.initial)
        expected = main_output(model, inputs)  # of the stock class, with equal blocks in all layers of a group
        run.rename(layers.renamed(chosen, settings))
        if self.convert_to:
            made = _stock_albert.to_albert(model, settings, label)
            self._require_same(made, expected, inputs, len(layers.blocks) == settings["steps"], label)
            run.record.reload = Reload.STOCK_ARCH.name
        else:
            made = self._tied(model, layers, settings, inputs, expected, label)
            run.record.reload = Reload.REMOTE_CODE.name
        self._report(run, made, layers, settings, before)
        return made

    def _tied(
        self, model: PreTrainedModel, layers: Layers, settings: dict[str, Any], inputs: Any, expected: Any, label: str
    ) -> PreTrainedModel:
        """Return the model with steps in place of its layers; first, as many as layers and without signals, a proof."""
        stack = list(layers.blocks)
        plain = {**settings, "steps": len(stack), "position": "none", "step": "none", "context": 0}
        tied_blocks.tie_blocks(model, plain)
        self._require_same(model, expected, inputs, True, label)
        layers.restore(model, stack)
        set_depth(model, layers, settings)
        tied_blocks.tie_blocks(model, settings)
        return convert(model, self.remote_code, settings)

    @staticmethod
    def _require_same(made: PreTrainedModel, expected: Any, inputs: Any, comparable: bool, label: str) -> None:
        if not comparable:
            return
        gap = relative_difference(main_output(made, inputs), expected)
        if not gap <= rounding_tolerance(made):
            raise ModelError(
                f"{label}: with equal blocks, {type(made).__name__} in steps does not compute what its layers compute "
                f"(relative difference {gap:.1e}); this architecture is not supported"
            )

    def _report(self, run: Run, made: PreTrainedModel, layers: Layers, settings: dict[str, Any], before: int) -> None:
        run.report(
            self,
            layers=len(layers.blocks),
            steps=settings["steps"],
            groups=settings["groups"],
            parameters_before=before,
            parameters_after=made.num_parameters(),
            share_of_parameters=made.num_parameters() / before,
            model_class=type(made).__name__,
        )

    def recompute(self, case: Any) -> dict[str, Any]:
        before = sum(p.numel() for p in case.before.parameters())
        after = sum(p.numel() for p in case.after.parameters())
        stock = "layer_types" not in case.config
        mark = ".albert_layers." if stock else ".own_block."
        return {
            "layers": case.before.config.num_hidden_layers,
            "steps": case.config["num_hidden_layers"] if stock else len(case.config["layer_types"]),
            "groups": len({name.split(mark)[0] for name in case.tensors if mark in name}),
            "parameters_before": before,
            "parameters_after": after,
            "share_of_parameters": after / before,
            "model_class": case.config["architectures"][0],
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        blocks = "one block" if figures["groups"] == 1 else f"{figures['groups']} blocks"
        card.paragraph(
            "Universal Transformer",
            f"The {figures['layers']} layers were tied to {blocks}, applied in {figures['steps']} steps: "
            f"{figures['parameters_before']:,} parameters became {figures['parameters_after']:,} "
            f"({figures['share_of_parameters']:.1%}).",
        )


@hookimpl
def register_techniques(register) -> None:
    register(UniversalTransformer)
