"""Time several models in turn, in one process: ``python -m hf_optim.cli.jobs.timed_models JSON``.

``hf-optim compress --eval`` starts it, so that the models load the way a user loads them, and nothing of the
compression is in the way. Its argument is a list of ``Candidate`` (``request``); it prints ``{"times": {name: metrics},
"timing": {conditions}}``, and for candidates on kernels ``kernels`` and ``kernel_layers`` among their metrics.
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...checkpoints.source import ModelSource, load_model, resolve_device
from ...compressed.packed.layer_report import report
from ...errors import MAX_MESSAGE, OptimError, printable
from ...evaluation.comparison import CAPACITY
from ...evaluation.latency import Workload, time_models, workload_of
from ...evaluation.sizes import parameter_bytes
from ...evaluation.timings import Timing, host_load
from ...runs.memory import free_memory
from ...toolkit.checkpoint.model_config import model_class
from ...toolkit.experts import expert_load, routing_of

# What loading and running a model takes besides its weights, as a share of them.
MARGIN = 0.25


@dataclass(frozen=True)
class Candidate:
    """A model to be timed.

    Attributes:
        name: of its measurement in the record: ``before``, ``after`` or ``accelerated``.
        model, revision, dtype, trust_remote_code: see ``ModelSource``.
        kernels: run it on hf_optim's kernels.
    """

    name: str
    model: str
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    kernels: bool = False

    def load(self, device: torch.device) -> Any:
        """Return the model on the device, in evaluation mode."""
        source = ModelSource(self.model, self.revision, self.dtype, self.trust_remote_code)
        return load_on_kernels(source, device) if self.kernels else load_model(source).to(device)


def load_on_kernels(source: ModelSource, device: torch.device) -> Any:
    """Return the model as ``from_pretrained(..., optim_config="auto")`` loads it, in evaluation mode."""
    dtype = source.dtype if source.dtype == "auto" else getattr(torch, source.dtype)
    # A layer is packed for the device that it is loaded to.
    place = {"device_map": {"": str(device)}} if device.type != "cpu" else {}
    load: Any = model_class(source.config).from_pretrained
    model = load(source.model, optim_config="auto", dtype=dtype, **source.load_kwargs, **place)
    return model.eval()


def time_candidates(candidates: Sequence[Candidate], device: torch.device) -> dict[str, Any]:
    """Load the candidates, time them in turn, and return their metrics and the conditions.

    If they do not fit on the device together, they are loaded and timed one after the other.
    """
    load = host_load()
    models, metrics = {candidates[0].name: candidates[0].load(device)}, {}
    workload = workload_of(models[candidates[0].name])
    if workload is None:
        return {"times": {}, "timing": {}}
    in_turn = fits(parameter_bytes(models[candidates[0].name]), len(candidates) - 1, device)
    times: dict[str, Timing] = {}
    for candidate in candidates:
        if candidate.name not in models:
            models[candidate.name] = candidate.load(device)
        if candidate.kernels:
            metrics[candidate.name] = kernels_of(models[candidate.name])
        if not in_turn:
            times |= time_models(models, workload)
            models.clear()
            _release(device)
    if in_turn:
        times = time_models(models, workload)
    return {
        "times": {name: {**timing.metrics(workload.key), **metrics.get(name, {})} for name, timing in times.items()},
        "timing": conditions(workload, in_turn, load),
    }


def fits(each: int, more: int, device: torch.device) -> bool:
    """Return True if ``more`` models of ``each`` bytes of weights fit on the device beside what is there already."""
    free = free_memory(device)
    return free is None or more * each * (1 + MARGIN) <= free


def conditions(workload: Workload, in_turn: bool, load: Mapping[str, Any]) -> dict[str, Any]:
    """Return the conditions of a timing, for the record: ``what``, ``in_turn`` and the load of the host before it."""
    return {"what": workload.description, "in_turn": in_turn, **load}


def kernels_of(model: Any) -> dict[str, Any]:
    """Return which kernels the linear layers of a model run on, and whether its experts have a capacity.

    ``kernel_layers`` counts the layers that compute with compressed weights, ``kernels`` is a text: kernels and
    reasons against one, each with its number of layers.
    """
    rows = report(model)
    # A layer that is fused with others names these after its kernel.
    labels = Counter((row.kernel or row.reason).partition(", with ")[0] for row in rows)
    compressed = sum(row.kernel is not None and not row.kernel.startswith("dense") for row in rows)
    routing = routing_of(model)
    capped = [f"{CAPACITY} {routing.capacity:g}: {len(expert_load(model))}"] if routing is not None else []
    text = "; ".join([*capped, *(f"{label}: {count}" for label, count in labels.most_common())])
    return {"kernels": text, "kernel_layers": compressed}


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    """Print the times of the candidates that the first argument describes (``request``)."""
    given = json.loads(sys.argv[1])
    candidates = [Candidate(**one) for one in given["candidates"]]
    try:
        with redirect_stdout(sys.stderr):
            found = time_candidates(candidates, resolve_device(given["device"]) or torch.device("cpu"))
    except OptimError as error:
        line = printable(" ".join(str(error).split()), MAX_MESSAGE)
        print(f"hf-optim: {line}", file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


def request(candidates: Sequence[Candidate], device: str | None) -> str:
    """Return the argument of ``main``. ``trust_remote_code`` of a candidate is the caller's word for its code."""
    return json.dumps({"candidates": [asdict(one) for one in candidates], "device": device})


if __name__ == "__main__":
    raise SystemExit(main())
