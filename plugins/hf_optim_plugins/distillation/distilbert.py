"""DistilBERT: a student of every other layer, initialized from its teacher and trained with three losses.

    L = α_ce T² KL(softmax(z_t/T) ‖ softmax(z_s/T)) + α_task L_task(y, z_s) + α_cos (1 - cos(h_s, h_t))
        + α_pool (1 - cos(mean h_s, mean h_t))

Sanh et al., "DistilBERT, a distilled version of BERT", arXiv 1910.01108. ``L_task`` is masked language modelling in the
paper, and here the model's own loss; ``h`` are the last hidden states. The paper names the three terms without their
weights; 5, 2 and 1, and T = 2, are those of the training command that its authors published with their code. The first
and the third term are means over all tokens that are not padding, as in that code, not only over those that have a
label. In that code, every other layer means 0, 2, 4, 7, 9 and 11 of twelve: evenly spaced, including the first and the
last.

The student is a stock class with fewer layers, and everything outside the layers is a copy: embeddings, norms, head.
The paper also drops token-type embeddings and the pooler. Stock BERT classes have no configuration for that, and would
initialize a missing pooler at random on loading, so by default both are kept. With ``token_types: false`` the student
becomes the DistilBERT class of transformers, if that can represent it.

Beyond the paper: decoders and encoder-decoders (whose encoder and decoder lose layers alike, and whose two last hidden
states count equally), and models without logits, such as sentence encoders, which learn from the third term alone or,
since users take the mean of the states from them, from the fourth as well, which is not in the paper and off by
default.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from hf_optim import Contract, ModelError, Paper, RecipeError, Reload, hookimpl, option, technique, traits
from hf_optim.toolkit import topology
from hf_optim.toolkit.distillation import (
    hidden_losses,
    hidden_states,
    losses,
    students,
    teachers,
)

from ._fused_kd import kd_loss
from ._plain_bert import without_token_types
from ._teacher import Distillation, TeacherCallback

if TYPE_CHECKING:
    from hf_optim import Card, Run


@technique(
    "distilbert",
    family="distillation",
    paper=Paper("1910.01108", "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter", 2019),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS}, forbids={traits.QUANTIZED}, keeps={traits.SPARSE, traits.SPARSE_NM}
    ),
    reload=Reload.STOCK_DENSE,
    trains=True,
    parallel={"data": "yes"},
)
class DistilBERT(Distillation):
    """Replace the model by a student with some of its layers, and train the student with the model as its teacher.

    Data needs no labels: without them the task loss is left out.

    Attributes:
        every: the student has one in ``every`` layers of the teacher, evenly spaced from the first to the last; of each
            block list, if there is more than one.
        layers: the teacher's layers by index, in ascending order, instead of ``every``; of each block list.
        temperature: ``T``; softens both distributions; without effect for a regression.
        alpha_ce: weight of the divergence from the teacher's distribution; for a sequence classifier with one label (a
            regression) of the mean squared error between the two outputs, and with ``problem_type:
            multi_label_classification`` of the mean over the labels of each label's divergence.
        alpha_task: weight of the task loss.
        alpha_cos: weight of the cosine loss on the last hidden states of every token.
        alpha_pool: weight of the cosine loss on their mean over the tokens of a sequence (sentence vectors).
        token_types: False drops token-type embeddings and pooler, as the paper does: of a bare BERT encoder or masked
            language model, for texts of one segment. Other models are refused.
        device: where the teacher runs: ``"same"`` as the student, ``"offload"`` (in host memory, its layers moved to
            the student's device one by one), ``"cpu"``, or another device.
    """

    every: int = option(2, low=2)
    layers: tuple[int, ...] | None = None
    temperature: float = option(2.0, above=0.0)
    alpha_ce: float = option(5.0, low=0.0)
    alpha_task: float = option(2.0, low=0.0)
    alpha_cos: float = option(1.0, low=0.0)
    alpha_pool: float = option(0.0, low=0.0)
    token_types: bool = True
    device: str = teachers.SAME

    def validate(self) -> None:
        layers = self.layers
        if layers is not None and (not layers or layers[0] < 0 or list(layers) != sorted(set(layers))):
            raise RecipeError(
                "distilbert: layers are the indices of the teacher's layers to keep, at least one, counted from 0 and "
                f"in ascending order, not {list(layers)}"
            )
        if not (self.alpha_ce or self.alpha_task or self.alpha_cos or self.alpha_pool):
            raise RecipeError("distilbert: all four weights are 0, so nothing is learned: set alpha_ce, for example")
        teachers.check_device(self.device, self.name)

    def reload(self) -> Reload:
        return self.spec.reload if self.token_types else Reload.STOCK_ARCH

    def training_teacher(self) -> str:
        return "self"

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        self._kept_layers(model, label)

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        teacher, label = run.model, run.label(self)
        kept = self._kept_layers(teacher, label)
        student, renamed = students.build_student(teacher, kept, label)
        run.rename(renamed)
        if not self.token_types:
            student, renamed = without_token_types(student, label)
            run.rename(renamed)
        run.state(self).teacher = teacher
        run.cover(self, [block.name for block in topology.blocks(student)])
        run.report(
            self,
            layers={name: list(layers) for name, layers in kept.items()},
            parameters_before=teacher.num_parameters(),
            parameters_after=student.num_parameters(),
            layer_parameters_before=students.count_block_parameters(teacher),
            layer_parameters_after=students.count_block_parameters(student),
        )
        return student

    def _kept_layers(self, teacher: PreTrainedModel, label: str) -> dict[str, tuple[int, ...]]:
        """Return the indices of the layers that the student gets, for every block list of the teacher."""
        kept = {}
        for list_name, found in students.block_indices(teacher).items():
            wanted = -(-len(found) // self.every)
            layers = students.evenly_spaced(len(found), wanted) if self.layers is None else self.layers
            if layers[-1] >= len(found):
                raise ModelError(
                    f"{label}: layers must be indices below {len(found)}, the layers of {list_name}, not {list(layers)}"
                )
            if len(layers) == len(found):
                raise ModelError(
                    f"{label}: all {len(found)} layers of {list_name} are kept: the student is as large as the teacher"
                )
            kept[list_name] = layers
        if not kept:
            raise ModelError(f"{label}: no sequence of layers was found in {type(teacher).__name__}")
        return kept

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        return [
            TeacherCallback(self, run),
            hidden_states.RecorderCallback(run.state(self), lambda: hidden_states.base_models(run.model)),
        ]

    @hookimpl
    def training_loss(
        self, run: Run, model: nn.Module, inputs: Mapping[str, Any], outputs: Any
    ) -> dict[str, Tensor | float]:
        label, teacher = run.label(self), self.ready_teacher(run)
        with hidden_states.Recorder(hidden_states.base_models(teacher)) as recorder:
            teacher_outputs = teachers.forward(teacher, inputs)
            targets = recorder.take()
        states = hidden_states.take_recorded(run.state(self))
        terms: dict[str, Tensor | float] = {"task_scale": self.alpha_task}
        masks = hidden_losses.token_masks(inputs, run.model.config.is_encoder_decoder)
        for name, weight, pooled in (("cosine", self.alpha_cos, False), ("pooled", self.alpha_pool, True)):
            if weight:
                if not states or len(states) != len(targets):
                    raise ModelError(
                        f"{label}: the model's last hidden states were not found; set alpha_cos: 0 and alpha_pool: 0"
                    )
                terms[name] = weight * hidden_losses.cosine_losses(states, targets, masks, pooled)
        logits = getattr(outputs, "logits", None)
        if isinstance(logits, Tensor) and self.alpha_ce:
            terms["kd"] = self.alpha_ce * kd_loss(
                logits,
                teacher_outputs.logits,
                head=losses.head_kind(run.model),
                temperature=self.temperature,
                rows=all_rows(run.model, logits, inputs),
            )
        return terms

    def loss_items(self, run: Run, inputs: Mapping[str, Any]) -> dict[str, Any]:
        mask = hidden_losses.token_masks(inputs, run.model.config.is_encoder_decoder)[-1]
        return {
            "kd": losses.count_scored_rows(run.model, inputs, None, mask),
            "cosine": hidden_losses.count_tokens(run.model, inputs),
            "pooled": hidden_losses.count_tokens(run.model, inputs, pooled=True),
        }

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        self.release_teacher(run)

    def find_teacher(self, run: Run) -> nn.Module:
        teacher = getattr(run.state(self), "teacher", None)
        if teacher is None:
            raise ModelError(
                f"{run.label(self)} has no teacher any more: its stage is finished; optimize the teacher again"
            )
        return teacher

    def recompute(self, case: Any) -> dict[str, Any]:
        kept: dict[str, list[int]] = {}
        for block in topology.blocks(case.after):
            # A few steps of training leave a layer nearer to its original than to any other.
            found = [b for b in topology.blocks(case.before) if b.list_name == block.list_name]
            origin = min(found, key=lambda other: _distance(other.module, block.module))
            kept.setdefault(block.list_name, []).append(origin.index)
        old, new = (sum(p.numel() for p in model.parameters()) for model in (case.before, case.after))
        inside = [
            sum(p.numel() for b in topology.blocks(m) for p in b.module.parameters()) for m in (case.before, case.after)
        ]
        return {
            "layers": kept,
            "parameters_before": old,
            "parameters_after": new,
            "layer_parameters_before": inside[0],
            "layer_parameters_after": inside[1],
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        before, after = metrics["layer_parameters_before"], metrics["layer_parameters_after"]
        chosen = "; ".join(f"{name}: {', '.join(map(str, layers))}" for name, layers in metrics["layers"].items())
        fewer = f"{100 * (1 - after / before):.0f} % fewer"
        types = "kept if the teacher has them" if self.token_types else "dropped as well"
        card.paragraph(
            "The student",
            f"It has {after:,} of the {before:,} parameters of the teacher's layers ({fewer}) "
            f"and was initialized from these (counted from 0): {chosen}. Embeddings and head were copied whole; "
            f"token-type embeddings and pooler, which the paper drops, are {types}.",
        )


def _distance(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return sum(float((a.detach() - b.detach()).square().sum()) for a, b in pairs)


def all_rows(model: Any, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return the rows of ``logits.view(-1, classes)`` of all tokens that are not padding."""
    masks = hidden_losses.token_masks(inputs, model.config.is_encoder_decoder)
    return losses.scored_rows(logits, None, masks[-1])


@hookimpl
def register_techniques(register):
    register(DistilBERT)
