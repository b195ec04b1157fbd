"""Capacities of experts that follow their load: buckets, triggers, the product in buffers, graphs, checkpoints."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import tiny_mixtures
import torch
from capped_oracle import is_registered, without_other_users
from transformers import MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import hf_optim
from hf_optim import CheckpointError
from hf_optim.toolkit.experts import (
    Buckets,
    Routing,
    attach_buckets,
    attach_routing,
    buckets_in,
    detach_buckets,
    detach_routing,
    expert_buckets,
    expert_product,
    kernels,
)
from hf_optim.toolkit.experts import bucketed_layer as layers
from hf_optim.toolkit.experts.bucketed_product import bucketed_product, rooms_of
from hf_optim.toolkit.experts.buckets import CapacityWatch, bucket
from hf_optim.toolkit.topology.experts import fused_experts

IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(autouse=True)
def alone():
    with without_other_users():
        yield


# -- buckets and triggers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "rule", "room"),
    [(0, "power", 0), (1, "power", 1), (5, "power", 8), (64, "power", 64), (65, "power", 100), (1, "64", 64),
     (65, "64", 100)],
)  # fmt: skip
def test_rooms(tokens, rule, room):
    assert bucket(tokens, rule, 100) == room


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rule": "primes"}, "rule must be one of"),
        ({"deviations": -0.5}, "deviations must be from 0"),
        ({"deviations": float("nan")}, "deviations must be a finite number"),
        ({"window": 0}, "window must be an integer"),
        ({"trigger": 20}, "trigger must be at most window"),
        ({"slack": float("inf")}, "slack must be a finite number"),
        ({"graphs": True}, "graphs must be an integer"),
        ({"graphs": 0}, "graphs must be an integer"),
    ],
)
def test_wrong_settings(fields, text):
    with pytest.raises(ValueError, match=text):
        Buckets(**fields)


def test_room_grows_at_once_and_shrinks_when_the_window_needs_less():
    watch = CapacityWatch(Buckets(window=4, deviations=0.0, slack=2.0), tokens=64)
    assert watch.observe((3, 5))
    assert watch.capacities == (4, 8)
    assert not watch.observe((4, 8))  # within the buckets
    assert not watch.fits((5, 1))
    assert watch.observe((5, 1))
    assert watch.capacities == (8, 8)
    assert not watch.observe((1, 1))
    assert not watch.observe((1, 1))
    assert not watch.observe((1, 1))  # the peak of the window is still 5
    assert watch.observe((1, 1))
    assert watch.capacities == (1, 1)
    assert watch.versions == 3


def test_the_trigger_waits_for_so_many_overflows_and_deviations_leave_room():
    watch = CapacityWatch(Buckets(window=8, trigger=2, deviations=0.0), tokens=64)
    watch.observe((4, 4))
    assert not watch.observe((8, 0))
    assert watch.capacities == (4, 4)
    assert watch.observe((9, 0))
    assert watch.capacities == (16, 4)  # the window has the first forward, too
    wide = CapacityWatch(Buckets(deviations=2.0), tokens=64)
    wide.observe((6, 0))  # 6 + 2 * 2.4
    assert wide.capacities == (16, 0)


def test_experts_lose_the_room_that_the_window_does_not_need_when_another_one_overflows():
    watch = CapacityWatch(Buckets(window=2, deviations=0.0, slack=100.0), tokens=64)
    for loads in ((16, 4, 4), (2, 4, 4), (2, 4, 4)):
        watch.observe(loads)
    assert watch.capacities == (16, 4, 4)  # not more than slack times what is needed
    assert watch.observe((2, 4, 8))
    assert watch.capacities == (2, 4, 8)


# -- the product ------------------------------------------------------------------------------------------------------
def bucketed(module, hidden, index, weights, capacities):
    return bucketed_product(module, hidden, index, weights, rooms_of(module, capacities, hidden, weights))


@pytest.fixture(params=["one by one", "grouped", pytest.param("interpreted", marks=pytest.mark.interpreted)])
def products(request, monkeypatch):
    """Let each expert be products of its own, or all of them those of the kernels: by specification, or interpreted."""
    if request.param == "grouped":
        monkeypatch.setattr(kernels, "operators", lambda *_, **__: kernels.load())
    return request.param


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h", "openai_privacy_filter"])
def test_the_product_in_buffers_is_the_product(kind, products):
    module = next(iter(fused_experts(tiny_mixtures.build(kind)).values()))
    experts, width = int(module.num_experts), module.down_proj.shape[1 if not module.is_transposed else 2]
    hidden = torch.randn(24, width, generator=torch.Generator().manual_seed(0))
    index = torch.randn(24, experts, generator=torch.Generator().manual_seed(1)).topk(2).indices
    index[:5, 1] = experts  # computed by none
    weights = torch.rand(24, 2, generator=torch.Generator().manual_seed(2))
    weights[:5, 1] = 0
    with torch.no_grad():
        expected = expert_product(module, hidden, index, weights, False)
        loads = torch.bincount(index.reshape(-1), minlength=experts + 1)[:experts].tolist()
        for capacities in (loads, [24] * experts, [bucket(load, "power", 24) for load in loads]):
            found, counted = bucketed(module, hidden, index, weights, capacities)
            assert torch.allclose(found, expected, atol=1e-5)
            assert counted.tolist() == loads
        busiest = max(range(experts), key=loads.__getitem__)
        small = [load - (expert == busiest) for expert, load in enumerate(loads)]
        found, counted = bucketed(module, hidden, index, weights, small)
    assert counted.tolist() == loads  # so the caller sees that there was no room
    wrong = (found - expected).abs().amax(1) > 1e-6
    last = max(t for t in range(24) if busiest in index[t].tolist())
    assert wrong.nonzero().flatten().tolist() == [last]


def test_an_expert_without_room_is_not_read(products):
    module = next(iter(fused_experts(tiny_mixtures.build("mixtral")).values()))
    with torch.no_grad():
        module.gate_up_proj[3] = float("nan")
        out, _ = bucketed(module, torch.randn(4, 32), torch.tensor([[0, 1]] * 4), torch.ones(4, 2), [4, 4, 0, 0])
    assert bool(out.isfinite().all())


# -- layers -----------------------------------------------------------------------------------------------------------
class Recorded:
    """In place of a CUDA graph: the same product, recomputed from the tensors of the capture."""

    def __init__(self, module, hidden, experts, weights, capacities):
        self.module, self.capacities = module, capacities
        self.shapes = [tuple(t.shape) for t in (hidden, experts, weights)]

    def replay(self, *inputs):
        assert [tuple(t.shape) for t in inputs] == self.shapes
        return bucketed(self.module, *inputs, self.capacities)


@pytest.fixture
def recorded(monkeypatch):
    """Let layers capture on a CPU, where a recording stands for the graph."""
    monkeypatch.setattr(layers, "Graph", Recorded)
    monkeypatch.setattr(layers.BucketedLayer, "_captures", lambda *_: True)


def one_layer(**fields):
    model = tiny_mixtures.build("mixtral", num_local_experts=8)
    names = attach_buckets(model, Buckets(**fields))
    return model, model.get_submodule(names[0]), layers.buckets_of(model.get_submodule(names[0]))


def choose(favourite, seed, tokens=32):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, 8, generator=generator)
    scores[:, favourite] += 0.6
    return (
        torch.randn(tokens, 32, generator=generator),
        scores.topk(2).indices,
        torch.rand(tokens, 2, generator=generator),
    )


def test_every_forward_of_a_drifting_load_equals_the_product_and_nothing_is_dropped(recorded):
    _, module, layer = one_layer(window=4)
    with torch.no_grad():
        for step in range(40):
            inputs = choose(step // 10, step)  # another favourite every ten forwards
            expected = expert_product(module, *inputs, complete=True)
            assert torch.allclose(layer.forward(module, *inputs, complete=True), expected, atol=1e-5)
    counts = layer.counts
    assert counts.forwards == 40 == counts.fitting + counts.overflows + 1  # the first one has no capacities yet
    assert counts.replays == counts.fitting > 20
    assert 2 <= counts.overflows < 10
    assert 2 <= counts.captures <= counts.changes + 1
    assert counts.rows >= counts.pairs == counts.fitting * 64
    static = counts.fitting * 8 * 32  # every expert with the room of the busiest, as a static capacity needs
    assert counts.rows < 0.75 * static


def test_an_overflowing_forward_is_right_and_the_next_one_has_room(recorded):
    _, module, layer = one_layer()
    hidden, _, weights = choose(0, 0)
    balanced = torch.arange(64).view(32, 2) % 8
    to_one = torch.tensor([[3, 5]] * 32)
    with torch.no_grad():
        for index in (balanced, balanced, to_one, to_one):
            expected = expert_product(module, hidden, index, weights, complete=True)
            assert torch.allclose(layer.forward(module, hidden, index, weights, True), expected, atol=1e-5)
    counts = layer.counts
    assert (counts.replays, counts.overflows, counts.captures) == (2, 1, 2)


def test_graphs_and_sizes_are_bounded(recorded, monkeypatch):
    monkeypatch.setattr(layers, "MAX_SIZES", 3)
    _, module, layer = one_layer(graphs=2)
    with torch.no_grad():
        for tokens in (4, 5, 6, 7, 4):
            for seed in range(2):
                layer.forward(module, *choose(0, seed, tokens), complete=True)
    assert len(layer.graphs) <= 2
    assert list(layer.watches) == [6, 7, 4]
    assert layer.forward(
        module, torch.randn(0, 32), torch.zeros(0, 2, dtype=torch.int64), torch.ones(0, 2), True
    ).shape == (0, 32)


def test_packed_experts_run_on_their_own_kernel_and_are_not_captured(recorded):
    model = hf_optim.optimize(tiny_mixtures.build("mixtral"), [{"technique": "rtn"}, {"technique": "dynamoe"}])
    hf_optim.accelerate(model)
    with torch.no_grad():
        outputs = [model(input_ids=IDS).logits for _ in range(3)]
    assert torch.equal(outputs[0], outputs[2])
    for entry in expert_buckets(model).values():
        assert entry["forwards"] >= 3
        assert (entry["captures"], entry["replays"]) == (0, 0)


def test_a_capture_that_fails_leaves_the_layer_usable(recorded, monkeypatch, caplog):
    class Failing:
        def __init__(self, *_):
            raise RuntimeError("out of memory,\ntry less")

    _, module, layer = one_layer()
    monkeypatch.setattr(layers, "Graph", Failing)
    inputs = choose(0, 0)
    with torch.no_grad():
        expected = expert_product(module, *inputs, complete=True)
        for _ in range(3):
            assert torch.equal(layer.forward(module, *inputs, complete=True), expected)
    assert layer.failure == "out of memory, try less"
    assert caplog.text.count("its experts run without graphs from now on") == 1
    assert layer.counts.forwards == 3


def test_graphs_share_the_memory_of_one_that_exists():
    class Held:
        device = torch.device("cuda", 0)
        graph = type("Captured", (), {"pool": lambda self: (0, 7)})()

    assert layers.shared_pool(Held.device) is None
    held = Held()
    layers._live.add(held)
    assert layers.shared_pool(Held.device) == (0, 7)
    assert layers.shared_pool(torch.device("cuda", 1)) is None
    del held
    assert layers.shared_pool(Held.device) is None  # the handle of a pool without graphs must not be used


def test_on_a_cpu_and_in_training_layers_compute_without_buckets_and_count():
    model = tiny_mixtures.build("mixtral")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        attach_buckets(model, Buckets())
        for _ in range(3):
            assert torch.equal(model(input_ids=IDS).logits, expected)
    for entry in expert_buckets(model).values():
        assert (entry["forwards"], entry["fitting"], entry["captures"], entry["replays"]) == (3, 2, 0, 0)
        assert sum(entry["capacities"]["40"]) >= 80
        assert 0 <= entry["padding"] < 1
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("routing_first", [True, False])
@pytest.mark.parametrize("routing_leaves_first", [True, False])
def test_buckets_and_a_capacity_come_and_go_in_any_order(routing_first, routing_leaves_first):
    model = tiny_mixtures.build("mixtral")
    former = model.get_experts_implementation()
    steps = [lambda: attach_routing(model, Routing(capacity=0.5)), lambda: attach_buckets(model, Buckets())]
    for step in steps if routing_first else reversed(steps):
        step()
    with torch.no_grad():
        model(input_ids=IDS)
    assert sum(sum(load.dropped) for load in hf_optim.expert_load(model).values()) > 0
    assert all(entry["forwards"] == 1 for entry in expert_buckets(model).values())
    (detach_routing if routing_leaves_first else detach_buckets)(model)
    assert is_registered()
    assert model.config._experts_implementation == "hf_optim"
    with torch.no_grad():
        model(input_ids=IDS)
    (detach_buckets if routing_leaves_first else detach_routing)(model)
    assert model.get_experts_implementation() == former
    assert "hf_optim" not in ALL_EXPERTS_FUNCTIONS


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("stable", [0, 2])
def test_a_copy_computes_without_the_model_it_was_made_of(duplicate, stable):
    model = tiny_mixtures.build("mixtral")
    former = model.get_experts_implementation()
    attach_buckets(model, Buckets(stable=stable))
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        other = duplicate(model)
        assert all(entry["forwards"] == 0 for entry in expert_buckets(other).values())
        del model
        gc.collect()
        assert torch.equal(other(input_ids=IDS).logits, expected)
    assert all(entry["forwards"] == 1 for entry in expert_buckets(other).values())
    detach_buckets(other)
    assert other.get_experts_implementation() == former
    assert "hf_optim" not in ALL_EXPERTS_FUNCTIONS


def test_a_checkpoint_keeps_the_setting_and_restore_ends_it(tmp_path):
    model = hf_optim.optimize(tiny_mixtures.build("mixtral"), [{"technique": "dynamoe", "rule": "64", "window": 4}])
    assert buckets_in(model) == Buckets(rule="64", window=4)
    model.save_pretrained(tmp_path)
    assert "Buckets of experts" in (tmp_path / "README.md").read_text()
    auto = MixtralForCausalLM.from_pretrained(tmp_path, optim_config="auto")
    stock = MixtralForCausalLM.from_pretrained(tmp_path)
    assert buckets_in(auto) == Buckets(rule="64", window=4)
    assert buckets_in(stock) is None
    with torch.no_grad():
        assert torch.equal(auto(input_ids=IDS).logits, stock(input_ids=IDS).logits)
    hf_optim.restore(auto)
    assert buckets_in(auto) is None
    assert expert_buckets(auto) == {}
    hf_optim.accelerate(stock)
    assert buckets_in(stock) == Buckets(rule="64", window=4)


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ([64], "must be a mapping"),
        ({"rule": "primes"}, "rule must be one of"),
        ({"window": 10**9}, "window must be an integer"),
        ({"window": "4"}, "window must be an integer"),
        ({"rooms": 3}, "unknown field"),
    ],
)
def test_malformed_settings_in_a_checkpoint(held, text, tmp_path):
    model = tiny_mixtures.build("mixtral")
    model.config.hf_optim = {"buckets": held}
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=text):
        MixtralForCausalLM.from_pretrained(tmp_path, optim_config="auto")
