"""The memory that one training step takes, from a forward and backward pass on fake tensors.

Fake tensors have shapes but no values: nothing is computed, no memory is taken, and weights need not be loaded. Every
storage that an operation makes counts until it is freed, as on a device, so that what autograd keeps, the gradients and
the logits in float32 are all in the figure, for any architecture. What an allocator adds to it is not.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data.tasks import task_of_model
from ..toolkit import topology
from ..toolkit.topology.fake_model import copy_with_tensors
from ..toolkit.topology.tracing import silent_fakes

log = logging.getLogger(__name__)

# For models whose forward cannot run on fake tensors: bytes for each token, block and unit of hidden size that a block
# keeps for its backward in 16 bits (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer
# Models", 2205.05198, equation 2, without the attention matrix); twice that in 32 bits.
KEPT_BYTES = 34


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step, beside those of weights and optimizer.

    Attributes:
        peak: the largest sum of activations and gradients at one time.
        gradients: of all parameters that are trained, at the end of the backward pass.
        exact: False if the forward could not run on fake tensors, so that ``peak`` follows from the configuration.
    """

    peak: int
    gradients: int
    exact: bool = True


def measure_step(
    model: Any,
    batch_size: int,
    tokens: int,
    *,
    batches: int = 1,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
    teacher: Any = None,
) -> StepMemory:
    """Return what a training step takes, from a forward and backward pass on fake tensors.

    Args:
        model: a ``PreTrainedModel``; its weights may be on the meta device.
        batch_size: rows of a batch.
        tokens: tokens of a row; images have the size in the configuration.
        batches: batches whose gradients are added up for a step.
        checkpointing: gradient checkpointing.
        autocast: the dtype of mixed precision; None for none.
        teacher: a model whose logits are compared with those of ``model``; None for none.
    """
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.is_floating_point())
    if topology.has_experts(model):  # which expert gets which token depends on values
        return StepMemory(_from_config(model, batch_size * tokens, checkpointing) + gradients, gradients, exact=False)
    try:
        with torch.random.fork_rng(devices=[]), silent_fakes():
            peak = _peak(model, batch_size, tokens, min(batches, 2), checkpointing, autocast, teacher)
        return StepMemory(peak, gradients)
    except Exception as error:  # the forward of any model
        log.debug("the memory of a step of %s is estimated from its configuration: %s", type(model).__name__, error)
        return StepMemory(_from_config(model, batch_size * tokens, checkpointing) + gradients, gradients, exact=False)


def _peak(
    model: Any,
    batch_size: int,
    tokens: int,
    batches: int,
    checkpointing: bool,
    autocast: torch.dtype | None,
    teacher: Any,
) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True):
        student = _fake_copy(model).train()
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in student.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        guide = _fake_copy(teacher) if teacher is not None else None
        inputs = _inputs(model, batch_size, tokens)
        weights = [*student.parameters(), *student.buffers(), *(guide.parameters() if guide is not None else ())]
        with _LiveBytes(weights) as live:
            for _ in range(batches):
                _step(student, guide, inputs, autocast)
        return live.peak


def _step(student: Any, guide: Any, inputs: Mapping[str, Tensor], autocast: torch.dtype | None) -> None:
    precision: Any = torch.autocast("cpu", autocast) if autocast is not None else contextlib.nullcontext()
    with precision:
        outputs = student(**inputs)
        kept = None
        if guide is not None:
            with torch.no_grad():
                kept = guide(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = outputs.loss if getattr(outputs, "loss", None) is not None else _any_loss(outputs)
        if kept is not None and isinstance(getattr(outputs, "logits", None), Tensor):
            loss = loss + _any_loss(outputs)
    del outputs
    loss.backward()
    del kept


def _any_loss(outputs: Any) -> Tensor:
    """Return a loss of the main output, for a model without labels or beside its own."""
    main = getattr(outputs, "logits", None)
    main = main if isinstance(main, Tensor) else next(t for t in tree_leaves(tuple(outputs.values())) if t is not None)
    return main.float().mean()


def _fake_copy(model: nn.Module) -> Any:
    """Return a copy of a model in its own dtypes, on the fake tensors of the current mode."""
    settings = {"use_cache": False, "return_dict": True}
    return copy_with_tensors(model, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"), settings)


def _inputs(model: Any, batch_size: int, tokens: int) -> dict[str, Tensor]:
    """Return inputs of the model with labels for its task, in the shapes of a training batch."""
    made: dict[str, Tensor] = {}
    for name, value in topology.dummy_inputs(model).items():
        shape = list(value.shape)
        if name in ("input_ids", "decoder_input_ids"):
            shape[-1] = tokens
        shape[0] *= batch_size
        made[name] = torch.zeros(shape, dtype=value.dtype)
    task = task_of_model(model).tag
    if task in ("text-generation", "image-text-to-text", "fill-mask"):
        made["labels"] = torch.zeros_like(made["input_ids"])
    elif "decoder_input_ids" in made:
        made["labels"] = made.pop("decoder_input_ids")
    elif task in ("text-classification", "image-classification"):
        made["labels"] = torch.zeros(batch_size, dtype=torch.long)
    return made


def _from_config(model: Any, tokens: int, checkpointing: bool) -> int:
    """Return the bytes of activations by the formula of ``KEPT_BYTES``, and of the logits with their gradient."""
    config = model.config.get_text_config()
    hidden, layers = (int(getattr(config, name, 0) or 0) for name in ("hidden_size", "num_hidden_layers"))
    width = max((p.element_size() for p in model.parameters()), default=4)
    kept = KEPT_BYTES * width // 2 * hidden * tokens
    blocks = kept + layers * width * hidden * tokens if checkpointing else layers * kept
    return blocks + 3 * 4 * tokens * int(getattr(config, "vocab_size", 0) or 0)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make and that are still referenced.

    Attributes:
        peak: the largest count so far.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}
        for tensor in known:  # views of weights have their storage
            self._sizes[tensor.untyped_storage()._cdata] = 0
        self._kept = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self._now += self._sizes[key]
                weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self._now)
        return result

    def _free(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)


def _tensors(result: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
