"""Forwards that are replayed when their sizes come again: equal outputs, when a graph is dropped, what has none."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny_models import tiny_bert, tiny_llama

import hf_optim
from hf_optim.toolkit.modules import captured_forward, graph_capture


class Graphs:
    """What was captured and replayed: a graph is the function itself."""

    captured = replayed = 0

    def record(self, run, restore, device, pool):
        run()
        self.captured += 1

        def replay():
            self.replayed += 1
            run()

        return replay, "pool"


@pytest.fixture
def graphs(monkeypatch):
    simulated = Graphs()
    monkeypatch.setattr(graph_capture, "has_graphs", lambda device: True)
    monkeypatch.setattr(graph_capture, "_record", simulated.record)
    monkeypatch.setattr(graph_capture, "_end_capture", lambda *_: None)
    return simulated


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def ids(length, seed=0):
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(seed))


def encoder():
    return hf_optim.optimize(tiny_bert(), [{"technique": "blockwise", "block": 8}]).eval()


def test_sizes_that_come_again_are_captured_once_and_give_what_the_model_gives(graphs):
    model = encoder()
    forward = hf_optim.captured(model)
    kept = []
    for seed in range(5):
        for length in (12, 20):
            mask = torch.ones(2, length, dtype=torch.long) if seed == 3 else None
            found = forward(ids(length, seed), attention_mask=mask)
            kept.append((found.logits, model(ids(length, seed)).logits))
    assert (graphs.captured, graphs.replayed) == (2, 2 * (1 + 3))  # each is met, captured and checked, and replayed
    for found, right in kept:  # later replays have not changed what was returned
        assert torch.equal(found, right)


def test_other_values_of_weights_are_seen_and_other_weights_noticed(graphs):
    model = encoder()
    forward = hf_optim.captured(model)
    for _ in range(3):
        forward(ids(12))
    model.bert.embeddings.word_embeddings.weight.mul_(1.5)
    assert torch.equal(forward(ids(12)).logits, model(ids(12)).logits)
    before = graphs.captured
    model.classifier.weight = torch.nn.Parameter(model.classifier.weight * 2)
    assert torch.equal(forward(ids(12)).logits, model(ids(12)).logits)
    assert graphs.captured == before + 1
    model.config.attention_pattern = {**model.config.attention_pattern, "block": 5}
    assert torch.equal(forward(ids(12)).logits, model(ids(12)).logits)
    assert not forward.graphs


def test_padding_gradients_and_training_run_as_the_model_does(graphs):
    model = encoder()
    forward = hf_optim.captured(model)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    for _ in range(3):
        assert torch.equal(forward(ids(12), mask).logits, model(ids(12), mask).logits)
    with torch.enable_grad():
        for _ in range(3):
            assert forward(input_ids=ids(12)).logits.requires_grad
    model.train()
    for _ in range(3):
        forward(ids(12))
    assert not graphs.captured


def test_the_graphs_used_last_are_kept(graphs, monkeypatch):
    monkeypatch.setattr(captured_forward, "KEPT", 2)
    forward = hf_optim.captured(encoder())
    for length in (10, 11, 12, 10):
        for _ in range(2):
            forward(ids(length))
    assert len(forward.graphs) == 2
    assert graphs.captured == 4


def hooked(model):
    model.bert.encoder.layer[0].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [(tiny_llama, "returns a DynamicCache"), (lambda: hooked(encoder()), "has hooks, which a replay does not call")],
)
def test_what_cannot_be_captured_says_so_once(build, words, graphs):
    model = build().eval()
    forward = hf_optim.captured(model)
    forward(ids(12))
    with pytest.warns(UserWarning, match=words):
        forward(ids(12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(forward(ids(12)).logits, copy.deepcopy(model)(ids(12)).logits)


def test_a_wrong_result_of_a_graph_is_not_used(graphs, monkeypatch):
    forward = hf_optim.captured(encoder())
    forward(ids(12))
    monkeypatch.setattr(captured_forward, "_copied", lambda outputs: type(outputs)(logits=outputs.logits + 1))
    with pytest.warns(UserWarning, match="the result of its graph is off by"):
        forward(ids(12))
    assert not forward.graphs
