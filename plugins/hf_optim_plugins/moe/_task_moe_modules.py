"""Mixtures of experts in a T5 that route by the task of a sequence, or by token, and the base of models that have some.

This file is stored with checkpoints, so it imports only torch and transformers. With E experts, of which k are chosen::

    by task     g = softmax(v_task)     v_task: a row of E learned numbers for each task, in each layer
    by token    g = softmax(W x)
    y = sum over the k largest g_e of  g_e FFN_e(x),     with ``normalize``: g_e / (sum of the k chosen)

By task all tokens of a sequence have the same experts with the same gates, so the layers of one task are dense.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from hf_optim.toolkit.modules import MixturesInDense, grouped_where_it_fits, read_own_loss, watch_own_loss


def is_known(values: Tensor) -> bool:
    """Return True if the values of a tensor can be read: it is not traced, and neither fake nor on the meta device."""
    return not torch.compiler.is_compiling() and type(values) is Tensor and not values.is_meta


class ExpertStack(nn.Module):
    """Base of E feed-forward layers without biases, in the layout of transformers' interface for experts.

    ``up_proj`` ``[E, F, d]``, or ``gate_up_proj`` ``[E, 2F, d]`` with a gate, and ``down_proj`` ``[E, d, F]``.
    """

    up_name = "up_proj"

    def __init__(self, config: Any, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.act_fn = ACT2FN[config.dense_act_fn]
        rows = inner if self.up_name == "up_proj" else 2 * inner
        up = nn.Parameter(torch.empty(experts, rows, hidden))
        self.register_parameter(self.up_name, up)
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        nn.init.normal_(up, std=hidden**-0.5)
        nn.init.normal_(self.down_proj, std=inner**-0.5)

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return ``[T, d]`` for tokens ``[T, d]``, their experts int64 ``[T, k]`` and gates ``[T, k]``."""
        own: Any = self
        up, result = self.get_parameter(self.up_name), torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            chosen = top_k_index == expert
            gates = (top_k_weights * chosen).sum(1, keepdim=True)
            # In a traced graph the number of its tokens is unknown, and all are computed.
            rows = chosen.any(1).nonzero().flatten() if is_known(top_k_index) else torch.arange(len(hidden))
            inner = linear(hidden[rows], up[expert])
            inner = self.act_fn(inner) if self.up_name == "up_proj" else own._apply_gate(inner)
            part = linear(inner, self.down_proj[expert]) * gates[rows]
            result = result.index_add(0, rows.to(result.device), part.to(result.dtype))
        return result


@grouped_where_it_fits
@use_experts_implementation(has_gate=False)
class PlainExperts(ExpertStack):
    """Experts of two matrices with an activation between them."""


@grouped_where_it_fits
@use_experts_implementation
class GatedExperts(ExpertStack):
    """Experts whose inner activations are ``act(gate) * up``."""

    up_name = "gate_up_proj"


def balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """Return E times the sum over experts of their share of choices and their mean probability; 1 at balance.

    probabilities: ``[T, E]``; chosen: int64 ``[T, k]``.
    """
    experts = probabilities.shape[-1]
    shares = nn.functional.one_hot(chosen, experts).to(probabilities).mean((0, 1))
    return experts * (shares * probabilities.mean(0)).sum()


class TaskMixture(nn.Module):
    """A mixture of experts in place of the feed-forward part of a T5 layer.

    Attributes:
        task_ids: int64 ``[B]``, the tasks of the sequences of the current batch.
        real: bool ``[B, N]``, False for padding; None if unknown. Only the balance loss of routing by token reads it.
        loss: the balance loss of the last forward in training, or None.
    """

    task_ids: Tensor | None
    real: Tensor | None
    loss: Tensor | None

    def __init__(self, config: Any, settings: dict[str, Any], hidden: int, inner: int) -> None:
        super().__init__()
        experts, top_k = settings["experts"], settings["top_k"]
        if not (isinstance(experts, int) and isinstance(top_k, int) and 1 <= top_k <= experts < 2**31):
            raise ValueError(f"top_k must be from 1 to the number of experts: top_k {top_k}, experts {experts}")
        self.settings = settings
        self.by_task = settings["routing"] == "task"
        if self.by_task:
            self.task_logits = nn.Parameter(torch.zeros(len(settings["tasks"]), experts))
        else:
            self.router = nn.Linear(hidden, experts, bias=False)
            nn.init.normal_(self.router.weight, std=0.02)
        kind = GatedExperts if settings["gated"] else PlainExperts
        self.experts = kind(config, experts, hidden, inner)
        self.task_ids = self.real = self.loss = None

    def gates_of(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gates ``[T, k]``, the experts int64 ``[T, k]`` and the probabilities ``[T, E]`` for logits."""
        probabilities = (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)
        gates, chosen = probabilities.topk(self.settings["top_k"], dim=-1)
        return gates / gates.sum(-1, keepdim=True) if self.settings["normalize"] else gates, chosen, probabilities

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``[B, N, d]`` for ``hidden`` ``[B, N, d]``."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        if self.by_task:
            if self.task_ids is None or len(self.task_ids) != len(hidden):
                found = "none" if self.task_ids is None else len(self.task_ids)
                raise ValueError(f"a batch of {len(hidden)} sequences needs as many task_ids, and there are {found}")
            gates, chosen, _ = self.gates_of(self.task_logits)
            gates, chosen = (
                part[self.task_ids.to(part.device)].repeat_interleave(hidden.shape[1], 0) for part in (gates, chosen)
            )
        else:
            gates, chosen, probabilities = self.gates_of(self.router(tokens))
            if self.training and self.settings["balance_loss"]:
                counted = slice(None) if self.real is None else self.real.reshape(-1).to(hidden.device)
                self.loss = self.settings["balance_loss"] * balance_loss(probabilities[counted], chosen[counted])
        return self.experts(tokens, chosen, gates).view_as(hidden)

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to a batch is neither copied nor pickled.
        return {**self.__dict__, "task_ids": None, "real": None, "loss": None}


def with_tasks(former: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a model that takes ``task_ids`` as well, and adds the balance losses to its loss."""

    @functools.wraps(former)
    def forward(self: Any, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        self.note_batch(task_ids, given)
        outputs = former(self, *args, **kwargs)
        extra = self.router_loss() if self.training and given.get("labels") is not None else None
        if extra is None:
            return outputs
        if isinstance(outputs, tuple):
            return (outputs[0] + extra.to(outputs[0].device), *outputs[1:])
        outputs.loss = outputs.loss + extra.to(outputs.loss.device)
        return outputs

    signature = inspect.signature(former)
    names = list(signature.parameters)[1:]
    added = inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    place = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[*parameters[:place], added, *parameters[place:]])  # type: ignore[attr-defined]
    return forward


def noting_tasks(former: Callable[..., Any]) -> Callable[..., Any]:
    """Return the ``generate`` of a model with mixtures: it runs the encoder without the model's forward."""

    @functools.wraps(former)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.note_batch(kwargs.get("task_ids"), kwargs)
        return former(self, *args, **kwargs)

    return generate


class TaskModel(MixturesInDense):
    """Base of a model class whose feed-forward parts named in ``config.task_moe`` are mixtures.

    ``forward`` and ``generate`` take ``task_ids``, int64 ``[B]``: the number of the task of each sequence in
    ``config.task_moe["tasks"]``. ``task_ids_of`` makes them of names.

    In training the balance losses are part of the loss that the model returns for labels. Where a loss is computed
    outside of the model, ``router_loss`` has to be added to it.
    """

    replaced_field = "task_moe"
    takes_tasks = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        field = getattr(self.config, self.replaced_field, None) or {}  # type: ignore[attr-defined]
        if field.get("routing") == "token" and field.get("balance_loss"):
            watch_own_loss(self, kwargs, "the balance losses of its routers", "model.router_loss()")
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if any(vars(base).get("takes_tasks") for base in cls.__mro__[1:]):
            return  # a subclass, such as that of an offloaded model, inherits or calls that forward
        cls.takes_tasks = True
        cls.forward = with_tasks(cls.forward)  # type: ignore[attr-defined, method-assign]
        if hasattr(cls, "generate"):
            cls.generate = noting_tasks(cls.generate)

    def replacement(self, module: nn.Module, entry: Any, field: dict[str, Any]) -> nn.Module:
        settings = {key: value for key, value in field.items() if key != "modules"}
        return TaskMixture(self.config, settings, entry["hidden"], entry["inner"])  # type: ignore[attr-defined]

    def capacity_problem(self, priority: str) -> str:
        """Return why a capacity does not apply to experts that are chosen by task, or ``""``."""
        if self.config.task_moe["routing"] != "task":  # type: ignore[attr-defined]
            return ""
        return (
            "routes by task: all tokens of a sequence choose the same experts, so a capacity would drop most of them, "
            "and the model that is extracted for one task would compute something else"
        )

    def task_mixtures(self) -> list[TaskMixture]:
        """Return the mixtures of the model."""
        return [module for module in self.modules() if isinstance(module, TaskMixture)]  # type: ignore[attr-defined]

    def router_loss(self) -> Tensor | None:
        """Return the balance losses of the last forward in training, weighted and summed over layers; None without."""
        read_own_loss(self)
        losses = [mixture.loss for mixture in self.task_mixtures() if mixture.loss is not None]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() if losses else None

    def task_ids_of(self, names: list[str]) -> Tensor:
        """Return the numbers of tasks, int64 ``[B]``. Raises ``ValueError`` for a name that the model does not have."""
        tasks = list(self.config.task_moe["tasks"])  # type: ignore[attr-defined]
        if unknown := sorted({str(name) for name in names if name not in tasks}):
            raise ValueError(f"no task {unknown[0][:40]!r}: the model has {', '.join(tasks)}")
        return torch.tensor([tasks.index(name) for name in names], device=self.device)  # type: ignore[attr-defined]

    def note_batch(self, task_ids: Tensor | None, given: dict[str, Any]) -> None:
        """Set the tasks and the padding of a batch on all mixtures.

        Raises ``ValueError`` if the model routes by task, and ``task_ids`` are missing or not numbers of its tasks.
        """
        mixtures = self.task_mixtures()
        if not mixtures:
            return
        if mixtures[0].by_task:
            self._require_tasks(task_ids)
        labels = given.get("labels")
        decoder = given.get("decoder_attention_mask")
        real = {
            "encoder": given.get("attention_mask"),
            "decoder": labels != -100 if decoder is None and labels is not None else decoder,
        }
        for name, module in self.named_modules():  # type: ignore[attr-defined]
            if isinstance(module, TaskMixture):
                mask = real["decoder" if name.partition(".")[0] == "decoder" else "encoder"]
                module.task_ids, module.loss = task_ids, None
                module.real = None if mask is None or mask.dim() != 2 else mask.bool()

    def _require_tasks(self, task_ids: Tensor | None) -> None:
        tasks = list(self.config.task_moe["tasks"])  # type: ignore[attr-defined]
        names = ", ".join(f"{number} ({name})" for number, name in enumerate(tasks))
        if task_ids is None:
            raise ValueError(f"this model routes by task: pass task_ids, int64 [batch], of {names}")
        if task_ids is self.__dict__.get("_checked_task_ids"):
            return  # the steps of generate bring the same tensor
        if task_ids.dim() != 1 or task_ids.is_floating_point():
            raise ValueError(f"task_ids must be int64 [batch], not {task_ids.dtype} {list(task_ids.shape)}")
        if not is_known(task_ids):
            return
        if bool(((task_ids < 0) | (task_ids >= len(tasks))).any()):
            raise ValueError(f"task_ids must be of {names}, not {task_ids.tolist()[:8]}")
        self.__dict__["_checked_task_ids"] = task_ids
