"""Knowledge distillation on logits (Hinton et al., 1503.02531, section 2).

``L = α T² KL(softmax(z_t/T) ‖ softmax(z_s/T)) + (1 - α) CE(y, z_s)``, the weighted average of two objectives: the
teacher's distribution, softened by the temperature ``T``, and the labels, with "a considerably lower weight". Up to the
factor ``α`` this is ``T² KL + λ CE`` with ``λ = (1 - α)/α``. ``T²`` keeps the weight of the teacher's term constant
when ``T`` changes.

The divergence may be reversed (``reverse``: ``KL(student ‖ teacher)``, 2306.08543, which does not make a small student
cover what it cannot represent) or lie between the two (``js``: the generalized Jensen-Shannon divergence of
2306.13649). Both papers train on text that the student samples (on-policy); here the divergences are those on the given
data, and nothing is sampled.

A sparse model of the teacher's own shape learns more from every token if its blocks must agree as well: SquareHead
(Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models", 2310.06927), enabled by
``alpha_states``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_optim import (
    Contract,
    ModelError,
    Paper,
    Phase,
    RecipeError,
    Reload,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.toolkit.distillation import (
    hidden_states,
    logit_cache,
    losses,
    teachers,
)
from hf_optim.toolkit.topology import blocks

from ._cached_teacher import SELF, CachedTeacherCallback
from ._fused_kd import kd_loss
from ._squarehead import squarehead_items, squarehead_term
from ._teacher import Distillation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_optim import Card, Run, Technique

# In nats. Rounding alone makes two equal models differ by less.
NO_DIVERGENCE = 1e-7


@technique(
    "logit_kd",
    family="distillation",
    paper=Paper("1503.02531", "Distilling the Knowledge in a Neural Network", 2015),
    contract=Contract(keeps={traits.SPARSE, traits.SPARSE_NM}),
    reload=Reload.STOCK_DENSE,
    trains=True,
    parallel={"data": "yes"},
)
class LogitKD(Distillation):
    """Train the model to match the output distribution of a teacher (knowledge distillation).

    For causal and sequence-to-sequence language models, masked language models, token and sequence classifiers. Only
    positions that have a label are compared. Data needs no labels, and may be random tokens: then all positions that
    are not padding are compared, there is no task loss, and the loss is the teacher's term alone, times ``alpha``.

    A sequence classifier with one label is a regression: the teacher's term is the mean squared error between the two
    outputs, whatever the temperature. With ``problem_type: multi_label_classification`` the term is the mean over the
    labels of the divergence of each label's two outcomes.

    ``teacher`` and ``device`` choose the teacher and its device; ``temperature`` to ``beta`` define the loss;
    ``top_k``, ``rest`` and ``cache`` reduce what is compared, and keep it on disk.

    Attributes:
        teacher: a path or Hub id; or ``"self"``, the model before the steps of its stage changed it (which
            recovers a pruned model; alone in its stage it keeps the model close to itself while labels teach it, and
            is refused if they do not: with ``alpha`` 1, and without labels); or None: set
            ``hf_optim.run_of(model).state(step).teacher`` to a module.
        temperature: ``T``; softens both distributions; without effect for a regression.
        alpha: weight of the teacher's term; the task loss has ``1 - alpha``.
        alpha_states: weight of SquareHead, the hidden states of all blocks; the paper's is 1. Teacher and student need
            as many blocks, of one width.
        direction: ``"forward"``, ``"reverse"`` or ``"js"``.
        beta: of ``"js"``: the teacher's weight in the mixture, in (0, 1).
        top_k: compare only the ``k`` most probable classes of the teacher; None compares all. Refused for a regression
            and for several labels.
        rest: what happens to the other classes: ``"bucket"`` compares their sum as one class, ``"renormalize"`` leaves
            them out and renormalizes both sides.
        cache: a directory for the teacher's top ``k`` of every sample; written in the first epoch, read afterwards and
            by later runs, which load no teacher if it is complete. ``8 k + 4`` bytes for each scored token.
        device: where the teacher runs: ``"same"`` as the student, ``"offload"`` (in host memory, its blocks moved to
            the student's device one by one), ``"cpu"``, or another device.
    """

    teacher: str | None = SELF
    temperature: float = option(2.0, above=0.0)
    alpha: float = option(0.9, low=0.0, high=1.0)
    alpha_states: float = option(0.0, low=0.0)
    direction: losses.Direction = option("forward", choices=losses.DIRECTIONS)
    beta: float = option(0.5, above=0.0, below=1.0)
    top_k: int | None = option(None, low=1)
    rest: losses.Rest = option("bucket", choices=losses.RESTS)
    cache: str | None = None
    device: str = teachers.SAME

    def validate(self) -> None:
        if self.cache is not None and self.top_k is None:
            raise RecipeError(
                "logit_kd: a cache keeps the teacher's top classes: set their number with top_k (64, for example)"
            )
        if self.cache is not None and self.alpha_states:
            raise RecipeError("logit_kd: a cache keeps no hidden states: leave out cache or alpha_states")
        teachers.check_device(self.device, self.name)

    def phases(self) -> frozenset[Phase]:
        # The copy that transform_model takes changes nothing, so the step may come after steps that calibrate.
        return frozenset({Phase.TRAIN})

    def training_teacher(self) -> str | None:
        return self.teacher

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        if losses.head_kind(model) != "classes" and self.top_k is not None:
            predicts = "a number" if losses.head_kind(model) == "regression" else "labels that hold each by itself"
            raise ModelError(
                f"{label}: {type(model).__name__} predicts {predicts}, so it has no most probable classes: leave out "
                "top_k and cache"
            )

    def check_training(self, model: PreTrainedModel, stage: Sequence[Technique], labels: bool, label: str) -> None:
        if self.teacher is None:
            raise _no_teacher(label)
        if self.teacher != SELF:
            teachers.require_same_classes(model, teachers.load_skeleton(self.teacher, label), label)
            if model.main_input_name == "input_ids":
                teachers.require_same_tokenizer(model.config._name_or_path, self.teacher, label)
        elif len(stage) == 1 and (self.alpha == 1.0 or not labels):
            raise _no_difference(label)

    # -- hooks --------------------------------------------------------------------------------------------------------
    @hookimpl(tryfirst=True)
    def transform_model(self, run: Run) -> None:
        self.head(run)
        if self.teacher == SELF:
            run.state(self).teacher = copy.deepcopy(run.model)

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        recorder = hidden_states.RecorderCallback(
            run.state(self), lambda: [block.module for block in blocks(run.model)]
        )
        return [CachedTeacherCallback(self, run), *([recorder] if self.alpha_states else [])]

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
        head = self.head(run)
        rows = losses.scored_rows(logits, **self._scoring(run, inputs))
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "direction": self.direction,
            "beta": self.beta,
            "rows": rows,
        }
        terms: dict[str, Tensor | float] = {"task_scale": 1.0 - self.alpha}
        with self._recorded_teacher(run) as recorder:
            if self.top_k is None:
                term = kd_loss(logits, self._teacher_logits(run, inputs, logits), head=head, **options)
            else:
                term = losses.top_k_kd_loss(logits, self._top_k(run, inputs, logits, rows), rest=self.rest, **options)
            if self.alpha_states:
                teacher, targets = self.ready_teacher(run), recorder.take()
                terms["states"] = self.alpha_states * squarehead_term(self, run, inputs, teacher, targets)
        nothing = 0.0 if head == "regression" else NO_DIVERGENCE
        if rows.numel():  # a mean over no rows is zero for any teacher
            self._check_first_batch(run, term, nothing, getattr(outputs, "loss", None))
        return {"kd": self.alpha * term, **terms}

    def loss_items(self, run: Run, inputs: Mapping[str, Any]) -> dict[str, Any]:
        counts: dict[str, Any] = {"kd": losses.count_scored_rows(run.model, inputs, **self._scoring(run, inputs))}
        if self.alpha_states:
            counts["states"] = lambda: squarehead_items(run, inputs, self.ready_teacher(run))
        return counts

    def _scoring(self, run: Run, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of ``scored_rows`` for a batch."""
        mask = "decoder_attention_mask" if run.model.config.is_encoder_decoder else "attention_mask"
        # The labels of the other heads are not class indices, in which -100 means no label.
        labels = inputs.get("labels") if self.head(run) == "classes" else None
        return {"labels": labels, "mask": inputs.get(mask), "shift": teachers.predicts_next_token(run.model)}

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        self.release_teacher(run, "loaded", "cache", "order")

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        if "cache_bytes" in metrics:
            card.paragraph(
                "The teacher's cache",
                f"The teacher ran once on each sample: its {self.top_k} most probable classes of "
                f"{metrics['cache_samples']:,} samples were kept on disk, in {metrics['cache_bytes']:,} bytes.",
            )

    def recompute(self, case: Any) -> dict[str, Any]:
        if self.cache is None:
            return {}
        shards = list(Path(self.cache).glob("teacher-*.safetensors"))
        samples = {key.rpartition(".")[0] for shard in shards for key in load_file(shard)}
        return {"cache_samples": len(samples), "cache_bytes": sum(shard.stat().st_size for shard in shards)}

    # -- the teacher's outputs ----------------------------------------------------------------------------------------
    def _recorded_teacher(self, run: Run) -> hidden_states.Recorder:
        """Return a recorder of the teacher's blocks; of none if hidden states are not compared."""
        return hidden_states.Recorder(
            [block.module for block in blocks(self.ready_teacher(run))] if self.alpha_states else []
        )

    def _teacher_logits(self, run: Run, inputs: Mapping[str, Any], logits: Tensor) -> Tensor:
        found = teachers.forward_logits(self.ready_teacher(run), inputs)
        if found.shape != logits.shape:
            raise ModelError(
                f"{run.label(self)}: the teacher's logits are {tuple(found.shape)} and the student's "
                f"{tuple(logits.shape)}; both need the same vocabulary (or labels) and the same inputs"
            )
        return found

    def _top_k(self, run: Run, inputs: Mapping[str, Any], logits: Tensor, rows: Tensor) -> losses.TopK:
        """Return the teacher's top classes for ``rows``, from the cache if it has them."""

        def compute() -> losses.TopK:
            found = self._teacher_logits(run, inputs, logits).reshape(-1, logits.shape[-1])
            return losses.top_k(found[rows.to(found.device)], self.top_k or 0, self.temperature)

        cache = getattr(run.state(self), "cache", None)
        return compute() if cache is None else logit_cache.cached_top_k(cache, inputs, logits, rows, compute)

    # -- checks -------------------------------------------------------------------------------------------------------
    def head(self, run: Run) -> losses.Head:
        """Return what the model predicts. Raises ``ModelError`` if ``top_k`` is set and it does not predict classes."""
        self.check_model(run.model, run.label(self))
        return losses.head_kind(run.model)

    def check_student(self, run: Run) -> None:
        """Raise ``ModelError`` or ``RecipeError`` for a student that cannot learn from this teacher."""
        self.head(run)
        if self.alpha == 1.0:
            self._require_difference(run)

    def _require_difference(self, run: Run) -> None:
        """Raise ``RecipeError`` if the student is its own teacher and no other step of the stage will change it.

        For training without a task loss. It can be checked only when training starts: until then the caller may
        change the model (adapters, their own pruning).
        """
        teacher = getattr(run.state(self), "teacher", None)
        alone = run.stage is not None and len(run.stage.steps) == 1
        if self.teacher == SELF and alone and teacher is not None and teachers.is_copy(run.model, teacher):
            raise _no_difference(run.label(self))

    def _check_first_batch(self, run: Run, term: Tensor, nothing: float, task_loss: Tensor | None) -> None:
        """Warn once if teacher and student gave the same outputs, a term of at most ``nothing``."""
        own = run.state(self)
        if getattr(own, "first_batch_checked", False):
            return
        if task_loss is None:
            self._require_difference(run)
        own.first_batch_checked = True
        if float(term.detach()) <= nothing:
            run.warn(
                self,
                "teacher and student gave the same outputs on the first batch; with teacher: self there must be a step "
                "in the same stage that changes the model",
            )

    def find_teacher(self, run: Run) -> nn.Module:
        own, label = run.state(self), run.label(self)
        if getattr(own, "teacher", None) is None:
            if self.teacher in (None, SELF):
                raise _no_teacher(label)
            own.teacher = own.loaded = teachers.load(self.teacher, label)
        teachers.require_same_classes(run.model, own.teacher, label)
        if self.teacher != SELF:
            self._compare_tokenizers(run)
        return own.teacher

    def _compare_tokenizers(self, run: Run) -> None:
        """Raise ``ModelError`` for a teacher with another tokenizer; warn if the two cannot be compared."""
        source = self.teacher or getattr(run.state(self).teacher.config, "_name_or_path", "")
        mine = run.tokenizer or run.model.config._name_or_path
        texts = getattr(run.model, "main_input_name", "") == "input_ids"
        if texts and not teachers.require_same_tokenizer(mine, source, run.label(self)):
            run.warn(
                self,
                "the tokenizers of teacher and student could not be compared, since one of them was not found; their "
                "vocabularies have the same size",
            )


def _no_teacher(label: str) -> ModelError:
    remedy = f"{label} has no teacher: give `teacher:` a path or Hub id"
    return ModelError(
        f"{remedy}, or set hf_optim.run_of(model).state(step).teacher to a module before training", cli=remedy
    )


def _no_difference(label: str) -> RecipeError:
    return RecipeError(
        f"{label}: with teacher: self, another step of the same stage must change the model; otherwise student and "
        "teacher are identical and the loss is zero: put the step that changes it into the same stage, or name a "
        "teacher"
    )


@hookimpl
def register_techniques(register):
    register(LogitKD)
