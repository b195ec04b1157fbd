"""A trace is kept for a structure: what changes a forward is another structure, other weights are not."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import weakref

import pytest
import torch
from tiny_models import TINY, tiny_llama
from torch import nn

from hf_optim.toolkit import topology
from hf_optim.toolkit.modules.thread_values import ThreadValue
from hf_optim.toolkit.modules.tied_blocks import Passage
from hf_optim.toolkit.topology import tracing
from hf_optim.toolkit.topology.trace_cache import KEPT, StructureCache, structure


def structure_of(model):
    return structure(model, topology.dummy_inputs(model), ())


@pytest.fixture
def recorded(monkeypatch):
    """The models whose forward was recorded, with an empty cache."""
    seen, record = [], tracing._trace_fake
    monkeypatch.setattr(tracing, "_cache", StructureCache())
    monkeypatch.setattr(tracing, "_trace_fake", lambda model, *given: seen.append(type(model)) or record(model, *given))
    return seen


@pytest.mark.parametrize("family", TINY)
def test_other_weights_have_the_trace_of_another_model_with_its_own_modules(family, recorded):
    first, second = TINY[family](), TINY[family]()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)
    traces = [topology.trace(model) for model in (first, second)]
    assert len(recorded) == 1
    for traced, model in zip(traces, (first, second), strict=True):
        assert traced.model is model
        assert dict(traced.modules) == dict(model.named_modules())
    assert traces[0].ops == traces[1].ops
    assert traces[0].cache is not traces[1].cache


def test_a_model_without_weights_has_the_trace_of_the_one_with_them(recorded):
    topology.trace(tiny_llama())
    topology.trace(tiny_llama().to("meta"))
    assert len(recorded) == 1


CHANGES = {
    "a setting": lambda model: setattr(model.config, "hidden_act", "gelu"),
    "an attribute": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 1.5),
    "an entry of a dictionary": lambda model: model.config.rope_parameters.update(rope_theta=7.0),
    "a number of another type": lambda model: setattr(model.model.layers[1].self_attn, "attention_dropout", 0),
    "a shape": lambda model: setattr(
        model.model.layers[1], "mlp", tiny_llama(intermediate_size=12).model.layers[1].mlp
    ),
    "a dtype": lambda model: model.model.norm.to(torch.float16),
    "a buffer": lambda model: model.model.register_buffer("extra", torch.ones(2)),
    "a class": lambda model: setattr(model.model, "norm", nn.Identity()),
    "a shared module": lambda model: setattr(model.model.layers[1], "mlp", model.model.layers[0].mlp),
    "a shared weight": lambda model: setattr(model.lm_head, "weight", model.model.embed_tokens.weight),
    "the order of modules": lambda model: setattr(model.model, "layers", nn.ModuleList(model.model.layers[::-1])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_a_forward_reads_is_another_structure(change):
    changed = tiny_llama()
    if change == "the order of modules":  # of equal modules there is no order to tell
        changed.model.layers[0].mlp = nn.Identity()
    same = copy.deepcopy(changed)
    CHANGES[change](changed)
    assert None is not structure_of(changed) != structure_of(same) is not None


def test_a_forward_that_is_replaced_in_its_class_is_traced_again(monkeypatch, recorded):
    topology.trace(tiny_llama())
    norm = type(tiny_llama().model.norm)
    monkeypatch.setattr(norm, "forward", lambda self, states: states * self.weight)
    traced = topology.trace(tiny_llama())
    assert len(recorded) == 2
    assert not any(getattr(op.function, "_opname", "") == "rsqrt" for op in traced.ops)


def test_other_inputs_are_traced_again_and_other_values_are_not(recorded):
    model = tiny_llama()
    for ids in (torch.zeros(1, 4), torch.ones(1, 4), torch.ones(1, 5)):
        traced = topology.trace(model, {"input_ids": ids.long()})
        assert traced.shapes[min(traced.outputs)][1] == ids.shape[1]
    topology.trace(model, {"input_ids": torch.ones(1, 5).long(), "use_cache": False})
    assert len(recorded) == 3


class Opaque:
    """Holds what cannot be compared."""


@pytest.mark.parametrize(
    "value", [Opaque(), functools.partial(max, 1), [Opaque()], [].append], ids=lambda v: repr(type(v))
)
def test_what_cannot_be_compared_is_traced_each_time(value, recorded):
    model = tiny_llama()
    model.model.layers[0].mlp.act_fn.extra = value
    assert structure_of(model) is None
    topology.trace(model)
    topology.trace(model)
    assert len(recorded) == 2


def test_a_loaded_model_has_the_trace_of_the_one_that_was_saved(recorded, tmp_path):
    model = TINY["mixtral"]()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again._weight_conversions
    for each in (again, type(model).from_pretrained(tmp_path).eval()):
        topology.trace(each)
    assert len(recorded) == 1


@dataclasses.dataclass(frozen=True)
class Scheme:
    rounds: int
    parts: tuple = ()


@dataclasses.dataclass
class Changing:
    rounds: int


def kept(value):
    """Return the structure of a model with one more attribute."""
    model = tiny_llama()
    model.model.layers[1].extra = value
    return structure_of(model)


def test_frozen_dataclasses_are_compared_by_their_fields():
    nested = Scheme(1, (Scheme(2),))
    assert None is not kept(nested) == kept(Scheme(1, (Scheme(2),)))
    assert kept(nested) != kept(Scheme(1, (Scheme(3),)))
    assert kept(Scheme(1)) != kept(Scheme(True))
    assert kept(Changing(1)) is None
    assert kept(Scheme(1, (torch.ones(1),))) is None, "a fake copy has the tensor itself"


def test_what_a_forward_notes_is_compared_between_forwards():
    passage, value = Passage(), ThreadValue()
    assert None is not kept(passage) == kept(Passage())
    passage.noted = True
    assert kept(passage) != kept(Passage())
    passage.begin(torch.ones(1, 2), None, None)
    assert kept(passage) is None
    assert None is not kept(value) == kept(ThreadValue())
    value.leave(torch.ones(1))
    assert kept(value) is None


def test_a_function_that_closes_over_something_cannot_be_compared():
    model, scale = tiny_llama(), 2.0
    model.model.extra = lambda states: states * scale
    assert structure_of(model) is None


class Chooses(nn.Module):
    """Computes what depends on the values of its weight."""

    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), value))

    def forward(self, states):
        return states.exp() if self.weight.item() > 0 else states.sin()


def test_a_forward_that_depends_on_weights_is_traced_each_time(recorded):
    names = []
    for value in (1.0, -1.0):
        traced = topology.trace(Chooses(value), {"states": torch.ones(2)})
        assert traced.used_real_weights
        names.append({op.function._opname for op in traced.ops})
    assert "exp" in names[0]
    assert "sin" in names[1]


def test_a_traced_model_is_freed(recorded):
    model = tiny_llama()
    topology.trace(model)
    alive = [weakref.ref(part) for part in (model, model.model.layers[0], model.lm_head.weight)]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [ref() for ref in alive] == [None, None, None]
    finally:
        gc.enable()


def test_the_least_recent_results_are_forgotten():
    cache, computed = StructureCache(), []
    for key in (*range(KEPT), 0, KEPT, 0, 1):
        assert cache.get(key, lambda key=key: computed.append(key) or f"result {key}") == f"result {key}"
    assert computed == [*range(KEPT), KEPT, 1]
    cache.get(None, lambda: computed.append("unknown"))
    cache.get(None, lambda: computed.append("unknown"))
    assert computed[-2:] == ["unknown", "unknown"]
