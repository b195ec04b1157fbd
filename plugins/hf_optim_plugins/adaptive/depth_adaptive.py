"""Depth-adaptive transformer: exits after blocks, all of them trained, and a classifier of where to stop.

    aligned:  L = sum_n w_n L_n / sum_n w_n    L_n: the task's loss at exit n;  w_n: 1, n, sqrt(n), 1/n, 1/sqrt(n)
    mixed:    L = mean over paths of the loss with an exit drawn for each token, whose state is copied above it
    classifier, with an oracle exit n*:                  L + alpha * mean of -log q(n*)
      multinomial  q(n) = softmax(W s + b)_n             s: the state after the first exit's block
      geometric    q(n) = x_n prod_{m < n} (1 - x_m)     x_n = sigmoid(w_n h_n + b_n), and 1 at the last exit
      likelihood   n* = argmax_n log p(y | exit n) - lambda n
      correctness  n* = argmax_n [argmax p(. | exit n) = y] - lambda n
      smoothing    the scores of a token, summed over tokens t' with exp(-(t - t')^2 / sigma)

Elbayad et al., "Depth-Adaptive Transformer", arXiv 1910.10073 (ICLR 2020). The last exit is the model itself. Exits
with ``shared`` heads are read by the model's own final norm and output head, ``own`` heads are copies that are trained.
``sequence`` classifiers decide once for a row, from its mean state; ``token`` classifiers for each token.

Oracles, smoothing, weightings and mixed training are written as they are known from the paper, and were not compared
with its full text. What differs from it: its models are encoder-decoders, whose encoder runs in full before the
decoder's exits are chosen. Here a model has one stack, so a multinomial classifier reads the state after the first
exit's block. The
classifier reads states without shaping them: its gradient stops there. The score of a row is the mean over its labels,
that of a token's likelihood is the sum of the paper. Gradient scaling is that of Li et al., "Improved Techniques for
Training Adaptive Deep Networks", arXiv 1908.06294: a block gets the mean of the gradients of the exits above it. A
base model, which gives sentence vectors and no loss, learns at each exit the direction of the last one's mean state;
that is ours. The classifier with a Poisson binomial law is not offered.

The checkpoint is the stock model; its exits lie beside it (``exits.safetensors``). STOCK_DENSE.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

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
from hf_optim.toolkit.checkpoint import NamedTensors
from hf_optim.toolkit.distillation import losses
from hf_optim.toolkit.exits import (
    CLASSIFIERS,
    ENTRY,
    FILE,
    HEADS,
    LAWS,
    ExitHeads,
    ExitSettings,
    attach_exits,
    exits_of,
    find_blocks,
    is_language_model,
    require_exits,
    store_entry,
    store_settings,
)

from ._exit_figures import KeepBatches, figures_by_exit, measured_card
from ._exit_oracles import exit_weights
from ._exit_training import (
    RecordExits,
    balanced,
    early_outputs,
    exit_loss,
    exit_targets,
    mixed_loss,
    stop_logits,
    stop_loss,
    stop_recording,
    vector_distance,
)

WEIGHTS = ("uniform", "linear", "sqrt", "inverse", "inverse_sqrt")
TERM, STOP = "exits", "exit_classifier"


@technique(
    "depth_adaptive",
    family="adaptive",
    paper=Paper("1910.10073", "Depth-Adaptive Transformer", 2020),
    contract=Contract(keeps={traits.SPARSE, traits.SPARSE_NM}, owns={"exits"}),
    reload=Reload.STOCK_DENSE,
    trains=True,
)
class DepthAdaptive(Technique):
    """Train exits after the blocks of a model, and a classifier of where each row or token should stop.

    Attributes:
        layers: indices of the blocks after which an exit sits, from 0; empty: after every block but the last.
        heads: ``shared``: the model's own final norm and head read every exit; ``own``: each has trained copies.
        classifier: ``none``, one decision for a ``sequence``, or one for each ``token`` of a language model.
        law: of the classifier, ``multinomial`` or ``geometric``.
        training: ``aligned``: the losses of all exits in each step; ``mixed``: those of exits drawn for each token.
        weights: of the exits' losses: ``uniform``, ``linear``, ``sqrt``, ``inverse``, ``inverse_sqrt``.
        paths: draws in a step of ``mixed`` training.
        gradient_scaling: each block gets the mean of the gradients of the exits above it, in place of their sum.
        oracle: what the classifier learns: the exit of the best ``likelihood``, or the first of ``correctness``.
        depth_penalty: lambda, what an exit must be better than the one before it.
        smoothing: sigma of the kernel over tokens; 0: none.
        classifier_weight: alpha.
        train_model: train the model with its exits; false leaves it as it is, also one with quantized weights.
        exit_lr: learning rate of own heads and classifier; empty: that of the Trainer.
    """

    layers: tuple[int, ...] = ()
    heads: str = option("shared", choices=HEADS)
    classifier: str = option("none", choices=CLASSIFIERS)
    law: str = option("multinomial", choices=LAWS)
    training: Literal["aligned", "mixed"] = "aligned"
    weights: str = option("uniform", choices=WEIGHTS)
    paths: int = option(1, low=1, high=64)
    gradient_scaling: bool = False
    oracle: Literal["likelihood", "correctness"] = "likelihood"
    depth_penalty: float = option(0.0, low=0.0)
    smoothing: float = option(0.0, low=0.0)
    classifier_weight: float = option(1.0, above=0.0)
    train_model: bool = True
    exit_lr: float | None = option(None, above=0.0)

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"heads": "own", "classifier": "sequence"})

    def contract(self) -> Contract:
        declared = self.spec.contract
        if not self.train_model:
            return declared
        return Contract(
            needs={traits.FLOAT_WEIGHTS}, forbids={traits.QUANTIZED}, keeps=declared.keeps, owns=declared.owns
        )

    def validate(self) -> None:
        if self.layers:
            ExitSettings(self.layers)
        if self.training == "mixed" and self.heads == "own":
            raise RecipeError(
                "depth_adaptive: in mixed training one head reads tokens of all exits: use heads shared, or aligned"
            )
        if self.training == "mixed" and not self.train_model:
            raise RecipeError("depth_adaptive: mixed training with shared heads trains the model: set train_model true")
        if not self.train_model and self.heads == "shared" and self.classifier == "none":
            raise RecipeError(
                "depth_adaptive: with train_model false, shared heads and no classifier there is nothing to train: use "
                "own heads or a classifier"
            )
        if self.classifier != "token" and self.smoothing:
            raise RecipeError("depth_adaptive: smoothing is over tokens: it needs classifier token")
        if self.classifier == "none" and self.law != "multinomial":
            raise RecipeError("depth_adaptive: law is that of a classifier: set classifier to sequence or token")
        if self.gradient_scaling and (self.training == "mixed" or not self.train_model):
            raise RecipeError("depth_adaptive: gradient_scaling is for aligned training of the model")

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        self._settings(model, label)

    def _settings(self, model: Any, label: str) -> ExitSettings:
        """Return the exits for a model. Raises ``ModelError`` for one that they do not fit."""
        try:
            count = len(find_blocks(model))
        except ModelError as error:
            raise ModelError(f"{label}: {error}") from error
        layers = self.layers or tuple(range(count - 1))
        if layers[-1] >= count - 1:
            raise ModelError(
                f"{label}: {type(model).__name__} has blocks 0 to {count - 1}, and the last exit, after block "
                f"{count - 1}, is the model itself: layers can name blocks up to {count - 2}, not {layers[-1]}"
            )
        if self.classifier == "token" and not is_language_model(model):
            raise ModelError(
                f"{label}: the head of {type(model).__name__} does not read each token alone: use classifier sequence"
            )
        if self.classifier != "none" and (model.base_model is model or losses.head_kind(model) != "classes"):
            raise ModelError(
                f"{label}: {type(model).__name__} does not predict classes, by which an exit could be right: use "
                "classifier none"
            )
        return ExitSettings(layers, self.heads, self.classifier, self.law)

    # -- hooks --------------------------------------------------------------------------------------------------------
    @hookimpl
    def transform_model(self, run: Run) -> None:
        model, label = run.model, run.label(self)
        settings = self._settings(model, label)
        exits = exits_of(model)
        if exits is None or exits.settings != settings:  # those of a checkpoint are trained on
            try:
                exits = attach_exits(model, settings)
            except ModelError as error:
                raise ModelError(f"{label}: {error}") from error
        store_settings(model.config, None)  # written when they are trained
        state = run.state(self)
        NamedTensors(state, "exit").update(dict(exits.named_parameters()))
        if not self.train_model:
            state.frozen = [name for name, p in model.named_parameters() if p.requires_grad]
            for name in state.frozen:
                model.get_parameter(name).requires_grad_(False)

    def changes_architecture(self) -> bool:
        return False

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        split = balanced(require_exits(run.model).count) if self.gradient_scaling else None
        return [RecordExits(run.state(self), run, split), KeepBatches(run.state(self))]

    @hookimpl
    def parameter_groups(self, run: Run, model: nn.Module) -> list[dict[str, Any]] | None:
        chosen = list(require_exits(run.model).parameters())
        rate = {} if self.exit_lr is None else {"lr": self.exit_lr}
        return [{"params": chosen, **rate}] if chosen else None

    @hookimpl
    def training_loss(
        self, run: Run, model: nn.Module, inputs: Mapping[str, Any], outputs: Any
    ) -> dict[str, Tensor | float]:
        exits, label = require_exits(run.model), run.label(self)
        states = list(getattr(run.state(self), "states", []))
        if len(states) != exits.count:
            raise ModelError(
                f"{label}: {len(states)} of {exits.count} exits were reached in a training step: train with "
                "hf_optim.OptimTrainer on one device, whose forward runs every block once"
            )
        states[-1] = states[-1] if self.train_model else states[-1].detach()
        if not exits.structure.has_head:
            return {TERM: self._vector_term(exits, states, inputs)}
        smoother = getattr(run.state(self), "smoother", None)
        exit_loss(exits, outputs, inputs, smoother, label)
        if self.training == "mixed":
            terms: dict[str, Tensor | float] = {
                "task_scale": 0.0,
                TERM: mixed_loss(exits, inputs, self.paths, label, smoother),
            }
            with torch.no_grad():
                found = early_outputs(exits, states, inputs) if self.classifier != "none" else []
        else:
            weights = exit_weights(self.weights, exits.count)
            found = early_outputs(exits, states, inputs)
            early = [
                weight * exit_loss(exits, each, inputs, smoother, label)
                for weight, each in zip(weights, found, strict=False)
            ]
            terms = {"task_scale": weights[-1], TERM: torch.stack(early).sum()}
        if self.classifier != "none":
            target, counted = exit_targets(
                exits, [*found, outputs], inputs,
                oracle=self.oracle, penalty=self.depth_penalty, smoothing=self.smoothing,
            )  # fmt: skip
            terms[STOP] = self.classifier_weight * stop_loss(exits, states, inputs, target, counted)
        return terms

    def _vector_term(self, exits: ExitHeads, states: list[Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """Return the weighted distances of the exits' vectors from the last one's, for a model without a loss."""
        weights, mask = exit_weights(self.weights, exits.count)[:-1], inputs.get("attention_mask")
        distances = [
            weight / sum(weights) * vector_distance(exits.head_input(index, states[index]), states[-1], mask)
            for index, weight in enumerate(weights)
        ]
        return torch.stack(distances).sum()

    def loss_items(self, run: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        mask = inputs.get("attention_mask")
        rows = {TERM: len(mask)} if isinstance(mask, Tensor) and "labels" not in inputs else {}
        labels = inputs.get("labels")
        if self.classifier == "sequence" and isinstance(labels, Tensor) and labels.dim() == 2:
            rows[STOP] = len(labels)
        return rows

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        state, model = run.state(self), run.model
        stop_recording(state)
        for name in vars(state).pop("frozen", []):
            model.get_parameter(name).requires_grad_(True)
        exits = require_exits(model).eval()
        store_entry(model)
        run.report(
            self,
            exits=exits.count,
            after_blocks=list(exits.layers),
            blocks=exits.structure.blocks,
            heads=self.heads,
            classifier=self.classifier,
            exit_parameters=sum(p.numel() for p in exits.parameters()),
            **figures_by_exit(exits, vars(state).pop("batches", []), stop_logits),
        )

    def recompute(self, case: Any) -> dict[str, Any]:
        from safetensors.torch import load_file

        entry = case.config[ENTRY]
        blocks = case.config.get("num_hidden_layers") or case.config["n_layer"]
        stored = load_file(case.folder / FILE)
        return {
            "exits": len(entry["layers"]) + 1,
            "after_blocks": [*entry["layers"], blocks - 1],
            "blocks": blocks,
            "heads": "own" if any(name.startswith("own.") for name in stored) else "shared",
            "classifier": entry["classifiers"] if any(name.startswith("classifier.") for name in stored) else "none",
            "exit_parameters": sum(value.numel() for value in stored.values()),
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        if not figures:
            return
        early = figures["after_blocks"][:-1]
        where = f"block {early[0]}" if len(early) == 1 else f"blocks {', '.join(map(str, early))}"
        heads = "its own final norm and head" if figures["heads"] == "own" else "the model's final norm and head"
        decides = {
            "none": "",
            "sequence": " A classifier decides where a sequence stops.",
            "token": " A classifier decides where each token stops.",
        }[figures["classifier"]]
        card.paragraph(
            "Early exits",
            f"The model was trained with {len(early)} early exits, after {where} of {figures['blocks']} (counted from "
            f"0), each read by {heads}.{decides} Their {figures['exit_parameters']:,} parameters are in `{FILE}`; "
            "stock transformers ignores them and computes all blocks, and `hf_optim.forward_with_exits` uses them. "
            "Quality, memory and times in the results, where there are any, are those of all blocks.",
        )
        measured_card(card, figures)


@hookimpl
def register_techniques(register) -> None:
    register(DepthAdaptive)
