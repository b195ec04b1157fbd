"""Trainings for ``vmoe.py``, side by side: on a GPU each step is one CUDA graph, on a stream of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from cifar import Schedule
from torch import Tensor


class Training:
    """The training of a model: ``step`` is everything from drawing a batch to the update of the weights."""

    def __init__(self, model: Any, data: tuple[Tensor, Tensor], schedule: Schedule, rate: float) -> None:
        self.model, self.images, self.labels = model.to(data[0].device).train(), *data
        self.schedule, self.steps, self.rate = schedule, len(schedule.images), rate
        device, on_gpu = data[0].device, data[0].is_cuda
        self.done = torch.zeros(1, dtype=torch.int64, device=device)
        self.lr = torch.tensor(rate, device=device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.lr if on_gpu else rate, weight_decay=0.05, fused=True, capturable=on_gpu
        )
        self.stream = torch.cuda.Stream() if on_gpu else None
        self.graph: Any = None

    def step(self) -> None:
        """Train on one batch. On a device nothing in it waits for the host."""
        warm = self.steps // 20 + 1
        falling = 0.5 + 0.5 * torch.cos(math.pi * (self.done - warm).clamp(min=0) / (self.steps - warm))
        self.lr.copy_((self.rate * torch.minimum((self.done + 1) / warm, falling)).squeeze(0))
        if self.stream is None:
            self.optimizer.param_groups[0]["lr"] = float(self.lr)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, self.images.is_cuda, cache_enabled=False):
            chosen, inputs = self.schedule.at(self.done, self.images)
            loss = self.model(pixel_values=inputs, labels=self.labels[chosen]).loss
        loss.backward()
        self.optimizer.step()
        self.done += 1

    def capture(self) -> None:
        """Capture ``step`` as one graph, after three steps that set everything up."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.step()

    @torch.no_grad()
    def restart(self, model: Any) -> None:
        """Begin again, in place, with the weights of another model, and the settings of its mixtures."""
        for mine, other in zip(self.model.modules(), model.modules(), strict=True):
            if hasattr(mine, "settings"):
                mine.settings.update(other.settings)
        held = self.model.state_dict()
        for name, value in model.state_dict().items():
            held[name].copy_(value)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.done.zero_()
        self.model.train()

    def advance(self) -> None:
        """Run one step, on the stream of the training if it has one."""
        if self.graph is None:
            self.step()
            return
        with torch.cuda.stream(self.stream):
            self.graph.replay()


def train_all(trainings: list[Training]) -> None:
    """Run trainings of equally many steps side by side."""
    on_gpu = trainings[0].stream is not None
    if on_gpu:
        torch.cuda.synchronize()
    for _ in range(trainings[0].steps):
        for one in trainings:
            one.advance()
    if on_gpu:
        torch.cuda.synchronize()
    for one in trainings:
        one.model.eval()


def start(runs: list[Training], models: list[Any]) -> None:
    """Let trainings begin with the weights of models; on a device their steps are captured first."""
    for run in runs:
        if run.stream is not None and run.graph is None:
            run.capture()
    for run, model in zip(runs, models, strict=True):
        run.restart(model)
