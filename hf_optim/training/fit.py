"""Train a stage of a recipe on a named dataset, for callers without a training loop."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..data import labelled_batches
from ..data.calibration_set import build_calibration_data
from ..data.datasets import load_texts, shuffle_buffer
from ..data.processor_errors import data_errors, no_tokenizer
from ..data.tasks import task_of_model
from ..data.token_sequences import sample_sequences, sequence_length
from ..errors import DataError
from ..lifecycle.stages import require_inputs
from ..recipes.composition import Stage, step_label
from ..recipes.config import DataConfig, OptimConfig
from ..runs import folder_lock, progress
from ..runs.disk_errors import readable_disk_errors
from ..runs.record import public_name
from ..runs.run import find_run, run_of
from .arguments import recipe_errors, require_trainable, training_arguments

if TYPE_CHECKING:
    from transformers import TrainerCallback

log = logging.getLogger(__name__)

RANDOM = "random"
CAUSAL_TASKS = ("text-generation", "image-text-to-text")
TEXT_TASKS = (*CAUSAL_TASKS, "fill-mask", "text-classification", "text2text-generation")
TASKS = (*TEXT_TASKS, "image-classification")
"""The tasks, by their tags, that ``training_rows`` has rows for; the first of them read texts."""

Row = dict[str, Any]


def train_stage(
    model: Any,
    tokenizer: Any,
    data: DataConfig,
    training: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Any:
    """Train the current stage with ``OptimTrainer`` on data of the model's task, and continue with the recipe.

    Args:
        model: a model whose run waits for training.
        tokenizer: its tokenizer, or image processor.
        data: what to train on: chunks of its texts for language models, its labelled rows for classifiers. ``random``
            means random inputs without labels, for steps that need none.
        training: arguments of ``transformers.TrainingArguments``. Checkpoints are kept if these say so, or if the run
            has a journal (next to it, or in their ``output_dir``); a killed training then resumes from the last
            complete checkpoint, bit-exactly.
        callbacks: more callbacks of the ``Trainer``.

    Returns the model, which may be another object than before. Raises ``RecipeError`` for arguments that
    ``TrainingArguments`` does not accept, ``DataError`` for unsuitable data, and ``CheckpointError`` for the journal of
    another training.
    """
    from ..data.mlm_collator import MaskingEpochCallback, MlmCollator
    from .resume import TrainJournal
    from .trainer import OptimTrainer

    run, training = run_of(model), training or {}
    require_trainable(training)
    with data_errors(data.dataset), progress.stage("reading training data"):
        rows, collator = training_rows(model, tokenizer, data)
    journal = TrainJournal(run.journal, run) if run.journal is not None else None
    checkpoint = journal.begin(rows) if journal is not None else None
    with tempfile.TemporaryDirectory() as home:
        if journal is not None:
            home, training = (
                str(journal.output_dir),
                {**journal.checkpoint_arguments("output_dir" in training), **training},
            )
        arguments = training_arguments(home, training)
        with recipe_errors():
            trainer = OptimTrainer(
                model=model,
                args=arguments,
                train_dataset=rows,  # type: ignore[arg-type]
                data_collator=collator,
            )
        for callback in callbacks:
            trainer.add_callback(callback)
        if isinstance(collator, MlmCollator):
            trainer.add_callback(MaskingEpochCallback(collator))
        if journal is not None:
            trainer.add_callback(journal.callback())
        if checkpoint is not None:
            log.info("training resumes from %s", Path(checkpoint).name)
        # Checkpoints are written by the Trainer and by torch, with errors of their own.
        saved = str(trainer.args.output_dir)
        # Without its own counts, the stage shows those of the Trainer's bar.
        with (
            folder_lock.locked(saved),
            readable_disk_errors(saved, "a training checkpoint"),
            progress.stage(f"training {run.stage}"),
        ):
            trainer.train(resume_from_checkpoint=checkpoint)
    # Stages after this one may have run by now.
    trained = [stage for stage in trainer.run.record.stages if stage.get("driver") == "training"]
    if trained and data.dataset is not None:
        trained[-1]["data"] = public_name(data.dataset)
    # A step may have replaced the model: the run has the current one.
    return trainer.run.model


def require_trainable_stage(stage: Stage, model: Any, recipe: OptimConfig, dataset: str | None) -> None:
    """Raise an ``OptimError`` if ``train_stage`` cannot train a stage, as far as it is known before the weights are.

    Args:
        stage: a stage that trains.
        model: the model, which may be on the meta device; that of the recipe, unless an earlier step changes it.
        recipe: the recipe of the stage.
        dataset: the name of the training data; None if it is not known.
    """
    labels = dataset != RANDOM
    if not labels:
        require_own_loss(stage)
    elif task_of_model(model).tag not in TASKS:
        raise _no_training(model)
    for number, step in enumerate(recipe.steps):
        if any(step is member for member in stage.steps):
            step.check_training(model, stage.steps, labels, step_label(number, step))


def _no_training(model: Any) -> DataError:
    return DataError(
        f"there is no built-in training for {type(model).__name__}: train it with OptimTrainer and your own data"
    )


def train_dense(model: Any, tokenizer: Any, data: DataConfig, training: Mapping[str, Any] | None = None) -> Any:
    """Train a model that has no recipe with a stock ``Trainer``, on the rows that ``train_stage`` trains on.

    The arguments are those of ``train_stage``; the loss is that of the labels. Nothing is saved. Returns the model.
    """
    from transformers import Trainer

    from ..data.mlm_collator import MaskingEpochCallback, MlmCollator

    training = training or {}
    with data_errors(data.dataset):
        rows, collator = training_rows(model, tokenizer, data)
    with tempfile.TemporaryDirectory() as home:
        arguments = training_arguments(home, {**training, "output_dir": home, "save_strategy": "no"})
        with recipe_errors():
            trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)  # type: ignore[arg-type]
        if isinstance(collator, MlmCollator):
            trainer.add_callback(MaskingEpochCallback(collator))
        with progress.stage("training the control"):
            trainer.train()
    return model


def require_own_loss(stage: Stage) -> None:
    """Raise ``DataError`` if random inputs, which have no labels, cannot train a stage: no step adds a loss."""
    if not any(step.implements("training_loss") for step in stage.steps):
        raise DataError(f"{stage.label} trains on labels, which random data has none of: name a dataset (--train DATA)")


def training_rows(model: Any, tokenizer: Any, data: DataConfig) -> tuple[list[Row], Any]:
    """Return rows with labels, and the collator that batches them, for the task of the model."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, default_data_collator

    if data.dataset == RANDOM:
        run = find_run(model)
        if run is not None and run.stage is not None:
            require_own_loss(run.stage)
        made = build_calibration_data(RANDOM, model_config=model.config, data=data)
        require_inputs(model, made)
        return [dict(zip(batch, row, strict=True)) for batch in made for row in zip(*batch.values(), strict=True)], (
            default_data_collator
        )
    task = task_of_model(model).tag
    if task in CAUSAL_TASKS:
        return [
            {"input_ids": ids, "labels": ids.clone()} for ids in _windows(model, tokenizer, data)
        ], default_data_collator
    if task == "fill-mask":
        rows = [{"input_ids": ids} for ids in _windows(model, tokenizer, data)]
        from ..data.mlm_collator import MlmCollator

        return rows, MlmCollator(tokenizer, mlm_probability=labelled_batches.MLM_PROBABILITY, seed=data.seed)
    if task == "text-classification":
        found = labelled_batches.text_classification_batches(
            labelled_batches.sample_examples(data), model, tokenizer, data
        )
        return _apart(found), DataCollatorWithPadding(tokenizer)
    if task == "image-classification":
        return _apart(
            labelled_batches.image_classification_batches(
                labelled_batches.sample_examples(data), model, tokenizer, data
            )
        ), default_data_collator
    if task == "text2text-generation":
        return _apart(
            labelled_batches.seq2seq_batches(labelled_batches.sample_examples(data), model, tokenizer)
        ), DataCollatorForSeq2Seq(tokenizer)
    raise _no_training(model)


def require_tokenizer(tokenizer: Any) -> None:
    """Raise ``DataError`` if a processor cannot tokenize texts, or is None."""
    if tokenizer is None or not hasattr(tokenizer, "bos_token_id"):
        raise no_tokenizer("training on texts needs")


def _windows(model: Any, tokenizer: Any, data: DataConfig) -> Tensor:
    require_tokenizer(tokenizer)
    length = sequence_length(model.config, tokenizer, data.seq_len)
    buffer = shuffle_buffer(data)
    return sample_sequences(load_texts(data), tokenizer, length, data.samples, data.seed, shuffle_buffer=buffer)


def _apart(batches: labelled_batches.LabelledBatches) -> list[Row]:
    """Split batches into rows without their padding; the collator pads again."""
    rows = []
    for inputs, labels in batches:
        for i, label in enumerate(labels):
            row = {key: value[i] for key, value in inputs.items()}
            if "attention_mask" in row:
                kept = row["attention_mask"].bool()
                row = {key: value[kept] if value.shape == kept.shape else value for key, value in row.items()}
            row.pop("decoder_input_ids", None)
            # Collators accept one label as a tensor, and a row of labels as a list.
            rows.append(
                {**row, "labels": label if label.dim() == 0 else label[label != labelled_batches.IGNORE_INDEX].tolist()}
            )
    return rows
