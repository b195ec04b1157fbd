"""Stop training before non-finite gradients reach the weights, without waiting for the device."""

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

# With fp16 a loss scaler skips steps whose gradients overflow, and halves its scale, 65536 at first. So many skipped
# steps in a row are more than its search for the scale.
SKIPPED_STEPS = 25

# Optimizers whose fused step is skipped on the device if its ``found_inf`` is set, as loss scalers do.
SKIP_ON_DEVICE = (torch.optim.Adam, torch.optim.AdamW)


class GradientCheck(NamedTuple):
    """A non-finite check whose result stays on the device.

    Attributes:
        step: the optimizer step, from 1.
        nonfinite: float32 on the device: 1 if any gradient is not finite, else 0.
        parameters: the parameters that have gradients.
        norms: the norms of the gradients, on their devices.
    """

    step: int
    nonfinite: Tensor
    parameters: list[Tensor]
    norms: list[Tensor]


class NonFiniteCallback(TrainerCallback):
    """Stops training with ``NumericalError`` before non-finite gradients reach the weights.

    The weights in memory and the last checkpoint stay good. With fp16, single overflows are left to the loss scaler.

    Reading the result at every step would make the host wait for the device. A fused optimizer of ``torch.optim`` skips
    a non-finite step on the device, and the host reads the result one step later, when it is available; or at once
    before a checkpoint, an evaluation or the end. Weights, running means and step counts are then those before the
    skipped step. For any other optimizer the step waits for the result.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._skipped = 0
        self._open: GradientCheck | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._skipped, self._open = 0, None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._read_open_check()
        optimizer = kwargs.get("optimizer")
        check = check_gradients(_parameters(kwargs["model"], optimizer), state.global_step + 1)
        if check is None:
            return
        fused = None if args.fp16 else skips_on_device(optimizer, check.nonfinite)
        if fused is not None:
            fused.found_inf = check.nonfinite
            self._open = check
        elif not bool(check.nonfinite):
            self._skipped = 0
        else:
            self._skipped += 1
            if not args.fp16 or self._skipped >= SKIPPED_STEPS:
                self._stop(check)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        inner: Any = getattr(kwargs.get("optimizer"), "optimizer", kwargs.get("optimizer"))
        if self._open is not None and vars(inner).get("found_inf") is self._open.nonfinite:
            del inner.found_inf

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save or control.should_evaluate or control.should_training_stop:
            self._read_open_check()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._read_open_check()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._read_open_check()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._read_open_check()

    def _read_open_check(self) -> None:
        """Read the check of the previous step, if it has not been read."""
        check, self._open = self._open, None
        if check is not None and bool(check.nonfinite):
            self._stop(check)

    def _stop(self, check: GradientCheck) -> None:
        names = {id(parameter): name for name, parameter in self.run.model.named_parameters()}
        pairs = zip(check.parameters, check.norms, strict=True)
        found = (names.get(id(p), "a parameter of a step") for p, norm in pairs if not bool(torch.isfinite(norm)))
        raise NumericalError(
            f"training stage {self.run.stage}: the loss or its gradient became NaN or infinite in step "
            f"{check.step} (first in {next(found, 'the norm of all gradients')}). The weights "
            "were not updated with it and earlier checkpoints stand; lower the learning rate, warm up, or train in "
            "bf16 or fp32"
        )


def _parameters(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """Return all trained parameters, including auxiliary ones that a step of the recipe trains."""
    groups = getattr(optimizer, "param_groups", None)
    return list(model.parameters()) if groups is None else [p for group in groups for p in group["params"]]


@torch.no_grad()
def check_gradients(parameters: Iterable[Tensor], step: int) -> GradientCheck | None:
    """Check gradients without waiting for the device; None if there are none."""
    found = [(p, p.grad) for p in parameters if p.grad is not None]
    if not found:
        return None
    norms = _norms([fsdp.local_shard(gradient) for _, gradient in found])
    total = torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).norm()
    nonfinite = (~torch.isfinite(total)).float()
    if any(fsdp.is_sharded(gradient) for _, gradient in found):
        dist.all_reduce(nonfinite, op=dist.ReduceOp.MAX)
    return GradientCheck(step, nonfinite, [p for p, _ in found], norms)


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """Compute the norm of each tensor, in few launches per device and dtype."""
    norms: dict[int, Tensor] = {}
    groups: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(place)
    for places in groups.values():
        norms |= dict(zip(places, torch._foreach_norm([tensors[i] for i in places]), strict=True))
    return [norms[place] for place in range(len(tensors))]


def skips_on_device(optimizer: Any, nonfinite: Tensor) -> Any:
    """Return the inner optimizer if its fused step reads ``found_inf`` on the device of ``nonfinite``, else None."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if type(inner) not in SKIP_ON_DEVICE or not all(group.get("fused") for group in inner.param_groups):
        return None
    owned = (p for group in inner.param_groups for p in group["params"])
    return inner if all(p.device == nonfinite.device and not fsdp.is_sharded(p) for p in owned) else None
