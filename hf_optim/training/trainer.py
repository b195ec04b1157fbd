"""``OptimTrainer``: a ``Trainer`` whose loss and optimizer groups the steps of a recipe can extend."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..errors import CheckpointError, ModelError, OptimError, RecipeError
from ..recipes.technique import Technique
from ..runs.run import run_of
from ..toolkit import compat
from ..toolkit.checkpoint.stock_errors import stock_errors
from ..toolkit.distributed import collectives
from .checkpoint_callback import CheckpointCallback
from .checkpoint_files import require_readable
from .loss_weights import OTHER_KEY, TASK_KEY, Key, count_items, count_task_items, is_summed, step_weights, weighted
from .mask_callback import MaskCallback
from .saved_weights import complete_weights
from .stage_callbacks import stage_callbacks

log = logging.getLogger(__name__)

RESUMING = "cannot resume from"
TASK_SCALE = "task_scale"


class OptimTrainer(Trainer):
    """``transformers.Trainer`` for an optimized model, with the same arguments and behaviour. In addition:

    - Terms that ``training_loss`` hooks return are added to the task loss in training (never in evaluation), and
      logged under their names next to ``task_loss``, as means over steps. Each is weighted by the share that the batch
      has of what it is a mean over, so that an optimizer step does not depend on how its batch is cut.
    - Parameters of the groups that ``parameter_groups`` hooks return leave the Trainer's groups; weight decay is split
      as in those.
    - The callbacks of ``hf_optim.callbacks`` are added automatically.
    """

    @functools.wraps(Trainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._auxiliary = _AuxiliaryParametersCallback()
        self.add_callback(self._auxiliary)
        self._ours: list[TrainerCallback] = []
        self._attach(self.model)

    def _attach(self, model: Any) -> None:
        self.run = run_of(model)
        self._stage = self.run.stage
        self._terms: dict[str, torch.Tensor] = {}
        self._weights: list[dict[Key, torch.Tensor]] = []  # of the batches of the current step, in their order
        self._terms_since = 0
        self._grouped: torch.optim.Optimizer | None = None
        for callback in self._ours:
            self.remove_callback(callback)
        # callbacks=hf_optim.callbacks(model) may have been passed as well.
        present = any(isinstance(c, MaskCallback) and c.run is self.run for c in self.callback_handler.callbacks)
        self._ours = [] if present else stage_callbacks(self.run)
        for callback in self._ours:
            self.add_callback(callback)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        if hasattr(self, "_ours"):
            self._attach(model)
        return model

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self.run.stage is not self._stage:
            self._attach(self.model)  # the recipe has moved on to another stage
        if isinstance(resume_from_checkpoint, str):
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, CheckpointCallback):
                    callback.checkpoint = resume_from_checkpoint
        self._terms.clear()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # -- resuming: a checkpoint is input, and what is wrong with it is a CheckpointError or ModelError ----------------
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        require_readable(folder)
        try:
            with stock_errors(folder, RESUMING):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        except ModelError as error:  # its tensors do not fit the model
            raise CheckpointError(str(error)) from error
        self._complete(folder)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._complete(Path(str(self.state.best_model_checkpoint)))

    def _complete(self, folder: Path) -> None:
        """Load what is stored under other names than the model has; in a training stage its callback does so."""
        if self.run.stage is None:
            complete_weights(self.run.model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with stock_errors(checkpoint, RESUMING):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with stock_errors(checkpoint, RESUMING):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with stock_errors(checkpoint, RESUMING):
            super()._load_rng_state(checkpoint)

    def _load_callback_state(self) -> None:
        with stock_errors(self.args.resume_from_checkpoint or self.args.output_dir, RESUMING):
            super()._load_callback_state()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        # When resuming from the final step mid-epoch, Trainer would otherwise run one extra step.
        if 0 < self.state.max_steps <= self.state.global_step:
            return [], None
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._weights = self._weigh(batches) if batches and self._steps("training_loss") else []
        return batches, items

    # -- the loss -------------------------------------------------------------------------------------------------
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        steps = self._steps("training_loss") if model.training else []
        if not steps:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)  # label smoothing takes the labels out
        weights = self._weights.pop(0) if self._weights else self._weigh([given], alone=True)[0]
        loss, outputs = self._task_loss(model, inputs, num_items_in_batch)
        with self.accelerator.autocast():
            found = [
                (position, self.run.call_on([step], "training_loss", model=model, inputs=given, outputs=outputs))
                for position, step in enumerate(steps)
            ]
        if self.compute_loss_func is None:
            loss = weighted(loss.mean(), weights[TASK_KEY])  # a DataParallel has a loss for each of its devices
        self._note("task_loss", loss)
        for _, terms in found:
            for each in terms:
                loss = loss * each.get(TASK_SCALE, 1.0)
        for name, key, term in _named(found):
            term = weighted(torch.as_tensor(term, device=loss.device), weights.get(key, weights[OTHER_KEY]))
            self._note(name, term)
            loss = loss + term
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise OptimError(
                f"a batch of {', '.join(given)} gives no loss: it has no labels, and no step added a loss term"
            )
        if not compat.loss_is_scaled(self, num_items_in_batch):
            loss = loss * compat.accumulation_steps(self)  # training_step divides by it
        return (loss, outputs) if return_outputs else loss

    def _task_loss(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> tuple[torch.Tensor, Any]:
        """Compute the task loss as a mean over this batch; zero for a batch without labels, which has only terms.

        The loss of ``compute_loss_func`` is returned as it is: it is a share of the whole accumulated batch.
        """
        if self.compute_loss_func is not None:
            given: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
            return given
        if any(name in inputs for name in self.label_names):
            # Some heads divide by this number and others do not: with the batch's own items both return a mean. At
            # least one, since 0 / 0 would be NaN for a batch without items.
            own = None if self.args.n_gpu > 1 else self._own_items(inputs)
            loss, outputs = super().compute_loss(model, inputs, True, own)
            return loss / compat.task_loss_factor(self, own), outputs
        outputs = model(**inputs)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        return (torch.zeros((), device=self.args.device) if loss is None else loss), outputs

    def _own_items(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        if not isinstance(inputs.get("labels"), torch.Tensor) or is_summed(self.run.model):
            return None
        return torch.as_tensor(count_task_items(self, inputs), device=self.args.device).clamp(min=1)

    def _weigh(self, batches: list[Any], alone: bool = False) -> list[dict[Key, torch.Tensor]]:
        """Return the weights of the loss terms of each batch of a step; a batch ``alone`` is a whole step."""
        steps = self._steps("training_loss")
        ranks = self.accelerator.num_processes
        together = self.args.average_tokens_across_devices and ranks > 1 and not alone
        whole = len(batches) == 1 and not together
        counts = [
            count_items([step.loss_items(self.run, batch) for step in steps], count_task_items(self, batch), whole)
            for batch in batches
        ]
        weights = step_weights(counts, self.args.device, self.accelerator.gather if together else None, ranks)
        if is_summed(self.run.model):
            for each in weights:
                each[TASK_KEY] = torch.full_like(each[TASK_KEY], ranks if together else 1)
        return weights

    def _steps(self, hook: str) -> list[Technique]:
        stage = self.run.stage
        return [step for step in stage.steps if step.implements(hook)] if stage is not None else []

    # -- the log --------------------------------------------------------------------------------------------------
    def _note(self, name: str, value: torch.Tensor) -> None:
        # Summed on the device: reading a value would make every step wait.
        value = value.detach().float().mean()
        if not self._terms:
            self._terms_since = self.state.global_step
        self._terms[name] = self._terms[name] + value if name in self._terms else value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._terms:
            steps = max(1, self.state.global_step - self._terms_since)
            for name, total in self._terms.items():
                logs.setdefault(name, self.accelerator.gather(total.reshape(1)).mean().item() / steps)
            self._terms.clear()
        super().log(logs, start_time)

    # -- the optimizer --------------------------------------------------------------------------------------------
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        # After a first training it is wrapped by accelerate.
        given = getattr(self.optimizer, "optimizer", self.optimizer)
        groups = [] if given is not None and given is self._grouped else self._claimed_groups(model or self.model)
        if given is not None and groups:
            raise OptimError(
                f"{self.run.label(groups[0][0])} sets its own optimizer groups: leave `optimizers=` out, and choose "
                "the optimizer with TrainingArguments(optim=...) or optimizer_cls_and_kwargs"
            )
        optimizer: Any = super().create_optimizer() if model is None else super().create_optimizer(model)
        if not groups:
            return optimizer
        claimed = {id(p) for _, group in groups for p in group["params"]}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in claimed]
        for _, group in groups:
            optimizer.add_param_group(group)
        own = {id(p) for p in self.run.model.parameters()}
        self._auxiliary.parameters = [p for _, group in groups for p in group["params"] if id(p) not in own]
        self._grouped = optimizer
        return optimizer

    def _claimed_groups(self, model: Any) -> list[tuple[Technique, dict[str, Any]]]:
        """Return the groups of the steps, each split by weight decay unless it sets its own."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed = set(self.get_decay_parameter_names(model))
        owners: dict[int, Technique] = {}
        groups = []
        for step in self._steps("parameter_groups"):
            for asked in self.run.call_on([step], "parameter_groups", model=model):
                for group in asked:
                    parameters = list(group["params"])
                    for parameter in parameters:
                        self._claim(owners, step, parameter, names)
                    groups += [
                        (step, part) for part in _split(group, parameters, names, decayed, self.args.weight_decay)
                    ]
        return groups

    def _claim(
        self, owners: dict[int, Technique], step: Technique, parameter: nn.Parameter, names: Mapping[int, str]
    ) -> None:
        if id(parameter) not in names and collectives.world_size() > 1:
            raise OptimError(
                f"{self.run.label(step)} trains a parameter that is not part of the model: every rank would train its "
                "own; use one rank"
            )
        owner = owners.setdefault(id(parameter), step)
        if owner is not step:
            raise RecipeError(
                f"{self.run.label(owner)} and {self.run.label(step)} both claim the parameter "
                f"{names.get(id(parameter), 'of their own')}; leave one of them out"
            )


class _AuxiliaryParametersCallback(TrainerCallback):
    """Clears the gradients of auxiliary parameters that steps train: a Trainer clears only those of the model."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _split(
    group: Mapping[str, Any], parameters: list[nn.Parameter], names: Mapping[int, str], decayed: set[str], decay: float
) -> Iterator[dict[str, Any]]:
    if "weight_decay" in group:
        yield {**group, "params": parameters}
        return
    for wanted, weight_decay in ((True, decay), (False, 0.0)):
        part = [p for p in parameters if (names.get(id(p)) in decayed) is wanted]
        if part:
            yield {**group, "params": part, "weight_decay": weight_decay}


def _named(found: list[tuple[int, list[Mapping[str, Any]]]]) -> Iterator[tuple[str, Key, Any]]:
    """Yield name, key and value of the terms of all steps; a name used twice is numbered, so that the log differs."""
    seen: dict[str, int] = {}
    for position, several in found:
        for name, term in (item for terms in several for item in terms.items()):
            if name != TASK_SCALE:
                seen[name] = seen.get(name, 0) + 1
                yield (name if seen[name] == 1 else f"{name}_{seen[name]}"), (position, name), term
