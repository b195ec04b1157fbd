"""Deleting an optimized model returns its memory at once, without the garbage collector; a finished run holds none."""

from __future__ import annotations

import ast
import copy
import gc
import pickle
import warnings

import pytest
import torch
from conftest import ROOT
from naive_kernel import NAIVE
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import hf_optim
from hf_optim import (
    Contract,
    ModelError,
    NumericalError,
    OptimTrainer,
    Reload,
    Technique,
    hookimpl,
    optimize,
    run_of,
    technique,
)
from hf_optim.calibration.block_journal import BlockJournal
from hf_optim.testing.memory_checks import held_tensors, kept_after_deletion
from hf_optim.training.peft import keep_masks, merge_adapters

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

W4 = {"technique": "rtn", "bits": 4, "group_size": 16}
W8A8 = {"technique": "rtn", "bits": 8, "activations": "int8"}
GPTQ = {"technique": "gptq", "bits": 4, "group_size": 16}
IDS = torch.randint(3, 60, (4, 8), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS}]


def used(model):
    """Run a model as a user would, since a forward or a backward may leave references, too."""
    with torch.no_grad():
        model(input_ids=IDS)
    if hasattr(model, "generate"):
        model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    return model


def train(model, folder, cls=OptimTrainer, **changes):
    settings = {"max_steps": 2, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    callbacks = hf_optim.callbacks(model) if cls is Trainer else None
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    args = TrainingArguments(folder, **{**settings, **changes})
    cls(model=model, args=args, train_dataset=rows, callbacks=callbacks).train()
    return model


@pytest.fixture
def dense(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


WAYS = {}


def way(make):
    WAYS[make.__name__] = make
    return make


@way
def optimized(dense, folder):
    return used(optimize(tiny_llama(), [W8A8]))


@way
def calibrated_on_the_whole_model(dense, folder):
    return used(optimize(tiny_llama(), {"driver": "whole_model", "steps": [GPTQ]}, BATCHES))


@way
def calibrated_with_a_journal(dense, folder):
    journal = BlockJournal(folder / "journal", resume=False)
    return used(optimize(tiny_llama(), [GPTQ], BATCHES, journal=journal))


@way
def on_kernels(dense, folder):
    return used(optimize(tiny_llama(), [W4], kernels=True))


@way
def on_kernels_with_quantized_inputs(dense, folder):
    return used(optimize(tiny_llama(), [W8A8], kernels=True))


@way
def on_kernels_and_saved(dense, folder):
    model = optimize(tiny_llama(), [W4], kernels=True)
    model.save_pretrained(folder / "saved")
    return used(model)


@way
def on_kernels_and_restored(dense, folder):
    return used(hf_optim.restore(used(optimize(tiny_llama(), [W4], kernels=True))))


@way
def on_a_kernel_and_trained_through(dense, folder):
    model = hf_optim.accelerate(optimize(tiny_llama(), [W4]), [NAIVE])
    model(input_ids=IDS, labels=IDS).loss.backward()
    return model


@way
def loaded_with_a_recipe(dense, folder):
    return used(LlamaForCausalLM.from_pretrained(dense, optim_config=[W4]))


@way
def loaded_with_a_recipe_that_calibrates(dense, folder):
    return used(AutoModelForCausalLM.from_pretrained(dense, optim_config=[GPTQ], calibration=BATCHES))


@way
def loaded_by_auto(dense, folder):
    output = saved(optimize(tiny_llama(), [W4]), folder / "saved")
    return used(AutoModelForCausalLM.from_pretrained(output, optim_config="auto"))


@way
def loaded_by_auto_and_saved(dense, folder):
    output = saved(optimize(tiny_llama(), [W8A8]), folder / "saved")
    model = AutoModelForCausalLM.from_pretrained(output, optim_config="auto")
    model.save_pretrained(folder / "again")
    return used(model)


@way
def loaded_by_auto_without_codes(dense, folder):
    return used(AutoModelForCausalLM.from_pretrained(dense, optim_config="auto"))


@way
def loaded_by_stock_and_accelerated(dense, folder):
    output = saved(optimize(tiny_llama(), [W8A8]), folder / "saved")
    return used(hf_optim.accelerate(AutoModelForCausalLM.from_pretrained(output), []))


@way
def loaded_from_a_checkpoint_with_code(dense, folder):
    output = saved(optimize(tiny_llama(), [{"technique": "gobo"}]), folder / "saved")
    return used(AutoModelForCausalLM.from_pretrained(output, optim_config="auto", trust_remote_code=True))


@way
def replaced_by_another_class(dense, folder):
    return used(optimize(tiny_llama(), [{"technique": "local", "window": 4}, W4]))


@way
def distilled_from_a_teacher(dense, folder):
    return used(train(optimize(tiny_llama(1), [{"technique": "logit_kd", "teacher": str(dense)}]), folder))


@way
def distilled_pruned_quantized_and_saved(dense, folder):
    steps = [{"technique": "logit_kd", "teacher": "self"}, {"technique": "gmp"}, W4]
    model = train(optimize(tiny_llama(), steps), folder, save_strategy="steps", save_steps=1)
    model.save_pretrained(folder / "saved")
    return used(model)


@way
def trained_by_a_stock_trainer(dense, folder):
    return used(train(optimize(tiny_llama(), [{"technique": "gmp"}]), folder, Trainer))


@way
def waiting_for_training(dense, folder):
    return used(optimize(tiny_llama(), [{"technique": "gmp"}]))


@way
def advanced_without_training(dense, folder):
    return used(hf_optim.advance(optimize(tiny_llama(), [{"technique": "gmp"}, GPTQ]), BATCHES))


def lora(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.0))


@way
def with_adapters_under_masks(dense, folder):
    return used(train(keep_masks(lora(optimize(tiny_llama(), [{"technique": "nm"}]))), folder, Trainer))


@way
def with_adapters_merged(dense, folder):
    return used(merge_adapters(train(lora(optimize(tiny_llama(), [{"technique": "nm"}])), folder, Trainer)))


@way
def with_adapters_on_kernels(dense, folder):
    return used(train(lora(optimize(tiny_llama(), [W4], kernels=True)), folder, Trainer))


@way
def released(dense, folder):
    return used(hf_optim.release(optimize(tiny_llama(), [W8A8])))


@way
def optimized_twice(dense, folder):
    return used(optimize(optimize(tiny_llama(), [{"technique": "nm"}]), [W4]))


@way
def copied(dense, folder):
    return used(copy.deepcopy(optimize(tiny_llama(), [W8A8])))


@way
def copied_on_kernels(dense, folder):
    return used(copy.deepcopy(optimize(tiny_llama(), [W4], kernels=True)))


@way
def unpickled(dense, folder):
    return used(pickle.loads(pickle.dumps(optimize(tiny_llama(), [W8A8]))))


@technique("failing", family="test", contract=Contract(), reload=Reload.STOCK_DENSE)
class Failing(Technique):
    """Fails in calibration."""

    @hookimpl
    def calibrate(self, run, scope):
        run.state(self).kept = [parameter.detach().clone() for parameter in scope.model.parameters()]
        raise NumericalError("as planned")
        yield


@way
def failed_in_calibration(dense, folder):
    model = tiny_llama()
    with pytest.raises(NumericalError):
        optimize(model, [Failing()], BATCHES)
    return used(model)


@pytest.mark.many
@pytest.mark.parametrize("name", WAYS)
def test_nothing_is_left_of_a_deleted_model(name, dense, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert kept_after_deletion(lambda: WAYS[name](dense, tmp_path)) == []


def test_a_failed_run_holds_no_tensors():
    model = tiny_llama()
    with pytest.raises(NumericalError):
        optimize(model, [Failing()], BATCHES)
    assert held_tensors(run_of(model)) == []


@pytest.mark.parametrize(
    "steps",
    [
        [{"technique": "smoothquant"}, GPTQ],
        [{"technique": "mixed_precision"}],
        [{"technique": "structured", "neurons": 0.5}],
        [{"technique": "logit_kd", "teacher": "self"}, {"technique": "nm"}],
    ],
    ids=lambda steps: steps[0]["technique"],
)
def test_a_finished_run_holds_its_masks_and_no_other_tensor(steps, tmp_path):
    model = optimize(tiny_llama(), steps, BATCHES)
    run = run_of(model)
    if not run.finished:
        assert held_tensors(run.state(run.recipe.steps[0])), "the teacher is needed until training ends"
        train(model, tmp_path)
    assert run.finished
    assert {id(tensor) for tensor in held_tensors(run)} == {id(mask) for mask in run.masks.values()}


def test_a_model_keeps_one_row_of_its_calibration_data():
    def optimized_on(rows):
        return optimize(tiny_llama(), [GPTQ], [{"input_ids": torch.randint(3, 60, (rows, 8))}])

    optimized_on(2)  # fills the caches of the process
    gc.collect()
    before = {id(tensor) for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)}
    model = optimized_on(64)
    gc.collect()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    left = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and id(x) not in before]
    assert sum(x.untyped_storage().nbytes() for x in left if x.untyped_storage().data_ptr() not in own) <= 8 * 8


def test_a_run_says_that_its_model_was_deleted():
    run = run_of(optimize(tiny_llama(), [W4]))
    assert run.record.finished
    with pytest.raises(ModelError, match="keep a reference to the model that optimize or from_pretrained returned"):
        _ = run.model


@pytest.fixture(scope="module")
def sources():
    return [
        (path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8")))
        for package in ("hf_optim", "plugins", "kernels")
        for path in sorted((ROOT / package).rglob("*.py"))
    ]


def names(node):
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def test_no_caught_exception_is_kept_in_a_variable(sources):
    """It would keep its traceback, the frames of all callers and their models, in a cycle with its own frame."""
    found = [
        f"{path}:{part.lineno}"
        for path, tree in sources
        for handler in ast.walk(tree)
        if isinstance(handler, ast.ExceptHandler) and handler.name
        for part in ast.walk(handler)
        if isinstance(part, (ast.Assign, ast.NamedExpr)) and keeps(part.value, handler.name)
    ]
    assert found == []


def keeps(value, name):
    """Return True if the value of an expression may be the variable itself, and not something made of it."""
    if isinstance(value, ast.Name):
        return value.id == name
    parts = {ast.IfExp: ("body", "orelse"), ast.BoolOp: ("values",), ast.Tuple: ("elts",), ast.List: ("elts",)}
    held = [getattr(value, part) for part in parts.get(type(value), ())]
    return any(keeps(each, name) for part in held for each in (part if isinstance(part, list) else [part]))


def test_no_local_function_calls_itself(sources):
    """It would keep what it closes over in a cycle with itself."""
    found = [
        f"{path}:{inner.lineno}"
        for path, tree in sources
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef)
        for inner in ast.walk(outer)
        if isinstance(inner, ast.FunctionDef) and inner is not outer and inner.name in names(inner)
    ]
    assert found == []
