"""Stops a training whose gradients are not finite before they reach the weights, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from ..errors import NumericalError
from ..runs.run import Run
from ..toolkit.distributed import fsdp

# With fp16 a loss scaler skips steps whose gradients overflow, and halves its scale, 65536 at first. That many in a row
# are not its search for the scale.
SKIPPED_STEPS = 25

# Optimizers whose fused step is left out on the device where its ``found_inf`` says so, as loss scalers have it.
SKIP_ON_DEVICE = (torch.optim.Adam, torch.optim.AdamW)


class Verdict(NamedTuple):
    """Whether the gradients of a step are finite, as the device will tell.

    Attributes:
        step: the optimizer step, from 1.
        broken: float32 on the device: 1 where any gradient is not finite, else 0.
        parameters: those that have gradients.
        norms: of the gradients, on the devices they are on.
    """

    step: int
    broken: Tensor
    parameters: list[Tensor]
    norms: list[Tensor]


class NonFiniteCallback(TrainerCallback):
    """Stops training with ``NumericalError`` before gradients that are not finite reach the weights.

    The weights in memory and the last checkpoint stay good. With fp16, single overflows are the loss scaler's business.

    Asking the device at every step would make the host wait for it. A fused optimizer of ``torch.optim`` needs no
    answer: it is told on the device to leave out a step that is broken, and the host asks one step later, when the
    answer is there; or at once where a checkpoint, an evaluation or the end comes next. Weights, running means and
    step counts are then those before the broken step. Of any other optimizer the step waits.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._skipped = 0
        self._open: Verdict | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._skipped, self._open = 0, None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._settle()
        optimizer = kwargs.get("optimizer")
        verdict = judge(_parameters(kwargs["model"], optimizer), state.global_step + 1)
        if verdict is None:
            return
        fused = None if args.fp16 else skips_on_device(optimizer, verdict.broken)
        if fused is not None:
            fused.found_inf = verdict.broken
            self._open = verdict
        elif not bool(verdict.broken):
            self._skipped = 0
        else:
            self._skipped += 1
            if not args.fp16 or self._skipped >= SKIPPED_STEPS:
                self._stop(verdict)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        inner: Any = getattr(kwargs.get("optimizer"), "optimizer", kwargs.get("optimizer"))
        if self._open is not None and vars(inner).get("found_inf") is self._open.broken:
            del inner.found_inf

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save or control.should_evaluate or control.should_training_stop:
            self._settle()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._settle()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._settle()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._settle()

    def _settle(self) -> None:
        """Ask the device about the step before, if it was not asked yet."""
        verdict, self._open = self._open, None
        if verdict is not None and bool(verdict.broken):
            self._stop(verdict)

    def _stop(self, verdict: Verdict) -> None:
        names = {id(parameter): name for name, parameter in self.run.model.named_parameters()}
        pairs = zip(verdict.parameters, verdict.norms, strict=True)
        broken = (names.get(id(p), "a parameter of a step") for p, norm in pairs if not bool(torch.isfinite(norm)))
        raise NumericalError(
            f"training stage {self.run.stage}: the loss or its gradient became NaN or infinite in step "
            f"{verdict.step} (first in {next(broken, 'the norm of all gradients')}). The weights "
            "were not updated with it and earlier checkpoints stand; lower the learning rate, warm up, or train in "
            "bf16 or fp32"
        )


def _parameters(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """What is being trained: also what a step of the recipe trains beside the model."""
    groups = getattr(optimizer, "param_groups", None)
    return list(model.parameters()) if groups is None else [p for group in groups for p in group["params"]]


@torch.no_grad()
def judge(parameters: Iterable[Tensor], step: int) -> Verdict | None:
    """The verdict on gradients, without waiting for the device; None where there are none."""
    found = [(p, p.grad) for p in parameters if p.grad is not None]
    if not found:
        return None
    norms = _norms([fsdp.local_shard(gradient) for _, gradient in found])
    total = torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).norm()
    broken = (~torch.isfinite(total)).float()
    if any(fsdp.is_sharded(gradient) for _, gradient in found):
        dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    return Verdict(step, broken, [p for p, _ in found], norms)


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """The norm of each tensor, in few launches for each device and type."""
    norms: dict[int, Tensor] = {}
    groups: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(place)
    for places in groups.values():
        norms |= dict(zip(places, torch._foreach_norm([tensors[i] for i in places]), strict=True))
    return [norms[place] for place in range(len(tensors))]


def skips_on_device(optimizer: Any, broken: Tensor) -> Any:
    """The optimizer inside wrappers, if its fused step looks at ``found_inf`` where ``broken`` is; else None."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if type(inner) not in SKIP_ON_DEVICE or not all(group.get("fused") for group in inner.param_groups):
        return None
    owned = (p for group in inner.param_groups for p in group["params"])
    return inner if all(p.device == broken.device and not fsdp.is_sharded(p) for p in owned) else None
