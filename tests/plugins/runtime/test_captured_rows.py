"""Captured forwards of packed rows: equal outputs, when a graph is made and dropped, and what runs without one."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import contextmanager

import pytest
import torch
import transformers

from hf_optim import ModelError
from hf_optim.toolkit import packing
from hf_optim.toolkit.modules import graph_capture
from hf_optim.toolkit.packing import captured_rows, interface, per_document
from hf_optim.toolkit.packing.captured_rows import Sizes

SIZE = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
SIZE |= {"max_position_embeddings": 600, "pad_token_id": 1}
MODERN = {"local_attention": 8, "global_attn_every_n_layers": 2, "eos_token_id": 2, "bos_token_id": 3}
MODERN |= {"cls_token_id": 3, "sep_token_id": 2}
DISTIL = {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37, "max_position_embeddings": 600}
ENCODERS = {
    "AlbertModel": {**SIZE, "embedding_size": 16},
    "BertModel": SIZE,
    "BertForSequenceClassification": SIZE,
    "DistilBertModel": {**DISTIL, "pad_token_id": 1},
    "ElectraModel": SIZE,
    "ModernBertModel": {**SIZE, **MODERN},
    "RobertaModel": SIZE,
}


class Simulated:
    """What was captured and replayed: a graph is the function itself."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0
        self.error: Exception | None = None

    def record(self, run, restore, device, pool):
        if self.error is not None:
            raise self.error
        run()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            run()

        return replay, "pool"


@pytest.fixture
def graphs(monkeypatch):
    """Graphs simulated on a CPU, in float64; attention reads the documents' bounds alone, as it does on a GPU."""
    simulated, attend = Simulated(), per_document.attend_documents

    def by_bounds(query, key, value, documents, scale, dropout=0.0, bias=None, reach=None):
        lengths = documents.cu.diff().tolist()
        assert max(lengths) <= documents.longest
        return per_document.attend_groups(query, key, value, lengths, scale, dropout, bias, reach)

    monkeypatch.setattr(interface, "attend_documents", by_bounds)
    monkeypatch.setattr(captured_rows.per_document, "varlen_attn", attend)
    monkeypatch.setattr(captured_rows.per_document, "HALF", (torch.float64,))
    monkeypatch.setattr(graph_capture, "has_graphs", lambda device: True)
    monkeypatch.setattr(graph_capture, "_record", simulated.record)
    monkeypatch.setattr(graph_capture, "_end_capture", lambda *_: None)
    return simulated


def make(name="BertModel", seed=0, **changes):
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    return cls(cls.config_class(**{**ENCODERS[name], **changes})).double().eval()


def batch(lengths=(17, 3, 9, 9, 1, 12), seed=1):
    mask = torch.arange(max(lengths) + 2) < torch.tensor(lengths)[:, None]
    ids = torch.randint(4, 60, mask.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~mask, 1)
    return {"input_ids": ids, "attention_mask": mask.long()}


def pack(model, capture=True):
    packing.attach_packing(model, 1.0, "test", capture)
    return model


def calls_of(model, inputs, count):
    for _ in range(count):
        model(**inputs)


@contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", list(ENCODERS))
def test_replays_equal_stock(name, graphs):
    model, batches = make(name), [batch(seed=seed) for seed in range(4)]
    batches.append(batch((2, 16, 1, 20, 5, 8), seed=9))  # other documents of the same sizes
    stock = [model(**each) for each in batches]
    pack(model)
    with torch.no_grad(), no_warning():
        found = [model(**each) for each in batches]
    assert (graphs.captured, graphs.replayed) == (1, 4)  # the first is launched, the second captured and compared
    for inputs, right, got in zip(batches, stock, found, strict=True):
        assert set(right) == set(got)
        valid = inputs["attention_mask"].bool()
        for key in right:
            rows = key == "last_hidden_state"
            expected, other = (right[key][valid], got[key][valid]) if rows else (right[key], got[key])
            torch.testing.assert_close(other, expected.detach(), rtol=0, atol=1e-12)
        if "last_hidden_state" in got:
            assert not got["last_hidden_state"][~valid].any()


def test_results_are_not_overwritten_by_the_next_batch(graphs):
    model, inputs = pack(make()), batch()
    with torch.no_grad():
        first = [model(**inputs) for _ in range(3)][-1]
        kept = {key: value.clone() for key, value in first.items()}
        model(**batch(seed=5))
    assert graphs.replayed >= 2
    for key, value in kept.items():
        assert torch.equal(first[key], value)


@pytest.mark.parametrize("more", ["token_type_ids", "position_ids", "inputs_embeds"])
def test_other_inputs_are_read_anew(graphs, more):
    model = make()
    batches = [batch(seed=seed) for seed in range(4)]
    for seed, each in enumerate(batches):
        ids, generator = each["input_ids"], torch.Generator().manual_seed(seed)
        if more == "token_type_ids":
            each[more] = torch.randint(0, 2, ids.shape, generator=generator)
        elif more == "position_ids":
            each[more] = torch.arange(ids.shape[1]).expand(ids.shape) + seed
        else:
            each[more] = torch.randn(*ids.shape, 32, generator=generator, dtype=torch.float64)
            del each["input_ids"]
    stock = [model(**each).last_hidden_state for each in batches]
    pack(model)
    with torch.no_grad():
        for right, inputs in zip(stock, batches, strict=True):
            valid = inputs["attention_mask"].bool()
            found = model(**inputs).last_hidden_state[valid]
            torch.testing.assert_close(found, right[valid].detach(), rtol=0, atol=1e-12)
    assert (graphs.captured, graphs.replayed) == (1, 3)


def test_a_model_that_has_changed_is_captured_again(graphs):
    model, inputs = pack(make()), batch()
    with torch.no_grad():
        for _ in range(3):
            model(**inputs)
        model.encoder.layer[0].output.dense.weight.mul_(2)  # in place: the graph reads it
        in_place = model(**inputs).last_hidden_state
        assert graphs.captured == 1
        model.encoder.layer[1].output.dense.weight = torch.nn.Parameter(torch.randn(32, 37, dtype=torch.float64))
        replaced = model(**inputs).last_hidden_state
        assert graphs.captured == 2
        model.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()
        other = model(**inputs).last_hidden_state
        stock = copy.deepcopy(model)
        packing.detach_packing(stock)
        valid = inputs["attention_mask"].bool()
        torch.testing.assert_close(other[valid], stock(**inputs).last_hidden_state[valid], rtol=0, atol=1e-12)
    assert not torch.equal(in_place, replaced)
    assert not torch.equal(replaced, other)


def test_what_is_not_captured(graphs):
    inputs = batch()
    model = pack(make())
    for _ in range(3):
        model(**inputs)  # gradients are recorded
    with torch.no_grad():
        for _ in range(3):
            model(**inputs, output_hidden_states=True)
        model.train()
        for _ in range(3):
            model(**inputs)
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                model(**inputs)
        never = pack(make(), capture=False)
        for _ in range(3):
            never(**inputs)
    assert graphs.captured == 0


def test_hooks_are_called(graphs):
    model, inputs, calls = pack(make()), batch(), []
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"not captured .* encoder.layer.0 has hooks"):
            calls_of(model, inputs, 4)
        assert len(calls) == 4
        assert graphs.captured == 0
        handle.remove()
        for _ in range(3):
            model(**inputs)
        assert graphs.captured == 1
        model.encoder.layer[0].register_forward_hook(lambda *_: calls.append(1))
        calls.clear()
        model(**inputs)  # a replay on a GPU calls none: the result is that of launches
        assert calls
        assert not packing.packing_of(model).captured.graphs


def other_function(model, monkeypatch):
    layer = model.encoder.layer[0].intermediate
    layer.forward = lambda x: torch.tanh(layer.dense(x))


def other_class(model, monkeypatch):
    cls = type(model.encoder.layer[0].intermediate)
    monkeypatch.setattr(cls, "forward", lambda self, x: torch.tanh(self.dense(x)))


def other_mode(model, monkeypatch):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()


def other_configuration(model, monkeypatch):
    model.config.layer_norm_eps = 0.1


def hook_of_all_modules(model, monkeypatch):
    hooks = torch.nn.modules.module._global_forward_hooks
    monkeypatch.setitem(hooks, -1, lambda *_: None)


@pytest.mark.parametrize("change", [other_function, other_class, other_mode, other_configuration, hook_of_all_modules])
def test_a_replay_of_what_the_model_was_is_not_used(change, graphs, monkeypatch):
    model, inputs = pack(make()), batch()
    layer = model.encoder.layer[0].intermediate
    if change is other_function:
        layer.forward = lambda x: torch.relu(layer.dense(x))
    with torch.no_grad():
        calls_of(model, inputs, 3)
        change(model, monkeypatch)
        replayed = graphs.replayed
        model(**inputs)
    # On a GPU the result of a replay would be the former model's.
    assert graphs.replayed == replayed or not packing.packing_of(model).captured.graphs


def test_a_model_whose_dropout_is_left_on_is_not_captured(graphs):
    model, inputs = pack(make()), batch()
    other_mode(model, None)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"embeddings.dropout is in training mode"):
        calls_of(model, inputs, 3)
    assert graphs.captured == 0


def test_a_graph_is_not_kept_for_a_result_without_numbers(graphs):
    model, inputs = pack(make()), batch()
    mask = inputs.pop("attention_mask")
    embedded = torch.randn(*mask.shape, 32, dtype=torch.float64)
    with torch.no_grad(), no_warning():
        for _ in range(3):
            model(inputs_embeds=embedded * float("nan"), attention_mask=mask)
        assert not packing.packing_of(model).captured.graphs
        calls_of(model, {"inputs_embeds": embedded, "attention_mask": mask}, 2)
    assert len(packing.packing_of(model).captured.graphs) == 1


def test_a_capture_that_fails_is_told_once_and_launches_go_on(graphs):
    graphs.error = RuntimeError("no graph of this")
    model, inputs = make(), batch()
    right, valid = model(**inputs).last_hidden_state.detach(), inputs["attention_mask"].bool()
    pack(model)
    with torch.no_grad():
        model(**inputs)
        with pytest.warns(UserWarning, match="is not captured as a CUDA graph.*no graph of this"):
            model(**inputs)
        with no_warning():
            found = model(**inputs).last_hidden_state
    torch.testing.assert_close(found[valid], right[valid], rtol=0, atol=1e-12)


def test_a_graph_that_computes_something_else_is_not_used(graphs, monkeypatch):
    model, inputs = pack(make()), batch()
    load = captured_rows.Graph.load
    monkeypatch.setattr(captured_rows.Graph, "load", lambda self, *args: (load(self, *args), self.cu.sub_(self.cu % 2)))
    with torch.no_grad():
        right = model(**inputs).last_hidden_state
        with pytest.warns(UserWarning, match="result of its graph is off by"):
            assert torch.equal(model(**inputs).last_hidden_state, right)
        assert torch.equal(model(**inputs).last_hidden_state, right)


def test_copies_have_graphs_of_their_own(graphs):
    model, inputs = pack(make()), batch()
    with torch.no_grad():
        for _ in range(2):
            model(**inputs)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other.embeddings.word_embeddings.weight.mul_(2)
            assert not packing.packing_of(other).captured.graphs
            assert not torch.equal(other(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_as_many_graphs_as_are_kept(graphs, monkeypatch):
    monkeypatch.setattr(captured_rows, "KEPT", 3)
    monkeypatch.setattr(captured_rows, "UNUSED", 20)
    model = pack(make())
    held = packing.packing_of(model).captured
    with torch.no_grad():
        for _ in range(4):
            for count in range(5):
                model(**batch((60,) * (2 * count + 1)))
        assert len(held.graphs) == graphs.captured == 3  # all in use: no other is made
        for _ in range(20):
            model(**batch((60,) * 9))
        assert len(held.graphs) == 3
        assert graphs.captured == 4


@pytest.mark.parametrize("lengths", [(1,), (17, 3, 9), (512,) * 12, (1,) * 65, (300, 1, 1), (64,), (127, 129, 4000)])
def test_sizes_hold_the_documents(lengths):
    sizes = Sizes.of(lengths)
    bounds = torch.tensor(sizes.bounds(lengths))
    parts = bounds.diff()
    assert len(bounds) == sizes.documents + 1
    assert int(bounds[-1]) == sizes.tokens
    assert parts[: len(lengths)].tolist() == list(lengths)
    assert int(parts.max()) <= sizes.longest
    assert int(parts.min()) >= 0
    assert sum(lengths) <= sizes.tokens <= max(sum(lengths) + 64, 1.125 * sum(lengths) + 1)


def test_the_setting_is_read_from_a_configuration():
    model = make()
    packing.store_setting(model.config, 0.5, False)
    assert packing.stored_setting(model.config) == {"largest_share": 0.5, "capture": False}
    packing.store_setting(model.config, 0.5, True)
    assert getattr(model.config, packing.SETTING) == {"largest_share": 0.5}
    for wrong in ({"largest_share": 0.5, "capture": 1}, {"capture": True}, {"largest_share": 0.5, "more": 1}):
        setattr(model.config, packing.SETTING, wrong)
        with pytest.raises(ModelError, match=r"config\.json: hf_optim_packing"):
            packing.stored_setting(model.config)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(ENCODERS))
def test_graphs_on_a_gpu(name, dtype):
    model, batches = make(name).cuda(), [batch(seed=seed) for seed in range(4)]
    batches += [batch((2, 16, 1, 20, 5, 8), seed=9), batch((300, 7)), batch((310, 2)), batch((299, 9))]
    batches = [{key: value.cuda() for key, value in each.items()} for each in batches]
    with torch.no_grad():
        stock = [model(**each)[0] for each in batches]
        pack(model.to(dtype))
        with no_warning():
            found = [model(**each)[0] for each in batches]
    held = packing.packing_of(model).captured
    assert len(held.graphs) == 2
    assert not held.failure
    for inputs, right, got in zip(batches, stock, found, strict=True):
        valid = inputs["attention_mask"].bool() if got.dim() == 3 else slice(None)
        error = float((got[valid].double() - right[valid]).norm() / right[valid].norm())
        assert error < {torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
