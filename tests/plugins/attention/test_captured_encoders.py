"""``hf_optim.captured`` of encoders under every pattern: no question to the host in a capture, or a reason for none."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from simulated_graphs import SYNCHRONIZES, Capturing
from tiny_models import tiny_vit
from transformers import BertConfig, BertModel

import hf_optim
from hf_optim.toolkit.modules import graph_capture

LENGTH = 320
IDS = [torch.randint(5, 60, (2, LENGTH), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
IMAGES = [torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
SERVED = {
    "local": {"window": 9},
    "blockwise": {"block": 32, "shifts": [0, 1]},
    "dilated": {"window": 8, "dilation": [2]},
    "strided": {"stride": 16, "window": 8},
    "sparse_transformer": {"stride": 16, "vertices": 2},
    "sparse_transformer by head": {"stride": 16, "vertices": 2, "steps": "heads"},
    "sparse_transformer fixed": {"stride": 16, "vertices": 2, "pattern": "fixed"},
    "longformer": {"window": 16},
    "longformer at fixed positions": {"window": 16, "global_first": 1, "global_positions": [70]},
    "etc": {"radius": 8, "global_first": 2},
    "big_bird": {"block": 16, "random": 2},
    "big_bird of transformers' evaluation": {"block": 16, "random": 2, "choice": "tf_eval"},
    "axial": {"columns": 20},
    "axial by head": {"columns": 20, "axes": "heads"},
    "axial union": {"columns": 20, "axes": "union"},
    "compressed": {"stride": 8, "local": 16},
    "compressed with rest": {"stride": 7, "local": 0},
}
REFUSED = {
    "longformer": ({"window": 16, "global_token_ids": [7]}, "are chosen by id"),
    "etc": ({"radius": 8, "global_token_ids": [7]}, "are chosen by id"),
    "big_bird": ({"block": 16, "global_token_ids": [7]}, "are chosen by id"),
    "longformer with projections": (
        {"window": 16, "global_first": 1, "global_projections": True},
        "have projections of their own",
    ),
}


class Strict(Capturing):
    """Raise for copies from the host, too: a tensor of Python numbers is one where the device is a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().partition(".")[0] == "aten::lift_fresh":
            raise RuntimeError("operation not permitted when stream is capturing: a copy from the host")
        return super().__torch_dispatch__(func, types, args, kwargs)


def product(query, key, value, layout, scale, segments_q=None, segments_k=None):
    """Stand in for the kernel, which asks the host for nothing: dense attention, whatever the layout is."""
    scores = query @ key.mT * scale
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@pytest.fixture
def captures(monkeypatch):
    """Capture as a GPU would."""
    made = []

    def record(run, restore, device, pool):
        run()
        with Strict():
            run()
        made.append(run)
        return run, "pool"

    monkeypatch.setattr(graph_capture, "has_graphs", lambda device: True)
    monkeypatch.setattr(graph_capture, "_record", record)
    monkeypatch.setattr(graph_capture, "_end_capture", lambda *_: None)
    with torch.no_grad():
        yield made


def converted(name, settings, monkeypatch, build=None):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    stock = build() if build else BertModel(BertConfig(**sizes, vocab_size=64, max_position_embeddings=LENGTH))
    model = hf_optim.optimize(stock.eval(), [{"technique": name.split()[0], **settings}]).eval()
    code = sys.modules[type(model).__module__]
    monkeypatch.setattr(code, "installed_kernel", lambda *_: product)
    monkeypatch.setattr(code, "flash_on_cpu", lambda *_: False)
    return model


@pytest.mark.many(every=4)
@pytest.mark.parametrize("name", SERVED)
def test_an_encoder_under_a_pattern_is_captured(name, captures, monkeypatch):
    model = converted(name, SERVED[name], monkeypatch)
    forward = hf_optim.captured(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ids in IDS:
            assert torch.equal(forward(ids).last_hidden_state, model(ids).last_hidden_state)
    assert not forward.failure
    assert len(captures) == len(forward.graphs) == 1


@pytest.mark.parametrize("axes", ["layers", "heads", "union"])
def test_an_encoder_of_images_is_captured(axes, captures, monkeypatch):
    model = converted("axial", {"axes": axes}, monkeypatch, tiny_vit)
    forward = hf_optim.captured(model)
    for images in IMAGES:
        assert torch.equal(forward(images).logits, model(images).logits)
    assert not forward.failure
    assert len(captures) == 1


@pytest.mark.parametrize("name", REFUSED)
def test_tokens_that_the_host_finds_are_the_reason_for_no_graph(name, captures, monkeypatch):
    settings, words = REFUSED[name]
    model = converted(name, settings, monkeypatch)
    forward = hf_optim.captured(model)
    forward(IDS[0])
    with pytest.warns(UserWarning, match=words):
        forward(IDS[1])
    assert words in forward.failure
    assert torch.equal(forward(IDS[2]).last_hidden_state, model(IDS[2]).last_hidden_state)
    assert not captures


def test_marked_tokens_run_as_the_model_does_and_the_rest_is_captured(captures, monkeypatch):
    model = converted("longformer", {"window": 16}, monkeypatch)
    forward = hf_optim.captured(model)
    for ids in IDS:
        marks = torch.zeros_like(ids)
        marks[:, int(ids[0, 0])] = 1
        found = forward(ids, global_attention_mask=marks).last_hidden_state
        assert torch.equal(found, model(ids, global_attention_mask=marks).last_hidden_state)
        forward(ids)
    assert not forward.failure
    assert len(captures) == 1


def test_the_simulated_capture_sees_what_a_device_refuses():
    assert "aten::_local_scalar_dense" in SYNCHRONIZES
    with Strict(), pytest.raises(RuntimeError, match="a copy from the host"):
        torch.tensor([1, 2])
    with Strict(), pytest.raises(RuntimeError, match="not permitted"):
        int(torch.ones(1).sum())
