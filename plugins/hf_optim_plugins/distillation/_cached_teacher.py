"""Callback around a teacher whose top classes are cached on disk, and the settings that identify such a cache."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from hf_optim.toolkit.distillation import logit_cache, teachers

from ._teacher import TeacherCallback

if TYPE_CHECKING:
    from hf_optim import Run

log = logging.getLogger(__name__)

SELF = "self"


class CachedTeacherCallback(TeacherCallback):
    """Checks the student and prepares the teacher or its cache before training; writes new entries with checkpoints."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, own = self.step, self.run.state(self.step)
        step.check_student(self.run)
        if step.cache is not None:
            own.cache = logit_cache.LogitCache(step.cache, cache_settings(step, self.run), writer=args.process_index)
            log.info(
                "%s: teacher cache %s has %d samples; %d bytes for each scored token",
                *(self.run.label(step), step.cache, len(own.cache), 8 * (step.top_k or 0) + 4),
            )
            if len(own.cache):
                return  # the teacher is loaded at the first sample that the cache does not have
        super().on_train_begin(args, state, control, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, own = self.step, self.run.state(self.step)
        self._flush()
        metrics: dict[str, Any] = {"teacher": step.teacher or type(own.teacher).__name__}
        if step.cache is not None:
            metrics |= {"cache_samples": len(own.cache), "cache_bytes": own.cache.bytes_on_disk}
            log.info(
                "%s: teacher cache %s: %d bytes on disk", self.run.label(step), step.cache, own.cache.bytes_on_disk
            )
        self.run.report(step, **metrics)

    def _flush(self) -> None:
        cache = getattr(self.run.state(self.step), "cache", None)
        if cache is not None:
            cache.flush()


def cache_settings(step: Any, run: Run) -> dict[str, Any]:
    """Return the settings that the entries of a cache depend on: the teacher, the temperature, k and the classes."""
    return {
        **_teacher_identity(step, run),
        "temperature": step.temperature,
        "top_k": step.top_k,
        "classes": teachers.num_classes(run.model),
    }


def _teacher_identity(step: Any, run: Run) -> dict[str, Any]:
    own = run.state(step)
    given = getattr(own, "teacher", None)
    if given is not None and given is not getattr(own, "loaded", None):
        return {"teacher": teachers.hash_parameters(given)}
    if step.teacher in (None, SELF):
        return {"teacher": step.teacher}
    if not logit_cache.LogitCache.has_shards(step.cache or ""):
        # An empty cache needs the teacher anyway, and the commit of a Hub id is known once it is downloaded.
        step.ready_teacher(run)
    local = os.path.isdir(step.teacher)
    named = os.path.realpath(step.teacher) if local else step.teacher
    return {"teacher": named, "teacher_files": teachers.hash_files(step.teacher or "")}
