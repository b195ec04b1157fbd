"""Measure the models of a ``compress`` job in child processes: each loads the way a user loads it.

Quality and peak memory are measured on one model per process (``hf-optim eval``), so that each has its own peak. Times
are measured on original and result in turn, in one process (``timed_models``), and after all of these.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...checkpoints.remote_code import written_code
from ...errors import OptimError
from ...evaluation.comparison import ACCELERATED, AFTER, BEFORE, CAPACITY
from ...evaluation.sizes import bytes_on_disk
from ...recipes.config import DataConfig
from ...recipes.contract import Reload
from ...recipes.traits import QUANTIZED, SPARSE_NM
from ...runs import distributed, progress
from ...runs.record import Record, public_name
from ...runs.run import Run
from ...toolkit.experts import stored_routing
from ...trust.code import is_written_by_run, may_run
from .job import Job
from .timed_models import Candidate, request


class Measuring:
    """Measures a result before it takes its final name, so that record and card are written once.

    If that fails, the checkpoint is written without these metrics, and ``report`` raises the error afterwards.
    """

    def __init__(self, job: Job, run: Run) -> None:
        self.job = job
        self.run = run
        self.failed: tuple[type[OptimError], str] | None = None

    def __call__(self, directory: Path) -> dict[str, Any]:
        """Return the metrics of the checkpoint in ``directory``; empty if there is nothing to measure on.

        Times of the original and figures on kernels go into the record of the run.
        """
        if self.job.evaluation is None:
            return {}
        found: dict[str, Any] = {AFTER: {}}
        try:
            trusted = is_written_by_run(directory, written_code(self.run.model))
            found[AFTER] |= evaluate_checkpoint(self.job, str(directory), "result", trust=trusted)
            self._measure_times(directory, found, trusted)
        except (OptimError, OSError) as error:
            self.failed = (type(error) if isinstance(error, OptimError) else OptimError), str(error)
        add_figures(self.run.record, self.job.evaluation, found)
        return found[AFTER]

    def _measure_times(self, directory: Path, found: dict[str, Any], trusted: bool) -> None:
        record, model = self.run.record, self.run.model
        timed = time_in_child(self.job, directory, trusted, may_have_kernels(record, model.config))
        found["timing"] = timed["timing"]
        found[BEFORE] = timed["times"].get(BEFORE, {})
        found[AFTER] |= timed["times"].get(AFTER, {})
        found[ACCELERATED] = figures_on_kernels(
            timed["times"].get(ACCELERATED, {}),
            lambda: evaluate_checkpoint(self.job, str(directory), "result on kernels", trust=trusted, kernels=True),
        )

    def report(self) -> None:
        """Report the written checkpoint. Raises ``OptimError`` if it could not be measured."""
        self.job.print_line(f"wrote {self.job.output}")
        if self.failed is not None:
            kind, text = self.failed
            raise kind(text)


def add_figures(record: Record, data: DataConfig, found: Mapping[str, Any]) -> None:
    """Write figures of an original and its result into a record, with the data that they were measured on.

    ``found`` has ``before``, ``after``, ``accelerated`` and ``timing`` (see ``Record.measured``); what is empty or
    missing is left as it is.
    """
    measured = record.measured
    measured["evaluation"] = data.to_dict() | {"dataset": public_name(data.dataset)}
    for side in (BEFORE, AFTER):
        measured.setdefault(side, {}).update(found.get(side, {}))
    for part in (ACCELERATED, "timing"):
        if found.get(part):
            measured[part] = found[part]


def may_have_kernels(record: Record, config: Any) -> bool:
    """Return True if ``optim_config="auto"`` may compute otherwise than stock transformers.

    Some layers may run on kernels (they are quantized, N:M sparse, or have own code), or experts have a capacity.
    """
    if stored_routing(config) is not None:
        return True
    return (
        bool({str(QUANTIZED), str(SPARSE_NM)}.intersection(record.traits)) or record.reload == Reload.REMOTE_CODE.name
    )


def figures_on_kernels(timed: dict[str, Any], evaluate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a result on kernels: its times with those of ``evaluate``; empty if nothing runs there."""
    return {**evaluate(), **timed} if timed.get("kernels") and runs_on_kernels(timed) else {}


def runs_on_kernels(accelerated: dict[str, Any]) -> bool:
    """Return True if loading a result with ``optim_config="auto"`` gave layers that stock transformers has not."""
    text = str(accelerated.get("kernels"))
    return bool(accelerated.get("kernel_layers")) or "dense" in text or CAPACITY in text


def evaluate_checkpoint(job: Job, model: str, what: str, trust: bool = False, kernels: bool = False) -> dict[str, Any]:
    """Return quality and peak memory of a checkpoint, measured in a child process: ``hf-optim eval --json``.

    ``trust`` allows the model code in the checkpoint, in addition to the word of the caller (``job.source``);
    ``kernels`` runs it on hf_optim's kernels.
    """
    assert job.evaluation is not None
    word = may_run(job.source.trust_remote_code) or trust
    revision = job.source.revision if what == "original" else None
    command = eval_command(model, job.evaluation, job.source.dtype, job.device, kernels, word, revision)
    with progress.stage(f"measuring the {what}"):
        return json_of(command, what, own_code=what.startswith("result"))


def eval_command(
    model: str, data: DataConfig, dtype: str, device: str | None, kernels: bool, word: bool, revision: str | None = None
) -> list[str]:
    """Return the command that measures quality and peak memory of a checkpoint in a process of its own, without times.

    ``kernels`` runs it on hf_optim's kernels; ``word`` is the caller's word for the code of the checkpoint.
    """
    command = [sys.executable, "-m", "hf_optim.cli", "eval", model, "--json", "--no-time"]
    for option, value in (
        ("--data", data.dataset),
        ("--text-column", data.text_column),
        ("--split", data.split),
        ("--samples", data.samples),
        ("--seq-len", data.seq_len),
        ("--seed", data.seed),
        ("--device", device),
        ("--dtype", dtype),
        ("--revision", revision),
    ):
        if value is not None:
            command += [option, str(value)]
    if kernels:
        command.append("--auto")
    if word:
        command.append("--trust-remote-code")
    return command


def time_in_child(job: Job, result: Path, trust: bool, kernels: bool) -> dict[str, Any]:
    """Return the times of original and result, measured in turn in a child process (``timed_models.time_candidates``).

    ``kernels`` also times the result on hf_optim's kernels; ``trust`` is as in ``evaluate_checkpoint``.
    """
    source, word = job.source, may_run(job.source.trust_remote_code)
    candidates = [
        Candidate("before", source.model, source.revision, source.dtype, word),
        Candidate("after", str(result), None, source.dtype, word or trust),
    ]
    if kernels:
        candidates.append(Candidate("accelerated", str(result), None, source.dtype, word or trust, kernels=True))
    command = [sys.executable, "-m", "hf_optim.cli.jobs.timed_models", request(candidates, job.device)]
    with progress.stage("timing original and result in turn"):
        found = json_of(command, "times", own_code=True)
    return {"times": found.get("times", {}), "timing": found.get("timing", {})}


def json_of(command: list[str], what: str, *, own_code: bool) -> dict[str, Any]:
    """Return what a command prints as JSON. Raises ``OptimError`` with its error line."""
    with tempfile.TemporaryDirectory() as cache:
        # transformers copies model code to a cache, under the name of the folder; that of a result is temporary.
        modules = {"HF_MODULES_CACHE": cache} if own_code else {}
        environment = {**distributed.own_environment(), **modules}
        done = progress.run_child(command, environment)
    if done.returncode:
        raise OptimError(f"could not measure the {what}: {_last_error_line(done.stderr)}")
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise OptimError(f"could not measure the {what}: {error}") from error


def control_figures(job: Job, control: str) -> dict[str, Any]:
    """Return the figures of a control, a model that is shown beside the result: its quality, memory and bytes."""
    size = {"bytes_on_disk": bytes_on_disk(control)} if Path(control).is_dir() else {}
    return {**evaluate_checkpoint(job, control, "control"), **size, "name": public_name(control)}


def _last_error_line(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    ours = [line.removeprefix("hf-optim: ") for line in lines if line.startswith("hf-optim: ")]
    return (ours or lines or ["no message"])[-1]
