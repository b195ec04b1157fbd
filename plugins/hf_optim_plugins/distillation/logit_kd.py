"""Knowledge distillation on logits (Hinton et al., 1503.02531, section 2).

``L = α T² KL(softmax(z_t/T) ‖ softmax(z_s/T)) + (1 - α) CE(y, z_s)``, the weighted average of two objectives: the
teacher's distribution, softened by the temperature ``T``, and the labels, with "a considerably lower weight". Up to the
factor ``α`` this is ``T² KL + λ CE`` with ``λ = (1 - α)/α``. ``T²`` keeps the teacher's share when ``T`` changes.

The divergence may be turned round (``reverse``: ``KL(student ‖ teacher)``, 2306.08543, which does not make a small
student cover what it cannot) or lie between (``js``: the generalized Jensen-Shannon divergence of 2306.13649).

A sparse model of the teacher's own shape learns more from every token if its blocks must agree as well: SquareHead
(Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models", 2310.06927), as
``alpha_states``.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_optim import Contract, ModelError, Paper, RecipeError, Reload, Technique, hookimpl, option, technique, traits
from hf_optim.toolkit.distillation import (
    DIRECTIONS,
    RESTS,
    Direction,
    Head,
    HiddenStates,
    HiddenStatesCallback,
    LogitCache,
    Rest,
    TopK,
    base_model_of_blocks,
    head_kind,
    remove_recorder,
    sample_keys,
    scored_rows,
    squarehead_loss,
    take_hidden_states,
    teachers,
    token_masks,
    top_k,
    top_k_kd_loss,
)
from hf_optim.toolkit.topology import blocks, find_residual_order

from ._fused_kd import kd_loss

if TYPE_CHECKING:
    from hf_optim import Card, Run

log = logging.getLogger(__name__)

SELF = "self"

# Nats. Two equal models differ by less, through rounding alone.
NOTHING_TO_LEARN = 1e-7


@technique(
    "logit_kd",
    family="distillation",
    paper=Paper("1503.02531", "Distilling the Knowledge in a Neural Network", 2015),
    contract=Contract(keeps={traits.SPARSE, traits.SPARSE_NM}),
    reload=Reload.STOCK_DENSE,
    trains=True,
)
class LogitKD(Technique):
    """Train the model to give the distribution of a teacher.

    For causal and sequence-to-sequence language models, masked language models, token and sequence classifiers. Only
    positions that have a label are compared. Data needs no labels, and may be random tokens: then all positions that
    are not padding are compared, there is no task loss, and the loss is the teacher's term alone, times ``alpha``.

    A sequence classifier with one label is a regression: the teacher's term is the mean squared error between the two
    outputs, whatever the temperature. Where each of several labels holds or not (``problem_type:
    multi_label_classification``) it is the divergence of that for each label by itself, their mean.

    Attributes:
        teacher: a path or Hub id; or ``"self"``, the model as it was before the steps of its stage changed it (what
            recovers a model that is pruned; alone in its stage it holds a model to what it was while labels teach it,
            and is refused where they do not: with ``alpha`` 1, and without labels); or None: set
            ``hf_optim.run_of(model).state(step).teacher`` to a module.
        temperature: ``T``; softens both distributions; without effect for a regression.
        alpha: weight of the teacher's term; the task loss has ``1 - alpha``.
        alpha_states: weight of SquareHead, the hidden states of all blocks; the paper's is 1. Teacher and student need
            as many blocks, of one width.
        direction: ``"forward"``, ``"reverse"`` or ``"js"``.
        beta: of ``"js"``: the teacher's weight in the mixture, in (0, 1).
        top_k: compare only the ``k`` most probable classes of the teacher; None compares all. Refused for a regression
            and for several labels.
        rest: what then becomes of the others: ``"bucket"`` compares their sum as one class, ``"renormalize"`` leaves
            them out and renormalizes both sides.
        cache: a directory for the teacher's top ``k`` of every sample; written in the first epoch, read afterwards and
            by later runs, which load no teacher if it is complete. ``8 k + 4`` bytes for each scored token.
        device: where the teacher runs: ``"same"`` as the student, ``"offload"`` (in host memory, its blocks brought to
            the student's device one by one), ``"cpu"``, or another device.
    """

    teacher: str | None = SELF
    temperature: float = option(2.0, above=0.0)
    alpha: float = option(0.9, low=0.0, high=1.0)
    alpha_states: float = option(0.0, low=0.0)
    direction: Direction = option("forward", choices=DIRECTIONS)
    beta: float = option(0.5, above=0.0, below=1.0)
    top_k: int | None = option(None, low=1)
    rest: Rest = option("bucket", choices=RESTS)
    cache: str | None = None
    device: str = teachers.SAME

    def validate(self) -> None:
        if self.cache is not None and self.top_k is None:
            raise RecipeError("logit_kd: a cache keeps the teacher's top classes: say how many with top_k (64, say)")
        if self.cache is not None and self.alpha_states:
            raise RecipeError("logit_kd: a cache keeps no hidden states: leave out cache or alpha_states")
        teachers.check_device(self.device, self.name)

    def phases(self) -> Any:
        # Taking a copy in transform_model changes nothing: the step may stand behind ones that calibrate.
        return frozenset(phase for phase in super().phases() if phase.name == "TRAIN")

    @hookimpl(tryfirst=True)
    def transform_model(self, run: Run) -> None:
        self._head(run)
        if self.teacher == SELF:
            run.state(self).teacher = copy.deepcopy(run.model)

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        recorder = HiddenStatesCallback(run.state(self), lambda: [block.module for block in blocks(run.model)])
        return [TeacherCallback(self, run), *([recorder] if self.alpha_states else [])]

    @hookimpl
    def training_loss(
        self, run: Run, model: nn.Module, inputs: Mapping[str, Any], outputs: Any
    ) -> dict[str, Tensor | float]:
        logits = getattr(outputs, "logits", None)
        if not isinstance(logits, Tensor):
            raise ModelError(
                f"{run.label(self)}: {type(run.model).__name__} has no `logits` in its outputs; distillation compares "
                "the logits of language models and classifiers"
            )
        mask = "decoder_attention_mask" if run.model.config.is_encoder_decoder else "attention_mask"
        head = self._head(run)
        # The labels of the other heads are no classes, of which -100 would be none.
        labels = inputs.get("labels") if head == "classes" else None
        rows = scored_rows(logits, labels, inputs.get(mask), shift=teachers.predicts_next_token(run.model))
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "direction": self.direction,
            "beta": self.beta,
            "rows": rows,
        }
        terms: dict[str, Tensor | float] = {"task_scale": 1.0 - self.alpha}
        with self._asked(run) as asked:
            if self.top_k is None:
                term = kd_loss(logits, self._teacher_logits(run, inputs, logits), head=head, **options)
            else:
                term = top_k_kd_loss(logits, self._top_k(run, inputs, logits, rows), rest=self.rest, **options)
            if self.alpha_states:
                terms["states"] = self.alpha_states * self._squarehead(run, inputs, asked.take())
        self._greet(run, term, 0.0 if head == "regression" else NOTHING_TO_LEARN, getattr(outputs, "loss", None))
        return {"kd": self.alpha * term, **terms}

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        remove_recorder(run.state(self))
        for name in ("teacher", "loaded", "ready", "cache", "order"):
            vars(run.state(self)).pop(name, None)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        if "cache_bytes" in figures:
            card.paragraph(
                "The teacher's cache",
                f"The teacher was asked once: its {self.top_k} most probable classes of {figures['cache_samples']:,} "
                f"samples were kept on disk, in {figures['cache_bytes']:,} bytes.",
            )

    def _head(self, run: Run) -> Head:
        """What the model predicts. Raises ``ModelError`` where ``top_k`` asks for classes that it does not have."""
        head = head_kind(run.model)
        if head != "classes" and self.top_k is not None:
            predicts = "a number" if head == "regression" else "labels that hold each by itself"
            raise ModelError(
                f"{run.label(self)}: {type(run.model).__name__} predicts {predicts}, so it has no most probable "
                "classes: leave out top_k and cache"
            )
        return head

    def _greet(self, run: Run, term: Tensor, nothing: float, task_loss: Tensor | None) -> None:
        own = run.state(self)
        if getattr(own, "met", False):
            return
        if task_loss is None:
            _require_difference(self, run)
        own.met = True
        if float(term.detach()) <= nothing:
            sentence = (
                f"{run.label(self)}: teacher and student gave the same outputs on the first batch; with teacher: "
                "self there must be a step in the same stage that changes the model"
            )
            run.record.note(sentence)
            log.warning(sentence)

    def _asked(self, run: Run) -> HiddenStates:
        """Records the teacher's blocks, where they are asked for."""
        return HiddenStates([block.module for block in blocks(ready_teacher(self, run))] if self.alpha_states else [])

    def _squarehead(self, run: Run, inputs: Mapping[str, Any], wanted: list[Tensor]) -> Tensor:
        own, label = run.state(self), run.label(self)
        states = take_hidden_states(own)
        if not states or [h.shape for h in states] != [h.shape for h in wanted]:
            raise ModelError(
                f"{label}: alpha_states compares the hidden states of all blocks; the teacher has {len(wanted)} "
                f"{_widths(wanted)} and the student {len(states)} {_widths(states)}, but both need as many of one width"
            )
        # Blocks that come before all that trains have none.
        if not states[-1].requires_grad:
            raise ModelError(f"{label}: alpha_states: no gradient reaches the last block; does the model train at all?")
        if not hasattr(own, "order"):
            # The student's channels may have been permuted, here or before its checkpoint was made.
            own.order = find_residual_order(run.model, own.ready)
        if own.order is not None:
            wanted = [h[..., own.order.to(h.device)] for h in wanted]
        masks = token_masks(inputs, run.model.config.is_encoder_decoder)
        return squarehead_loss(states, wanted, [masks[i] for i in base_model_of_blocks(run.model)])

    def _teacher_logits(self, run: Run, inputs: Mapping[str, Any], logits: Tensor) -> Tensor:
        teacher = ready_teacher(self, run)
        found = teachers.forward_logits(teacher, inputs)
        if found.shape != logits.shape:
            raise ModelError(
                f"{run.label(self)}: the teacher's logits are {tuple(found.shape)} and the student's "
                f"{tuple(logits.shape)}; both need the same vocabulary (or labels) and the same inputs"
            )
        return found

    def _top_k(self, run: Run, inputs: Mapping[str, Any], logits: Tensor, rows: Tensor) -> TopK:
        """The teacher's top classes for ``rows``, from the cache where it has them."""
        assert self.top_k is not None
        classes = logits.shape[-1]
        cache: LogitCache | None = getattr(run.state(self), "cache", None)
        if cache is None:
            live = self._teacher_logits(run, inputs, logits).reshape(-1, classes)
            return top_k(live[rows.to(live.device)], self.top_k, self.temperature)
        keys = sample_keys(inputs)
        sizes = torch.bincount(rows.cpu() * logits.shape[0] // logits[..., 0].numel(), minlength=len(keys)).tolist()
        if not all(key in cache for key in keys):
            live = self._teacher_logits(run, inputs, logits).reshape(-1, classes)
            found = top_k(live[rows.to(live.device)], self.top_k, self.temperature)
            for key, *parts in zip(keys, *(part.split(sizes) for part in found), strict=True):
                cache.put(key, TopK(*parts))
        entries = [cache.get(key) for key in keys]
        return TopK(*(torch.cat(parts).to(logits.device) for parts in zip(*entries, strict=True)))


class TeacherCallback(TrainerCallback):
    """Fetches the teacher or its cache before training, and writes what the cache learned."""

    def __init__(self, step: LogitKD, run: Run) -> None:
        self.step, self.run = step, run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, own = self.step, self.run.state(self.step)
        step._head(self.run)
        if step.alpha == 1.0:
            _require_difference(step, self.run)
        if step.cache is not None:
            settings = {
                **_identity(step, self.run),
                "temperature": step.temperature,
                "top_k": step.top_k,
                "classes": teachers.num_classes(self.run.model),
            }
            own.cache = LogitCache(step.cache, settings, writer=args.process_index)
            log.info(
                "%s: teacher cache %s has %d samples; %d bytes for each scored token",
                *(self.run.label(step), step.cache, len(own.cache), 8 * (step.top_k or 0) + 4),
            )
            if len(own.cache):
                return  # the teacher is loaded at the first sample that is not there
        ready_teacher(step, self.run)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, own = self.step, self.run.state(self.step)
        self._flush()
        figures: dict[str, Any] = {"teacher": step.teacher or type(own.teacher).__name__}
        if step.cache is not None:
            figures |= {"cache_samples": len(own.cache), "cache_bytes": own.cache.bytes_on_disk}
            log.info(
                "%s: teacher cache %s: %d bytes on disk", self.run.label(step), step.cache, own.cache.bytes_on_disk
            )
        self.run.report(step, **figures)

    def _flush(self) -> None:
        cache = getattr(self.run.state(self.step), "cache", None)
        if cache is not None:
            cache.flush()


def _require_difference(step: LogitKD, run: Run) -> None:
    """Refuse a student that is its own teacher, and that no other step will change in training either.

    For trainings that have no task loss. Only when they begin can this be told: until then the model's owner may change
    it (adapters, pruning of their own).
    """
    teacher = getattr(run.state(step), "teacher", None)
    alone = run.stage is not None and len(run.stage.steps) == 1
    if step.teacher == SELF and alone and teacher is not None and teachers.is_copy(run.model, teacher):
        raise RecipeError(
            f"{run.label(step)}: no other step of its stage changes the model, which with teacher: self would learn "
            "from itself alone: put the step that changes it into the same stage, or name a teacher"
        )


def _identity(step: LogitKD, run: Run) -> dict[str, Any]:
    """What tells the teacher of a cache from others."""
    own = run.state(step)
    given = getattr(own, "teacher", None)
    if given is not None and given is not getattr(own, "loaded", None):
        return {"teacher": teachers.hash_parameters(given)}
    if step.teacher in (None, SELF):
        return {"teacher": step.teacher}
    if not LogitCache.begun(step.cache or ""):
        # It will be asked in any case, and the commit of a Hub id is known when it is here.
        ready_teacher(step, run)
    return {"teacher": step.teacher, "teacher_files": teachers.hash_files(step.teacher or "")}


def _widths(states: list[Tensor]) -> str:
    return "of width " + " and ".join(str(width) for width in sorted({h.shape[-1] for h in states}))


def ready_teacher(step: LogitKD, run: Run) -> nn.Module:
    """The teacher: found or loaded, compared with the student, frozen, in evaluation mode and where it can run."""
    own, label = run.state(step), run.label(step)
    if getattr(own, "ready", None) is not None:
        return own.ready
    if getattr(own, "teacher", None) is None:
        if step.teacher in (None, SELF):
            raise ModelError(
                f"{label} has no teacher: give `teacher:` a path or Hub id, or set "
                "hf_optim.run_of(model).state(step).teacher to a module before training"
            )
        own.teacher = own.loaded = teachers.load(step.teacher, label)
    teachers.require_same_classes(run.model, own.teacher, label)
    if step.teacher != SELF:
        _compare_tokenizers(step, run)
    own.ready = teachers.freeze(own.teacher, teachers.input_device(run.model), step.device)
    return own.ready


def _compare_tokenizers(step: LogitKD, run: Run) -> None:
    """Refuse a teacher with another tokenizer; a pair that cannot be compared is noted."""
    source = step.teacher or getattr(run.state(step).teacher.config, "_name_or_path", "")
    mine = run.tokenizer or run.model.config._name_or_path
    texts = getattr(run.model, "main_input_name", "") == "input_ids"
    if texts and not teachers.require_same_tokenizer(mine, source, run.label(step)):
        sentence = (
            f"{run.label(step)}: whether teacher and student have the same tokenizer could not be told, since one of "
            "them has none at hand; their vocabularies have the same size"
        )
        run.record.note(sentence)
        log.warning(sentence)


@hookimpl
def register_techniques(register):
    register(LogitKD)
