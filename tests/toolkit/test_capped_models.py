"""Native mixtures of experts with a capacity: the product, padding, copies, ranks, and what is left behind."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_mixtures
import torch
from capped_oracle import is_registered, oracle_of, without_other_users

from hf_optim import ModelError
from hf_optim.toolkit import compat
from hf_optim.toolkit.experts import (
    Routing,
    attach_routing,
    detach_routing,
    expert_load,
    expert_product,
    require_routable,
    routing_of,
)
from hf_optim.toolkit.experts.capped_layer import layer_of
from hf_optim.toolkit.experts.routed_model import experts_forward
from hf_optim.toolkit.experts.tokens import real_tokens
from hf_optim.toolkit.topology import dummy_inputs

IDS = torch.arange(3, 43).reshape(2, 20)
# Gated, without a gate, with biases, transposed, interleaved; normalized gates or not; softmax and sigmoid routers;
# groups, shared experts, a bidirectional encoder, a model of text and images.
KINDS = (
    "mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss", "openai_privacy_filter", "aria_text", "nemotron_h",
    "deepseek_v3", "granitemoe", "phimoe", "qwen3_vl_moe",
)  # fmt: skip


@pytest.fixture(autouse=True)
def alone():
    with without_other_users():
        yield


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **kwargs).logits


def output(model):
    kwargs = {} if model.config.model_type == "openai_privacy_filter" else {"use_cache": False}
    with torch.no_grad():
        found = model(**dummy_inputs(model), **kwargs)
    return found.logits if "logits" in found else found[0]


def check_kind(kind):
    model = tiny_mixtures.build(kind)
    try:
        model.set_experts_implementation("grouped_mm")
    except ValueError:  # in 5.17 some classes do not let their experts be set
        with pytest.raises(ModelError, match=r"takes no function for its experts|do not run through transformers"):
            attach_routing(model, Routing(capacity=0.5))
        assert routing_of(model) is None
        return
    stock = output(model)
    model.set_experts_implementation("eager")
    eager = output(model)
    attach_routing(model, Routing(capacity=1e4))
    ours = output(model)
    assert torch.equal(ours, stock)
    assert torch.allclose(ours, eager, rtol=1e-5, atol=1e-5 * float(eager.abs().max()))
    load = expert_load(model)
    assert sum(map(sum, (part.chosen for part in load.values()))) > 0
    assert not any(map(any, (part.dropped for part in load.values())))
    attach_routing(model, Routing(capacity=0.25, rounding="floor", priority="top1"))
    assert not torch.equal(output(model), stock)
    assert any(any(part.dropped) for part in expert_load(model).values())
    detach_routing(model)
    assert torch.equal(output(model), eager)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in tiny_mixtures.classes()])
def test_with_slots_for_all_a_native_class_is_itself_to_the_bit(kind):
    check_kind(kind)


# Without scipy, deterministic inputs or a forward of its own on dummy inputs these cannot be compared.
NOT_COMPARED = {"diffusion_gemma", "inkling_mm_model", "llama4", "qwen3_omni_moe", "vitpose_backbone"}


@pytest.mark.slow
def test_every_native_class_is_itself_to_the_bit_or_refused():
    refused = []
    for kind in sorted(set(tiny_mixtures.classes()) - set(KINDS) - NOT_COMPARED):
        try:
            require_routable(tiny_mixtures.build(kind, device="meta"), "step 1 (capacity_routing)")
        except ModelError:
            refused.append(kind)
            continue
        check_kind(kind)
    assert set(refused) >= {"dbrx", "jetmoe", "llama4_text", "nllb-moe", "switch_transformers"}
    assert len(refused) < 15


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("priority", ["position", "top1"])
@pytest.mark.parametrize("padding", ["left", "right", "none"])
def test_a_capacity_is_the_count_token_by_token(kind, priority, padding):
    model = tiny_mixtures.build(kind)
    real = torch.ones(2, 20, dtype=torch.bool)
    if padding != "none":
        real[0, : 7 if padding == "left" else None] = False
        real[0, 13:] = padding == "left"
        real[0, 7:13] = True
    mask = real.long() if padding != "none" else None
    with oracle_of(
        model, lambda count: max(1, round(0.5 * 2 * count / 4)), real, None if priority == "position" else priority
    ) as calls:
        expected = logits(model, attention_mask=mask)
    names = attach_routing(model, Routing(capacity=0.5, priority=priority))
    found = logits(model, attention_mask=mask)
    assert torch.allclose(found[real], expected[real], rtol=1e-4, atol=1e-5)
    loads = expert_load(model)
    assert list(loads) == names
    for kept, load in zip(calls, loads.values(), strict=True):
        assert sum(load.chosen) == 2 * int(real.sum())
        assert sum(load.chosen) - sum(load.dropped) == int(kept.sum())
    assert any(any(load.dropped) for load in loads.values())


@pytest.mark.parametrize("where", ["left", "right"])
def test_padding_changes_no_prediction(where):
    model = tiny_mixtures.build("qwen3_moe")
    attach_routing(model, Routing(capacity=0.5))
    alone = logits(model, IDS[:1])
    space = torch.full((1, 6), 50)
    ids = torch.cat([space, IDS[:1]] if where == "left" else [IDS[:1], space], 1)
    mask = (ids != 50).long()
    both = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    assert torch.allclose(both[mask.bool()], alone[0], rtol=1e-4, atol=1e-5)


def test_sequences_that_compete_by_themselves_do_not_influence_each_other():
    model = tiny_mixtures.build("mixtral")
    attach_routing(model, Routing(capacity=0.5, group="sequence", priority="top1"))
    assert torch.allclose(logits(model)[1], logits(model, IDS[1:])[0], rtol=1e-4, atol=1e-5)
    attach_routing(model, Routing(capacity=0.5, group="batch", priority="top1"))
    assert not torch.allclose(logits(model)[1], logits(model, IDS[1:])[0], rtol=1e-2, atol=1e-2)


def test_a_capacity_is_not_causal_and_without_one_the_model_is():
    # A later token's first choice takes the slot of an earlier token's second choice, so this holds by design.
    model = tiny_mixtures.build("mixtral")
    changed = IDS.clone()
    changed[:, -4:] += 60
    attach_routing(model, Routing(capacity=0.5))
    assert not torch.allclose(logits(model)[:, :16], logits(model, changed)[:, :16], atol=1e-3)
    attach_routing(model, Routing(capacity=2.0))
    assert torch.allclose(logits(model)[:, :16], logits(model, changed)[:, :16], atol=1e-5)


def test_masks_of_every_form():
    real = torch.tensor([[False, True, True], [True, True, False]])
    causal = torch.ones(3, 3, dtype=torch.bool).tril() & real[:, None, None, :]
    assert torch.equal(real_tokens(real.long(), 2, 3), real)
    assert torch.equal(real_tokens(torch.cat([real, real], 1).long(), 2, 3), real)
    assert torch.equal(real_tokens(causal, 2, 3), real)
    additive = torch.zeros(2, 1, 3, 3).masked_fill(~causal, torch.finfo(torch.float32).min)
    assert torch.equal(real_tokens(additive, 2, 3), real)
    assert torch.equal(real_tokens({"sliding_attention": None, "full_attention": causal}, 2, 3), real)
    static = torch.nn.functional.pad(causal[:1], (0, 5))  # keys of a static cache that are not filled yet
    assert torch.equal(real_tokens(static, 1, 3), real[:1])
    assert real_tokens(None, 2, 3) is None
    with pytest.raises(ModelError, match=r"pass a mask \[B, T\]"):
        real_tokens(object(), 2, 3)


# -- gradients --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_gradients_are_those_of_the_count_token_by_token(kind):
    model = tiny_mixtures.build(kind)

    def gradients():
        model.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with oracle_of(model, lambda count: max(1, round(0.5 * 2 * count / 4)), priority="top1"):
        expected = gradients()
    attach_routing(model, Routing(capacity=0.5, priority="top1"))
    found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5), name


def test_recomputed_activations_give_the_same_gradients():
    model = tiny_mixtures.build("mixtral").train()
    attach_routing(model, Routing(capacity=0.5))
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    found = []
    for recompute in (False, True):
        if recompute:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model.zero_grad()
        model(input_ids=IDS, attention_mask=mask, labels=IDS, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_in_float64_it_is_the_eager_forward():
    model = tiny_mixtures.build("qwen3_moe").double()
    model.set_experts_implementation("eager")
    eager = logits(model)
    attach_routing(model, Routing(capacity=2.0))
    assert torch.allclose(logits(model), eager, rtol=0, atol=1e-12)


# -- expert parallelism -----------------------------------------------------------------------------------------------
def shard(experts, first, count):
    part = copy.deepcopy(experts)
    for name, parameter in list(part._parameters.items()):
        part._parameters[name] = torch.nn.Parameter(parameter[first : first + count].detach())
    part.num_experts, part._is_expert_parallel = count, True
    layer = layer_of(part)
    layer.counts = torch.zeros_like(layer.counts[:, first : first + count])
    return part


def split_inputs():
    model = tiny_mixtures.build("mixtral")
    (name, _) = attach_routing(model, Routing(capacity=0.5))
    experts = model.get_submodule(name)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, 32, generator=generator)
    weights, index = torch.rand(24, 4, generator=generator).softmax(-1).topk(2)
    return experts, hidden, weights, index


def test_each_rank_keeps_what_one_process_keeps_and_ignores_experts_of_others():
    experts, hidden, weights, index = split_inputs()
    whole = experts_forward(experts, hidden, index, weights)
    parts = []
    for first in (0, 2):
        local = index - first
        elsewhere = (local < 0) | (local >= 2)
        rank = shard(experts, first, 2)
        parts.append(experts_forward(rank, hidden, local.masked_fill(elsewhere, 2), weights.masked_fill(elsewhere, 0)))
        assert torch.equal(layer_of(rank).counts, layer_of(experts).counts[:, first : first + 2])
    assert torch.allclose(sum(parts), whole, atol=1e-6)
    assert layer_of(experts).counts[1].sum() > 0


@pytest.mark.slow
@pytest.mark.skipif(compat.VERSION < (5, 23), reason="transformers exchanges tokens between ranks since 5.23")
@pytest.mark.parametrize("implementation", ["all_reduce", "all_to_all"])
def test_two_ranks_of_transformers_keep_what_one_process_keeps_or_refuse(implementation, tmp_path):
    tiny_mixtures.build("mixtral").save_pretrained(tmp_path / "model")
    script = Path(__file__).parents[1] / "helpers" / "capped_ranks.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(script), str(tmp_path / "model"), implementation, str(tmp_path / "rank")]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    if implementation == "all_to_all":
        assert all("single pairs of tokens" in rank["error"] for rank in ranks)
        return
    for rank in ranks:
        assert rank["difference"] < 1e-4
    for layer, alone in enumerate(ranks[0]["alone"]):
        for kind in (0, 1):
            assert ranks[0]["counts"][layer][kind] + ranks[1]["counts"][layer][kind] == alone[kind]


def test_what_a_rank_cannot_know_is_refused():
    experts, hidden, weights, index = split_inputs()
    rank = shard(experts, 0, 2)
    with pytest.raises(ModelError, match="single pairs of tokens"):
        experts_forward(rank, hidden, index[:, :1], torch.ones(24, 1))
    for change in ({"priority": "top1"}, {"renormalize": True}):
        layer_of(rank).routing = Routing(capacity=0.5, **change)
        with pytest.raises(ModelError, match="needs all gates of a token"):
            experts_forward(rank, hidden, index.clamp(max=2), weights)


@pytest.mark.parametrize("fixed_shapes", [False, True])  # True: as on an accelerator, and in a compiled graph
def test_sentinels_compute_nothing_and_their_rows_are_never_undefined(fixed_shapes, monkeypatch):
    experts, hidden, weights, index = split_inputs()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: fixed_shapes)
    hidden.requires_grad_()
    nobody = torch.full_like(index, 4)
    nobody[0, 0] = 1
    found = expert_product(experts, hidden, nobody, weights, complete=False)
    assert not found[1:].any()
    assert found[0].any()
    found.square().sum().backward()
    assert hidden.grad[0].any()
    assert not hidden.grad[1:].any()
    assert not expert_product(experts, hidden, torch.full_like(index, 4), weights, complete=False).any()


# -- what is left behind ----------------------------------------------------------------------------------------------
def test_the_registry_is_clean_when_the_last_model_is_restored_or_deleted():
    one, other = tiny_mixtures.build("mixtral"), tiny_mixtures.build("qwen3_moe")
    classes = [type(module) for module in one.modules()]
    before = dict(vars(one.model))
    for model in (one, other):
        attach_routing(model, Routing(capacity=0.5))
    detach_routing(one)
    assert is_registered()
    logits(other)
    assert [type(module) for module in one.modules()] == classes
    assert vars(one.model).keys() == before.keys()
    assert one.config._experts_implementation == "grouped_mm"
    del other, model
    assert not is_registered()


def test_copies_and_pickles_keep_their_capacity():
    model = tiny_mixtures.build("mixtral")
    attach_routing(model, Routing(capacity=0.5))
    expected = logits(model)
    stored = pickle.dumps(model)
    copied = copy.deepcopy(model)
    detach_routing(model)
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(copied), expected)
    del copied
    assert not is_registered()
    assert torch.equal(logits(pickle.load(io.BytesIO(stored))), expected)


def test_hidden_states_and_router_logits_are_recorded_as_before():
    model = tiny_mixtures.build("mixtral")
    kwargs = {"input_ids": IDS, "output_hidden_states": True, "output_router_logits": True, "use_cache": False}
    with torch.no_grad():
        expected = model(**kwargs)
        attach_routing(model, Routing(capacity=2.0))
        found = model(**kwargs)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    assert all(map(torch.equal, found.router_logits, expected.router_logits))
    assert found.aux_loss == expected.aux_loss


def test_settings_are_replaced_and_counts_start_again():
    model = tiny_mixtures.build("mixtral")
    attach_routing(model, Routing(capacity=0.5))
    logits(model)
    assert any(expert_load(model, reset=True)["model.layers.0.mlp.experts"].chosen)
    assert not any(expert_load(model)["model.layers.0.mlp.experts"].chosen)
    attach_routing(model, Routing(capacity=0.25))
    assert routing_of(model) == Routing(capacity=0.25)


def test_counts_work_in_inference_mode_and_after_it():
    model = tiny_mixtures.build("mixtral")
    with torch.inference_mode():
        attach_routing(model, Routing(capacity=0.5))
        model(input_ids=IDS)
    logits(model)
    assert sum(expert_load(model)["model.layers.0.mlp.experts"].chosen) == 2 * 2 * IDS.numel()


def test_the_layer_is_traced_into_one_graph():
    model = tiny_mixtures.build("mixtral").bfloat16()
    attach_routing(model, Routing(capacity=0.5, priority="top1"))
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=IDS, use_cache=False).logits, expected)
    torch._dynamo.reset()


def test_a_module_that_gets_a_part_of_the_batch_needs_a_batch_without_padding():
    model = tiny_mixtures.build("mixtral")
    name = attach_routing(model, Routing(capacity=0.5))[0]
    mask = torch.ones_like(IDS)
    logits(model, attention_mask=mask)
    experts = model.get_submodule(name)
    index = torch.tensor([[0, 1]] * 5)
    experts_forward(experts, torch.randn(5, 32), index, torch.rand(5, 2))
    mask[0, 0] = 0
    logits(model, attention_mask=mask)
    with pytest.raises(ModelError, match="padding cannot be told"):
        experts_forward(experts, torch.randn(5, 32), index, torch.rand(5, 2))
    layer_of(experts).routing = Routing(capacity=0.5, group="sequence")
    model(input_ids=IDS)
    with pytest.raises(ModelError, match="set group: batch"):
        experts_forward(experts, torch.randn(5, 32), index, torch.rand(5, 2))
