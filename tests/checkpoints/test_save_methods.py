"""The save methods of optimized models are installed in their classes, and removed with the last such model."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import stat

import pytest
import torch
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_optim
from hf_optim import optimize, release, run_of

W8A8 = {"technique": "rtn", "bits": 8, "activations": "int8"}
METHODS = ("save_pretrained", "push_to_hub")
STOCK = [vars(PreTrainedModel)[name] for name in METHODS]
IDS = torch.arange(5, 15)[None]


@pytest.fixture(autouse=True)
def no_models():
    gc.collect()  # models of other tests, which a failed one may hold


def installed(cls=LlamaForCausalLM):
    return [name for name in METHODS if name in vars(cls)]


def is_optimized(folder):
    return (folder / "hf_optim.json").exists()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def of_its_own_class():
    """Return a model of a new class, of which no other test has models."""
    model = tiny_llama()
    model.__class__ = type("LlamaForCausalLM", (LlamaForCausalLM,), {})
    return model


def test_the_class_is_as_before_once_no_model_needs_the_methods():
    first = of_its_own_class()
    cls, second = type(first), of_its_own_class()
    second.__class__ = cls
    first, second = optimize(first, [W8A8]), optimize(second, [W8A8])
    assert installed(cls) == list(METHODS)
    assert [vars(PreTrainedModel)[name] for name in METHODS] == STOCK
    assert not any(name in vars(first) for name in METHODS)
    release(first)
    assert installed(cls) == list(METHODS)
    del second
    assert installed(cls) == []
    # Of the class above, which models of other tests may need.
    assert first.save_pretrained.__func__ is super(cls, first).save_pretrained.__func__


def test_a_released_model_saves_as_stock(tmp_path):
    model = release(optimize(tiny_llama(), [W8A8]))
    model.save_pretrained(tmp_path)
    assert not is_optimized(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


def test_other_models_of_the_class_save_as_stock(tmp_path):
    model, stock = optimize(tiny_llama(), [W8A8]), tiny_llama(1)
    stock.save_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path / "optimized")
    assert not is_optimized(tmp_path / "stock")
    assert is_optimized(tmp_path / "optimized")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "stock").eval()), logits(stock))


def test_a_model_that_only_the_call_holds_is_saved(tmp_path):
    optimize(tiny_llama(), [W8A8]).save_pretrained(tmp_path / "one")
    optimize(tiny_llama(), [W8A8], kernels=True).save_pretrained(tmp_path / "two")
    assert is_optimized(tmp_path / "one")
    assert is_optimized(tmp_path / "two")
    save = optimize(tiny_llama(), [W8A8]).save_pretrained
    save(tmp_path / "three")
    assert is_optimized(tmp_path / "three")


def test_the_method_of_the_class_saves_the_record_too(tmp_path):
    model = optimize(tiny_llama(), [W8A8])
    LlamaForCausalLM.save_pretrained(model, tmp_path / "own")
    PreTrainedModel.save_pretrained(model, tmp_path / "base")
    assert is_optimized(tmp_path / "own")
    assert not is_optimized(tmp_path / "base")


class Counting(LlamaForCausalLM):
    """Has a save method of its own, as CSM and Granite Speech have."""

    saves = 0

    def save_pretrained(self, *args, **kwargs):
        type(self).saves += 1
        super().save_pretrained(*args, **kwargs)


def counting():
    model = tiny_llama()
    return Counting._from_config(LlamaConfig(**model.config.to_dict())).eval()


def test_a_class_with_a_save_method_of_its_own_saves_once_and_gets_it_back(tmp_path):
    own = vars(Counting)["save_pretrained"]
    parent, model = optimize(tiny_llama(), [W8A8]), optimize(counting(), [W8A8])
    Counting.saves = 0
    model.save_pretrained(tmp_path / "own")
    assert Counting.saves == 1
    assert is_optimized(tmp_path / "own")
    parent.save_pretrained(tmp_path / "parent")
    assert Counting.saves == 1
    assert is_optimized(tmp_path / "parent")
    del model
    assert vars(Counting)["save_pretrained"] is own
    assert installed() == list(METHODS)
    del parent


def test_a_wrapper_of_another_library_stays(monkeypatch, tmp_path):
    model = optimize(tiny_llama(), [W8A8])
    ours, calls = LlamaForCausalLM.save_pretrained, []

    def wrapper(self, *args, **kwargs):
        calls.append(1)
        return ours(self, *args, **kwargs)

    LlamaForCausalLM.save_pretrained = wrapper
    try:
        model.save_pretrained(tmp_path / "one")
        assert is_optimized(tmp_path / "one")
        del model
        assert vars(LlamaForCausalLM)["save_pretrained"] is wrapper
        tiny_llama().save_pretrained(tmp_path / "two")
        assert not is_optimized(tmp_path / "two")
        assert len(calls) == 2
    finally:
        del LlamaForCausalLM.save_pretrained


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch_saved(model),
}


def torch_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.many
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_computes_the_same_and_is_saved_without_a_record(how, kernels, tmp_path):
    model = optimize(tiny_llama(), [W8A8], kernels=kernels)
    expected, stock = logits(model), logits(optimize(tiny_llama(), [W8A8]))
    copied = COPIES[how](model)
    assert type(copied) is LlamaForCausalLM
    assert hf_optim.runs.run.find_run(copied) is None
    del model
    assert torch.equal(logits(copied), expected)
    copied.save_pretrained(tmp_path)
    assert not is_optimized(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded), stock)


def test_the_model_that_was_copied_keeps_its_run(tmp_path):
    model = optimize(of_its_own_class(), [W8A8])
    copied = copy.deepcopy(model)
    del copied
    assert run_of(model).model is model
    model.save_pretrained(tmp_path)
    assert is_optimized(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
@pytest.mark.parametrize("step", [W8A8, {"technique": "gmp", "sparsity": 0.5}], ids=["finished", "waits for training"])
def test_others_can_read_what_is_saved(step, tmp_path):
    before = os.umask(0o022)
    try:
        optimize(tiny_llama(), [step]).save_pretrained(tmp_path / "out", max_shard_size="20KB")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) > 1
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}
