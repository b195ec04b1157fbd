"""Recompute the numbers on the record of a finished step, from what it left behind.

``Technique.recompute(case)`` returns every number that the step reports, computed from a ``Case``: the model before the
recipe, the checkpoint as it lies on disk, and forwards with hooks. It must not read what the step reported.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoints.dense import convert_to_dense
from ..runs.run import Run
from ..toolkit import topology

# Numbers of a record are rounded to six digits, and sums in float32 depend on their order.
RELATIVE, ABSOLUTE = 1e-3, 2e-6


class Case:
    """A finished run on a small model, and the checkpoint that it wrote.

    Attributes:
        before: the model before the recipe, float.
        batches: the calibration batches, mappings of the forward's arguments.
        folder: the checkpoint.
        names: the modules that the step worked on (``Run.cover``), sorted.
        run: the finished run.
    """

    def __init__(
        self,
        before: PreTrainedModel,
        run: Run,
        step: Any,
        folder: Path,
        auto_class: str,
        batches: Iterable[Mapping[str, Tensor]],
    ) -> None:
        self.before, self.run, self.step, self.folder = before, run, step, folder
        self.batches = [dict(batch) for batch in batches]
        self.names = sorted((run.covered(step) or (set(), {}))[0])
        self._auto_class = auto_class

    # -- the checkpoint -----------------------------------------------------------------------------------------------
    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the checkpoint, by the names under which they are stored."""
        return {k: v for path in sorted(self.folder.glob("*.safetensors")) for k, v in load_file(path).items()}

    @cached_property
    def stored(self) -> PreTrainedModel:
        """The checkpoint as transformers loads it."""
        auto = getattr(transformers, self._auto_class)
        return auto.from_pretrained(self.folder, trust_remote_code=True).eval()

    @cached_property
    def after(self) -> PreTrainedModel:
        """The checkpoint with decoded weights: an ordinary model."""
        model = copy.deepcopy(self.stored)
        with torch.no_grad():
            model(**self.batches[0])  # transformers decodes in the first forward
        convert_to_dense(model)
        return model

    def bits(self) -> dict[str, int]:
        """Return the bits of the weight of every layer whose scheme in ``config.json`` quantizes weights."""
        schemes = ((n, getattr(m, "quantization_scheme", None)) for n, m in self.stored.named_modules())
        return {n: s.weights.num_bits for n, s in schemes if s is not None and s.weights is not None}

    def bytes_of(self, name: str) -> int:
        """Return the bytes of the codes and scales of a layer in the checkpoint."""
        own = (v for k, v in self.tensors.items() if k.startswith(f"{name}.") and not k.endswith((".bias", "_shape")))
        return sum(v.numel() * v.element_size() for v in own)

    # -- weights ------------------------------------------------------------------------------------------------------
    def weight(self, model: nn.Module, name: str) -> Tensor:
        """Return the weight of a linear layer or of a matrix of an expert, float64 ``[out, in]``."""
        views = topology.expert_linears(model)
        module: Any = views[name] if name in views else model.get_submodule(name)
        weight = module.weight if name in views or not topology.is_linear(module) else topology.weight_out_in(module)
        return weight.detach().double()

    def zeros(self) -> dict[str, Any]:
        """Return what ``sparsity.metrics`` has for the layers in ``names``."""
        weights = {name: self.weight(self.after, name) for name in self.names}
        zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
        experts = len(topology.expert_linears(self.after).keys() & weights.keys())
        return {
            **({"expert_matrices": experts, "linear_layers": len(weights) - experts} if experts else {}),
            "sparsity": sum(zeros.values()) / sum(weight.numel() for weight in weights.values()),
            "layers": {name: zeros[name] / weight.numel() for name, weight in weights.items()},
            "counted": {name: [weight.numel(), zeros[name]] for name, weight in weights.items()},
        }

    def pattern(self, keep: int, group: int) -> str:
        """Return ``"N:M"`` with the most weights in any group of ``group`` inputs, over the layers in ``names``."""
        weights = (self.weight(self.after, name) for name in self.names)
        most = max(int((weight.reshape(len(weight), -1, group) != 0).sum(-1).max()) for weight in weights)
        return f"{max(most, keep)}:{group}"

    # -- forwards -----------------------------------------------------------------------------------------------------
    def inputs(self, model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the inputs of modules over all batches, float64 ``[rows, features]``."""
        seen: dict[str, list[Tensor]] = {name: [] for name in names}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, args: seen[name].append(args[0].detach().reshape(-1, args[0].shape[-1]).double())

        with hooks({model.get_submodule(name): keep(name) for name in seen}):
            self.outputs(model)
        return {name: torch.cat(rows) for name, rows in seen.items()}

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Return the logits of every batch, or the first output of a model without logits."""
        found = [model(**batch) for batch in self.batches]
        return [out.logits if "logits" in out else out[0] for out in found]

    def sequential(self) -> Iterator[tuple[Any, PreTrainedModel]]:
        """Yield every block with the model in which the blocks before it are those of the checkpoint.

        So the inputs of that block are those on which a blockwise step has calibrated it.
        """
        mixed = copy.deepcopy(self.before)
        for block in topology.blocks(self.before):
            yield block, mixed
            mixed.get_submodule(block.name).load_state_dict(self.after.get_submodule(block.name).state_dict())


@contextmanager
def hooks(observers: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Register forward pre-hooks for the length of a ``with`` block."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in observers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def differences(reported: Any, found: Any, where: str = "") -> list[str]:
    """Compare an entry of a record with the recomputed numbers; return what differs, is missing or is left over.

    Texts need no counterpart, unless they were computed too; every number does.
    """
    if isinstance(reported, Mapping):
        known = found if isinstance(found, Mapping) else {}
        missing = [
            f"{where}.{key}: {value!r}, which the record lacks" for key, value in known.items() if key not in reported
        ]
        parts = [differences(value, known.get(key), f"{where}.{key}") for key, value in reported.items()]
        return missing + [line for part in parts for line in part]
    if isinstance(reported, (list, tuple)):
        if found is None and not any(map(_has_numbers, reported)):
            return []
        if not isinstance(found, (list, tuple)) or len(found) != len(reported):
            return [f"{where}: {reported!r} in the record, {found!r} recomputed"]
        pairs = enumerate(zip(reported, found, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}[{i}]")]
    if found is None and (reported is None or isinstance(reported, str)):
        return []
    if found is None:
        return [f"{where}: {reported!r} in the record, which nothing recomputes"]
    return [] if _same(reported, found) else [f"{where}: {reported!r} in the record, {found!r} recomputed"]


def _has_numbers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_numbers, value))
    return (isinstance(value, Mapping) and bool(value)) or isinstance(value, (int, float))


def _same(reported: Any, found: Any) -> bool:
    if isinstance(reported, float) and isinstance(found, (int, float)):
        return math.isclose(reported, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return type(reported) is type(found) and reported == found
